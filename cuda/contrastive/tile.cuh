// Products of 128 x 128 tiles, left in registers: the heart of the contrastive kernels. 256 threads, 8 warps of
// 64 x 32. Half types: mma.sync behind a four-stage cp.async pipeline, f32 accumulation. f32 and f64: fused
// multiply-adds on the same layout, so that what follows a product is written once for all types.
#pragma once
#include "../common/dtype.cuh"

namespace smalti {
namespace contrastive {

constexpr int TILE = 128, THREADS = 256;

/// One side of a product over `depth`: element (row, k) lies at p[row * row_step + k * depth_step], one of the
/// steps is 1. `vec`: 16-byte loads along that one are aligned.
template <class T> struct Operand {
  const T* p;
  int64_t rows, row_step, depth_step;
  bool vec;
};

template <class T> inline Operand<T> operand(const T* p, int64_t rows, int64_t row_step, int64_t depth_step) {
  const int64_t other = row_step == 1 ? depth_step : row_step;
  return {p, rows, row_step, depth_step, ((uintptr_t)p & 15) == 0 && other * (int64_t)sizeof(T) % 16 == 0};
}

/// The 64 values of a thread, as mma.sync lays them out: [16 rows][8 columns][element].
template <class A> struct Fragment {
  A v[4][4][4];
  DEV void zero() {
    UNROLL for (int i = 0; i < 4; i++)
      UNROLL for (int j = 0; j < 4; j++)
        UNROLL for (int e = 0; e < 4; e++) v[i][j][e] = 0;
  }
  /// Value (i, j) of eight rows and eight columns.
  DEV A& at(int i, int j) { return v[i >> 1][j >> 1][(i & 1) * 2 + (j & 1)]; }
};

/// Which rows and columns of the tile a thread holds.
struct Place {
  int lane, warp, row0, column0;
  DEV explicit Place(int tid) : lane(tid & 31), warp(tid >> 5) {
    row0 = (warp >> 2) * 64 + (lane >> 2);
    column0 = (warp & 3) * 32 + (lane & 3) * 2;
  }
  DEV static int down(int i) { return (i >> 1) * 16 + (i & 1) * 8; }
  DEV static int across(int j) { return (j >> 1) * 8 + (j & 1); }
  DEV int row(int i) const { return row0 + down(i); }
  DEV int column(int j) const { return column0 + across(j); }
};

/// What of a tile's rows and columns counts, and where its positives lie, as a thread sees it: distances from its first
/// row and column, so that each question is one comparison of 32 bits.
struct Bounds {
  int rows, columns, diagonal;
  /// `diagonal`: column less row, in the tile, of positives.
  DEV Bounds(const Place& at, int64_t rows, int64_t columns, int64_t diagonal)
      : rows((int)min(rows, (int64_t)TILE) - at.row0), columns((int)min(columns, (int64_t)TILE) - at.column0),
        diagonal((int)max(min(diagonal, (int64_t)TILE), -(int64_t)TILE) - (at.column0 - at.row0)) {}
  DEV bool row(int i) const { return Place::down(i) < rows; }
  DEV bool column(int j) const { return Place::across(j) < columns; }
  DEV bool positive(int i, int j) const { return Place::across(j) - Place::down(i) == diagonal; }
};

// ---- half types -----------------------------------------------------------------------------------------------

/// Steps of 32 along the depth. A stage holds an operand as [128 rows][32 + 8], or, where rows are adjacent in
/// memory (`M`), as [32][128 + 8]; both row lengths are odd multiples of 16 bytes: ldmatrix meets no bank twice.
constexpr int STEP = 32, STAGES = 4, LD_K = STEP + 8, LD_M = TILE + 8, STAGE = TILE * LD_K;

template <class T, bool M> DEV void load_stage(T* stage, const Operand<T>& o, int64_t first, int64_t k0, int64_t end, int tid) {
  for (int i = tid; i < TILE * STEP / 8; i += THREADS) {
    const int a = M ? i >> 4 : i >> 2, b = (M ? i & 15 : i & 3) * 8;
    const int64_t row = first + (M ? b : a), k = k0 + (M ? a : b);
    T* to = stage + a * (M ? LD_M : LD_K) + b;
    const bool inside = M ? k < end : row < o.rows;
    const int64_t left = inside ? (M ? o.rows - row : end - k) : 0;
    if (left >= 8 && o.vec) {
      cp16(to, o.p + row * o.row_step + k * o.depth_step);
    } else {
      for (int e = 0; e < 8; e++)
        to[e] = e < left ? o.p[(row + (M ? e : 0)) * o.row_step + (k + (M ? 0 : e)) * o.depth_step] : T{0};
    }
  }
}

template <class T, bool AM, bool BM, int LDA = LD_K>
DEV void multiply_stage(Fragment<float>& acc, const T* a, const T* b, const Place& at) {
  const int lane = at.lane, r = (at.warp >> 2) * 64, c = (at.warp & 3) * 32;
  UNROLL for (int k = 0; k < STEP; k += 16) {
    uint32_t x[4][4];
    UNROLL for (int i = 0; i < 4; i++) {
      if (AM) ldsm4t(x[i], a + (k + (lane & 7) + (lane >> 4) * 8) * LD_M + r + i * 16 + (lane >> 3 & 1) * 8);
      else ldsm4(x[i], a + (r + i * 16 + (lane & 15)) * LDA + k + (lane >> 4) * 8);
    }
    UNROLL for (int j = 0; j < 4; j += 2) {
      uint32_t y[4];
      if (BM) ldsm4t(y, b + (k + (lane & 7) + (lane >> 3 & 1) * 8) * LD_M + c + j * 8 + (lane >> 4) * 8);
      else ldsm4(y, b + (c + j * 8 + (lane & 7) + (lane >> 4) * 8) * LD_K + k + (lane >> 3 & 1) * 8);
      UNROLL for (int i = 0; i < 4; i++) {
        mma(T{}, acc.v[i][j], x[i], y[0], y[1]);
        mma(T{}, acc.v[i][j + 1], x[i], y[2], y[3]);
      }
    }
  }
}

template <class T, bool AM, bool BM>
DEV void half_product(Fragment<float>& acc, const Operand<T>& a, const Operand<T>& b, int64_t r0, int64_t c0, int64_t begin,
                 int64_t end, unsigned char* shared, const Place& at, int tid) {
  T* stages = (T*)shared;
  acc.zero();
  const int64_t steps = (end - begin + STEP - 1) / STEP;
  auto load = [&](int64_t s) {
    if (s < steps) {
      T* to = stages + s % STAGES * 2 * STAGE;
      load_stage<T, AM>(to, a, r0, begin + s * STEP, end, tid);
      load_stage<T, BM>(to + STAGE, b, c0, begin + s * STEP, end, tid);
    }
    cp_commit();
  };
  for (int s = 0; s < STAGES - 1; s++) load(s);
  for (int64_t s = 0; s < steps; s++) {
    cp_wait<STAGES - 2>();
    __syncthreads();  // step s has landed, and nobody reads the stage of step s - 1 any more
    load(s + STAGES - 1);
    const T* stage = stages + s % STAGES * 2 * STAGE;
    multiply_stage<T, AM, BM>(acc, stage, stage + STAGE, at);
  }
  cp_wait<0>();
  __syncthreads();
}

/// acc += A B^T over depth [begin, end), with A, 128 wide, in shared memory as [128][128 + 8] and zero beyond the end.
template <class T, bool BM>
DEV void multiply_shared(Fragment<float>& acc, const T* a, const Operand<T>& b, int64_t c0, int64_t begin, int64_t end,
                         unsigned char* shared, const Place& at, int tid) {
  T* stages = (T*)shared;
  const int steps = (int)((end - begin + STEP - 1) / STEP);
  auto load = [&](int s) {
    if (s < steps) load_stage<T, BM>(stages + s % STAGES * STAGE, b, c0, begin + s * STEP, end, tid);
    cp_commit();
  };
  for (int s = 0; s < STAGES - 1; s++) load(s);
  for (int s = 0; s < steps; s++) {
    cp_wait<STAGES - 2>();
    __syncthreads();
    load(s + STAGES - 1);
    multiply_stage<T, false, BM, LD_M>(acc, a + s * STEP, stages + s % STAGES * STAGE, at);
  }
  cp_wait<0>();
  __syncthreads();
}

// ---- f32 and f64 ----------------------------------------------------------------------------------------------

constexpr int REAL_STEP = 16, LD_R = TILE + 4;

template <class T, bool M> DEV void fetch(T (&regs)[8], const Operand<T>& o, int64_t first, int64_t k0, int64_t end, int tid) {
  UNROLL for (int e = 0; e < 8; e++) {
    const int i = tid + e * THREADS;
    const int64_t row = first + (M ? i & 127 : i >> 4), k = k0 + (M ? i >> 7 : i & 15);
    regs[e] = row < o.rows && k < end ? o.p[row * o.row_step + k * o.depth_step] : T(0);
  }
}
template <class T, bool M> DEV void put(const T (&regs)[8], T* stage, int tid) {
  UNROLL for (int e = 0; e < 8; e++) {
    const int i = tid + e * THREADS;
    stage[(M ? i >> 7 : i & 15) * LD_R + (M ? i & 127 : i >> 4)] = regs[e];
  }
}

template <class T, bool AM, bool BM>
DEV void real_product(Fragment<T>& acc, const Operand<T>& a, const Operand<T>& b, int64_t r0, int64_t c0, int64_t begin,
                 int64_t end, unsigned char* shared, const Place& at, int tid) {
  T* stages = (T*)shared;
  T x[8], y[8];
  acc.zero();
  fetch<T, AM>(x, a, r0, begin, end, tid);
  fetch<T, BM>(y, b, c0, begin, end, tid);
  int s = 0;
  for (int64_t k0 = begin; k0 < end; k0 += REAL_STEP, s ^= 1) {
    T* stage = stages + s * 2 * REAL_STEP * LD_R;
    put<T, AM>(x, stage, tid);
    put<T, BM>(y, stage + REAL_STEP * LD_R, tid);
    __syncthreads();  // two stages: one barrier a step is enough
    if (k0 + REAL_STEP < end) {
      fetch<T, AM>(x, a, r0, k0 + REAL_STEP, end, tid);
      fetch<T, BM>(y, b, c0, k0 + REAL_STEP, end, tid);
    }
    for (int k = 0; k < REAL_STEP; k++) {
      T u[8], w[8];
      UNROLL for (int i = 0; i < 8; i++) u[i] = stage[k * LD_R + at.row(i)];
      UNROLL for (int j = 0; j < 8; j++) w[j] = stage[(REAL_STEP + k) * LD_R + at.column(j)];
      UNROLL for (int i = 0; i < 8; i++)
        UNROLL for (int j = 0; j < 8; j++) acc.at(i, j) += u[i] * w[j];
    }
  }
  __syncthreads();
}

/// acc = A B^T over depth [begin, end), for rows from `r0` of A and from `c0` of B; `AM`, `BM`: the rows of A, of B
/// are adjacent in memory. All threads may reuse the shared memory afterwards.
template <class T, bool AM, bool BM>
DEV void product(Fragment<Acc<T>>& acc, const Operand<T>& a, const Operand<T>& b, int64_t r0, int64_t c0, int64_t begin,
                 int64_t end, unsigned char* shared, const Place& at, int tid) {
  if constexpr (sizeof(T) == 2) half_product<T, AM, BM>(acc, a, b, r0, c0, begin, end, shared, at, tid);
  else real_product<T, AM, BM>(acc, a, b, r0, c0, begin, end, shared, at, tid);
}

/// Shared memory of a product.
template <class T> HOST_DEV constexpr int shared_bytes() {
  return sizeof(T) == 2 ? STAGES * 2 * STAGE * 2 : 4 * REAL_STEP * LD_R * (int)sizeof(T);
}

/// 2^x.
HOST_DEV float two_to(float x) {
#if defined(__CUDA_ARCH__)
  return ex2(x);
#else
  return exp2f(x);
#endif
}
/// Much code in f64, at dozens of places a kernel.
APART double two_to(double x) { return exp2(x); }

constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Where memory is handed out from one workspace, in pieces of 256 bytes. Without a base it only counts.
struct Pieces {
  unsigned char* base;
  int64_t used = 0;
  template <class P> P* take(int64_t count) {
    P* p = base ? (P*)(base + used) : nullptr;
    used += ceil_div(count * (int64_t)sizeof(P), 256) * 256;
    return p;
  }
};

}  // namespace contrastive
}  // namespace smalti
