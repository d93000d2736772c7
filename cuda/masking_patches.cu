// Images as sequences of patches (He et al., CVPR 2022, section 3): all patches or the kept ones alone, straight from
// images of any strides, normalised on the way; and back. What src/ops/patchify.rs does on the CPU.
//
// Three ways to read a patch: runs of memory (channels first from planes, channels last from interleaved pixels),
// four pixels of three planes woven together, or element by element.
#include <type_traits>
#include "common/dtype.cuh"
#include "common/walk.cuh"

namespace smalti {
namespace {

constexpr int kBlock = kThreads, kChannels = 16;

struct Grid {
  int64_t step_n, step_c, step_y, step_x;  // of the images
  int64_t patches, all;                    // taken and present patches of a sample
  int columns, p, c, width;                // width = p * p * c
};

/// y = x * scale[channel] + shift[channel], in the accumulation type, or, not `on`, y = x.
template <class A> struct Affine {
  A scale[kChannels], shift[kChannels];
  bool on;
};

/// Unsigned results are moved; signed ones of the type that is read are asked for with a scale alone.
template <class In, class Out> DEV Out convert(In v, const Affine<Acc<Out>>& affine, int channel) {
  if constexpr (std::is_unsigned_v<Out>) {
    return v;
  } else {
    const Acc<Out> x = (Acc<Out>)widen(v);
    if constexpr (std::is_same_v<In, Out>) return narrow<Out>(x * affine.scale[channel] + affine.shift[channel]);
    else return narrow<Out>(affine.on ? x * affine.scale[channel] + affine.shift[channel] : x);
  }
}

/// Offset of the first pixel of patch number `at` of the result.
DEV int64_t corner(const Grid& g, const int64_t* ids, int64_t at) {
  const int64_t n = divide(at, g.patches), patch = ids ? ids[at] : at - n * g.patches;
  const int64_t row = divide(patch, g.columns), column = patch - row * g.columns;
  return n * g.step_n + row * g.p * g.step_y + column * g.p * g.step_x;
}

/// Patches whose memory is runs of `run` elements in the result's order. Like the next two, a warp a patch: the
/// divisions of 64 bits that find its corner are few. V elements a lane.
template <class In, class Out, int V, bool LAST>
__global__ void __launch_bounds__(kBlock)
    patch_runs(const In* __restrict__ x, const int64_t* __restrict__ ids, Grid g, int64_t rows,
               const __grid_constant__ Affine<Acc<Out>> affine, Out* __restrict__ y) {
  const int run = LAST ? g.p * g.c : g.p, parts = g.width / V;
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int64_t step = (int64_t)gridDim.x * warps;
  ROLLED for (int64_t at = (int64_t)blockIdx.x * warps + (threadIdx.x >> 5); at < rows; at += step) {
    const In* patch = x + corner(g, ids, at);
    Out* to = y + at * g.width;
    for (int i = lane; i < parts; i += 32) {
      const int e = i * V, r = e / run, in_run = e - r * run, channel = LAST ? in_run % g.c : r / g.p;
      const In* from = patch + (LAST ? r * g.step_y : channel * g.step_c + r % g.p * g.step_y) + in_run;
      constexpr int H = V * sizeof(In) > 16 ? kVec<In> : V, W = V * sizeof(Out) > 16 ? kVec<Out> : V;
      Out out[V];
      UNROLL
      for (int h = 0; h < V; h += H) {
        const Vec<In, H> v = load_vec<H>(from + h);
        UNROLL
        for (int j = 0; j < H; j++)
          out[h + j] = convert<In, Out>(v.v[j], affine, LAST ? (channel + h + j) % g.c : channel);
      }
      UNROLL
      for (int w = 0; w < V; w += W) {
        Vec<Out, W> part;
        UNROLL
        for (int j = 0; j < W; j++) part.v[j] = out[w + j];
        store_vec<W>(to + e + w, part);
      }
    }
  }
}

/// Channels last from three planes: four pixels a lane, 12 elements of the result.
template <class In, class Out>
__global__ void __launch_bounds__(kBlock)
    patch_weave(const In* __restrict__ x, const int64_t* __restrict__ ids, Grid g, int64_t rows,
                const __grid_constant__ Affine<Acc<Out>> affine, Out* __restrict__ y) {
  const int parts = g.width / 12, quads = g.p / 4;
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int64_t step = (int64_t)gridDim.x * warps;
  ROLLED for (int64_t at = (int64_t)blockIdx.x * warps + (threadIdx.x >> 5); at < rows; at += step) {
    const In* patch = x + corner(g, ids, at);
    Out* to = y + at * g.width;
    for (int i = lane; i < parts; i += 32) {
      const int row = i / quads, column = (i - row * quads) * 4;
      Out out[12];
      UNROLL
      for (int c = 0; c < 3; c++) {
        const Vec<In, 4> v = load_vec<4>(patch + row * g.step_y + column + c * g.step_c);
        UNROLL
        for (int j = 0; j < 4; j++) out[3 * j + c] = convert<In, Out>(v.v[j], affine, c);
      }
      UNROLL
      for (int w = 0; w < 3; w++) {
        Vec<Out, 4> part;
        UNROLL
        for (int j = 0; j < 4; j++) part.v[j] = out[4 * w + j];
        store_vec<4>(to + i * 12 + 4 * w, part);
      }
    }
  }
}

template <class In, class Out>
__global__ void __launch_bounds__(kBlock)
    patch_any(const In* __restrict__ x, const int64_t* __restrict__ ids, Grid g, bool last, int64_t rows,
              const __grid_constant__ Affine<Acc<Out>> affine, Out* __restrict__ y) {
  const int parts = g.width, area = g.p * g.p;
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int64_t step = (int64_t)gridDim.x * warps;
  ROLLED for (int64_t at = (int64_t)blockIdx.x * warps + (threadIdx.x >> 5); at < rows; at += step) {
    const In* patch = x + corner(g, ids, at);
    Out* to = y + at * g.width;
    ROLLED for (int i = lane; i < parts; i += 32) {
      const int c = last ? i % g.c : i / area, pixel = last ? i / g.c : i % area, line = pixel / g.p;
      to[i] = convert<In, Out>(patch[c * g.step_c + line * g.step_y + (pixel - line * g.p) * g.step_x], affine, c);
    }
  }
}

/// y [N, C, H, W] from patches x [N, L, width] (contiguous): V pixels of a line a thread.
template <class T, int V>
__global__ void __launch_bounds__(kBlock)
    unpatch(const T* __restrict__ x, Grid g, int64_t h, int64_t w, bool last, int64_t total, T* __restrict__ y) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x, parts = w / V;
  ROLLED for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t line = divide(i, parts), px = (i - line * parts) * V, plane = divide(line, h), py = line - plane * h;
    const int64_t n = divide(plane, g.c), c = plane - n * g.c, column = divide(px, g.p), band = divide(py, g.p);
    const int64_t patch = (n * g.all + band * g.columns + column) * g.width;
    const int64_t row = py - band * g.p, at = px - column * g.p;
    if constexpr (V > 1) {  // channels first only
      store_vec<V>(y + line * w + px, load_vec<V>(x + patch + (c * g.p + row) * g.p + at));
    } else {
      y[line * w + px] = x[patch + (last ? (row * g.p + at) * g.c + c : (c * g.p + row) * g.p + at)];
    }
  }
}

/// Whether steps and addresses let `bytes` be read at once from elements of `size` bytes.
bool reads_whole(const smalti_view* x, int64_t elements, int size) {
  return aligned_to(x->ptr, elements * size) && x->stride[0] % elements == 0 && x->stride[1] % elements == 0 &&
         x->stride[2] % elements == 0;
}

template <class In, class Out>
int32_t patches(const smalti_view* x, const smalti_view* ids, const Grid& g, bool last, const Affine<Acc<Out>>& affine,
                const smalti_view* y, void* stream) {
  int rc = 0;
  const int64_t rows = x->shape[0] * g.patches;
  const In* from = (const In*)x->ptr;
  const int64_t* id = ids ? (const int64_t*)ids->ptr : nullptr;
  Out* to = (Out*)y->ptr;
  const bool interleaved = g.step_c == 1 && g.step_x == g.c;
  const int run = last ? g.p * g.c : g.p;
  const dim3 grid(grid_for(rows, kBlock / 32));
  constexpr int V = 8;
  const int most = 16 / (int)sizeof(In) < V ? 16 / (int)sizeof(In) : V;
  // in memory order of pixels every step of the grid is a whole vector where rows and columns are
  const bool whole = run % V == 0 && aligned_to(y->ptr, 16) && aligned_to(x->ptr, most * sizeof(In)) &&
                     g.step_n % most == 0 && g.step_y % most == 0 && (g.p * g.step_x) % most == 0;
  if constexpr (sizeof(In) < 8) {  // those of 8 bytes are seldom asked for: they have one kernel
    if (last && interleaved && whole) {
      auto kernel = patch_runs<In, Out, V, true>;
      LAUNCH_FLAT(rc, kernel, grid, dim3(kBlock), stream, from, id, g, rows, affine, to);
      return rc;
    }
    if (!last && g.step_x == 1 && whole && g.step_c % most == 0) {
      auto kernel = patch_runs<In, Out, V, false>;
      LAUNCH_FLAT(rc, kernel, grid, dim3(kBlock), stream, from, id, g, rows, affine, to);
      return rc;
    }
    if (last && g.step_x == 1 && g.c == 3 && g.p % 4 == 0 && aligned_to(y->ptr, 16) && reads_whole(x, 4, sizeof(In))) {
      auto kernel = patch_weave<In, Out>;
      LAUNCH_FLAT(rc, kernel, grid, dim3(kBlock), stream, from, id, g, rows, affine, to);
      return rc;
    }
  }
  auto kernel = patch_any<In, Out>;
  LAUNCH_FLAT(rc, kernel, grid, dim3(kBlock), stream, from, id, g, last, rows, affine, to);
  return rc;
}

template <class In, class Out>
int32_t patches_affine(const smalti_view* x, const smalti_view* ids, const Grid& g, bool last, const double* scale,
                       const double* shift, const smalti_view* y, void* stream) {
  Affine<Acc<Out>> affine{};
  affine.on = scale != nullptr;
  for (int c = 0; c < g.c && scale; c++) {
    affine.scale[c] = (Acc<Out>)scale[c];
    affine.shift[c] = (Acc<Out>)shift[c];
  }
  return patches<In, Out>(x, ids, g, last, affine, y, stream);
}

/// Sizes of images [N, C, H, W] in patches; false if they are not made of them.
bool grid_of(const smalti_view* x, int64_t p, Grid& g) {
  const int64_t *s = x->shape, *t = x->stride;
  const int64_t most = 1 << 24;
  if (x->rank != 4 || p < 1 || p > most || s[1] > most || s[2] % p || s[3] % p || s[3] / p > most || p * p > most ||
      p * p * s[1] > most)
    return false;
  g = {t[0], t[1], t[2], t[3], 0, s[2] / p * (s[3] / p), (int)(s[3] / p), (int)p, (int)s[1], (int)(p * p * s[1])};
  g.patches = g.all;
  return true;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_patchify(const smalti_view* x, const smalti_view* ids, int64_t p, int32_t last,
                                   const double* scale, const double* shift, const smalti_view* y, void* stream) {
  Grid g;
  if (!grid_of(x, p, g) || y->rank != 3 || !is_contiguous(y) || (scale && g.c > kChannels)) return kInvalid;
  if (ids) {
    if (ids->rank != 2 || ids->dtype != SMALTI_I64 || !is_contiguous(ids) || ids->shape[0] != x->shape[0]) return kInvalid;
    g.patches = ids->shape[1];
  }
  if (y->shape[0] != x->shape[0] || y->shape[1] != g.patches || y->shape[2] != g.width) return kInvalid;
  if (count(y) == 0) return 0;
  if (!scale && x->dtype == y->dtype) {
    int rc = 0;
    DISPATCH_SIZE(x->dtype, T, rc = patches_affine<T, T>(x, ids, g, last, nullptr, nullptr, y, stream))
    return rc;
  }
#define PAIR(IN, OUT, In, Out)                                                                               \
  if (x->dtype == IN && y->dtype == OUT)                                                                     \
    return patches_affine<In, Out>(x, ids, g, last, scale, shift, y, stream);
  PAIR(SMALTI_U8, SMALTI_F32, uint8_t, float)
  PAIR(SMALTI_U8, SMALTI_BF16, uint8_t, bf16)
  PAIR(SMALTI_U8, SMALTI_F16, uint8_t, f16)
  PAIR(SMALTI_F32, SMALTI_F32, float, float)
  PAIR(SMALTI_F32, SMALTI_BF16, float, bf16)
  PAIR(SMALTI_F32, SMALTI_F16, float, f16)
  PAIR(SMALTI_BF16, SMALTI_BF16, bf16, bf16)
  PAIR(SMALTI_F16, SMALTI_F16, f16, f16)
  PAIR(SMALTI_F64, SMALTI_F64, double, double)
#undef PAIR
  return kInvalid;
}

extern "C" int32_t smalti_unpatchify(const smalti_view* x, int64_t p, int32_t last, const smalti_view* y, void* stream) {
  Grid g;
  if (!grid_of(y, p, g) || x->rank != 3 || x->dtype != y->dtype || !is_contiguous(x) || !is_contiguous(y) ||
      x->shape[0] != y->shape[0] || x->shape[1] != g.all || x->shape[2] != g.width)
    return kInvalid;
  const int64_t n = count(y), h = y->shape[2], w = y->shape[3];
  if (n == 0) return 0;
  int rc = 0;
  DISPATCH_SIZE(x->dtype, T, {
    constexpr int V = kVec<T>;
    if (!last && p % V == 0 && aligned_to(x->ptr, 16) && aligned_to(y->ptr, 16)) {
      auto kernel = unpatch<T, V>;
      LAUNCH_FLAT(rc, kernel, dim3(grid_for(n / V, kBlock)), dim3(kBlock), stream, (const T*)x->ptr, g, h, w, false, n / V,
                  (T*)y->ptr);
    } else {
      auto kernel = unpatch<T, 1>;
      LAUNCH_FLAT(rc, kernel, dim3(grid_for(n, kBlock)), dim3(kBlock), stream, (const T*)x->ptr, g, h, w, last != 0, n,
                  (T*)y->ptr);
    }
  })
  return rc;
}
