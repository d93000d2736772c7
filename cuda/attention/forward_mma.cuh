// Forward for bf16 and f16: a warp holds MT tiles of 16 queries in registers; keys come NT tiles of 8 at a time, two
// stages in flight, and are met SUB tiles at a time, with the running maximum and sum of FlashAttention-2 (Dao,
// arXiv:2307.08691). MT = 2 halves the reads of shared memory, which bound long sequences; SUB bounds registers.
#pragma once
#include "tile.cuh"

namespace smalti {
namespace attention {

/// Shared memory of one block, in bytes from its start.
template <int DP, int MT, int NT, int REL> struct ForwardLayout {
  static constexpr int LD = kLd<DP>;
  int q, stage, table_h, table_w, scratch, stride, bytes;
  HOST_DEV ForwardLayout(const Side& s, int warps) {
    q = 0;
    stage = q + warps * MT * 16 * LD * 2;
    const int stages = 2 * 2 * NT * 8 * LD * 2, th = REL == kNone ? 0 : (2 * s.win_h - 1) * LD * 2, tw = REL == kNone ? 0 : (2 * s.win_w - 1) * LD * 2;
    // Large tables borrow the room of the key stages before the loop.
    const bool borrow = REL == kShared || REL == kRow64;
    table_h = borrow ? stage : stage + stages;
    table_w = table_h + th;
    scratch = borrow ? stage + (stages > th + tw ? stages : th + tw) : table_w + tw;
    stride = (REL == kNone ? 0 : REL == kShared ? s.win_h + s.win_w : s.win_h > s.win_w ? s.win_h : s.win_w) | 1;
    bytes = scratch + (REL == kNone ? 0 : warps * MT * 16 * stride * 4);
  }
};

template <class T, int DP, int MT, int NT, int SUB, int REL, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) forward_mma(const Problem p) {
  constexpr int LD = kLd<DP>, CW = REL > 0 ? REL : 1;
  constexpr bool KEEP_Q = DP <= 80;  // else Q is read again for each key tile
  DYN_SMEM(sm);
  const int tid = threadIdx.x, threads = blockDim.x, lane = tid & 31, warp = tid >> 5, warps = threads >> 5;
  const int g = lane >> 2, t2 = (lane & 3) * 2;
  const ForwardLayout<DP, MT, NT, REL> at(p.ks, warps);
  T *sq = (T*)(sm + at.q) + warp * MT * 16 * LD, *stage = (T*)(sm + at.stage);
  constexpr int STAGE = NT * 8 * LD;
  const Place w = place_of(p);
  const int first = (w.tile * warps + warp) * MT * 16;  // of this warp's queries
  const int key_tiles = p.ks.rows() / 8;
  int end = key_tiles;
  if (p.causal) {
    const int seen = ((w.tile + 1) * warps * MT * 16 + 7) / 8;
    end = seen < end ? seen : end;
  }
  const int steps = (end + NT - 1) / NT;
  auto fetch = [&](int j) {
    load_pair<T, DP, (DP <= 64)>(stage + (j & 1) * 2 * STAGE, STAGE, LD, p, p.k, p.v, p.ks, w, j * NT * 8, NT * 8, tid, threads);
  };
  load_rows<T, DP>((T*)(sm + at.q), LD, p, p.q, p.qs, w, w.tile * warps * MT * 16, warps * MT * 16, tid, threads);
  constexpr bool BORROW = REL == kShared || REL == kRow64;
  if (REL != kNone) {
    load_table<T, DP>((T*)(sm + at.table_h), LD, p, p.rel_h, 2 * p.ks.win_h - 1, p.q.n, tid, threads);
    load_table<T, DP>((T*)(sm + at.table_w), LD, p, p.rel_w, 2 * p.ks.win_w - 1, p.q.n, tid, threads);
  }
  if (!BORROW) fetch(0);
  cp_commit();
  cp_wait<0>();
  __syncthreads();

  // A warp whose queries are all outside the image only helps to load.
  bool active = false;
  for (int r = first; r < first + MT * 16; r += 8) active = active || (r < p.qs.rows() && inside(p.qs, w, r / p.qs.pitch, 0));
  uint32_t q[KEEP_Q ? MT : 1][DP / 16][4];
  float column[REL > 0 ? MT : 1][2][2 * CW];
  float* scratch = (float*)(sm + at.scratch) + warp * MT * 16 * at.stride;
  if (active) {
    UNROLL for (int m = 0; m < MT; m++) {
      auto& qm = q[KEEP_Q ? m : 0];
      UNROLL for (int k = 0; k < DP / 16; k++) load_a(qm[k], sq + m * 16 * LD, LD, k * 16, lane);
      if (REL == kNone) continue;
      float* mine = scratch + m * 16 * at.stride;
      const Span sy = span_of(p.qs, first + m * 16, 0, lane), sx = span_of(p.qs, first + m * 16, 1, lane);
      float* columns = REL == kShared ? mine + p.ks.win_h : mine;
      relative_terms<T, DP>(qm, (const T*)(sm + at.table_w), sx, p.ks.win_w, columns, at.stride, kLog2e, lane);
      __syncwarp();
      if (REL > 0) {
        UNROLL for (int h = 0; h < 2; h++) UNROLL for (int c = 0; c < 2 * CW; c++) {
          const int x = (c >> 1) * 8 + t2 + (c & 1);
          column[REL > 0 ? m : 0][h][c] = x < p.ks.win_w ? mine[(g + h * 8) * at.stride + x] : -INFINITY;
        }
        __syncwarp();
      }
      relative_terms<T, DP>(qm, (const T*)(sm + at.table_h), sy, p.ks.win_h, mine, at.stride, kLog2e, lane);
      __syncwarp();
    }
  }
  if (BORROW) {
    __syncthreads();
    fetch(0);
    cp_commit();
  }

  const float scale = (float)p.scale * kLog2e;
  const int solid = solid_keys(p.ks);
  float o[MT][DP / 8][4], top[MT][2], sum[MT][2];
  UNROLL for (int m = 0; m < MT; m++) {
    clear(o[m]);
    UNROLL for (int h = 0; h < 2; h++) { top[m][h] = -INFINITY; sum[m][h] = 0.f; }
  }
  for (int j = 0; j < steps; j++) {
    if (j + 1 < steps) fetch(j + 1);
    cp_commit();
    cp_wait<1>();
    __syncthreads();
    const T *sk = stage + (j & 1) * 2 * STAGE, *sv = sk + STAGE;
    Cursor c;
    c.start(p.ks, j * NT * 8);
    UNROLL for (int n0 = 0; n0 < NT; n0 += SUB) if (active && j * NT + n0 < end) {
      const int pairs = (end - j * NT - n0 + 1) / 2;
      float s[MT][SUB][4];
      UNROLL for (int m = 0; m < MT; m++) clear(s[m]);
      UNROLL for (int k = 0; k < DP / 16; k++) {
        if (!KEEP_Q) {
          uint32_t a[MT][4];
          UNROLL for (int m = 0; m < MT; m++) load_a(a[m], sq + m * 16 * LD, LD, k * 16, lane);
          UNROLL for (int n = 0; n < SUB; n += 2) if (n / 2 < pairs) {
            uint32_t b[4];
            load_b(b, sk + (n0 + n) * 8 * LD, LD, k * 16, lane);
            UNROLL for (int m = 0; m < MT; m++) { mma(T{}, s[m][n], a[m], b[0], b[1]); mma(T{}, s[m][n + 1], a[m], b[2], b[3]); }
          }
        } else {
          UNROLL for (int n = 0; n < SUB; n += 2) if (n / 2 < pairs) {
            uint32_t b[4];
            load_b(b, sk + (n0 + n) * 8 * LD, LD, k * 16, lane);
            UNROLL for (int m = 0; m < MT; m++) {
              mma(T{}, s[m][n], q[KEEP_Q ? m : 0][k], b[0], b[1]);
              mma(T{}, s[m][n + 1], q[KEEP_Q ? m : 0][k], b[2], b[3]);
            }
          }
        }
      }
      // Logits in units of log2: scale, relative terms, masks.
      UNROLL for (int m = 0; m < MT; m++) UNROLL for (int n = 0; n < SUB; n++) UNROLL for (int e = 0; e < 4; e++) s[m][n][e] *= scale;
      if (REL == kNone) {
        const int key = (j * NT + n0) * 8, last = key + SUB * 8 - 1;
        if (last >= solid || (p.causal && last > first)) UNROLL for (int m = 0; m < MT; m++) mask_keys(s[m], p, key, first + m * 16 + g, lane);
      } else UNROLL for (int n = 0; n < SUB; n++) {
        const bool row = c.y < p.ks.win_h;
        UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++) {
          float* mine = scratch + (m * 16 + g + h * 8) * at.stride;
          const float rh = row ? mine[c.y] : 0.f;
          UNROLL for (int e = 0; e < 2; e++) {
            float& x = s[m][n][2 * h + e];
            const int kx = c.x + t2 + e;
            if (REL > 0) x = row ? x + rh + column[REL > 0 ? m : 0][h][((n0 + n) % CW) * 2 + e] : -INFINITY;
            else x = row && kx < p.ks.win_w ? x + rh + mine[p.ks.win_h + kx] : -INFINITY;
          }
        }
        c.next(p.ks);
      }
      UNROLL for (int m = 0; m < MT; m++) {
        float keep[2];
        UNROLL for (int h = 0; h < 2; h++) {
          float now = top[m][h];
          UNROLL for (int n = 0; n < SUB; n++) { now = fmaxf(now, s[m][n][2 * h]); now = fmaxf(now, s[m][n][2 * h + 1]); }
          now = quad_max(now);
          keep[h] = ex2(top[m][h] - now);
          top[m][h] = now;
          sum[m][h] *= keep[h];
        }
        UNROLL for (int d = 0; d < DP / 8; d++) UNROLL for (int e = 0; e < 4; e++) o[m][d][e] *= keep[e >> 1];
        UNROLL for (int n = 0; n < SUB; n++) UNROLL for (int e = 0; e < 4; e++) {
          s[m][n][e] = ex2(s[m][n][e] - top[m][e >> 1]);
          sum[m][e >> 1] += s[m][n][e];
        }
      }
      UNROLL for (int n = 0; n < SUB; n += 2) if (n / 2 < pairs) {
        uint32_t a[MT][4];
        UNROLL for (int m = 0; m < MT; m++) as_a<T>(a[m], s[m][n], s[m][n + 1]);
        UNROLL for (int d = 0; d < DP / 8; d += 2) {
          uint32_t b[4];
          load_bt(b, sv + (n0 + n) * 8 * LD, LD, d * 8, lane);
          UNROLL for (int m = 0; m < MT; m++) { mma(T{}, o[m][d], a[m], b[0], b[1]); mma(T{}, o[m][d + 1], a[m], b[2], b[3]); }
        }
      }
    }
    __syncthreads();
  }
  if (!active) return;
  UNROLL for (int m = 0; m < MT; m++) UNROLL for (int h = 0; h < 2; h++) {
    const int r = first + m * 16 + g + h * 8, y = r / p.qs.pitch, x = r - y * p.qs.pitch;
    const float total = quad_sum(sum[m][h]), inverse = 1.f / total;
    if (!inside(p.qs, w, y, x)) continue;
    T* out = row_at<T>(p.o, p.qs, w, y, x);
    UNROLL for (int d = 0; d < DP / 8; d++) store_pair(out, d * 8 + t2, p.o.n, p.pairs, o[m][d][2 * h] * inverse, o[m][d][2 * h + 1] * inverse);
    if (t2 == 0) ((float*)p.lse)[query_index(p, w, y, x)] = (top[m][h] + log2f(total)) * kLn2;
  }
}

}  // namespace attention
}  // namespace smalti
