// The only file that knows which compiler reads the kernels: nvcc, or a host compiler with the emulator.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define DEV __device__ __forceinline__
#define HOST_DEV __host__ __device__ __forceinline__
#define UNROLL _Pragma("unroll")
/// A loop that stays one, and a function that is called: unrolled and inlined they would only make code.
#define ROLLED _Pragma("unroll 1")
#define APART static __device__ __noinline__
/// Dynamic shared memory of the block, 1024-byte aligned. Kernels use no other.
#define DYN_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
/// Launches `kernel`; `rc` (an int that is 0 before) takes the status. Use it as a statement.
#define LAUNCH(rc, kernel, grid, block, smem, stream, ...)                                                   \
  do {                                                                                                       \
    if ((smem) > 48 * 1024)                                                                                  \
      rc = (int)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(smem));      \
    if (!rc) {                                                                                               \
      kernel<<<grid, block, smem, (cudaStream_t)(stream)>>>(__VA_ARGS__);                                    \
      rc = (int)cudaGetLastError();                                                                          \
    }                                                                                                        \
  } while (0)
/// The same for kernels without shared memory, barriers and warp operations; the emulator runs them as loops.
#define LAUNCH_FLAT(rc, kernel, grid, block, stream, ...) LAUNCH(rc, kernel, grid, block, 0, stream, __VA_ARGS__)
#else
#include "emulate/simt.hpp"
#define DEV inline
#define HOST_DEV inline
#define UNROLL
#define ROLLED
#define APART inline
#define DYN_SMEM(name) unsigned char* name = simt::ctx().dyn
#define LAUNCH(rc, kernel, grid, block, smem, stream, ...)                                                   \
  do {                                                                                                       \
    simt::launch(stream, grid, block, smem, false, simt::bind(kernel, __VA_ARGS__));                         \
    rc = 0;                                                                                                  \
  } while (0)
#define LAUNCH_FLAT(rc, kernel, grid, block, stream, ...)                                                    \
  do {                                                                                                       \
    simt::launch(stream, grid, block, 0, true, simt::bind(kernel, __VA_ARGS__));                             \
    rc = 0;                                                                                                  \
  } while (0)
#endif

namespace smalti {

/// Blocks of a grid-stride kernel over `n` items with `block` threads: enough to fill the device, never more
/// than there is work for, and at least one.
inline unsigned grid_for(int64_t n, int64_t block) {
#if defined(__CUDACC__)
  const int64_t most = 132 * 16;
#else
  const int64_t most = 4;
#endif
  const int64_t want = (n + block - 1) / block;
  return (unsigned)(want < 1 ? 1 : want < most ? want : most);
}

/// a / b for numbers that are seldom large: 32 bits are divided where that is enough, as nvcc does by itself.
HOST_DEV int64_t divide(int64_t a, int64_t b) {
#if defined(__CUDACC__)
  return a / b;
#else
  return ((uint64_t)a | (uint64_t)b) >> 32 ? a / b : (int64_t)((uint32_t)a / (uint32_t)b);
#endif
}

/// Division of numbers below 2^31 by one that a launcher knows: a product and a shift in the place of some twenty
/// instructions (Granlund and Montgomery, PLDI 1994).
struct Divisor {
  uint32_t factor = 0;
  int32_t shift = 31;  // as it stands, of anything larger than the numbers: 0

  Divisor() = default;
  explicit Divisor(int64_t d) {
    if (d < 1 || d > (int64_t)1 << 31) return;
    for (shift = 0; (int64_t)1 << shift < d;) shift++;
    const uint64_t rest = ((uint64_t)1 << shift) - (uint64_t)d;
    factor = (uint32_t)((rest << 32) / (uint64_t)d + 1);
  }
  HOST_DEV uint32_t of(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    return (__umulhi(n, factor) + n) >> shift;
#else
    return ((uint32_t)((uint64_t)n * factor >> 32) + n) >> shift;
#endif
  }
};

/// Goes `c` steps along dimension `d` of N tensors. For one tensor without a loop: one of a single turn, at the end of
/// another that is ROLLED, makes nvcc forget that.
template <int N> HOST_DEV void advance(const int64_t (&stride)[N][8], int d, int64_t c, int64_t (&offset)[N]) {
  if constexpr (N == 1) {
    offset[0] += c * stride[0][d];
  } else {
    UNROLL for (int k = 0; k < N; k++) offset[k] += c * stride[k][d];
  }
}

/// Status of a launcher that was handed something it does not do (an invalid value, in CUDA's numbering).
constexpr int32_t kInvalid = 1;

}  // namespace smalti
