// What the kernels of the backward share: the job of writing g = dS of a chunk.
#pragma once
#include "sweep.cuh"
#include "target.cuh"

namespace smalti {
namespace contrastive {

/// g of the chunk of rows r0 .. r_end and columns c0 .. c_end.
template <class T> struct Slopes {
  using A = Acc<T>;
  Operand<T> q, k;
  int64_t depth, label, r0, c0, r_end, c_end;  // the chunk's rows and columns
  const A *scale, *rows, *columns;             // columns: null for one direction
  T* g;
  int64_t ld;
  double* sums;  // the gradient of the scale, [tiles of rows][sum_columns], this chunk's from sum_first; or null
  int64_t sum_columns, sum_first;
};

/// Rows and columns of the tiles of `product_wide`.
constexpr int WIDE_ROWS = 192, WIDE_COLUMNS = 256;

#if !defined(SMALTI_NO_SM90)
/// g by warpgroups, in tiles of WIDE columns; `groups` of them beside one another. The sums of a row of tiles are those of
/// its groups.
int32_t slopes_wide(const Slopes<bf16>& s, int64_t groups, void* stream);
int32_t slopes_wide(const Slopes<f16>& s, int64_t groups, void* stream);
/// The product of g (`by_depth`: transposed) with rows of keys or queries, by warpgroups.
int32_t product_wide(const Operand<bf16>& g, bool by_depth, const Operand<bf16>& b, int64_t depth, const Target<bf16>& to, void* stream);
int32_t product_wide(const Operand<f16>& g, bool by_depth, const Operand<f16>& b, int64_t depth, const Target<f16>& to, void* stream);
#endif
template <class T> int32_t slopes_wide(const Slopes<T>&, int64_t, void*) { return kInvalid; }
template <class T> int32_t product_wide(const Operand<T>&, bool, const Operand<T>&, int64_t, const Target<T>&, void*) { return kInvalid; }

}  // namespace contrastive
}  // namespace smalti
