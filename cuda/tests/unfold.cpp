// unfold and fold against loops over windows.
#include "images.hpp"
using namespace smalti;
using namespace test;

namespace {

/// f(element of the columns, element of the image or -1), both counted row by row.
template <class F> void each(const Shape& s, const smalti_windows& w, int64_t ny, int64_t nx, F f) {
  size_t column = 0;
  for (int64_t plane = 0; plane < s[0] * s[1]; plane++)
    for (int64_t ky = 0; ky < w.kernel[0]; ky++)
      for (int64_t kx = 0; kx < w.kernel[1]; kx++)
        for (int64_t i = 0; i < ny; i++)
          for (int64_t j = 0; j < nx; j++) {
            const int64_t y = i * w.stride[0] + ky * w.dilation[0] - w.padding[0], x = j * w.stride[1] + kx * w.dilation[1] - w.padding[1];
            const bool inside = y >= 0 && y < s[2] && x >= 0 && x < s[3];
            f(column++, inside ? (plane * s[2] + y) * s[3] + x : -1);
          }
}

template <class T> void run(const Shape& s, const smalti_windows& w, Layout layout) {
  int64_t n[2];
  for (int d = 0; d < 2; d++) n[d] = (s[2 + d] + 2 * w.padding[d] - w.dilation[d] * (w.kernel[d] - 1) - 1) / w.stride[d] + 1;
  const int64_t rows = s[1] * w.kernel[0] * w.kernel[1], line = n[0] * n[1];
  const size_t size = (size_t)(s[0] * rows * line);
  const auto hx = randn<T>(numel(s), 1), hc = randn<T>(size, 2);
  std::vector<T> want(size);
  std::vector<double> image(numel(s));
  each(s, w, n[0], n[1], [&](size_t column, int64_t pixel) {
    want[column] = pixel < 0 ? narrow<T>(0) : hx[pixel];
    if (pixel >= 0) image[pixel] += (double)widen(hc[column]);
  });
  Batch<T> x(s, layout, hx);
  Dev<T> columns(size), y(numel(s));
  const auto cv = view(columns, {s[0], rows, line}), yv = view(y, {s[0], s[1], s[2], s[3]});
  CHECK_RC(smalti_unfold(&x.view, &cv, &w, nullptr));
  check_same("columns", columns.get(), want);
  // as [N, 1, rows, line], to lay them in any way
  Batch<T> from({s[0], 1, rows, line}, layout, hc);
  smalti_view v = from.view;
  v.rank = 3;
  for (int d = 1; d < 3; d++) { v.shape[d] = v.shape[d + 1]; v.stride[d] = v.stride[d + 1]; }
  CHECK_RC(smalti_fold(&v, &yv, &w, nullptr));
  check_close("image", y.get(), image, rounding<T>());
  const auto first = y.get();
  CHECK_RC(smalti_fold(&v, &yv, &w, nullptr));
  check_same("twice", first, y.get());
}

template <class T> void windows() {
  for (Layout layout : kLayouts) {
    run<T>({2, 3, 7, 9}, {{3, 3}, {1, 1}, {1, 1}, {1, 1}}, layout);
    run<T>({1, 5, 8, 6}, {{2, 3}, {2, 1}, {0, 2}, {3, 2}}, layout);
    run<T>({3, 2, 4, 4}, {{2, 2}, {1, 1}, {0, 0}, {2, 2}}, layout);
    run<T>({1, 2, 2, 1}, {{1, 2}, {1, 3}, {2, 3}, {1, 1}}, layout);
    run<T>({0, 2, 4, 4}, {{2, 2}, {1, 1}, {0, 0}, {2, 2}}, layout);
  }
}

}  // namespace

TEST(unfold_f32) { windows<float>(); }
TEST(unfold_f64) { windows<double>(); }
TEST(unfold_bf16) { windows<bf16>(); }
TEST(unfold_f16) { windows<f16>(); }

TEST(unfold_refuses) {
  Batch<float> x({1, 2, 4, 4}, kFirst);
  Dev<float> columns(72), short_columns(32);
  const auto cv = view(columns, {1, 8, 9}), sv = view(short_columns, {1, 8, 4});
  const smalti_windows w{{2, 2}, {1, 1}, {0, 0}, {1, 1}}, still{{2, 2}, {1, 1}, {0, 0}, {0, 1}};
  CHECK_RC(smalti_unfold(&x.view, &cv, &w, nullptr));
  CHECK(smalti_unfold(&x.view, &sv, &w, nullptr) != 0);
  CHECK(smalti_fold(&sv, &x.view, &w, nullptr) != 0);
  CHECK(smalti_unfold(&x.view, &cv, &still, nullptr) != 0);
}
