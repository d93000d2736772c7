// Plain attention against plain loops in f64.
#include "harness.hpp"
using namespace smalti;

namespace {

/// Exact values, and those of the unfused computation in T: what a chain of ops rounds to T is rounded to T.
struct Result { std::vector<double> out, lse, dq, dk, dv; };
struct Sizes { int64_t b, h, lq, lk, d, dv; bool causal; };

template <class T> double rounded(double x) { return (double)widen(narrow<T>((Acc<T>)x)); }

/// q, k, v, go: [B, H, L, n] in f64.
template <class T, bool EXACT>
Result naive(const Sizes& s, const std::vector<double>& q, const std::vector<double>& k, const std::vector<double>& v,
             const std::vector<double>& go, double scale) {
  auto r = [](double x) { return EXACT ? x : rounded<T>(x); };
  Result o{std::vector<double>(s.b * s.h * s.lq * s.dv), std::vector<double>(s.b * s.h * s.lq), std::vector<double>(q.size()),
           std::vector<double>(k.size()), std::vector<double>(v.size())};
  std::vector<double> p(s.lk), ds(s.lk);
  for (int64_t i = 0; i < s.b * s.h * s.lq; i++) {
    const int64_t head = i / s.lq, seen = s.causal ? std::min(s.lk, i % s.lq + 1) : s.lk;
    const double *kh = &k[head * s.lk * s.d], *vh = &v[head * s.lk * s.dv];
    double top = -INFINITY, sum = 0, delta = 0;
    for (int64_t j = 0; j < seen; j++) {
      double x = 0;
      for (int64_t c = 0; c < s.d; c++) x += q[i * s.d + c] * kh[j * s.d + c];
      p[j] = r(r(x) * scale);
      top = std::max(top, p[j]);
    }
    for (int64_t j = 0; j < seen; j++) sum += std::exp(p[j] - top);
    o.lse[i] = top + std::log(sum);
    for (int64_t j = 0; j < seen; j++) p[j] = r(std::exp(p[j] - o.lse[i]));
    for (int64_t c = 0; c < s.dv; c++) {
      double x = 0;
      for (int64_t j = 0; j < seen; j++) x += p[j] * vh[j * s.dv + c];
      o.out[i * s.dv + c] = r(x);
    }
    for (int64_t j = 0; j < seen; j++) {
      ds[j] = 0;
      for (int64_t c = 0; c < s.dv; c++) ds[j] += go[i * s.dv + c] * vh[j * s.dv + c];
      ds[j] = r(ds[j]);
      delta += p[j] * ds[j];
    }
    for (int64_t j = 0; j < seen; j++) {
      ds[j] = r(r(p[j] * (ds[j] - delta)) * scale);
      for (int64_t c = 0; c < s.dv; c++) o.dv[(head * s.lk + j) * s.dv + c] += p[j] * go[i * s.dv + c];
      for (int64_t c = 0; c < s.d; c++) {
        o.dq[i * s.d + c] += ds[j] * kh[j * s.d + c];
        o.dk[(head * s.lk + j) * s.d + c] += ds[j] * q[i * s.d + c];
      }
    }
  }
  for (auto* g : {&o.dq, &o.dk, &o.dv}) for (double& x : *g) x = r(x);
  return o;
}

double worst(const std::vector<double>& a, const std::vector<double>& b) {
  double w = 0;
  for (size_t i = 0; i < a.size(); i++) w = std::max(w, std::isnan(a[i]) ? INFINITY : std::fabs(a[i] - b[i]));
  return w;
}

/// At most `factor` times the error of the unfused computation in the same type, both against f64.
void check_error(const char* what, const std::vector<double>& got, const std::vector<double>& exact, const std::vector<double>& unfused,
                 double factor, double floor) {
  test::checks()++;
  const double ours = worst(got, exact), theirs = worst(unfused, exact);
  if (std::getenv("SHOW")) std::printf("    %-6s error %.3g, unfused %.3g\n", what, ours, theirs);
  if (!(ours <= factor * theirs + floor)) {
    char line[200];
    std::snprintf(line, sizeof line, "%s: error %.3g, unfused in this type %.3g", what, ours, theirs);
    test::fail(line);
  }
}

/// Adjacent [B, H, L, n], or the same numbers as [B, L, parts, H, n] with room for `parts`.
smalti_view strided(void* p, int dtype, int64_t bytes, const Sizes& s, int64_t length, int64_t n, int64_t part, int64_t parts) {
  smalti_view v{};
  v.ptr = (char*)p + part * s.h * n * bytes;
  v.dtype = dtype; v.rank = 4;
  const int64_t shape[4] = {s.b, s.h, length, n}, stride[4] = {length * parts * s.h * n, n, parts * s.h * n, 1};
  for (int i = 0; i < 4; i++) { v.shape[i] = shape[i]; v.stride[i] = stride[i]; }
  return v;
}

template <class T> void run(Sizes s, double deviation = 1.0, bool again = false) {
  const bool packed = s.lq == s.lk && s.d == s.dv;
  const double scale = 1 / std::sqrt((double)s.d), floor = sizeof(T) == 8 ? 1e-12 : sizeof(T) == 4 ? 4e-6 : 1e-5;
  const int64_t parts = packed ? 3 : 1, nq = s.b * s.h * s.lq, nk = s.b * s.h * s.lk;
  auto hq = test::randn<T>(nq * s.d, 1, deviation), hk = test::randn<T>(nk * s.d, 2, deviation), hv = test::randn<T>(nk * s.dv, 3), hg = test::randn<T>(nq * s.dv, 4);
  // to [B, L, parts, H, n]
  auto spread = [&](std::vector<T>& to, const std::vector<T>& from, int64_t length, int64_t n, int64_t part, int64_t of) {
    for (int64_t b = 0; b < s.b; b++) for (int64_t h = 0; h < s.h; h++) for (int64_t l = 0; l < length; l++) for (int64_t c = 0; c < n; c++)
      to[(((b * length + l) * of + part) * s.h + h) * n + c] = from[((b * s.h + h) * length + l) * n + c];
  };
  auto gather = [&](const std::vector<T>& from, int64_t length, int64_t n, int64_t part, int64_t of) {
    std::vector<double> o(s.b * s.h * length * n);
    for (int64_t b = 0; b < s.b; b++) for (int64_t h = 0; h < s.h; h++) for (int64_t l = 0; l < length; l++) for (int64_t c = 0; c < n; c++)
      o[((b * s.h + h) * length + l) * n + c] = (double)widen(from[(((b * length + l) * of + part) * s.h + h) * n + c]);
    return o;
  };
  std::vector<T> mq(nq * s.d * parts), mk(packed ? 1 : nk * s.d), mv(packed ? 1 : nk * s.dv), mg(nq * s.dv);
  spread(mq, hq, s.lq, s.d, 0, parts);
  spread(packed ? mq : mk, hk, s.lk, s.d, packed ? 1 : 0, parts);
  spread(packed ? mq : mv, hv, s.lk, s.dv, packed ? 2 : 0, parts);
  spread(mg, hg, s.lq, s.dv, 0, 1);
  test::Dev<T> dq(mq), dk(mk), dv(mv), out(nq * s.dv);
  test::Dev<Acc<T>> lse(nq);
  const int type = test::dtype_of<T>();
  auto at = [&](void* p, int64_t length, int64_t n, int64_t part, int64_t of) { return strided(p, type, sizeof(T), s, length, n, part, of); };
  const smalti_view q = at(dq.p, s.lq, s.d, 0, parts), k = at(packed ? dq.p : dk.p, s.lk, s.d, packed ? 1 : 0, parts),
                    v = at(packed ? dq.p : dv.p, s.lk, s.dv, packed ? 2 : 0, parts), o = at(out.p, s.lq, s.dv, 0, 1),
                    l = test::view(lse, {s.b, s.h, s.lq});
  CHECK_RC(smalti_attention_forward(&q, &k, &v, &o, &l, scale, s.causal, nullptr));
  const auto wq = test::wide(hq), wk = test::wide(hk), wv = test::wide(hv), wg = test::wide(hg);
  const Result exact = naive<T, true>(s, wq, wk, wv, wg, scale), unfused = naive<T, false>(s, wq, wk, wv, wg, scale);
  const auto first = out.get();
  check_error("out", gather(first, s.lq, s.dv, 0, 1), exact.out, unfused.out, 2, floor);
  test::check_close("lse", lse.get(), exact.lse, sizeof(T) == 8 ? 1e-13 : 2e-6);

  test::Dev<T> go(mg), gq(mq.size()), gk(mk.size() + 1), gv(mv.size() + 1);
  test::Dev<Acc<T>> delta(2 * nq);
  const smalti_view g = at(go.p, s.lq, s.dv, 0, 1), dl = test::view(delta, {2, s.b, s.h, s.lq}), vq = at(gq.p, s.lq, s.d, 0, parts),
                    vk = at(packed ? gq.p : gk.p, s.lk, s.d, packed ? 1 : 0, parts), vv = at(packed ? gq.p : gv.p, s.lk, s.dv, packed ? 2 : 0, parts);
  CHECK_RC(smalti_attention_backward(&q, &k, &v, &o, &g, &l, &dl, &vq, &vk, &vv, scale, s.causal, nullptr));
  const auto rq = gq.get(), rk = packed ? rq : gk.get(), rv = packed ? rq : gv.get();
  check_error("dq", gather(rq, s.lq, s.d, 0, parts), exact.dq, unfused.dq, 3, floor);
  check_error("dk", gather(rk, s.lk, s.d, packed ? 1 : 0, parts), exact.dk, unfused.dk, 3, floor);
  check_error("dv", gather(rv, s.lk, s.dv, packed ? 2 : 0, parts), exact.dv, unfused.dv, 3, floor);
  if (!again) return;
  // the same bits again
  CHECK_RC(smalti_attention_forward(&q, &k, &v, &o, &l, scale, s.causal, nullptr));
  test::check_same("out", out.get(), first);
  CHECK_RC(smalti_attention_backward(&q, &k, &v, &o, &g, &l, &dl, &vq, &vk, &vv, scale, s.causal, nullptr));
  test::check_same("gradients", gq.get(), rq);
}

}  // namespace

TEST(attention_bf16) {
  for (bool causal : {false, true}) {
    run<bf16>({2, 1, 50, 50, 64, 64, causal}, 1, true);
    run<bf16>({1, 1, 1, 1, 32, 32, causal});
    run<bf16>({1, 2, 77, 77, 48, 48, causal});
  }
  run<bf16>({1, 1, 197, 197, 80, 80, false});
  run<bf16>({1, 1, 140, 140, 32, 32, true});
  run<bf16>({1, 1, 40, 40, 96, 96, false}, 3);
  run<bf16>({1, 1, 20, 70, 128, 112, false});
}
TEST(attention_f16) {
  run<f16>({1, 2, 33, 33, 64, 64, true}, 1, true);
  run<f16>({1, 1, 19, 70, 17, 23, false});  // odd widths: padded inside, read one by one
}
// The kernels with warpgroup instructions: around the lengths at which another way is taken, 64, 112 and 224 keys, and rings
// that go round more than once.
TEST(attention_wgmma) {
  const test::Wgmma on;
  for (bool causal : {false, true}) {
    run<bf16>({2, 1, 50, 50, 64, 64, causal}, 1, true);
    run<bf16>({1, 2, 77, 77, 64, 64, causal});
    run<f16>({1, 1, 197, 197, 64, 64, causal}, 1, true);
    run<bf16>({1, 1, 330, 330, 64, 64, causal}, 2, true);
  }
  run<bf16>({1, 1, 1, 1, 64, 64, false});
  run<bf16>({1, 1, 64, 64, 80, 80, true});
  run<f16>({1, 2, 65, 112, 64, 64, false});
  run<bf16>({1, 1, 300, 113, 80, 80, false});
  run<bf16>({1, 1, 9, 224, 64, 64, false}, 3);
  run<f16>({1, 1, 130, 225, 80, 80, false});
  run<bf16>({1, 1, 30, 40, 64, 72, false});  // not theirs
}
// Their gradients: part of a tile of 64, several, a lone query, other lengths of keys, and rows that are not aligned.
TEST(attention_wgmma_gradients) {
  const test::Wgmma on;
  for (bool causal : {false, true}) {
    run<bf16>({1, 1, 1, 1, 64, 64, causal});
    run<f16>({1, 1, 77, 77, 80, 80, causal});
    run<bf16>({1, 1, 260, 260, 64, 64, causal}, 1, true);
    run<f16>({1, 1, 20, 140, 64, 64, causal});
    run<bf16>({1, 1, 140, 20, 64, 64, causal});
  }
  run<bf16>({1, 1, 130, 196, 72, 56, false});
  run<bf16>({1, 1, 70, 70, 63, 63, true});
}
TEST(attention_f32) {
  for (bool causal : {false, true}) {
    run<float>({1, 2, 70, 70, 24, 24, causal}, 1, true);
    run<float>({1, 1, 1, 1, 32, 32, causal});
  }
  run<float>({1, 1, 20, 33, 80, 7, false}, 2);
  run<float>({1, 1, 9, 9, 64, 64, false});
}
TEST(attention_f64) {
  run<double>({1, 2, 40, 40, 24, 24, true}, 1, true);
  run<double>({1, 1, 5, 40, 3, 100, false});
}
// More blocks than a grid holds, or a view that does not fit: refused before anything is read.
TEST(attention_refuses) {
  test::Dev<bf16> x(64);
  test::Dev<float> y(64);
  smalti_view q = test::view(x, {1, 1, 4, 16}), l = test::view(y, {1, 1, 4});
  CHECK(smalti_attention_forward(&q, &q, &q, &q, &l, 1.0, 0, nullptr) == 0);
  smalti_view many = q, rows = l;
  many.shape[0] = rows.shape[0] = INT32_MAX;
  many.shape[1] = rows.shape[1] = 2;
  rows.stride[0] = 8; rows.stride[1] = 4;
  CHECK(smalti_attention_forward(&many, &many, &many, &many, &rows, 1.0, 0, nullptr) == kInvalid);
  smalti_view wide = q;
  wide.shape[3] = 129;
  CHECK(smalti_attention_forward(&wide, &wide, &wide, &wide, &l, 1.0, 0, nullptr) == kInvalid);
  smalti_view apart = q;
  apart.stride[3] = 2;
  CHECK(smalti_attention_forward(&q, &apart, &q, &q, &l, 1.0, 0, nullptr) == kInvalid);
  smalti_view other = q;
  other.dtype = SMALTI_F16;
  CHECK(smalti_attention_forward(&q, &other, &q, &q, &l, 1.0, 0, nullptr) == kInvalid);
  smalti_view shorter = q;
  shorter.shape[2] = 3;
  CHECK(smalti_attention_forward(&q, &shorter, &q, &q, &l, 1.0, 0, nullptr) == kInvalid);
}
