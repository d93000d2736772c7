// Both backward passes for f32 and f64, in the tiles of simt.cuh.
#pragma once
#include "dkv_mma.cuh"
#include "simt.cuh"

namespace smalti {
namespace attention {

template <class T, int DP> inline int64_t simt_dq_bytes(const Problem& p) {
  constexpr int64_t S = kSide<T>;
  return (int64_t)sizeof(T) * (4 * S * kRow<DP> + S * kWeights<T> + 2 * S + (p.rel_h ? 2 * S * (p.ks.win_h + p.ks.win_w) : 0));
}

/// lse, delta and, if `norm` is there, the factors of a tile's queries; queries outside the image get weight zero.
template <class T> DEV void simt_row_values(T* lse, T* delta, T* norm, const Problem& p, const Place& w, int first, int rows) {
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    const int y = (first + r) / p.qs.win_w, x = first + r - y * p.qs.win_w;
    const bool in = inside(p.qs, w, y, x);
    const int64_t i = in ? query_index(p, w, y, x) : 0;
    lse[r] = in ? ((const T*)p.lse)[i] : (T)INFINITY;
    delta[r] = in ? ((const T*)p.delta)[i] : (T)0;
    if (norm) norm[r] = in ? ((const T*)p.norm)[i] : (T)0;
  }
}

template <class T, int DP> __global__ void __launch_bounds__(256) simt_dq(const Problem p) {
  constexpr int S = kSide<T>, R = S / 16, C = DP / 16;
  DYN_SMEM(sm);
  T *sq = (T*)sm, *sgo = sq + S * kRow<DP>, *sk = sgo + S * kRow<DP>, *sv = sk + S * kRow<DP>, *weights = sv + S * kRow<DP>;
  T *lse = weights + S * kWeights<T>, *delta = lse + S, *terms = delta + S;
  const int tid = threadIdx.x, tx = tid & 15, ty = tid >> 4;
  const Place w = place_of(p);
  const int first = w.tile * S, queries = p.qs.win_h * p.qs.win_w, keys = p.ks.win_h * p.ks.win_w, kh = p.ks.win_h, n = kh + p.ks.win_w;
  T* sums = terms + S * n;
  const T scale = (T)p.scale;
  simt_rows<T, DP>(sq, p, p.q, p.qs, w, first, S);
  simt_rows<T, DP>(sgo, p, p.go, p.qs, w, first, S);
  simt_row_values(lse, delta, (T*)nullptr, p, w, first, S);
  __syncthreads();
  if (p.rel_h) {
    simt_relative<T, DP>(terms, sq, p, first, S);
    for (int i = tid; i < S * n; i += 256) sums[i] = 0;
  }
  T dq[R][C];
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < C; j++) dq[i][j] = 0;
  T total[R];  // of this thread's weights by row
  UNROLL for (int i = 0; i < R; i++) total[i] = 0;
  const int end = p.causal && first + S < keys ? first + S : keys;
  for (int k0 = 0; k0 < end; k0 += S) {
    simt_rows<T, DP>(sk, p, p.k, p.ks, w, k0, S);
    simt_rows<T, DP>(sv, p, p.v, p.ks, w, k0, S);
    __syncthreads();
    T s[R][R], ds[R][R];
    dot_rows<T, DP, R>(s, sq, sk, ty, tx);
    dot_rows<T, DP, R>(ds, sgo, sv, ty, tx);
    UNROLL for (int j = 0; j < R; j++) {
      const int key = k0 + tx + 16 * j, ky = key / p.ks.win_w, kx = key - ky * p.ks.win_w;
      UNROLL for (int i = 0; i < R; i++) {
        const int r = ty + 16 * i;
        T x = s[i][j] * scale;
        if (p.rel_h && key < keys) x += terms[r * n + ky] + terms[r * n + kh + kx];
        const bool seen = key < keys && !(p.causal && key > first + r);
        const T weight = seen ? exp_of(x - lse[r]) : (T)0;
        total[i] += weight;
        weights[r * kWeights<T> + tx + 16 * j] = weight * (ds[i][j] - delta[r]);
      }
    }
    __syncthreads();
    add_rows<T, DP, R, C>(dq, weights, sk, ty, tx);
    if (p.rel_h && tid < 2 * S) {  // one thread a row sums by window row, another by column
      const int r = tid >> 1;
      int y = k0 / p.ks.win_w, x = k0 - y * p.ks.win_w;
      ROLLED for (int c = 0; c < S && k0 + c < keys; c++) {
        sums[r * n + ((tid & 1) ? kh + x : y)] += weights[r * kWeights<T> + c];
        if (++x == p.ks.win_w) { x = 0; y++; }
      }
    }
    __syncthreads();
  }
  // lse of large logits is rounded coarsely; the weights are put right by their own sum.
  T norm[R];
  UNROLL for (int i = 0; i < R; i++) {
    for (int m = 1; m < 16; m <<= 1) total[i] += __shfl_xor_sync(~0u, total[i], m);
    norm[i] = (T)1 / total[i];
  }
  UNROLL for (int i = 0; i < R; i++) {
    const int row = ty + 16 * i, r = first + row, y = r / p.qs.win_w, x = r - y * p.qs.win_w;
    if (r >= queries || !inside(p.qs, w, y, x)) continue;
    T* out = row_at<T>(p.dq, p.qs, w, y, x);
    UNROLL for (int j = 0; j < C; j++) {
      const int c = column_of<C>(j, tx);
      if (c >= p.q.n) continue;
      T d = dq[i][j] * scale;
      if (p.rel_h) {
        ROLLED for (int k = 0; k < kh; k++) d += sums[row * n + k] * ((const T*)p.rel_h)[(int64_t)(y - k + kh - 1) * p.q.n + c];
        ROLLED for (int k = 0; k < p.ks.win_w; k++) d += sums[row * n + kh + k] * ((const T*)p.rel_w)[(int64_t)(x - k + p.ks.win_w - 1) * p.q.n + c];
      }
      out[c] = d * norm[i];
    }
    if (tx == 0) ((T*)p.norm)[query_index(p, w, y, x)] = norm[i];
    if (p.rel_h) {
      const int64_t to = query_index(p, w, y, x) * n;
      ROLLED for (int k = tx; k < n; k += 16) { ((T*)p.rel)[to + k] = terms[row * n + k]; ((T*)p.drel)[to + k] = sums[row * n + k] * norm[i]; }
    }
  }
}

template <class T, int DP> inline int64_t simt_dkv_bytes() {
  constexpr int64_t S = kSide<T>;
  return (int64_t)sizeof(T) * (4 * S * kRow<DP> + 2 * S * kWeights<T> + 3 * S);
}

template <class T, int DP> __global__ void __launch_bounds__(256) simt_dkv(const Problem p) {
  constexpr int S = kSide<T>, R = S / 16, C = DP / 16;
  DYN_SMEM(sm);
  T *sk = (T*)sm, *sv = sk + S * kRow<DP>, *sq = sv + S * kRow<DP>, *sgo = sq + S * kRow<DP>, *weights = sgo + S * kRow<DP>;
  T *slopes = weights + S * kWeights<T>, *lse = slopes + S * kWeights<T>, *delta = lse + S, *norm = delta + S;
  const int tid = threadIdx.x, tx = tid & 15, ty = tid >> 4;
  const Place w = place_of(p);
  const int first = w.tile * S, queries = p.qs.win_h * p.qs.win_w, keys = p.ks.win_h * p.ks.win_w, kh = p.ks.win_h, n = kh + p.ks.win_w;
  const T scale = (T)p.scale;
  simt_rows<T, DP>(sk, p, p.k, p.ks, w, first, S);
  simt_rows<T, DP>(sv, p, p.v, p.ks, w, first, S);
  T dk[R][C], dv[R][C];
  UNROLL for (int i = 0; i < R; i++) UNROLL for (int j = 0; j < C; j++) dk[i][j] = dv[i][j] = 0;
  for (int q0 = p.causal ? first / S * S : 0; q0 < queries; q0 += S) {
    simt_rows<T, DP>(sq, p, p.q, p.qs, w, q0, S);
    simt_rows<T, DP>(sgo, p, p.go, p.qs, w, q0, S);
    simt_row_values(lse, delta, norm, p, w, q0, S);
    __syncthreads();
    T s[R][R], ds[R][R];
    dot_rows<T, DP, R>(s, sk, sq, ty, tx);
    dot_rows<T, DP, R>(ds, sv, sgo, ty, tx);
    UNROLL for (int j = 0; j < R; j++) {
      const int c = tx + 16 * j, q = q0 + c, y = q / p.qs.win_w, x = q - y * p.qs.win_w;
      const bool in = inside(p.qs, w, y, x);
      const T* term = (const T*)p.rel + (p.rel_h && in ? query_index(p, w, y, x) * n : 0);
      UNROLL for (int i = 0; i < R; i++) {
        const int r = ty + 16 * i, key = first + r, ky = key / p.ks.win_w, kx = key - ky * p.ks.win_w;
        const bool seen = in && key < keys && !(p.causal && key > q);
        T z = s[i][j] * scale;
        if (p.rel_h && seen) z += term[ky] + term[kh + kx];
        const T weight = seen ? exp_of(z - lse[c]) * norm[c] : (T)0;
        weights[r * kWeights<T> + c] = weight;
        slopes[r * kWeights<T> + c] = seen ? weight * (ds[i][j] - delta[c]) : (T)0;
      }
    }
    __syncthreads();
    add_rows<T, DP, R, C>(dv, weights, sgo, ty, tx);
    add_rows<T, DP, R, C>(dk, slopes, sq, ty, tx);
    __syncthreads();
  }
  const int border = p.pad_part ? border_index(p, w) : -1;
  UNROLL for (int i = 0; i < R; i++) {
    const int key = first + ty + 16 * i, y = key / p.ks.win_w, x = key - y * p.ks.win_w;
    const bool in = key < keys && inside(p.ks, w, y, x), pad = key < keys && !in;
    UNROLL for (int j = 0; j < C; j++) {
      const int c = column_of<C>(j, tx);
      dk[i][j] *= scale;
      if (in && c < p.k.n) row_at<T>(p.dk, p.ks, w, y, x)[c] = dk[i][j];
      if (in && c < p.v.n) row_at<T>(p.dv, p.ks, w, y, x)[c] = dv[i][j];
      if (border >= 0) {
        sk[(ty + 16 * i) * kRow<DP> + c] = pad ? dk[i][j] : (T)0;
        sv[(ty + 16 * i) * kRow<DP> + c] = pad ? dv[i][j] : (T)0;
      }
    }
  }
  if (border < 0) return;
  __syncthreads();
  T* sums = pad_sums<T>(p, w, border, w.tile);
  for (int i = tid; i < 2 * p.k.n; i += 256) {
    const T* from = i < p.k.n ? sk + i : sv + i - p.k.n;
    T sum = 0;
    for (int r = 0; r < S; r++) sum += from[r * kRow<DP>];
    sums[i] = sum;
  }
}

}  // namespace attention
}  // namespace smalti
