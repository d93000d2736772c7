// Softmax against the definition in f64: rows in registers of a warp and of blocks, long rows, columns, views.
#include "harness.hpp"
using namespace smalti;
using test::Dev;

namespace {

struct Case { std::vector<int64_t> shape; int dim; bool transposed; };  // transposed: the first two dimensions in memory

smalti_view view_of(const Case& c, smalti_view v) {
  if (c.transposed) { std::swap(v.stride[0], v.stride[1]); std::swap(v.shape[0], v.shape[1]); }
  return v;
}
/// Runs f on each row: positions (from element 0 on) of its elements.
template <class F> void rows(const smalti_view& v, int dim, F f) {
  int64_t total = 1;
  for (int d = 0; d < v.rank; d++) total *= v.shape[d];
  for (int64_t i = 0; i < total; i++) {
    int64_t left = i, off = 0;
    bool first = true;
    for (int d = v.rank - 1; d >= 0; d--) { const int64_t k = left % v.shape[d]; left /= v.shape[d]; off += k * v.stride[d]; if (d == dim && k) first = false; }
    if (first) f(off, v.stride[dim], v.shape[dim]);
  }
}
void forward_f64(const smalti_view& v, int dim, bool log, const std::vector<double>& x, std::vector<double>& y) {
  rows(v, dim, [&](int64_t off, int64_t step, int64_t n) {
    double m = -INFINITY, s = 0;
    for (int64_t i = 0; i < n; i++) m = std::max(m, x[(size_t)(off + i * step)]);
    for (int64_t i = 0; i < n; i++) s += std::exp(x[(size_t)(off + i * step)] - m);
    for (int64_t i = 0; i < n; i++) { const double d = x[(size_t)(off + i * step)] - m; y[(size_t)(off + i * step)] = log ? d - std::log(s) : std::exp(d) / s; }
  });
}
void backward_f64(const smalti_view& v, int dim, bool log, const std::vector<double>& y, const std::vector<double>& g, std::vector<double>& dx) {
  rows(v, dim, [&](int64_t off, int64_t step, int64_t n) {
    double s = 0;
    for (int64_t i = 0; i < n; i++) s += g[(size_t)(off + i * step)] * (log ? 1 : y[(size_t)(off + i * step)]);
    for (int64_t i = 0; i < n; i++) { const size_t k = (size_t)(off + i * step); dx[k] = log ? g[k] - std::exp(y[k]) * s : y[k] * (g[k] - s); }
  });
}

template <class T> void run(const Case& c, double tolerance) {
  size_t n = 1;
  for (auto s : c.shape) n *= (size_t)s;
  const auto hx = test::randn<T>(n, 1, 3), hg = test::randn<T>(n, 2);
  Dev<T> x(hx), y(n), g(hg), dx(n);
  const smalti_view xv = view_of(c, test::view(x, c.shape)), yv = view_of(c, test::view(y, c.shape)), gv = view_of(c, test::view(g, c.shape)),
                    dv = view_of(c, test::view(dx, c.shape));
  for (bool log : {false, true}) {
    std::vector<double> want(n), slope(n);
    forward_f64(xv, c.dim, log, test::wide(hx), want);
    CHECK_RC(smalti_softmax_forward(&xv, &yv, c.dim, log, nullptr));
    const auto got = y.get();
    test::check_close("softmax", got, want, tolerance);
    backward_f64(xv, c.dim, log, test::wide(got), test::wide(hg), slope);
    CHECK_RC(smalti_softmax_backward(&yv, &gv, &dv, c.dim, log, nullptr));
    const auto first = dx.get();
    test::check_close("softmax backward", first, slope, tolerance);
    CHECK_RC(smalti_softmax_backward(&yv, &gv, &dv, c.dim, log, nullptr));
    test::check_same("twice", first, dx.get());
  }
}
const Case kCases[] = {
    {{3, 40, 3}, 1, false},  // columns
    {{2, 3, 7}, 2, false},   // short rows
    {{70, 33}, 0, true},     // a transposed matrix
    {{5, 197}, 1, false},    // odd rows: single elements
    {{6, 256}, 1, false},    // vectors, a warp
    {{2, 1024}, 1, false},   // a block of 128
    {{1, 2500}, 1, false},   // a block of 512; single elements for the halves
    {{1, 9000}, 1, false},   // long
};

}  // namespace

TEST(softmax_f32) { for (auto& c : kCases) run<float>(c, 1e-6); }
TEST(softmax_f64) { for (auto& c : kCases) run<double>(c, 1e-14); }
// One rounding of the result: half a unit in the last place of numbers of the result's size.
TEST(softmax_bf16) { for (auto& c : kCases) run<bf16>(c, 1.0 / 256); }
TEST(softmax_f16) { for (auto& c : kCases) run<f16>(c, 1.0 / 2048); }

TEST(softmax_edges) {
  const float inf = INFINITY;
  // the same five rows as short columns-style rows, as a row in a warp and as a long row
  for (int64_t n : {3, 40, 9000}) {
    std::vector<float> host((size_t)(5 * n), -inf);
    auto row = [&](int r) { return host.data() + r * n; };
    row(0)[0] = 1e4f; row(0)[1] = -1e4f;        // one survives
    row(2)[0] = NAN; row(2)[n - 1] = 1;         // NaN spreads
    row(3)[1] = inf; row(3)[2] = 1;             // infinity: NaN
    row(4)[n - 1] = 2; row(4)[0] = 2;           // two equal ones
    Dev<float> x(host), y(host.size());
    const smalti_view xv = test::view(x, {5, n}), yv = test::view(y, {5, n});
    CHECK_RC(smalti_softmax_forward(&xv, &yv, 1, 0, nullptr));
    const auto out = y.get();
    auto at = [&](int r, int64_t i) { return out[(size_t)(r * n + i)]; };
    CHECK(at(0, 0) == 1 && at(0, 1) == 0 && at(0, n - 1) == 0);
    CHECK(std::isnan(at(1, 0)) && std::isnan(at(2, 1)) && std::isnan(at(2, n - 1)) && std::isnan(at(3, 1)) && std::isnan(at(3, 2)));
    CHECK(at(4, 0) == 0.5f && at(4, n - 1) == 0.5f && at(4, 1) == 0);
  }
  Dev<float> none(0);
  const smalti_view e = test::view(none, {0, 3}), f = test::view(none, {3, 0});
  CHECK_RC(smalti_softmax_forward(&e, &e, 0, 0, nullptr));
  CHECK_RC(smalti_softmax_forward(&f, &f, 1, 1, nullptr));
  CHECK(smalti_softmax_forward(&e, &f, 0, 0, nullptr) != 0 && smalti_softmax_forward(&e, &e, 2, 0, nullptr) != 0);
}
