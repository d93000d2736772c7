// Gradients of keys and values with wgmma: a warpgroup owns 64 keys, holds both gradients in registers and meets all queries,
// 64 a step, so nothing is added across blocks: dV = P^T dO, dK = scale dS^T Q (dkv_mma.cuh; there too what the relative
// terms are). P^T and dS^T come as accumulators of keys by queries, which are the left operands of the other two products.
// Those of one step run while the weights of the next are made.
#pragma once
#include "../dkv_mma.cuh"
#include "backward.cuh"

namespace smalti {
namespace attention {

/// Row stride of a query's relative terms, 4 mod 16 so that the quads of a warp read different banks (term_stride).
template <int REL> constexpr int kTermStride = REL == kRow64 ? 68 : REL == kRow16 ? 36 : 0;

template <class T, int DP, int REL> struct KeysLayout {
  using Tokens = Tile<T, DP>;
  int v, stage, values, of_step, terms, bytes;  // the keys stand at 0; of_step: values of a step
  HOST_DEV explicit KeysLayout(int groups) {
    v = Tokens::bytes(groups * 64);
    stage = v + Tokens::bytes(groups * 64);
    values = stage + Ring<T, DP>::BYTES;
    of_step = kStep * 2 * (REL == kRow64 ? groups : 1);
    terms = values + kStages * of_step * 4;
    bytes = terms + kStages * kStep * kTermStride<REL> * 4;
  }
};

/// Two numbers of each query, by turns: log-sum-exp (of base 2; infinity where there is no query, which makes every weight
/// zero) and delta. Where all keys of a warpgroup are in one window row, it has its own, less that row's relative term. A
/// thread fetches its number a step early and puts it down when it has come.
template <int REL> struct QueryValues {
  static constexpr bool LESS = REL == kRow64;
  Walk at;
  const float *from, *term;
  float value, less;
  int across, n, place;
  bool second, here;
  /// `row`: the keys' window row.
  DEV QueryValues(const Problem& p, const Place& w, int first, int row, int tid)
      : at(p.qs, w, first + (tid & 63), kStep), value(0.f), less(0.f), across(p.qs.img_w), n(p.ks.win_h + p.ks.win_w),
        place((LESS ? tid & ~127 : 0) + (tid & 63) * 2 + (tid >> 6 & 1)), second(tid >> 6 & 1), here(LESS || tid < 2 * kStep) {
    const int64_t window = query_index(p, w, 0, 0);
    from = (const float*)(second ? p.delta : p.lse) + window;
    term = LESS ? (const float*)p.rel + window * n + row : nullptr;
  }
  DEV void fetch() {
    value = second ? 0.f : INFINITY;
    if (here && at.inside()) {
      const int i = at.y * across + at.x;
      value = from[i];
      if (LESS && !second) less = term[(int64_t)i * n];
    }
    at.next();
  }
  DEV void put(float* to) const { if (here) to[place] = second ? value : LESS ? value * kLog2e - less : value * kLog2e; }
};

/// The relative terms of the queries: four threads copy those of one that the block's keys need (Terms), whole chunks of 16
/// bytes, those of window rows only where they are not among QueryValues; and where a thread then finds its own keys', the
/// first of which is at (y, x).
template <int REL> struct KeyTerms {
  static constexpr int STRIDE = kTermStride<REL>, EACH = REL == kRow64 ? 4 : 1;
  Terms own;
  Walk at;
  const float* from;
  int across, line, step, part, row, column;
  DEV KeyTerms(const Problem& p, const Place& w, int low, int high, int y, int x, int first, int tid, int threads)
      : own(p.ks, low, high), at(p.qs, w, first + (tid >> 2), threads >> 2),
        from((const float*)p.rel + query_index(p, w, 0, 0) * own.n + own.column + (tid & 3) * 4), across(p.qs.img_w), line(tid >> 2),
        step(threads >> 2), part(tid & 3), row(own.columns * 4 + y - own.row), column(p.ks.win_h - own.column + x) {}
  /// Whether the copies are whole chunks, and not more than the threads make.
  static bool fits(const Side& s, int keys) {
    const Terms all(s, 0, (keys - 1) / s.pitch);
    return all.n % 4 == 0 && all.columns <= 4 * EACH && (REL == kRow64 || all.chunks + 1 <= STRIDE / 4);
  }
  DEV void fetch(float* to) {
    for (int r = line; r < kStep; r += step, at.next()) {
      const bool there = at.inside();
      const float* f = from + (int64_t)(there ? at.y * across + at.x : 0) * own.n;
      float* t = to + r * STRIDE + part * 4;
      UNROLL for (int i = 0; i < EACH; i++) if (part + 4 * i < own.columns) cp16z(t + 16 * i, f + 16 * i, there ? 16 : 0);
      if (REL == kRow16 && part < own.chunks - own.columns) cp16z(t + own.columns * 4, f - own.column + own.row, there ? 16 : 0);
    }
  }
};

/// From logits and dP to weights and dS, of a thread's keys by the 64 queries of a step. `values`: see QueryValues.
template <int REL> DEV void key_weights(float (&s)[8][4], float (&ds)[8][4], const float* values, const float* terms,
                                        const KeyTerms<REL>& own, float scale, int t2) {
  constexpr int STRIDE = kTermStride<REL>;
  const float *row = terms + t2 * STRIDE + own.row, *column = terms + t2 * STRIDE + own.column;
  UNROLL for (int n = 0; n < 8; n++) {
    const float4 v = *(const float4*)(values + (n * 8 + t2) * 2);
    UNROLL for (int e = 0; e < 2; e++) {
      const int at = (n * 8 + e) * STRIDE;
      const float d = e ? v.w : v.y, l = (e ? v.z : v.x) - (REL == kRow16 ? row[at] : 0.f);
      UNROLL for (int h = 0; h < 2; h++) {
        const float weight = ex2((REL > 0 ? s[n][2 * h + e] * scale + column[at + 8 * h] : s[n][2 * h + e] * scale) - l);
        s[n][2 * h + e] = weight;
        ds[n][2 * h + e] = weight * (ds[n][2 * h + e] - d);
      }
    }
  }
}

/// Nothing of what lies above the diagonal: keys behind the query.
DEV void causal_keys(float (&s)[8][4], float (&ds)[8][4], int key, int query) {
  UNROLL for (int n = 0; n < 8; n++) UNROLL for (int e = 0; e < 4; e++)
    if (key + (e >> 1) * 8 > query + n * 8 + (e & 1)) s[n][e] = ds[n][e] = 0.f;
}

/// `REL`: kNone, or kRow16 or kRow64 for rows of so many tokens: the keys of a warp, or of a warpgroup, are then in one window
/// row.
template <class T, int DP, int REL> __global__ void __launch_bounds__(256, 1) dkv_wgmma(const Problem p) {
  using Tokens = Tile<T, DP>;
  constexpr bool WAIT = DP > 64 && REL == kRow64;  // no registers for left operands beside the making of weights
  DYN_SMEM(sm);
  // the shuffle tells the compiler that a warp has one number
  const int tid = threadIdx.x, threads = blockDim.x, lane = tid & 31, warp = __shfl_sync(~0u, tid >> 5, 0), group = warp >> 2, keys = threads >> 1;
  const KeysLayout<T, DP, REL> at(threads >> 7);
  const Tokens sk = {sm, keys}, sv = {sm + at.v, keys};
  const Ring<T, DP> ring = {sm + at.stage};  // of queries and dO
  const Place w = place_of(p);
  const int block = w.tile * keys, first = block + warp * 16, t2 = (lane & 3) * 2;
  const int below = p.qs.img_h - w.wy * p.qs.win_h, queries = (below < p.qs.win_h ? below : p.qs.win_h) * p.qs.pitch;
  const int start = p.causal ? block / kStep : 0, steps = (queries + kStep - 1) / kStep;
  const int low = block / p.ks.pitch, high = (block + keys - 1) / p.ks.pitch;
  // Rows of spare columns compute something that nobody reads; their places are kept in range.
  const int y = first / p.ks.pitch, x = first - y * p.ks.pitch + (lane >> 2), mine = y < p.ks.win_h ? y : low;
  KeyTerms<REL> terms(p, w, low, high < p.ks.win_h ? high : p.ks.win_h - 1, mine, x, start * kStep, tid, threads);
  QueryValues<REL> value(p, w, start * kStep, mine, tid);
  PairFeed<T, DP> feed(p.q, p.go, p.qs, w, start * kStep, tid, threads);
  auto values_of = [&](int j) { return (float*)(sm + at.values) + j % kStages * at.of_step; };
  auto terms_of = [&](int j) { return (float*)(sm + at.terms) + j % kStages * kStep * kTermStride<REL>; };
  auto fetch = [&](int j) {
    if (j < steps) {
      feed.template step<false>(ring, j);
      value.fetch();
      if (REL != kNone) terms.fetch(terms_of(j));
    }
    cp_commit();
  };
  const float scale = (float)p.scale * kLog2e;
  float s[32], ds[32], dk[DP / 2], dv[DP / 2];
  uint32_t a[4][4], b[4][4];
  auto logits = [&](int j) {
    multiply_rows<T, 64>(s, sk, group * 64, ring.one(j), 0);
    multiply_rows<T, 64>(ds, sv, group * 64, ring.two(j), 0);
    wgmma_commit();
  };
  auto weights = [&](int j) {
    key_weights<REL>(eights(s), eights(ds), values_of(j) + (REL == kRow64 ? group * 2 * kStep : 0), terms_of(j), terms, scale, t2);
    if (REL == kNone && p.causal && first + 15 > j * kStep) causal_keys(eights(s), eights(ds), first + (lane >> 2), j * kStep + t2);
  };
  auto gradients = [&](int j) {
    multiply_depth<T, kStep>(dv, a, ring.two(j), 0, true);
    multiply_depth<T, kStep>(dk, b, ring.one(j), 0, true);
    wgmma_commit();
  };
  clear(eights(dk));
  clear(eights(dv));
  if (start < steps) {
    load_tiles(sk, sv, 0, p.k, p.v, p.ks, w, block, keys, tid, threads);
    fetch(start);
    value.put(values_of(start));
    fetch(start + 1);
    cp_wait<1>();
    proxy_fence();
    __syncthreads();
    wgmma_fence(s, ds);
    logits(start);
    wgmma_wait<0>(s, ds);
    weights(start);
    for (int j = start; j + 1 < steps; j++) {
      as_operands<T>(a, eights(s));
      as_operands<T>(b, eights(ds));
      value.put(values_of(j + 1));
      cp_wait<0>();
      proxy_fence();
      __syncthreads();
      fetch(j + 2);  // where step j - 1 was, which all have done with
      wgmma_fence(s, ds, dk, dv);
      logits(j + 1);
      gradients(j);
      if (WAIT) wgmma_wait<0>(s, ds, dk, dv);
      else wgmma_wait<1>(s, ds);
      weights(j + 1);
      if (!WAIT) wgmma_wait<0>(dk, dv);
    }
    as_operands<T>(a, eights(s));
    as_operands<T>(b, eights(ds));
    wgmma_fence(dk, dv);
    gradients(steps - 1);
    wgmma_wait<0>(dk, dv);
  }
  int ky[2], kx[2];
  UNROLL for (int h = 0; h < 2; h++) {
    const int r = first + (lane >> 2) + h * 8;
    ky[h] = r / p.ks.pitch;
    kx[h] = r - ky[h] * p.ks.pitch;
  }
  keys_out<T, DP, REL != kNone>(eights(dk), eights(dv), p, w, ky, kx, w.tile * (threads >> 5) + warp, lane);
}

}  // namespace attention
}  // namespace smalti
