// 128 rows of queries against tiles of WIDE keys, one tile after the other: what the passes of forward and backward share.
#pragma once
#include "../sweep.cuh"
#include "tile.cuh"

namespace smalti {
namespace contrastive {

constexpr int PASS_THREADS = 256, PASS_VALUES = WIDE / 2;  // values of a tile that a thread holds
constexpr int PASS_ROWS = TILE * 128, PASS_STAGE = WIDE * 128;  // bytes of 64 steps of the queries, of the keys

HOST_DEV int wide_steps(int64_t depth) { return (int)((depth + WIDE_STEP - 1) / WIDE_STEP); }
/// Whether the queries' rows stay in shared memory.
inline bool resident(int64_t depth) { return wide_steps(depth) <= 8; }
/// Shared memory of a pass.
HOST_DEV int pass_bytes(int64_t depth, bool resident) {
  return (resident ? wide_steps(depth) : WIDE_STAGES) * PASS_ROWS + WIDE_STAGES * PASS_STAGE;
}

/// Keys from column `next` to `end` by way of the stages, the queries with them or, if RESIDENT, before them.
template <class T, bool RESIDENT> struct Pass {
  const Operand<T>&q, &k;
  unsigned char *rows, *stages;
  int64_t depth, first, next, end;
  int steps, tid, next_step = 0, slot = 0, stage = 0;  // of the next load: step and stage; stage of the next multiplication

  DEV Pass(const Operand<T>& q, const Operand<T>& k, unsigned char* shared, int64_t depth, int64_t first, int64_t begin, int64_t end, int tid)
      : q(q), k(k), rows(shared), stages(shared + pass_bytes(depth, RESIDENT) - WIDE_STAGES * PASS_STAGE), depth(depth), first(first), next(begin),
        end(end), steps(wide_steps(depth)), tid(tid) {
    for (int s = 0; RESIDENT && s < steps; s++) load_rows(s, s);
    load();
    load();
  }
  DEV void load_rows(int to, int step) {
    load_wide<T, false, TILE, PASS_THREADS>(rows + to * PASS_ROWS, q, first, step * WIDE_STEP, depth, tid);
  }
  DEV void load() {
    if (next < end) {
      if (!RESIDENT) load_rows(slot, next_step);
      load_wide<T, false, WIDE, PASS_THREADS>(stages + slot * PASS_STAGE, k, next, next_step * WIDE_STEP, depth, tid);
      if (++next_step == steps) { next_step = 0; next += WIDE; }
    }
    slot = (slot + 1) % WIDE_STAGES;
    cp_commit();
  }
  /// Issues the products of a tile.
  DEV void multiply(float (&acc)[PASS_VALUES], int group) {
    ROLLED for (int s = 0; s < steps; s++) {
      cp_wait<1>();
      proxy_fence();
      __syncthreads();  // the stage has landed, and the multiplication before the last has been waited for by all
      wgmma_fence();
      multiply_wide<T, WIDE, false, false>(acc, rows + (RESIDENT ? s : stage) * PASS_ROWS, stages + stage * PASS_STAGE, group, s > 0);
      load();
      wgmma_wait<1>();
      stage = (stage + 1) % WIDE_STAGES;
    }
  }
  /// Waits for them, and for everybody: the last two stages, 0 and 1, are then free until the next tile.
  DEV void finish(float (&acc)[PASS_VALUES]) {
    wgmma_wait<0>(acc);
    __syncthreads();
  }
  DEV unsigned char* free_stage(int i) const { return stages + (stage + WIDE_STAGES - 1 - i) % WIDE_STAGES * PASS_STAGE; }
};

}  // namespace contrastive
}  // namespace smalti
