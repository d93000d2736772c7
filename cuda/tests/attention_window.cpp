// Attention in windows with decomposed relative positions and virtual padding, against plain loops in f64.
#include "harness.hpp"
using namespace smalti;

namespace {

struct Sizes { int64_t b, y, x, h, d, wh, ww; bool bias, rel; };
struct Result { std::vector<double> out, lse, dqkv, dbias, drh, drw; };

template <class T> double rounded(double x) { return (double)widen(narrow<T>((Acc<T>)x)); }

/// qkv [B, Y, X, 3, H, D], bias [3, H, D], go [B, Y, X, H, D]. What a chain of ops rounds to T is rounded to T
/// unless EXACT.
template <class T, bool EXACT>
Result naive(const Sizes& s, const std::vector<double>& qkv, const std::vector<double>& bias, const std::vector<double>& rh,
             const std::vector<double>& rw, const std::vector<double>& go, double scale) {
  auto r = [](double x) { return EXACT ? x : rounded<T>(x); };
  Result o{std::vector<double>(s.b * s.y * s.x * s.h * s.d), std::vector<double>(s.b * s.h * s.y * s.x), std::vector<double>(qkv.size()),
           std::vector<double>(3 * s.h * s.d), std::vector<double>(rh.size()), std::vector<double>(rw.size())};
  const int64_t n = s.wh * s.ww, ny = (s.y + s.wh - 1) / s.wh, nx = (s.x + s.ww - 1) / s.ww;
  std::vector<double> p(n), ds(n);
  for (int64_t b = 0; b < s.b; b++) for (int64_t wy = 0; wy < ny; wy++) for (int64_t wx = 0; wx < nx; wx++) for (int64_t h = 0; h < s.h; h++) {
    auto inside = [&](int64_t t) { return wy * s.wh + t / s.ww < s.y && wx * s.ww + t % s.ww < s.x; };
    auto token = [&](int64_t t) { return (b * s.y + wy * s.wh + t / s.ww) * s.x + wx * s.ww + t % s.ww; };
    auto at = [&](int64_t t, int part) { return ((token(t) * 3 + part) * s.h + h) * s.d; };
    auto value = [&](int64_t t, int part) -> const double* { return inside(t) ? &qkv[at(t, part)] : &bias[(part * s.h + h) * s.d]; };
    auto slope = [&](int64_t t, int part) -> double* { return inside(t) ? &o.dqkv[at(t, part)] : &o.dbias[(part * s.h + h) * s.d]; };
    for (int64_t i = 0; i < n; i++) {
      if (!inside(i)) continue;
      const double *q = value(i, 0), *g = &go[(token(i) * s.h + h) * s.d];
      double* dq = slope(i, 0);
      double top = -INFINITY, sum = 0, delta = 0;
      for (int64_t j = 0; j < n; j++) {
        double x = 0, y = 0, z = 0;
        for (int64_t c = 0; c < s.d; c++) {
          x += q[c] * value(j, 1)[c];
          if (s.rel) { y += q[c] * rh[(i / s.ww - j / s.ww + s.wh - 1) * s.d + c]; z += q[c] * rw[(i % s.ww - j % s.ww + s.ww - 1) * s.d + c]; }
        }
        p[j] = r(r(r(x) * scale) + r(r(y) + r(z)));
        top = std::max(top, p[j]);
      }
      for (int64_t j = 0; j < n; j++) sum += std::exp(p[j] - top);
      const double lse = top + std::log(sum);
      o.lse[((b * s.h + h) * s.y + wy * s.wh + i / s.ww) * s.x + wx * s.ww + i % s.ww] = lse;
      for (int64_t j = 0; j < n; j++) p[j] = r(std::exp(p[j] - lse));
      for (int64_t c = 0; c < s.d; c++) {
        double x = 0;
        for (int64_t j = 0; j < n; j++) x += p[j] * value(j, 2)[c];
        o.out[(token(i) * s.h + h) * s.d + c] = r(x);
      }
      for (int64_t j = 0; j < n; j++) {
        ds[j] = 0;
        for (int64_t c = 0; c < s.d; c++) ds[j] += g[c] * value(j, 2)[c];
        ds[j] = r(ds[j]);
        delta += p[j] * ds[j];
      }
      for (int64_t j = 0; j < n; j++) {
        const double d = r(p[j] * (ds[j] - delta)), e = r(d * scale);
        const int64_t ih = (i / s.ww - j / s.ww + s.wh - 1) * s.d, iw = (i % s.ww - j % s.ww + s.ww - 1) * s.d;
        double *dk = slope(j, 1), *dv = slope(j, 2);
        for (int64_t c = 0; c < s.d; c++) {
          dq[c] += e * value(j, 1)[c];
          dk[c] += e * q[c];
          dv[c] += p[j] * g[c];
          if (s.rel) { dq[c] += d * (rh[ih + c] + rw[iw + c]); o.drh[ih + c] += d * q[c]; o.drw[iw + c] += d * q[c]; }
        }
      }
    }
  }
  for (auto* g : {&o.dqkv, &o.dbias, &o.drh, &o.drw}) for (double& x : *g) x = r(x);
  return o;
}

double worst(const std::vector<double>& a, const std::vector<double>& b) {
  double w = 0;
  for (size_t i = 0; i < a.size(); i++) w = std::max(w, std::isnan(a[i]) ? INFINITY : std::fabs(a[i] - b[i]));
  return w;
}
template <class A> void check_error(const char* what, const std::vector<A>& got, const std::vector<double>& exact, const std::vector<double>& unfused,
                                    double factor, double floor) {
  test::checks()++;
  double largest = 1;
  for (double x : exact) largest = std::max(largest, std::fabs(x));
  const double ours = worst(test::wide(got), exact), theirs = worst(unfused, exact);
  if (std::getenv("SHOW")) std::printf("    %-6s error %.3g, unfused %.3g, largest %.3g\n", what, ours, theirs, largest);
  if (!(ours <= factor * theirs + floor * largest)) {
    char line[200];
    std::snprintf(line, sizeof line, "%s: error %.3g, unfused in this type %.3g", what, ours, theirs);
    test::fail(line);
  }
}

template <class T> void run(Sizes s, double deviation = 1.0, bool again = false) {
  using A = Acc<T>;
  const double scale = 1 / std::sqrt((double)s.d), floor = sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 4e-6 : 1e-5;
  const int64_t tokens = s.b * s.y * s.x, nh = (2 * s.wh - 1) * s.d, nw = (2 * s.ww - 1) * s.d;
  auto qkv = test::randn<T>(tokens * 3 * s.h * s.d, 1, deviation), bias = test::randn<T>(3 * s.h * s.d, 2), rh = test::randn<T>(nh, 3, 0.5),
       rw = test::randn<T>(nw, 4, 0.5), go = test::randn<T>(tokens * s.h * s.d, 5);
  if (!s.bias) bias.assign(bias.size(), narrow<T>((A)0));
  test::Dev<T> dqkv(qkv), dbias(bias), drh(rh), drw(rw), dgo(go), out(go.size()), gqkv(qkv.size());
  test::Dev<A> lse(s.b * s.h * s.y * s.x), gbias(bias.size()), grh(nh), grw(nw);
  auto part = [&](void* p, int64_t i, int64_t of) {
    smalti_view v{};
    v.ptr = (T*)p + i * s.h * s.d; v.dtype = test::dtype_of<T>(); v.rank = 5;
    const int64_t step = of * s.h * s.d, shape[5] = {s.b, s.h, s.y, s.x, s.d}, stride[5] = {s.y * s.x * step, s.d, s.x * step, step, 1};
    for (int j = 0; j < 5; j++) { v.shape[j] = shape[j]; v.stride[j] = stride[j]; }
    return v;
  };
  const smalti_view q = part(dqkv.p, 0, 3), k = part(dqkv.p, 1, 3), v = part(dqkv.p, 2, 3), o = part(out.p, 0, 1), g = part(dgo.p, 0, 1),
                    l = test::view(lse, {s.b, s.h, s.y, s.x}), vb = test::view(dbias, {3, s.h, s.d}), vrh = test::view(drh, {2 * s.wh - 1, s.d}),
                    vrw = test::view(drw, {2 * s.ww - 1, s.d}), gb = test::view(gbias, {3, s.h, s.d}), gh = test::view(grh, {2 * s.wh - 1, s.d}),
                    gw = test::view(grw, {2 * s.ww - 1, s.d}), gq = part(gqkv.p, 0, 3), gk = part(gqkv.p, 1, 3), gv = part(gqkv.p, 2, 3);
  auto given = [](bool is, const smalti_view& x) { return is ? &x : nullptr; };
  const int64_t bytes = smalti_window_attention_workspace(&q, s.bias, s.rel, s.wh, s.ww);
  CHECK(bytes >= 0);
  test::Dev<uint8_t> workspace(bytes);
  auto once = [&]() {
    CHECK_RC(smalti_window_attention_forward(&q, &k, &v, given(s.bias, vb), given(s.rel, vrh), given(s.rel, vrw), &o, &l, s.wh, s.ww, scale, nullptr));
    CHECK_RC(smalti_window_attention_backward(&q, &k, &v, given(s.bias, vb), given(s.rel, vrh), given(s.rel, vrw), &o, &g, &l, workspace.p, &gq, &gk, &gv,
                                              given(s.bias, gb), given(s.rel, gh), given(s.rel, gw), s.wh, s.ww, scale, nullptr));
  };
  once();
  const auto wq = test::wide(qkv), wb = test::wide(bias), wrh = test::wide(rh), wrw = test::wide(rw), wg = test::wide(go);
  const Result exact = naive<T, true>(s, wq, wb, wrh, wrw, wg, scale), unfused = naive<T, false>(s, wq, wb, wrh, wrw, wg, scale);
  const auto first = out.get(), grad = gqkv.get();
  check_error("out", first, exact.out, unfused.out, 2, floor);
  test::check_close("lse", lse.get(), exact.lse, sizeof(T) == 8 ? 1e-13 : 2e-6);
  check_error("dqkv", grad, exact.dqkv, unfused.dqkv, 3, floor);
  if (s.bias) check_error("dbias", gbias.get(), exact.dbias, unfused.dbias, 3, floor);
  if (s.rel) { check_error("drel_h", grh.get(), exact.drh, unfused.drh, 3, floor); check_error("drel_w", grw.get(), exact.drw, unfused.drw, 3, floor); }
  if (!again) return;
  const auto tables = s.rel ? grh.get() : std::vector<A>();
  once();
  test::check_same("out", out.get(), first);
  test::check_same("dqkv", gqkv.get(), grad);
  if (s.rel) test::check_same("drel_h", grh.get(), tables);
}

}  // namespace

TEST(attention_window_14) {
  run<bf16>({1, 14, 14, 1, 64, 14, 14, true, true});
  run<bf16>({1, 17, 9, 2, 64, 14, 14, true, true}, 1, true);
  run<f16>({1, 9, 11, 1, 80, 14, 14, true, true}, 2);
}
TEST(attention_window_7) {
  run<f16>({2, 8, 9, 1, 64, 7, 7, true, true}, 1, true);
  run<bf16>({1, 7, 7, 2, 80, 7, 7, false, true});
}
TEST(attention_window_global) {
  run<bf16>({1, 3, 64, 1, 64, 3, 64, false, true}, 1, true);  // one row of keys a step, as on 64x64
  run<bf16>({1, 10, 11, 1, 32, 10, 11, false, true});
  run<f16>({1, 2, 59, 1, 80, 2, 59, false, true});
  run<bf16>({1, 2, 70, 1, 64, 2, 70, false, true});
}
TEST(attention_window_other) {
  run<bf16>({1, 6, 5, 1, 24, 4, 3, true, true}, 1, true);
  run<f16>({1, 6, 5, 2, 13, 5, 2, true, true});     // odd widths
  run<bf16>({1, 8, 9, 2, 64, 7, 5, true, false});   // without tables
  run<bf16>({1, 5, 5, 1, 112, 3, 3, false, true});  // padding by zeros
}
// The kernels with warpgroup instructions: windows of 9 to 16 columns and at most 14 rows, rows of 57 to 64 columns.
TEST(attention_window_wgmma) {
  const test::Wgmma on;
  run<bf16>({1, 14, 14, 1, 64, 14, 14, true, true});
  run<bf16>({1, 17, 9, 2, 64, 14, 14, true, true}, 1, true);
  run<f16>({1, 15, 33, 1, 80, 13, 16, true, true}, 2);
  run<f16>({1, 9, 11, 1, 64, 5, 9, false, true});  // padding by zeros
  run<bf16>({1, 5, 20, 1, 64, 2, 10, true, true});
  run<bf16>({1, 2, 9, 1, 64, 1, 5, true, false});  // not theirs, though of one row
}
// Their gradients: several windows, rows of 16, 48 and 64 tokens with padding; and what they leave to others.
TEST(attention_window_wgmma_gradients) {
  const test::Wgmma on;
  run<f16>({1, 9, 30, 1, 80, 14, 14, true, true}, 2);
  run<bf16>({2, 4, 16, 1, 64, 4, 16, false, true});
  run<bf16>({1, 4, 64, 1, 64, 4, 64, false, true}, 1, true);
  run<bf16>({1, 5, 70, 1, 80, 3, 61, true, true});
  run<f16>({1, 6, 42, 1, 64, 6, 42, false, true});
  run<bf16>({1, 5, 70, 1, 80, 4, 60, true, true});
  run<bf16>({1, 8, 9, 1, 64, 7, 7, true, true});
  run<bf16>({1, 8, 9, 2, 64, 7, 5, true, false});
}
TEST(attention_window_wgmma_global) {
  const test::Wgmma on;
  run<bf16>({1, 3, 64, 1, 64, 3, 64, false, true}, 1, true);
  run<f16>({1, 7, 59, 1, 64, 7, 59, false, true});
  run<bf16>({2, 2, 57, 1, 80, 2, 57, true, true}, 2);
  run<bf16>({1, 3, 60, 1, 64, 2, 60, true, true});  // beyond the image: not theirs
  run<bf16>({1, 15, 15, 1, 64, 15, 15, false, true});
}
TEST(attention_window_f32) {
  run<float>({1, 9, 10, 1, 20, 9, 9, true, true}, 1, true);
  run<float>({2, 6, 9, 2, 16, 4, 4, true, true});
  run<float>({1, 6, 5, 2, 13, 5, 2, true, false});
  run<float>({1, 5, 5, 1, 80, 5, 5, false, true});
  run<double>({1, 6, 9, 2, 16, 4, 4, true, true}, 1, true);
  run<double>({1, 7, 6, 1, 20, 7, 6, false, true});
}
