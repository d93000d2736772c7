// Contrastive softmax against plain sums in f64.
#include "harness.hpp"
#include <array>
using namespace smalti;
using test::Dev;

namespace {

struct Case {
  int64_t n, m, d, offset;
  bool both, apart, by_depth;
  double scale;
  int64_t budget = 0;
};

/// Rows of length one, rounded to T.
template <class T> std::vector<T> units(int64_t n, int64_t d, unsigned seed) {
  auto x = test::wide(test::randn<double>((size_t)(n * d), seed));
  std::vector<T> out;
  for (int64_t i = 0; i < n; i++) {
    double s = 0;
    for (int64_t c = 0; c < d; c++) s += x[i * d + c] * x[i * d + c];
    for (int64_t c = 0; c < d; c++) out.push_back(narrow<T>((Acc<T>)(x[i * d + c] / std::sqrt(s))));
  }
  return out;
}

using Vec = std::vector<double>;
struct Result { Vec loss, dq, dk, dp, ds, rank; };

/// Everything from the definition. `round`: what the unfused computation in a half type rounds (logits, their
/// gradient, results).
Result reference(const Case& t, const Vec& q, const Vec& k, const Vec& p, double grad, const std::function<double(double)>& round) {
  const int64_t n = t.n, m = t.m, d = t.d;
  Vec s((size_t)(n * m)), own(n), g((size_t)(n * m)), g_own(n, 0.0);
  auto dot = [&](const double* a, const double* b) {
    double x = 0;
    for (int64_t c = 0; c < d; c++) x += a[c] * b[c];
    return x;
  };
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < m; j++) s[i * m + j] = round(t.scale * dot(&q[i * d], &k[j * d]));
    own[i] = t.apart ? round(t.scale * dot(&q[i * d], &p[i * d])) : s[i * m + t.offset + i];
  }
  Result r;
  double loss = 0, ds = 0;
  const double w = grad / (double)(n * (t.both ? 2 : 1));
  auto direction = [&](int64_t count, int64_t others, int64_t step, int64_t other, bool extra) {
    for (int64_t i = 0; i < count; i++) {
      double top = own[i], sum = 0;
      for (int64_t j = 0; j < others; j++) top = std::max(top, s[i * step + j * other]);
      for (int64_t j = 0; j < others; j++) sum += std::exp(s[i * step + j * other] - top);
      if (extra) sum += std::exp(own[i] - top);
      loss += (top + std::log(sum) - own[i]) / (double)(n * (t.both ? 2 : 1));
      for (int64_t j = 0; j < others; j++) g[i * step + j * other] += std::exp(s[i * step + j * other] - top) / sum;
      if (extra) g_own[i] = std::exp(own[i] - top) / sum - 1;
      else g[i * m + t.offset + i] -= 1;
    }
  };
  direction(n, m, m, 1, t.apart);
  if (t.both) direction(n, n, 1, m, false);
  r.loss = {loss};
  r.dq.assign(n * d, 0.0); r.dk.assign(m * d, 0.0); r.dp.assign(n * d, 0.0);
  for (int64_t i = 0; i < n; i++) {
    double above = 0;
    for (int64_t j = 0; j < m; j++) {
      ds += w * g[i * m + j] * s[i * m + j] / t.scale;
      above += s[i * m + j] > own[i];
      const double x = round(g[i * m + j]) * w * t.scale;
      for (int64_t c = 0; c < d; c++) { r.dq[i * d + c] += x * k[j * d + c]; r.dk[j * d + c] += x * q[i * d + c]; }
    }
    for (int64_t c = 0; c < d && t.apart; c++) {
      r.dq[i * d + c] += round(g_own[i]) * w * t.scale * p[i * d + c];
      r.dp[i * d + c] = round(g_own[i]) * w * t.scale * q[i * d + c];
    }
    r.rank.push_back(above);
  }
  for (auto* v : {&r.dq, &r.dk, &r.dp}) for (auto& x : *v) x = round(x);
  r.ds = {ds};
  return r;
}

/// `ranked`: the ranks too, which the warpgroup kernels leave to the others.
template <class T>
Result run(const Case& t, const std::vector<T>& q, const std::vector<T>& k, const std::vector<T>& p, double grad, bool ranked = true) {
  using A = Acc<T>;
  Dev<T> dq(q), dk(k), dp(p), gq(q.size()), gk(t.apart ? 1 : k.size()), gp(t.apart ? p.size() : 1);
  Dev<A> scale(std::vector<A>{(A)t.scale}), g(std::vector<A>{(A)grad}), loss(1), rows(3 * t.n), columns(2 * t.m + 1), ds(1);
  Dev<int64_t> rank(t.n);
  smalti_contrastive c{};
  c.q = test::view(dq, {t.n, t.d});
  c.k = test::view(dk, {t.m, t.d});
  if (t.by_depth) { c.k.stride[0] = 1; c.k.stride[1] = t.m; }
  if (t.apart) c.positive = test::view(dp, {t.n, t.d});
  c.scale = scale.p; c.offset = t.offset; c.budget = t.budget; c.both = t.both;
  const int64_t forward = smalti_contrastive_forward_workspace(&c), backward = smalti_contrastive_backward_workspace(&c, !t.apart);
  CHECK(forward > 0 && backward > 0);
  Dev<unsigned char> wf(forward), wb(backward);
  CHECK_RC(smalti_contrastive_forward(&c, loss.p, rows.p, columns.p, ranked ? rank.p : nullptr, wf.p, forward, nullptr));
  CHECK_RC(smalti_contrastive_backward(&c, rows.p, columns.p, g.p, gq.p, t.apart ? nullptr : gk.p, t.apart ? gp.p : nullptr,
                                       t.apart ? nullptr : ds.p, wb.p, backward, nullptr));
  Result r;
  r.loss = test::wide(loss.get()); r.dq = test::wide(gq.get());
  if (t.apart) r.dp = test::wide(gp.get());
  else { r.dk = test::wide(gk.get()); r.ds = test::wide(ds.get()); }
  for (auto x : rank.get()) r.rank.push_back((double)x);
  return r;
}

double worst(const Vec& a, const Vec& b) {
  double w = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < a.size() && i < b.size(); i++) if (!(std::fabs(a[i] - b[i]) <= w)) w = std::fabs(a[i] - b[i]);
  return w;
}

/// Half types: at most twice (gradients three times) the error of the unfused computation in the same type.
template <class T> void check(const char* what, const Case& t, double tolerance, bool ranked = true) {
  const double grad = 0.7;
  const auto q = units<T>(t.n, t.d, 1), k = units<T>(t.m, t.d, 2), p = t.apart ? units<T>(t.n, t.d, 3) : std::vector<T>(1, T{});
  std::vector<T> stored = k;
  if (stored.empty()) stored.resize(1);
  if (t.by_depth)
    for (int64_t j = 0; j < t.m; j++) for (int64_t c = 0; c < t.d; c++) stored[c * t.m + j] = k[j * t.d + c];
  const Vec wq = test::wide(q), wk = test::wide(k), wp = test::wide(p);
  const Result exact = reference(t, wq, wk, wp, grad, [](double x) { return x; });
  const Result got = run<T>(t, q, stored, p, grad, ranked);
  test::check_close((std::string(what) + " loss").c_str(), got.loss, exact.loss, sizeof(T) == 2 ? 1e-5 : tolerance);
  if (sizeof(T) > 2) {
    // ties of rounding aside
    double wrong = 0;
    for (int64_t i = 0; i < t.n; i++) wrong += got.rank[i] != exact.rank[i];
    CHECK(wrong <= (double)t.n / 50);
  }
  const Result unfused = reference(t, wq, wk, wp, grad, [](double x) { return (double)widen(narrow<T>((Acc<T>)x)); });
  auto gradient = [&](const char* name, const Vec& a, const Vec& b, const Vec& rough) {
    double largest = 1e-30;
    for (double x : b) largest = std::max(largest, std::fabs(x));
    const double error = worst(a, b), allowed = sizeof(T) == 2 ? 3 * worst(rough, b) + 1e-7 * largest : tolerance * largest;
    test::checks()++;
    if (!(error <= allowed)) {
      char line[200];
      std::snprintf(line, sizeof line, "%s %s: error %.3g of %.3g, allowed %.3g", what, name, error, largest, allowed);
      test::fail(line);
    }
  };
  gradient("dq", got.dq, exact.dq, unfused.dq);
  if (t.apart) return gradient("dp", got.dp, exact.dp, unfused.dp);
  gradient("dk", got.dk, exact.dk, unfused.dk);
  test::check_close((std::string(what) + " dscale").c_str(), got.ds, exact.ds, sizeof(T) == 2 ? 1e-5 : tolerance);
}

}  // namespace

TEST(contrastive_both_directions_bf16) {
  check<bf16>("one tile", {100, 100, 64, 0, true, false, false, 10}, 0);
  check<bf16>("three tiles", {290, 290, 128, 0, true, false, false, 100}, 0);
  check<bf16>("odd width", {130, 130, 77, 0, true, false, false, 14}, 0);
}
TEST(contrastive_both_directions_f16) { check<f16>("f16", {140, 140, 72, 0, true, false, false, 20}, 0); }
TEST(contrastive_wide_bf16) { check<bf16>("d 512", {129, 129, 512, 0, true, false, false, 30}, 0); }
TEST(contrastive_both_directions_f32) {
  check<float>("f32", {200, 200, 64, 0, true, false, false, 10}, 2e-5);
  check<float>("f32 odd", {131, 131, 33, 0, true, false, false, 100}, 2e-4);
}
TEST(contrastive_both_directions_f64) { check<double>("f64", {150, 150, 40, 0, true, false, false, 50}, 1e-11); }

TEST(contrastive_ranks) {
  check<bf16>("rank bf16", {60, 300, 64, 140, false, false, false, 20}, 0);
  check<float>("rank f32", {150, 280, 20, 130, false, false, false, 20}, 2e-5);
  check<double>("rank f64", {3, 200, 9, 197, false, false, false, 20}, 1e-11);
}
TEST(contrastive_queue) {
  check<bf16>("queue [K, d]", {40, 300, 64, 0, false, true, false, 5}, 0);
  check<bf16>("queue [d, K]", {140, 264, 128, 0, false, true, true, 14}, 0);
  check<bf16>("queue [d, K] odd", {10, 131, 20, 0, false, true, true, 14}, 0);
  check<f16>("queue of four tiles", {20, 500, 136, 0, false, true, false, 14}, 0);
  check<bf16>("queue, wide", {20, 150, 264, 0, false, true, true, 14}, 0);
  check<float>("queue f32", {33, 300, 24, 0, false, true, true, 14}, 2e-5);
  check<double>("queue f64", {9, 140, 5, 0, false, true, true, 5}, 1e-11);
}
// Keys without gradient, among them the positives (MoCo v3).
TEST(contrastive_queries_alone) {
  const Case t{70, 300, 40, 200, false, false, false, 10};
  const auto q = units<bf16>(t.n, t.d, 1), k = units<bf16>(t.m, t.d, 2);
  const Result both = run<bf16>(t, q, k, std::vector<bf16>(1), 1.0);
  Dev<bf16> dq(q), dk(k), gq(q.size());
  Dev<float> scale(std::vector<float>{10}), g(std::vector<float>{1}), loss(1), rows(3 * t.n);
  smalti_contrastive c{};
  c.q = test::view(dq, {t.n, t.d}); c.k = test::view(dk, {t.m, t.d}); c.scale = scale.p; c.offset = t.offset;
  const int64_t forward = smalti_contrastive_forward_workspace(&c), backward = smalti_contrastive_backward_workspace(&c, 0);
  Dev<unsigned char> wf(forward), wb(backward);
  CHECK_RC(smalti_contrastive_forward(&c, loss.p, rows.p, nullptr, nullptr, wf.p, forward, nullptr));
  CHECK_RC(smalti_contrastive_backward(&c, rows.p, nullptr, g.p, gq.p, nullptr, nullptr, nullptr, wb.p, backward, nullptr));
  double largest = 0;
  for (double x : both.dq) largest = std::max(largest, std::fabs(x));
  // both round g to bf16; they add in another order
  CHECK(worst(test::wide(gq.get()), both.dq) <= largest / 128);
}
// Tiles of 128 x 192 by warpgroups: whole ones, edges, positives, logits too far apart for one exponential.
TEST(contrastive_warpgroups) {
  const test::Wgmma on;
  check<bf16>("warpgroups", {700, 700, 128, 0, true, false, false, 20}, 0, false);
  check<f16>("warpgroups f16", {390, 390, 136, 0, true, false, false, -20}, 0, false);
  check<bf16>("far apart", {390, 390, 128, 0, true, false, false, 1000}, 0, false);
  check<bf16>("long rows", {200, 200, 576, 0, true, false, false, 30}, 0, false);
  check<bf16>("labels", {150, 430, 192, 200, false, false, false, 20}, 0, false);
  check<bf16>("positives apart", {200, 400, 128, 0, false, true, false, 14}, 0, false);
}
TEST(contrastive_warpgroups_chunks) {
  const test::Wgmma on;
  check<bf16>("chunks", {390, 390, 128, 0, true, false, false, 20, 1}, 0, false);
}
TEST(contrastive_small_sizes) {
  for (int64_t n : {1, 2, 3}) check<float>("few", {n, n, 1, 0, true, false, false, 2}, 2e-5);
  check<bf16>("few bf16", {2, 2, 8, 0, true, false, false, 2}, 0);
  check<double>("one key", {1, 1, 3, 0, false, true, false, 2}, 1e-11);
  check<bf16>("one key bf16", {3, 1, 3, 0, false, true, true, 2}, 0);
  check<double>("no key", {2, 0, 3, 0, false, true, false, 2}, 1e-11);
  check<float>("no key f32", {2, 0, 3, 0, false, true, true, 2}, 1e-5);
}
// Many chunks: partial sums are carried from one to the next.
TEST(contrastive_chunks) {
  check<bf16>("chunks", {390, 390, 64, 0, true, false, false, 20, 1}, 0);
  check<float>("chunks f32", {300, 300, 16, 0, true, false, false, 20, 400000}, 2e-5);
  check<double>("chunks of a queue", {130, 390, 8, 0, false, true, false, 5, 1}, 1e-11);
}
// A loss of nearly zero keeps its digits: p - 1 is not formed by subtraction.
TEST(contrastive_small_loss) {
  const int64_t n = 60, d = 64;
  auto q = units<float>(n, d, 1);
  auto k = q;
  const auto noise = test::randn<float>(q.size(), 9, 0.02);
  for (size_t i = 0; i < k.size(); i++) k[i] += noise[i];
  const Case t{n, n, d, 0, true, false, false, 100};
  const Result got = run<float>(t, q, k, std::vector<float>(1), 1.0);
  const Vec wq = test::wide(q), wk = test::wide(k);
  double loss = 0;
  Vec s(n * n);
  for (int64_t i = 0; i < n; i++) for (int64_t j = 0; j < n; j++) for (int64_t c = 0; c < d; c++) s[i * n + j] += 100 * wq[i * d + c] * wk[j * d + c];
  for (int64_t i = 0; i < n; i++) {
    double r = 0, c = 0;
    for (int64_t j = 0; j < n; j++) if (j != i) { r += std::exp(s[i * n + j] - s[i * n + i]); c += std::exp(s[j * n + i] - s[i * n + i]); }
    loss += (std::log1p(r) + std::log1p(c)) / (double)(2 * n);
  }
  CHECK(loss < 1e-9 && std::fabs(got.loss[0] - loss) < 1e-4 * loss);
}
TEST(contrastive_same_bits) {
  const Case t{200, 200, 64, 0, true, false, false, 20, 100000};
  const auto q = units<bf16>(t.n, t.d, 1), k = units<bf16>(t.m, t.d, 2);
  const Result a = run<bf16>(t, q, k, std::vector<bf16>(1), 1.0);
  for (unsigned seed : {2, 3}) {
    smalti_emulate_schedule(seed);
    const Result b = run<bf16>(t, q, k, std::vector<bf16>(1), 1.0);
    test::check_same("loss", a.loss, b.loss); test::check_same("dq", a.dq, b.dq);
    test::check_same("dk", a.dk, b.dk); test::check_same("ds", a.ds, b.ds);
  }
}
TEST(contrastive_refuses) {
  Dev<float> x(12), one(1), rows(12);
  Dev<unsigned char> w(1 << 20);
  smalti_contrastive c{};
  c.q = test::view(x, {4, 3}); c.k = c.q; c.scale = one.p; c.both = 1;
  const int64_t need = smalti_contrastive_forward_workspace(&c);
  CHECK(need > 0 && smalti_contrastive_forward(&c, one.p, rows.p, rows.p, nullptr, w.p, need - 1, nullptr) == kInvalid);
  c.both = 0; c.offset = 1;
  CHECK(smalti_contrastive_forward_workspace(&c) == -1 && smalti_contrastive_backward_workspace(&c, 1) == -1);
  c.offset = 0; c.k.dtype = SMALTI_BF16;
  CHECK(smalti_contrastive_forward_workspace(&c) == -1);
  c.k = c.q; c.k.stride[0] = 6; c.k.stride[1] = 2;
  CHECK(smalti_contrastive_forward_workspace(&c) == -1);
  c.q.dtype = c.k.dtype = SMALTI_I64; c.k.stride[0] = 3; c.k.stride[1] = 1;
  CHECK(smalti_contrastive_forward(&c, one.p, rows.p, rows.p, nullptr, w.p, 1 << 20, nullptr) == kInvalid);
}
// Long sizes: the workspace is bounded.
TEST(contrastive_workspace) {
  smalti_contrastive c{};
  for (int64_t d : {512, 768}) {
    c.q.dtype = c.k.dtype = SMALTI_BF16; c.q.rank = c.k.rank = 2;
    c.q.shape[0] = c.k.shape[0] = 65536; c.q.shape[1] = c.k.shape[1] = d;
    c.q.stride[0] = c.k.stride[0] = d; c.q.stride[1] = c.k.stride[1] = 1;
    c.both = 1;
    const int64_t forward = smalti_contrastive_forward_workspace(&c), backward = smalti_contrastive_backward_workspace(&c, 1);
    std::printf("    N 65536, d %d: forward %lld MiB, backward %lld MiB\n", (int)d, (long long)(forward >> 20), (long long)(backward >> 20));
    CHECK(forward <= (int64_t)512 << 20 && backward <= (int64_t)512 << 20);
  }
}
