// Loops over strided views of one shape: dimensions in the order of the result's memory, merged where all
// operands step evenly, so that most loops have one dimension and the rest have few.
#pragma once
#include "dtype.cuh"

namespace smalti {

/// `K` operands; the last one is written, and gives the order.
template <int K> struct Strided {
  int rank;
  int64_t count;
  int64_t size[SMALTI_MAX_RANK];
  int64_t step[K][SMALTI_MAX_RANK];
  Divisor by[SMALTI_MAX_RANK];  // size

  /// Gives an axis another size, and with it another divisor.
  void resize(int d, int64_t n) { size[d] = n; by[d] = Divisor(n); }
  /// Do all operands lie side by side?
  bool flat() const {
    if (rank > 1) return false;
    for (int k = 0; k < K; k++)
      if (rank == 1 && step[k][0] != 1) return false;
    return true;
  }
};

inline int64_t magnitude(int64_t x) { return x < 0 ? -x : x; }

/// The loop over views of one shape (broadcast operands have stride 0).
template <int K> inline Strided<K> strided(const smalti_view* const (&views)[K]) {
  const smalti_view& out = *views[K - 1];
  int order[SMALTI_MAX_RANK], rank = 0;
  Strided<K> s{};
  s.count = 1;
  for (int d = 0; d < out.rank; d++) {
    s.count *= out.shape[d];
    if (out.shape[d] == 1) continue;
    int at = rank++;
    // stable insertion by falling stride of the result
    while (at > 0 && magnitude(out.stride[order[at - 1]]) < magnitude(out.stride[d])) {
      order[at] = order[at - 1];
      at--;
    }
    order[at] = d;
  }
  for (int i = 0; i < rank; i++) {
    const int d = order[i];
    bool merges = s.rank > 0;
    for (int k = 0; k < K && merges; k++) merges = s.step[k][s.rank - 1] == views[k]->stride[d] * out.shape[d];
    const int to = merges ? s.rank - 1 : s.rank++;
    s.size[to] = merges ? s.size[to] * out.shape[d] : out.shape[d];
    for (int k = 0; k < K; k++) s.step[k][to] = views[k]->stride[d];
  }
  for (int d = 0; d < s.rank; d++) s.resize(d, s.size[d]);
  return s;
}

/// Are these views of one shape?
inline bool same_shape(const smalti_view& a, const smalti_view& b) {
  if (a.rank != b.rank) return false;
  for (int d = 0; d < a.rank; d++)
    if (a.shape[d] != b.shape[d]) return false;
  return true;
}

/// Offsets of element `i`, counted in the order of the loop.
template <int K> DEV void locate(const Strided<K>& s, int64_t i, int64_t (&at)[K]) {
  for (int k = 0; k < K; k++) at[k] = 0;
  ROLLED for (int d = s.rank - 1; d > 0; d--) {
    int64_t q, r;
    if (s.count >> 31) {
      q = i / s.size[d];
      r = i - q * s.size[d];
    } else {
      const uint32_t q32 = s.by[d].of((uint32_t)i);
      q = q32;
      r = (uint32_t)i - q32 * (uint32_t)s.size[d];
    }
    advance(s.step, d, r, at);
    i = q;
  }
  if (s.rank > 0) advance(s.step, 0, i, at);
}

/// `N` elements that travel in one access of up to 16 bytes.
template <class T, int N> struct alignas(sizeof(T) * N) Pack { T v[N]; };

inline bool aligned(const void* p, size_t bytes) { return (uintptr_t)p % bytes == 0; }

}  // namespace smalti
