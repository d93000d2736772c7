// Steps of optimizers, clipping and averages over many tensors, against the same in f64.
#include "harness.hpp"
#include <limits>
#include <map>
#include <memory>
using namespace smalti;
using test::Dev;

namespace {

/// Odd sizes, empty ones, more tensors than one launch takes, and pieces that end within a group.
std::vector<int64_t> sizes(int small = 62) {
  std::vector<int64_t> all = {0, 1, 7, 16384, 16385, 0, 40003, 3};
  for (int i = 0; i < small; i++) all.push_back(i % 9);
  return all;
}

/// An array on the device that starts `shift` elements into its memory.
template <class T> struct Array {
  std::unique_ptr<Dev<T>> memory;
  size_t shift;
  Array(const std::vector<T>& host, size_t shift) : shift(shift) {
    std::vector<T> shifted(shift);
    shifted.insert(shifted.end(), host.begin(), host.end());
    memory = std::make_unique<Dev<T>>(shifted);
  }
  T* ptr() const { return memory->p + shift; }
  std::vector<T> get() const {
    const auto all = memory->get();
    return std::vector<T>(all.begin() + (long)shift, all.end());
  }
};

/// Parameters with all that an optimizer keeps for them.
template <class T> struct Set {
  using A = Acc<T>;
  static constexpr bool kHalf = sizeof(T) == 2;
  std::vector<Array<T>> p, g;
  std::vector<Array<A>> master, state[3];
  std::vector<smalti_moving> tensors;

  explicit Set(size_t shift, int small = 62) {
    unsigned seed = 1;
    for (int64_t n : sizes(small)) {
      const auto start = test::randn<T>((size_t)n, seed++);
      std::vector<A> exact;
      for (T v : start) exact.push_back(widen(v));
      p.emplace_back(start, shift);
      g.emplace_back(test::randn<T>((size_t)n, seed++, 0.3), shift);
      master.emplace_back(exact, shift);
      for (auto& s : state) {
        auto values = test::randn<A>((size_t)n, seed++, 0.2);
        if (&s != &state[0]) for (auto& v : values) v = v * v;  // second moments
        s.emplace_back(values, shift);
      }
      smalti_moving t{};
      t.p = p.back().ptr();
      t.g = g.back().ptr();
      if (kHalf) t.master = master.back().ptr();
      for (int k = 0; k < 3; k++) t.state[k] = state[k].back().ptr();
      t.n = n;
      t.dtype = t.source = test::dtype_of<T>();
      t.row = (int64_t)tensors.size();
      tensors.push_back(t);
    }
  }
  /// All that a step changes, as bytes.
  std::vector<uint8_t> bits() const {
    std::vector<uint8_t> all;
    auto add = [&](const auto& v) {
      const uint8_t* from = (const uint8_t*)v.data();
      all.insert(all.end(), from, from + v.size() * sizeof(v[0]));
    };
    for (size_t i = 0; i < tensors.size(); i++) {
      add(p[i].get());
      add(master[i].get());
      for (auto& s : state) add(s[i].get());
    }
    return all;
  }
  int64_t count() const { return (int64_t)tensors.size(); }
};

/// The numbers of a tensor: every third has other ones.
std::vector<double> row_of(int rule, size_t i) {
  const double lr = i % 3 ? 0.01 : 0.02, decay = i % 3 ? 0.05 : 0.0, adapts = i % 5 ? 1 : 0;
  switch (rule) {
    case SMALTI_SGD: return {-1, decay, lr, 0, 0, 0, 0, 0};
    case SMALTI_MOMENTUM: return {1, decay, 0.9, 0.8, i % 2 ? 0.9 : 0.0, lr, 0, 0};
    case SMALTI_ADAM: case SMALTI_ADAM_MAX: return {0.9, 0.95, 1e-6, 1, 1 - lr * decay, i % 2 ? 0.1 : 0.0, lr / 0.19, 1.3};
    case SMALTI_LAMB: return {0.9, 0.95, 1e-6, 2.5, 1.3, decay, lr, adapts};
    default: return {0.02, decay, 0.9, 1, 0, lr, adapts, 0};
  }
}

struct Element { double p, g, s[3]; };

void moments(const std::vector<double>& k, double g, double* s) {
  s[0] = k[0] * s[0] + (1 - k[0]) * g;
  s[1] = k[1] * s[1] + (1 - k[1]) * g * g;
}
double direction(const std::vector<double>& k, double p, const double* s) {
  return k[3] * s[0] / (std::sqrt(s[1]) * k[4] + k[2]) + k[5] * p;
}

/// One step of a tensor.
void reference(int rule, std::vector<double> k, std::vector<Element>& all) {
  double w = 0, u = 0;
  for (Element& e : all) {
    double look = e.g + (rule == SMALTI_LARS ? k[1] * e.p : 0);
    if (rule == SMALTI_LAMB) {
      moments(k, e.g, e.s);
      look = direction(k, e.p, e.s);
    }
    w += e.p * e.p;
    u += look * look;
  }
  w = std::sqrt(w);
  u = std::sqrt(u);
  if (rule == SMALTI_LAMB && k[7] != 0 && w > 0 && u > 0) k[6] *= w / u;
  if (rule >= SMALTI_LARS && rule < SMALTI_LAMB) {
    double ratio = 1, decay = k[6] != 0 ? k[1] : 0;
    if (k[6] != 0 && w > 0 && u > 0) {
      ratio = k[0] * w / (rule == SMALTI_LARS ? u : u + w * decay + 1e-8);
      if (rule == SMALTI_LARC_CLIPPED) ratio = std::min(ratio / k[5], 1.0);
    }
    k[0] = ratio;
    k[1] = ratio * decay;
    rule = SMALTI_MOMENTUM;
  }
  for (Element& e : all) {
    double g = k[0] * e.g + k[1] * e.p;
    switch (rule) {
      case SMALTI_SGD: e.p -= k[2] * g; break;
      case SMALTI_MOMENTUM:
        e.s[0] = k[2] * e.s[0] + k[3] * g;
        e.p -= k[5] * (k[4] != 0 ? g + k[4] * e.s[0] : e.s[0]);
        break;
      case SMALTI_LAMB: e.p -= k[6] * direction(k, e.p, e.s); break;
      default: {
        moments(k, k[3] * e.g + k[5] * e.p, e.s);
        double v = e.s[1];
        if (rule == SMALTI_ADAM_MAX) v = e.s[2] = std::max(e.s[1], e.s[2]);
        e.p = e.p * k[4] - k[6] * e.s[0] / (std::sqrt(v) * k[7] + k[2]);
      }
    }
  }
}

template <class T> void step(int rule, const Set<T>& set, const Dev<double>& numbers) {
  const int64_t bytes = smalti_optim_workspace(rule, set.tensors.data(), set.count());
  CHECK(bytes >= 0);
  Dev<uint8_t> workspace((size_t)bytes);
  CHECK_RC(smalti_optim_step(rule, set.tensors.data(), set.count(), numbers.p, workspace.p, nullptr));
}

/// The same bits at every call of this name, in whatever schedule.
void same_as_before(const std::string& name, const std::vector<uint8_t>& bits) {
  static std::map<std::string, std::vector<uint8_t>> before;
  const auto [at, fresh] = before.emplace(name, bits);
  if (!fresh) test::check_same(name.c_str(), bits, at->second);
}

template <class T> void steps(int rule, double tolerance) {
  Set<T> set(0), again(0), shifted(1);
  const size_t count = set.tensors.size();
  std::vector<double> numbers;
  std::vector<std::vector<Element>> want(count);
  for (size_t i = 0; i < count; i++) {
    const auto row = row_of(rule, i);
    numbers.insert(numbers.end(), row.begin(), row.end());
    const auto p = test::wide(set.p[i].get()), g = test::wide(set.g[i].get());
    std::vector<double> s[3];
    for (int k = 0; k < 3; k++) s[k] = test::wide(set.state[k][i].get());
    for (size_t j = 0; j < p.size(); j++) want[i].push_back({p[j], g[j], {s[0][j], s[1][j], s[2][j]}});
  }
  const Dev<double> device(numbers);
  for (int t = 0; t < 3; t++) {
    step(rule, set, device);
    step(rule, again, device);
    step(rule, shifted, device);
    for (size_t i = 0; i < count; i++) reference(rule, row_of(rule, i), want[i]);
  }
  const std::string name = "rule " + std::to_string(rule) + " dtype " + std::to_string(test::dtype_of<T>());
  for (size_t i = 0; i < count; i++) {
    std::vector<double> p, s[3];
    for (const Element& e : want[i]) {
      p.push_back(e.p);
      for (int k = 0; k < 3; k++) s[k].push_back(e.s[k]);
    }
    if (Set<T>::kHalf) {
      const auto exact = set.master[i].get();
      std::vector<T> rounded;
      for (auto v : exact) rounded.push_back(narrow<T>(v));
      test::check_close(name.c_str(), exact, p, tolerance);
      test::check_same((name + ": the half copy").c_str(), set.p[i].get(), rounded);
    } else {
      test::check_close(name.c_str(), set.p[i].get(), p, tolerance);
    }
    for (int k = 0; k < 3; k++) test::check_close((name + ": state").c_str(), set.state[k][i].get(), s[k], tolerance);
  }
  test::check_same((name + ": a second run").c_str(), set.bits(), again.bits());
  test::check_same((name + ": unaligned").c_str(), set.bits(), shifted.bits());
  same_as_before(name, set.bits());
}

void all_dtypes(int rule) {
  steps<float>(rule, 3e-6);
  steps<double>(rule, 1e-13);
  steps<bf16>(rule, 3e-6);
  steps<f16>(rule, 3e-6);
}

}  // namespace

TEST(optim_sgd) { all_dtypes(SMALTI_SGD); all_dtypes(SMALTI_MOMENTUM); }
TEST(optim_adam) { all_dtypes(SMALTI_ADAM); all_dtypes(SMALTI_ADAM_MAX); }
TEST(optim_lars) { all_dtypes(SMALTI_LARS); all_dtypes(SMALTI_LARC); all_dtypes(SMALTI_LARC_CLIPPED); }
TEST(optim_lamb) { all_dtypes(SMALTI_LAMB); }

// Parameters of several dtypes in one call; a tensor whose norm is 0; what is refused.
TEST(optim_mixed) {
  Set<float> a(0), alone(0);
  Set<bf16> b(0), other(1);
  std::vector<smalti_moving> both;
  std::vector<double> numbers;
  for (size_t i = 0; i < a.tensors.size(); i++) {
    both.push_back(a.tensors[i]);
    both.push_back(b.tensors[i]);
    const auto row = row_of(SMALTI_LARS, i);
    numbers.insert(numbers.end(), row.begin(), row.end());
  }
  const Dev<double> device(numbers);
  const int64_t bytes = smalti_optim_workspace(SMALTI_LARS, both.data(), (int64_t)both.size());
  Dev<uint8_t> workspace((size_t)bytes);
  CHECK_RC(smalti_optim_step(SMALTI_LARS, both.data(), (int64_t)both.size(), device.p, workspace.p, nullptr));
  step(SMALTI_LARS, alone, device);
  step(SMALTI_LARS, other, device);
  test::check_same("f32 among bf16", a.bits(), alone.bits());
  test::check_same("bf16 among f32", b.bits(), other.bits());

  const Dev<float> p(std::vector<float>(5, 0.f)), g(std::vector<float>(5, 2.f)), m(std::vector<float>(5, 0.f));
  smalti_moving t{};
  t.p = p.p;
  t.g = g.p;
  t.state[0] = m.p;
  t.n = 5;
  Dev<double> row(std::vector<double>{0.02, 0.1, 0.9, 1, 0, 0.5, 1, 0});
  Dev<uint8_t> small((size_t)smalti_optim_workspace(SMALTI_LARC, &t, 1));
  CHECK_RC(smalti_optim_step(SMALTI_LARC, &t, 1, row.p, small.p, nullptr));
  test::check_same("a norm of 0: plain momentum", p.get(), std::vector<float>(5, -1.f));
  CHECK(smalti_optim_step(SMALTI_ADAM, &t, 1, row.p, nullptr, nullptr) != 0);
  CHECK(smalti_optim_workspace(8, &t, 1) == -1);
  t.dtype = t.source = SMALTI_BF16;  // without an f32 copy
  CHECK(smalti_optim_workspace(SMALTI_SGD, &t, 1) == -1);
  CHECK_RC(smalti_optim_step(SMALTI_SGD, nullptr, 0, row.p, nullptr, nullptr));
}

namespace {

template <class T> double norm(const Set<T>& set, double order) {
  double sum = 0;
  for (auto& array : set.p)
    for (double v : test::wide(array.get()))
      sum = std::isinf(order) ? std::max(sum, std::fabs(v)) : sum + std::pow(std::fabs(v), order);
  return std::isinf(order) ? sum : std::pow(sum, 1 / order);
}

template <class T> std::vector<double> device_norm(const Set<T>& set, double order, double most) {
  Dev<uint8_t> workspace((size_t)smalti_grad_norm_workspace(set.tensors.data(), set.count()));
  Dev<double> result(2);
  CHECK_RC(smalti_grad_norm(set.tensors.data(), set.count(), order, most, result.p, workspace.p, nullptr));
  CHECK_RC(smalti_grad_scale(set.tensors.data(), set.count(), result.p + 1, nullptr));
  return result.get();
}

template <class T> void clipping(double tolerance) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (double order : {1.0, 2.0, 3.0, infinity}) {
    Set<T> set(0, 140), shifted(1, 140), whole(0, 140);
    const double want = norm(set, order), most = want / 3;
    std::vector<std::vector<double>> values;
    for (auto& array : set.p) values.push_back(test::wide(array.get()));
    const auto got = device_norm(set, order, most), other = device_norm(shifted, order, most);
    test::check_close("norm", std::vector<double>{got[0] / want}, {1.0}, 1e-12);
    test::check_same("norm, unaligned", got, other);
    std::vector<uint8_t> bits((const uint8_t*)got.data(), (const uint8_t*)(got.data() + 2));
    same_as_before("norm " + std::to_string(order) + " of " + std::to_string(test::dtype_of<T>()), bits);
    for (size_t i = 0; i < values.size(); i++) {
      for (double& v : values[i]) v *= most / (want + 1e-6);
      test::check_close("clipped", set.p[i].get(), values[i], tolerance);
    }
    test::check_same("clipped, unaligned", set.bits(), shifted.bits());
    device_norm(whole, order, want * 2);
    test::check_same("short enough", whole.bits(), Set<T>(0, 140).bits());
    CHECK_RC(smalti_grad_clamp(set.tensors.data(), set.count(), 0.25, nullptr));
    for (size_t i = 0; i < values.size(); i++) {
      for (double& v : values[i]) v = std::min(std::max(v, -0.25), 0.25);
      test::check_close("cut off", set.p[i].get(), values[i], tolerance);
    }
  }
}

}  // namespace

TEST(optim_clipping) {
  clipping<float>(1e-6);
  clipping<double>(1e-12);
  clipping<bf16>(8e-3);
  clipping<f16>(1e-3);
  // A NaN reaches everything.
  for (double order : {2.0, (double)INFINITY}) {
    std::vector<float> values(40000, 1.f);
    values[20000] = NAN;
    const Dev<float> p(values);
    smalti_moving t{};
    t.p = p.p;
    t.n = 40000;
    Dev<uint8_t> workspace((size_t)smalti_grad_norm_workspace(&t, 1));
    Dev<double> result(2);
    CHECK_RC(smalti_grad_norm(&t, 1, order, 1.0, result.p, workspace.p, nullptr));
    CHECK(std::isnan(result.get()[0]) && std::isnan(result.get()[1]));
    CHECK_RC(smalti_grad_clamp(&t, 1, 1.0, nullptr));
    CHECK(std::isnan(p.get()[20000]) && p.get()[0] == 1.f);
    CHECK_RC(smalti_grad_scale(&t, 1, result.p + 1, nullptr));
    CHECK(std::isnan(p.get()[0]) && std::isnan(p.get()[39999]));
    CHECK(smalti_grad_norm(&t, 1, 0.0, 1.0, result.p, nullptr, nullptr) != 0);
  }
  Dev<double> result(2);
  CHECK_RC(smalti_grad_norm(nullptr, 0, 2.0, 1.0, result.p, nullptr, nullptr));
  CHECK(result.get()[0] == 0.0 && result.get()[1] == 1e6);
}

namespace {

template <class T, class S> void averages(double tolerance) {
  for (size_t shift : {0, 1}) {
    std::vector<Array<T>> targets;
    std::vector<Array<S>> sources;
    std::vector<smalti_moving> tensors;
    std::vector<std::vector<double>> want;
    unsigned seed = 7;
    const double decay = 0.75;
    for (int64_t n : sizes(140)) {
      targets.emplace_back(test::randn<T>((size_t)n, seed++), shift);
      sources.emplace_back(test::randn<S>((size_t)n, seed++), shift);
      const auto p = test::wide(targets.back().get()), g = test::wide(sources.back().get());
      want.emplace_back();
      for (size_t i = 0; i < p.size(); i++) want.back().push_back(decay * p[i] + (1 - decay) * g[i]);
      smalti_moving t{};
      t.p = targets.back().ptr();
      t.g = sources.back().ptr();
      t.n = n;
      t.dtype = test::dtype_of<T>();
      t.source = test::dtype_of<S>();
      tensors.push_back(t);
    }
    const Dev<double> number(std::vector<double>{decay});
    CHECK_RC(smalti_average(tensors.data(), (int64_t)tensors.size(), shift ? number.p : nullptr, shift ? 0.0 : decay, nullptr));
    for (size_t i = 0; i < want.size(); i++) test::check_close("average", targets[i].get(), want[i], tolerance);
  }
}

}  // namespace

TEST(optim_average) {
  averages<float, float>(1e-6);
  averages<float, bf16>(1e-6);
  averages<float, f16>(1e-6);
  averages<bf16, bf16>(8e-3);
  averages<f16, f16>(1e-3);
  averages<double, double>(1e-14);
  smalti_moving t{};
  t.dtype = SMALTI_BF16;
  CHECK(smalti_average(&t, 1, nullptr, 0.5, nullptr) != 0);
}
