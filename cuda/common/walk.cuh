// Walking strided tensors: the dimensions of several operands merged as far as they go, so that a kernel divides
// by few sizes, and vectors of up to 16 bytes where every operand allows it.
#pragma once
#include "../kernels.h"
#include "../mma.cuh"

namespace smalti {
inline namespace walk {

/// Threads of a block of kernels that work at any size. The emulator makes a fiber of each under ThreadSanitizer.
#if defined(__CUDACC__)
constexpr int kThreads = 256;
#else
constexpr int kThreads = 64;
#endif

/// `V` elements that are moved at once (16 bytes at most).
template <class T, int V> struct alignas(sizeof(T) * V) Vec { T v[V]; };
template <int V, class T> DEV Vec<T, V> load_vec(const T* p) { return *(const Vec<T, V>*)p; }
template <int V, class T> DEV void store_vec(T* p, const Vec<T, V>& v) { store_whole(p, v); }
/// Elements of 16 bytes.
template <class T> constexpr int kVec = 16 / (int)sizeof(T);

inline bool aligned_to(const void* p, size_t bytes) { return (uintptr_t)p % bytes == 0; }

/// The elements of a shape in row-major order with the offsets of N operands.
template <int N> struct Walk {
  int rank = 0;
  int64_t numel = 1;
  int64_t shape[8] = {};
  Divisor by[8];  // shape
  int64_t stride[N][8] = {};

  /// Gives an axis another size, and with it another divisor.
  void resize(int d, int64_t n) { shape[d] = n; by[d] = Divisor(n); }
};

/// Drops dimensions of size 1 and merges neighbours that every operand lays out without a gap.
template <int N> Walk<N> make_walk(int rank, const int64_t* shape, const int64_t* const (&strides)[N]) {
  Walk<N> w;
  for (int d = 0; d < rank; d++) {
    w.numel *= shape[d];
    if (shape[d] == 1) continue;
    bool merges = w.rank > 0;
    for (int o = 0; o < N && merges; o++) merges = w.stride[o][w.rank - 1] == strides[o][d] * shape[d];
    const int at = merges ? w.rank - 1 : w.rank++;
    w.shape[at] = merges ? w.shape[at] * shape[d] : shape[d];
    for (int o = 0; o < N; o++) w.stride[o][at] = strides[o][d];
  }
  for (int d = 0; d < w.rank; d++) w.resize(d, w.shape[d]);
  return w;
}

/// Offsets of element `i`; `I` is uint32_t where numel is below 2^31, whose divisions are products.
template <class I, int N> DEV void offsets(const Walk<N>& w, int64_t i, int64_t (&o)[N]) {
  for (int n = 0; n < N; n++) o[n] = 0;
  I rest = (I)i;
  ROLLED for (int d = w.rank - 1; d > 0; d--) {
    I q;
    if constexpr (sizeof(I) == 4) q = w.by[d].of(rest);
    else q = rest / w.shape[d];
    const I c = rest - q * (I)w.shape[d];
    advance(w.stride, d, (int64_t)c, o);
    rest = q;
  }
  if (w.rank > 0) advance(w.stride, 0, (int64_t)rest, o);
}
/// The same of kernels that are not made twice.
template <int N> DEV void offsets(const Walk<N>& w, int64_t i, int64_t (&o)[N]) {
  if (w.numel >> 31) offsets<int64_t>(w, i, o);
  else offsets<uint32_t>(w, i, o);
}

/// Number of elements of a view.
inline int64_t count(const smalti_view* v) {
  int64_t n = 1;
  for (int d = 0; d < v->rank; d++) n *= v->shape[d];
  return n;
}

inline bool is_contiguous(const smalti_view* v) {
  int64_t step = 1;
  for (int d = v->rank - 1; d >= 0; d--) {
    if (v->shape[d] != 1 && v->stride[d] != step) return count(v) == 0;
    step *= v->shape[d];
  }
  return true;
}

inline bool same_shape(const smalti_view* a, const smalti_view* b) {
  bool same = a->rank == b->rank;
  for (int d = 0; d < a->rank && same; d++) same = a->shape[d] == b->shape[d];
  return same;
}

/// Bytes of an element.
inline int size_of(int dtype) {
  switch (dtype) {
    case SMALTI_F64: case SMALTI_I64: return 8;
    case SMALTI_F32: case SMALTI_I32: return 4;
    case SMALTI_BF16: case SMALTI_F16: return 2;
    default: return 1;
  }
}

}  // namespace walk
}  // namespace smalti

/// Runs the statements with `I` uint32_t for element numbers that fit, else int64_t.
#define DISPATCH_INDEX(numel, I, ...)                                                                        \
  if ((numel) < (int64_t)1 << 31) { using I = uint32_t; __VA_ARGS__; } else { using I = int64_t; __VA_ARGS__; }
