// Stable order of lines: argsort and top-k. What src/ops/sort.rs does on the CPU, bit for bit: NaN is the largest, both
// zeros are equal, equal values keep their order in both directions.
//
// Key and place are sorted as one number, so that all differ. Lines of up to 1024 elements are sorted by one warp in
// registers. Longer ones are cut into such runs, which are then merged pairwise: a block makes 1024 elements of a
// result, whose inputs it finds by a search along the diagonal of the merge (Green, McColl, Bader, "GPU merge path",
// ICS 2012). For top-k no run keeps more than k elements, so that the work shrinks with each level.
#include "common/order.cuh"
#include "common/walk.cuh"

namespace smalti {
namespace {

constexpr int kBlock = 128, kEach = 8, kTile = kBlock * kEach;

/// One warp a line of at most 32 * R elements.
template <class P, int R>
__global__ void __launch_bounds__(kBlock)
    sort_lines(const void* x, int32_t dtype, int64_t lines, int n, int64_t k, bool flip, int64_t* index) {
  DYN_SMEM(raw);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  P* items = (P*)raw + warp * 32 * R;
  uint16_t* order = (uint16_t*)items;
  for (int64_t line = (int64_t)blockIdx.x * warps + warp; line < lines; line += (int64_t)gridDim.x * warps) {
    P v[R];
    write_items(x, dtype, line * n, 1, n, 0, flip, 32 * R, items);
    take_items(items, v);
    warp_sort(v);
    UNROLL
    for (int r = 0; r < R; r++) order[lane * R + r] = (uint16_t)place_of(v[r]);
    __syncwarp();
    for (int64_t i = lane; i < k; i += 32) index[line * k + i] = order[i];
    __syncwarp();
  }
}

/// The shape of a merge: runs that cover `run` elements of each line of n, of which the first `cap` are kept.
struct Runs {
  int64_t lines, n, count, run, cap;
  /// Elements kept of run `r`.
  HOST_DEV int64_t length(int64_t r) const {
    const int64_t left = n - r * run, covered = left < 0 ? 0 : left < run ? left : run;
    return covered < cap ? covered : cap;
  }
};

/// Sorts runs of 1024 elements, a warp each.
template <class P>
__global__ void __launch_bounds__(kBlock) sort_runs(const void* x, int32_t dtype, Runs s, bool flip, P* out) {
  constexpr int R = 32;
  DYN_SMEM(raw);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  P* sorted = (P*)raw + warp * 32 * R;
  const int64_t step = (int64_t)gridDim.x * warps;
  for (int64_t at = (int64_t)blockIdx.x * warps + warp; at < s.lines * s.count; at += step) {
    const int64_t line = at / s.count, r = at - line * s.count, first = r * s.run;
    P v[R];
    write_items(x, dtype, line * s.n + first, 1, s.n - first, first, flip, 32 * R, sorted);
    take_items(sorted, v);
    warp_sort(v);
    UNROLL
    for (int i = 0; i < R; i++) sorted[lane * R + i] = v[i];
    __syncwarp();
    for (int64_t i = lane; i < s.length(r); i += 32) out[at * s.cap + i] = sorted[i];
    __syncwarp();
  }
}

/// How many of the first `d` elements of the merge of a and b come from a.
template <class P> DEV int64_t merge_path(const P* a, int64_t na, const P* b, int64_t nb, int64_t d) {
  int64_t low = d > nb ? d - nb : 0, high = d < na ? d : na;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (before(b[d - 1 - mid], a[mid])) high = mid; else low = mid + 1;
  }
  return low;
}

/// Merges runs 2 i and 2 i + 1 of `from` to run i of `to` (or, if LAST, to the places of its elements): a block a tile.
template <class P, bool LAST>
__global__ void __launch_bounds__(kBlock) merge_runs(const P* in, Runs from, Runs to, P* out, int64_t* index) {
  DYN_SMEM(raw);
  P* items = (P*)raw;
  int64_t* ends = (int64_t*)(items + kTile);
  const int tid = threadIdx.x;
  const int64_t tiles = (to.cap + kTile - 1) / kTile, jobs = to.lines * to.count * tiles;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int64_t at = job / tiles, line = at / to.count, r = at - line * to.count, length = to.length(r);
    const int64_t d0 = (job - at * tiles) * kTile, d1 = d0 + kTile < length ? d0 + kTile : length;
    if (d0 >= length) continue;
    const int64_t na = from.length(2 * r), nb = 2 * r + 1 < from.count ? from.length(2 * r + 1) : 0;
    const P *a = in + (line * from.count + 2 * r) * from.cap, *b = a + from.cap;
    if (tid == 0) ends[0] = merge_path(a, na, b, nb, d0);
    if (tid == 32) ends[1] = merge_path(a, na, b, nb, d1);
    __syncthreads();
    const int64_t a0 = ends[0], a1 = ends[1], b0 = d0 - a0;
    const int ta = (int)(a1 - a0), total = (int)(d1 - d0), tb = total - ta;
    for (int i = tid; i < total; i += kBlock) items[i] = i < ta ? a[a0 + i] : b[b0 + i - ta];
    __syncthreads();
    const int d = tid * kEach < total ? tid * kEach : total, stop = d + kEach < total ? d + kEach : total;
    int i = (int)merge_path(items, ta, items + ta, tb, d), j = d - i;
    P mine[kEach];
    UNROLL
    for (int e = 0; e < kEach; e++) {
      if (d + e >= stop) continue;
      const bool left = j >= tb || (i < ta && before(items[i], items[ta + j]));
      mine[e] = left ? items[i] : items[ta + j];
      i += left;
      j += !left;
    }
    __syncthreads();
    UNROLL
    for (int e = 0; e < kEach; e++)
      if (d + e < stop) items[d + e] = mine[e];
    __syncthreads();
    for (int e = tid; e < total; e += kBlock) {
      if constexpr (LAST) index[at * to.cap + d0 + e] = place_of(items[e]);
      else out[at * to.cap + d0 + e] = items[e];
    }
    __syncthreads();
  }
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
Runs first_runs(int64_t lines, int64_t n, int64_t k) {
  return {lines, n, (n + kWarpSort - 1) / kWarpSort, kWarpSort, least(kWarpSort, k)};
}
Runs next_runs(const Runs& s, int64_t k) { return {s.lines, s.n, (s.count + 1) / 2, 2 * s.run, least(2 * s.run, k)}; }
int64_t items_of(const Runs& s) { return s.lines * s.count * s.cap; }

/// Keys of 32 bits have room for places of 32 beside them.
bool is_narrow(int dtype, int64_t n) { return size_of(dtype) <= 4 && n < (int64_t)1 << 32; }

template <class P>
int32_t sort_long(const void* x, int32_t dtype, Runs s, int64_t k, bool flip, int64_t* index, void* workspace, void* stream) {
  int rc = 0;
  P* buffer = (P*)workspace;
  P* other = buffer + items_of(s);
  const int warps = kBlock / 32;
  auto runs = sort_runs<P>;
  LAUNCH(rc, runs, dim3(grid_for(s.lines * s.count, warps)), dim3(kBlock), warps * kWarpSort * sizeof(P), stream, x, dtype, s,
         flip, buffer);
  while (s.count > 1 && !rc) {
    const Runs to = next_runs(s, k);
    const int64_t jobs = to.lines * to.count * ((to.cap + kTile - 1) / kTile);
    auto merge = to.count == 1 ? merge_runs<P, true> : merge_runs<P, false>;
    LAUNCH(rc, merge, dim3(grid_for(jobs, 1)), dim3(kBlock), kTile * sizeof(P) + 16, stream, buffer, s, to, other, index);
    P* t = buffer;
    buffer = other;
    other = t;
    s = to;
  }
  return rc;
}

template <class P>
int32_t sort_all(const void* x, int32_t dtype, int64_t lines, int64_t n, int64_t k, bool flip, int64_t* index, void* workspace,
                 void* stream) {
  if (n > kWarpSort) return sort_long<P>(x, dtype, first_runs(lines, n, k), k, flip, index, workspace, stream);
  int rc = 0;
  const int warps = kBlock / 32;
  DISPATCH_LANES(n, R, {
    auto kernel = sort_lines<P, R>;
    LAUNCH(rc, kernel, dim3(grid_for(lines, warps)), dim3(kBlock), warps * 32 * R * sizeof(P), stream, x, dtype, lines, (int)n, k,
           flip, index);
  })
  return rc;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_argsort_workspace(int64_t lines, int64_t n, int64_t k, int32_t dtype) {
  if (n <= kWarpSort) return 0;
  const Runs first = first_runs(lines, n, k);
  return (items_of(first) + items_of(next_runs(first, k))) * (size_of(dtype) <= 4 ? 8 : 16);
}

extern "C" int32_t smalti_argsort(const smalti_view* x, int32_t descending, const smalti_view* index, void* workspace,
                                  void* stream) {
  if (x->rank != 2 || index->rank != 2 || index->dtype != SMALTI_I64 || !is_contiguous(x) || !is_contiguous(index) ||
      x->shape[0] != index->shape[0] || index->shape[1] > x->shape[1])
    return kInvalid;
  const int64_t lines = x->shape[0], n = x->shape[1], k = index->shape[1];
  if (lines == 0 || k == 0) return 0;
  int64_t* to = (int64_t*)index->ptr;
  if (x->dtype < 0 || x->dtype > SMALTI_BOOL) return kInvalid;
  if (size_of(x->dtype) == 8) return sort_all<Wide>(x->ptr, x->dtype, lines, n, k, descending, to, workspace, stream);
  if (!is_narrow(x->dtype, n)) return kInvalid;
  return sort_all<Narrow>(x->ptr, x->dtype, lines, n, k, descending, to, workspace, stream);
}
