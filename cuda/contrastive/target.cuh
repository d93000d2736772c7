// Where the products of the backward go.
#pragma once
#include "problem.cuh"

namespace smalti {
namespace contrastive {

/// Where a product goes: `partial` sums of a part of the depth, or into `settle`.
template <class T> struct Target {
  using A = Acc<T>;
  T* out;
  A* sum;           // of earlier chunks; or null
  const A* partial; // [splits][rows][d]
  int64_t rows, d;
  int splits;
  bool add, last;
  const A *grad, *scale, *miss;
  const T* positive;  // with its weight -miss; or null
  A weight;

  /// Adds what earlier chunks gave to element `at`, and writes the gradient when the last has come. `row`: the element's,
  /// which only positives need.
  DEV void settle(int64_t at, int64_t row, A x) const {
    if (add) x += sum[at];
    if (!last) {
      sum[at] = x;
      return;
    }
    if (positive) x -= miss[row] * widen(positive[at]);
    out[at] = narrow<T>(x * (*grad * *scale * weight));
  }
};

/// A tile of COLUMNS from shared memory, rows LD apart, to where it goes; `part`: of the depth. Written once and not unrolled:
/// what becomes of a result is much code.
template <class T, int ROWS, int COLUMNS, int LD, int THREADS>
DEV void put_tile(const Target<T>& to, const Acc<T>* tile, int64_t r0, int64_t c0, int64_t part, int tid) {
  Acc<T>* partial = to.splits > 1 ? (Acc<T>*)to.partial + part * to.rows * to.d : nullptr;
  ROLLED for (int i = tid; i < ROWS * COLUMNS; i += THREADS) {
    const int64_t r = r0 + i / COLUMNS, c = c0 + i % COLUMNS;
    if (r >= to.rows || c >= to.d) continue;
    const Acc<T> x = tile[i / COLUMNS * LD + i % COLUMNS];
    if (partial) partial[r * to.d + c] = x;
    else to.settle(r * to.d + c, r, x);
  }
}

template <class T> __global__ void combine(const Target<T> to) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x, count = to.rows * to.d;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += threads) {
    Acc<T> x = 0;
    for (int z = 0; z < to.splits; z++) x += to.partial[z * count + i];
    to.settle(i, to.positive ? i / to.d : 0, x);
  }
}

/// Parts that the fused kernel for dQ alone splits the keys into (contrastive_queries.cu); 0: it does not do this case.
int query_splits(const Problem& x, bool half);
/// dQ by that kernel. Not for f32 and f64.
int32_t query_gradient(const smalti_contrastive& c, const Problem& x, const float* rows, const Target<bf16>& to, void* stream);
int32_t query_gradient(const smalti_contrastive& c, const Problem& x, const float* rows, const Target<f16>& to, void* stream);
template <class T> int32_t query_gradient(const smalti_contrastive&, const Problem&, const T*, const Target<T>&, void*) { return kInvalid; }

}  // namespace contrastive
}  // namespace smalti
