// Ids, tokens and patches of masked autoencoders: moves are exact, sums are held against f64.
#include "harness.hpp"
#include <algorithm>
#include <numeric>
using namespace smalti;
using test::Dev;

namespace {

using Ids = std::vector<int64_t>;

/// Stable argsort of the rows of noise [n, len]; NaN last.
template <class T> Ids argsort(const std::vector<T>& noise, int64_t n, int64_t len) {
  Ids out;
  for (int64_t s = 0; s < n; s++) {
    Ids row(len);
    std::iota(row.begin(), row.end(), 0);
    std::stable_sort(row.begin(), row.end(), [&](int64_t a, int64_t b) {
      const double x = (double)widen(noise[s * len + a]), y = (double)widen(noise[s * len + b]);
      return std::isnan(y) ? !std::isnan(x) : x < y;
    });
    out.insert(out.end(), row.begin(), row.end());
  }
  return out;
}

struct Masking {
  Dev<int64_t> keep, restore;
  Dev<float> mask;
  int64_t n, len, k;
  Masking(int64_t n, int64_t len, int64_t k) : keep(n * k), restore(n * len), mask(n * len), n(n), len(len), k(k) {}
  void check(const char* what, const Ids& shuffle) const {
    Ids want_keep, want_restore(n * len);
    std::vector<float> want_mask(n * len);
    for (int64_t s = 0; s < n; s++)
      for (int64_t i = 0; i < len; i++) {
        const int64_t patch = s * len + shuffle[s * len + i];
        if (i < k) want_keep.push_back(shuffle[s * len + i]);
        want_restore[patch] = i;
        want_mask[patch] = i < k ? 0.f : 1.f;
      }
    test::check_same(what, keep.get(), want_keep);
    test::check_same(what, restore.get(), want_restore);
    test::check_same(what, mask.get(), want_mask);
  }
};

template <class T> void ids_of_noise(int64_t n, int64_t len, int64_t k) {
  auto noise = test::randn<T>(n * len, 7 + (unsigned)len);
  for (size_t i = 0; i + 2 < noise.size(); i += 3) noise[i] = noise[i + 2];  // ties
  noise[1] = narrow<T>(-0.0);
  noise[0] = narrow<T>(0.0);
  noise[2] = narrow<T>((Acc<T>)NAN);
  Dev<T> x(noise);
  Masking m(n, len, k);
  const auto v = test::view(x, {n, len}), a = test::view(m.keep, {n, k}), b = test::view(m.restore, {n, len}),
             c = test::view(m.mask, {n, len});
  CHECK_RC(smalti_masking_ids(&v, &a, &b, &c, nullptr));
  m.check("ids", argsort(noise, n, len));
}

/// Philox4x32-10 as in src/random.rs, straight from the paper.
uint32_t word(uint64_t seed, uint64_t stream, uint64_t index) {
  uint32_t c[4] = {(uint32_t)(index / 4), (uint32_t)(index / 4 >> 32), (uint32_t)stream, (uint32_t)(stream >> 32)};
  uint32_t k[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
  for (int round = 0; round < 10; round++) {
    const uint64_t a = (uint64_t)c[0] * 0xD2511F53u, b = (uint64_t)c[2] * 0xCD9E8D57u;
    const uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k[0], (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k[1], (uint32_t)a};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return c[index % 4];
}

/// Samples' shuffled orders and their inverses, of random noise.
struct Orders {
  Ids keep, restore;
  Orders(int64_t n, int64_t len, int64_t k, unsigned seed) : restore(n * len) {
    const Ids shuffle = argsort(test::randn<float>(n * len, seed), n, len);
    for (int64_t s = 0; s < n; s++)
      for (int64_t i = 0; i < len; i++) {
        if (i < k) keep.push_back(shuffle[s * len + i]);
        restore[s * len + shuffle[s * len + i]] = i;
      }
  }
};

template <class T> void tokens(int64_t n, int64_t len, int64_t k, int64_t d) {
  const Orders o(n, len, k, 3);
  const auto x = test::randn<T>(n * len * d, 1), p = test::randn<T>(len * d, 2), g = test::randn<T>(n * k * d, 4);
  Dev<T> dx(x), dp(p), y(n * k * d), z(n * len * d), dg(g), dpos(len * d);
  Dev<int64_t> ids(o.keep);
  const auto vx = test::view(dx, {n, len, d}), vp = test::view(dp, {len, d}), vi = test::view(ids, {n, k}),
             vy = test::view(y, {n, k, d}), vg = test::view(dg, {n, k, d}), vz = test::view(z, {n, len, d}),
             vq = test::view(dpos, {len, d});
  std::vector<T> plain, added, back(n * len * d, narrow<T>(0));
  std::vector<double> pos_grad(len * d, 0.0);
  for (int64_t s = 0; s < n; s++)
    for (int64_t j = 0; j < k; j++)
      for (int64_t c = 0; c < d; c++) {
        const int64_t id = o.keep[s * k + j];
        plain.push_back(x[(s * len + id) * d + c]);
        added.push_back(narrow<T>(widen(plain.back()) + widen(p[id * d + c])));
        back[(s * len + id) * d + c] = g[(s * k + j) * d + c];
        pos_grad[id * d + c] += (double)widen(g[(s * k + j) * d + c]);
      }
  CHECK_RC(smalti_gather_tokens(&vx, nullptr, &vi, &vy, nullptr));
  test::check_same("gather_tokens", y.get(), plain);
  CHECK_RC(smalti_gather_tokens(&vx, &vp, &vi, &vy, nullptr));
  test::check_same("gather_tokens_add", y.get(), added);
  CHECK_RC(smalti_ungather_tokens(&vg, &vi, &vz, nullptr));
  test::check_same("ungather_tokens", z.get(), back);
  Dev<double> work(smalti_gather_tokens_pos_workspace(n, len, d, vg.dtype) / 8 + 1);
  CHECK_RC(smalti_gather_tokens_pos_backward(&vg, &vi, &vq, work.p, nullptr));
  test::check_close("positions", dpos.get(), pos_grad, sizeof(T) == 2 ? 4e-3 : 1e-6);
}

template <class T> void unshuffle(int64_t n, int64_t len, int64_t k, int64_t d) {
  const Orders o(n, len, k, 5);
  const int64_t rows = 1 + len;
  const auto x = test::randn<T>(n * (1 + k) * d, 1), t = test::randn<T>(d, 2), p = test::randn<T>(rows * d, 3),
             g = test::randn<T>(n * rows * d, 4);
  std::vector<T> want, want_dx(n * (1 + k) * d);
  std::vector<double> want_token(d, 0.0), want_pos(rows * d, 0.0);
  for (int64_t s = 0; s < n; s++)
    for (int64_t i = 0; i < rows; i++) {
      const int64_t at = i ? 1 + o.restore[s * len + i - 1] : 0;
      for (int64_t c = 0; c < d; c++) {
        const T v = at <= k ? x[(s * (1 + k) + at) * d + c] : t[c], grad = g[(s * rows + i) * d + c];
        want.push_back(narrow<T>(widen(v) + widen(p[i * d + c])));
        if (at <= k) want_dx[(s * (1 + k) + at) * d + c] = grad;
        else want_token[c] += (double)widen(grad);
        want_pos[i * d + c] += (double)widen(grad);
      }
    }
  Dev<T> dx(x), dt(t), dp(p), y(n * rows * d), dg(g), gx(n * (1 + k) * d), gt(d), gp(rows * d);
  Dev<int64_t> restore(o.restore);
  const auto vx = test::view(dx, {n, 1 + k, d}), vt = test::view(dt, {d}), vp = test::view(dp, {rows, d}),
             vr = test::view(restore, {n, len}), vy = test::view(y, {n, rows, d}), vg = test::view(dg, {n, rows, d}),
             hx = test::view(gx, {n, 1 + k, d}), ht = test::view(gt, {d}), hp = test::view(gp, {rows, d});
  CHECK_RC(smalti_unshuffle_forward(&vx, &vt, &vr, &vp, &vy, nullptr));
  test::check_same("unshuffle", y.get(), want);
  const double tolerance = sizeof(T) == 2 ? 4e-3 : 1e-6;
  for (int wanted = 0; wanted < 8; wanted++) {
    const bool a = wanted & 1, b = wanted & 2, c = wanted & 4;
    Dev<double> work(smalti_unshuffle_workspace(n, rows, d, vg.dtype, b, c) / 8 + 1);
    CHECK_RC(smalti_unshuffle_backward(&vg, &vr, k, a ? &hx : nullptr, b ? &ht : nullptr, c ? &hp : nullptr, work.p, nullptr));
    if (a) test::check_same("unshuffle dx", gx.get(), want_dx);
    if (b) test::check_close("unshuffle dtoken", gt.get(), want_token, tolerance);
    if (c) test::check_close("unshuffle dpos", gp.get(), want_pos, tolerance);
  }
}

/// Images in memory as planes or interleaved; element (n, c, y, x).
template <class T> struct Images {
  std::vector<T> values;
  smalti_view view{};
  Images(int64_t n, int64_t c, int64_t h, int64_t w, bool interleaved) : values(n * c * h * w) {
    auto noise = test::randn<float>(values.size(), 11, 50.0);
    for (size_t i = 0; i < values.size(); i++) {
      if constexpr (std::is_integral_v<T>) values[i] = (T)(int)(noise[i] + 128.f);
      else values[i] = narrow<T>(noise[i] / 50.f);
    }
    const int64_t shape[] = {n, c, h, w}, planes[] = {c * h * w, h * w, w, 1}, pixels[] = {c * h * w, 1, w * c, c};
    view.dtype = test::dtype_of<T>();
    view.rank = 4;
    for (int d = 0; d < 4; d++) { view.shape[d] = shape[d]; view.stride[d] = interleaved ? pixels[d] : planes[d]; }
  }
  double at(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return (double)widen(values[n * view.stride[0] + c * view.stride[1] + y * view.stride[2] + x * view.stride[3]]);
  }
};

template <class In, class Out>
void patches(int64_t n, int64_t c, int64_t h, int64_t w, int64_t p, bool interleaved, bool last, bool affine, bool all) {
  Images<In> images(n, c, h, w, interleaved);
  const int64_t columns = w / p, present = h / p * columns, k = all ? present : std::max<int64_t>(1, present / 2), width = p * p * c;
  const Orders o(n, present, k, 6);
  const std::vector<double> scale = {0.5, 2.0, 0.25, 1.0, 3.0}, shift = {-1.0, 0.5, 0.75, 0.0, 2.0};
  std::vector<double> want;
  for (int64_t s = 0; s < n; s++)
    for (int64_t j = 0; j < k; j++)
      for (int64_t e = 0; e < width; e++) {
        const int64_t patch = all ? j : o.keep[s * k + j], ch = last ? e % c : e / (p * p), pixel = last ? e / c : e % (p * p);
        const double v = images.at(s, ch, patch / columns * p + pixel / p, patch % columns * p + pixel % p);
        want.push_back(affine ? v * scale[ch] + shift[ch] : v);
      }
  Dev<In> x(images.values);
  Dev<Out> y(n * k * width);
  Dev<int64_t> ids(o.keep);
  auto vx = images.view;
  vx.ptr = x.p;
  const auto vi = test::view(ids, {n, k}), vy = test::view(y, {n, k, width});
  CHECK_RC(smalti_patchify(&vx, all ? nullptr : &vi, p, last, affine ? scale.data() : nullptr, affine ? shift.data() : nullptr,
                           &vy, nullptr));
  const double tolerance = !affine && (std::is_same_v<In, Out> || std::is_integral_v<In>) ? 0 : sizeof(Out) == 2 ? 4e-3 : 1e-6;
  test::check_close("patches", y.get(), want, tolerance);
  if constexpr (std::is_same_v<In, Out>) {
    if (affine || !all || interleaved) return;
    Dev<In> back(images.values.size());
    auto vb = images.view;
    vb.ptr = back.p;
    CHECK_RC(smalti_unpatchify(&vy, p, last, &vb, nullptr));
    test::check_same("unpatchify", back.get(), images.values);
  }
}

template <class T, class In, class M> void loss(int64_t n, int64_t c, int64_t p, bool norm, bool interleaved, double tolerance) {
  const int64_t h = 2 * p, w = 3 * p, all = 6, width = p * p * c;
  Images<In> images(n, c, h, w, interleaved);
  const auto pred = test::randn<T>(n * all * width, 21);
  std::vector<M> mask(n * all);
  double total = 0, sum = 0;
  for (size_t i = 0; i < mask.size(); i++) total += (double)(mask[i] = (M)(i % 3 == 0 ? 0 : i % 3 == 1 ? 1 : 0.5));
  std::vector<double> grad(pred.size());
  for (int64_t s = 0; s < n; s++)
    for (int64_t patch = 0; patch < all; patch++) {
      std::vector<double> t(width);
      double mean = 0, var = 0;
      for (int64_t j = 0; j < width; j++)
        mean += t[j] = images.at(s, j % c, patch / 3 * p + j / c / p, patch % 3 * p + j / c % p);
      mean /= width;
      for (double v : t) var += (v - mean) * (v - mean);
      var /= width - 1;
      const double weight = (double)mask[s * all + patch];
      for (int64_t j = 0; j < width; j++) {
        const int64_t at = (s * all + patch) * width + j;
        const double target = norm ? (t[j] - mean) / std::sqrt(var + 1e-6) : t[j], d = (double)widen(pred[at]) - target;
        sum += weight * d * d;
        grad[at] = 2 * weight * d / (width * total);
      }
    }
  Dev<T> x(pred), dx(pred.size());
  Dev<In> pixels(images.values);
  Dev<M> m(mask);
  Dev<Acc<T>> out(1);
  Dev<double> work(smalti_masked_loss_workspace(n * all) / 8);
  auto vi = images.view;
  vi.ptr = pixels.p;
  const auto vx = test::view(x, {n, all, width}), vm = test::view(m, {n, all}), vo = test::view(out, {}),
             vg = test::view(dx, {n, all, width});
  for (bool with_grad : {false, true}) {
    CHECK_RC(smalti_masked_loss(&vx, &vi, &vm, p, norm, 1e-6, work.p, &vo, with_grad ? &vg : nullptr, nullptr));
    const double want = sum / (width * total), got = (double)out.get()[0];
    CHECK(std::fabs(got - want) <= (sizeof(T) == 8 ? 1e-12 : 1e-5) * want);
    CHECK(work.get()[0] == total);
  }
  const auto g = dx.get();
  double worst = 0, largest = 0;
  for (size_t i = 0; i < g.size(); i++) {
    worst = std::max(worst, std::fabs((double)widen(g[i]) - grad[i]));
    largest = std::max(largest, std::fabs(grad[i]));
    if (mask[i / width] == 0) CHECK((double)widen(g[i]) == 0);
  }
  CHECK(worst <= tolerance * largest);
}

}  // namespace

TEST(masking_ids_of_noise) {
  for (int64_t len : {3, 32, 50, 100, 196}) ids_of_noise<float>(5, len, len / 4);
  ids_of_noise<float>(2, 500, 125);
  ids_of_noise<float>(1, 1024, 1024);
  ids_of_noise<bf16>(3, 196, 49);
  ids_of_noise<f16>(3, 196, 0);
  ids_of_noise<double>(3, 196, 49);
  ids_of_noise<double>(1, 600, 100);
}

TEST(masking_ids_of_philox) {
  for (int64_t len : {7, 196, 300}) {
    const int64_t n = 3, k = len / 3;
    std::vector<float> noise;
    for (int64_t i = 0; i < n * len; i++) noise.push_back((float)(word(99, 1ull << 40, 4 * 5 + i) >> 8) / 16777216.0f);
    Masking m(n, len, k);
    const auto a = test::view(m.keep, {n, k}), b = test::view(m.restore, {n, len}), c = test::view(m.mask, {n, len});
    CHECK_RC(smalti_masking_random(99, 1ull << 40, 5, &a, &b, &c, nullptr));
    m.check("philox ids", argsort(noise, n, len));
  }
}

TEST(masking_long_rows_and_checks) {
  const int64_t n = 2, len = 1500, k = 400;
  const Ids shuffle = argsort(test::randn<float>(n * len, 3), n, len);
  Dev<int64_t> s(shuffle);
  Masking m(n, len, k);
  const auto v = test::view(s, {n, len}), a = test::view(m.keep, {n, k}), b = test::view(m.restore, {n, len}),
             c = test::view(m.mask, {n, len});
  CHECK_RC(smalti_masking_invert(&v, &a, &b, &c, nullptr));
  m.check("inverted", shuffle);
  CHECK(smalti_masking_random(1, 1, 0, &a, &b, &c, nullptr) == kInvalid);
  Dev<int32_t> flag(1);
  CHECK_RC(smalti_masking_check(&v, flag.p, nullptr));
  CHECK(flag.get()[0] == 0);
  for (int64_t wrong : {shuffle[0], (int64_t)-1, len}) {
    Ids bad = shuffle;
    bad[len + 7] = wrong == shuffle[0] ? bad[len + 8] : wrong;
    Dev<int64_t> d(bad);
    const auto w = test::view(d, {n, len});
    CHECK_RC(smalti_masking_check(&w, flag.p, nullptr));
    CHECK(flag.get()[0] != 0);
  }
}

TEST(masking_tokens) {
  tokens<float>(3, 20, 5, 12);
  tokens<float>(2, 40, 35, 7);
  tokens<bf16>(17, 12, 4, 24);
  tokens<f16>(2, 12, 4, 11);
  tokens<bf16>(1, 5, 2, 1100);
  tokens<double>(3, 9, 4, 6);
}

TEST(masking_repeated_ids_add_up_in_order) {
  Dev<float> x(std::vector<float>{1e8f, 1.f, -1e8f, 2.f, 5.f, 7.f});
  Dev<int64_t> ids(Ids{1, 1, 1});
  Dev<float> y(6);
  const auto vx = test::view(x, {1, 3, 2}), vi = test::view(ids, {1, 3}), vy = test::view(y, {1, 3, 2});
  CHECK_RC(smalti_ungather_tokens(&vx, &vi, &vy, nullptr));
  test::check_same("sums", y.get(), {0.f, 0.f, (1e8f - 1e8f) + 5.f, 10.f, 0.f, 0.f});
}

TEST(masking_unshuffle) {
  unshuffle<float>(3, 12, 3, 20);
  unshuffle<float>(70, 6, 2, 5);
  unshuffle<bf16>(9, 10, 4, 16);
  unshuffle<f16>(2, 10, 4, 9);
  unshuffle<bf16>(1, 3, 1, 600);
  unshuffle<double>(2, 5, 0, 4);
  unshuffle<double>(2, 5, 5, 4);
}

TEST(masking_patches) {
  for (bool interleaved : {false, true})
    for (bool last : {false, true})
      for (bool all : {false, true}) {
        patches<float, float>(2, 3, 16, 24, 8, interleaved, last, false, all);
        patches<uint8_t, uint8_t>(2, 3, 16, 32, 16, interleaved, last, false, all);
        patches<bf16, bf16>(2, 1, 6, 9, 3, interleaved, last, false, all);
        patches<double, double>(1, 5, 4, 6, 2, interleaved, last, false, all);
        patches<uint8_t, float>(2, 3, 16, 16, 8, interleaved, last, true, all);
        patches<uint8_t, bf16>(2, 3, 16, 16, 8, interleaved, last, true, all);
        patches<uint8_t, f16>(1, 2, 8, 12, 4, interleaved, last, false, all);
        patches<float, bf16>(1, 3, 8, 8, 4, interleaved, last, true, all);
        patches<float, f16>(1, 3, 14, 14, 7, interleaved, last, true, all);
        patches<double, double>(1, 3, 8, 8, 4, interleaved, last, true, all);
      }
}

TEST(masking_loss) {
  for (bool norm : {false, true})
    for (bool interleaved : {false, true}) {
      loss<float, float, float>(3, 3, 4, norm, interleaved, 1e-5);
      loss<float, uint8_t, float>(2, 3, 5, norm, interleaved, 1e-5);
      loss<float, float, float>(1, 3, 20, norm, interleaved, 1e-5);  // more than a warp keeps
      loss<bf16, float, float>(2, 3, 4, norm, interleaved, 4e-3);
      loss<bf16, bf16, float>(2, 1, 4, norm, interleaved, 4e-3);
      loss<f16, f16, float>(2, 2, 3, norm, interleaved, 1e-3);
      loss<double, double, double>(2, 3, 4, norm, interleaved, 1e-12);
    }
}

TEST(masking_loss_of_a_constant_patch) {
  // its variance is 0: an error of the mean would grow a thousandfold
  const int64_t p = 4, width = 48;
  Dev<float> images(std::vector<float>(width, 0.1f)), pred(std::vector<float>(width, 0.f)), mask(std::vector<float>{1.f}), out(1);
  Dev<double> work(smalti_masked_loss_workspace(1) / 8);
  const auto vx = test::view(pred, {1, 1, width}), vi = test::view(images, {1, 3, p, p}), vm = test::view(mask, {1, 1}),
             vo = test::view(out, {});
  CHECK_RC(smalti_masked_loss(&vx, &vi, &vm, p, 1, 1e-6, work.p, &vo, nullptr, nullptr));
  CHECK(out.get()[0] == 0.0f);
}
