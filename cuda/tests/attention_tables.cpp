// Gradients of the relative position tables by themselves, from slopes that are given: in f64 from the same f32 slopes,
// so that one rounding of them to a half type, 2^-9 or 2^-12, would show.
#include "harness.hpp"
#include "../attention/table.cuh"
using namespace smalti;
using namespace smalti::attention;

namespace {

struct Shape { int b, y, x, h, d, wh, ww; };

/// `size` of the slopes; q is one of three parts of a row, `shift` elements from where it would be aligned.
template <class T> void run(Shape s, double size = 1, int shift = 0) {
  using A = Acc<T>;
  const int64_t tokens = (int64_t)s.b * s.y * s.x, step = 3 * s.h * s.d + shift, n = s.wh + s.ww, rows = 2 * n - 2;
  const auto q = test::randn<T>(tokens * step + shift, 1);
  const auto slopes = test::randn<A>(tokens * s.h * n, 2, size);
  test::Dev<T> dq(q);
  test::Dev<A> dslopes(slopes), part(kTableBlocks * rows * s.d), to_h((2 * s.wh - 1) * s.d), to_w((2 * s.ww - 1) * s.d);
  Problem p = {};
  p.q = {dq.p + shift, nullptr, s.y * s.x * step, s.d, s.x * step, step, 0, s.d};
  p.qs = p.ks = {s.y, s.x, s.wh, s.ww, round8(s.ww)};
  p.batch = s.b; p.heads = s.h; p.windows_y = (s.y + s.wh - 1) / s.wh; p.windows_x = (s.x + s.ww - 1) / s.ww;
  p.drel = dslopes.p;
  note_alignment(p, test::dtype_of<T>());
  CHECK_RC(run_tables<T>(p, part.p, to_h.p, to_w.p, nullptr));
  std::vector<double> want_h(to_h.n), want_w(to_w.n);
  for (int64_t i = 0; i < tokens * s.h; i++) {
    const int64_t x = i % s.x, y = i / s.x % s.y, h = i / s.x / s.y % s.h, b = i / s.x / s.y / s.h;
    for (int64_t k = 0; k < n; k++) {
      double* to = k < s.wh ? &want_h[(y % s.wh - k + s.wh - 1) * s.d] : &want_w[(x % s.ww - (k - s.wh) + s.ww - 1) * s.d];
      for (int64_t c = 0; c < s.d; c++)
        to[c] += (double)slopes[i * n + k] / size * (double)widen(q[shift + ((b * s.y + y) * s.x + x) * step + h * s.d + c]);
    }
  }
  auto scaled = [&](const test::Dev<A>& v) {
    auto o = test::wide(v.get());
    for (double& x : o) x /= size;
    return o;
  };
  const double allowed = sizeof(T) == 8 ? 1e-14 : 2e-5;
  test::check_close("rows", scaled(to_h), want_h, allowed);
  test::check_close("columns", scaled(to_w), want_w, allowed);
  const auto before = to_w.get();
  CHECK_RC(run_tables<T>(p, part.p, to_h.p, to_w.p, nullptr));
  test::check_same("columns", to_w.get(), before);
}

}  // namespace

TEST(attention_tables_windows) {
  run<bf16>({2, 17, 30, 3, 64, 14, 14});
  run<f16>({1, 17, 30, 2, 64, 14, 14});
  run<bf16>({1, 9, 16, 2, 80, 7, 7});
  run<f16>({1, 28, 14, 1, 80, 14, 14});
  run<bf16>({1, 6, 50, 1, 64, 3, 20});  // 16 tokens from the middle of one window row to the next
}
TEST(attention_tables_global) {
  run<bf16>({1, 64, 5, 1, 64, 64, 5});
  run<f16>({1, 5, 64, 1, 64, 5, 64});
  run<bf16>({1, 24, 24, 2, 32, 24, 24});
  run<bf16>({1, 2, 150, 1, 16, 2, 150});  // more rows than a block's warps hold
}
TEST(attention_tables_columns) {
  run<bf16>({1, 8, 9, 1, 128, 7, 7});
  run<f16>({1, 8, 9, 1, 96, 7, 7});
  run<bf16>({1, 8, 9, 2, 13, 7, 5});
  run<f16>({1, 5, 4, 2, 75, 2, 4}, 1, 3);
  run<bf16>({1, 4, 5, 1, 64, 1, 5}, 1, 1);
}
TEST(attention_tables_sizes) {
  run<f16>({1, 8, 8, 1, 32, 4, 4}, 1e-12);
  run<f16>({1, 8, 8, 1, 32, 4, 4}, 1e9);
  run<bf16>({1, 8, 8, 1, 32, 4, 4}, 1e-12);
}
TEST(attention_tables_f32) {
  run<float>({2, 17, 30, 1, 20, 14, 14});
  run<double>({1, 9, 8, 2, 13, 7, 5});
}
