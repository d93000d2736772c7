// Resizing against dense matrices of weights in f64, made from the definitions.
#include "images.hpp"
using namespace smalti;
using namespace test;

namespace {

using Matrix = std::vector<std::vector<double>>;  // [output][input]

double keys(double x, double a) {
  x = std::fabs(x);
  return x < 1 ? (a + 2) * x * x * x - (a + 3) * x * x + 1 : x < 2 ? a * x * x * x - 5 * a * x * x + 8 * a * x - 4 * a : 0;
}

Matrix weights(const smalti_resize& a) {
  Matrix m((size_t)a.output, std::vector<double>((size_t)a.input));
  for (int64_t i = 0; i < a.output; i++) {
    auto put = [&](double at, double w) { m[i][(size_t)std::min<double>(std::max(at, 0.0), (double)a.input - 1)] += w; };
    const double centre = a.align_corners ? a.scale * (double)i : a.scale * ((double)i + 0.5) - 0.5, low = std::floor(centre);
    if (a.antialias) {
      const double stretch = std::max(a.scale, 1.0), radius = a.mode == SMALTI_LINEAR ? 1 : 2;
      double sum = 0;
      for (int64_t j = 0; j < a.input; j++) {
        const double d = ((double)j - centre) / stretch;
        m[i][j] = std::fabs(d) >= radius ? 0 : radius == 1 ? 1 - std::fabs(d) : keys(d, -0.5);
        sum += m[i][j];
      }
      for (auto& w : m[i]) w /= sum;
    } else if (a.mode == SMALTI_NEAREST || a.mode == SMALTI_NEAREST_EXACT) {
      put(std::floor(((double)i + (a.mode == SMALTI_NEAREST ? 0 : 0.5)) * a.scale), 1);
    } else if (a.mode == SMALTI_AREA) {
      const int64_t start = i * a.input / a.output, end = ((i + 1) * a.input + a.output - 1) / a.output;
      for (int64_t j = start; j < end; j++) m[i][j] = 1.0 / (double)(end - start);
    } else if (a.mode == SMALTI_LINEAR) {
      const double x = std::max(centre, 0.0), t = x - std::floor(x);
      put(std::floor(x), 1 - t);
      put(std::floor(x) + 1, t);
    } else {
      for (int k = -1; k < 3; k++) put(low + k, keys(centre - low - k, -0.75));
    }
  }
  return m;
}

struct Mode { int mode; bool corners, antialias; };
const Mode kModes[] = {{SMALTI_NEAREST, false, false}, {SMALTI_NEAREST_EXACT, false, false}, {SMALTI_AREA, false, false},
                       {SMALTI_LINEAR, false, false},  {SMALTI_LINEAR, true, false},         {SMALTI_LINEAR, false, true},
                       {SMALTI_CUBIC, false, false},   {SMALTI_CUBIC, true, false},          {SMALTI_CUBIC, false, true}};

smalti_resize resize(int64_t input, int64_t output, const Mode& m, double scale = 0) {
  if (m.corners) scale = output > 1 ? (double)(input - 1) / (double)(output - 1) : 0;
  else if (scale == 0) scale = (double)input / (double)output;
  return {input, output, scale, m.mode, m.corners, m.antialias};
}

/// Rows and columns of every plane through the matrices, transposed if `back`.
std::vector<double> apply(const std::vector<double>& x, int64_t planes, const Matrix& rows, const Matrix& columns, bool back) {
  const int64_t H = (int64_t)rows.size(), h = (int64_t)rows[0].size(), W = (int64_t)columns.size(), w = (int64_t)columns[0].size();
  std::vector<double> y((size_t)(planes * (back ? h * w : H * W)));
  for (int64_t p = 0; p < planes; p++)
    for (int64_t i = 0; i < H; i++)
      for (int64_t j = 0; j < W; j++)
        for (int64_t k = 0; k < h; k++) {
          if (rows[i][k] == 0) continue;
          for (int64_t l = 0; l < w; l++) {
            const double weight = rows[i][k] * columns[j][l];
            if (back) y[(p * h + k) * w + l] += weight * x[(p * H + i) * W + j];
            else y[(p * H + i) * W + j] += weight * x[(p * h + k) * w + l];
          }
        }
  return y;
}

template <class T> void run(const Shape& in, int64_t h, int64_t w, const smalti_resize (&axes)[2], Layout layout) {
  const Shape out{in[0], in[1], h, w};
  const auto hx = randn<T>(numel(in), 1), hg = randn<T>(numel(out), 2);
  const Matrix rows = weights(axes[0]), columns = weights(axes[1]);
  Batch<T> x(in, layout, hx), g(out, layout, hg), y(out, layout), dx(in, layout);
  for (int back = 0; back < 2; back++) {
    auto &from = back ? g : x, &to = back ? dx : y;
    const int64_t bytes = smalti_interpolate_workspace(&from.view, &to.view, axes, back);
    CHECK(bytes >= 0);
    Dev<uint8_t> workspace((size_t)bytes);
    CHECK_RC(smalti_interpolate(&from.view, &to.view, axes, back, workspace.p, nullptr));
    const auto first = to.get();
    check_close(back ? "dx" : "y", first, apply(wide(back ? hg : hx), in[0] * in[1], rows, columns, back), rounding<T>());
    CHECK_RC(smalti_interpolate(&from.view, &to.view, axes, back, workspace.p, nullptr));
    check_same("twice", first, to.get());
  }
}

template <class T> void sizes() {
  for (const Mode& m : kModes)
    for (Layout layout : kLayouts) {
      auto go = [&](const Shape& s, int64_t h, int64_t w) {
        run<T>(s, h, w, {resize(s[2], h, m), resize(s[3], w, m)}, layout);
      };
      go({2, 8, 5, 7}, 9, 4);
      go({1, 3, 4, 6}, 4, 6);
      go({1, 8, 19, 23}, 3, 5);   // many weights: two passes, the height first
      go({1, 2, 3, 4}, 17, 21);   // likewise backwards, the width first
      go({1, 2, 1, 5}, 6, 1);
      go({0, 2, 3, 4}, 6, 2);
      if (m.corners) continue;
      const smalti_resize odd[2] = {resize(7, 4, m, 1 / 0.6), resize(5, 8, m, 1 / 1.7)};
      run<T>({1, 3, 7, 5}, 4, 8, odd, layout);
    }
}

}  // namespace

TEST(interpolate_f32) { sizes<float>(); }
TEST(interpolate_f64) { sizes<double>(); }
TEST(interpolate_bf16) { sizes<bf16>(); }
TEST(interpolate_f16) { sizes<f16>(); }

/// A neighbour of weight 0 is not looked at.
TEST(interpolate_infinity) {
  const float inf = INFINITY;
  Batch<float> x({1, 1, 1, 3}, kFirst, {0, inf, 0}), y({1, 1, 1, 5}, kFirst);
  const Mode corners{SMALTI_LINEAR, true, false};
  const smalti_resize axes[2] = {resize(1, 1, corners), resize(3, 5, corners)};
  Dev<uint8_t> workspace((size_t)smalti_interpolate_workspace(&x.view, &y.view, axes, 0));
  CHECK_RC(smalti_interpolate(&x.view, &y.view, axes, 0, workspace.p, nullptr));
  check_same("infinity", y.get(), {0, inf, inf, inf, 0});
}

TEST(interpolate_refuses) {
  Batch<float> x({1, 2, 4, 4}, kFirst), y({1, 2, 8, 8}, kFirst), other({2, 2, 8, 8}, kFirst);
  const Mode linear{SMALTI_LINEAR, false, false};
  smalti_resize axes[2] = {resize(4, 8, linear), resize(4, 8, linear)};
  CHECK(smalti_interpolate_workspace(&x.view, &y.view, axes, 0) > 0);
  CHECK(smalti_interpolate_workspace(&x.view, &y.view, axes, 1) == -1);
  CHECK(smalti_interpolate_workspace(&x.view, &other.view, axes, 0) == -1);
  axes[1].mode = SMALTI_AREA;
  axes[1].antialias = 1;
  CHECK(smalti_interpolate_workspace(&x.view, &y.view, axes, 0) == -1);
}
