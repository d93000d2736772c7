// ROIAlign against a loop over samples, as torchvision writes it, in f64.
#include "harness.hpp"
using namespace smalti;
using test::Dev;

namespace {

struct Shape { int64_t n, c, h, w, oh, ow; };
struct Options { double scale; int64_t samples; bool aligned; };
using Boxes = std::vector<std::vector<double>>;

/// `visit(pixel, bin, weight)` for every tap of every bin, channels aside.
template <class F> void taps(const Shape& s, const Options& o, const Boxes& boxes, F visit) {
  for (size_t r = 0; r < boxes.size(); r++) {
    const auto& b = boxes[r];
    const double shift = o.aligned ? 0.5 : 0, x0 = b[1] * o.scale - shift, y0 = b[2] * o.scale - shift;
    double w = b[3] * o.scale - shift - x0, h = b[4] * o.scale - shift - y0;
    if (!o.aligned) { w = std::max(w, 1.0); h = std::max(h, 1.0); }
    const double bw = w / s.ow, bh = h / s.oh;
    const int64_t gx = o.samples > 0 ? o.samples : (int64_t)std::ceil(bw), gy = o.samples > 0 ? o.samples : (int64_t)std::ceil(bh);
    const double count = std::max<double>(gx * gy, 1);
    for (int64_t p = 0; p < s.oh; p++)
      for (int64_t q = 0; q < s.ow; q++)
        for (int64_t i = 0; i < gy; i++)
          for (int64_t j = 0; j < gx; j++) {
            double y = y0 + p * bh + (i + 0.5) * bh / gy, x = x0 + q * bw + (j + 0.5) * bw / gx;
            if (y < -1 || y > s.h || x < -1 || x > s.w) continue;
            y = std::max(y, 0.0);
            x = std::max(x, 0.0);
            int64_t yl = (int64_t)y, xl = (int64_t)x, yh = yl + 1, xh = xl + 1;
            if (yl >= s.h - 1) { yl = yh = s.h - 1; y = yl; }
            if (xl >= s.w - 1) { xl = xh = s.w - 1; x = xl; }
            const double ly = y - yl, lx = x - xl;
            const int64_t bin = (int64_t)r * s.c * s.oh * s.ow + p * s.ow + q, image = (int64_t)b[0] * s.c * s.h * s.w;
            visit(image + yl * s.w + xl, bin, (1 - ly) * (1 - lx) / count);
            visit(image + yl * s.w + xh, bin, (1 - ly) * lx / count);
            visit(image + yh * s.w + xl, bin, ly * (1 - lx) / count);
            visit(image + yh * s.w + xh, bin, ly * lx / count);
          }
  }
}

/// Elements of [n, c, h, w] in the order of [n, h, w, c], or back.
template <class T> std::vector<T> turned(const std::vector<T>& v, int64_t n, int64_t c, int64_t area, bool back) {
  std::vector<T> out(v.size());
  for (int64_t i = 0; i < n; i++)
    for (int64_t k = 0; k < c; k++)
      for (int64_t a = 0; a < area; a++) {
        const int64_t first = (i * c + k) * area + a, last = (i * area + a) * c + k;
        if (back) out[first] = v[last]; else out[last] = v[first];
      }
  return out;
}
template <class T> smalti_view view(const Dev<T>& d, int64_t n, int64_t c, int64_t h, int64_t w, bool last) {
  smalti_view v = test::view(d, {n, c, h, w});
  if (last) { v.stride[0] = c * h * w; v.stride[1] = 1; v.stride[2] = w * c; v.stride[3] = c; }
  return v;
}

template <class T> void check(const Shape& s, const Options& o, const Boxes& boxes, bool last, double tolerance) {
  const int64_t r = (int64_t)boxes.size(), area = s.h * s.w, bins = s.oh * s.ow;
  const auto x = test::randn<T>((size_t)(s.n * s.c * area), 1), g = test::randn<T>((size_t)(r * s.c * bins), 2);
  std::vector<double> y(g.size(), 0.0), dx(x.size(), 0.0);
  const auto wx = test::wide(x), wg = test::wide(g);
  taps(s, o, boxes, [&](int64_t pixel, int64_t bin, double w) {
    for (int64_t c = 0; c < s.c; c++) {
      y[bin + c * bins] += w * wx[pixel + c * area];
      dx[pixel + c * area] += w * wg[bin + c * bins];
    }
  });
  std::vector<Acc<T>> flat;
  for (const auto& b : boxes) for (double v : b) flat.push_back((Acc<T>)v);
  Dev<T> xs(last ? turned(x, s.n, s.c, area, false) : x), gs(last ? turned(g, r, s.c, bins, false) : g), ys(g.size()), ds(x.size());
  Dev<Acc<T>> bs(flat);
  Dev<double> work(smalti_roi_align_workspace(r) / 8);
  const auto vx = view(xs, s.n, s.c, s.h, s.w, last), vd = view(ds, s.n, s.c, s.h, s.w, last);
  const auto vy = view(ys, r, s.c, s.oh, s.ow, last), vg = view(gs, r, s.c, s.oh, s.ow, last), vb = test::view(bs, {r, 5});
  CHECK_RC(smalti_roi_align_forward(&vx, &vb, o.scale, o.samples, o.aligned, &vy, nullptr));
  auto got = ys.get();
  test::check_close("bins", last ? turned(got, r, s.c, bins, true) : got, y, tolerance);
  CHECK_RC(smalti_roi_align_backward(&vg, &vb, o.scale, o.samples, o.aligned, &vd, work.p, nullptr));
  const auto once = ds.get();
  test::check_close("gradient", last ? turned(once, s.n, s.c, area, true) : once, dx, tolerance);
  Dev<T> again(x.size());
  const auto va = view(again, s.n, s.c, s.h, s.w, last);
  CHECK_RC(smalti_roi_align_backward(&vg, &vb, o.scale, o.samples, o.aligned, &va, work.p, nullptr));
  test::check_same("the same gradient again", again.get(), once);
}

/// Inside, across every edge, outside, of no size, inside out, all of the image; images in no order.
const Boxes kBoxes = {{1, 3.1, 2.2, 19.7, 15.4}, {0, -9.3, -7.1, 6.4, 5.2}, {1, 20.3, 9.1, 60.7, 40.2}, {0, 90, 90, 99, 99},
                      {1, 5.3, 5.3, 5.3, 5.3},   {0, 15.2, 9.9, 4.1, 12.3}, {0, 0, 0, 26, 22},          {1, 7.1, 4.3, 7.4, 4.5}};

template <class T> void all(const Shape& s, double tolerance) {
  for (bool last : {false, true}) {
    check<T>(s, {0.5, 0, true}, kBoxes, last, tolerance);
    check<T>(s, {0.5, 2, false}, kBoxes, last, tolerance);
    check<T>(s, {1.0, -1, false}, kBoxes, last, tolerance);
    check<T>(s, {0.7, 7, true}, kBoxes, last, tolerance);
  }
}

}  // namespace

TEST(roi_align_all_dtypes_and_orders) {
  all<float>({2, 8, 11, 13, 3, 4}, 2e-5);
  all<double>({2, 2, 9, 10, 2, 3}, 1e-12);
  all<bf16>({2, 8, 11, 13, 3, 4}, 1e-2);
  all<f16>({2, 8, 9, 13, 2, 2}, 2e-3);
}

TEST(roi_align_odd_channels_and_one_pixel) {
  check<float>({2, 3, 5, 7, 7, 7}, {0.5, 0, true}, kBoxes, true, 2e-5);
  check<float>({2, 37, 1, 1, 2, 3}, {0.1, 0, true}, kBoxes, false, 2e-5);
  check<float>({2, 4, 1, 9, 1, 1}, {0.3, 3, true}, kBoxes, true, 2e-5);
}

TEST(roi_align_many_boxes_and_channels) {
  std::mt19937 random(3);
  std::uniform_real_distribution<double> at(-4, 40);
  Boxes boxes;
  for (int i = 0; i < 300; i++) {
    const double x = at(random), y = at(random);
    boxes.push_back({(double)(i % 2), x, y, x + at(random) / 3, y + at(random) / 3});
  }
  check<float>({2, 132, 9, 9, 2, 2}, {0.25, 0, true}, boxes, true, 2e-5);
  check<float>({2, 34, 9, 9, 2, 2}, {0.25, 0, true}, boxes, false, 2e-5);
  // tables too large for several boxes at a time
  check<float>({2, 4, 9, 9, 400, 300}, {0.5, 0, true}, kBoxes, true, 2e-5);
}

TEST(roi_align_strange_boxes) {
  const double inf = INFINITY, nan = NAN;
  const std::vector<std::vector<double>> strange = {{0, 0, 0, inf, 5}, {0, nan, 0, 3, 3}, {0, -1e30, -1e30, 1e30, 1e30}, {0, 0, 0, 1e9, 1e9}, {0, -inf, 0, 2, 2}};
  std::vector<float> flat;
  for (const auto& b : strange) for (double v : b) flat.push_back((float)v);
  flat.insert(flat.end(), {-1, 0, 0, 2, 2, 1, 0, 0, 2, 2, (float)nan, 0, 0, 2, 2, 0, 1, 1, 3, 3});
  const int64_t r = (int64_t)flat.size() / 5;
  for (bool last : {false, true}) {
    Dev<float> x(test::randn<float>(4 * 6 * 6, 1)), y(r * 4 * 4), g(test::randn<float>(r * 4 * 4, 2)), dx(4 * 6 * 6);
    Dev<float> boxes(flat);
    Dev<double> work(smalti_roi_align_workspace(r) / 8);
    const auto vx = view(x, 1, 4, 6, 6, last), vd = view(dx, 1, 4, 6, 6, last), vb = test::view(boxes, {r, 5});
    const auto vy = view(y, r, 4, 2, 2, last), vg = view(g, r, 4, 2, 2, last);
    for (int64_t samples : {0, 2}) {
      CHECK_RC(smalti_roi_align_forward(&vx, &vb, 1.0, samples, 1, &vy, nullptr));
      const auto bins = y.get();
      for (int64_t i = 0; i < (int64_t)bins.size(); i++) CHECK(std::isnan(bins[i]) == (i / 16 >= 5 && i / 16 < 8));
      CHECK_RC(smalti_roi_align_backward(&vg, &vb, 1.0, samples, 1, &vd, work.p, nullptr));
      for (float v : dx.get()) CHECK(std::isfinite(v));
    }
  }
}

TEST(roi_align_nothing_and_refused) {
  Dev<float> x(48), y(64), boxes(40);
  const auto vx = test::view(x, {1, 3, 4, 4}), none = test::view(boxes, {0, 5}), vy = test::view(y, {0, 3, 2, 2});
  CHECK_RC(smalti_roi_align_forward(&vx, &none, 1.0, 0, 1, &vy, nullptr));
  CHECK_RC(smalti_roi_align_backward(&vy, &none, 1.0, 0, 1, &vx, nullptr, nullptr));
  test::check_same("no boxes, no gradient", x.get(), std::vector<float>(48, 0.f));
  const auto one = test::view(boxes, {1, 5}), other = test::view(y, {1, 2, 2, 2}), wide = test::view(y, {1, 3, 1, 100000});
  CHECK(smalti_roi_align_forward(&vx, &one, 1.0, 0, 1, &other, nullptr) == kInvalid);
  CHECK(smalti_roi_align_forward(&vx, &none, 1.0, 0, 1, &other, nullptr) == kInvalid);
  CHECK(smalti_roi_align_backward(&wide, &one, 1.0, 0, 1, &vx, nullptr, nullptr) == kInvalid);
}
