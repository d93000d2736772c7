// Order of lines against std::stable_sort: indices are exact.
#include "harness.hpp"
#include <algorithm>
#include <numeric>
using namespace smalti;
using test::Dev;

namespace {

template <class T> double number(T v) { return (double)widen(v); }

template <class T> std::vector<T> values(int64_t n, unsigned seed) {
  const auto noise = test::randn<float>((size_t)n, seed, 40.0);
  std::vector<T> v;
  for (float x : noise) {
    if constexpr (std::is_same_v<T, bool>) v.push_back(x > 0);
    else if constexpr (std::is_integral_v<T>) v.push_back((T)(int64_t)x);
    else v.push_back(narrow<T>(x > 60 ? (Acc<T>)NAN : x < -60 ? -(Acc<T>)INFINITY : (Acc<T>)(std::fabs(x) < 5 ? x * 0 : x)));
  }
  return v;
}

template <class T> void check(int64_t lines, int64_t n, int64_t k, bool descending) {
  const auto v = values<T>(lines * n, (unsigned)(n + k));
  std::vector<int64_t> want;
  for (int64_t l = 0; l < lines; l++) {
    std::vector<int64_t> row(n);
    std::iota(row.begin(), row.end(), 0);
    std::stable_sort(row.begin(), row.end(), [&](int64_t a, int64_t b) {
      const double x = number(v[l * n + (descending ? b : a)]), y = number(v[l * n + (descending ? a : b)]);
      return std::isnan(y) ? !std::isnan(x) : x < y;
    });
    want.insert(want.end(), row.begin(), row.begin() + k);
  }
  Dev<T> x(v.size());
  {
    std::vector<unsigned char> bytes(v.size() * sizeof(T));
    for (size_t i = 0; i < v.size(); i++) { const T one = v[i]; std::memcpy(&bytes[i * sizeof(T)], &one, sizeof(T)); }
#if defined(__CUDACC__)
    cudaMemcpy(x.p, bytes.data(), bytes.size(), cudaMemcpyHostToDevice);
#else
    std::memcpy((void*)x.p, bytes.data(), bytes.size());
#endif
  }
  Dev<int64_t> index(lines * k);
  Dev<double> work(smalti_argsort_workspace(lines, n, k, test::dtype_of<T>()) / 8 + 2);
  const auto vx = test::view(x, {lines, n}), vi = test::view(index, {lines, k});
  CHECK_RC(smalti_argsort(&vx, descending, &vi, work.p, nullptr));
  test::check_same("order", index.get(), want);
}

template <class T> void all(int64_t n) {
  for (bool descending : {false, true}) {
    check<T>(3, n, n, descending);
    check<T>(2, n, (n + 3) / 4, descending);
  }
}

}  // namespace

TEST(sort_lines_of_a_warp) {
  for (int64_t n : {1, 5, 32, 33, 100, 256, 500}) all<float>(n);
  all<bf16>(70);
  all<f16>(130);
  all<double>(70);
  all<double>(600);
  all<int64_t>(300);
  all<int32_t>(50);
  all<uint8_t>(200);
  all<bool>(90);
  check<float>(1, 1024, 1024, true);
}

TEST(sort_long_lines) {
  check<float>(2, 1025, 1025, false);
  check<float>(1, 5000, 5000, true);
  check<float>(2, 4097, 5, true);
  check<float>(1, 7000, 1500, false);
  check<double>(1, 3000, 3000, true);
  check<int64_t>(1, 2500, 1100, false);
  check<bf16>(1, 3000, 3000, false);
  check<uint8_t>(1, 2048, 2048, true);
}

TEST(sort_refuses) {
  Dev<float> x(6);
  Dev<int64_t> index(8);
  const auto vx = test::view(x, {2, 3}), vi = test::view(index, {2, 4});
  CHECK(smalti_argsort(&vx, 0, &vi, nullptr, nullptr) == kInvalid);
  // places of 32 bits do not reach so far
  const auto far = test::view(x, {1, (int64_t)1 << 32}), one = test::view(index, {1, 1});
  CHECK(smalti_argsort(&far, 0, &one, nullptr, nullptr) == kInvalid);
}
