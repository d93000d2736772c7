// Losses against their definitions in f64.
#include "harness.hpp"
#include "../common/rows.cuh"
using namespace smalti;
using test::Dev;

namespace {

using Vec = std::vector<double>;
template <class T> double precise() { return std::is_same<T, double>::value ? 1e-13 : 3e-6; }

template <class A> void cross_entropy(int64_t rows, int64_t classes, bool weighted, double smoothing, bool soft, bool each) {
  const size_t n = (size_t)(rows * classes), r = (size_t)rows;
  const auto hx = test::randn<A>(n, 1, 3), hg = test::randn<A>(r, 2);
  auto ht = test::randn<A>(n, 3), hw = test::randn<A>((size_t)classes, 4);
  for (auto& t : ht) t = std::fabs(t);
  for (auto& w : hw) w = std::fabs(w);
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < rows; i++) labels.push_back(i == 1 ? -100 : i * 7919 % classes);
  const Vec x = test::wide(hx), t = test::wide(ht);
  Vec max(r), log_sum(r), loss(r), share(r), dx(n), dt(n);
  double divisor = 0;
  auto w = [&](int64_t c) { return weighted ? (double)hw[(size_t)c] : 1.0; };
  for (int64_t i = 0; i < rows; i++) share[i] = soft ? 1 : i == 1 ? 0 : w(labels[i]), divisor += share[i];
  for (int64_t i = 0; i < rows; i++) {
    double m = -INFINITY, s = 0, total = 0;
    for (int64_t c = 0; c < classes; c++) m = std::max(m, x[i * classes + c]);
    for (int64_t c = 0; c < classes; c++) s += std::exp(x[i * classes + c] - m);
    max[i] = m; log_sum[i] = std::log(s);
    const double g = each ? (double)hg[i] : (double)hg[0] / divisor;
    auto u = [&](int64_t c) { return w(c) * ((soft ? t[i * classes + c] : c == labels[i]) * (1 - smoothing) + smoothing / (double)classes); };
    const bool ignored = !soft && i == 1;
    for (int64_t c = 0; c < classes && !ignored; c++) { loss[i] -= u(c) * (x[i * classes + c] - m - log_sum[i]); total += u(c); }
    for (int64_t c = 0; c < classes; c++) {
      const double p = std::exp(x[i * classes + c] - m - log_sum[i]);
      dx[i * classes + c] = ignored ? 0 : (p * total - u(c)) * g;
      dt[i * classes + c] = -(x[i * classes + c] - m - log_sum[i]) * w(c) * g * (1 - smoothing);
    }
  }
  Dev<A> dx_x(hx), dp(ht), dw(hw), dmax(r), dlog(r), dloss(r), dshare(r), dg(hg), ddx(n), ddt(n), ddiv(std::vector<A>{(A)divisor});
  Dev<int64_t> dl(labels);
  const smalti_view xv = test::view(dx_x, {rows, classes}), tv = soft ? test::view(dp, {rows, classes}) : test::view(dl, {rows}), wv = test::view(dw, {classes}),
                    mv = test::view(dmax, {rows}), lv = test::view(dlog, {rows}), ov = test::view(dloss, {rows}), sv = test::view(dshare, {rows}),
                    dxv = test::view(ddx, {rows, classes}), dtv = test::view(ddt, {rows, classes}), divv = test::view(ddiv, {});
  smalti_view gv = test::view(dg, {rows});
  if (!each) gv.rank = 0;
  CHECK_RC(smalti_cross_entropy_forward(&xv, &tv, weighted ? &wv : nullptr, &mv, &lv, &ov, &sv, -100, smoothing, nullptr));
  test::check_close("max", dmax.get(), max, 0);
  test::check_close("log_sum", dlog.get(), log_sum, precise<A>());
  test::check_close("loss", dloss.get(), loss, precise<A>());
  test::check_close("share", dshare.get(), share, precise<A>());
  CHECK_RC(smalti_cross_entropy_backward(&xv, &tv, weighted ? &wv : nullptr, &mv, &lv, &gv, each ? nullptr : &divv, &dxv, soft ? &dtv : nullptr, -100,
                                         smoothing, nullptr));
  test::check_close("dx", ddx.get(), dx, precise<A>());
  if (soft) test::check_close("dtarget", ddt.get(), dt, precise<A>());
}
template <class A> void cross_entropies() {
  for (bool soft : {false, true})
    for (double smoothing : {0.0, 0.1}) {
      cross_entropy<A>(11, 10, true, smoothing, soft, true);
      cross_entropy<A>(5, 64, false, smoothing, soft, false);
      cross_entropy<A>(3, 1500, true, smoothing, soft, false);
      cross_entropy<A>(2, 1031, false, smoothing, soft, true);
    }
}

template <class T> void nll(bool weighted, bool each) {
  using A = Acc<T>;
  const int64_t rows = 7, classes = 5;
  const auto hx = test::randn<T>(35, 1), hw = test::randn<T>(5, 2), hg = test::randn<T>(7, 3);
  const std::vector<int64_t> labels{0, 4, 2, -1, 1, 3, 3};
  Vec loss(7), share(7), dx(35);
  double divisor = 0;
  for (int i = 0; i < 7; i++) {
    if (labels[i] == -1) continue;
    share[i] = weighted ? (double)widen(hw[labels[i]]) : 1;
    loss[i] = -share[i] * (double)widen(hx[i * 5 + labels[i]]);
    divisor += share[i];
  }
  for (int i = 0; i < 7; i++) if (labels[i] >= 0) dx[i * 5 + labels[i]] = -share[i] * (double)widen(hg[each ? i : 0]) / (each ? 1 : divisor);
  Dev<T> x(hx), w(hw), g(hg), d(35);
  Dev<A> l(7), s(7), div(std::vector<A>{(A)divisor});
  Dev<int64_t> y(labels);
  const smalti_view xv = test::view(x, {rows, classes}), wv = test::view(w, {classes}), lv = test::view(l, {rows}), sv = test::view(s, {rows}),
                    yv = test::view(y, {rows}), dv = test::view(d, {rows, classes}), divv = test::view(div, {});
  smalti_view gv = test::view(g, {rows});
  if (!each) gv.rank = 0;
  CHECK_RC(smalti_nll_forward(&xv, &yv, weighted ? &wv : nullptr, &lv, &sv, -1, nullptr));
  test::check_close("loss", l.get(), loss, precise<A>());
  test::check_close("share", s.get(), share, precise<A>());
  CHECK_RC(smalti_nll_backward(&yv, weighted ? &wv : nullptr, &gv, each ? nullptr : &divv, &dv, -1, nullptr));
  test::check_close("dx", d.get(), dx, sizeof(T) == 2 ? 1.0 / 256 : precise<A>());
}

struct Definition { double (*f)(double, double); double (*dx)(double, double); double (*dt)(double, double); };
double sign(double d) { return d > 0 ? 1 : d < 0 ? -1 : 0; }
const Definition kLosses[] = {
    {[](double x, double t) { return (x - t) * (x - t); }, [](double x, double t) { return 2 * (x - t); }, [](double x, double t) { return 2 * (t - x); }},
    {[](double x, double t) { return std::fabs(x - t); }, [](double x, double t) { return sign(x - t); }, [](double x, double t) { return sign(t - x); }},
    {[](double x, double t) { const double d = std::fabs(x - t); return d < 0.7 ? d * d / 1.4 : d - 0.35; },
     [](double x, double t) { const double d = x - t; return std::fabs(d) < 0.7 ? d / 0.7 : sign(d); },
     [](double x, double t) { const double d = t - x; return std::fabs(d) < 0.7 ? d / 0.7 : sign(d); }},
    {[](double x, double t) { const double d = std::fabs(x - t); return d < 0.7 ? d * d / 2 : 0.7 * (d - 0.35); },
     [](double x, double t) { const double d = x - t; return std::fabs(d) < 0.7 ? d : 0.7 * sign(d); },
     [](double x, double t) { const double d = t - x; return std::fabs(d) < 0.7 ? d : 0.7 * sign(d); }},
    {[](double x, double t) { return t * (std::log(t) - x); }, [](double, double t) { return -t; }, [](double x, double t) { return std::log(t) + 1 - x; }},
    {[](double x, double t) { return std::exp(t) * (t - x); }, [](double, double t) { return -std::exp(t); },
     [](double x, double t) { return std::exp(t) * (t - x + 1); }},
    {[](double x, double t) { return std::log1p(std::exp(x)) - x * t; }, [](double x, double t) { return 1 / (1 + std::exp(-x)) - t; }, [](double x, double) { return -x; }},
};

template <class A> void pointwise(int64_t n) {
  const size_t size = (size_t)n;
  const auto hx = test::randn<A>(size, 1), hg = test::randn<A>(size, 3);
  auto ht = test::randn<A>(size, 2);
  for (auto& t : ht) t = std::fabs(t) + (A)0.01;
  const Vec x = test::wide(hx), t = test::wide(ht), g = test::wide(hg);
  Dev<A> dx(hx), dt(ht), dg(hg), y(size), one(1), out(size), out_t(size);
  const smalti_view xv = test::view(dx, {n}), tv = test::view(dt, {n}), yv = test::view(y, {n}), ov = test::view(one, {}), dv = test::view(out, {n}),
                    dtv = test::view(out_t, {n}), gv = test::view(dg, {n}), g1 = test::view(dg, {});
  Dev<uint8_t> workspace((size_t)smalti_loss_workspace(&xv));
  for (int loss = 0; loss < 7; loss++) {
    Vec want, slope, slope_t, mean, mean_t;
    double sum = 0;
    for (size_t i = 0; i < size; i++) {
      want.push_back(kLosses[loss].f(x[i], t[i]));
      sum += want.back();
      slope.push_back(kLosses[loss].dx(x[i], t[i]) * g[i]);
      slope_t.push_back(kLosses[loss].dt(x[i], t[i]) * g[i]);
      mean.push_back(kLosses[loss].dx(x[i], t[i]) * g[0] / (double)n);
      mean_t.push_back(kLosses[loss].dt(x[i], t[i]) * g[0] / (double)n);
    }
    CHECK_RC(smalti_loss_forward(loss, &xv, &tv, &yv, 0.7, 1, nullptr, nullptr));
    test::check_close("each", y.get(), want, precise<A>());
    CHECK_RC(smalti_loss_forward(loss, &xv, &tv, &ov, 0.7, (double)n, workspace.p, nullptr));
    test::check_close("mean", one.get(), {sum / (double)n}, precise<A>());
    CHECK_RC(smalti_loss_backward(loss, &xv, &tv, &gv, &dv, &dtv, 0.7, 1, nullptr));
    test::check_close("dx each", out.get(), slope, precise<A>());
    test::check_close("dt each", out_t.get(), slope_t, precise<A>());
    CHECK_RC(smalti_loss_backward(loss, &xv, &tv, &g1, &dv, &dtv, 0.7, (double)n, nullptr));
    test::check_close("dx mean", out.get(), mean, precise<A>());
    test::check_close("dt mean", out_t.get(), mean_t, precise<A>());
  }
}

}  // namespace

TEST(loss_cross_entropy_f32) { cross_entropies<float>(); }
TEST(loss_cross_entropy_f64) { cross_entropies<double>(); }
TEST(loss_nll) {
  for (bool weighted : {false, true}) for (bool each : {false, true}) { nll<float>(weighted, each); nll<double>(weighted, each); nll<bf16>(weighted, each); nll<f16>(weighted, each); }
}
TEST(loss_pointwise) { pointwise<float>(40); pointwise<float>(9001); pointwise<double>(33); }

TEST(loss_edges) {
  const float inf = INFINITY;
  std::vector<float> host{-inf, 1, 2, -inf, -inf, -inf, NAN, 1, 2, inf, 0, 0};
  Dev<float> x(host), max(4), log_sum(4), loss(4), share(4);
  Dev<int64_t> labels(std::vector<int64_t>{1, 0, 1, 2}), found(2);
  const smalti_view xv = test::view(x, {4, 3}), yv = test::view(labels, {4}), mv = test::view(max, {4}), lv = test::view(log_sum, {4}), ov = test::view(loss, {4}),
                    sv = test::view(share, {4}), fv = test::view(found, {2});
  CHECK_RC(smalti_cross_entropy_forward(&xv, &yv, nullptr, &mv, &lv, &ov, &sv, -100, 0, nullptr));
  const auto l = loss.get();
  CHECK(std::fabs(l[0] - 1.3132617f) < 1e-6 && std::isnan(l[1]) && std::isnan(l[2]) && std::isnan(l[3]));
  CHECK_RC(smalti_wrong_label(&yv, &fv, 3, -100, nullptr));
  CHECK(found.get()[0] == -1);
  CHECK_RC(smalti_wrong_label(&yv, &fv, 2, -100, nullptr));
  CHECK(found.get()[0] == 3 && found.get()[1] == 2);
  CHECK_RC(smalti_wrong_label(&yv, &fv, 2, 2, nullptr));
  CHECK(found.get()[0] == -1);
}
