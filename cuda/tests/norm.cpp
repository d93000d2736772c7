// Norms against their definitions in f64. Low precision: the result is rounded once, so half a unit in the last
// place of the largest result, and what the inputs' rounding makes of the statistics is in the reference too.
#include "harness.hpp"
#include "../common/rows.cuh"
using namespace smalti;
using test::Dev;

namespace {

using Vec = std::vector<double>;
template <class T> double unit() { return std::is_same<T, bf16>::value ? 1.0 / 256 : std::is_same<T, f16>::value ? 1.0 / 2048 : 0; }
/// Tolerances of outputs of T, and of f32 (f64) numbers.
template <class T> double rounded() { return unit<T>() + (std::is_same<T, double>::value ? 1e-13 : 3e-6); }
template <class T> double precise() { return std::is_same<T, double>::value ? 1e-13 : 3e-6; }

template <class T> void layer_norm(int64_t rows, int64_t n, bool centered, bool add, bool affine, bool wait) {
  using A = Acc<T>;
  const size_t size = (size_t)(rows * n);
  auto hx = test::randn<T>(size, 1);
  const auto hr = test::randn<T>(size, 2), hg = test::randn<T>(size, 3), hp = test::randn<T>(size, 4);
  const auto hw = test::randn<A>((size_t)n, 5), hb = test::randn<A>((size_t)n, 6);
  Dev<T> x(hx), r(hr), g(hg), pending(hp), y(size), sum(size), dx(size);
  Dev<A> w(hw), b(hb), mean((size_t)rows), rstd((size_t)rows), dw((size_t)n), db((size_t)n);
  const smalti_view xv = test::view(x, {rows, n}), rv = test::view(r, {rows, n}), gv = test::view(g, {rows, n}), pv = test::view(pending, {rows, n}),
                    yv = test::view(y, {rows, n}), sv = test::view(sum, {rows, n}), dv = test::view(dx, {rows, n}), wv = test::view(w, {n}),
                    bv = test::view(b, {n}), mv = test::view(mean, {rows}), tv = test::view(rstd, {rows}), dwv = test::view(dw, {n}),
                    dbv = test::view(db, {n});
  CHECK_RC(smalti_layer_norm_forward(&xv, add ? &rv : nullptr, affine ? &wv : nullptr, affine && centered ? &bv : nullptr, &yv,
                                     add ? &sv : nullptr, centered ? &mv : nullptr, &tv, 1e-5, nullptr));
  if (add) {
    for (size_t i = 0; i < size; i++) hx[i] = narrow<T>(widen(hx[i]) + widen(hr[i]));
    test::check_same("sum", sum.get(), hx);
  }
  const Vec vx = test::wide(hx), vg = test::wide(hg), vp = test::wide(hp), vw = test::wide(hw), vb = test::wide(hb);
  Vec wy(size), wdx(size), wdw((size_t)n), wdb((size_t)n);
  for (int64_t row = 0; row < rows; row++) {
    const size_t o = (size_t)(row * n);
    double m = 0, v = 0, mg = 0, mgx = 0;
    for (int64_t i = 0; i < n && centered; i++) m += vx[o + i] / (double)n;
    for (int64_t i = 0; i < n; i++) v += (vx[o + i] - m) * (vx[o + i] - m) / (double)n;
    const double s = 1 / std::sqrt(v + 1e-5);
    for (int64_t i = 0; i < n; i++) {
      const double xhat = (vx[o + i] - m) * s, gw = vg[o + i] * (affine ? vw[i] : 1);
      wy[o + i] = xhat * (affine ? vw[i] : 1) + (affine && centered ? vb[i] : 0);
      wdw[i] += vg[o + i] * xhat;
      wdb[i] += vg[o + i];
      mg += centered ? gw / (double)n : 0;
      mgx += gw * xhat / (double)n;
    }
    for (int64_t i = 0; i < n; i++)
      wdx[o + i] = s * (vg[o + i] * (affine ? vw[i] : 1) - mg - (vx[o + i] - m) * s * mgx) + (wait ? vp[o + i] : 0);
  }
  test::check_close("y", y.get(), wy, rounded<T>());
  const smalti_view in = add ? sv : xv;
  const int64_t bytes = smalti_layer_norm_backward_workspace(&in, affine);
  CHECK(bytes >= 0);
  Dev<uint8_t> workspace((size_t)bytes);
  auto run = [&] {
    return smalti_layer_norm_backward(&in, &gv, affine ? &wv : nullptr, centered ? &mv : nullptr, &tv, wait ? &pv : nullptr, &dv,
                                      affine ? &dwv : nullptr, affine && centered ? &dbv : nullptr, workspace.p, nullptr);
  };
  CHECK_RC(run());
  const auto first = dx.get();
  const auto first_dw = dw.get();
  test::check_close("dx", first, wdx, rounded<T>());
  if (affine) test::check_close("dweight", first_dw, wdw, precise<T>());
  if (affine && centered) test::check_close("dbias", db.get(), wdb, precise<T>());
  CHECK_RC(run());
  test::check_same("twice", first, dx.get());
  if (affine) test::check_same("twice", first_dw, dw.get());
}
template <class T> void layer_norms() {
  layer_norm<T>(11, 96, true, false, true, true);   // a warp a row
  layer_norm<T>(70, 49, true, true, true, false);   // odd rows
  layer_norm<T>(5, 768, true, true, true, true);    // a block of 128
  layer_norm<T>(3, 768, false, false, true, false); // rms norm
  layer_norm<T>(2, 2304, true, false, false, true); // a block of 512
  layer_norm<T>(3, 9216, true, true, true, true);   // long
  layer_norm<T>(2, 8193, false, false, true, false);
}

/// Memory [images, positions, channels, area].
struct Shape { int64_t images, positions, channels, area; };
const Shape kShapes[] = {{3, 1, 6, 40}, {2, 1, 5, 7}, {3, 20, 16, 1}, {2, 9, 6, 1}, {40, 1, 48, 1}};

/// `groups` 0: batch norm.
template <class T> void channel_norm(const Shape& s, int64_t groups, bool batch) {
  using A = Acc<T>;
  const int64_t area = s.positions * s.area, C = s.channels, size = groups ? C / groups : 1;
  const int64_t sets = groups ? s.images * groups : C, elements = groups ? size * area : s.images * area;
  const size_t n = (size_t)(s.images * area * C);
  const auto hx = test::randn<T>(n, 1), hg = test::randn<T>(n, 2);
  const auto hw = test::randn<A>((size_t)C, 3), hb = test::randn<A>((size_t)C, 4);
  const Vec vx = test::wide(hx), vg = test::wide(hg), vw = test::wide(hw), vb = test::wide(hb);
  auto channel = [&](size_t i) { return (int64_t)i / s.area % C; };
  auto set = [&](size_t i) { return groups ? (int64_t)i / (area * C) * groups + channel(i) / size : channel(i); };
  Vec m((size_t)sets), v((size_t)sets), mg((size_t)sets), mgx((size_t)sets), wy(n), wdx(n), wdw((size_t)C), wdb((size_t)C);
  for (size_t i = 0; i < n; i++) m[set(i)] += vx[i] / (double)elements;
  for (size_t i = 0; i < n; i++) v[set(i)] += (vx[i] - m[set(i)]) * (vx[i] - m[set(i)]) / (double)elements;
  std::vector<A> hm, hv;
  for (double e : m) hm.push_back((A)e);
  for (double e : v) hv.push_back((A)e);
  Dev<T> x(hx), g(hg), y(n), dx(n);
  Dev<A> w(hw), b(hb), mean(hm), var(hv), rstd((size_t)sets), dw((size_t)C), db((size_t)C), moved((size_t)sets), moved_var((size_t)sets);
  const std::vector<int64_t> shape{s.images, s.positions, C, s.area};
  const smalti_view xv = test::view(x, shape), gv = test::view(g, shape), yv = test::view(y, shape), dv = test::view(dx, shape), wv = test::view(w, {C}),
                    bv = test::view(b, {C}), mv = test::view(mean, {sets}), vv = test::view(var, {sets}), tv = test::view(rstd, {sets}),
                    dwv = test::view(dw, {C}), dbv = test::view(db, {C}), nm = test::view(moved, {sets}), nv = test::view(moved_var, {sets});
  CHECK_RC(smalti_batch_norm_statistics(&mv, &vv, &tv, &mv, &vv, &nm, &nv, 1e-5, 0.1, 2.0, nullptr));
  Vec want;
  for (double e : v) want.push_back(0.9 * e + 0.2 * e);
  test::check_close("running variance", moved_var.get(), want, precise<T>());
  test::check_close("running mean", moved.get(), m, precise<T>());
  CHECK_RC(smalti_channel_norm_forward(&xv, &mv, &tv, &wv, &bv, &yv, groups, nullptr));
  for (size_t i = 0; i < n; i++) {
    const int64_t c = channel(i), k = set(i);
    const double r = 1 / std::sqrt(v[k] + 1e-5), xhat = (vx[i] - m[k]) * r;
    wy[i] = xhat * vw[c] + vb[c];
    wdw[c] += vg[i] * xhat;
    wdb[c] += vg[i];
    if (batch) { mg[k] += vg[i] * vw[c] / (double)elements; mgx[k] += vg[i] * vw[c] * xhat / (double)elements; }
  }
  for (size_t i = 0; i < n; i++) {
    const int64_t c = channel(i), k = set(i);
    const double r = 1 / std::sqrt(v[k] + 1e-5);
    wdx[i] = r * (vg[i] * vw[c] - mg[k] - (vx[i] - m[k]) * r * mgx[k]);
  }
  test::check_close("y", y.get(), wy, rounded<T>());
  const int64_t bytes = groups ? smalti_group_norm_backward_workspace(&xv, groups) : smalti_batch_norm_backward_workspace(&xv);
  CHECK(bytes >= 0);
  Dev<uint8_t> workspace((size_t)bytes);
  auto run = [&] {
    return groups ? smalti_group_norm_backward(&xv, &gv, &mv, &tv, &wv, &dv, &dwv, &dbv, groups, workspace.p, nullptr)
                  : smalti_batch_norm_backward(&xv, &gv, &mv, &tv, &wv, &dv, &dwv, &dbv, batch, workspace.p, nullptr);
  };
  CHECK_RC(run());
  const auto first = dx.get();
  test::check_close("dx", first, wdx, rounded<T>());
  test::check_close("dweight", dw.get(), wdw, precise<T>());
  test::check_close("dbias", db.get(), wdb, precise<T>());
  CHECK_RC(run());
  test::check_same("twice", first, dx.get());
}
template <class T> void channel_norms() {
  for (auto& s : kShapes) {
    channel_norm<T>(s, 0, true);
    channel_norm<T>(s, 0, false);
    channel_norm<T>(s, 1, true);
    channel_norm<T>(s, s.channels, true);
    if (s.channels % 2 == 0) channel_norm<T>(s, 2, true);
  }
}

template <class T> void normalize(int64_t rows, int64_t n, double p, double eps) {
  using A = Acc<T>;
  const size_t size = (size_t)(rows * n);
  const auto hx = test::randn<T>(size, 1), hg = test::randn<T>(size, 2);
  const Vec vx = test::wide(hx), vg = test::wide(hg);
  Vec wy(size), wdx(size);
  for (int64_t r = 0; r < rows; r++) {
    double norm = 0, dot = 0;
    for (int64_t i = 0; i < n; i++) { norm += std::pow(std::fabs(vx[r * n + i]), p); dot += vx[r * n + i] * vg[r * n + i]; }
    norm = std::pow(norm, 1 / p);
    const double d = std::max(norm, eps);
    for (int64_t i = 0; i < n; i++) {
      const double e = vx[r * n + i];
      wy[r * n + i] = e / d;
      wdx[r * n + i] = vg[r * n + i] / d - (norm < eps ? 0 : dot / (norm * norm) * (e > 0 ? 1 : -1) * std::pow(std::fabs(e) / norm, p - 1));
    }
  }
  Dev<T> x(hx), g(hg), y(size), dx(size);
  Dev<A> norm((size_t)rows);
  const smalti_view xv = test::view(x, {rows, n}), gv = test::view(g, {rows, n}), yv = test::view(y, {rows, n}), dv = test::view(dx, {rows, n}),
                    nv = test::view(norm, {rows});
  CHECK_RC(smalti_normalize_forward(&xv, &yv, &nv, p, eps, nullptr));
  CHECK_RC(smalti_normalize_backward(&xv, &gv, &nv, &dv, p, eps, nullptr));
  test::check_close("y", y.get(), wy, rounded<T>());
  test::check_close("dx", dx.get(), wdx, rounded<T>());
}
template <class T> void normalizes() {
  for (double p : {2.0, 1.0, 3.0}) {
    normalize<T>(9, 64, p, 1e-12);
    normalize<T>(3, 33, p, 1e-12);
    normalize<T>(2, 1500, p, 1e-12);
    normalize<T>(3, 40, p, 1000.0);
  }
}

}  // namespace

TEST(norm_layer_f32) { layer_norms<float>(); }
TEST(norm_layer_f64) { layer_norms<double>(); }
TEST(norm_layer_bf16) { layer_norms<bf16>(); }
TEST(norm_layer_f16) { layer_norms<f16>(); }
TEST(norm_channels_f32) { channel_norms<float>(); }
TEST(norm_channels_f64) { channel_norms<double>(); }
TEST(norm_channels_bf16) { channel_norms<bf16>(); }
TEST(norm_channels_f16) { channel_norms<f16>(); }
TEST(norm_normalize) { normalizes<float>(); normalizes<double>(); normalizes<bf16>(); normalizes<f16>(); }

TEST(norm_refuses) {
  Dev<float> x(12), y(12), v(3);
  const smalti_view a = test::view(x, {3, 4}), b = test::view(y, {4, 3}), w = test::view(v, {3});
  smalti_view strided = a;
  strided.stride[0] = 8;
  CHECK(smalti_layer_norm_forward(&a, nullptr, nullptr, nullptr, &b, nullptr, nullptr, &w, 0, nullptr) != 0);
  CHECK(smalti_layer_norm_forward(&a, nullptr, &w, nullptr, &a, nullptr, nullptr, &w, 0, nullptr) != 0);
  CHECK(smalti_layer_norm_forward(&strided, nullptr, nullptr, nullptr, &a, nullptr, nullptr, &w, 0, nullptr) != 0);
  CHECK(smalti_normalize_forward(&a, &a, &w, 0, 1e-12, nullptr) != 0);
  CHECK(smalti_batch_norm_backward_workspace(&a) == -1);
}
