// Bias + GELU and its backward, column sums: against f64, in all dtypes, with and without 16-byte packs.
#include "harness.hpp"
using namespace smalti;

namespace {

struct Rng {
  std::mt19937_64 source{7};
  double operator()() { return std::normal_distribution<double>()(source); }
};

template <class T> std::vector<T> values(size_t n, Rng& rng) {
  std::vector<T> v(n);
  for (auto& x : v) x = narrow<T>((Acc<T>)rng());
  return v;
}

smalti_view view(void* p, int dtype, std::vector<int64_t> shape) {
  smalti_view v{};
  v.ptr = p;
  v.dtype = dtype;
  v.rank = (int)shape.size();
  int64_t step = 1;
  for (int d = v.rank - 1; d >= 0; d--) {
    v.shape[d] = shape[d];
    v.stride[d] = step;
    step *= shape[d];
  }
  return v;
}

double phi(double z) { return 0.5 * (1 + std::erf(z / std::sqrt(2.))); }
double density(double z) { return std::exp(-0.5 * z * z) / std::sqrt(2 * M_PI); }

template <class T> std::vector<double> wide_copy(const std::vector<T>& v) {
  std::vector<double> out;
  for (auto x : v) out.push_back((double)widen(x));
  return out;
}

template <class T> void case_of(int64_t rows, int64_t columns, double tolerance) {
  Rng rng;
  const int dtype = test::dtype_of<T>();
  const size_t n = (size_t)(rows * columns);
  const auto p = values<T>(n, rng), b = values<T>((size_t)columns, rng), g = values<T>(n, rng);
  const auto pw = wide_copy(p), bw = wide_copy(b), gw = wide_copy(g);
  std::vector<double> y(n), dz(n), db((size_t)columns, 0.), sums((size_t)columns, 0.), scale((size_t)columns, 1e-30);
  for (size_t i = 0; i < n; i++) {
    const size_t c = i % (size_t)columns;
    const double z = pw[i] + bw[c];
    y[i] = z * phi(z);
    dz[i] = gw[i] * (phi(z) + z * density(z));
    db[c] += dz[i];
    sums[c] += gw[i];
    scale[c] += std::fabs(gw[i]);
  }
  test::Dev<T> dp(p), dbias(b), dg(g), dy(n), ddz(n), ddb((size_t)columns), dsums((size_t)columns);
  test::Dev<Acc<T>> partial((size_t)smalti_linear_partials(rows, columns));
  auto matrix = [&](void* q) { return view(q, dtype, {rows, columns}); };
  auto vector = [&](void* q) { return view(q, dtype, {columns}); };
  const auto vp = matrix(dp.p), vb = vector(dbias.p), vg = matrix(dg.p), vy = matrix(dy.p), vdz = matrix(ddz.p);
  const auto vdb = vector(ddb.p), vs = vector(dsums.p);
  CHECK_RC(smalti_linear_gelu_forward(&vp, &vb, &vy, nullptr));
  CHECK_RC(smalti_linear_gelu_backward(&vg, &vp, &vb, &vdz, &vdb, partial.p, nullptr));
  test::check_close("y", wide_copy(dy.get()), y, tolerance);
  test::check_close("dz", wide_copy(ddz.get()), dz, tolerance);
  const auto got = wide_copy(ddb.get());
  CHECK_RC(smalti_linear_column_sums(&vg, &vs, partial.p, nullptr));
  const auto got_sums = wide_copy(dsums.get());
  for (size_t c = 0; c < (size_t)columns; c++) {
    // relative to the sum of magnitudes: what cancels does not count
    CHECK(std::fabs(got[c] - db[c]) <= tolerance * scale[c]);
    CHECK(std::fabs(got_sums[c] - sums[c]) <= tolerance * scale[c]);
  }
}

template <class T> void cases(double tolerance) {
  case_of<T>(37, 64, tolerance);
  case_of<T>(200, 24, tolerance);
  case_of<T>(9, 7, tolerance);
  case_of<T>(1, 1, tolerance);
  case_of<T>(3, 300, tolerance);
}

}  // namespace

TEST(linear_f32) { cases<float>(1e-6); }
TEST(linear_f64) { cases<double>(1e-13); }
TEST(linear_bf16) { cases<bf16>(1. / 256); }
TEST(linear_f16) { cases<f16>(1. / 2048); }

TEST(linear_empty_and_refused) {
  test::Dev<float> x(6), y(3), partial(64);
  const auto none = view(x.p, SMALTI_F32, {0, 3}), vy = view(y.p, SMALTI_F32, {3});
  CHECK_RC(smalti_linear_column_sums(&none, &vy, partial.p, nullptr));
  const auto sums = y.get();
  CHECK(sums[0] == 0 && sums[1] == 0 && sums[2] == 0);
  auto strided = view(x.p, SMALTI_F32, {2, 3});
  strided.stride[0] = 1;
  CHECK(smalti_linear_column_sums(&strided, &vy, partial.p, nullptr) == kInvalid);
  const auto ints = view(x.p, SMALTI_I32, {2, 3}), vi = view(y.p, SMALTI_I32, {3});
  CHECK(smalti_linear_column_sums(&ints, &vi, partial.p, nullptr) == kInvalid);
}
