// Gradient of the queries and of their relative terms with wgmma: a warpgroup owns 64 queries and meets all keys, 64 a step
// (dq_mma.cuh has the formulas). The product of one step runs while the weights of the next are made. Delta, which the pass
// over keys reads too, is made here.
#pragma once
#include "../dq_mma.cuh"
#include "backward.cuh"

namespace smalti {
namespace attention {

template <class T, int DP, int REL> struct QueriesLayout {
  using Tokens = Tile<T, DP>;
  static constexpr bool BORROW = DP > 64 && REL == kRow64;  // no room for the tables beside the stages
  int go, stage, table_h, table_w, terms, sums, stride, bytes;  // the queries stand at 0
  HOST_DEV QueriesLayout(const Side& s, int groups) {
    constexpr int ROW = kLd<DP> * 2;
    go = Tokens::bytes(groups * 64);
    stage = go + Tokens::bytes(groups * 64);
    const int end = stage + Ring<T, DP>::BYTES, th = REL == kNone ? 0 : (2 * s.win_h - 1) * ROW, tw = REL == kNone ? 0 : (2 * s.win_w - 1) * ROW;
    table_h = BORROW ? stage : end;
    table_w = table_h + th;
    terms = table_w + tw > end ? table_w + tw : end;
    stride = REL == kNone ? 0 : (s.win_h > s.win_w ? s.win_h : s.win_w) | 1;
    sums = terms + groups * 64 * stride * 4;
    bytes = sums + groups * 64 * stride * 4;
  }
};

/// A 16x16 operand from rows of a tile, columns from k.
template <class T, int DP> DEV void load_a(uint32_t (&a)[4], const Tile<T, DP>& tile, int row, int k, int lane) {
  ldsm4(a, tile.at + k / 64 * tile.lines * 128 + swizzled(row + (lane & 15), k % 64 / 8 + (lane >> 4)));
}

/// Log-sum-exp (of base 2; infinity where there is no query, which makes every weight zero) and delta of a lane's two queries.
/// A quad shares a row of the output and of dO.
template <class T, int DP> struct QueryRows {
  static constexpr int V = 8, EACH = (DP / V + 3) / 4;
  struct alignas(16) Chunk { T v[V]; };
  Chunk out[2][EACH];
  float lse[2], delta[2];
  int64_t index[2];
  bool in[2];
  DEV void fetch(const Problem& p, const Place& w, int first, int lane) {
    UNROLL for (int h = 0; h < 2; h++) {
      const int r = first + (lane >> 2) + h * 8, y = r / p.qs.pitch, x = r - y * p.qs.pitch;
      in[h] = inside(p.qs, w, y, x);
      index[h] = in[h] ? query_index(p, w, y, x) : 0;
      lse[h] = in[h] ? ((const float*)p.lse)[index[h]] : INFINITY;
      UNROLL for (int i = 0; i < EACH; i++) {
        const int c = ((lane & 3) + 4 * i) * V;
        out[h][i] = Chunk{};
        if (in[h] && c < p.o.n) out[h][i] = *(const Chunk*)(row_at<const T>(p.o, p.qs, w, y, x) + c);
      }
    }
  }
  /// `row`: of the warp's first query among dO.
  DEV void finish(const Problem& p, const Tile<T, DP>& go, int row, int lane) {
    UNROLL for (int h = 0; h < 2; h++) {
      delta[h] = 0.f;
      UNROLL for (int i = 0; i < EACH; i++) {
        const int c = (lane & 3) + 4 * i;
        if (c >= DP / V) continue;
        const Chunk g = *(const Chunk*)(go.at + c / 8 * go.lines * 128 + swizzled(row + (lane >> 2) + h * 8, c % 8));
        UNROLL for (int e = 0; e < V; e++) delta[h] += widen(out[h][i].v[e]) * widen(g.v[e]);
      }
      delta[h] = quad_sum(delta[h]);
      if (in[h] && (lane & 3) == 0) ((float*)p.delta)[index[h]] = delta[h];
      lse[h] *= kLog2e;
    }
  }
};

/// From logits and dP to dS, of a lane's two queries by the 64 keys from the 8-wide tile `tile`.
template <int REL, class Terms> DEV void slopes(const float (&s)[8][4], float (&ds)[8][4], Terms& rel, const float (&lse)[2], const float (&delta)[2],
                                                const Problem& p, float scale, int tile, int lane) {
  constexpr int CW = Terms::CW;
  float less[2] = {lse[0], lse[1]}, line[2];
  UNROLL for (int n = 0; n < 8; n++) {
    const int y = (tile + n) / CW;
    if (REL > 0 && n % CW == 0) UNROLL for (int h = 0; h < 2; h++) {
      less[h] = y < p.ks.win_h ? lse[h] - rel.terms[((lane >> 2) + h * 8) * rel.stride + y] : INFINITY;
      line[h] = 0.f;
    }
    UNROLL for (int e = 0; e < 4; e++) {
      const int h = e >> 1, c = n % CW * 2 + (e & 1);
      const float d = ex2((REL > 0 ? s[n][e] * scale + rel.column[h][c] : s[n][e] * scale) - less[h]) * (ds[n][e] - delta[h]);
      ds[n][e] = d;
      if (REL > 0) { rel.column_sum[h][c] += d; line[h] += d; }
    }
    // the window row ends: lane 0 of each quad keeps its sum
    if (REL > 0 && n % CW == CW - 1) UNROLL for (int h = 0; h < 2; h++) {
      const float total = quad_sum(line[h]);
      if ((lane & 3) == 0 && y < p.ks.win_h) rel.sums[((lane >> 2) + h * 8) * rel.stride + y] = total;
    }
  }
}

/// With relative terms for even windows alone.
template <class T, int DP, int REL> __global__ void __launch_bounds__(256, 1) dq_wgmma(const Problem p) {
  using Tokens = Tile<T, DP>;
  using Layout = QueriesLayout<T, DP, REL>;
  DYN_SMEM(sm);
  // the shuffle tells the compiler that a warp has one number
  const int tid = threadIdx.x, threads = blockDim.x, lane = tid & 31, warp = __shfl_sync(~0u, tid >> 5, 0), group = warp >> 2, queries = threads >> 1;
  const Layout at(p.ks, threads >> 7);
  const Tokens sq = {sm, queries}, sgo = {sm + at.go, queries};
  const Ring<T, DP> ring = {sm + at.stage};  // of keys and values
  const T *table_h = (const T*)(sm + at.table_h), *table_w = (const T*)(sm + at.table_w);
  const Place w = place_of(p);
  const int block = w.tile * queries, first = block + warp * 16;
  if (!inside(p.qs, w, block / p.qs.pitch, 0)) return;  // of a window that the image cuts
  int end = p.ks.rows();
  if (p.causal && block + queries < end) end = block + queries;
  const int steps = (end + kStep - 1) / kStep;
  PairFeed<T, DP> feed(p.k, p.v, p.ks, w, 0, tid, threads);
  auto fetch = [&](int j) {
    if (j < steps && p.k.pad) feed.template step<true>(ring, j);
    else if (j < steps) feed.template step<false>(ring, j);
    cp_commit();
  };
  auto tables = [&]() {
    load_table<T, DP>((T*)(sm + at.table_h), kLd<DP>, p, p.rel_h, 2 * p.ks.win_h - 1, p.q.n, tid, threads);
    load_table<T, DP>((T*)(sm + at.table_w), kLd<DP>, p, p.rel_w, 2 * p.ks.win_w - 1, p.q.n, tid, threads);
  };
  load_tiles(sq, sgo, 0, p.q, p.go, p.qs, w, block, queries, tid, threads);
  if (REL != kNone) tables();
  QueryRows<T, DP> rows;
  rows.fetch(p, w, first, lane);
  if (Layout::BORROW) cp_commit();
  else { fetch(0); fetch(1); }
  if (Layout::BORROW) cp_wait<0>();
  else cp_wait<1>();
  proxy_fence();
  __syncthreads();
  rows.finish(p, sgo, warp * 16, lane);
  QueryTerms<T, DP, REL, true> rel((float*)(sm + at.terms) + warp * 16 * at.stride, (float*)(sm + at.sums) + warp * 16 * at.stride, at.stride);
  const bool active = inside(p.qs, w, first / p.qs.pitch, 0);
  if constexpr (REL != kNone) if (active) {
    uint32_t q[DP / 16][4];
    UNROLL for (int k = 0; k < DP / 16; k++) load_a(q[k], sq, warp * 16, k * 16, lane);
    rel.start(q, table_h, table_w, p, w, first, lane);
  }
  if (Layout::BORROW) {
    __syncthreads();
    fetch(0);
    fetch(1);
    cp_wait<1>();
    proxy_fence();
    __syncthreads();
  }
  const float scale = (float)p.scale * kLog2e;
  const int solid = solid_keys(p.ks);
  float s[32], ds[32], dq[DP / 2];
  uint32_t a[4][4];
  auto logits = [&](int j) {
    multiply_rows<T, kStep>(s, sq, group * 64, ring.one(j), 0);
    multiply_rows<T, kStep>(ds, sgo, group * 64, ring.two(j), 0);
    wgmma_commit();
  };
  auto weights = [&](int j) {
    slopes<REL>(eights(s), eights(ds), rel, rows.lse, rows.delta, p, scale, j * 8, lane);
    const int key = j * kStep;
    if (REL == kNone && (key + kStep > solid || (p.causal && key + kStep > first))) mask_keys(eights(ds), p, key, first + (lane >> 2), lane, 0.f);
  };
  auto gradients = [&](int j) {
    multiply_depth<T, kStep>(dq, a, ring.one(j), 0, true);
    wgmma_commit();
  };
  clear(eights(dq));
  wgmma_fence(s, ds);
  logits(0);
  wgmma_wait<0>(s, ds);
  weights(0);
  for (int j = 0; j + 1 < steps; j++) {
    as_operands<T>(a, eights(ds));
    cp_wait<0>();
    proxy_fence();
    __syncthreads();
    fetch(j + 2);  // where step j - 1 was, which all have done with
    wgmma_fence(s, ds, dq);
    logits(j + 1);
    gradients(j);
    wgmma_wait<1>(s, ds);
    weights(j + 1);
    wgmma_wait<0>(dq);
  }
  as_operands<T>(a, eights(ds));
  wgmma_fence(dq);
  gradients(steps - 1);
  wgmma_wait<0>(dq);
  if (Layout::BORROW) {
    __syncthreads();
    tables();
    cp_commit();
    cp_wait<0>();
    __syncthreads();
  }
  if (!active) return;
  UNROLL for (int i = 0; i < DP / 2; i++) dq[i] *= (float)p.scale;
  if constexpr (REL != kNone) rel.finish(eights(dq), table_h, table_w, p, w, first, lane);
  queries_out<T, DP>(eights(dq), p, w, first, lane);
}

}  // namespace attention
}  // namespace smalti
