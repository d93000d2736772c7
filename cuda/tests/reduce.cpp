// Reductions against sums in f64 by the definition: every way of the loop, every dtype, views.
#include "harness.hpp"
#include "../common/rows.cuh"
#include <algorithm>
#include <limits>
#include <map>
using namespace smalti;
using test::Dev;

namespace {

/// A view of a contiguous [shape] tensor with its dimensions permuted.
smalti_view permuted(smalti_view v, const std::vector<int>& order) {
  smalti_view p = v;
  for (size_t i = 0; i < order.size(); i++) { p.shape[i] = v.shape[order[i]]; p.stride[i] = v.stride[order[i]]; }
  return p;
}
int64_t numel(const smalti_view& v) { int64_t n = 1; for (int d = 0; d < v.rank; d++) n *= v.shape[d]; return n; }
/// Offset of row-major position i.
int64_t offset(const smalti_view& v, int64_t i) {
  int64_t o = 0;
  for (int d = v.rank - 1; d >= 0; d--) { o += i % v.shape[d] * v.stride[d]; i /= v.shape[d]; }
  return o;
}
/// The elements of each result, in order of position.
std::vector<std::vector<double>> groups(const smalti_view& x, const std::vector<double>& data, unsigned dims, std::vector<int64_t>& kept) {
  std::map<int64_t, std::vector<double>> by;
  kept.assign(x.shape, x.shape + x.rank);
  int64_t results = 1;
  for (int d = 0; d < x.rank; d++) if (dims >> d & 1) kept[d] = 1;
  for (auto k : kept) results *= k;
  for (int64_t i = 0; i < results; i++) by[i];
  for (int64_t i = 0; i < numel(x); i++) {
    int64_t left = i, r = 0, step = 1, at[8];
    for (int d = x.rank - 1; d >= 0; d--) { at[d] = left % x.shape[d]; left /= x.shape[d]; }
    for (int d = x.rank - 1; d >= 0; d--) if (!(dims >> d & 1)) { r += at[d] * step; step *= kept[d]; }
    by[r].push_back(data[offset(x, i)]);
  }
  std::vector<std::vector<double>> out;
  for (auto& [k, v] : by) out.push_back(v);
  return out;
}
double definition(int op, const std::vector<double>& v, double p) {
  double s = op == SMALTI_PROD ? 1 : 0, m = 0;
  switch (op) {
    case SMALTI_SUM: for (double x : v) s += x; return s / p;
    case SMALTI_PROD: for (double x : v) s *= x; return s;
    case SMALTI_MAX: return *std::max_element(v.begin(), v.end());
    case SMALTI_MIN: return *std::min_element(v.begin(), v.end());
    case SMALTI_NORM:
      if (std::isinf(p)) { s = p > 0 ? 0 : 1e300; for (double x : v) s = p > 0 ? std::max(s, std::fabs(x)) : std::min(s, std::fabs(x)); return s; }
      for (double x : v) s += p == 0 ? x != 0 : std::pow(std::fabs(x), p);
      return p == 0 ? s : std::pow(s, 1 / p);
    case SMALTI_LOGSUMEXP: for (double x : v) s += std::exp(x); return std::log(s);
    default:
      for (double x : v) m += x / (double)v.size();
      for (double x : v) s += (x - m) * (x - m);
      return op == SMALTI_STD ? std::sqrt(s / p) : s / p;
  }
}
template <class T, class O> std::vector<O> reduce(int op, const smalti_view& x, const std::vector<int64_t>& kept, double p, Dev<int64_t>* index = nullptr) {
  int64_t n = 1;
  for (auto k : kept) n *= k;
  Dev<O> y((size_t)n);
  const smalti_view out = test::view(y, kept);
  const int64_t bytes = smalti_reduce_workspace(op, &x, &out);
  CHECK(bytes >= 0);
  Dev<uint8_t> workspace((size_t)bytes);
  smalti_view where{};
  if (index) where = test::view(*index, kept);
  CHECK_RC(smalti_reduce(op, &x, &out, index ? &where : nullptr, p, workspace.p, nullptr));
  return y.get();
}
template <class T, class O = T> void against(int op, const smalti_view& x, const std::vector<double>& data, unsigned dims, double p, double tolerance, const char* what) {
  std::vector<int64_t> kept;
  const auto each = groups(x, data, dims, kept);
  std::vector<double> want;
  for (auto& v : each) want.push_back(definition(op, v, p));
  char name[128];
  std::snprintf(name, sizeof name, "%s: op %d over %x", what, op, dims);
  const auto first = reduce<T, O>(op, x, kept, p);
  test::check_close(name, first, want, tolerance);
  test::check_same(name, first, reduce<T, O>(op, x, kept, p));
}

template <class T> void every_layout(const char* what, double tolerance) {
  const auto host = test::randn<T>(6 * 5 * 8 * 12, 1);
  const auto data = test::wide(host);
  Dev<T> x(host);
  const smalti_view plain = test::view(x, {6, 5, 8, 12});
  smalti_view odd = plain, broadcast = plain;
  odd.ptr = x.p + 1; odd.shape[3] = 5; odd.stride[3] = 2;
  broadcast.stride[1] = 0;
  auto shifted = data;
  shifted.erase(shifted.begin());
#if defined(SIMT_TSAN)  // a fiber a thread: slow, and the ways matter to it, not the values
  const std::vector<unsigned> all{1, 8};
#else
  const std::vector<unsigned> all{0, 1, 2, 4, 8, 5, 10, 11, 13, 15};
#endif
  for (unsigned dims : all) {
    against<T>(SMALTI_SUM, plain, data, dims, 3, tolerance, what);
    against<T>(SMALTI_SUM, permuted(plain, {3, 1, 0, 2}), data, dims, 1, tolerance, what);
    against<T>(SMALTI_SUM, odd, shifted, dims, 1, tolerance, what);
    against<T>(SMALTI_SUM, broadcast, data, dims, 1, tolerance, what);
  }
}

}  // namespace

TEST(reduce_sum_layouts_f32) { every_layout<float>("f32", 1e-6); }
TEST(reduce_sum_layouts_f64) { every_layout<double>("f64", 1e-14); }
TEST(reduce_sum_layouts_bf16) { every_layout<bf16>("bf16", 4e-3); }
TEST(reduce_sum_layouts_f16) { every_layout<f16>("f16", 5e-4); }

// Every way of the loop: thread, warp, block, columns; the last two in chunks as well.
TEST(reduce_every_op_and_way) {
  struct Case { int64_t rows, n; unsigned dims; };
  const Case cases[] = {{40, 8, 2}, {9, 300, 2}, {3, 2100, 2}, {2, 9000, 2}, {70, 64, 1}, {300, 36, 1}, {2, 1500, 1}, {3, 5, 3}};
  for (const Case& c : cases) {
    const auto host = test::randn<float>((size_t)(c.rows * c.n), 2);
    const auto data = test::wide(host);
    Dev<float> x(host);
    const smalti_view v = test::view(x, {c.rows, c.n});
    const double n = c.dims == 1 ? c.rows : c.dims == 2 ? c.n : c.rows * c.n;
    against<float>(SMALTI_SUM, v, data, c.dims, n, 1e-6, "mean");
    against<float>(SMALTI_MAX, v, data, c.dims, 0, 0, "max");
    against<float>(SMALTI_MIN, v, data, c.dims, 0, 0, "min");
    against<float>(SMALTI_LOGSUMEXP, v, data, c.dims, 0, 1e-6, "logsumexp");
    against<float>(SMALTI_VAR, v, data, c.dims, n - 1, 1e-6, "var");
    against<float>(SMALTI_STD, v, data, c.dims, n, 1e-6, "std");
    if (n < 100) against<float>(SMALTI_PROD, v, data, c.dims, 0, 1e-5, "prod");
#if defined(SIMT_TSAN)
    continue;
#endif
    for (double p : {2.0, 1.0, 0.0, 3.0, 0.5, (double)INFINITY, -(double)INFINITY}) against<float>(SMALTI_NORM, v, data, c.dims, p, 3e-6, "norm");
  }
}

TEST(reduce_halves_and_variance_in_f32) {
  const auto host = test::randn<bf16>(40 * 96, 3);
  Dev<bf16> x(host);
  const smalti_view v = test::view(x, {40, 96});
  for (unsigned dims : {1u, 2u, 3u}) {
    against<bf16, float>(SMALTI_VAR, v, test::wide(host), dims, 7, 1e-6, "bf16");
  }
  // far from zero
  std::vector<float> far{4097, 4098, 4100, 4105};
  Dev<float> f(far), y(1), mean(1);
  const smalti_view fv = test::view(f, {4}), yv = test::view(y, {1}), mv = test::view(mean, {1});
  CHECK_RC(smalti_reduce(SMALTI_VAR, &fv, &yv, &mv, 4, nullptr, nullptr));
  CHECK(y.get()[0] == 9.5f && mean.get()[0] == 4100.f);
}

template <class T> void whole(int64_t scale, int dtype = test::dtype_of<T>()) {
  std::vector<T> host(35 * 40);
  std::vector<double> data;
  for (size_t i = 0; i < host.size(); i++) { host[i] = dtype == SMALTI_BOOL ? (T)(i % 3 == 0) : (T)((int64_t)(i * 7 % 13) * scale); data.push_back((double)host[i]); }
  Dev<T> x(host);
  smalti_view v = test::view(x, {35, 40});
  v.dtype = dtype;
  for (unsigned dims : {0u, 1u, 2u, 3u}) {
    std::vector<int64_t> kept;
    std::vector<int64_t> sums;
    for (auto& g : groups(v, data, dims, kept)) { sums.push_back(0); for (double e : g) sums.back() += (int64_t)e; }
    test::check_same("whole sums", reduce<T, int64_t>(SMALTI_SUM, v, kept, 1), sums);
    if (dtype == SMALTI_BOOL) continue;
    std::vector<T> largest;
    for (auto& g : groups(v, data, dims, kept)) largest.push_back((T)*std::max_element(g.begin(), g.end()));
    test::check_same("whole maxima", reduce<T, T>(SMALTI_MAX, v, kept, 1), largest);
  }
}
TEST(reduce_whole_numbers) {
  whole<int64_t>((int64_t)1 << 40);
  whole<uint8_t>(0, SMALTI_BOOL);
  std::vector<int64_t> host{3, -5, 7};
  Dev<int64_t> x(host);
  CHECK((reduce<int64_t, int64_t>(SMALTI_PROD, test::view(x, {3}), {1}, 1)[0] == -105));
}

TEST(reduce_positions) {
  const float nan = NAN;
  for (int64_t n : {6, 200, 3000, 9000}) {
    for (int columns = 0; columns < 2; columns++) {
      if (columns && n > 200) continue;
      const int64_t rows = columns ? 40 : 3;
      std::vector<float> host((size_t)(rows * n));
      for (size_t i = 0; i < host.size(); i++) host[i] = (float)(i * 7919 % 97);
      auto at = [&](int64_t r, int64_t i) -> float& { return host[(size_t)(columns ? i * rows + r : r * n + i)]; };
      at(1, n - 2) = nan; at(1, n - 1) = nan; at(2, 0) = -1e9f; at(2, 3) = 1e9f; at(2, 5) = 1e9f;
      Dev<float> x(host);
      const smalti_view v = columns ? permuted(test::view(x, {n, rows}), {1, 0}) : test::view(x, {rows, n});
      for (int op : {SMALTI_MAX, SMALTI_MIN}) {
        Dev<int64_t> index((size_t)rows);
        const auto y = reduce<float, float>(op, v, {rows, 1}, 0, &index);
        const auto where = index.get();
        for (int64_t r = 0; r < rows; r++) {
          int64_t want = 0;
          for (int64_t i = 1; i < n; i++) {
            const float a = at(r, want), b = at(r, i);
            if (!std::isnan(a) && (std::isnan(b) || (op == SMALTI_MAX ? b > a : b < a))) want = i;
          }
          CHECK(where[(size_t)r] == want);
          CHECK(y[(size_t)r] == at(r, want) || (std::isnan(y[(size_t)r]) && r == 1));
        }
      }
    }
  }
}

TEST(reduce_logsumexp_edges) {
  const float inf = INFINITY;
  std::vector<float> host{-inf, -inf, -inf, 1, -inf, 2, inf, 1, -inf, NAN, 1, -inf, 1000, 1000, 1000};
  Dev<float> x(host);
  const auto y = reduce<float, float>(SMALTI_LOGSUMEXP, test::view(x, {5, 3}), {5, 1}, 0);
  CHECK(y[0] == -inf && std::fabs(y[1] - 2.3132617f) < 1e-6 && y[2] == inf && std::isnan(y[3]) && std::fabs(y[4] - 1001.0986f) < 1e-3);
  Dev<float> none(0);
  const auto e = reduce<float, float>(SMALTI_LOGSUMEXP, test::view(none, {2, 0}), {2, 1}, 0);
  CHECK(e[0] == -inf && e[1] == -inf);
  CHECK((reduce<float, float>(SMALTI_SUM, test::view(none, {2, 0}), {2, 1}, 1)[1] == 0));
  CHECK((std::isnan(reduce<float, float>(SMALTI_SUM, test::view(none, {2, 0}), {2, 1}, 0)[1])));
  const smalti_view v = test::view(x, {5, 3}), wrong = test::view(x, {5, 2});
  CHECK(smalti_reduce_workspace(SMALTI_SUM, &v, &wrong) == -1);
}

// Offsets beyond 2^31 elements, without the memory: one far row is reached through a stride.
TEST(reduce_index_beyond_32_bits) {
  Axis<1> axes[] = {{5, {(int64_t)1 << 33}}, {(int64_t)3 << 31, {1}}};
  const Index<1> x = make_index(axes, 2);
  CHECK(x.rank == 2);
  CHECK(x.first(((int64_t)3 << 31) * 4 + 17) == ((int64_t)4 << 33) + 17 && x.first(12345) == 12345 && x.first(((int64_t)1 << 32) + 1) == ((int64_t)1 << 32) + 1);
  Axis<1> tall[] = {{(int64_t)1 << 33, {3}}, {2, {1}}};
  const Index<1> t = make_index(tall, 2);
  CHECK(t.first(2147483647) == 1073741823LL * 3 + 1 && t.first(((int64_t)1 << 33) + 1) == ((int64_t)1 << 32) * 3 + 1);
}

template <class T> void running(double tolerance) {
  const int64_t shapes[][3] = {{2, 1500, 3}, {3, 7, 5}, {1, 1100, 1}, {2, 3, 1030}};
  for (auto& s : shapes) {
    std::vector<T> host((size_t)(s[0] * s[1] * s[2]));
    for (size_t i = 0; i < host.size(); i++) host[i] = (T)((double)(i * 7919 % 1001) - 500);
    Dev<T> x(host), y(host.size());
    const smalti_view xv = test::view(x, {s[0], s[1], s[2]}), yv = test::view(y, {s[0], s[1], s[2]});
    for (int dim = 0; dim < 3; dim++)
      for (int back = 0; back < 2; back++) {
        CHECK_RC(smalti_cumsum(&xv, &yv, dim, back, nullptr));
        std::vector<double> want(host.size());
        const int64_t step = xv.stride[dim], total = (int64_t)host.size();
        for (int64_t j = 0; j < total; j++) {
          const int64_t i = back ? total - 1 - j : j, k = i / step % s[dim];
          const bool first = k == (back ? s[dim] - 1 : 0);
          want[(size_t)i] = (double)host[(size_t)i] + (first ? 0 : want[(size_t)(back ? i + step : i - step)]);
        }
        std::vector<double> got;
        for (T v : y.get()) got.push_back((double)v);
        test::check_close("cumsum", got, want, tolerance);
      }
  }
}
TEST(reduce_cumsum) { running<float>(1e-7); running<double>(1e-15); running<int64_t>(0); }
