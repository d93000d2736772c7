// Gradient of the queries for bf16 and f16, and of their relative terms: a warp owns 16 queries and meets all keys.
//   P = exp(logits - lse), dS = P * (dO V^T - delta), dQ = scale dS K + D1 Rh + D2 Rw,
// where D1 and D2 are the sums of dS over the columns and the rows of the window (ViTDet, section 3.2 of its
// appendix; the tables' own gradients are made from D1 and D2 in table.cuh).
#pragma once
#include "tile.cuh"

namespace smalti {
namespace attention {

template <int DP, int NT, int REL> struct DqLayout {
  static constexpr int LD = kLd<DP>;
  int q, go, stage, table_h, table_w, terms, sums, stride, bytes;
  HOST_DEV DqLayout(const Side& s, int warps) {
    q = 0;
    go = q + warps * 16 * LD * 2;
    stage = go + warps * 16 * LD * 2;
    const int stages = 2 * 2 * NT * 8 * LD * 2, th = REL == kNone ? 0 : (2 * s.win_h - 1) * LD * 2, tw = REL == kNone ? 0 : (2 * s.win_w - 1) * LD * 2;
    const bool borrow = REL == kShared || REL == kRow64;
    table_h = borrow ? stage : stage + stages;
    table_w = table_h + th;
    terms = borrow ? stage + (stages > th + tw ? stages : th + tw) : table_w + tw;
    stride = (REL == kNone ? 0 : REL == kShared ? s.win_h + s.win_w : s.win_h > s.win_w ? s.win_h : s.win_w) | 1;
    sums = terms + (REL == kNone ? 0 : warps * 16 * stride * 4);
    bytes = sums + (REL == kNone ? 0 : warps * 16 * stride * 4);
  }
};

/// Copies a warp's `extent` values a row to memory, for the queries inside the image.
DEV void terms_out(void* to, int offset, int extent, const float* scratch, int stride, const Problem& p, const Place& w, int first, int lane) {
  const int64_t n = p.ks.win_h + p.ks.win_w;
  Walk at(p.qs, w, first, 1);
  for (int i = 0; i < 16; i++, at.next()) {
    if (!at.inside()) continue;
    float* row = (float*)to + query_index(p, w, at.y, at.x) * n + offset;
    for (int k = lane; k < extent; k += 32) row[k] = scratch[i * stride + k];
  }
}

/// Copies a warp's values by window rows and by columns to memory, for queries that are all in one window row: there these
/// values are one run. Both extents are even.
DEV void terms_out(void* to, const float* rows, const float* columns, int stride, const Problem& p, const Place& w, int first, int lane) {
  const Walk at(p.qs, w, first, 1);
  const int n = p.ks.win_h + p.ks.win_w, pairs = n / 2, there = at.y < at.in_h ? (at.in_w - at.x < 16 ? at.in_w - at.x : 16) : 0;
  float2* run = (float2*)((float*)to + (there > 0 ? query_index(p, w, at.y, at.x) * n : 0));
  int q = lane / pairs, k = lane - q * pairs;
  const int over = 32 / pairs, on = 32 - over * pairs;
  for (int i = lane; i < there * pairs; i += 32) {
    const float* from = k * 2 < p.ks.win_h ? rows + q * stride + k * 2 : columns + q * stride + k * 2 - p.ks.win_h;
    run[i] = {from[0], from[1]};
    q += over;
    k += on;
    if (k >= pairs) { k -= pairs; q++; }
  }
}

/// The relative terms of a warp's 16 queries and the sums of dS that are their gradients: by window rows in shared memory, and
/// so are those by columns if REL is kShared; else these are in registers. `RUN`: the queries are all in one window row, and
/// both extents are even.
template <class T, int DP, int REL, bool RUN> struct QueryTerms {
  static constexpr int CW = REL > 0 ? REL : 1;
  float *terms, *sums;  // [16][stride] each
  int stride;
  float column[2][2 * CW], column_sum[2][2 * CW];
  DEV QueryTerms(float* terms, float* sums, int stride) : terms(terms), sums(sums), stride(stride) {
    UNROLL for (int h = 0; h < 2; h++) UNROLL for (int c = 0; c < 2 * CW; c++) column[h][c] = column_sum[h][c] = 0.f;
  }
  /// From the queries, also to memory.
  DEV void start(const uint32_t (&q)[DP / 16][4], const T* table_h, const T* table_w, const Problem& p, const Place& w, int first, int lane) {
    const Span sy = span_of(p.qs, first, 0, lane), sx = span_of(p.qs, first, 1, lane);
    float* columns = REL == kShared ? terms + p.ks.win_h : RUN ? sums : terms;
    relative_terms<T, DP>(q, table_w, sx, p.ks.win_w, columns, stride, kLog2e, lane);
    __syncwarp();
    if (!RUN) terms_out(p.rel, p.ks.win_h, p.ks.win_w, columns, stride, p, w, first, lane);
    UNROLL for (int h = 0; h < 2; h++) UNROLL for (int c = 0; c < 2 * CW; c++) {
      const int x = (c >> 1) * 8 + (lane & 3) * 2 + (c & 1);
      column[h][c] = REL > 0 && x < p.ks.win_w ? columns[((lane >> 2) + h * 8) * stride + x] : -INFINITY;
    }
    if (!RUN) __syncwarp();
    relative_terms<T, DP>(q, table_h, sy, p.ks.win_h, terms, stride, kLog2e, lane);
    if (REL == kShared) for (int i = lane; i < 16 * stride; i += 32) sums[i] = 0.f;
    __syncwarp();
    if (RUN) terms_out(p.rel, terms, columns, stride, p, w, first, lane);
    else terms_out(p.rel, 0, p.ks.win_h, terms, stride, p, w, first, lane);
    if (RUN) __syncwarp();
  }
  /// The sums to memory, and what they give to the queries' gradients.
  DEV void finish(float (&dq)[DP / 8][4], const T* table_h, const T* table_w, const Problem& p, const Place& w, int first, int lane) {
    const Span sy = span_of(p.qs, first, 0, lane), sx = span_of(p.qs, first, 1, lane);
    float* columns = REL == kShared ? sums + p.ks.win_h : terms;
    __syncwarp();
    if (REL > 0) UNROLL for (int h = 0; h < 2; h++) UNROLL for (int c = 0; c < 2 * CW; c++) {
      const int x = (c >> 1) * 8 + (lane & 3) * 2 + (c & 1);
      if (x < p.ks.win_w) terms[((lane >> 2) + h * 8) * stride + x] = column_sum[h][c];
    }
    __syncwarp();
    if (RUN) {
      terms_out(p.drel, sums, columns, stride, p, w, first, lane);
    } else {
      terms_out(p.drel, 0, p.ks.win_h, sums, stride, p, w, first, lane);
      terms_out(p.drel, p.ks.win_h, p.ks.win_w, columns, stride, p, w, first, lane);
    }
    relative_back<T, DP>(dq, table_h, sy, p.ks.win_h, sums, stride, lane);
    relative_back<T, DP>(dq, table_w, sx, p.ks.win_w, columns, stride, lane);
  }
};

/// Gradients of a warp's 16 queries to memory.
template <class T, int DP> DEV void queries_out(const float (&dq)[DP / 8][4], const Problem& p, const Place& w, int first, int lane) {
  UNROLL for (int h = 0; h < 2; h++) {
    const int r = first + (lane >> 2) + h * 8, y = r / p.qs.pitch, x = r - y * p.qs.pitch;
    if (!inside(p.qs, w, y, x)) continue;
    T* out = row_at<T>(p.dq, p.qs, w, y, x);
    UNROLL for (int d = 0; d < DP / 8; d++) store_pair(out, d * 8 + (lane & 3) * 2, p.dq.n, p.pairs, dq[d][2 * h], dq[d][2 * h + 1]);
  }
}

template <class T, int DP, int NT, int REL, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) dq_mma(const Problem p) {
  constexpr int LD = kLd<DP>, CW = QueryTerms<T, DP, REL, false>::CW, STAGE = NT * 8 * LD;
  constexpr bool KEEP = DP <= 64, KEEP_Q = KEEP || (REL != kNone && DP <= 80), BORROW = REL == kShared || REL == kRow64;
  DYN_SMEM(sm);
  const int tid = threadIdx.x, threads = blockDim.x, lane = tid & 31, warp = tid >> 5, warps = threads >> 5;
  const int g = lane >> 2, t2 = (lane & 3) * 2;
  const DqLayout<DP, NT, REL> at(p.ks, warps);
  const T *sq = (T*)(sm + at.q) + warp * 16 * LD, *sgo = (T*)(sm + at.go) + warp * 16 * LD;
  T* stage = (T*)(sm + at.stage);
  const Place w = place_of(p);
  const int block = w.tile * warps * 16, first = block + warp * 16;
  int end = p.ks.rows() / 8;
  if (p.causal) {
    const int seen = (block + warps * 16 + 7) / 8;
    end = seen < end ? seen : end;
  }
  const int steps = (end + NT - 1) / NT;
  auto fetch = [&](int j) {
    T* to = stage + (j & 1) * 2 * STAGE;
    if constexpr (DP > 80) {
      load_each<T, DP>(to, LD, p, p.k, p.ks, w, j * NT * 8, NT * 8, tid, threads);
      load_each<T, DP>(to + STAGE, LD, p, p.v, p.ks, w, j * NT * 8, NT * 8, tid, threads);
    } else {
      load_pair<T, DP>(to, STAGE, LD, p, p.k, p.v, p.ks, w, j * NT * 8, NT * 8, tid, threads);
    }
  };
  auto tables = [&]() {
    load_table<T, DP>((T*)(sm + at.table_h), LD, p, p.rel_h, 2 * p.ks.win_h - 1, p.q.n, tid, threads);
    load_table<T, DP>((T*)(sm + at.table_w), LD, p, p.rel_w, 2 * p.ks.win_w - 1, p.q.n, tid, threads);
  };
  load_pair<T, DP>((T*)(sm + at.q), warps * 16 * LD, LD, p, p.q, p.go, p.qs, w, block, warps * 16, tid, threads);
  if (REL != kNone) tables();
  if (!BORROW) fetch(0);
  cp_commit();
  cp_wait<0>();
  __syncthreads();

  bool active = false;
  for (int r = first; r < first + 16; r += 8) active = active || (r < p.qs.rows() && inside(p.qs, w, r / p.qs.pitch, 0));
  float *terms = (float*)(sm + at.terms) + warp * 16 * at.stride, *sums = (float*)(sm + at.sums) + warp * 16 * at.stride;
  QueryTerms<T, DP, REL, false> rel(terms, sums, at.stride);
  uint32_t q[KEEP || REL != kNone ? DP / 16 : 1][4], go[KEEP ? DP / 16 : 1][4];
  if (active) {
    if (KEEP || REL != kNone) UNROLL for (int k = 0; k < DP / 16; k++) load_a(q[KEEP || REL != kNone ? k : 0], sq, LD, k * 16, lane);
    if (KEEP) UNROLL for (int k = 0; k < DP / 16; k++) load_a(go[KEEP ? k : 0], sgo, LD, k * 16, lane);
    if constexpr (REL != kNone) rel.start(q, (const T*)(sm + at.table_h), (const T*)(sm + at.table_w), p, w, first, lane);
  }
  if (BORROW) {
    __syncthreads();
    fetch(0);
    cp_commit();
  }

  // Rows outside the image have weight zero everywhere.
  float lse[2], delta[2];
  UNROLL for (int h = 0; h < 2; h++) {
    const int r = first + g + h * 8, y = r / p.qs.pitch, x = r - y * p.qs.pitch;
    const bool in = inside(p.qs, w, y, x);
    const int64_t i = in ? query_index(p, w, y, x) : 0;
    lse[h] = in ? ((const float*)p.lse)[i] * kLog2e : INFINITY;
    delta[h] = in ? ((const float*)p.delta)[i] : 0.f;
  }
  const float scale = (float)p.scale * kLog2e;
  const int solid = solid_keys(p.ks);
  float dq[DP / 8][4];
  clear(dq);
  for (int j = 0; j < steps; j++) {
    if (j + 1 < steps) fetch(j + 1);
    cp_commit();
    cp_wait<1>();
    __syncthreads();
    const T *sk = stage + (j & 1) * 2 * STAGE, *sv = sk + STAGE;
    const int pairs = active ? (end - j * NT + 1) / 2 : 0;
    Cursor c;
    c.start(p.ks, j * NT * 8);
    float line[2] = {0.f, 0.f};  // sum of dS over the window row so far
    UNROLL for (int n = 0; n < NT; n += 2) if (n / 2 < pairs) {
      float s[2][4], ds[2][4];
      clear(s);
      clear(ds);
      UNROLL for (int k = 0; k < DP / 16; k++) {
        uint32_t b[4], qa[4], ga[4];
        if (!KEEP_Q) load_a(qa, sq, LD, k * 16, lane);
        if (!KEEP) load_a(ga, sgo, LD, k * 16, lane);
        UNROLL for (int e = 0; e < 4; e++) { if (KEEP_Q) qa[e] = q[KEEP_Q ? k : 0][e]; if (KEEP) ga[e] = go[KEEP ? k : 0][e]; }
        load_b(b, sk + n * 8 * LD, LD, k * 16, lane);
        mma(T{}, s[0], qa, b[0], b[1]);
        mma(T{}, s[1], qa, b[2], b[3]);
        load_b(b, sv + n * 8 * LD, LD, k * 16, lane);
        mma(T{}, ds[0], ga, b[0], b[1]);
        mma(T{}, ds[1], ga, b[2], b[3]);
      }
      UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) s[i][e] *= scale;
      if (REL == kNone) {
        const int key = (j * NT + n) * 8;
        if (key + 15 >= solid || (p.causal && key + 15 > first)) mask_keys(s, p, key, first + g, lane);
      }
      UNROLL for (int i = 0; i < 2; i++) {
        const bool row = c.y < p.ks.win_h;
        UNROLL for (int h = 0; h < 2; h++) {
          float* mine = terms + (g + h * 8) * at.stride;
          const float rh = REL != kNone && row ? mine[c.y] : 0.f;
          UNROLL for (int e = 0; e < 2; e++) {
            const int kx = c.x + t2 + e;
            float x = s[i][2 * h + e];
            if (REL > 0) x = row ? x + rh + rel.column[h][((n + i) % CW) * 2 + e] : -INFINITY;
            else if (REL == kShared) x = row && kx < p.ks.win_w ? x + rh + mine[p.ks.win_h + kx] : -INFINITY;
            const float d = ex2(x - lse[h]) * (ds[i][2 * h + e] - delta[h]);
            ds[i][2 * h + e] = d;
            if (REL > 0) rel.column_sum[h][((n + i) % CW) * 2 + e] += d;
            if (REL == kShared && row && kx < p.ks.win_w) sums[(g + h * 8) * at.stride + p.ks.win_h + kx] += d;
            if (REL != kNone) line[h] += d;
          }
        }
        // The window row ends: lane 0 of each quad keeps its sum.
        if (REL == kShared || (REL > 0 && (n + i) % CW == CW - 1)) {
          UNROLL for (int h = 0; h < 2; h++) {
            const float total = quad_sum(line[h]);
            float& to = sums[(g + h * 8) * at.stride + c.y];
            if (t2 == 0 && row) to = REL == kShared ? to + total : total;
            line[h] = 0.f;
          }
        }
        c.next(p.ks);
      }
      uint32_t a[4];
      as_a<T>(a, ds[0], ds[1]);
      UNROLL for (int d = 0; d < DP / 8; d += 2) {
        uint32_t b[4];
        load_bt(b, sk + n * 8 * LD, LD, d * 8, lane);
        mma(T{}, dq[d], a, b[0], b[1]);
        mma(T{}, dq[d + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();
  }
  if (BORROW) {
    tables();
    cp_commit();
    cp_wait<0>();
    __syncthreads();
  }
  if (!active) return;
  UNROLL for (int d = 0; d < DP / 8; d++) UNROLL for (int e = 0; e < 4; e++) dq[d][e] *= (float)p.scale;
  if constexpr (REL != kNone) rel.finish(dq, (const T*)(sm + at.table_h), (const T*)(sm + at.table_w), p, w, first, lane);
  queries_out<T, DP>(dq, p, w, first, lane);
}

}  // namespace attention
}  // namespace smalti
