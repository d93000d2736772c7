// Vector loads and stores, index arithmetic over strided views, and sums over the group of threads that shares a
// row: a warp, or the whole block.
#pragma once
#include "dtype.cuh"
#include "reduce.cuh"
#include <cmath>
#include <type_traits>

namespace smalti {

/// The type that reductions of `T` are computed in: that of `Acc`, and i64 for whole numbers.
template <class T> struct Number { using type = int64_t; };
template <> struct Number<float> { using type = float; };
template <> struct Number<bf16> { using type = float; };
template <> struct Number<f16> { using type = float; };
template <> struct Number<double> { using type = double; };
template <class T> using Num = typename Number<T>::type;

/// Elements of a 16-byte access.
template <class T> constexpr int kWidth = 16 / (int)sizeof(T);
/// The same for kernels that read f64, which is seldom asked for, one by one, to be fewer.
template <class T> constexpr int kRowWidth = sizeof(T) == 8 ? 1 : kWidth<T>;
/// `V` elements that travel in one access.
template <class T, int V> struct alignas(sizeof(T) * V) Pack { T v[V]; };

template <class T, int V> DEV void load(const T* p, Num<T> (&v)[V]) {
  const Pack<T, V> raw = *reinterpret_cast<const Pack<T, V>*>(p);
  UNROLL for (int j = 0; j < V; j++) v[j] = (Num<T>)widen(raw.v[j]);
}
template <class T, int V> DEV Pack<T, V> packed(const Num<T> (&v)[V]) {
  Pack<T, V> raw;
  UNROLL for (int j = 0; j < V; j++) raw.v[j] = narrow<T>(v[j]);
  return raw;
}
/// Left to the compiler, which may cut it up: as a whole (`store_whole`), layer_norm has too few registers.
template <class T, int V> DEV void store(T* p, const Num<T> (&v)[V]) { *reinterpret_cast<Pack<T, V>*>(p) = packed<T, V>(v); }
inline bool aligned(const void* p, size_t bytes = 16) { return (uintptr_t)p % bytes == 0; }

// Powers, and all of f64, are seldom asked for: calls keep the kernels small.
DEV float exp_of(float x) { return expf(x); }
APART double exp_of(double x) { return exp(x); }
DEV float log_of(float x) { return logf(x); }
APART double log_of(double x) { return log(x); }
DEV float sqrt_of(float x) { return sqrtf(x); }
DEV double sqrt_of(double x) { return sqrt(x); }
DEV float abs_of(float x) { return fabsf(x); }
DEV double abs_of(double x) { return fabs(x); }
APART float pow_of(float x, float p) { return powf(x, p); }
APART double pow_of(double x, double p) { return pow(x, p); }
DEV float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
DEV double fma_of(double a, double b, double c) { return fma(a, b, c); }
template <class A> DEV A infinity();
template <> DEV float infinity<float>() { return bits2f(0x7f800000u); }
template <> DEV double infinity<double>() { return 1e300 * 1e300; }

/// Shuffles any small struct of whole words.
template <class A> DEV A shuffle_xor(A v, int mask) {
  static_assert(sizeof(A) % 4 == 0, "words");
  uint32_t w[sizeof(A) / 4];
  __builtin_memcpy(w, &v, sizeof(A));
  UNROLL for (int i = 0; i < (int)(sizeof(A) / 4); i++) w[i] = __shfl_xor_sync(~0u, w[i], mask);
  __builtin_memcpy(&v, w, sizeof(A));
  return v;
}

/// Sum over the `G` threads of a row; G = 32: a warp, else the block has G threads. `scratch`: one A a warp.
template <int G, class A> DEV A group_sum(A v, A* scratch) {
  if (G == 32) return warp_sum(v);
  return block_sum(v, scratch);
}
template <int G, class A> DEV A group_max(A v, A* scratch) {
  v = warp_max(v);
  if (G == 32) return v;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  A m = scratch[0];
  for (int w = 1; w < G / 32; w++) m = scratch[w] > m ? scratch[w] : m;
  __syncthreads();
  return m;
}

/// Rows by groups: a block has eight warps with a row each, or is one group; it goes on to further rows.
template <int G> constexpr int kBlock = G == 32 ? 256 : G;
template <int G> DEV int64_t first_row(int tid) { return G == 32 ? (int64_t)blockIdx.x * 8 + (tid >> 5) : blockIdx.x; }
template <int G> DEV int64_t row_step() { return G == 32 ? (int64_t)gridDim.x * 8 : gridDim.x; }
template <int G> inline dim3 row_grid(int64_t rows) { return dim3(grid_for(rows, G == 32 ? 8 : 1)); }

/// `V` numbers in 16-byte accesses, or one by one.
template <int V, class A> DEV void load_numbers(const A* p, A (&v)[V]) {
  constexpr int W = V < kWidth<A> ? V : kWidth<A>;
  UNROLL for (int j = 0; j < V; j += W) {
    const Pack<A, W> raw = *reinterpret_cast<const Pack<A, W>*>(p + j);
    UNROLL for (int i = 0; i < W; i++) v[j + i] = raw.v[i];
  }
}
/// The same of a vector of parameters; a null pointer stands for `value` throughout.
template <int V, class A> DEV void load_or(const A* p, int64_t at, A value, A (&v)[V]) {
  if (p) load_numbers<V>(p + at, v);
  else { UNROLL for (int j = 0; j < V; j++) v[j] = value; }
}

/// From a position in row-major order to the offsets of N tensors that share the shape.
template <int N> struct Index {
  int32_t rank;
  Divisor by[8];  // shape
  int64_t shape[8], stride[N][8];

  HOST_DEV void at(int64_t i, int64_t (&off)[N]) const {
    UNROLL for (int k = 0; k < N; k++) off[k] = 0;
    if (i < (int64_t)1 << 31) {
      uint32_t left = (uint32_t)i;
      ROLLED for (int d = rank - 1; d > 0; d--) {
        const uint32_t q = by[d].of(left);
        advance(stride, d, (int64_t)(left - q * (uint32_t)shape[d]), off);
        left = q;
      }
      i = left;
    } else {
      ROLLED for (int d = rank - 1; d > 0; d--) {
        const int64_t q = i / shape[d];
        advance(stride, d, i - q * shape[d], off);
        i = q;
      }
    }
    advance(stride, 0, i, off);
  }
  HOST_DEV int64_t first(int64_t i) const {
    int64_t off[N];
    at(i, off);
    return off[0];
  }
};

/// One dimension of N tensors, on the host.
template <int N> struct Axis { int64_t n, stride[N]; };

/// Orders dimensions by the first tensor's memory, drops those of size 1, merges neighbours that are one in all.
template <int N> inline Index<N> make_index(Axis<N>* axes, int count) {
  auto size = [](int64_t v) { return v < 0 ? -v : v; };
  for (int i = 1; i < count; i++)  // stable: equal strides keep their order
    for (int j = i; j > 0 && size(axes[j].stride[0]) > size(axes[j - 1].stride[0]); j--) {
      const Axis<N> t = axes[j];
      axes[j] = axes[j - 1];
      axes[j - 1] = t;
    }
  Index<N> x{};
  for (int i = 0; i < count; i++) {
    if (axes[i].n == 1) continue;
    bool merge = x.rank > 0;
    for (int k = 0; k < N && merge; k++) merge = x.stride[k][x.rank - 1] == axes[i].stride[k] * axes[i].n;
    if (!merge) x.shape[x.rank++] = 1;
    x.shape[x.rank - 1] *= axes[i].n;
    for (int k = 0; k < N; k++) x.stride[k][x.rank - 1] = axes[i].stride[k];
  }
  for (int d = 0; d < x.rank; d++) x.by[d] = Divisor(x.shape[d]);
  return x;
}
/// Do all offsets of tensor k fall on multiples of v, dimension `but` aside?
template <int N> inline bool steps_by(const Index<N>& x, int k, int64_t v, int but = -1) {
  for (int d = 0; d < x.rank; d++)
    if (d != but && x.stride[k][d] % v) return false;
  return true;
}

inline int64_t count(const smalti_view& v) {
  int64_t n = 1;
  for (int d = 0; d < v.rank; d++) n *= v.shape[d];
  return n;
}
inline bool same_shape(const smalti_view& a, const smalti_view& b) {
  if (a.rank != b.rank) return false;
  for (int d = 0; d < a.rank; d++)
    if (a.shape[d] != b.shape[d]) return false;
  return true;
}
/// Row-major without gaps?
inline bool contiguous(const smalti_view& v) {
  int64_t step = 1;
  for (int d = v.rank - 1; d >= 0; d--) {
    if (v.shape[d] != 1 && v.stride[d] != step) return count(v) == 0;
    step *= v.shape[d];
  }
  return true;
}
/// The dtype that `dtype` is computed in.
inline int32_t computed_in(int32_t dtype) { return dtype == SMALTI_F64 ? SMALTI_F64 : SMALTI_F32; }
/// A contiguous vector of n elements of a dtype, or nothing where that is allowed.
inline bool is_vector(const smalti_view* v, int64_t n, int32_t dtype) {
  return v && v->dtype == dtype && count(*v) == n && contiguous(*v);
}
/// Contiguous, of the shape and dtype of x.
inline bool is_like(const smalti_view* v, const smalti_view& x) {
  return v && v->dtype == x.dtype && same_shape(*v, x) && contiguous(*v);
}
inline bool is_vector_or_null(const smalti_view* v, int64_t n, int32_t dtype) { return !v || is_vector(v, n, dtype); }
/// A contiguous matrix.
inline smalti_view matrix(const void* p, int32_t dtype, int64_t rows, int64_t n) {
  smalti_view v{};
  v.ptr = (void*)p;
  v.dtype = dtype;
  v.rank = 2;
  v.shape[0] = rows;
  v.shape[1] = n;
  v.stride[0] = n;
  v.stride[1] = 1;
  return v;
}
template <class P> inline P* pointer(const smalti_view* v) { return v ? (P*)v->ptr : nullptr; }

}  // namespace smalti
