// Reading and writing at indices: gather, scatter, scatter-add, the check of indices. What src/ops/gather.rs and
// src/ops/scatter.rs do on the CPU. Additions at one element are made in the order of the source, without atomics:
// the same sums from run to run.
#include <type_traits>
#include "common/dtype.cuh"
#include "common/walk.cuh"

namespace smalti {
namespace {

constexpr int kBlock = kThreads;
/// Threads that look for indices out of range, each through its own stretch.
constexpr int64_t kCheckers = 1024;

/// Of each stretch of the index the first element outside 0..size: its number, or -1.
template <class I>
__global__ void __launch_bounds__(kBlock) check_stretches(const int64_t* index, Walk<1> w, int64_t size, int64_t* found) {
  const int64_t t = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= kCheckers) return;
  // a warp's threads read neighbours: element kCheckers * j + t; the least number wins below
  int64_t first = -1;
  for (int64_t i = t; i < w.numel && first < 0; i += kCheckers) {
    int64_t at[1];
    offsets<I>(w, i, at);
    const int64_t id = index[at[0]];
    if (id < 0 || id >= size) first = i;
  }
  found[t] = first;
}

__global__ void check_join(const int64_t* index, Walk<1> w, const int64_t* found, int64_t* result) {
  if (threadIdx.x != 0) return;
  int64_t first = -1;
  for (int64_t t = 0; t < kCheckers; t++)
    if (found[t] >= 0 && (first < 0 || found[t] < first)) first = found[t];
  int64_t at[1] = {0};
  if (first >= 0) offsets<int64_t>(w, first, at);
  result[0] = first;
  result[1] = first >= 0 ? index[at[0]] : 0;
}

/// y = x[.. index ..]; operands: x without its dimension, index, y.
template <class T, class I>
__global__ void __launch_bounds__(kBlock)
    gather_any(const T* __restrict__ x, const int64_t* __restrict__ index, Walk<3> w, int64_t along, T* __restrict__ y) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < w.numel; i += step) {
    int64_t at[3];
    offsets<I>(w, i, at);
    y[at[2]] = x[at[0] + index[at[1]] * along];
  }
}

template <class T> DEV T added(T a, T b) { return (T)(a + b); }
template <> DEV int64_t added(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); }
template <> DEV int32_t added(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
template <> DEV bool added(bool a, bool b) { return a || b; }

/// Steps of destination, index, source and order along the dimension that is scattered in, and its length.
struct Along { int64_t y, index, src, order, length; };

/// A thread a line: its elements in order. Operands: y, index, src without the dimension.
template <class T, bool ADD>
__global__ void __launch_bounds__(kBlock)
    scatter_lines(T* __restrict__ y, const int64_t* __restrict__ index, const T* __restrict__ src, Walk<3> w, Along s) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < w.numel; i += step) {
    int64_t at[3];
    offsets(w, i, at);
    for (int64_t j = 0; j < s.length; j++) {
      T* to = y + at[0] + index[at[1] + j * s.index] * s.y;
      const T v = src[at[2] + j * s.src];
      if constexpr (ADD) *to = added(*to, v); else *to = v;
    }
  }
}

/// A thread an element of the sorted index: the first of equal ones adds all of them up, the last of them writes.
/// Operands: y, index, src, order without the dimension; elements are numbered with the dimension slowest.
template <class T, bool ADD>
__global__ void __launch_bounds__(kBlock)
    scatter_sorted(T* __restrict__ y, const int64_t* __restrict__ index, const T* __restrict__ src,
                   const int64_t* __restrict__ order, Walk<4> w, Along s) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x, total = w.numel * s.length;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += step) {
    const int64_t p = i / w.numel;
    int64_t at[4];
    offsets(w, i - p * w.numel, at);
    const int64_t *ids = index + at[1], *places = order + at[3];
    const T* from = src + at[2];
    const auto id_of = [&](int64_t q) { return ids[places[q * s.order] * s.index]; };
    const int64_t id = id_of(p);
    T* to = y + at[0] + id * s.y;
    if constexpr (ADD) {
      if (p > 0 && id_of(p - 1) == id) continue;
      T sum = *to;
      for (int64_t q = p; q < s.length && id_of(q) == id; q++) sum = added(sum, from[places[q * s.order] * s.src]);
      *to = sum;
    } else if (p + 1 == s.length || id_of(p + 1) != id) {
      *to = from[places[p * s.order] * s.src];
    }
  }
}

__global__ void __launch_bounds__(kBlock)
    one_hot(const int64_t* __restrict__ ids, int64_t n, int64_t classes, int64_t* __restrict__ y) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n * classes; i += step) {
    const int64_t row = i / classes;
    y[i] = ids[row] == i - row * classes;
  }
}

/// A unit of `bytes` that x, y and their steps are multiples of, where the last dimension is dense in both and has one
/// index; elements of `size` bytes.
int unit_of(const Walk<3>& w, const void* x, const void* y, int64_t along, int size) {
  const int d = w.rank - 1;
  if (d < 0 || w.stride[0][d] != 1 || w.stride[1][d] != 0 || w.stride[2][d] != 1) return size;
  for (int unit = 16; unit > size; unit /= 2) {
    const int64_t v = unit / size;
    bool fits = aligned_to(x, unit) && aligned_to(y, unit) && w.shape[d] % v == 0 && along % v == 0;
    for (int e = 0; e < d && fits; e++) fits = w.stride[0][e] % v == 0 && w.stride[2][e] % v == 0;
    if (fits) return unit;
  }
  return size;
}

template <class T> int32_t launch_gather(const void* x, const int64_t* index, Walk<3> w, int64_t along, void* y, int64_t v, void* stream) {
  int rc = 0;
  if (v > 1) {  // in units of v elements
    const int last = w.rank - 1;
    w.numel /= v;
    w.resize(last, w.shape[last] / v);
    along /= v;
    for (int d = 0; d < last; d++) {
      w.stride[0][d] /= v;
      w.stride[2][d] /= v;
    }
  }
  DISPATCH_INDEX(w.numel, I, {
    auto kernel = gather_any<T, I>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(w.numel, kBlock)), dim3(kBlock), stream, (const T*)x, index, w, along, (T*)y);
  })
  return rc;
}

/// Strides with that of `dim` replaced by 0, in `out`.
const int64_t* without(const smalti_view* v, int dim, int64_t (&out)[8]) {
  for (int d = 0; d < 8; d++) out[d] = d == dim ? 0 : v->stride[d];
  return out;
}

/// index is like src, and nowhere larger than y but in `dim`.
bool scatter_fits(const smalti_view* y, int dim, const smalti_view* index, const smalti_view* src) {
  if (dim < 0 || dim >= y->rank || !same_shape(index, src) || index->rank != y->rank || index->dtype != SMALTI_I64 ||
      src->dtype != y->dtype)
    return false;
  for (int d = 0; d < y->rank; d++)
    if (d != dim && index->shape[d] > y->shape[d]) return false;
  return true;
}

template <class T, bool ADD>
int32_t scatter(const smalti_view* y, int dim, const smalti_view* index, const smalti_view* order, const smalti_view* src,
                void* stream) {
  int rc = 0;
  int64_t shape[8], a[8], b[8], c[8], e[8];
  for (int d = 0; d < 8; d++) shape[d] = d == dim ? 1 : index->shape[d];
  const Along s{y->stride[dim], index->stride[dim], src->stride[dim], order ? order->stride[dim] : 0, index->shape[dim]};
  T* to = (T*)y->ptr;
  const T* from = (const T*)src->ptr;
  const int64_t* ids = (const int64_t*)index->ptr;
  if (order) {
    const int64_t* strides[] = {without(y, dim, a), without(index, dim, b), without(src, dim, c), without(order, dim, e)};
    const Walk<4> w = make_walk<4>(index->rank, shape, strides);
    auto kernel = scatter_sorted<T, ADD>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(w.numel * s.length, kBlock)), dim3(kBlock), stream, to, ids, from,
                (const int64_t*)order->ptr, w, s);
  } else {
    const int64_t* strides[] = {without(y, dim, a), without(index, dim, b), without(src, dim, c)};
    const Walk<3> w = make_walk<3>(index->rank, shape, strides);
    auto kernel = scatter_lines<T, ADD>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(w.numel, kBlock)), dim3(kBlock), stream, to, ids, from, w, s);
  }
  return rc;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_index_check_workspace(void) { return (kCheckers + 2) * (int64_t)sizeof(int64_t); }

extern "C" int32_t smalti_index_check(const smalti_view* index, int64_t size, int64_t* result, void* stream) {
  if (index->dtype != SMALTI_I64) return kInvalid;
  // an expanded index repeats itself: each element is looked at once
  int64_t shape[8];
  for (int d = 0; d < index->rank; d++) shape[d] = index->stride[d] == 0 && index->shape[d] > 1 ? 1 : index->shape[d];
  const int64_t* strides[] = {index->stride};
  const Walk<1> w = make_walk<1>(index->rank, shape, strides);
  const int64_t* ids = (const int64_t*)index->ptr;
  int rc = 0;
  DISPATCH_INDEX(w.numel, I, {
    auto kernel = check_stretches<I>;
    LAUNCH_FLAT(rc, kernel, dim3(kCheckers / kBlock), dim3(kBlock), stream, ids, w, size, result + 2);
  })
  if (!rc) LAUNCH_FLAT(rc, check_join, dim3(1), dim3(32), stream, ids, w, result + 2, result);
  return rc;
}

extern "C" int32_t smalti_gather(const smalti_view* x, int32_t dim, const smalti_view* index, const smalti_view* y,
                                 void* stream) {
  if (dim < 0 || dim >= x->rank || index->dtype != SMALTI_I64 || x->dtype != y->dtype || index->rank != x->rank ||
      !same_shape(index, y) || !is_contiguous(y))
    return kInvalid;
  for (int d = 0; d < x->rank; d++)
    if (d != dim && index->shape[d] > x->shape[d]) return kInvalid;
  int64_t base[8];
  const int64_t* strides[] = {without(x, dim, base), index->stride, y->stride};
  const Walk<3> w = make_walk<3>(x->rank, index->shape, strides);
  if (w.numel == 0) return 0;
  const int64_t along = x->stride[dim];
  const int size = size_of(x->dtype), unit = unit_of(w, x->ptr, y->ptr, along, size);
  const int64_t* ids = (const int64_t*)index->ptr;
  switch (unit) {
    case 1: return launch_gather<uint8_t>(x->ptr, ids, w, along, y->ptr, unit / size, stream);
    case 2: return launch_gather<uint16_t>(x->ptr, ids, w, along, y->ptr, unit / size, stream);
    case 4: return launch_gather<uint32_t>(x->ptr, ids, w, along, y->ptr, unit / size, stream);
    case 8: return launch_gather<uint64_t>(x->ptr, ids, w, along, y->ptr, unit / size, stream);
    default: return launch_gather<uint4>(x->ptr, ids, w, along, y->ptr, unit / size, stream);
  }
}

extern "C" int32_t smalti_scatter(const smalti_view* y, int32_t dim, const smalti_view* index, const smalti_view* order,
                                  const smalti_view* src, void* stream) {
  if (!scatter_fits(y, dim, index, src) || (order && (order->dtype != SMALTI_I64 || !same_shape(order, index)))) return kInvalid;
  if (count(index) == 0) return 0;
  int32_t rc = 0;
  DISPATCH_SIZE(y->dtype, T, { rc = scatter<T, false>(y, dim, index, order, src, stream); })
  return rc;
}

extern "C" int32_t smalti_scatter_add(const smalti_view* y, int32_t dim, const smalti_view* index, const smalti_view* order,
                                      const smalti_view* src, void* stream) {
  if (!scatter_fits(y, dim, index, src) || (order && (order->dtype != SMALTI_I64 || !same_shape(order, index)))) return kInvalid;
  if (count(index) == 0) return 0;
  int32_t rc = 0;
  switch (y->dtype) {
    case SMALTI_F32: rc = scatter<float, true>(y, dim, index, order, src, stream); break;
    case SMALTI_F64: rc = scatter<double, true>(y, dim, index, order, src, stream); break;
    case SMALTI_I64: rc = scatter<int64_t, true>(y, dim, index, order, src, stream); break;
    case SMALTI_I32: rc = scatter<int32_t, true>(y, dim, index, order, src, stream); break;
    case SMALTI_U8: rc = scatter<uint8_t, true>(y, dim, index, order, src, stream); break;
    case SMALTI_BOOL: rc = scatter<bool, true>(y, dim, index, order, src, stream); break;
    default: return kInvalid;
  }
  return rc;
}

extern "C" int32_t smalti_one_hot(const smalti_view* ids, const smalti_view* y, void* stream) {
  if (ids->dtype != SMALTI_I64 || y->dtype != SMALTI_I64 || !is_contiguous(ids) || !is_contiguous(y) || y->rank < 1)
    return kInvalid;
  const int64_t n = count(ids), classes = y->shape[y->rank - 1];
  if (count(y) != n * classes) return kInvalid;
  int rc = 0;
  if (n * classes > 0)
    LAUNCH_FLAT(rc, one_hot, dim3(grid_for(n * classes, kBlock)), dim3(kBlock), stream, (const int64_t*)ids->ptr, n, classes,
                (int64_t*)y->ptr);
  return rc;
}
