// The emulator and the conversions themselves.
#include "harness.hpp"
#include "../common/philox.cuh"
#include "../common/reduce.cuh"
using namespace smalti;

__global__ void sums(const float* x, float* y, int n) {
  DYN_SMEM(raw);
  float s = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) s += x[i];
  s = block_sum(s, (float*)raw);
  if (threadIdx.x == 0) y[blockIdx.x] = s;
}

TEST(emulator_block_sum) {
  std::vector<float> host(1000);
  double want = 0;
  for (size_t i = 0; i < host.size(); i++) want += host[i] = (float)i;
  test::Dev<float> x(host), y(3);
  int rc = 0;
  LAUNCH(rc, sums, dim3(3), dim3(128), 4 * sizeof(float), nullptr, x.p, y.p, 1000);
  CHECK_RC(rc);
  test::check_close("sums", y.get(), {want, want, want}, 1e-7);
}

TEST(emulator_half_conversions) {
  // every f16 and bf16 survives the way to f32 and back
  int bad = 0;
  for (uint32_t b = 0; b < 65536; b++) {
    const f16 h{(uint16_t)b};
    const bf16 w{(uint16_t)b};
    if ((b & 0x7fff) <= 0x7c00 && f2h(h2f(h)).x != b) bad++;
    if ((b & 0x7fff) <= 0x7f80 && f2bf(bf2f(w)).x != b) bad++;
  }
  CHECK(bad == 0);
  CHECK(f2h(65520.f).x == 0x7c00 && f2h(65519.f).x == 0x7bff && f2h(5.96e-8f).x == 1 && std::isnan(h2f({0x7e00})));
}

TEST(emulator_divisor) {
  int bad = 0;
  const int64_t far = (int64_t)1 << 31;
  for (int64_t d : {(int64_t)1, (int64_t)2, (int64_t)3, (int64_t)7, (int64_t)49, (int64_t)768, (int64_t)65535, (int64_t)65537, far / 2 - 1, far / 2, far / 2 + 1,
                    far - 1, far, far + 1, far * 1024}) {
    const Divisor by(d);
    for (int64_t m = 0; m < 1000; m++)
      for (int64_t n : {m, m * d - 1, m * d, far / 3 + m, far / d * d - 1 - m * d, far - 1 - m})
        if (n >= 0 && n < far && by.of((uint32_t)n) != n / d) bad++;
  }
  CHECK(bad == 0);
}

__global__ void words(uint32_t* out) {
  const Words w = philox(~0ull, ~0ull, ~0ull);
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = w.w[i];
}

// A known answer of the Random123 distribution (kat_vectors, philox4x32 10); src/random.rs has it too.
TEST(emulator_philox) {
  test::Dev<uint32_t> out(128);
  int rc = 0;
  LAUNCH_FLAT(rc, words, dim3(1), dim3(32), nullptr, out.p);
  CHECK_RC(rc);
  const auto w = out.get();
  CHECK(w[0] == 0x408f276d && w[1] == 0x41c83b0e && w[2] == 0xa20bc7c6 && w[3] == 0x6d5451fd && w[127] == w[3]);
}
