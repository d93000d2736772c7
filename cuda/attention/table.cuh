// Gradients of the relative position tables and of the padding, both as sums of parts in a fixed order.
//   dRh[y - k + win_h - 1] += D1[(y, x), k] * q[(y, x)]   over batch, windows, heads and queries (likewise dRw).
#pragma once
#include "dkv_mma.cuh"
#include "launch.cuh"
#include "simt.cuh"
#include "table_mma.cuh"

namespace smalti {
namespace attention {

constexpr int kTokens = 64;  // queries of one window row that are worked on together
constexpr int kTableBlocks = 4 * kMultiprocessors;  // at most

HOST_DEV int round4(int n) { return (n + 3) / 4 * 4; }

template <class A> inline int64_t table_bytes(const Problem& p) {
  const int64_t d = round4(p.q.n), rows = 2 * (p.ks.win_h + p.ks.win_w) - 2;
  return (int64_t)sizeof(A) * (kTokens * d + kTokens * (round4(p.ks.win_h) + round4(p.ks.win_w)) + rows * d);
}

/// Units of work: window rows of queries.
inline int64_t table_units(const Problem& p) {
  return (int64_t)p.batch * p.heads * p.windows_y * p.windows_x * p.qs.win_h;
}

/// Block i sums its share of the units, in order, to part[i]: [rows of both tables, D].
template <class T> __global__ void __launch_bounds__(256) table_parts(const Problem p, Acc<T>* part, int64_t units) {
  using A = Acc<T>;
  using Q = Quad<A>;
  DYN_SMEM(sm);
  const int tid = threadIdx.x, d = p.q.n, d4 = round4(d), kh = p.ks.win_h, kw = p.ks.win_w, h4 = round4(kh), n4 = h4 + round4(kw);
  const int rows_h = 2 * kh - 1, rows = rows_h + 2 * kw - 1, columns = d4 / 4;
  A *sq = (A*)sm, *sd = sq + kTokens * d4, *sums = sd + kTokens * n4;
  for (int i = tid; i < rows * d4; i += 256) sums[i] = 0;
  const int64_t from = units * blockIdx.x / gridDim.x, to = units * (blockIdx.x + 1) / gridDim.x;
  for (int64_t u = from; u < to; u++) {
    int64_t i = u;
    Place w;
    const int y = (int)(i % p.qs.win_h); i /= p.qs.win_h;
    w.h = (int)(i % p.heads); i /= p.heads;
    w.wx = (int)(i % p.windows_x); i /= p.windows_x;
    w.wy = (int)(i % p.windows_y);
    w.b = (int)(i / p.windows_y);
    if (!inside(p.qs, w, y, 0)) continue;
    const int wide = p.qs.img_w - w.wx * p.qs.win_w < p.qs.win_w ? p.qs.img_w - w.wx * p.qs.win_w : p.qs.win_w;
    for (int x0 = 0; x0 < wide; x0 += kTokens) {
      const int tokens = wide - x0 < kTokens ? wide - x0 : kTokens;
      const T* q = row_at<const T>(p.q, p.qs, w, y, x0);
      const A* slopes = (const A*)p.drel + query_index(p, w, y, x0) * (kh + kw);
      __syncthreads();
      for (int j = tid; j < tokens * d4; j += 256) { const int r = j / d4, c = j % d4; sq[j] = c < d ? widen(q[r * p.q.x + c]) : (A)0; }
      for (int j = tid; j < tokens * n4; j += 256) {
        const int r = j / n4, k = j % n4;
        sd[j] = k < kh ? slopes[r * (kh + kw) + k] : k >= h4 && k - h4 < kw ? slopes[r * (kh + kw) + kh + k - h4] : (A)0;
      }
      __syncthreads();
      // Row table: this thread has 4 keys by 4 columns, whose table rows are its own for this y. The threads behind have the
      // column table's.
      const int row_jobs = h4 / 4 * columns, jobs = row_jobs + (2 * kw + 2) / 4 * columns;
      int job = tid;
      for (; job < row_jobs; job += 256) {
        const int c = job % columns * 4, k = job / columns * 4;
        A acc[4][4] = {};
        for (int x = 0; x < tokens; x++) {
          const Q a = *(const Q*)(sd + x * n4 + k), b = *(const Q*)(sq + x * d4 + c);
          UNROLL for (int r = 0; r < 4; r++) UNROLL for (int e = 0; e < 4; e++) acc[r][e] += a.v[r] * b.v[e];
        }
        UNROLL for (int r = 0; r < 4; r++) if (k + r < kh) UNROLL for (int e = 0; e < 4; e++) sums[(y - k - r + kh - 1) * d4 + c + e] += acc[r][e];
      }
      // Column table: 4 rows of the table by 4 columns; row r meets query x and key x - r + win_w - 1.
      for (; job < jobs; job += 256) {
        const int c = (job - row_jobs) % columns * 4, row = (job - row_jobs) / columns * 4;
        A acc[4][4] = {};
        for (int x = 0; x < tokens; x++) {
          const Q b = *(const Q*)(sq + x * d4 + c);
          UNROLL for (int r = 0; r < 4; r++) {
            const int k = x0 + x - row - r + kw - 1;
            const A a = k >= 0 && k < kw ? sd[x * n4 + h4 + k] : (A)0;
            UNROLL for (int e = 0; e < 4; e++) acc[r][e] += a * b.v[e];
          }
        }
        UNROLL for (int r = 0; r < 4; r++) if (row + r < 2 * kw - 1) UNROLL for (int e = 0; e < 4; e++) sums[(rows_h + row + r) * d4 + c + e] += acc[r][e];
      }
    }
  }
  __syncthreads();
  for (int i = tid; i < rows * d; i += 256) part[(int64_t)blockIdx.x * rows * d + i] = sums[i / d * d4 + i % d];
}

constexpr int kRuns = 16;

/// The parts in order: 32 neighbours a block, each with its parts in kRuns runs, which are then added up.
template <class A> __global__ void __launch_bounds__(32 * kRuns) table_sum(const A* part, int parts, int64_t n, int64_t split, A* to_h, A* to_w) {
  DYN_SMEM(sm);
  A* sums = (A*)sm;
  const int tid = threadIdx.x, run = tid >> 5, from = parts * run / kRuns, to = parts * (run + 1) / kRuns;
  for (int64_t first = (int64_t)blockIdx.x * 32; first < n; first += (int64_t)gridDim.x * 32) {
    const int64_t i = first + (tid & 31);
    A sum = 0;
    for (int j = from; j < to && i < n; j++) sum += part[j * n + i];
    sums[tid] = sum;
    __syncthreads();
    if (run == 0 && i < n) {
      for (int j = 1; j < kRuns; j++) sum += sums[j * 32 + tid];
      if (i < split) to_h[i] = sum; else to_w[i - split] = sum;
    }
    __syncthreads();
  }
}

/// Launches `table_parts`; `parts` takes how many there are.
template <class T> int32_t run_parts(const Problem& p, void* part, int& parts, void* stream) {
  using A = Acc<T>;
  const int64_t units = table_units(p), smem = table_bytes<A>(p);
  if (smem > kMaxSmem) return kInvalid;
  int rc = 0;
  // one round of blocks, as many as fit: each has a sum of its own to write
  int most = kMultiprocessors * (int)(kMaxSmem / (smem + 1024));
  if (most > kTableBlocks) most = kTableBlocks;
  parts = (int)grid_for(units, 1);
  if (parts > most) parts = most;
  LAUNCH(rc, table_parts<T>, dim3(parts), dim3(256), smem, stream, p, (A*)part, units);
  return rc;
}

template <class T> int32_t run_tables(const Problem& p, void* part, void* to_h, void* to_w, void* stream) {
  using A = Acc<T>;
  const int64_t n = (int64_t)(2 * (p.ks.win_h + p.ks.win_w) - 2) * p.q.n;
  int rc, parts = 0;
  if constexpr (sizeof(T) > 2) rc = run_parts<T>(p, part, parts, stream);
  else if (p.q.n > 64 && p.q.n <= 80) rc = run_products<T, 10>(p, (float*)part, parts, stream);
  else rc = run_products<T, 8>(p, (float*)part, parts, stream);
  if (rc) return rc;
  LAUNCH(rc, table_sum<A>, dim3(grid_for(n, 32)), dim3(32 * kRuns), 32 * kRuns * sizeof(A), stream, (const A*)part, parts, n,
         (int64_t)(2 * p.ks.win_h - 1) * p.q.n, (A*)to_h, (A*)to_w);
  return rc;
}

/// Gradient [3, H, D] of the vectors that padding was made of: zero for queries, whose rows nobody reads.
template <class A> __global__ void __launch_bounds__(256) pad_sum(const Problem p, int64_t windows, A* to) {
  DYN_SMEM(sm);
  A* sums = (A*)sm;
  const int tid = threadIdx.x, which = blockIdx.x / p.heads, h = blockIdx.x % p.heads, d = p.k.n, width = (d + 31) / 32 * 32, groups = 256 / width;
  const int c = tid % width, group = tid / width;
  A sum = 0;
  if (which && c < d && group < groups) {
    const int64_t rows = windows * p.pad_slots;
    for (int64_t r = group; r < rows; r += groups)
      sum += ((const A*)p.pad_part)[(((r / p.pad_slots) * p.heads + h) * p.pad_slots + r % p.pad_slots) * 2 * d + (which - 1) * d + c];
  }
  sums[tid] = sum;
  __syncthreads();
  if (tid < d) {
    A total = 0;
    for (int g = 0; g < groups; g++) total += sums[g * width + tid];
    to[((int64_t)which * p.heads + h) * d + tid] = total;
  }
}

template <class T> int32_t run_padding(const Problem& p, void* to, void* stream) {
  using A = Acc<T>;
  const int64_t windows = (int64_t)p.batch * border_windows(p.ks, p.windows_y, p.windows_x);
  int rc = 0;
  LAUNCH(rc, pad_sum<A>, dim3(3 * p.heads), dim3(256), 256 * sizeof(A), stream, p, windows, (A*)to);
  return rc;
}

}  // namespace attention
}  // namespace smalti
