// Gradients of the relative position tables for bf16 and f16: products whose depth is the tokens,
//   dRh[r, c] += D1[token, y - r + win_h - 1] * q[token, c]   (likewise dRw with x, D2 and win_w).
// A warp keeps two tiles of 16 table rows in registers and takes 16 tokens at a time, read from memory straight into
// operands: since a product may order its depth and its columns as it likes, a lane takes four tokens of one window
// row, and neighbouring columns of them. Reading D along the table's rows makes the same tile of all window rows and
// columns, so that nothing is added up before the end.
// D is taken as a sum of two bf16, which loses 2^-17 of it, and f16's q as one too, which is exact: unlike parts in
// f16, those of bf16 neither overflow nor go subnormal.
#pragma once
#include "launch.cuh"

namespace smalti {
namespace attention {

constexpr int kMultiprocessors = 132;  // an H200's, and the same on any device: the order of sums depends on it
constexpr int kTableWarps = 8;
/// Does q take two bf16?
template <class T> constexpr bool kTwoParts = false;
template <> constexpr bool kTwoParts<f16> = true;

/// How the work of the half types is shared out. A unit is 16 tokens of a window and head; a block has `teams` that take
/// its units in turn, and in a team `owners` warps, each with two of the tiles of 16 table rows.
struct TablePlan {
  Divisor heads, tiles, across, down, pitch;
  int32_t per_window, row_tiles, all_tiles, owners, teams, units;
  explicit TablePlan(const Problem& p)
      : heads(p.heads), across(p.windows_x), down(p.windows_y), pitch(p.qs.pitch), per_window((p.qs.rows() + 15) / 16),
        row_tiles((2 * p.ks.win_h + 14) / 16), all_tiles(row_tiles + (2 * p.ks.win_w + 14) / 16) {
    tiles = Divisor(per_window);
    owners = (all_tiles + 1) / 2 < kTableWarps ? (all_tiles + 1) / 2 : kTableWarps;
    teams = kTableWarps / owners;
    const __int128 n = (__int128)p.batch * p.heads * p.windows_y * p.windows_x * per_window;
    units = n > INT32_MAX / 16 ? 0 : (int32_t)n;  // so that tokens of all heads can be counted in 32 bits
  }
};

/// A lane's tokens of a unit: `count` of four neighbours in a window row.
template <class T> struct Tokens {
  const T* q;
  const float* d;
  int y, x, count;
  DEV Tokens(const Problem& p, const TablePlan& plan, uint32_t unit, int t) {
    // heads innermost: neighbours in time read neighbouring memory of packed tensors
    Place w;
    uint32_t i = plan.heads.of(unit), next = plan.tiles.of(i);
    w.h = unit - i * p.heads; w.tile = i - next * plan.per_window;
    i = next; next = plan.across.of(i);
    w.wx = i - next * p.windows_x; w.b = plan.down.of(next);
    w.wy = next - w.b * p.windows_y;
    const int slot = w.tile * 16 + t * 4;
    y = plan.pitch.of(slot); x = slot - y * p.qs.pitch;
    const int right = p.qs.img_w - w.wx * p.qs.win_w, wide = right < p.qs.win_w ? right : p.qs.win_w;
    count = inside(p.qs, w, y, 0) ? wide - x : 0;
    q = row_at<const T>(p.q, p.qs, w, y, x);
    d = (const float*)p.drel + (uint64_t)(uint32_t)query_index(p, w, y, x) * (uint32_t)(p.ks.win_h + p.ks.win_w);
  }
};

/// 16 rows of a table, as a lane with rows g and g + 8 sees them.
struct TableTile {
  int axis, first, extent;  // first: the key that row g of the tile makes of coordinate 0
  DEV TableTile(const Problem& p, const TablePlan& plan, int i, int g) {
    axis = i >= plan.row_tiles;
    extent = i >= plan.all_tiles ? 0 : axis ? p.ks.win_w : p.ks.win_h;
    first = extent - 1 - (i - axis * plan.row_tiles) * 16 - g;
  }
  template <class T> DEV int key(const Tokens<T>& at) const { return first + (axis ? at.x : at.y); }
  /// Is there anything of the unit in these rows? The same for all lanes.
  template <class T> DEV bool meets(const Tokens<T>& at) const {
    const int k = key(at);
    return __any_sync(~0u, at.count > 0 && k + 3 >= 0 && k - 8 < extent);
  }
  /// The elements of operand A, in the order of its registers.
  template <class T> DEV void load(float (&a)[4][2], const Problem& p, const Tokens<T>& at) const {
    int k = key(at);
    const float* from = at.d + (axis ? p.ks.win_h : 0) + k;
    const uint32_t step = p.ks.win_h + p.ks.win_w + axis;
    UNROLL for (int token = 0; token < 4; token++, from += step, k += axis) {
      const uint32_t keys = token < at.count ? extent : 0;
      UNROLL for (int h = 0; h < 2; h++) a[(token & 2) + h][token & 1] = (uint32_t)(k - h * 8) < keys ? from[-h * 8] : 0.f;
    }
  }
};

/// x and y as bf16 each, and what that leaves of them.
DEV void split(uint32_t& high, uint32_t& rest, float x, float y) {
  high = pack2(x, y);
  rest = pack2(x - bits2f(high << 16), y - bits2f(high & 0xffff0000u));
}

/// W neighbouring elements, of which `left` are there, as words.
template <int W, class T> DEV void load_words(uint32_t* to, const T* from, int left, bool wide) {
  struct alignas(W * 2) Words { uint32_t v[W / 2]; } r = {};
  if (wide && left >= W) r = *(const Words*)from;
  UNROLL for (int i = 0; i < W / 2; i++) to[i] = r.v[i];
  if (!wide) UNROLL for (int i = 0; i < W; i++) if (i < left) to[i / 2] |= (uint32_t)from[i].x << i % 2 * 16;
}

/// Column n of the product's 8-wide tile j, among those of NT tiles: a lane's are neighbours as far as they go evenly.
template <int NT> DEV int table_column(int j, int n) { return j < 8 ? n * 8 + j : 64 + n * (NT - 8) + j - 8; }

/// Operand B of NT tiles: four tokens from `column` on; zeros beyond what is there.
template <int NT, class T> DEV void load_tokens(uint32_t (&b)[NT][2], const Problem& p, const Tokens<T>& at, int column, int g) {
  static_assert(NT == 8 || NT == 10, "what load_words can read at once");
  uint32_t words[4][NT / 2];
  const T* from = at.q + column;
  UNROLL for (int i = 0; i < 4; i++, from += p.q.x) {
    const int left = i < at.count ? p.q.n - column : 0;
    load_words<8>(words[i], from + g * 8, left - g * 8, p.wide);
    if (NT > 8) load_words<2>(words[i] + NT / 2 - 1, from + 64 + g * 2, left - 64 - g * 2, p.wide);
  }
  UNROLL for (int j = 0; j < NT; j += 2) UNROLL for (int i = 0; i < 2; i++) {
    const uint32_t one = words[2 * i][j / 2], two = words[2 * i + 1][j / 2];
    b[j][i] = (one & 0xffffu) | two << 16;
    b[j + 1][i] = one >> 16 | (two & 0xffff0000u);
  }
}

/// Block (x, y, z) sums share x of the units for tiles y of both tables and columns z to part[x]: [rows of both tables, D].
template <class T, int NT> __global__ void __launch_bounds__(kTableWarps * 32, NT > 8 ? 1 : 2) table_products(const Problem p, const TablePlan plan, float* part) {
  constexpr int STEP = kTwoParts<T> ? NT / 2 : NT;  // tiles whose rests there are registers for
  DYN_SMEM(sm);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, owner = warp % plan.owners, team = warp / plan.owners;
  const int tile = blockIdx.y * 2 * plan.owners + owner, column = blockIdx.z * NT * 8;
  const TableTile tiles[2] = {{p, plan, tile, g}, {p, plan, tile + plan.owners, g}};
  float acc[2][NT][4];
  clear(acc[0]);
  clear(acc[1]);
  const int64_t from = (int64_t)plan.units * blockIdx.x / gridDim.x, to = (int64_t)plan.units * (blockIdx.x + 1) / gridDim.x;
  for (int unit = (int)from + team; unit < (int)to; unit += plan.teams) {
    const Tokens<T> at(p, plan, unit, t);
    const bool meets[2] = {tiles[0].meets(at), tiles[1].meets(at)};
    if (!meets[0] && !meets[1]) continue;
    float d[2][4][2];
    uint32_t b[NT][2];
    UNROLL for (int m = 0; m < 2; m++) if (meets[m]) tiles[m].load(d[m], p, at);
    load_tokens<NT>(b, p, at, column, g);
    UNROLL for (int j = 0; j < NT; j += STEP) {
      uint32_t rest[STEP][2];
      if constexpr (kTwoParts<T>) {
        UNROLL for (int n = 0; n < STEP; n++) UNROLL for (int i = 0; i < 2; i++) {
          const uint32_t q = b[j + n][i];
          split(b[j + n][i], rest[n][i], h2f({(uint16_t)q}), h2f({(uint16_t)(q >> 16)}));
        }
      }
      UNROLL for (int m = 0; m < 2; m++) if (meets[m]) {
        uint32_t high[4], low[4];
        UNROLL for (int i = 0; i < 4; i++) split(high[i], low[i], d[m][i][0], d[m][i][1]);
        UNROLL for (int n = 0; n < STEP; n++) mma16816(acc[m][j + n], low, b[j + n][0], b[j + n][1]);
        if constexpr (kTwoParts<T>) {
          UNROLL for (int n = 0; n < STEP; n++) mma16816(acc[m][j + n], high, rest[n][0], rest[n][1]);
        }
        UNROLL for (int n = 0; n < STEP; n++) mma16816(acc[m][j + n], high, b[j + n][0], b[j + n][1]);
      }
    }
  }
  // The teams' sums, the last team's first, each added to the next.
  float* sums = (float*)sm + owner * 2 * NT * 4 * 32 + lane;
  for (int turn = plan.teams - 1; turn >= 0; turn--) {
    if (turn == team) {
      UNROLL for (int m = 0; m < 2; m++) UNROLL for (int j = 0; j < NT; j++) UNROLL for (int e = 0; e < 4; e++) {
        float& sum = sums[((m * NT + j) * 4 + e) * 32];
        if (turn + 1 < plan.teams) acc[m][j][e] += sum;
        if (turn) sum = acc[m][j][e];
      }
    }
    __syncthreads();
  }
  if (team) return;
  const int rows_h = 2 * p.ks.win_h - 1, d = p.q.n;
  part += (int64_t)blockIdx.x * (rows_h + 2 * p.ks.win_w - 1) * d;
  UNROLL for (int m = 0; m < 2; m++) UNROLL for (int h = 0; h < 2; h++) {
    const int row = tiles[m].extent - 1 - tiles[m].first + h * 8;  // extent 0: never in the table
    if (row > 2 * tiles[m].extent - 2) continue;
    float* out = part + (int64_t)(row + (tiles[m].axis ? rows_h : 0)) * d;
    UNROLL for (int j = 0; j < NT; j++) UNROLL for (int e = 0; e < 2; e++) {
      const int c = column + table_column<NT>(j, t * 2 + e);
      if (c < d) out[c] = acc[m][j][h * 2 + e];
    }
  }
}

/// Launches `table_products`; `parts` takes how many there are.
template <class T, int NT> int32_t run_products(const Problem& p, float* part, int& parts, void* stream) {
  const TablePlan plan(p);
  if (!plan.units) return kInvalid;
  const int rows = (plan.all_tiles + 2 * plan.owners - 1) / (2 * plan.owners), columns = (p.q.n + NT * 8 - 1) / (NT * 8);
  // one round of blocks
  const int most = (NT > 8 ? 1 : 2) * kMultiprocessors / (rows * columns);
  parts = (int)grid_for(plan.units, plan.teams);
  if (parts > most) parts = most > 0 ? most : 1;
  const int smem = plan.teams > 1 ? plan.owners * 2 * NT * 4 * 32 * 4 : 0;
  int rc = 0;
  auto kernel = table_products<T, NT>;
  LAUNCH(rc, kernel, dim3(parts, rows, columns), dim3(plan.owners * plan.teams * 32), smem, stream, p, plan, part);
  return rc;
}

}  // namespace attention
}  // namespace smalti
