// The matrix instructions of a warpgroup by themselves: both layouts of both operands, and A in registers. On a GPU this
// is what shows that the descriptors mean what the emulator takes them to mean.
#include "harness.hpp"
#include "../common/hopper.cuh"
#include "../wgmma.cuh"
using namespace smalti;
using test::Dev;

// This file is compiled for other GPUs too.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ON_SM90(...) __VA_ARGS__
#else
#define ON_SM90(...)
#endif

namespace {

constexpr int kDepth = 128;  // two tiles of 64

/// An operand [rows, depth] to shared memory in the layout of rows_operand or of depth_operand, for each 64 of the depth.
template <class T> DEV void put(unsigned char* to, const T* from, int rows, bool by_depth) {
  for (int i = threadIdx.x; i < rows * kDepth; i += blockDim.x) {
    const int r = i / kDepth, k = i % kDepth, tile = k / 64 * rows * 128;
    const int line = by_depth ? k % 64 : r, place = by_depth ? r % 64 : k % 64;
    const int block = by_depth ? r / 64 * 64 * 128 : 0;
    *(T*)(to + tile + block + swizzled(line, place / 8) + place % 8 * 2) = from[i];
  }
}

template <class T, int N, bool AD, bool BD, bool REGISTERS>
__global__ void __launch_bounds__(256) product(const T* a, const T* b, float* out) {
  ON_SM90(
    DYN_SMEM(shared);
    unsigned char *sa = shared, *sb = shared + 128 * kDepth * 2;
    put(sa, a, 128, AD);
    put(sb, b, N, BD);
    proxy_fence();
    __syncthreads();
    const int t = threadIdx.x & 127, group = threadIdx.x >> 7;
    float c[N / 2];
    UNROLL for (int i = 0; i < N / 2; i++) c[i] = 1.f;
    wgmma_fence(c);
    UNROLL for (int k = 0; k < kDepth; k += 16) {
      const unsigned char *ta = sa + k / 64 * 128 * 128, *tb = sb + k / 64 * N * 128;
      const uint64_t y = BD ? depth_operand(tb, k % 64, 64 * 128) : rows_operand(tb, 0, k % 64);
      if (REGISTERS) {
        uint32_t x[4];
        UNROLL for (int e = 0; e < 4; e++) {
          const int row = group * 64 + (t >> 5) * 16 + (t & 31) / 4 + (e & 1) * 8, at = k + (t & 3) * 2 + (e >> 1) * 8;
          x[e] = *(const uint32_t*)(a + row * kDepth + at);
        }
        Wgmma<T, N>::template run<BD>(c, x, y, k > 0);
      } else {
        const uint64_t x = AD ? depth_operand(ta + group * 64 * 128, k % 64, 64 * 128) : rows_operand(ta, group * 64, k % 64);
        Wgmma<T, N>::template run<AD, BD>(c, x, y, k > 0);
      }
      wgmma_commit();
    }
    wgmma_wait<0>(c);
    UNROLL for (int i = 0; i < N / 2; i++)
      out[(group * 64 + (t >> 5) * 16 + (t & 31) / 4 + (i >> 1 & 1) * 8) * N + i / 4 * 8 + (t & 3) * 2 + (i & 1)] = c[i];
  )
}

template <class T, int N, bool AD, bool BD, bool REGISTERS> void check(const char* what) {
  const auto a = test::randn<T>(128 * kDepth, 1), b = test::randn<T>(N * kDepth, 2);
  const auto wa = test::wide(a), wb = test::wide(b);
  std::vector<double> want;
  for (int i = 0; i < 128; i++) for (int j = 0; j < N; j++) {
    double s = 0;
    for (int k = 0; k < kDepth; k++) s += wa[i * kDepth + k] * wb[j * kDepth + k];
    want.push_back(s);
  }
  Dev<T> x(a), y(b);
  Dev<float> out((size_t)128 * N);
  int rc = 0;
  auto kernel = product<T, N, AD, BD, REGISTERS>;
  const int shared = (128 + (N + 63) / 64 * 64) * kDepth * 2;
  LAUNCH(rc, kernel, dim3(1), dim3(256), shared, nullptr, x.p, y.p, out.p);
  CHECK_RC(rc);
  test::check_close(what, out.get(), want, 1e-5);
}

}  // namespace

TEST(wgmma_layouts) {
  const test::Wgmma on;
  if (!wgmma_here()) return;
  check<bf16, 64, false, false, false>("rows by rows");
  check<bf16, 128, false, true, false>("rows by depth");
  check<bf16, 256, true, true, false>("depth by depth");
  check<f16, 192, true, false, false>("depth by rows");
}

TEST(wgmma_registers) {
  const test::Wgmma on;
  if (!wgmma_here()) return;
  check<bf16, 80, false, false, true>("registers by rows");
  check<f16, 128, false, true, true>("registers by depth");
}
