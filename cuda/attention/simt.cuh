// f32 and f64 without matrix instructions (f32 products are true f32): 256 threads as 16x16, each holding RxR of a
// tile of S = 16R queries by S keys. Slower than the half types by design; it is the reference of the GPU side.
#pragma once
#include "problem.cuh"

namespace smalti {
namespace attention {

DEV float exp_of(float x) { return expf(x); }
DEV double exp_of(double x) { return exp(x); }
DEV float log_of(float x) { return logf(x); }
DEV double log_of(double x) { return log(x); }

/// Tile side by type.
template <class T> constexpr int kSide = sizeof(T) == 4 ? 64 : 32;

/// Row strides of the tiles: whole quads, and 4 mod 32 words apart, so that eight rows lie in different banks.
template <int DP> constexpr int kRow = DP + 4;
template <class T> constexpr int kWeights = kSide<T> + 4;

template <class A> struct alignas(4 * sizeof(A)) Quad { A v[4]; };

/// Tokens `first ..` of a side, numbered without spare columns, to a tile.
template <class T, int DP> DEV void simt_rows(T* dst, const Problem& p, const Field& f, const Side& s, const Place& w, int first, int rows) {
  for (int i = threadIdx.x; i < rows * (DP / 4); i += blockDim.x) {
    const int r = i / (DP / 4), c = i % (DP / 4) * 4, y = (first + r) / s.win_w, x = first + r - y * s.win_w;
    const T* from = c < f.n ? source<T>(f, s, w, y, x) : nullptr;
    T* to = dst + r * kRow<DP> + c;
    if (sizeof(T) == 4 && from && p.wide) {
      *(uint4*)to = *(const uint4*)(from + c);
    } else {
      for (int e = 0; e < 4; e++) to[e] = from && c + e < f.n ? from[c + e] : (T)0;
    }
  }
}

/// The column of a thread's element j of C: groups of up to four adjacent ones.
template <int C> DEV int column_of(int j, int tx) {
  constexpr int V = C < 4 ? C : 4;
  return j / V * 16 * V + tx * V + j % V;
}

/// acc[i][j] = sum over c of a[ty + 16 i][c] * b[tx + 16 j][c].
template <class T, int DP, int R> DEV void dot_rows(T (&acc)[R][R], const T* a, const T* b, int ty, int tx) {
  using Q = Quad<T>;
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < R; j++) acc[i][j] = 0;
  for (int c = 0; c < DP; c += 4) {
    Q x[R], y[R];
    UNROLL for (int i = 0; i < R; i++) { x[i] = *(const Q*)(a + (ty + 16 * i) * kRow<DP> + c); y[i] = *(const Q*)(b + (tx + 16 * i) * kRow<DP> + c); }
    UNROLL for (int e = 0; e < 4; e++) UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < R; j++) acc[i][j] += x[i].v[e] * y[j].v[e];
  }
}

/// acc[i][j] += sum over m of weights[ty + 16 i][m] * rows[m][column_of(j)].
template <class T, int DP, int R, int C> DEV void add_rows(T (&acc)[R][C], const T* weights, const T* rows, int ty, int tx) {
  using Q = Quad<T>;
  constexpr int S = kSide<T>;
  for (int m = 0; m < S; m += 4) {
    Q x[R];
    UNROLL for (int i = 0; i < R; i++) x[i] = *(const Q*)(weights + (ty + 16 * i) * kWeights<T> + m);
    UNROLL for (int e = 0; e < 4; e++) {
      T y[C];
      if constexpr (C % 4 == 0) {
        UNROLL for (int j = 0; j < C; j += 4) {
          const Q q = *(const Q*)(rows + (m + e) * kRow<DP> + column_of<C>(j, tx));
          UNROLL for (int k = 0; k < 4; k++) y[j + k] = q.v[k];
        }
      } else {
        UNROLL for (int j = 0; j < C; j++) y[j] = rows[(m + e) * kRow<DP> + column_of<C>(j, tx)];
      }
      UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < C; j++) acc[i][j] += x[i].v[e] * y[j];
    }
  }
}

/// Relative terms of a tile's queries, by row window_h then window_w values, from the tables in memory.
template <class T, int DP> DEV void simt_relative(T* terms, const T* sq, const Problem& p, int first, int rows) {
  const int kh = p.ks.win_h, kw = p.ks.win_w, n = kh + kw;
  for (int i = threadIdx.x; i < rows * n; i += blockDim.x) {
    const int r = i / n, k = i % n, y = (first + r) / p.qs.win_w, x = first + r - y * p.qs.win_w;
    T sum = 0;
    if (y < p.qs.win_h) {
      const T* table = k < kh ? (const T*)p.rel_h + (int64_t)(y - k + kh - 1) * p.q.n : (const T*)p.rel_w + (int64_t)(x - (k - kh) + kw - 1) * p.q.n;
      for (int c = 0; c < p.q.n; c++) sum += sq[r * kRow<DP> + c] * table[c];
    }
    terms[i] = sum;
  }
}

template <class T, int DP> inline int64_t simt_forward_bytes(const Problem& p) {
  constexpr int64_t S = kSide<T>;
  return (int64_t)sizeof(T) * (2 * S * kRow<DP> + S * kWeights<T> + 3 * S + (p.rel_h ? S * (p.ks.win_h + p.ks.win_w) : 0));
}

template <class T, int DP> __global__ void __launch_bounds__(256) simt_forward(const Problem p) {
  constexpr int S = kSide<T>, R = S / 16, C = DP / 16;
  DYN_SMEM(sm);
  T *sq = (T*)sm, *sk = sq + S * kRow<DP>, *weights = sk + S * kRow<DP>, *top = weights + S * kWeights<T>, *sum = top + S, *keep = sum + S, *terms = keep + S;
  const int tid = threadIdx.x, tx = tid & 15, ty = tid >> 4;
  const Place w = place_of(p);
  const int first = w.tile * S, queries = p.qs.win_h * p.qs.win_w, keys = p.ks.win_h * p.ks.win_w, n = p.ks.win_h + p.ks.win_w;
  const T scale = (T)p.scale;
  simt_rows<T, DP>(sq, p, p.q, p.qs, w, first, S);
  if (tid < S) { top[tid] = -INFINITY; sum[tid] = 0; }
  __syncthreads();
  if (p.rel_h) simt_relative<T, DP>(terms, sq, p, first, S);
  T o[R][C];
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < C; j++) o[i][j] = 0;
  const int end = p.causal && first + S < keys ? first + S : keys;
  for (int k0 = 0; k0 < end; k0 += S) {
    simt_rows<T, DP>(sk, p, p.k, p.ks, w, k0, S);
    __syncthreads();
    T s[R][R];
    dot_rows<T, DP, R>(s, sq, sk, ty, tx);
    UNROLL for (int j = 0; j < R; j++) {
      const int key = k0 + tx + 16 * j, ky = key / p.ks.win_w, kx = key - ky * p.ks.win_w;
      UNROLL for (int i = 0; i < R; i++) {
        const int r = ty + 16 * i;
        T x = s[i][j] * scale;
        if (p.rel_h && key < keys) x += terms[r * n + ky] + terms[r * n + p.ks.win_h + kx];
        weights[r * kWeights<T> + tx + 16 * j] = key >= keys || (p.causal && key > first + r) ? (T)-INFINITY : x;
      }
    }
    __syncthreads();
    simt_rows<T, DP>(sk, p, p.v, p.ks, w, k0, S);
    // 256 / S threads share a row: each sums its part in order, lane 0 of them adds the parts in order.
    constexpr int SHARE = 256 / S;
    {
      const int r = tid / SHARE, part = tid % SHARE;
      T* row = weights + r * kWeights<T>;
      T now = top[r];
      for (int c = part; c < S; c += SHARE) now = row[c] > now ? row[c] : now;
      for (int m = 1; m < SHARE; m <<= 1) { const T other = __shfl_xor_sync(~0u, now, m); now = other > now ? other : now; }
      T add = 0;
      for (int c = part; c < S; c += SHARE) { row[c] = exp_of(row[c] - now); add += row[c]; }
      for (int m = 1; m < SHARE; m <<= 1) add += __shfl_xor_sync(~0u, add, m);
      if (part == 0) { keep[r] = exp_of(top[r] - now); sum[r] = sum[r] * keep[r] + add; }
      __syncwarp();
      if (part == 0) top[r] = now;
    }
    __syncthreads();
    UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < C; j++) o[i][j] *= keep[ty + 16 * i];
    add_rows<T, DP, R, C>(o, weights, sk, ty, tx);
    __syncthreads();
  }
  UNROLL for (int i = 0; i < R; i++) {
    const int r = first + ty + 16 * i, y = r / p.qs.win_w, x = r - y * p.qs.win_w;
    if (r >= queries || !inside(p.qs, w, y, x)) continue;
    T* out = row_at<T>(p.o, p.qs, w, y, x);
    const T inverse = (T)1 / sum[ty + 16 * i];
    UNROLL for (int j = 0; j < C; j++) if (column_of<C>(j, tx) < p.o.n) out[column_of<C>(j, tx)] = o[i][j] * inverse;
    if (tx == 0) ((T*)p.lse)[query_index(p, w, y, x)] = top[ty + 16 * i] + log_of(sum[ty + 16 * i]);
  }
}

}  // namespace attention
}  // namespace smalti
