// Elementwise operations and copies, on flat, strided and broadcast views.
#include "harness.hpp"
using namespace smalti;
using test::Dev;

static smalti_view strided_view(smalti_view v, std::vector<int64_t> shape, std::vector<int64_t> stride) {
  v.rank = (int)shape.size();
  for (int i = 0; i < v.rank; i++) { v.shape[i] = shape[i]; v.stride[i] = stride[i]; }
  return v;
}

/// Bytes seen as bools (std::vector<bool> has no bytes).
static smalti_view bools(const Dev<uint8_t>& d) {
  smalti_view v = test::view(d, {(int64_t)d.n});
  v.dtype = SMALTI_BOOL;
  return v;
}

template <class T> void gelu_like(double tolerance) {
  const auto x = test::randn<T>(1003, 1, 2.0), g = test::randn<T>(1003, 2);
  std::vector<double> want, slope;
  for (size_t i = 0; i < x.size(); i++) {
    const double v = (double)widen(x[i]), phi = 0.5 * std::erfc(-v / std::sqrt(2.0));
    want.push_back(v * phi);
    slope.push_back((double)widen(g[i]) * (phi + v * std::exp(-v * v / 2) / std::sqrt(2 * M_PI)));
  }
  Dev<T> dx(x), dg(g), y(x.size()), d(x.size());
  auto vx = test::view(dx, {1003}), vg = test::view(dg, {1003}), vy = test::view(y, {1003}), vd = test::view(d, {1003});
  CHECK_RC(smalti_unary_forward(SMALTI_GELU, 0, 0, &vx, &vy, nullptr));
  CHECK_RC(smalti_unary_backward(SMALTI_GELU, 0, 0, &vg, &vx, &vd, nullptr));
  test::check_close("gelu", y.get(), want, tolerance);
  test::check_close("gelu backward", d.get(), slope, tolerance);
}
TEST(elementwise_gelu) {
  gelu_like<float>(1e-6);
  gelu_like<bf16>(4e-3);
  gelu_like<f16>(5e-4);
  gelu_like<double>(1e-14);
}

TEST(elementwise_broadcast_and_order) {
  // a transposed operand, a repeated row; the result in the transposed order
  const auto a = test::randn<float>(7 * 5, 3), b = test::randn<float>(5, 4);
  Dev<float> da(a), db(b), dy(35);
  auto va = strided_view(test::view(da, {35}), {5, 7}, {1, 5}), vb = strided_view(test::view(db, {5}), {5, 7}, {1, 0});
  auto vy = strided_view(test::view(dy, {35}), {5, 7}, {1, 5});
  CHECK_RC(smalti_binary(SMALTI_SUB, &va, &vb, &vy, nullptr));
  std::vector<double> want;
  for (int c = 0; c < 7; c++) for (int r = 0; r < 5; r++) want.push_back((double)a[c * 5 + r] - b[r]);
  test::check_close("sub", dy.get(), want, 1e-6);
}

TEST(elementwise_integers_wrap_and_compare) {
  Dev<int32_t> a({INT32_MAX, -5, 7}), b({1, 3, 7}), y(3);
  Dev<uint8_t> c(3);
  auto va = test::view(a, {3}), vb = test::view(b, {3}), vy = test::view(y, {3}), vc = bools(c);
  CHECK_RC(smalti_binary(SMALTI_ADD, &va, &vb, &vy, nullptr));
  CHECK(y.get()[0] == INT32_MIN && y.get()[1] == -2);
  CHECK_RC(smalti_binary(SMALTI_GE, &va, &vb, &vc, nullptr));
  CHECK(c.get()[0] && !c.get()[1] && c.get()[2]);
  CHECK(smalti_binary(SMALTI_DIV, &va, &vb, &vy, nullptr) == 1);
  CHECK(smalti_binary(SMALTI_ADD, &va, &vc, &vy, nullptr) == 1);
}

TEST(copy_transposes_and_converts) {
  const auto x = test::randn<float>(3 * 40 * 50, 5);
  Dev<float> dx(x), dy(x.size());
  auto vx = strided_view(test::view(dx, {6000}), {3, 50, 40}, {2000, 1, 50}), vy = test::view(dy, {3, 50, 40});
  CHECK_RC(smalti_copy(&vx, &vy, nullptr));
  std::vector<double> want;
  for (int b = 0; b < 3; b++) for (int r = 0; r < 50; r++) for (int c = 0; c < 40; c++) want.push_back(x[b * 2000 + c * 50 + r]);
  test::check_close("transpose", dy.get(), want, 0);
  Dev<uint8_t> bytes(6);
  Dev<double> from({-1.0, 3.9, 255.5, 1e30, NAN, 0.2});
  auto vf = test::view(from, {6}), vb = test::view(bytes, {6});
  CHECK_RC(smalti_copy(&vf, &vb, nullptr));
  CHECK((bytes.get() == std::vector<uint8_t>{0, 3, 255, 255, 0, 0}));
  Dev<uint8_t> truth(6);
  auto vt = bools(truth);
  CHECK_RC(smalti_copy(&vf, &vt, nullptr));
  CHECK((truth.get() == std::vector<uint8_t>{1, 1, 1, 1, 1, 1}));
  CHECK_RC(smalti_fill(7.5, &vf, nullptr));
  CHECK(from.get()[3] == 7.5);
}

TEST(copy_joins_elements) {
  // rows of 32 halves out of rows of 40: 16 bytes at a time
  const auto x = test::randn<bf16>(10 * 40, 6);
  Dev<bf16> dx(x), dy(320);
  auto vx = strided_view(test::view(dx, {400}), {10, 32}, {40, 1}), vy = test::view(dy, {10, 32});
  CHECK_RC(smalti_copy(&vx, &vy, nullptr));
  std::vector<bf16> want;
  for (int r = 0; r < 10; r++) want.insert(want.end(), x.begin() + r * 40, x.begin() + r * 40 + 32);
  test::check_same("rows", dy.get(), want);
}

TEST(elementwise_where) {
  Dev<uint8_t> c({1, 0, 1});
  Dev<float> a({1, 2, 3}), b({-1, -2, -3}), y(3);
  auto vc = bools(c), va = test::view(a, {3}), vb = test::view(b, {3}), vy = test::view(y, {3});
  CHECK_RC(smalti_where(&vc, &va, &vb, &vy, nullptr));
  CHECK((y.get() == std::vector<float>{1, -2, 3}));
}
