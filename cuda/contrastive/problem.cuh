// One call of the contrastive kernels, checked.
#pragma once
#include "tile.cuh"

namespace smalti {
namespace contrastive {

struct Problem {
  int64_t n, m, d, budget;
  bool apart, both, k_by_depth;  // k_by_depth: the keys are adjacent along m

  static bool make(const smalti_contrastive& c, Problem* out) {
    const smalti_view &q = c.q, &k = c.k, &p = c.positive;
    if (q.rank != 2 || k.rank != 2 || q.dtype != k.dtype) return false;
    Problem x{q.shape[0], k.shape[0], q.shape[1], c.budget > 0 ? c.budget : (int64_t)256 << 20, p.ptr != nullptr, c.both != 0,
              false};
    const int64_t most = 0x7fffffff;
    if (x.n < 1 || x.n > most || x.m < 0 || x.m > most || x.d < 0 || x.d > most || k.shape[1] != x.d) return false;
    // strides of nothing, or of a single row or column, say nothing
    const bool some = x.d > 0 && x.m > 0, by_row = x.d <= 1 || k.stride[1] == 1, by_depth = x.m == 1 || k.stride[0] == 1;
    if ((x.d > 1 && q.stride[1] != 1) || (some && !by_row && !by_depth)) return false;
    x.k_by_depth = some && !by_row;
    if (x.apart) {
      const bool fits = p.rank == 2 && p.dtype == q.dtype && p.shape[0] == x.n && p.shape[1] == x.d &&
                        (x.d <= 1 || p.stride[1] == 1) && (x.n == 1 || p.stride[0] == x.d);
      if (!fits || x.both) return false;
    } else if (c.offset < 0 || c.offset > x.m || x.n > x.m - c.offset) {
      return false;
    }
    if (x.both && (x.n != x.m || c.offset != 0)) return false;
    *out = x;
    return true;
  }

  double weight() const { return 1.0 / ((double)n * (both ? 2 : 1)); }
};

/// Column of row 0's positive; beyond every column if it stands apart.
inline int64_t first_label(const Problem& x, const smalti_contrastive& c) { return x.apart ? (int64_t)1 << 40 : c.offset; }

template <class T> Operand<T> queries(const smalti_contrastive& c) {
  return operand((const T*)c.q.ptr, c.q.shape[0], c.q.stride[0], 1);
}
template <class T> Operand<T> keys(const smalti_contrastive& c, const Problem& x) {
  return operand((const T*)c.k.ptr, x.m, x.k_by_depth ? 1 : c.k.stride[0], x.k_by_depth ? c.k.stride[1] : 1);
}

inline int64_t clamp(int64_t x, int64_t low, int64_t high) { return x < low ? low : x > high ? high : x; }

}  // namespace contrastive
}  // namespace smalti
