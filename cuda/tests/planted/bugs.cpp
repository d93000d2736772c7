// Mistakes that kernels are prone to, each behind a macro. scripts/planted_bugs.sh builds them one by one and
// fails unless the emulator or a sanitizer finds each, and finds nothing in the program without them.
#include "../../common/dtype.cuh"
#include "../../wgmma.cuh"
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

/// z = 32 in each of 64 x 32 places: the product of ones, 32 deep, by a warpgroup.
__global__ void matrices(float* z) {
  DYN_SMEM(a);
  unsigned char* b = a + 64 * 128;
  const int t = threadIdx.x;
  for (int i = t; i < 96 * 64; i += 128) ((bf16*)a)[i] = {0x3f80};
#if !defined(BUG_NO_PROXY)
  proxy_fence();
#endif
  __syncthreads();
  float c[16];
#if !defined(BUG_NO_FENCE)
  wgmma_fence(c);
#endif
  for (int k = 0; k < 32; k += 16) Wgmma<bf16, 32>::run<false, false>(c, rows_operand(a, 0, k), rows_operand(b, 0, k), k > 0);
  wgmma_commit();
#if defined(BUG_EARLY)
  for (int i = t; i < 96 * 64; i += 128) ((bf16*)a)[i] = {0};
#endif
#if defined(BUG_NO_ARRIVAL)
  for (int i = 0; i < 16; i++) z[t * 16 + i] = c[i];
#endif
  wgmma_wait<0>(c);
#if !defined(BUG_NO_ARRIVAL)
  for (int i = 0; i < 16; i++) z[t * 16 + i] = c[i];
#endif
}

int main(int argc, char** argv) {
  simt::seed() = argc > 1 ? (uint32_t)std::atoi(argv[1]) : 0;
  float *x = (float*)aligned_alloc(16, kThreads * 4), *y = (float*)aligned_alloc(16, kThreads * 4);
  float sums[2] = {0, 0};
  for (int i = 0; i < kThreads; i++) sums[i / 32] += x[i] = (float)i;
  int rc = 0, wrong = 0;
  LAUNCH(rc, kernel, dim3(2), dim3(kThreads), 2 * kThreads * sizeof(float), nullptr, x, y);
  for (int i = 0; i < kThreads; i++) wrong += !(y[i] == sums[i / 32] + x[(i + 32) % kThreads]);
  float* z = (float*)aligned_alloc(16, 64 * 32 * 4);
  LAUNCH(rc, matrices, dim3(1), dim3(128), 96 * 128, nullptr, z);
  for (int i = 0; i < 64 * 32; i++) wrong += !(z[i] == 32.f);
  if (wrong) std::printf("%d of %d results are wrong\n", wrong, kThreads + 64 * 32);
  free(z);
  free(x);
  free(y);
  return rc || wrong;
}
