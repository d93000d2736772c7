// Tokens of masked autoencoders (He et al., CVPR 2022, section 3): kept ones gathered, mask tokens put in the place of
// the others, positions added on the way, and the gradients of all of these. What src/ops/masking.rs does on the CPU.
//
// Rows (tokens) are moved by one warp each, 16 bytes a lane where sizes allow, four loads in flight a lane. Sums have
// a fixed order and no atomics: they are the same from run to run and on every device.
#include "common/order.cuh"
#include "common/walk.cuh"

namespace smalti {
namespace {

constexpr int kRowBlock = kThreads, kInFlight = 4;

/// Writes a row of `d` elements: f(column) gives the vector that starts there.
template <int V, class T, class F> DEV void write_row(T* to, int64_t d, int lane, F f) {
  for (int64_t c0 = lane * V; c0 < d; c0 += 32 * V * kInFlight) {
    Vec<T, V> part[kInFlight];
    UNROLL
    for (int u = 0; u < kInFlight; u++)
      if (c0 + u * 32 * V < d) part[u] = f(c0 + u * 32 * V);
    UNROLL
    for (int u = 0; u < kInFlight; u++)
      if (c0 + u * 32 * V < d) store_vec<V>(to + c0 + u * 32 * V, part[u]);
  }
}

template <class T, int V> DEV Vec<T, V> sum_vec(const Vec<T, V>& a, const Vec<T, V>& b) {
  Vec<T, V> s;
  UNROLL
  for (int i = 0; i < V; i++) s.v[i] = narrow<T>(widen(a.v[i]) + widen(b.v[i]));
  return s;
}

/// Stores `V` elements, 16 bytes at a time where `V` is more than one.
template <int V, class Out> DEV void store_many(Out* to, const Out (&v)[V]) {
  constexpr int W = V < kVec<Out> ? V : kVec<Out>;
  UNROLL
  for (int i = 0; i < V; i += W) {
    Vec<Out, W> part;
    UNROLL
    for (int j = 0; j < W; j++) part.v[j] = v[i + j];
    store_vec<W>(to + i, part);
  }
}

struct Rows {
  int64_t n, k, d, step_n, step_row;  // samples, rows a sample, width; steps of the source
};

/// y[n, k] = x[n, ids[n, k]] (+ pos[ids[n, k]])
template <class T, int V, bool POS>
__global__ void __launch_bounds__(kRowBlock) gather_rows(const T* __restrict__ x, const T* __restrict__ pos,
                                                         const int64_t* __restrict__ ids, Rows s, T* __restrict__ y) {
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int64_t step = (int64_t)gridDim.x * warps;
  for (int64_t row = (int64_t)blockIdx.x * warps + (threadIdx.x >> 5); row < s.n * s.k; row += step) {
    const int64_t id = ids[row];
    const T* from = x + row / s.k * s.step_n + id * s.step_row;
    write_row<V>(y + row * s.d, s.d, lane, [&](int64_t c) {
      const Vec<T, V> v = load_vec<V>(from + c);
      if constexpr (POS) return sum_vec<T, V>(v, load_vec<V>(pos + id * s.d + c));
      else return v;
    });
  }
}

/// y[n, 0] = x[n, 0] + pos[0]; y[n, 1 + i] = (r = restore[n, i]) < keep ? x[n, 1 + r] : token, + pos[1 + i].
template <class T, int V>
__global__ void __launch_bounds__(kRowBlock)
    unshuffle_rows(const T* __restrict__ x, const T* __restrict__ token, const int64_t* __restrict__ restore,
                   const T* __restrict__ pos, Rows s, int64_t tokens, T* __restrict__ y) {
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int64_t step = (int64_t)gridDim.x * warps;
  for (int64_t row = (int64_t)blockIdx.x * warps + (threadIdx.x >> 5); row < s.n * s.k; row += step) {
    const int64_t sample = row / s.k, i = row - sample * s.k;
    const int64_t at = i == 0 ? 0 : 1 + restore[sample * (s.k - 1) + i - 1];
    const T* from = at < tokens ? x + sample * s.step_n + at * s.step_row : token;
    write_row<V>(y + row * s.d, s.d, lane, [&](int64_t c) {
      return sum_vec<T, V>(load_vec<V>(from + c), load_vec<V>(pos + i * s.d + c));
    });
  }
}

/// out[g, l] = sum over the samples n of group g, in order, and over k with ids[n, k] = l of x[n, k]. Each row of
/// the result looks its sources up (32 ids a ballot), so nothing is zeroed first and nothing added atomically.
template <class T, class Out, int V>
__global__ void __launch_bounds__(kRowBlock)
    collect_rows(const T* __restrict__ x, const int64_t* __restrict__ ids, Rows s, int64_t len, int64_t per_group,
                 int64_t groups, Out* __restrict__ out) {
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int64_t step = (int64_t)gridDim.x * warps;
  for (int64_t row = (int64_t)blockIdx.x * warps + (threadIdx.x >> 5); row < groups * len; row += step) {
    const int64_t group = row / len, wanted = row - group * len;
    const int64_t n0 = group * per_group, n1 = n0 + per_group < s.n ? n0 + per_group : s.n;
    for (int64_t c0 = 0; c0 < s.d; c0 += 32 * V * kInFlight) {
      Acc<T> acc[kInFlight][V];
      bool any = false;
      UNROLL
      for (int u = 0; u < kInFlight; u++) {
        UNROLL
        for (int i = 0; i < V; i++) acc[u][i] = (Acc<T>)-0.0;  // -0 + x is x, bit for bit
      }
      for (int64_t n = n0; n < n1; n++)
        for (int64_t k0 = 0; k0 < s.k; k0 += 32) {
          const int64_t k = k0 + lane;
          unsigned found = __ballot_sync(~0u, k < s.k && ids[n * s.k + k] == wanted);
          for (; found; found &= found - 1) {
            any = true;
            const T* from = x + n * s.step_n + (k0 + __ffs((int)found) - 1) * s.step_row;
            UNROLL
            for (int u = 0; u < kInFlight; u++) {
              const int64_t c = c0 + (u * 32 + lane) * V;
              if (c >= s.d) continue;
              const Vec<T, V> v = load_vec<V>(from + c);
              UNROLL
              for (int i = 0; i < V; i++) acc[u][i] += widen(v.v[i]);
            }
          }
        }
      UNROLL
      for (int u = 0; u < kInFlight; u++) {
        const int64_t c = c0 + (u * 32 + lane) * V;
        if (c >= s.d) continue;
        Out sums[V];
        UNROLL
        for (int i = 0; i < V; i++) {
          const Acc<T> sum = any ? acc[u][i] : (Acc<T>)0;
          if constexpr (sizeof(Out) == sizeof(Acc<T>)) sums[i] = sum;
          else sums[i] = narrow<T>(sum);
        }
        store_many<V>(out + row * s.d + c, sums);
      }
    }
  }
}

/// Backward of the un-shuffle, one reading of g [N, 1 + L, D]: a warp takes position i of the samples of a group.
/// Rows of kept tokens go to their place (a permutation: each is written once); sums of all rows (positions) and of
/// masked rows (mask token) go to `pos_part` and `mask_part` [groups, 1 + L, D].
template <class T, int V>
__global__ void __launch_bounds__(kRowBlock)
    unshuffle_back(const T* __restrict__ g, const int64_t* __restrict__ restore, Rows s, int64_t keep, int64_t per_group,
                   int64_t groups, T* __restrict__ dx, Acc<T>* __restrict__ pos_part, Acc<T>* __restrict__ mask_part) {
  constexpr int U = 2;
  const int lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  const int64_t tiles = (s.d + 32 * V * U - 1) / (32 * V * U), step = (int64_t)gridDim.x * warps;
  for (int64_t job = (int64_t)blockIdx.x * warps + (threadIdx.x >> 5); job < groups * s.k * tiles; job += step) {
    const int64_t row = job / tiles, group = row / s.k, i = row - group * s.k;
    const int64_t c0 = (job - row * tiles) * (32 * V * U) + lane * V;
    const int64_t n0 = group * per_group, n1 = n0 + per_group < s.n ? n0 + per_group : s.n;
    Acc<T> all[U][V] = {}, masked[U][V] = {};
    for (int64_t n = n0; n < n1; n++) {
      const int64_t at = i == 0 ? 0 : 1 + restore[n * (s.k - 1) + i - 1];
      const bool kept = at <= keep;
      if (!pos_part && (kept ? !dx : !mask_part)) continue;
      UNROLL
      for (int u = 0; u < U; u++) {
        const int64_t c = c0 + u * 32 * V;
        if (c >= s.d) continue;
        const Vec<T, V> v = load_vec<V>(g + n * s.step_n + i * s.step_row + c);
        if (kept && dx) store_vec<V>(dx + (n * (1 + keep) + at) * s.d + c, v);
        UNROLL
        for (int j = 0; j < V; j++) {
          const Acc<T> w = widen(v.v[j]);
          all[u][j] += w;
          masked[u][j] += kept ? (Acc<T>)0 : w;
        }
      }
    }
    UNROLL
    for (int u = 0; u < U; u++) {
      const int64_t c = c0 + u * 32 * V;
      if (c >= s.d) continue;
      if (pos_part) store_many<V>(pos_part + row * s.d + c, all[u]);
      if (mask_part) store_many<V>(mask_part + row * s.d + c, masked[u]);
    }
  }
}

/// Rows that one thread adds up, in order.
constexpr int64_t kLevel = 64;

/// out[j, c] = sum of rows j * kLevel .. of in [rows, width], each column by one thread in order.
template <class A, class Out>
__global__ void sum_level(const A* in, int64_t rows, int64_t width, Out* out) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x, n = (rows + kLevel - 1) / kLevel * width;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    const int64_t j = i / width, c = i - j * width;
    const int64_t r1 = (j + 1) * kLevel < rows ? (j + 1) * kLevel : rows;
    A sum = 0;
    for (int64_t r = j * kLevel; r < r1; r++) sum += in[r * width + c];
    if constexpr (sizeof(Out) == sizeof(A)) out[i] = (Out)sum;
    else out[i] = narrow<Out>(sum);
  }
}

/// Sums the columns of `part` [rows, width], level by level; `part` is used up. At least one row.
template <class T> int32_t sum_rows(Acc<T>* part, int64_t rows, int64_t width, T* out, void* stream) {
  int rc = 0;
  Acc<T>* free_part = part + rows * width;
  while (rows > kLevel && !rc) {
    const int64_t next = (rows + kLevel - 1) / kLevel;
    auto kernel = sum_level<Acc<T>, Acc<T>>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(next * width, kThreads)), dim3(kThreads), stream, part, rows, width, free_part);
    part = free_part;
    free_part += next * width;
    rows = next;
  }
  auto kernel = sum_level<Acc<T>, T>;
  if (!rc) LAUNCH_FLAT(rc, kernel, dim3(grid_for(width, kThreads)), dim3(kThreads), stream, part, rows, width, out);
  return rc;
}

/// Elements that `sum_rows` needs for `rows` rows, these included.
int64_t levels(int64_t rows, int64_t width) {
  int64_t total = rows;
  while (rows > kLevel) total += rows = (rows + kLevel - 1) / kLevel;
  return total * width;
}

/// Samples are summed in groups, then the groups: enough warps for the device, a bounded workspace. A function of
/// the shape alone, so that results do not depend on the device.
int64_t groups_of(int64_t n) {
  const int64_t groups = (n + 7) / 8;
  return groups < 1 ? 1 : groups > 32 ? 32 : groups;
}
int64_t per_group_of(int64_t n) {
  const int64_t groups = groups_of(n);
  return (n + groups - 1) / groups;
}

/// x [N, rows, D] with dense rows.
bool tokens_fit(const smalti_view* x, int dtype) {
  return x->rank == 3 && x->dtype == dtype && (x->shape[2] <= 1 || x->stride[2] == 1);
}
bool ids_of(const smalti_view* ids, int64_t n) {
  return ids->rank == 2 && ids->dtype == SMALTI_I64 && ids->shape[0] == n && is_contiguous(ids);
}
/// Whether rows of these tokens can be moved 16 bytes at a time.
template <class T> bool whole_vectors(const smalti_view* x) {
  return x->shape[2] % kVec<T> == 0 && x->stride[0] % kVec<T> == 0 && x->stride[1] % kVec<T> == 0 && aligned_to(x->ptr, 16);
}
Rows rows_of(const smalti_view* x, int64_t k) { return {x->shape[0], k, x->shape[2], x->stride[0], x->stride[1]}; }

}  // namespace
}  // namespace smalti

using namespace smalti;

// Vectors where they fit, single elements elsewhere, and for f64, which is seldom asked for.
#define DISPATCH_VEC(wide, T, V, ...)                                                                        \
  if (wide) { constexpr int V = sizeof(T) == 8 ? 1 : kVec<T>; __VA_ARGS__; } else { constexpr int V = 1; __VA_ARGS__; }

extern "C" int32_t smalti_gather_tokens(const smalti_view* x, const smalti_view* pos, const smalti_view* ids,
                                        const smalti_view* y, void* stream) {
  if (!tokens_fit(x, y->dtype) || !ids_of(ids, x->shape[0]) || !tokens_fit(y, y->dtype) || !is_contiguous(y) ||
      y->shape[0] != ids->shape[0] || y->shape[1] != ids->shape[1] || y->shape[2] != x->shape[2])
    return kInvalid;
  if (pos && (pos->rank != 2 || pos->dtype != x->dtype || pos->shape[0] != x->shape[1] || pos->shape[1] != x->shape[2] ||
              !is_contiguous(pos)))
    return kInvalid;
  const Rows s = rows_of(x, ids->shape[1]);
  if (count(y) == 0) return 0;
  int rc = 0;
  const dim3 grid(grid_for(s.n * s.k, kRowBlock / 32));
  DISPATCH_FLOAT(x->dtype, T, {
    const bool wide = whole_vectors<T>(x) && whole_vectors<T>(y) && (!pos || aligned_to(pos->ptr, 16));
    DISPATCH_VEC(wide, T, V, {
      auto kernel = pos ? gather_rows<T, V, true> : gather_rows<T, V, false>;
      LAUNCH_FLAT(rc, kernel, grid, dim3(kRowBlock), stream, (const T*)x->ptr, pos ? (const T*)pos->ptr : nullptr,
                  (const int64_t*)ids->ptr, s, (T*)y->ptr);
    })
  })
  return rc;
}

extern "C" int32_t smalti_ungather_tokens(const smalti_view* x, const smalti_view* ids, const smalti_view* y,
                                          void* stream) {
  if (!tokens_fit(x, y->dtype) || !ids_of(ids, x->shape[0]) || ids->shape[1] != x->shape[1] || !tokens_fit(y, y->dtype) ||
      !is_contiguous(y) || y->shape[0] != x->shape[0] || y->shape[2] != x->shape[2])
    return kInvalid;
  const Rows s = rows_of(x, x->shape[1]);
  const int64_t len = y->shape[1];
  if (count(y) == 0) return 0;
  int rc = 0;
  const dim3 grid(grid_for(s.n * len, kRowBlock / 32));
  DISPATCH_FLOAT(x->dtype, T, {
    DISPATCH_VEC(whole_vectors<T>(x) && aligned_to(y->ptr, 16), T, V, {
      auto kernel = collect_rows<T, T, V>;
      LAUNCH(rc, kernel, grid, dim3(kRowBlock), 0, stream, (const T*)x->ptr, (const int64_t*)ids->ptr, s, len, (int64_t)1,
             s.n, (T*)y->ptr);
    })
  })
  return rc;
}

extern "C" int64_t smalti_gather_tokens_pos_workspace(int64_t n, int64_t len, int64_t d, int32_t dtype) {
  return levels(groups_of(n), len * d) * (dtype == SMALTI_F64 ? 8 : 4);
}

extern "C" int32_t smalti_gather_tokens_pos_backward(const smalti_view* g, const smalti_view* ids, const smalti_view* dpos,
                                                     void* workspace, void* stream) {
  if (!tokens_fit(g, dpos->dtype) || !ids_of(ids, g->shape[0]) || ids->shape[1] != g->shape[1] || dpos->rank != 2 ||
      !is_contiguous(dpos) || dpos->shape[1] != g->shape[2])
    return kInvalid;
  const Rows s = rows_of(g, g->shape[1]);
  const int64_t len = dpos->shape[0], groups = groups_of(s.n);
  if (count(dpos) == 0) return 0;
  int rc = 0;
  const dim3 grid(grid_for(groups * len, kRowBlock / 32));
  DISPATCH_FLOAT(g->dtype, T, {
    Acc<T>* part = (Acc<T>*)workspace;
    DISPATCH_VEC(whole_vectors<T>(g), T, V, {
      auto kernel = collect_rows<T, Acc<T>, V>;
      LAUNCH(rc, kernel, grid, dim3(kRowBlock), 0, stream, (const T*)g->ptr, (const int64_t*)ids->ptr, s, len,
             per_group_of(s.n), groups, part);
    })
    if (!rc) rc = sum_rows<T>(part, groups, len * s.d, (T*)dpos->ptr, stream);
  })
  return rc;
}

extern "C" int32_t smalti_unshuffle_forward(const smalti_view* x, const smalti_view* token, const smalti_view* restore,
                                            const smalti_view* pos, const smalti_view* y, void* stream) {
  const int dtype = y->dtype;
  if (!tokens_fit(x, dtype) || !ids_of(restore, x->shape[0]) || !tokens_fit(y, dtype) || !is_contiguous(y) ||
      token->dtype != dtype || token->rank != 1 || token->shape[0] != x->shape[2] || !is_contiguous(token) ||
      pos->dtype != dtype || pos->rank != 2 || pos->shape[0] != restore->shape[1] + 1 || pos->shape[1] != x->shape[2] ||
      !is_contiguous(pos) || y->shape[0] != x->shape[0] || y->shape[1] != pos->shape[0] || y->shape[2] != x->shape[2])
    return kInvalid;
  const Rows s = rows_of(x, pos->shape[0]);
  if (count(y) == 0) return 0;
  int rc = 0;
  const dim3 grid(grid_for(s.n * s.k, kRowBlock / 32));
  DISPATCH_FLOAT(dtype, T, {
    const bool wide =
        whole_vectors<T>(x) && aligned_to(token->ptr, 16) && aligned_to(pos->ptr, 16) && aligned_to(y->ptr, 16);
    DISPATCH_VEC(wide, T, V, {
      auto kernel = unshuffle_rows<T, V>;
      LAUNCH_FLAT(rc, kernel, grid, dim3(kRowBlock), stream, (const T*)x->ptr, (const T*)token->ptr,
                  (const int64_t*)restore->ptr, (const T*)pos->ptr, s, x->shape[1], (T*)y->ptr);
    })
  })
  return rc;
}

extern "C" int64_t smalti_unshuffle_workspace(int64_t n, int64_t length, int64_t d, int32_t dtype, int32_t want_mask,
                                              int32_t want_pos) {
  const int64_t groups = groups_of(n);
  const int64_t mask = want_mask ? levels(groups * length, d) : 0, pos = want_pos ? levels(groups, length * d) : 0;
  return (mask + pos) * (dtype == SMALTI_F64 ? 8 : 4);
}

extern "C" int32_t smalti_unshuffle_backward(const smalti_view* g, const smalti_view* restore, int64_t keep,
                                             const smalti_view* dx, const smalti_view* dtoken, const smalti_view* dpos,
                                             void* workspace, void* stream) {
  if (!ids_of(restore, g->shape[0]) || !tokens_fit(g, g->dtype) || g->shape[1] != restore->shape[1] + 1) return kInvalid;
  const smalti_view* results[] = {dx, dtoken, dpos};
  for (const smalti_view* r : results)
    if (r && (r->dtype != g->dtype || !is_contiguous(r))) return kInvalid;
  const Rows s = rows_of(g, g->shape[1]);
  if ((dx && count(dx) != s.n * (1 + keep) * s.d) || (dtoken && count(dtoken) != s.d) || (dpos && count(dpos) != s.k * s.d))
    return kInvalid;
  if (s.d == 0) return 0;
  const int64_t groups = groups_of(s.n);
  int rc = 0;
  DISPATCH_FLOAT(g->dtype, T, {
    Acc<T>* mask_part = dtoken ? (Acc<T>*)workspace : nullptr;
    Acc<T>* pos_part = dpos ? (Acc<T>*)workspace + (dtoken ? levels(groups * s.k, s.d) : 0) : nullptr;
    DISPATCH_VEC(whole_vectors<T>(g) && (!dx || aligned_to(dx->ptr, 16)), T, V, {
      const int64_t jobs = groups * s.k * ((s.d + 64 * V - 1) / (64 * V));
      auto kernel = unshuffle_back<T, V>;
      LAUNCH_FLAT(rc, kernel, dim3(grid_for(jobs, kRowBlock / 32)), dim3(kRowBlock), stream, (const T*)g->ptr,
                  (const int64_t*)restore->ptr, s, keep, per_group_of(s.n), groups, dx ? (T*)dx->ptr : nullptr, pos_part,
                  mask_part);
    })
    if (!rc && dtoken) rc = sum_rows<T>(mask_part, groups * s.k, s.d, (T*)dtoken->ptr, stream);
    if (!rc && dpos) rc = sum_rows<T>(pos_part, groups, s.k * s.d, (T*)dpos->ptr, stream);
  })
  return rc;
}
