// Reductions: sum, product, extremes with positions, norms, log-sum-exp, variance. The loop is in common/fold.cuh.
#include "common/fold.cuh"

namespace smalti {
namespace {

/// What folds over one tensor share.
template <class T, class O> struct OverOne {
  using In = Num<T>;
  const T* x;
  O* y;
  template <int V> DEV void load(int64_t off, In (&v)[V]) const { smalti::load<T, V>(x + off, v); }
  DEV void put(int64_t off, Num<O> value) const { y[off] = narrow<O>(value); }
};

template <class T, class O> struct Sum : OverOne<T, O>, OneByOne<Sum<T, O>> {
  using A = Num<T>;
  double divisor;
  DEV A start() const { return 0; }
  template <class C> DEV void take(A& a, A v, int64_t, const C&) const { a = join(a, v); }
  DEV A join(A a, A b) const { return a + b; }
  DEV float over(float a) const { return a / (float)divisor; }
  DEV int64_t over(int64_t a) const { return a; }
  DEV void finish(A a, int64_t off, int64_t) const { this->put(off, over(a)); }
};

DEV bool is_nan(float v) { return v != v; }
DEV bool is_nan(double v) { return v != v; }
DEV bool is_nan(int64_t) { return false; }
DEV float limit(float, bool largest) { return largest ? -infinity<float>() : infinity<float>(); }
DEV double limit(double, bool largest) { return largest ? -infinity<double>() : infinity<double>(); }
DEV int64_t limit(int64_t, bool largest) { return largest ? INT64_MIN : INT64_MAX; }

/// The largest or smallest element with its position: the first of equal ones, and NaN before all.
template <class T> struct Where : OverOne<T, T>, OneByOne<Where<T>> {
  struct A { int64_t at; Num<T> value; };
  int64_t* index;
  bool largest;
  DEV A start() const { return {INT64_MAX, limit(Num<T>(0), largest)}; }
  DEV A join(const A& a, const A& b) const {
    const bool nan = is_nan(a.value), other = is_nan(b.value);
    if (nan != other) return nan ? a : b;
    if (!nan && a.value != b.value) return (largest ? a.value > b.value : a.value < b.value) ? a : b;
    return a.at <= b.at ? a : b;
  }
  template <class C> DEV void take(A& a, Num<T> v, int64_t pos, const C&) const { a = join(a, A{pos, v}); }
  DEV void finish(const A& a, int64_t off, int64_t) const {
    this->put(off, a.value);
    index[off] = a.at;
  }
};

enum { kSum, kProduct, kLargest, kSmallest, kSquares, kCount, kPowers };
/// Every fold of one number that is seldom asked for: the function is a run-time number, as in elementwise.cu. `norm`:
/// of absolute values.
template <class T> struct Plain : OverOne<T, T>, OneByOne<Plain<T>> {
  using A = Num<T>;
  A order;
  double divisor;
  int32_t kind;
  bool norm;
  DEV A start() const {
    if (kind == kLargest) return norm ? A(0) : limit(A(0), true);
    return kind == kSmallest ? limit(A(0), false) : A(kind == kProduct);
  }
  DEV A join(A a, A b) const {
    if (kind == kLargest) return is_nan(a) || a > b ? a : b;
    if (kind == kSmallest) return is_nan(a) || a < b ? a : b;
    if constexpr (std::is_same<A, int64_t>::value)  // wraps
      return (A)(kind == kProduct ? (uint64_t)a * (uint64_t)b : (uint64_t)a + (uint64_t)b);
    else
      return kind == kProduct ? a * b : a + b;
  }
  template <class C> DEV void take(A& a, A v, int64_t, const C&) const {
    if constexpr (!std::is_same<A, int64_t>::value) {
      if (kind == kSquares) v = v * v;
      else if (kind == kCount) v = is_nan(v) ? v : v != A(0) ? A(1) : A(0);
      else if (norm) v = kind == kPowers ? pow_of(abs_of(v), order) : abs_of(v);
    }
    a = join(a, v);
  }
  DEV void finish(A a, int64_t off, int64_t) const {
    if constexpr (!std::is_same<A, int64_t>::value) {
      if (kind == kSquares) a = sqrt_of(a);
      else if (kind == kPowers) a = pow_of(a, A(1) / order);
      else if (kind == kSum && !norm) a = a / (A)divisor;
    }
    this->put(off, a);
  }
};

/// ln(sum(e^x)) in one pass: a running maximum, and the sum of e^(x - maximum).
template <class T> struct LogSumExp : OverOne<T, T>, OneByOne<LogSumExp<T>> {
  using R = Num<T>;
  struct A { R max, sum; };
  DEV A start() const { return {-infinity<R>(), R(0)}; }
  /// An infinite maximum would leave infinity - infinity; without one to take out the sum is right.
  DEV R shift(R max) const { return abs_of(max) == infinity<R>() ? R(0) : max; }
  DEV A join(const A& a, const A& b) const {
    const R max = a.max > b.max ? a.max : b.max, s = shift(max);
    const R left = a.sum == R(0) ? R(0) : a.sum * exp_of(shift(a.max) - s);
    const R right = b.sum == R(0) ? R(0) : b.sum * exp_of(shift(b.max) - s);
    return {max, left + right};
  }
  template <class C> DEV void take(A& a, R v, int64_t, const C&) const {
    if (v > a.max) {
      const R s = shift(v);
      a.sum = (a.sum == R(0) ? R(0) : a.sum * exp_of(shift(a.max) - s)) + exp_of(v - s);
      a.max = v;
    } else {
      a.sum += exp_of(v - shift(a.max));
    }
  }
  DEV void finish(const A& a, int64_t off, int64_t) const { this->put(off, log_of(a.sum) + shift(a.max)); }
};

/// Mean and sum of squared distances in one pass. A thread sums distances, and their squares, to the first element
/// that it sees (small numbers, where the mean is large), then centres them; centred sums are joined after Chan,
/// Golub and LeVeque (1979).
template <class T> struct Variance : OneByOne<Variance<T>> {
  using R = Num<T>;
  using In = R;
  struct A { R n, pivot, mean, squares; };  // mean: less the pivot; in a thread the plain sums
  const T* x;
  R *y, *mean;
  R divisor;
  bool root;
  template <int V> DEV void load(int64_t off, R (&v)[V]) const { smalti::load<T, V>(x + off, v); }
  DEV A start() const { return {R(0), R(0), R(0), R(0)}; }
  template <class C> DEV void take(A& a, R v, int64_t, const C&) const {
    if (a.n == R(0)) a.pivot = v;
    const R d = v - a.pivot;
    a.n += R(1);
    a.mean += d;
    a.squares = fma_of(d, d, a.squares);
  }
  DEV A settle(const A& a) const {
    if (a.n == R(0)) return a;
    const R mean = a.mean / a.n;
    return {a.n, a.pivot, mean, a.squares - a.mean * mean};
  }
  DEV A join(const A& a, const A& b) const {
    if (b.n == R(0)) return a;
    if (a.n == R(0)) return b;
    const R n = a.n + b.n, share = b.n / n, d = (b.pivot - a.pivot) + (b.mean - a.mean);
    return {n, a.pivot, a.mean + d * share, a.squares + b.squares + d * d * a.n * share};
  }
  DEV void finish(const A& a, int64_t off, int64_t) const {
    // Rounding may leave less than nothing.
    const R variance = (a.squares < R(0) ? R(0) : a.squares) / divisor;
    y[off] = root ? sqrt_of(variance) : variance;
    if (mean) mean[off] = a.pivot + a.mean;
  }
};

/// One reduction as asked for; with `size` the bytes of its workspace come back instead of a run.
struct Request {
  int32_t op;
  const smalti_view *x, *y, *extra;
  double parameter;
  void *workspace, *stream;
  int64_t* size;

  /// By accesses of W elements.
  template <int W, class F> int run(const F& f) const {
    FoldPlan plan;
    if (!plan_fold(*x, *y, W, plan)) return kInvalid;
    if (size) {
      const int64_t bytes = fold_workspace<F>(plan);
      *size = bytes > *size ? bytes : *size;
      return 0;
    }
    return launch_fold<W>(f, plan, workspace, stream);
  }
  template <class F> F start() const {
    F f{};
    f.x = (decltype(f.x))x->ptr;
    f.y = (decltype(f.y))y->ptr;
    return f;
  }
  /// The second result: of this dtype, with the strides of the first.
  bool extra_fits(int32_t dtype) const {
    if (!extra) return true;
    if (extra->dtype != dtype || !same_shape(*extra, *y)) return false;
    for (int d = 0; d < y->rank; d++)
      if (y->shape[d] > 1 && y->stride[d] != extra->stride[d]) return false;
    return true;
  }
  template <class T, class O> int sum() const {
    auto f = start<Sum<T, O>>();
    f.divisor = parameter;
    return run<sizeof(T) == 1 ? 1 : kFoldWidth<T>>(f);
  }
  template <class T> int plain(int32_t kind, bool norm = false) const {
    auto f = start<Plain<T>>();
    f.order = (Num<T>)parameter;
    f.divisor = parameter;
    f.kind = kind;
    f.norm = norm;
    return run<kFoldWidth<T>>(f);
  }
  template <class T> int extreme() const {
    // whether positions are wanted is not known when room is asked for
    if (!extra || size) {
      const int rc = plain<T>(op == SMALTI_MAX ? kLargest : kSmallest);
      if (rc || !size) return rc;
    }
    auto f = start<Where<T>>();
    f.largest = op == SMALTI_MAX;
    f.index = extra ? (int64_t*)extra->ptr : nullptr;
    return run<1>(f);
  }
  template <class T> int norm() const {
    const bool infinite = std::isinf(parameter);
    const int32_t kind = infinite ? (parameter > 0 ? kLargest : kSmallest)
                                  : parameter == 2 ? kSquares : parameter == 1 ? kSum : parameter == 0 ? kCount : kPowers;
    return plain<T>(kind, true);
  }
  template <class T> int variance() const {
    auto f = start<Variance<T>>();
    f.mean = extra ? (Num<T>*)extra->ptr : nullptr;
    f.divisor = (Num<T>)parameter;
    f.root = op == SMALTI_STD;
    return run<kFoldWidth<T>>(f);
  }

  int dispatch() const {
    const bool whole = x->dtype >= SMALTI_I64;
    const bool spread = op == SMALTI_VAR || op == SMALTI_STD, extremes = op == SMALTI_MAX || op == SMALTI_MIN;
    const int32_t out = spread ? computed_in(x->dtype) : whole && !extremes ? SMALTI_I64 : x->dtype;
    if (y->dtype != out || !extra_fits(extremes ? SMALTI_I64 : out) || (extra && !spread && !extremes)) return kInvalid;
    // Each dtype is some kernels: those that nothing asks for are left out.
    switch (op) {
      case SMALTI_SUM:
        switch (x->dtype) {
          case SMALTI_F32: return sum<float, float>();
          case SMALTI_BF16: return sum<bf16, bf16>();
          case SMALTI_F16: return sum<f16, f16>();
          case SMALTI_F64: return plain<double>(kSum);
          case SMALTI_BOOL: return sum<bool, int64_t>();
          case SMALTI_I64: return plain<int64_t>(kSum);
        }
        break;
      case SMALTI_PROD:
        if (x->dtype == SMALTI_I64) return plain<int64_t>(kProduct);
        DISPATCH_REAL(x->dtype, T, return plain<T>(kProduct));
        break;
      case SMALTI_MAX: case SMALTI_MIN:
        if (x->dtype == SMALTI_I64) return extreme<int64_t>();
        DISPATCH_REAL(x->dtype, T, return extreme<T>());
        break;
      case SMALTI_NORM: DISPATCH_REAL(x->dtype, T, return norm<T>()); break;
      case SMALTI_LOGSUMEXP: DISPATCH_REAL(x->dtype, T, return run<kFoldWidth<T>>(start<LogSumExp<T>>())); break;
      case SMALTI_VAR: case SMALTI_STD: DISPATCH_FLOAT(x->dtype, T, return variance<T>()); break;
    }
    return kInvalid;
  }
};

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_reduce_workspace(int32_t op, const smalti_view* x, const smalti_view* y) {
  int64_t bytes = 0;
  const Request request{op, x, y, nullptr, 0, nullptr, nullptr, &bytes};
  return request.dispatch() ? -1 : bytes;
}

extern "C" int32_t smalti_reduce(int32_t op, const smalti_view* x, const smalti_view* y, const smalti_view* extra,
                                 double parameter, void* workspace, void* stream) {
  return Request{op, x, y, extra, parameter, workspace, stream, nullptr}.dispatch();
}
