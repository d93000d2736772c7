// What the kernels of the forward share: the job of a pass over tiles, and how partial sums are joined.
#pragma once
#include "problem.cuh"

namespace smalti {
namespace contrastive {

/// One pass over the tiles of a chunk of rows.
template <class T> struct Sweep {
  using A = Acc<T>;
  Operand<T> q, k;
  int64_t depth, label, first;  // first: the chunk's first row
  int64_t chunk_rows, tiles, group_tiles;  // rows of the chunk at most; tiles of columns, all and of a group
  const A *scale, *dots;
  A *row_part, *column_part;  // [group][chunk_rows][2], [row tile of the chunk][m][2]
  int32_t* above_part;        // [group][chunk_rows]
};

/// Joins a partial (m, l) to a running one.
template <class A> DEV void join(A& m, A& l, A pm, A pl) {
  const A top = pm > m ? pm : m, shift = top == -(A)INFINITY ? A(0) : top;
  l = l * two_to(m - shift) + pl * two_to(pm - shift);
  m = top;
}

/// Columns of the tiles that the warpgroup kernel works on.
constexpr int WIDE = 192;

/// Whether the warpgroup kernels (contrastive/sm90) do a case: half types, aligned rows, sizes that pay.
template <class T> inline bool fits_wide(const Problem& x, const Operand<T>& q, const Operand<T>& k) {
  const bool near = q.row_step < 1 << 25 && k.row_step < 1 << 25;
  return sizeof(T) == 2 && q.vec && k.vec && near && !x.k_by_depth && x.d % 8 == 0 && x.d >= 128 && x.d <= 4096 && x.n >= TILE && x.m >= WIDE;
}
/// The pass by warpgroups, with tiles of WIDE columns. Not for f32 and f64, and without ranks.
#if !defined(SMALTI_NO_SM90)
int32_t sweep_wide(const Sweep<bf16>& s, int64_t row_tiles, int64_t groups, void* stream);
int32_t sweep_wide(const Sweep<f16>& s, int64_t row_tiles, int64_t groups, void* stream);
#endif
template <class T> int32_t sweep_wide(const Sweep<T>&, int64_t, int64_t, void*) { return kInvalid; }

}  // namespace contrastive
}  // namespace smalti
