// Random numbers and dropout. Every number is a function of (seed, stream, position), as in src/random.rs, and of
// arithmetic that rounds alike everywhere: the same bits as on the CPU.
#include "common/exact.cuh"
#include "common/philox.cuh"
#include "common/walk.cuh"

namespace smalti {
namespace {

constexpr int kBlock = kThreads;

/// Four numbers of each Philox block: uniform, or standard normal (Box-Muller on pairs of words).
template <bool NORMAL>
__global__ void __launch_bounds__(kBlock) random_fill(uint64_t seed, uint64_t stream, uint64_t block, int64_t n, float* out) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i * 4 < n; i += step) {
    const Words words = philox(seed, stream, block + (uint64_t)i);
    Vec<float, 4> v;
    if constexpr (NORMAL) {
      UNROLL
      for (int pair = 0; pair < 2; pair++) {
        const float radius =
            sqrt_rn(mul_rn(-2.0f, ln_exact(add_rn(1.0f, -unit_f32(words.w[2 * pair])))));
        float sin, cos;
        turn_exact(unit_f32(words.w[2 * pair + 1]), sin, cos);
        v.v[2 * pair] = mul_rn(radius, cos);
        v.v[2 * pair + 1] = mul_rn(radius, sin);
      }
    } else {
      UNROLL
      for (int j = 0; j < 4; j++) v.v[j] = unit_f32(words.w[j]);
    }
    if (i * 4 + 4 <= n) store_vec<4>(out + i * 4, v);
    else
      for (int j = 0; i * 4 + j < n; j++) out[i * 4 + j] = v.v[j];
  }
}

/// y = x * (word >= threshold ? scale : 0), word i of the stream for element i.
template <class T, bool VECTOR>
__global__ void __launch_bounds__(kBlock)
    dropout(const T* __restrict__ x, uint64_t seed, uint64_t stream, uint64_t block, uint32_t threshold, Acc<T> scale, int64_t n,
            T* __restrict__ y) {
  constexpr int W = kVec<T>, E = W > 4 ? W : 4;  // whole Philox blocks and whole vectors
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i * E < n; i += step) {
    Acc<T> factor[E];
    UNROLL
    for (int b = 0; b < E / 4; b++) {
      const Words words = philox(seed, stream, block + (uint64_t)(i * (E / 4) + b));
      UNROLL
      for (int j = 0; j < 4; j++) factor[4 * b + j] = words.w[j] >= threshold ? scale : (Acc<T>)0;
    }
    const T* from = x + i * E;
    T* to = y + i * E;
    if (VECTOR && i * E + E <= n) {
      UNROLL
      for (int w = 0; w < E; w += W) {
        Vec<T, W> v = load_vec<W>(from + w);
        UNROLL
        for (int j = 0; j < W; j++) v.v[j] = narrow<T>(widen(v.v[j]) * factor[w + j]);
        store_vec<W>(to + w, v);
      }
    } else {
      UNROLL
      for (int j = 0; j < E; j++)
        if (i * E + j < n) to[j] = narrow<T>(widen(from[j]) * factor[j]);
    }
  }
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_random(uint64_t seed, uint64_t philox_stream, uint64_t block, int32_t normal, const smalti_view* y,
                                 void* stream) {
  if (y->dtype != SMALTI_F32 || !is_contiguous(y) || !aligned_to(y->ptr, 16)) return kInvalid;
  const int64_t n = count(y);
  if (n == 0) return 0;
  int rc = 0;
  auto kernel = normal ? random_fill<true> : random_fill<false>;
  LAUNCH_FLAT(rc, kernel, dim3(grid_for((n + 3) / 4, kBlock)), dim3(kBlock), stream, seed, philox_stream, block, n,
              (float*)y->ptr);
  return rc;
}

extern "C" int32_t smalti_dropout(const smalti_view* x, uint64_t seed, uint64_t philox_stream, uint64_t block,
                                  uint32_t threshold, double scale, const smalti_view* y, void* stream) {
  if (x->dtype != y->dtype || !same_shape(x, y) || !is_contiguous(x) || !is_contiguous(y)) return kInvalid;
  const int64_t n = count(y);
  if (n == 0) return 0;
  int rc = 0;
  const bool vector = aligned_to(x->ptr, 16) && aligned_to(y->ptr, 16);
  DISPATCH_FLOAT(x->dtype, T, {
    constexpr int E = kVec<T> > 4 ? kVec<T> : 4;
    auto kernel = vector ? dropout<T, true> : dropout<T, false>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for((n + E - 1) / E, kBlock)), dim3(kBlock), stream, (const T*)x->ptr, seed,
                philox_stream, block, threshold, (Acc<T>)scale, n, (T*)y->ptr);
  })
  return rc;
}
