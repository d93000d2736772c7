// Around a linear layer's product: bias and exact GELU in one pass, its backward with the bias gradient in one
// pass, column sums. The library's GELU epilogues are the tanh approximation, so the exact one is here.
#include "common/dtype.cuh"
#include "common/reduce.cuh"
#include <cmath>

namespace smalti {
namespace {

/// V elements side by side, moved as one.
template <class T, int V> struct alignas(sizeof(T) * V) Pack { T v[V]; };

DEV float phi(float z) { return 0.5f * (1.f + erff(z * 0.70710678118654752f)); }
DEV double phi(double z) { return 0.5 * (1. + erf(z * 0.70710678118654752440)); }
/// z times the normal density, which is the derivative of phi.
DEV float slope(float z) { return z * 0.39894228040143268f * expf(-0.5f * z * z); }
DEV double slope(double z) { return z * 0.39894228040143267794 * exp(-0.5 * z * z); }

/// `groups` packs lie in a row.
template <class T, int V>
__global__ void linear_gelu(const T* product, const T* bias, T* y, int64_t total, int64_t groups) {
  using P = Pack<T, V>;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < total; i += (int64_t)gridDim.x * blockDim.x) {
    const P p = ((const P*)product)[i], b = ((const P*)bias)[i % groups];
    P out;
    UNROLL for (int k = 0; k < V; k++) {
      const Acc<T> z = widen(p.v[k]) + widen(b.v[k]);
      out.v[k] = narrow<T>(z * phi(z));
    }
    store_whole((P*)y + i, out);
  }
}

/// Sums over slabs of `height` rows: a thread has one pack of columns and one slab, so a warp reads whole lines and
/// no two threads add to one sum. With GELU, `x` is the gradient of gelu(product + bias), and what is summed, and
/// written to dz, is that of its argument.
template <class T, int V, bool GELU>
__global__ void linear_slabs(const T* x, const T* product, const T* bias, T* dz, Acc<T>* partial, int64_t rows,
                             int64_t groups, int64_t slabs, int64_t height) {
  using P = Pack<T, V>;
  const int64_t slab = (int64_t)blockIdx.y * blockDim.y + threadIdx.y;
  if (slab >= slabs) return;
  const int64_t first = slab * height, last = first + height < rows ? first + height : rows;
  for (int64_t g = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; g < groups; g += (int64_t)gridDim.x * blockDim.x) {
    Acc<T> sum[V];
    P b;
    UNROLL for (int k = 0; k < V; k++) sum[k] = 0;
    if (GELU) b = ((const P*)bias)[g];
#if defined(__CUDACC__)
#pragma unroll 4
#endif
    for (int64_t r = first; r < last; r++) {
      const P in = ((const P*)x)[r * groups + g];
      if (GELU) {
        const P p = ((const P*)product)[r * groups + g];
        P out;
        UNROLL for (int k = 0; k < V; k++) {
          const Acc<T> z = widen(p.v[k]) + widen(b.v[k]), d = widen(in.v[k]) * (phi(z) + slope(z));
          out.v[k] = narrow<T>(d);
          sum[k] += d;
        }
        store_whole((P*)dz + r * groups + g, out);
      } else {
        UNROLL for (int k = 0; k < V; k++) sum[k] += widen(in.v[k]);
      }
    }
    UNROLL for (int k = 0; k < V; k++) partial[(slab * groups + g) * V + k] = sum[k];
  }
}

constexpr int kJoin = 8;
/// The slabs in order: eight warps take every eighth each, then the eight are added.
template <class T> __global__ void linear_join(const Acc<T>* partial, T* y, int64_t columns, int64_t slabs) {
  DYN_SMEM(raw);
  Acc<T>* part = (Acc<T>*)raw;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int64_t first = (int64_t)blockIdx.x * 32; first < columns; first += (int64_t)gridDim.x * 32) {
    const int64_t c = first + lane;
    Acc<T> sum = 0;
    if (c < columns)
      for (int64_t s = warp; s < slabs; s += kJoin) sum += partial[s * columns + c];
    part[warp * 32 + lane] = sum;
    __syncthreads();
    if (warp == 0 && c < columns) {
      for (int w = 1; w < kJoin; w++) sum += part[w * 32 + lane];
      y[c] = narrow<T>(sum);
    }
    __syncthreads();
  }
}

/// Enough slabs that some 65,000 threads are at work, at least eight rows each. Depends on the sizes alone, so the
/// order of a sum does as well.
int64_t slabs_of(int64_t rows, int64_t columns) {
  int64_t n = columns > 0 ? (524288 + columns - 1) / columns : 1;
  if (n > 1024) n = 1024;
  if (n > (rows + 7) / 8) n = (rows + 7) / 8;
  return n < 1 ? 1 : n;
}

bool dense(const smalti_view* v, int rank) {
  int64_t step = 1;
  for (int d = rank - 1; d >= 0; d--) {
    if (v->shape[d] != 1 && v->stride[d] != step) return false;
    step *= v->shape[d];
  }
  return v->rank == rank;
}

bool matrix_like(const smalti_view* v, const smalti_view* w) {
  return v->dtype == w->dtype && dense(v, 2) && v->shape[0] == w->shape[0] && v->shape[1] == w->shape[1];
}

bool vector_like(const smalti_view* v, const smalti_view* w) {
  return v->dtype == w->dtype && dense(v, 1) && v->shape[0] == w->shape[1];
}

bool wide(int64_t columns, int size, const void* a, const void* b, const void* c, const void* d) {
  const uintptr_t all = (uintptr_t)a | (uintptr_t)b | (uintptr_t)c | (uintptr_t)d;
  return all % 16 == 0 && columns % (16 / size) == 0;
}

template <class T, int V, bool GELU>
int32_t slabs(const T* x, const T* product, const T* bias, T* dz, T* db, Acc<T>* partial, int64_t rows,
              int64_t columns, void* stream) {
  int rc = 0;
  const int64_t groups = columns / V, n = slabs_of(rows, columns), height = (rows + n - 1) / n;
  const int64_t across = (groups + 31) / 32;
  const dim3 block(32, 8), grid((unsigned)(across < 65535 ? across : 65535), (unsigned)((n + 7) / 8));
  auto pass = linear_slabs<T, V, GELU>;
  LAUNCH_FLAT(rc, pass, grid, block, stream, x, product, bias, dz, partial, rows, groups, n, height);
  if (rc) return rc;
  auto join = linear_join<T>;
  LAUNCH(rc, join, grid_for(columns, 32), 32 * kJoin, kJoin * 32 * sizeof(Acc<T>), stream, partial, db, columns, n);
  return rc;
}

/// Elements of an access; f64, which is seldom asked for, is read one by one.
template <class T> constexpr int kPacked = sizeof(T) == 8 ? 1 : 16 / (int)sizeof(T);

template <class T, bool GELU>
int32_t backward(const smalti_view* x, const smalti_view* product, const smalti_view* bias, const smalti_view* dz,
                 const smalti_view* db, void* partial, void* stream) {
  constexpr int V = kPacked<T>;
  const int64_t rows = x->shape[0], columns = x->shape[1];
  if (columns == 0) return 0;
  const T *px = (const T*)x->ptr, *pp = GELU ? (const T*)product->ptr : nullptr, *pb = GELU ? (const T*)bias->ptr : nullptr;
  T* pz = GELU ? (T*)dz->ptr : nullptr;
  auto run = wide(columns, sizeof(T), px, pp, pb, pz) ? slabs<T, V, GELU> : slabs<T, 1, GELU>;
  return run(px, pp, pb, pz, (T*)db->ptr, (Acc<T>*)partial, rows, columns, stream);
}

template <class T> int32_t forward(const smalti_view* product, const smalti_view* bias, const smalti_view* y, void* stream) {
  constexpr int V = kPacked<T>;
  const int64_t rows = y->shape[0], columns = y->shape[1];
  if (rows * columns == 0) return 0;
  const T *pp = (const T*)product->ptr, *pb = (const T*)bias->ptr;
  T* py = (T*)y->ptr;
  const bool packs = wide(columns, sizeof(T), pp, pb, py, nullptr);
  const int64_t groups = packs ? columns / V : columns, total = rows * groups;
  int rc = 0;
  auto kernel = packs ? linear_gelu<T, V> : linear_gelu<T, 1>;
  LAUNCH_FLAT(rc, kernel, grid_for(total, 256), 256, stream, pp, pb, py, total, groups);
  return rc;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_linear_partials(int64_t rows, int64_t columns) { return slabs_of(rows, columns) * columns; }

extern "C" int32_t smalti_linear_gelu_forward(const smalti_view* product, const smalti_view* bias,
                                              const smalti_view* y, void* stream) {
  if (!dense(y, 2) || !matrix_like(product, y) || !vector_like(bias, y)) return kInvalid;
  DISPATCH_FLOAT(y->dtype, T, return forward<T>(product, bias, y, stream))
  return 0;
}

extern "C" int32_t smalti_linear_gelu_backward(const smalti_view* grad, const smalti_view* product,
                                               const smalti_view* bias, const smalti_view* dz, const smalti_view* db,
                                               void* partial, void* stream) {
  if (!dense(grad, 2) || !matrix_like(product, grad) || !vector_like(bias, grad)) return kInvalid;
  if (!matrix_like(dz, grad) || !vector_like(db, grad)) return kInvalid;
  DISPATCH_FLOAT(grad->dtype, T, return (backward<T, true>(grad, product, bias, dz, db, partial, stream)))
  return 0;
}

extern "C" int32_t smalti_linear_column_sums(const smalti_view* x, const smalti_view* y, void* partial, void* stream) {
  if (!dense(x, 2) || !vector_like(y, x)) return kInvalid;
  DISPATCH_FLOAT(x->dtype, T, return (backward<T, false>(x, nullptr, nullptr, nullptr, y, partial, stream)))
  return 0;
}
