// Products of tiles of 64 rows a warpgroup and N columns by wgmma, 64 steps of the depth a stage. Four stages: two are on
// their way from memory, one is multiplied, one may still be in the multiplication before.
#pragma once
#include "../../wgmma.cuh"
#include "../tile.cuh"

namespace smalti {
namespace contrastive {

constexpr int WIDE_STEP = 64, WIDE_STAGES = 4;

/// `ROWS` rows from `first` and 64 steps of the depth from k0 to shared memory, as rows_operand or (`M`: the rows are
/// adjacent in memory) as depth_operand reads them; zeros outside. The operand is aligned, and what is adjacent in memory
/// is a multiple of 8 long, or readable and zero up to one; steps between rows are below 2^25.
template <class T, bool M, int ROWS, int THREADS>
DEV void load_wide(unsigned char* to, const Operand<T>& o, int64_t first, int64_t k0, int64_t end, int tid) {
  const int piece = tid & 7, depth = (int)min(end - k0, (int64_t)WIDE_STEP);
  if constexpr (!M) {
    constexpr int LINES = THREADS / 8;
    const int line = tid >> 3, left = piece * 8 < depth ? (int)min(o.rows - first, (int64_t)ROWS) - line : 0;
    const T* from = o.p + (first + line) * o.row_step + k0 + piece * 8;
    UNROLL for (int i = 0; i < ROWS; i += LINES) {
      if (ROWS % LINES && i + line >= ROWS) break;
      cp16z(to + swizzled(line, piece) + i * 128, from + i * o.row_step, i < left ? 16 : 0);
    }
  } else {
    // a warpgroup copies 16 lines at a time
    constexpr int GROUPS = THREADS / 128;
    const int line = tid >> 3 & 15, group = tid >> 7, rows = (int)min(o.rows - first, (int64_t)ROWS) - piece * 8, step = 16 * (int)o.depth_step;
    const T* from = o.p + first + piece * 8 + (k0 + line) * o.depth_step;
    UNROLL for (int j = 0; j < ROWS / 16; j += GROUPS) {
      const int part = j + group, block = part >> 2, i = part & 3;
      if (ROWS / 16 % GROUPS && part >= ROWS / 16) break;
      cp16z(to + swizzled(line, piece) + part * 16 * 128, from + i * step + block * 64, line + i * 16 < depth && block * 64 < rows ? 16 : 0);
    }
  }
}

/// The same 64 steps of both operands multiplied into this warpgroup's results, in the background.
template <class T, int N, bool AM, bool BM>
DEV void multiply_wide(float (&acc)[N / 2], const unsigned char* a, const unsigned char* b, int group, bool add) {
  UNROLL for (int k = 0; k < WIDE_STEP; k += 16) {
    const uint64_t x = AM ? depth_operand(a + group * 64 * 128, k, 64 * 128) : rows_operand(a, group * 64, k);
    const uint64_t y = BM ? depth_operand(b, k, 64 * 128) : rows_operand(b, 0, k);
    Wgmma<T, N>::template run<AM, BM>(acc, x, y, k > 0 || add);
  }
  wgmma_commit();
}

/// Which rows and columns of a tile a thread of a warpgroup holds.
struct WidePlace {
  int lane, warp, group, row0, column0;  // warp: of the block
  DEV explicit WidePlace(int tid) : lane(tid & 31), warp(tid >> 5), group(tid >> 7), row0(warp * 16 + (lane >> 2)), column0((lane & 3) * 2) {}
};

}  // namespace contrastive
}  // namespace smalti
