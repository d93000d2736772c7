// Non-maximum suppression against the loop over pairs: indices are exact.
#include "harness.hpp"
#include <algorithm>
#include <numeric>
using namespace smalti;
using test::Dev;

namespace {

template <class A> std::vector<int64_t> naive(const std::vector<A>& b, const std::vector<int64_t>& order, const std::vector<int64_t>* groups, double threshold) {
  std::vector<int64_t> kept;
  for (int64_t i : order) {
    bool free = true;
    for (int64_t k : kept) {
      if (groups && (*groups)[i] != (*groups)[k]) continue;
      const A *p = &b[4 * k], *q = &b[4 * i];
      const A w = std::max(A(0), std::min(p[2], q[2]) - std::max(p[0], q[0])), h = std::max(A(0), std::min(p[3], q[3]) - std::max(p[1], q[1]));
      const A both = w * h, all = (p[2] - p[0]) * (p[3] - p[1]) + (q[2] - q[0]) * (q[3] - q[1]) - both;
      if ((double)(both / all) > threshold) free = false;
    }
    if (free) kept.push_back(i);
  }
  return kept;
}

template <class A> void check(const std::vector<A>& boxes, const std::vector<int64_t>& order, const std::vector<int64_t>* groups, double threshold) {
  const int64_t n = (int64_t)order.size();
  Dev<A> b(boxes);
  Dev<int64_t> o(order), kept(n), found(1), g(groups ? *groups : std::vector<int64_t>());
  Dev<uint64_t> work(smalti_nms_workspace(n) / 8 + 1);
  const auto vb = test::view(b, {n, 4}), vo = test::view(o, {n}), vk = test::view(kept, {n}), vf = test::view(found, {1}), vg = test::view(g, {n});
  CHECK_RC(smalti_nms(&vb, &vo, groups ? &vg : nullptr, threshold, &vk, &vf, work.p, nullptr));
  auto got = kept.get();
  got.resize((size_t)std::max<int64_t>(0, std::min(n, found.get()[0])));
  test::check_same("kept", got, naive(boxes, order, groups, threshold));
}

/// Boxes in clusters, with whole numbers among them so that thresholds are met exactly.
template <class A> std::vector<A> random_boxes(int64_t n, unsigned seed) {
  std::mt19937 r(seed);
  std::uniform_real_distribution<A> part(0, 1);
  std::vector<A> b;
  for (int64_t i = 0; i < n; i++) {
    const bool whole = i % 3 == 0;
    const A side = 4 + part(r) * 12, x = (A)(r() % 8) * 9 + part(r) * 4, y = (A)(r() % 8) * 9 + part(r) * 4, tall = 4 + part(r) * 12;
    for (A v : {x, y, x + side, y + tall}) b.push_back(whole ? std::floor(v) : v);
  }
  return b;
}
std::vector<int64_t> shuffled(int64_t n, unsigned seed) {
  std::vector<int64_t> o(n);
  std::iota(o.begin(), o.end(), 0);
  std::shuffle(o.begin(), o.end(), std::mt19937(seed));
  return o;
}

template <class A> void all(int64_t n) {
  const auto boxes = random_boxes<A>(n, (unsigned)n);
  const auto order = shuffled(n, 1);
  std::vector<int64_t> groups;
  for (int64_t i = 0; i < n; i++) groups.push_back(i * 7 % 5 - 2);
  for (double threshold : {0.0, 0.3, 0.5, 1.0}) {
    check(boxes, order, nullptr, threshold);
    check(boxes, order, &groups, threshold);
  }
}

}  // namespace

TEST(nms_sizes_around_tiles) {
  for (int64_t n : {0, 1, 2, 63, 64, 65, 128, 200}) all<float>(n);
  all<double>(100);
}

TEST(nms_many_tiles) {
  all<float>(1500);
  // more words than threads that look after them at once
  check(random_boxes<float>(5000, 9), shuffled(5000, 2), nullptr, 0.6);
}

TEST(nms_exact_thresholds_and_degenerate_boxes) {
  const float nan = NAN, inf = INFINITY;
  const std::vector<float> boxes = {0, 0, 10, 10, 0, 0, 10, 5,  0, 0, 10, 10, 3, 3, 3, 3, 3, 3, 3, 3, nan, 0, 4, 4,
                                    0, 0, nan, 4, 0, 0, inf, 4, 0, 0, inf, 4, 5, 5, 2, 2, 5, 5, 2, 2};
  const int64_t n = (int64_t)boxes.size() / 4;
  for (double threshold : {0.0, 0.49999999, 0.5, 0.50000001, 1.0})
    for (unsigned seed = 0; seed < 4; seed++) check(boxes, shuffled(n, seed), nullptr, threshold);
  // a third is not the f32 nearest to it
  const std::vector<float> thirds = {0, 0, 2, 1, 1, 0, 3, 1};
  for (double threshold : {1.0 / 3.0, (double)(1.0f / 3.0f), std::nextafter((double)(1.0f / 3.0f), 0.0)}) check(thirds, {0, 1}, nullptr, threshold);
}

TEST(nms_refuses) {
  Dev<float> b(12);
  Dev<int64_t> o(3), found(1);
  const auto vb = test::view(b, {4, 3}), vo = test::view(o, {3}), vf = test::view(found, {1});
  CHECK(smalti_nms(&vb, &vo, nullptr, 0.5, &vo, &vf, nullptr, nullptr) == kInvalid);
  CHECK(smalti_nms_workspace((int64_t)1 << 40) == -1);
}
