// grid_sample against loops over samples in f64; the gradient of the places by central differences.
#include "images.hpp"
#include <numeric>
using namespace smalti;
using namespace test;

namespace {

struct Tap { int64_t pixel; double weight; };

double keys(double x) {
  const double a = -0.75;
  x = std::fabs(x);
  return x < 1 ? (a + 2) * x * x * x - (a + 3) * x * x + 1 : x < 2 ? a * x * x * x - 5 * a * x * x + 8 * a * x - 4 * a : 0;
}
/// Folds or clamps a place into an axis of n pixels.
double padded(double x, int64_t n, const smalti_grid& o) {
  const double last = (double)(n - 1);
  if (o.padding == SMALTI_PAD_ZEROS) return x;
  if (o.padding == SMALTI_PAD_REFLECTION) {
    const double low = o.align_corners ? 0 : -0.5, high = o.align_corners ? last : last + 0.5;
    for (int k = 0; k < 100 && high > low && (x < low || x > high); k++) x = x < low ? 2 * low - x : 2 * high - x;
    if (high == low) x = 0;
  }
  return std::min(std::max(x, 0.0), last);
}
struct Along { double at, weight; };
std::vector<Along> along(double x, int64_t n, const smalti_grid& o) {
  x = o.align_corners ? (x + 1) / 2 * (double)(n - 1) : ((x + 1) * (double)n - 1) / 2;
  if (o.mode == SMALTI_NEAREST) return {{std::nearbyint(padded(x, n, o)), 1}};
  if (o.mode == SMALTI_LINEAR) {
    x = padded(x, n, o);
    return {{std::floor(x), 1 - x + std::floor(x)}, {std::floor(x) + 1, x - std::floor(x)}};
  }
  std::vector<Along> v;
  for (int k = -1; k < 3; k++) v.push_back({padded(std::floor(x) + k, n, o), keys(x - std::floor(x) - k)});
  return v;
}
std::vector<Tap> taps(double gx, double gy, int64_t h, int64_t w, const smalti_grid& o) {
  std::vector<Tap> v;
  for (auto& r : along(gy, h, o))
    for (auto& c : along(gx, w, o))
      if (r.at >= 0 && r.at < (double)h && c.at >= 0 && c.at < (double)w) v.push_back({(int64_t)r.at * w + (int64_t)c.at, r.weight * c.weight});
  return v;
}

template <class T> void run(const Shape& in, int64_t h2, int64_t w2, const smalti_grid& o, Layout layout) {
  using A = Acc<T>;
  const int64_t N = in[0], C = in[1], h = in[2], w = in[3], area = h * w, points = h2 * w2;
  const Shape out{N, C, h2, w2}, places{N, h2, w2, 2};
  const auto hx = randn<T>(numel(in), 1), hg = randn<T>(numel(out), 2);
  const auto hp = randn<A>(numel(places), 3, 0.8);
  const auto vx = wide(hx), vg = wide(hg), vp = wide(hp);
  std::vector<double> wy(numel(out)), wdx(numel(in)), wdp(numel(places));
  for (int64_t n = 0; n < N; n++)
    for (int64_t p = 0; p < points; p++) {
      const double gx = vp[2 * (n * points + p)], gy = vp[2 * (n * points + p) + 1], e = 1e-6;
      auto add = [&](double x, double y, double scale, double* to) {
        for (auto& t : taps(x, y, h, w, o))
          for (int64_t c = n * C; c < (n + 1) * C; c++) *to += scale * t.weight * vx[c * area + t.pixel] * vg[c * points + p];
      };
      for (auto& t : taps(gx, gy, h, w, o))
        for (int64_t c = n * C; c < (n + 1) * C; c++) {
          wy[c * points + p] += t.weight * vx[c * area + t.pixel];
          wdx[c * area + t.pixel] += t.weight * vg[c * points + p];
        }
      double* d = &wdp[2 * (n * points + p)];
      add(gx + e, gy, 0.5 / e, d);
      add(gx - e, gy, -0.5 / e, d);
      add(gx, gy + e, 0.5 / e, d + 1);
      add(gx, gy - e, -0.5 / e, d + 1);
    }
  Batch<T> x(in, layout, hx), y(out, layout), g(out, layout, hg), dx(in, layout);
  Batch<A> grid(places, layout == kStrided ? kStrided : kFirst, hp), dgrid(places, kFirst);
  CHECK_RC(smalti_grid_sample_forward(&x.view, &grid.view, &y.view, &o, nullptr));
  check_close("y", y.get(), wy, rounding<T>());
  CHECK_RC(smalti_grid_sample_backward_grid(&x.view, &grid.view, &g.view, &dgrid.view, &o, nullptr));
  check_close("dgrid", dgrid.get(), wdp, std::is_same<T, double>::value ? 1e-7 : 5e-6);

  const int64_t each = o.mode == SMALTI_CUBIC ? 16 : o.mode == SMALTI_LINEAR ? 4 : 1, line = points * each;
  Dev<int32_t> at((size_t)(N * line)), starts((size_t)(N * (area + 1)));
  Dev<A> weights((size_t)(N * line));
  const auto av = view(at, {N, line}), wv = view(weights, {N, line}), sv = view(starts, {N, area + 1});
  CHECK_RC(smalti_grid_sample_taps(&grid.view, h, w, &av, &wv, &o, nullptr));
  const auto listed = at.get();
  std::vector<int64_t> sorted;
  for (int64_t n = 0; n < N; n++) {
    std::vector<int64_t> row((size_t)line);
    std::iota(row.begin(), row.end(), 0);
    std::stable_sort(row.begin(), row.end(), [&](int64_t a, int64_t b) { return listed[n * line + a] < listed[n * line + b]; });
    sorted.insert(sorted.end(), row.begin(), row.end());
  }
  Dev<int64_t> order(sorted);
  const auto ov = view(order, {N, line});
  CHECK_RC(smalti_grid_sample_backward_input(&g.view, &av, &wv, &ov, &sv, &dx.view, nullptr));
  check_close("dx", dx.get(), wdx, rounding<T>());
}

template <class T> void samples() {
  for (int32_t mode : {SMALTI_NEAREST, SMALTI_LINEAR, SMALTI_CUBIC})
    for (int32_t padding : {SMALTI_PAD_ZEROS, SMALTI_PAD_BORDER, SMALTI_PAD_REFLECTION})
      for (int32_t corners : {0, 1})
        for (Layout layout : kLayouts) {
          const smalti_grid o{mode, padding, corners};
          run<T>({2, 11, 5, 7}, 3, 4, o, layout);
          run<T>({1, 16, 6, 4}, 5, 9, o, layout);
          run<T>({1, 40, 1, 3}, 1, 2, o, layout);
          run<T>({0, 2, 3, 3}, 2, 2, o, layout);
          run<T>({1, 2, 3, 3}, 0, 2, o, layout);
        }
}

template <class T> void affine(const Shape& s, bool corners, double tolerance) {
  const int64_t N = s[0], h = s[2], w = s[3];
  const Shape out{N, h, w, 2};
  const auto ht = randn<T>((size_t)N * 6, 1), hg = randn<T>(numel(out), 2);
  const auto vt = wide(ht), vg = wide(hg);
  std::vector<double> want(numel(out)), wdt((size_t)N * 6);
  auto at = [&](int64_t i, int64_t n) { return corners ? (n == 1 ? 0.0 : 2.0 * (double)i / (double)(n - 1) - 1) : (2.0 * (double)i + 1) / (double)n - 1; };
  for (int64_t n = 0; n < N; n++)
    for (int64_t y = 0; y < h; y++)
      for (int64_t x = 0; x < w; x++)
        for (int64_t k = 0; k < 2; k++) {
          const double place[3] = {at(x, w), at(y, h), 1};
          const size_t i = (size_t)(((n * h + y) * w + x) * 2 + k);
          for (int64_t j = 0; j < 3; j++) {
            want[i] += vt[n * 6 + k * 3 + j] * place[j];
            wdt[n * 6 + k * 3 + j] += vg[i] * place[j];
          }
        }
  Dev<T> theta(ht), g(hg), y(numel(out)), dtheta((size_t)N * 6);
  const auto tv = view(theta, {N, 2, 3}), gv = view(g, {N, h, w, 2}), yv = view(y, {N, h, w, 2}), dv = view(dtheta, {N, 2, 3});
  CHECK_RC(smalti_affine_grid_forward(&tv, &yv, corners, nullptr));
  CHECK_RC(smalti_affine_grid_backward(&gv, &dv, corners, nullptr));
  check_close("places", y.get(), want, tolerance);
  check_close("dtheta", dtheta.get(), wdt, tolerance);
}

}  // namespace

TEST(grid_sample_f32) { samples<float>(); }
TEST(grid_sample_f64) { samples<double>(); }
TEST(grid_sample_bf16) { samples<bf16>(); }
TEST(grid_sample_f16) { samples<f16>(); }

TEST(grid_sample_affine) {
  for (bool corners : {false, true})
    for (const Shape& s : {Shape{2, 1, 3, 40}, Shape{1, 1, 1, 1}, Shape{3, 1, 30, 17}, Shape{0, 1, 2, 2}, Shape{2, 1, 0, 2}}) {
      affine<float>(s, corners, rounding<float>());
      affine<double>(s, corners, rounding<double>());
      affine<bf16>(s, corners, rounding<bf16>());
      affine<f16>(s, corners, rounding<f16>());
    }
}

/// Wherever a sample lies, it takes pixels of the image or none.
TEST(grid_sample_strange_places) {
  const float inf = INFINITY;
  const std::vector<float> wild{NAN, inf, -inf, 1e30f, -1e30f, 0, 1, -1, NAN, NAN, 3e38f, -3e38f};
  for (int32_t mode : {SMALTI_NEAREST, SMALTI_LINEAR, SMALTI_CUBIC})
    for (int32_t padding : {SMALTI_PAD_ZEROS, SMALTI_PAD_BORDER, SMALTI_PAD_REFLECTION})
      for (int32_t corners : {0, 1})
        for (const Shape& s : {Shape{1, 1, 3, 4}, Shape{1, 1, 1, 1}}) {
          const smalti_grid o{mode, padding, corners};
          Batch<float> x(s, kFirst, randn<float>(numel(s), 1)), grid({1, 1, 6, 2}, kFirst, wild), y({1, 1, 1, 6}, kFirst), dgrid({1, 1, 6, 2}, kFirst);
          CHECK_RC(smalti_grid_sample_forward(&x.view, &grid.view, &y.view, &o, nullptr));
          CHECK_RC(smalti_grid_sample_backward_grid(&x.view, &grid.view, &y.view, &dgrid.view, &o, nullptr));
          const int64_t each = mode == SMALTI_CUBIC ? 16 : mode == SMALTI_LINEAR ? 4 : 1;
          Dev<int32_t> at((size_t)(6 * each));
          Dev<float> weights((size_t)(6 * each));
          const auto av = view(at, {1, 6 * each}), wv = view(weights, {1, 6 * each});
          CHECK_RC(smalti_grid_sample_taps(&grid.view, s[2], s[3], &av, &wv, &o, nullptr));
          for (int32_t p : at.get()) CHECK(p >= 0 && p <= s[2] * s[3]);
        }
}

TEST(grid_sample_refuses) {
  Batch<float> x({1, 2, 4, 4}, kFirst), y({1, 2, 3, 3}, kFirst), grid({1, 3, 3, 2}, kFirst), other({2, 3, 3, 2}, kFirst);
  Batch<double> wide({1, 3, 3, 2}, kFirst);
  const smalti_grid o{SMALTI_LINEAR, SMALTI_PAD_ZEROS, 0}, wrong{SMALTI_AREA, SMALTI_PAD_ZEROS, 0};
  CHECK(smalti_grid_sample_forward(&x.view, &other.view, &y.view, &o, nullptr) != 0);
  CHECK(smalti_grid_sample_forward(&x.view, &wide.view, &y.view, &o, nullptr) != 0);
  CHECK(smalti_grid_sample_forward(&x.view, &grid.view, &y.view, &wrong, nullptr) != 0);
  CHECK(smalti_grid_sample_forward(&x.view, &grid.view, &x.view, &o, nullptr) != 0);
}
