// The pass over tiles by warpgroups: 128 rows of queries stay in shared memory if they fit, tiles of 192 keys come by. A warp
// takes the exponentials of a tile once, against its own largest logit; rows and columns are then sums of the same numbers.
// Where that is too far from a row's or a column's largest, or the tile has edges or positives, it takes each by itself.
#include "../../common/reduce.cuh"
#include "pass.cuh"

namespace smalti {
namespace contrastive {
namespace {

constexpr int VALUES = PASS_VALUES, COLUMNS = WIDE / 4;  // of a thread

struct Pair { float m, l; };

/// A warp's maxima and sums over its 16 rows, one for each column of the tile.
DEV void put_column(Pair* columns, const WidePlace& at, int v, float m, float l) {
  columns[at.warp * WIDE + (v >> 1) * 8 + at.column0 + (v & 1)] = {m, l};
}

/// Half of `count` values are this lane's, half its partner's: what remains are sums over both.
template <int COUNT> DEV void halve(float* v, int lane, int bit) {
  const bool high = lane & bit;
  UNROLL for (int i = 0; i < COUNT / 2; i++) {
    const float other = __shfl_xor_sync(~0u, high ? v[i] : v[COUNT / 2 + i], bit);
    v[i] = (high ? v[COUNT / 2 + i] : v[i]) + other;
  }
}

/// Rows and columns against the warp's largest logit. False if a sum is so small that something of it may be lost.
DEV bool together(const float (&acc)[VALUES], float factor, const WidePlace& at, Pair (&row)[2], Pair* columns) {
  float top = acc[0];
  UNROLL for (int i = 1; i < VALUES; i++) top = fmaxf(top, acc[i]);
  const float m = warp_max(top) * factor;
  float column[COLUMNS], sum[2] = {0.f, 0.f};
  UNROLL for (int v = 0; v < COLUMNS; v++) {
    const int i = (v >> 1) * 4 + (v & 1);
    const float x = ex2(fmaf(acc[i], factor, -m)), y = ex2(fmaf(acc[i + 2], factor, -m));
    sum[0] += x;
    sum[1] += y;
    column[v] = x + y;
  }
  constexpr float least = 0x1p-80f;
  bool enough = true;
  UNROLL for (int h = 0; h < 2; h++) {
    row[h] = {m, quad_sum(sum[h])};
    enough = enough && row[h].l >= least;
  }
  if (columns) {
    halve<COLUMNS>(column, at.lane, 16);
    halve<COLUMNS / 2>(column, at.lane, 8);
    halve<COLUMNS / 4>(column, at.lane, 4);
    const int first = (at.lane >> 4 & 1) * (COLUMNS / 2) + (at.lane >> 3 & 1) * (COLUMNS / 4) + (at.lane >> 2 & 1) * (COLUMNS / 8);
    UNROLL for (int i = 0; i < COLUMNS / 8; i++) {
      enough = enough && column[i] >= least;
      put_column(columns, at, first + i, m, column[i]);
    }
  }
  return __all_sync(~0u, enough);
}

/// Each row and each column against its own largest.
DEV void apart(const float (&s)[VALUES], const WidePlace& at, Pair (&row)[2], Pair* columns) {
  UNROLL for (int h = 0; h < 2; h++) {
    float m = -INFINITY, l = 0;
    UNROLL for (int v = 0; v < COLUMNS; v++) m = fmaxf(m, s[(v >> 1) * 4 + h * 2 + (v & 1)]);
    m = quad_max(m);
    const float shift = m == -INFINITY ? 0.f : m;
    UNROLL for (int v = 0; v < COLUMNS; v++) l += ex2(s[(v >> 1) * 4 + h * 2 + (v & 1)] - shift);
    row[h] = {m, quad_sum(l)};
  }
  if (!columns) return;
  UNROLL for (int v = 0; v < COLUMNS; v++) {
    const float x = s[(v >> 1) * 4 + (v & 1)], y = s[(v >> 1) * 4 + 2 + (v & 1)];
    float m = fmaxf(x, y);
    for (int bit = 4; bit < 32; bit <<= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, bit));
    const float shift = m == -INFINITY ? 0.f : m;
    float l = ex2(x - shift) + ex2(y - shift);
    for (int bit = 4; bit < 32; bit <<= 1) l += __shfl_xor_sync(~0u, l, bit);
    if (at.lane < 4) put_column(columns, at, v, m, l);
  }
}

/// Products become logits to base 2; what does not count becomes -infinity. `rows`, `columns`: how many of the tile's
/// count; `diagonal`: column less row of positives.
DEV void mask(float (&s)[VALUES], float factor, const WidePlace& at, int64_t rows, int64_t columns, int64_t diagonal) {
  UNROLL for (int i = 0; i < VALUES; i++) {
    const int r = at.row0 + (i >> 1 & 1) * 8, c = (i >> 2) * 8 + at.column0 + (i & 1);
    s[i] = r < rows && c < columns && c - r != diagonal ? s[i] * factor : -INFINITY;
  }
}

/// The eight warps' partial results of a column, joined in their order.
DEV Pair join_warps(const Pair* columns, int c) {
  float m = -INFINITY, l = 0;
  UNROLL for (int w = 0; w < 8; w++) m = fmaxf(m, columns[w * WIDE + c].m);
  const float shift = m == -INFINITY ? 0.f : m;
  UNROLL for (int w = 0; w < 8; w++) l += columns[w * WIDE + c].l * ex2(columns[w * WIDE + c].m - shift);
  return {m, l};
}

template <class T, bool RESIDENT> __global__ void __launch_bounds__(PASS_THREADS, 1) sweep_tiles(const Sweep<T> p) {
  DYN_SMEM(shared);
  const int tid = threadIdx.x;
  const WidePlace at(tid);
  const int64_t n = p.q.rows, m = p.k.rows, local = (int64_t)blockIdx.x * TILE, r0 = p.first + local;
  const int64_t begin = blockIdx.y * p.group_tiles * WIDE, end = min(begin + p.group_tiles * WIDE, m);
  const float signed_factor = *p.scale * (float)LOG2E, factor = fabsf(signed_factor);
  Pass<T, RESIDENT> pass(p.q, p.k, shared, p.depth, r0, begin, end, tid);
  float acc[VALUES];
  Pair run[2] = {{-INFINITY, 0.f}, {-INFINITY, 0.f}};
  for (int64_t c0 = begin; c0 < end; c0 += WIDE) {
    pass.multiply(acc, at.group);
    pass.finish(acc);
    Pair* columns = p.column_part ? (Pair*)pass.free_stage(0) : nullptr;
    if (signed_factor < 0.f) UNROLL for (int i = 0; i < VALUES; i++) acc[i] = -acc[i];
    const int64_t diagonal = r0 + p.label - c0;
    const bool whole = n - r0 >= TILE && m - c0 >= WIDE && (diagonal >= WIDE || diagonal <= -TILE);
    Pair row[2];
    if (!whole || !together(acc, factor, at, row, columns)) {
      __syncwarp();  // what was written of the columns is written again
      mask(acc, factor, at, n - r0, m - c0, diagonal);
      apart(acc, at, row, columns);
    }
    UNROLL for (int h = 0; h < 2; h++) join(run[h].m, run[h].l, row[h].m, row[h].l);
    if (columns) {
      __syncthreads();
      if (tid < WIDE && c0 + tid < m) *(Pair*)(p.column_part + ((int64_t)blockIdx.x * m + c0 + tid) * 2) = join_warps(columns, tid);
    }
  }
  cp_wait<0>();
  if (at.column0 == 0) UNROLL for (int h = 0; h < 2; h++) {
    const int row = at.row0 + h * 8;
    if (r0 + row < n) *(Pair*)(p.row_part + ((int64_t)blockIdx.y * p.chunk_rows + local + row) * 2) = run[h];
  }
}

template <class T> int32_t launch(const Sweep<T>& s, int64_t row_tiles, int64_t groups, void* stream) {
  int rc = 0;
  const bool stay = resident(s.depth);
  auto whole = sweep_tiles<T, true>;
  auto streamed = sweep_tiles<T, false>;
  auto kernel = stay ? whole : streamed;
  LAUNCH(rc, kernel, dim3((unsigned)row_tiles, (unsigned)groups), dim3(PASS_THREADS), pass_bytes(s.depth, stay), stream, s);
  return rc;
}

}  // namespace

int32_t sweep_wide(const Sweep<bf16>& s, int64_t row_tiles, int64_t groups, void* stream) { return launch(s, row_tiles, groups, stream); }
int32_t sweep_wide(const Sweep<f16>& s, int64_t row_tiles, int64_t groups, void* stream) { return launch(s, row_tiles, groups, stream); }

}  // namespace contrastive
}  // namespace smalti
