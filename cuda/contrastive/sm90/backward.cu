// g = dS by warpgroups: 128 rows of queries stay in shared memory if they fit, tiles of 192 keys come by. Of the two
// exponentials of a logit one is taken: 2^(s - column) is 2^(s - row) times what depends on the row and what on the column.
#include "../../common/reduce.cuh"
#include "../slopes.cuh"
#include "pass.cuh"

namespace smalti {
namespace contrastive {
namespace {

constexpr int VALUES = PASS_VALUES;  // of a thread

/// Log-sum-exps (to base 2) may differ by so much from the block's first row for one exponential to do.
constexpr float NEAR = 30.f;

/// Of the columns of a tile.
struct Columns {
  float share[WIDE], lse[WIDE], dot[WIDE];  // share: 2^(first row's lse - lse)
  int near[WIDE / 32];
};

/// Of a thread's two rows.
struct Rows {
  float lse[2], dot[2], share[2];  // share: 2^(lse - first row's lse)
  bool near;
};

template <class T> DEV void fetch_columns(Columns& to, const Slopes<T>& p, int64_t c0, float first, int tid) {
  if (tid >= WIDE) return;
  const int64_t c = c0 + tid;
  const bool inside = p.columns && c < p.k.rows;
  const float lse = inside ? p.columns[c] : INFINITY;
  to.lse[tid] = lse;
  to.dot[tid] = inside ? p.rows[2 * p.q.rows + c] : 0.f;
  to.share[tid] = inside ? ex2(first - lse) : 0.f;
  const int near = __all_sync(~0u, !inside || fabsf(first - lse) <= NEAR);
  if ((tid & 31) == 0) to.near[tid >> 5] = near;
}

template <class T> DEV Rows fetch_rows(const Slopes<T>& p, int64_t r0, float first, const WidePlace& at) {
  Rows rows;
  rows.near = true;
  UNROLL for (int h = 0; h < 2; h++) {
    const int64_t r = r0 + at.row0 + h * 8;
    const bool inside = r < p.r_end;
    rows.lse[h] = inside ? p.rows[r] : 0.f;
    rows.dot[h] = inside ? p.rows[2 * p.q.rows + r] : 0.f;
    rows.share[h] = ex2(rows.lse[h] - first);
    rows.near = rows.near && inside && fabsf(rows.lse[h] - first) <= NEAR;
  }
  return rows;
}

/// Products become g; returns the thread's part of the scale's gradient: p (raw - raw of the positive), in which the
/// positive's own term is zero, so nothing cancels.
DEV float together(float (&s)[VALUES], float factor, const Rows& rows, const Columns& columns, const WidePlace& at) {
  float sum = 0;
  UNROLL for (int j = 0; j < VALUES / 4; j++) UNROLL for (int e = 0; e < 2; e++) {
    const int c = j * 8 + at.column0 + e;
    const float share = columns.share[c], dot = columns.dot[c];
    UNROLL for (int h = 0; h < 2; h++) {
      float& x = s[j * 4 + h * 2 + e];
      const float by_row = ex2(fmaf(x, factor, -rows.lse[h])), of_row = rows.share[h] * share, both = 1.f + of_row;
      sum = fmaf(by_row, fmaf(x, both, -fmaf(of_row, dot, rows.dot[h])), sum);
      x = by_row * both;
    }
  }
  return sum;
}

/// The same with both exponentials, edges and positives.
template <class T> DEV float apart(float (&s)[VALUES], float factor, const Rows& rows, const Columns& columns, const WidePlace& at,
                                   const Slopes<T>& p, int64_t r0, int64_t c0) {
  float sum = 0;
  const int64_t n = p.q.rows, m = p.k.rows, diagonal = r0 + p.label - c0;
  UNROLL for (int i = 0; i < VALUES; i++) {
    const int h = i >> 1 & 1, r = at.row0 + h * 8, c = (i >> 2) * 8 + at.column0 + (i & 1);
    const float raw = s[i], by_row = ex2(raw * factor - rows.lse[h]), by_column = ex2(raw * factor - columns.lse[c]);
    const bool inside = r0 + r < p.r_end && c0 + c < p.c_end, positive = inside && c - r == diagonal;
    if (positive) s[i] = -(p.rows[n + r0 + r] + (p.columns ? p.columns[m + c0 + c] : 0.f));
    else s[i] = inside ? by_row + by_column : 0.f;
    if (inside && !positive) sum += by_row * (raw - rows.dot[h]) + by_column * (raw - columns.dot[c]);
  }
  return sum;
}

/// A warp's 16 rows of g by way of `to`, its own 6 KiB, in pieces of 16 bytes. `pieces`: those of a row that g has.
template <class T> DEV void store_rows(const float (&s)[VALUES], unsigned char* to, T* g, int64_t ld, int64_t rows, int64_t pieces, const WidePlace& at) {
  constexpr int LINE = WIDE * 2, PIECES = LINE / 16;
  const int g0 = at.lane >> 2;
  UNROLL for (int j = 0; j < PIECES; j++) UNROLL for (int h = 0; h < 2; h++)
    *(uint32_t*)(to + (g0 + h * 8) * LINE + ((j ^ g0) << 4) + at.column0 * 2) = pack(T{}, s[j * 4 + h * 2], s[j * 4 + h * 2 + 1]);
  __syncwarp();
  UNROLL for (int i = 0; i < 16 * PIECES; i += 32) {
    const int row = (i + at.lane) / PIECES, piece = (i + at.lane) % PIECES;
    if (row < rows && piece < pieces) *(uint4*)(g + row * ld + piece * 8) = *(const uint4*)(to + row * LINE + ((piece ^ (row & 7)) << 4));
  }
}

template <class T, bool RESIDENT> __global__ void __launch_bounds__(PASS_THREADS, 1) slopes_tiles(const Slopes<T> p, int64_t group_tiles) {
  DYN_SMEM(shared);
  const int tid = threadIdx.x;
  const WidePlace at(tid);
  Columns& columns = *(Columns*)(shared + pass_bytes(p.depth, RESIDENT));
  const int64_t r0 = p.r0 + (int64_t)blockIdx.x * TILE, begin = p.c0 + blockIdx.y * group_tiles * WIDE, end = min(begin + group_tiles * WIDE, p.c_end);
  const float factor = *p.scale * (float)LOG2E, first = p.rows[r0];
  const Rows rows = fetch_rows(p, r0, first, at);
  Pass<T, RESIDENT> pass(p.q, p.k, shared, p.depth, r0, begin, end, tid);
  float acc[VALUES];
  double sum = 0;
  for (int64_t c0 = begin; c0 < end; c0 += WIDE) {
    pass.multiply(acc, at.group);
    fetch_columns(columns, p, c0, first, tid);
    pass.finish(acc);
    const int64_t diagonal = r0 + p.label - c0;
    bool near = rows.near && p.c_end - c0 >= WIDE && (diagonal >= WIDE || diagonal <= -TILE);
    UNROLL for (int i = 0; i < WIDE / 32; i++) near = near && columns.near[i];
    if (__all_sync(~0u, near)) sum += together(acc, factor, rows, columns, at);
    else sum += apart(acc, factor, rows, columns, at, p, r0, c0);
    const int64_t row = r0 - p.r0 + at.warp * 16, column = c0 - p.c0;
    store_rows(acc, pass.free_stage(at.warp >> 2) + at.warp % 4 * 16 * WIDE * 2, p.g + row * p.ld + column, p.ld, p.r_end - p.r0 - row, (p.ld - column) / 8, at);
  }
  cp_wait<0>();
  if (!p.sums) return;
  __syncthreads();
  const double total = block_sum(sum, (double*)shared);
  if (tid == 0) p.sums[r0 / TILE * p.sum_columns + p.sum_first + blockIdx.y] = total;
}

constexpr int PRODUCT_THREADS = 2 * WIDE_ROWS, PRODUCT_A = WIDE_ROWS * 128, PRODUCT_B = WIDE_COLUMNS * 128;

template <class T, bool AM>
__global__ void __launch_bounds__(PRODUCT_THREADS, 1) product_tiles(const Operand<T> a, const Operand<T> b, int64_t depth, int64_t split, const Target<T> to) {
  DYN_SMEM(shared);
  const int tid = threadIdx.x;
  const WidePlace at(tid);
  const int64_t r0 = (int64_t)blockIdx.x * WIDE_ROWS, c0 = (int64_t)blockIdx.y * WIDE_COLUMNS;
  const int64_t begin = blockIdx.z * split, end = min(depth, begin + split);
  int64_t next = begin;
  int slot = 0;
  auto load = [&] {
    if (next < end) {
      unsigned char* stage = shared + slot * (PRODUCT_A + PRODUCT_B);
      load_wide<T, AM, WIDE_ROWS, PRODUCT_THREADS>(stage, a, r0, next, end, tid);
      load_wide<T, true, WIDE_COLUMNS, PRODUCT_THREADS>(stage + PRODUCT_A, b, c0, next, end, tid);
    }
    next += WIDE_STEP;
    slot = (slot + 1) % WIDE_STAGES;
    cp_commit();
  };
  load();
  load();
  float acc[WIDE_COLUMNS / 2];
  UNROLL for (int i = 0; i < WIDE_COLUMNS / 2; i++) acc[i] = 0.f;
  int stage = 0;
  wgmma_fence(acc);
  ROLLED for (int64_t k = begin; k < end; k += WIDE_STEP) {
    cp_wait<1>();
    proxy_fence();
    __syncthreads();
    wgmma_fence();
    const unsigned char* from = shared + stage * (PRODUCT_A + PRODUCT_B);
    multiply_wide<T, WIDE_COLUMNS, AM, true>(acc, from, from + PRODUCT_A, at.group, true);
    load();
    wgmma_wait<1>();
    stage = (stage + 1) % WIDE_STAGES;
  }
  wgmma_wait<0>(acc);
  cp_wait<0>();
  __syncthreads();  // nobody reads the stages any more
  constexpr int LD = WIDE_COLUMNS + 8;
  float* tile = (float*)shared;
  UNROLL for (int i = 0; i < WIDE_COLUMNS / 2; i++) tile[(at.row0 + (i >> 1 & 1) * 8) * LD + (i >> 2) * 8 + at.column0 + (i & 1)] = acc[i];
  __syncthreads();
  put_tile<T, WIDE_ROWS, WIDE_COLUMNS, LD, PRODUCT_THREADS>(to, tile, r0, c0, blockIdx.z, tid);
}

template <class T> int32_t launch(const Slopes<T>& s, int64_t groups, void* stream) {
  int rc = 0;
  const bool stay = resident(s.depth);
  auto whole = slopes_tiles<T, true>;
  auto streamed = slopes_tiles<T, false>;
  auto kernel = stay ? whole : streamed;
  const int bytes = pass_bytes(s.depth, stay) + (int)sizeof(Columns);
  const int64_t group_tiles = ceil_div(ceil_div(s.c_end - s.c0, WIDE), groups);
  LAUNCH(rc, kernel, dim3((unsigned)ceil_div(s.r_end - s.r0, TILE), (unsigned)groups), dim3(PASS_THREADS), bytes, stream, s, group_tiles);
  return rc;
}

template <class T> int32_t launch(const Operand<T>& g, bool by_depth, const Operand<T>& b, int64_t depth, const Target<T>& to, void* stream) {
  int rc = 0;
  const int64_t split = ceil_div(ceil_div(depth, to.splits), WIDE_STEP) * WIDE_STEP;
  const dim3 grid((unsigned)ceil_div(to.rows, WIDE_ROWS), (unsigned)ceil_div(to.d, WIDE_COLUMNS), to.splits);
  auto by_row = product_tiles<T, false>;
  auto transposed = product_tiles<T, true>;
  auto kernel = by_depth ? transposed : by_row;
  LAUNCH(rc, kernel, grid, dim3(PRODUCT_THREADS), WIDE_STAGES * (PRODUCT_A + PRODUCT_B), stream, g, b, depth, split, to);
  return rc;
}

}  // namespace

int32_t slopes_wide(const Slopes<bf16>& s, int64_t groups, void* stream) { return launch(s, groups, stream); }
int32_t slopes_wide(const Slopes<f16>& s, int64_t groups, void* stream) { return launch(s, groups, stream); }
int32_t product_wide(const Operand<bf16>& g, bool by_depth, const Operand<bf16>& b, int64_t depth, const Target<bf16>& to, void* stream) {
  return launch(g, by_depth, b, depth, to, stream);
}
int32_t product_wide(const Operand<f16>& g, bool by_depth, const Operand<f16>& b, int64_t depth, const Target<f16>& to, void* stream) {
  return launch(g, by_depth, b, depth, to, stream);
}

}  // namespace contrastive
}  // namespace smalti
