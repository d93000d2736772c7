// Five mistakes that kernels are prone to, each behind a macro. scripts/planted_bugs.sh builds them one by one and
// fails unless the emulator or a sanitizer finds each, and finds nothing in the program without them.
#include "../../common/dtype.cuh"
#include <cstdio>
#include <cstdlib>
#include <vector>
using namespace smalti;

constexpr int kThreads = 64;

/// y[i] = sum over the warp's 32 values of x, each read from its neighbour's place, plus what the other warp loaded.
__global__ void kernel(const float* x, float* y) {
  DYN_SMEM(raw);
  float* loaded = (float*)raw;           // 64 floats, by cp.async
  float* scratch = loaded + kThreads;    // 64 floats, each warp its half
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  if (lane < 8) cp16(loaded + warp * 32 + lane * 4, x + warp * 32 + lane * 4);
  cp_commit();
#if defined(BUG_NO_WAIT)
  cp_wait<1>();
#else
  cp_wait<0>();
#endif
#if !defined(BUG_NO_SYNC)
  __syncthreads();
#endif
  const float other = loaded[(t + 32) % kThreads];
  scratch[t] = x[t];
#if !defined(BUG_NO_SYNCWARP)
  __syncwarp();
#endif
  float v = scratch[warp * 32 + (lane + 1) % 32];
#if defined(BUG_OOB)
  if (t == 0) scratch[kThreads] = 1.f;
#endif
#if defined(BUG_ONE_LANE)
  if (lane < 12) v += __shfl_xor_sync(~0u, v, 1);
#endif
  for (int m = 16; m > 0; m >>= 1) v += __shfl_xor_sync(~0u, v, m);
  y[t] = v + other;
  cp_wait<0>();
}

int main(int argc, char** argv) {
  simt::seed() = argc > 1 ? (uint32_t)std::atoi(argv[1]) : 0;
  float *x = (float*)aligned_alloc(16, kThreads * 4), *y = (float*)aligned_alloc(16, kThreads * 4);
  float sums[2] = {0, 0};
  for (int i = 0; i < kThreads; i++) sums[i / 32] += x[i] = (float)i;
  int rc = 0, wrong = 0;
  LAUNCH(rc, kernel, dim3(2), dim3(kThreads), 2 * kThreads * sizeof(float), nullptr, x, y);
  for (int i = 0; i < kThreads; i++) wrong += !(y[i] == sums[i / 32] + x[(i + 32) % kThreads]);
  if (wrong) std::printf("%d of %d results are wrong\n", wrong, kThreads);
  free(x);
  free(y);
  return rc || wrong;
}
