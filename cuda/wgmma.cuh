// Matrix instructions of a warpgroup (wgmma, sm_90a): 128 threads multiply 64 x 16 by 16 x N in the background, operands in
// shared memory, results in registers. Kernels that use them stand in folders named sm90.
//
//   proxy_fence(); __syncthreads();   // the operands were written by threads or cp.async
//   wgmma_fence(c);
//   Wgmma<T, 128>::run<false, false>(c, rows_operand(a, 0, k), rows_operand(b, 0, k), k > 0);
//   wgmma_commit();
//   wgmma_wait<0>(c);
#pragma once
#include "mma.cuh"
#if !defined(__CUDACC__)
#include "emulate/wgmma.hpp"
#endif

namespace smalti {

/// Byte offset of a 16-byte piece in a tile of lines of 128 bytes (64 values): the 128-byte swizzle. Tiles start at
/// multiples of 1024 bytes.
HOST_DEV int swizzled(int line, int piece) { return line * 128 + ((piece ^ (line & 7)) << 4); }

/// The 32-bit address of shared memory.
#if defined(__CUDACC__)
DEV uint32_t shared_address(const void* p) { return sptr(p); }
#else
inline uint32_t shared_address(const void* p) { return (uint32_t)((const unsigned char*)p - simt::ctx().dyn + simt::kSharedStart); }
#endif

/// Descriptor of what begins `offset` pieces of 16 bytes into a tile, with the distance `lead` in bytes (PTX ISA, "Matrix
/// Descriptor Format"): the offset is added last, so that operands of one tile differ by one addition.
DEV uint64_t descriptor(const void* tile, int lead, int offset) {
  const uint32_t start = shared_address(tile) >> 4 & 0x3fff;
  return (uint64_t)(1u << 30 | 1024 >> 4) << 32 | ((start | (uint32_t)(lead >> 4) << 16) + offset);
}
/// Descriptor of an operand in a tile whose line i is row i (of a right operand, column i) with 64 steps of the depth: from
/// `row`, a multiple of 8, and `k`, a multiple of 16 (K-major, where the lead means nothing).
DEV uint64_t rows_operand(const void* tile, int row, int k) { return descriptor(tile, 16, row * 8 + k / 8); }
/// The same where line i is step i of the depth with 64 rows, the next 64 rows `apart` bytes on; `k` is a multiple of 8
/// (MN-major).
DEV uint64_t depth_operand(const void* tile, int k, int apart) { return descriptor(tile, apart, k * 8); }

/// c (+)= A B^T for 64 rows of A and N rows of B, 16 steps deep. Thread t of the warpgroup holds, as value i, row
/// t / 32 * 16 + t % 32 / 4 + (i / 2 % 2) * 8 and column i / 4 * 8 + t % 4 * 2 + i % 2: the layout of mma.sync.
/// `A_DEPTH`, `B_DEPTH`: the descriptor is a depth_operand. `add`: else c starts from zero.
template <class T, int N> struct Wgmma;

#if defined(__CUDACC__)
// Operand lists of inline assembly cannot be made by templates: eight registers a piece, from these two.
#define SMALTI_C8(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), "+f"(c[i + 6]), "+f"(c[i + 7])
#define SMALTI_R8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define SMALTI_C_32 SMALTI_C8(0), SMALTI_C8(8)
#define SMALTI_R_32 SMALTI_R8(0, 1, 2, 3, 4, 5, 6, 7) "," SMALTI_R8(8, 9, 10, 11, 12, 13, 14, 15)
#define SMALTI_C_48 SMALTI_C_32, SMALTI_C8(16)
#define SMALTI_R_48 SMALTI_R_32 "," SMALTI_R8(16, 17, 18, 19, 20, 21, 22, 23)
#define SMALTI_C_64 SMALTI_C_48, SMALTI_C8(24)
#define SMALTI_R_64 SMALTI_R_48 "," SMALTI_R8(24, 25, 26, 27, 28, 29, 30, 31)
#define SMALTI_C_80 SMALTI_C_64, SMALTI_C8(32)
#define SMALTI_R_80 SMALTI_R_64 "," SMALTI_R8(32, 33, 34, 35, 36, 37, 38, 39)
#define SMALTI_C_96 SMALTI_C_80, SMALTI_C8(40)
#define SMALTI_R_96 SMALTI_R_80 "," SMALTI_R8(40, 41, 42, 43, 44, 45, 46, 47)
#define SMALTI_C_112 SMALTI_C_96, SMALTI_C8(48)
#define SMALTI_R_112 SMALTI_R_96 "," SMALTI_R8(48, 49, 50, 51, 52, 53, 54, 55)
#define SMALTI_C_128 SMALTI_C_112, SMALTI_C8(56)
#define SMALTI_R_128 SMALTI_R_112 "," SMALTI_R8(56, 57, 58, 59, 60, 61, 62, 63)
#define SMALTI_C_192 SMALTI_C_128, SMALTI_C8(64), SMALTI_C8(72), SMALTI_C8(80), SMALTI_C8(88)
#define SMALTI_R_192 SMALTI_R_128 "," SMALTI_R8(64, 65, 66, 67, 68, 69, 70, 71) "," SMALTI_R8(72, 73, 74, 75, 76, 77, 78, 79) "," SMALTI_R8(80, 81, 82, 83, 84, 85, 86, 87) "," SMALTI_R8(88, 89, 90, 91, 92, 93, 94, 95)
#define SMALTI_C_224 SMALTI_C_192, SMALTI_C8(96), SMALTI_C8(104)
#define SMALTI_R_224 SMALTI_R_192 "," SMALTI_R8(96, 97, 98, 99, 100, 101, 102, 103) "," SMALTI_R8(104, 105, 106, 107, 108, 109, 110, 111)
#define SMALTI_C_256 SMALTI_C_224, SMALTI_C8(112), SMALTI_C8(120)
#define SMALTI_R_256 SMALTI_R_224 "," SMALTI_R8(112, 113, 114, 115, 116, 117, 118, 119) "," SMALTI_R8(120, 121, 122, 123, 124, 125, 126, 127)
// The last seven: numbers of the operands behind the results.
#define SMALTI_WGMMA(T, TYPE, N, I0, I1, I2, I3, I4, I5, I6)                                                        \
  template <> struct Wgmma<T, N> {                                                                                  \
    template <bool A_DEPTH, bool B_DEPTH> DEV static void run(float (&c)[N / 2], uint64_t a, uint64_t b, bool add) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
                   " {" SMALTI_R_##N "}, %" #I0 ", %" #I1 ", p, 1, 1, %" #I3 ", %" #I4 ";\n}\n"                       \
                   : SMALTI_C_##N : "l"(a), "l"(b), "r"((int)add), "n"((int)A_DEPTH), "n"((int)B_DEPTH));            \
    }                                                                                                               \
    template <bool B_DEPTH> DEV static void run(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #I5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE \
                   " {" SMALTI_R_##N "}, {%" #I0 ", %" #I1 ", %" #I2 ", %" #I3 "}, %" #I4 ", p, 1, 1, %" #I6 ";\n}\n" \
                   : SMALTI_C_##N : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add), "n"((int)B_DEPTH)); \
    }                                                                                                               \
  };
#define SMALTI_WGMMA_SIZE(N, ...) SMALTI_WGMMA(bf16, "bf16", N, __VA_ARGS__) SMALTI_WGMMA(f16, "f16", N, __VA_ARGS__)
SMALTI_WGMMA_SIZE(32, 16, 17, 18, 19, 20, 21, 22)
SMALTI_WGMMA_SIZE(64, 32, 33, 34, 35, 36, 37, 38)
SMALTI_WGMMA_SIZE(80, 40, 41, 42, 43, 44, 45, 46)
SMALTI_WGMMA_SIZE(112, 56, 57, 58, 59, 60, 61, 62)
SMALTI_WGMMA_SIZE(128, 64, 65, 66, 67, 68, 69, 70)
SMALTI_WGMMA_SIZE(192, 96, 97, 98, 99, 100, 101, 102)
SMALTI_WGMMA_SIZE(256, 128, 129, 130, 131, 132, 133, 134)

DEV void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEV void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/// Keeps the compiler from moving what it does with the registers over this point.
template <int N> DEV void hold(float (&c)[N]) { UNROLL for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory"); }
/// Before the first wgmma, and before one whose registers something else has written since.
template <int... N> DEV void wgmma_fence(float (&... c)[N]) {
  (hold(c), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/// Until at most PENDING of the committed batches are on their way; `c`: the results that have arrived.
template <int PENDING, int... N> DEV void wgmma_wait(float (&... c)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
  (hold(c), ...);
}
#else
template <class T> inline float widen_bits(uint32_t h);
template <> inline float widen_bits<bf16>(uint32_t h) { return bf2f({(uint16_t)h}); }
template <> inline float widen_bits<f16>(uint32_t h) { return h2f({(uint16_t)h}); }
template <class T, int N> struct Wgmma {
  template <bool A_DEPTH, bool B_DEPTH> static void run(float (&c)[N / 2], uint64_t a, uint64_t b, bool add, int line = __builtin_LINE()) {
    simt::issue({{a, A_DEPTH}, {b, B_DEPTH}, false, add, N, widen_bits<T>}, nullptr, c, line);
  }
  template <bool B_DEPTH> static void run(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add, int line = __builtin_LINE()) {
    simt::issue({{0, false}, {b, B_DEPTH}, true, add, N, widen_bits<T>}, a, c, line);
  }
};
inline void proxy_fence() { simt::proxy_fence(); }
inline void wgmma_commit(int line = __builtin_LINE()) { simt::commit(line); }
template <int... N> inline void wgmma_fence(float (&... c)[N]) { ((void)c, ...); simt::fence(0); }
template <int PENDING, int... N> inline void wgmma_wait(float (&... c)[N]) { ((void)c, ...); simt::wait(PENDING, 0); }
#endif

}  // namespace smalti
