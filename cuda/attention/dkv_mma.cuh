// Gradients of keys and values for bf16 and f16: a warp owns 16 keys, holds both gradients in registers and meets
// all queries, so nothing is added across blocks: dV = P^T dO, dK = scale dS^T Q. Relative terms come from the pass over queries.
#pragma once
#include "tile.cuh"

namespace smalti {
namespace attention {

constexpr int kQueries = 32;  // of one step

/// What a block reads of a query's relative terms [win_h + win_w]: those of all columns, then those of the window rows that
/// its keys are in, both widened to whole chunks of four.
struct Terms {
  int n, column, columns, row, chunks;  // terms; first of the columns, chunks of them; first of the rows; chunks of both
  HOST_DEV Terms(const Side& s, int low, int high)
      : n(s.win_h + s.win_w), column(s.win_h & ~3), columns((n - column + 3) / 4), row(low & ~3), chunks(columns + high / 4 - low / 4 + 1) {}
  /// Every fourth chunk from `part` on; zeros where there is no query.
  DEV void copy(float* to, const float* from, bool there, int part) const {
    const bool wide = (((uintptr_t)from | (uintptr_t)n * 4) & 15) == 0;
    for (int c = part; c < chunks; c += 4) {
      const int i = c < columns ? column + c * 4 : row + (c - columns) * 4;
      if (there && wide) {
        cp16(to + c * 4, from + i);
      } else {
        UNROLL for (int e = 0; e < 4; e++) to[c * 4 + e] = there && i + e < n ? from[i + e] : 0.f;
      }
    }
  }
};

/// Row stride of relative terms for blocks of so many keys: 4 mod 16, so that the quads of a warp read different banks.
HOST_DEV int term_stride(const Side& s, int keys, bool relative) {
  const int rows = (keys - 2) / s.pitch + 2, most = rows < s.win_h ? rows : s.win_h;  // not aligned: one chunk more
  const int n = 4 * (Terms(s, 0, most - 1).chunks + 1);
  return relative ? (n + 11) / 16 * 16 + 4 : 0;
}

template <int DP> struct DkvLayout {
  static constexpr int LD = kLd<DP>;
  int k, v, stage, rows, terms, stride, bytes;
  HOST_DEV DkvLayout(const Side& s, int warps, bool relative) {
    k = 0;
    v = k + warps * 16 * LD * 2;
    stage = v + warps * 16 * LD * 2;
    rows = stage + 2 * 2 * kQueries * LD * 2;
    terms = rows + 2 * 2 * kQueries * 4;
    stride = term_stride(s, warps * 16, relative);
    bytes = terms + 2 * kQueries * stride * 4;
  }
};

/// Which of the windows with padding this one is; their number when asked for the end.
HOST_DEV int border_windows(const Side& s, int ny, int nx) {
  const int right = s.img_w % s.win_w ? ny : 0, bottom = s.img_h % s.win_h ? nx : 0;
  return right + bottom - (right && bottom ? 1 : 0);
}
DEV int border_index(const Problem& p, const Place& w) {
  const bool right = p.ks.img_w % p.ks.win_w && w.wx == p.windows_x - 1, bottom = p.ks.img_h % p.ks.win_h && w.wy == p.windows_y - 1;
  return bottom ? w.wx : right ? (p.ks.img_h % p.ks.win_h ? p.windows_x : 0) + w.wy : -1;
}
/// Where a block's sums over padding go: [2, D] for slot `slot`.
template <class A> DEV A* pad_sums(const Problem& p, const Place& w, int border, int slot) {
  const int64_t window = (int64_t)w.b * border_windows(p.ks, p.windows_y, p.windows_x) + border;
  return (A*)p.pad_part + ((window * p.heads + w.h) * p.pad_slots + slot) * 2 * p.k.n;
}

/// Both gradients of a warp's 16 keys to memory, dk without the scale; `slot`: for its sum over padding, which is keys in the
/// window and outside the image.
template <class T, int DP, bool REL> DEV void keys_out(float (&dk)[DP / 8][4], float (&dv)[DP / 8][4], const Problem& p, const Place& w,
                                                       const int (&ky)[2], const int (&kx)[2], int slot, int lane) {
  const int g = lane >> 2, t2 = (lane & 3) * 2;
  UNROLL for (int d = 0; d < DP / 8; d++) UNROLL for (int e = 0; e < 4; e++) dk[d][e] *= (float)p.scale;
  UNROLL for (int h = 0; h < 2; h++) {
    if (!inside(p.ks, w, ky[h], kx[h])) continue;
    T *to_k = row_at<T>(p.dk, p.ks, w, ky[h], kx[h]), *to_v = row_at<T>(p.dv, p.ks, w, ky[h], kx[h]);
    UNROLL for (int d = 0; d < DP / 8; d++) {
      store_pair(to_k, d * 8 + t2, p.dk.n, p.pairs, dk[d][2 * h], dk[d][2 * h + 1]);
      store_pair(to_v, d * 8 + t2, p.dv.n, p.pairs, dv[d][2 * h], dv[d][2 * h + 1]);
    }
  }
  if (!REL && !p.pad_part) return;
  const int border = p.pad_part ? border_index(p, w) : -1;
  if (border < 0) return;
  bool pad[2];
  UNROLL for (int h = 0; h < 2; h++) pad[h] = ky[h] < p.ks.win_h && kx[h] < p.ks.win_w && !inside(p.ks, w, ky[h], kx[h]);
  float* sums = pad_sums<float>(p, w, border, slot);
  UNROLL for (int d = 0; d < DP / 8; d++) UNROLL for (int e = 0; e < 2; e++) {
    float a = (pad[0] ? dk[d][e] : 0.f) + (pad[1] ? dk[d][2 + e] : 0.f), b = (pad[0] ? dv[d][e] : 0.f) + (pad[1] ? dv[d][2 + e] : 0.f);
    for (int m = 4; m < 32; m <<= 1) { a += __shfl_xor_sync(~0u, a, m); b += __shfl_xor_sync(~0u, b, m); }
    const int c = d * 8 + t2 + e;
    if (g == 0 && c < p.k.n) { sums[c] = a; sums[p.k.n + c] = b; }
  }
}

template <class T, int DP, bool REL, int THREADS, int BLOCKS>
__global__ void __launch_bounds__(THREADS, BLOCKS) dkv_mma(const Problem p) {
  constexpr int LD = kLd<DP>, STAGE = kQueries * LD;
  constexpr bool KEEP = DP <= 64;
  DYN_SMEM(sm);
  const int tid = threadIdx.x, threads = blockDim.x, lane = tid & 31, warp = tid >> 5, warps = threads >> 5;
  const int g = lane >> 2, t2 = (lane & 3) * 2;
  const DkvLayout<DP> at(p.ks, warps, REL);
  const T *sk = (T*)(sm + at.k) + warp * 16 * LD, *sv = (T*)(sm + at.v) + warp * 16 * LD;
  T* stage = (T*)(sm + at.stage);
  float *rows = (float*)(sm + at.rows), *terms = (float*)(sm + at.terms);
  const Place w = place_of(p);
  const int block = w.tile * warps * 16, first = block + warp * 16;
  const int low = block / p.ks.pitch, high = (block + warps * 16 - 1) / p.ks.pitch;
  const Terms own(p.ks, low, high < p.ks.win_h ? high : p.ks.win_h - 1);
  const int below = p.qs.img_h - w.wy * p.qs.win_h, queries = (below < p.qs.win_h ? below : p.qs.win_h) * p.qs.pitch;
  const int start = p.causal ? block / kQueries : 0, steps = (queries + kQueries - 1) / kQueries;
  auto fetch = [&](int j) {
    const int s = j & 1;
    load_pair<T, DP>(stage + s * 2 * STAGE, STAGE, LD, p, p.q, p.go, p.qs, w, j * kQueries, kQueries, tid, threads);
    // with relative terms, four threads a query
    ROLLED for (int r = REL ? tid >> 2 : tid; r < kQueries; r += REL ? threads >> 2 : threads) {
      const int q = j * kQueries + r, y = q / p.qs.pitch, x = q - y * p.qs.pitch;
      const bool in = inside(p.qs, w, y, x);
      const int64_t i = in ? query_index(p, w, y, x) : 0;
      if (!REL || (tid & 3) == 0) {
        rows[(s * 2) * kQueries + r] = in ? ((const float*)p.lse)[i] * kLog2e : INFINITY;
        rows[(s * 2 + 1) * kQueries + r] = in ? ((const float*)p.delta)[i] : 0.f;
      }
      if (REL) own.copy(terms + (s * kQueries + r) * at.stride, (const float*)p.rel + i * own.n, in, tid & 3);
    }
  };
  load_pair<T, DP>((T*)(sm + at.k), warps * 16 * LD, LD, p, p.k, p.v, p.ks, w, block, warps * 16, tid, threads);
  if (start < steps) fetch(start);
  cp_commit();
  cp_wait<0>();
  __syncthreads();

  const bool active = first < p.ks.rows();
  uint32_t k[KEEP ? DP / 16 : 1][4], v[KEEP ? DP / 16 : 1][4];
  if (KEEP && active) UNROLL for (int i = 0; i < DP / 16; i++) {
    load_a(k[KEEP ? i : 0], sk, LD, i * 16, lane);
    load_a(v[KEEP ? i : 0], sv, LD, i * 16, lane);
  }
  // Rows of spare columns compute something that nobody reads; their places are kept in range.
  int ky[2], kx[2];
  UNROLL for (int h = 0; h < 2; h++) {
    const int r = first + g + h * 8;
    ky[h] = r / p.ks.pitch;
    kx[h] = r - ky[h] * p.ks.pitch;
  }
  const float scale = (float)p.scale * kLog2e;
  float dk[DP / 8][4], dv[DP / 8][4];
  clear(dk);
  clear(dv);
  for (int j = start; j < steps; j++) {
    if (j + 1 < steps) fetch(j + 1);
    cp_commit();
    cp_wait<1>();
    __syncthreads();
    const T *sq = stage + (j & 1) * 2 * STAGE, *sgo = sq + STAGE;
    const float *lse = rows + (j & 1) * 2 * kQueries, *delta = lse + kQueries, *term = terms + (j & 1) * kQueries * at.stride;
    const int left = queries - j * kQueries;
    UNROLL for (int m = 0; m < kQueries; m += 16) if (active && m < left) {
      float s[2][4], ds[2][4];
      clear(s);
      clear(ds);
      UNROLL for (int i = 0; i < DP / 16; i++) {
        uint32_t b[4], ka[4], va[4];
        if (!KEEP) { load_a(ka, sk, LD, i * 16, lane); load_a(va, sv, LD, i * 16, lane); }
        else UNROLL for (int e = 0; e < 4; e++) { ka[e] = k[KEEP ? i : 0][e]; va[e] = v[KEEP ? i : 0][e]; }
        load_b(b, sq + m * LD, LD, i * 16, lane);
        mma(T{}, s[0], ka, b[0], b[1]);
        mma(T{}, s[1], ka, b[2], b[3]);
        load_b(b, sgo + m * LD, LD, i * 16, lane);
        mma(T{}, ds[0], va, b[0], b[1]);
        mma(T{}, ds[1], va, b[2], b[3]);
      }
      UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) s[i][e] *= scale;
      // Only where the diagonal crosses the tile.
      if (!REL && p.causal && first + 15 > j * kQueries + m) {
        UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++)
          if (kx[e >> 1] > j * kQueries + m + i * 8 + t2 + (e & 1)) s[i][e] = -INFINITY;
      }
      UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 2; e++) {
        const int c = m + i * 8 + t2 + e;
        const float l = lse[c], d = delta[c];
        UNROLL for (int h = 0; h < 2; h++) {
          float x = s[i][2 * h + e];
          if (REL) {
            const int y = ky[h] < p.ks.win_h ? ky[h] : low, xk = kx[h] < p.ks.win_w ? kx[h] : 0;
            x += term[c * at.stride + own.columns * 4 + y - own.row] + term[c * at.stride + p.ks.win_h - own.column + xk];
          }
          const float weight = ex2(x - l);
          s[i][2 * h + e] = weight;
          ds[i][2 * h + e] = weight * (ds[i][2 * h + e] - d);
        }
      }
      uint32_t a[4], b[4];
      as_a<T>(a, s[0], s[1]);
      UNROLL for (int d = 0; d < DP / 8; d += 2) {
        load_bt(b, sgo + m * LD, LD, d * 8, lane);
        mma(T{}, dv[d], a, b[0], b[1]);
        mma(T{}, dv[d + 1], a, b[2], b[3]);
      }
      as_a<T>(a, ds[0], ds[1]);
      UNROLL for (int d = 0; d < DP / 8; d += 2) {
        load_bt(b, sq + m * LD, LD, d * 8, lane);
        mma(T{}, dk[d], a, b[0], b[1]);
        mma(T{}, dk[d + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();
  }
  keys_out<T, DP, REL>(dk, dv, p, w, ky, kx, w.tile * warps + warp, lane);
}

}  // namespace attention
}  // namespace smalti
