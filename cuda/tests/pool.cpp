// Pooling against loops over windows in f64.
#include "images.hpp"
using namespace smalti;
using namespace test;

namespace {

using Vec = std::vector<double>;
struct Case { Shape shape; smalti_pool pool; int64_t out[2]; };

/// Moving windows; `ceil`: the last may stick out.
Case moving(Shape s, int64_t ky, int64_t kx, int64_t sy, int64_t sx, int64_t py, int64_t px, int64_t dy = 1, int64_t dx = 1, bool ceil = false) {
  Case c{s, {{ky, kx}, {sy, sx}, {py, px}, {dy, dx}, 0, 0}, {0, 0}};
  for (int d = 0; d < 2; d++) {
    const int64_t rest = s[2 + d] + 2 * c.pool.padding[d] - c.pool.dilation[d] * (c.pool.kernel[d] - 1) - 1;
    c.out[d] = (ceil ? (rest + c.pool.stride[d] - 1) / c.pool.stride[d] : rest / c.pool.stride[d]) + 1;
    if (ceil && (c.out[d] - 1) * c.pool.stride[d] >= s[2 + d] + c.pool.padding[d]) c.out[d]--;
  }
  return c;
}
Case adaptive(Shape s, int64_t h, int64_t w) { return {s, {{}, {}, {}, {}, -1, 1}, {h, w}}; }

std::vector<Case> cases() {
  return {moving({2, 8, 7, 9}, 3, 3, 2, 2, 1, 1),
          moving({1, 16, 8, 6}, 2, 2, 2, 2, 0, 0),
          moving({2, 3, 7, 6}, 3, 2, 1, 3, 1, 0, 2, 1),
          moving({1, 5, 10, 11}, 3, 3, 3, 2, 0, 1, 1, 1, true),
          moving({1, 2, 1, 1}, 2, 2, 1, 1, 2, 2, 3, 3),  // a window without a pixel
          moving({1, 2, 20, 30}, 9, 9, 9, 10, 0, 0),     // a warp each
          moving({0, 2, 4, 4}, 2, 2, 2, 2, 0, 0),
          adaptive({2, 8, 7, 5}, 3, 4),
          adaptive({1, 3, 4, 5}, 6, 8),
          adaptive({2, 3, 17, 33}, 1, 1),
          adaptive({1, 8, 9, 40}, 2, 3),
          adaptive({1, 3, 4, 5}, 0, 2)};
}

/// Pixels of window `i` along axis `d`.
std::vector<int64_t> pixels(const Case& c, int d, int64_t i) {
  const int64_t n = c.shape[2 + d], out = c.out[d];
  std::vector<int64_t> p;
  if (c.pool.adaptive)
    for (int64_t k = i * n / out; k < ((i + 1) * n + out - 1) / out; k++) p.push_back(k);
  else
    for (int64_t k = 0; k < c.pool.kernel[d]; k++) {
      const int64_t at = i * c.pool.stride[d] - c.pool.padding[d] + k * c.pool.dilation[d];
      if (at >= 0 && at < n) p.push_back(at);
    }
  return p;
}
int64_t weight(const Case& c, int d, int64_t i) {
  if (c.pool.adaptive || c.pool.divisor) return (int64_t)pixels(c, d, i).size();
  const int64_t end = c.shape[2 + d] + c.pool.padding[d], first = i * c.pool.stride[d] - c.pool.padding[d];
  return std::max<int64_t>(0, std::min(end, first + c.pool.kernel[d]) - first);
}
/// f(plane, window, pixels of the plane, divisor)
template <class F> void each_window(const Case& c, F f) {
  for (int64_t plane = 0; plane < c.shape[0] * c.shape[1]; plane++)
    for (int64_t y = 0; y < c.out[0]; y++)
      for (int64_t x = 0; x < c.out[1]; x++) {
        std::vector<int64_t> all;
        for (int64_t i : pixels(c, 0, y))
          for (int64_t j : pixels(c, 1, x)) all.push_back(i * c.shape[3] + j);
        const int64_t size = c.pool.divisor > 0 ? c.pool.divisor : std::max<int64_t>(1, weight(c, 0, y) * weight(c, 1, x));
        f(plane, (plane * c.out[0] + y) * c.out[1] + x, all, (double)size);
      }
}

template <class T> void max_pool(const Case& c, Layout layout, bool strange) {
  const Shape out{c.shape[0], c.shape[1], c.out[0], c.out[1]};
  auto hx = randn<T>(numel(c.shape), 1);
  for (size_t i = 0; i + 1 < hx.size() && strange; i++) {
    if (i % 5 == 0) hx[i] = hx[i + 1];
    if (i % 3 == 0) hx[i] = narrow<T>((Acc<T>)-INFINITY);
    if (i % 17 == 0) hx[i] = narrow<T>((Acc<T>)NAN);
  }
  const auto hg = randn<T>(numel(out), 2);
  const int64_t plane_size = c.shape[2] * c.shape[3];
  std::vector<T> want(numel(out));
  std::vector<int32_t> places(numel(out));
  Vec wdx(numel(c.shape));
  each_window(c, [&](int64_t plane, int64_t at, const std::vector<int64_t>& all, double) {
    T best = narrow<T>((Acc<T>)-INFINITY);
    int64_t where = all.empty() ? 0 : all[0];
    for (int64_t p : all) {
      const T v = hx[plane * plane_size + p];
      if (widen(v) > widen(best) || std::isnan((double)widen(v))) { best = v; where = p; }
    }
    want[at] = best;
    places[at] = (int32_t)where;
    if (all.size()) wdx[plane * plane_size + where] += (double)widen(hg[at]);
  });
  Batch<T> x(c.shape, layout, hx), g(out, layout, hg), y(out, layout), dx(c.shape, layout);
  Batch<int32_t> at(out, layout);
  CHECK_RC(smalti_max_pool_forward(&x.view, &y.view, &at.view, &c.pool, nullptr));
  auto values = y.get();
  for (size_t i = 0; i < values.size(); i++)  // NaNs may have any bits
    if (std::isnan((double)widen(values[i])) && std::isnan((double)widen(want[i]))) values[i] = want[i];
  check_same("max", values, want);
  const auto got = at.get();
  for (size_t i = 0; i < got.size(); i++) {
    if (got[i] == places[i]) continue;
    fail("place " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " + std::to_string(places[i]));
    break;
  }
  CHECK_RC(smalti_max_pool_backward(&g.view, &at.view, &dx.view, &c.pool, nullptr));
  check_close("dx", dx.get(), wdx, rounding<T>());
}

template <class T> void avg_pool(Case c, Layout layout, int64_t divisor) {
  c.pool.divisor = c.pool.adaptive ? -1 : divisor;
  const Shape out{c.shape[0], c.shape[1], c.out[0], c.out[1]};
  const auto hx = randn<T>(numel(c.shape), 1), hg = randn<T>(numel(out), 2);
  const int64_t plane_size = c.shape[2] * c.shape[3];
  Vec want(numel(out)), wdx(numel(c.shape));
  each_window(c, [&](int64_t plane, int64_t at, const std::vector<int64_t>& all, double size) {
    for (int64_t p : all) {
      want[at] += (double)widen(hx[plane * plane_size + p]) / size;
      wdx[plane * plane_size + p] += (double)widen(hg[at]) / size;
    }
  });
  Batch<T> x(c.shape, layout, hx), g(out, layout, hg), y(out, layout), dx(c.shape, layout);
  CHECK_RC(smalti_avg_pool_forward(&x.view, &y.view, &c.pool, nullptr));
  CHECK_RC(smalti_avg_pool_backward(&g.view, &dx.view, &c.pool, nullptr));
  check_close("mean", y.get(), want, rounding<T>());
  check_close("dx", dx.get(), wdx, rounding<T>());
  const auto first = dx.get();
  CHECK_RC(smalti_avg_pool_backward(&g.view, &dx.view, &c.pool, nullptr));
  check_same("twice", first, dx.get());
}

template <class T> void pools() {
  for (const Case& c : cases())
    for (Layout layout : kLayouts) {
      max_pool<T>(c, layout, false);
      max_pool<T>(c, layout, true);
      if (c.pool.adaptive || (c.pool.dilation[0] == 1 && c.pool.dilation[1] == 1))
        for (int64_t divisor : {0, -1, 5}) avg_pool<T>(c, layout, divisor);
    }
}

}  // namespace

TEST(pool_f32) { pools<float>(); }
TEST(pool_f64) { pools<double>(); }
TEST(pool_bf16) { pools<bf16>(); }
TEST(pool_f16) { pools<f16>(); }

/// Layouts of the operands need not agree.
TEST(pool_mixed_layouts) {
  const Case c = moving({2, 8, 7, 9}, 3, 3, 2, 2, 1, 1);
  const Shape out{2, 8, c.out[0], c.out[1]};
  const auto hx = randn<float>(numel(c.shape), 1);
  Batch<float> x(c.shape, kFirst, hx), y(out, kFirst), last(out, kLast);
  Batch<int32_t> at(out, kFirst), places(out, kStrided);
  CHECK_RC(smalti_max_pool_forward(&x.view, &y.view, &at.view, &c.pool, nullptr));
  CHECK_RC(smalti_max_pool_forward(&x.view, &last.view, &places.view, &c.pool, nullptr));
  check_same("values", y.get(), last.get());
  check_same("places", at.get(), places.get());
}

TEST(pool_refuses) {
  const Case c = moving({1, 2, 4, 4}, 2, 2, 2, 2, 0, 0);
  const Shape out{1, 2, 2, 2};
  Batch<float> x(c.shape, kFirst), y(out, kFirst), other({1, 3, 2, 2}, kFirst);
  Batch<double> wide(out, kFirst);
  Batch<int32_t> at(out, kFirst);
  Batch<int64_t> longer(out, kFirst);
  smalti_pool wrong = c.pool;
  wrong.stride[0] = 0;
  CHECK(smalti_max_pool_forward(&x.view, &y.view, &longer.view, &c.pool, nullptr) != 0);
  CHECK(smalti_max_pool_forward(&x.view, &other.view, &at.view, &c.pool, nullptr) != 0);
  CHECK(smalti_max_pool_forward(&x.view, &y.view, &at.view, &wrong, nullptr) != 0);
  CHECK(smalti_avg_pool_forward(&x.view, &wide.view, &c.pool, nullptr) != 0);
  wrong = c.pool;
  wrong.dilation[1] = 2;
  CHECK(smalti_avg_pool_forward(&x.view, &y.view, &wrong, nullptr) != 0);
}
