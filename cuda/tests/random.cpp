// Random numbers and dropout against the generator written out, on the host.
#include "harness.hpp"
using namespace smalti;
using test::Dev;

namespace {

constexpr uint64_t kSeed = 0x123456789abcdeull, kStream = 77, kBlockNumber = (1ull << 32) - 2;

uint32_t word(uint64_t index) {
  index += 4 * kBlockNumber;
  uint32_t c[4] = {(uint32_t)(index / 4), (uint32_t)(index / 4 >> 32), (uint32_t)kStream, (uint32_t)(kStream >> 32)};
  uint32_t k[2] = {(uint32_t)kSeed, (uint32_t)(kSeed >> 32)};
  for (int round = 0; round < 10; round++) {
    const uint64_t a = (uint64_t)c[0] * 0xD2511F53u, b = (uint64_t)c[2] * 0xCD9E8D57u;
    const uint32_t n[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k[0], (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k[1], (uint32_t)a};
    std::memcpy(c, n, sizeof n);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return c[index % 4];
}
double unit(uint64_t index) { return (double)(word(index) >> 8) / 16777216.0; }

template <class T> void drop(int64_t n, uint32_t threshold) {
  const auto x = test::randn<T>(n, 3);
  const double scale = 1.0 / 0.7;
  std::vector<T> want;
  for (int64_t i = 0; i < n; i++)
    want.push_back(narrow<T>(widen(x[i]) * (word(i) >= threshold ? (Acc<T>)scale : (Acc<T>)0)));
  Dev<T> d(x), y(n);
  const auto vx = test::view(d, {n}), vy = test::view(y, {n});
  CHECK_RC(smalti_dropout(&vx, kSeed, kStream, kBlockNumber, threshold, scale, &vy, nullptr));
  test::check_same("dropout", y.get(), want);
}

}  // namespace

TEST(random_uniform) {
  for (int64_t n : {1, 4, 1001}) {
    Dev<float> y(n);
    const auto v = test::view(y, {n});
    CHECK_RC(smalti_random(kSeed, kStream, kBlockNumber, 0, &v, nullptr));
    std::vector<float> want;
    for (int64_t i = 0; i < n; i++) want.push_back((float)unit(i));
    test::check_same("rand", y.get(), want);
  }
}

TEST(random_normal) {
  const int64_t n = 40003;
  Dev<float> y(n);
  const auto v = test::view(y, {n});
  CHECK_RC(smalti_random(kSeed, kStream, kBlockNumber, 1, &v, nullptr));
  std::vector<double> want;
  for (int64_t i = 0; i < n; i++) {
    const double radius = std::sqrt(-2 * std::log(1 - unit(i & ~1))), angle = 2 * M_PI * unit(i | 1);
    want.push_back(radius * (i & 1 ? std::sin(angle) : std::cos(angle)));
  }
  test::check_close("randn", y.get(), want, 2e-7);
  // src/ops/create.rs has the same bits
  CHECK(f2bits(y.get()[0]) == 0x3f3ffebb && f2bits(y.get()[1]) == 0xbeceabc7 && f2bits(y.get()[40002]) == 0x3fd04951);
}

TEST(random_dropout) {
  for (int64_t n : {3, 64, 1005}) {
    drop<float>(n, 1288490189u);
    drop<bf16>(n, 1288490189u);
    drop<f16>(n, 1288490189u);
    drop<double>(n, 1288490189u);
  }
  drop<float>(9, ~0u);
}
