// Forward with wgmma for bf16 and f16: a warpgroup holds 64 queries and meets N keys at a time, with the running maximum and
// sum of FlashAttention-2 (Dao, arXiv:2307.08691). Short sequences and windows lie in shared memory as a whole and serve
// several tiles of queries; of long ones a ring of stages is filled ahead, and the product with the values runs while the
// exponentials of the next keys are taken (FlashAttention-3, Shah et al., arXiv:2407.08608, section 3.2).
#pragma once
#include "softmax.cuh"
#include "tile.cuh"

namespace smalti {
namespace attention {

constexpr int kStages = 4;  // of a ring

/// Shared memory of a block of TILES tiles of 64 queries and STAGES of N keys, in bytes from its start; each tile begins at a
/// multiple of 1024.
template <class T, int DP, int N, int REL, int TILES, int STAGES> struct ForwardRoom {
  using K = Tile<T, DP>;
  /// Lines of a table that are multiplied at once, and all lines for windows of `extent`.
  static constexpr int kPart = REL == kRow16 ? 32 : 64;
  HOST_DEV static int lines(int extent) { return (2 * extent - 1 + kPart - 1) / kPart * kPart; }
  /// Window rows in `keys` keys.
  HOST_DEV static int rows(int keys) { return keys / (8 * (REL > 0 ? REL : 1)); }
  static constexpr int keys = K::bytes(TILES * 64), values = keys + K::bytes(STAGES * N), behind = values + K::bytes(STAGES * N);
  int table_h, table_w, terms, stride, bytes;
  HOST_DEV ForwardRoom(const Side& s, bool ring, int groups) {
    const int h = REL == kNone ? 0 : K::bytes(lines(s.win_h)), w = REL == kNone ? 0 : K::bytes(lines(s.win_w));
    table_h = ring ? keys : behind;  // before the loop they borrow the room of a ring's stages
    table_w = table_h + h;
    terms = table_w + w > behind ? table_w + w : behind;
    const int wanted = REL == kNone ? 0 : rows((s.rows() + N - 1) / N * N), columns = 8 * REL;
    stride = (wanted > columns ? wanted : columns) | 1;
    bytes = terms + (REL == kNone ? 0 : groups * 64 * stride * 4);
  }
};

/// A side with what is known of its shape: the pitch of windows, the only row of a sequence.
template <int REL> DEV Side known(Side s) {
  if (REL == kNone) s.win_h = s.img_h = 1;
  else s.pitch = 8 * REL;
  return s;
}
/// The window and head of this block; a sequence is one window.
template <int REL> DEV Place place_known(const Problem& p) {
  if (REL != kNone) return place_of(p);
  const uint32_t i = blockIdx.x / p.tiles;
  return {(int32_t)(i / p.heads), (int32_t)(i % p.heads), 0, 0, (int32_t)(blockIdx.x % p.tiles)};
}
/// Whether any token from number `first` of the window on is in the image.
template <int REL> DEV bool any_inside(const Side& s, const Place& w, int first) {
  return REL == kNone ? first < s.win_w : inside(s, w, (unsigned)first / s.pitch, 0);
}

/// Products of a warpgroup's queries with a table, to this warp's rows of the scratch (attention/tile.cuh).
template <class T, int DP, int PART> DEV void tile_terms(const Tile<T, DP>& q, int row, const Tile<T, DP>& table, Span s, int extent,
                                                         float* scratch, int stride, int lane) {
  for (int n = 0; n < table.lines; n += PART) {
    float a[PART / 2];
    wgmma_fence(a);
    multiply_rows<T, PART>(a, q, row, table, n);
    wgmma_commit();
    wgmma_wait<0>(a);
    scatter_terms(eights(a), s, n, extent, scratch, stride, kLog2e, lane);
  }
}

/// One tile of queries of a warpgroup.
template <class T, int DP, int N, int REL> struct Queries {
  static constexpr int CW = REL > 0 ? REL : 1;
  const Problem& p;
  const Place& w;
  const Side& side;
  Tile<T, DP> q, k, v;
  int row, first, lane;  // line in `q` of the warpgroup's first, number of this warp's first in the window
  bool active;           // whether any of this warp's is in the image
  int stride;            // of the scratch
  float scale, column[2][2 * CW];
  const float* terms[2];
  Running<DP> run;

  /// The relative terms: of the columns to registers, of the rows to `mine`, which is the warp's own.
  DEV void find_terms(const Tile<T, DP>& table_h, const Tile<T, DP>& table_w, float* mine) {
    using Room = ForwardRoom<T, DP, N, REL, 1, 1>;
    constexpr int PART = Room::kPart;
    const int g = lane >> 2, t2 = (lane & 3) * 2;
    const int y = (unsigned)first / side.pitch, x0 = first - y * side.pitch + g;  // a warp's queries are of one row of the window
    __syncwarp();  // what the scratch held has been read
    tile_terms<T, DP, PART>(q, row, table_w, {{x0, x0 + 8}, 0, 0}, p.ks.win_w, mine, stride, lane);
    __syncwarp();
    UNROLL for (int h = 0; h < 2; h++) UNROLL for (int c = 0; c < 2 * CW; c++) {
      const int x = (c >> 1) * 8 + t2 + (c & 1);
      const float term = mine[(g + h * 8) * stride + x];  // read in any case: a branch would cost more
      column[h][c] = x < p.ks.win_w ? term : -INFINITY;
    }
    __syncwarp();
    tile_terms<T, DP, PART>(q, row, table_h, {{y, y}, 0, 0}, p.ks.win_h, mine, stride, lane);
    const int rows = Room::rows((side.rows() + N - 1) / N * N) - p.ks.win_h;
    for (int i = lane; i < 16 * rows; i += 32) mine[(i & 15) * stride + p.ks.win_h + (i >> 4)] = -INFINITY;
    __syncwarp();
    UNROLL for (int h = 0; h < 2; h++) terms[h] = mine + (g + h * 8) * stride;
  }
  /// `s` holds nothing yet: its old values, were there any, would be waited for.
  DEV void issue_logits(float (&s)[N / 2], int line) const {
    wgmma_fence();
    multiply_rows<T, N>(s, q, row, k, line);
  }
  /// Minus infinity for the logits of what is no key of the sequence or, if causal, lies behind the query.
  DEV void mask(float (&s)[N / 8][4], int key) const {
    UNROLL for (int h = 0; h < 2; h++) {
      const int query = first + (lane >> 2) + h * 8, end = (p.causal ? min(p.ks.win_w, query + 1) : p.ks.win_w) - key - (lane & 3) * 2;
      UNROLL for (int n = 0; n < N / 8; n++) UNROLL for (int e = 0; e < 2; e++)
        if (n * 8 + e >= end) s[n][2 * h + e] = -INFINITY;
    }
  }
  /// Logits of the keys from `key` on to exponentials.
  DEV void soften(float (&s)[N / 2], int key, float (&keep)[2]) {
    auto& at = eights(s);
    if constexpr (REL == kNone) {
      if (key + N > (p.causal ? min(p.ks.win_w, first + 1) : p.ks.win_w)) mask(at, key);
      exponentials(at, scale, run, keep);
    } else {
      const int y = ForwardRoom<T, DP, N, REL, 1, 1>::rows(key);
      float term[2][N / 8 / CW];
      if constexpr (N / 8 > CW) {  // the row terms of both queries at once would take too many registers
        UNROLL for (int h = 0; h < 2; h++) {
          keep[h] = find_top<DP, N / 8, CW>(at, h, scale, column[h], terms[h] + y, term[h], run);
          exponentials<DP, N / 8, CW>(at, h, term[h], run);
        }
      } else {
        UNROLL for (int h = 0; h < 2; h++) keep[h] = find_top<DP, N / 8, CW>(at, h, scale, column[h], terms[h] + y, term[h], run);
        UNROLL for (int h = 0; h < 2; h++) exponentials<DP, N / 8, CW>(at, h, term[h], run);
      }
    }
  }
  DEV void pack_all(uint32_t (&a)[N / 16][4], float (&s)[N / 2]) const {
    auto& at = eights(s);
    UNROLL for (int i = 0; i < N / 16; i++) as_a<T>(a[i], at[2 * i], at[2 * i + 1]);
  }
  DEV void add_values(const uint32_t (&a)[N / 16][4], int line) {
    wgmma_fence(run.o);
    multiply_depth<T, N, DP>(run.o, a, v, line, true);
    wgmma_commit();
  }
  /// All keys lie in shared memory: one tile of them after the other.
  DEV void meet(int steps) {
    for (int j = 0; j < steps; j++) {
      float s[N / 2], keep[2] = {1.f, 1.f};
      uint32_t a[N / 16][4];
      issue_logits(s, j * N);
      wgmma_commit();
      wgmma_wait<0>(s);
      if (active) {
        soften(s, j * N, keep);
        if (j > 0) run.rescale(keep);
      }
      pack_all(a, s);
      add_values(a, j * N);
      wgmma_wait<0>(run.o);
    }
  }
  /// Keys come by way of the ring: `arrive()` when those of the next step are wanted, `refill(j, i)` when step j runs, in
  /// stage i, and the stage before it is free. The logits of the next step are on their way before the values of this one.
  template <class A, class R> DEV void stream(int steps, A arrive, R refill) {
    uint32_t a[N / 16][4];
    {
      float s[N / 2], keep[2];
      issue_logits(s, 0);
      wgmma_commit();
      wgmma_wait<0>(s);
      if (active) soften(s, 0, keep);
      pack_all(a, s);
    }
    // Unrolled for the numbers of the stages: addresses that depend on the step would take a tenth more instructions.
    for (int start = 1; start < steps; start += kStages) UNROLL for (int i = 0; i < kStages; i++) if (start + i < steps) {
      const int j = start + i;
      arrive();
      float s[N / 2], keep[2] = {1.f, 1.f};
      issue_logits(s, (i + 1) % kStages * N);
      wgmma_commit();
      add_values(a, i * N);
      refill(j - 1, i);
      wgmma_wait<1>(s);
      if (active) soften(s, j * N, keep);
      wgmma_wait<0>(run.o);
      if (active) run.rescale(keep);
      pack_all(a, s);
    }
    add_values(a, (steps - 1) % kStages * N);
    wgmma_wait<0>(run.o);
  }
  DEV void store() const {
    if (!active) return;
    const int y = REL == kNone ? 0 : (unsigned)first / side.pitch, x = first - y * side.pitch + (lane >> 2);
    T* to = row_at<T>(p.o, side, w, y, 0) + x * (int64_t)(int)p.o.x + (lane & 3) * 2;
    float* const lse = (float*)p.lse + query_index(p, w, y, 0);
    UNROLL for (int h = 0; h < 2; h++) {
      const float log = lg2(quad_sum(run.sum[h])), inverse = ex2(-log);
      if (!inside(side, w, y, x + h * 8)) continue;
      UNROLL for (int d = 0; d < DP / 8; d++)
        *(uint32_t*)(to + h * 8 * (int64_t)(int)p.o.x + d * 8) = pack(T{}, run.o[4 * d + 2 * h] * inverse, run.o[4 * d + 2 * h + 1] * inverse);
      if ((lane & 3) == 0) lse[x + h * 8] = (run.top[h] + log) * kLn2;
    }
  }
};

/// The block of a launch and its shared memory. RING: stages are filled again and again, and each warpgroup has one tile of
/// queries; else they hold all keys.
template <class T, int DP, int N, int REL, int GROUPS, int TILES, int STAGES, bool RING> struct ForwardBlock {
  using K = Tile<T, DP>;
  using Room = ForwardRoom<T, DP, N, REL, TILES, STAGES>;
  static constexpr int THREADS = GROUPS * 128, PITCH = REL > 0 ? 8 * REL : 0;
  template <int LINES> using From = Feed<T, DP, LINES, PITCH, REL == kRow16, THREADS>;
  using Keys = From<RING ? N : N * STAGES>;
  const Problem& p;
  const Place w;
  const Side side, ks;  // of the queries and of the keys
  const Room room;
  const K q, k, v, table_h, table_w;
  int tid, begin;
  float* mine;  // this warp's rows of the scratch

  DEV ForwardBlock(const Problem& p, unsigned char* sm)
      : p(p), w(place_known<REL>(p)), side(known<REL>(p.qs)), ks(known<REL>(p.ks)), room(ks, RING, GROUPS), q{sm, TILES * 64}, k{sm + Room::keys, STAGES * N},
        v{sm + Room::values, STAGES * N}, table_h{sm + room.table_h, Room::lines(p.ks.win_h)}, table_w{sm + room.table_w, Room::lines(p.ks.win_w)},
        tid(threadIdx.x), begin(w.tile * TILES * 64), mine((float*)(sm + room.terms) + (tid >> 5) * 16 * room.stride) {}
  /// Steps of keys that the queries before number `query` see.
  DEV int steps_to(int query) const {
    const int rows = ks.rows(), seen = p.causal && query < rows ? query : rows;
    return (seen + N - 1) / N;
  }
  DEV void load_queries() const {
    constexpr int LINES = REL == kRow64 ? 64 : TILES * 64;
    From<LINES> from(p.q, side, w, begin, tid);
    UNROLL for (int line = 0; line < TILES * 64; line += LINES)
      if (line == 0 || begin + line < side.rows()) from.load(p.q, q, line, tid);  // else nobody reads what they make of it
    if (REL == kNone) return;
    load_table_tile(table_h, p.rel_h, 2 * p.ks.win_h - 1, p.q.n, 0, tid, THREADS);
    load_table_tile(table_w, p.rel_w, 2 * p.ks.win_w - 1, p.q.n, 0, tid, THREADS);
  }
  DEV Queries<T, DP, N, REL> tile(int number) const {
    const int first = begin + number * 64 + (tid >> 5 & 3) * 16;
    return {p, w, side, q, k, v, number * 64, first, tid & 31, any_inside<REL>(side, w, first), room.stride, (float)p.scale * kLog2e, {}, {}, {}};
  }
  /// Of this warpgroup; in a way that the compiler knows it to be one number.
  DEV int group() const {
    int g = 0;
    UNROLL for (int i = 1; i < GROUPS; i++) g += __any_sync(~0u, tid >= i * 128) ? 1 : 0;
    return g;
  }
};

/// After cp_wait: everyone's copies have arrived, for wgmma too.
DEV void arrived() {
  proxy_fence();
  __syncthreads();
}

/// All keys of a window and head in shared memory.
template <class T, int DP, int N, int REL, int GROUPS, int BLOCKS, int TILES, int STAGES>
__global__ void __launch_bounds__(GROUPS * 128, BLOCKS) forward_whole(const Problem p) {
  DYN_SMEM(sm);
  using Block = ForwardBlock<T, DP, N, REL, GROUPS, TILES, STAGES, false>;
  const Block block(p, sm);
  block.load_queries();
  cp_commit();
  typename Block::Keys keys(p.k, block.ks, block.w, 0, block.tid), values(p.v, block.ks, block.w, 0, block.tid);
  keys.load(p.k, block.k, 0, block.tid);
  values.load(p.v, block.v, 0, block.tid);
  cp_commit();
  ROLLED for (int turn = 0; turn < TILES / GROUPS; turn++) {
    const int tile = turn * GROUPS + block.group(), first = block.begin + tile * 64;
    const bool any = any_inside<REL>(block.side, block.w, first);
    auto queries = block.tile(tile);
    if constexpr (REL != kNone) {
      if (turn == 0) {
        cp_wait<1>();
        arrived();
      }
      if (any) queries.find_terms(block.table_h, block.table_w, block.mine);
    }
    if (turn == 0) {
      cp_wait<0>();
      arrived();
    }
    if (!any) return;
    queries.meet(block.steps_to(first + 64));
    queries.store();
  }
}

/// Keys by way of a ring.
template <class T, int DP, int N, int REL, int GROUPS, int BLOCKS>
__global__ void __launch_bounds__(GROUPS * 128, BLOCKS) forward_ring(const Problem p) {
  DYN_SMEM(sm);
  using Block = ForwardBlock<T, DP, N, REL, GROUPS, GROUPS, kStages, true>;
  const Block block(p, sm);
  typename Block::Keys keys(p.k, block.ks, block.w, 0, block.tid), values(p.v, block.ks, block.w, 0, block.tid);
  const int steps = block.steps_to(block.begin + GROUPS * 64);
  auto fetch = [&](int j, int stage) {
    if (j < steps) {
      keys.load(p.k, block.k, stage * N, block.tid);
      values.load(p.v, block.v, stage * N, block.tid);
    }
    cp_commit();
  };
  block.load_queries();
  cp_commit();
  auto queries = block.tile(block.group());
  if constexpr (REL != kNone) {
    cp_wait<0>();
    arrived();
    queries.find_terms(block.table_h, block.table_w, block.mine);
    __syncthreads();  // the tables have been read
  }
  for (int j = 0; j + 1 < kStages; j++) fetch(j, j);
  cp_wait<kStages - 2>();
  arrived();
  auto arrive = [] {
    cp_wait<kStages - 3>();
    arrived();
  };
  queries.stream(steps, arrive, [&](int j, int stage) { fetch(j + kStages - 1, (stage + kStages - 1) % kStages); });
  queries.store();
}

}  // namespace attention
}  // namespace smalti
