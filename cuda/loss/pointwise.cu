// Losses of one prediction and one target, fused with their sum, and their gradients.
#include "../common/fold.cuh"

namespace smalti {
namespace {

DEV float log1p_of(float x) { return log1pf(x); }
APART double log1p_of(double x) { return log1p(x); }
template <class A> DEV A sign(A x) { return x > A(0) ? A(1) : x < A(0) ? A(-1) : A(0) * x; }

/// The loss `kind` of src/ops/loss/pointwise.rs.
template <class A> DEV A value(int kind, A parameter, A x, A t) {
  const A d = x - t, a = abs_of(d);
  switch (kind) {
    case SMALTI_MSE: return d * d;
    case SMALTI_L1: return a;
    case SMALTI_SMOOTH_L1: return a < parameter ? A(0.5) * a * a / parameter : a - A(0.5) * parameter;
    case SMALTI_HUBER: return a < parameter ? A(0.5) * a * a : parameter * (a - A(0.5) * parameter);
    case SMALTI_KL_DIV: return t == A(0) ? -t * x : t * (log_of(t) - x);
    case SMALTI_KL_DIV_LOG: return exp_of(t) * (t - x);
    default: return (x > A(0) ? x : A(0)) - x * t + log1p_of(exp_of(-abs_of(x)));
  }
}
/// Derivatives by the prediction and by the target.
template <class A> DEV void slopes(int kind, A parameter, A x, A t, A& dx, A& dt) {
  const A d = x - t;
  switch (kind) {
    case SMALTI_MSE: dx = A(2) * d; break;
    case SMALTI_L1: dx = sign(d); break;
    case SMALTI_SMOOTH_L1: dx = abs_of(d) < parameter ? d / parameter : sign(d); break;
    case SMALTI_HUBER: dx = abs_of(d) < parameter ? d : parameter * sign(d); break;
    case SMALTI_KL_DIV: dx = -t; dt = log_of(t) + A(1) - x; return;
    case SMALTI_KL_DIV_LOG: dx = -exp_of(t); dt = exp_of(t) * (t - x + A(1)); return;
    default: dx = A(1) / (A(1) + exp_of(-x)) - t; dt = -x; return;
  }
  dt = -dx;
}

template <class A> struct Problem {
  const A *x, *t, *grad;
  A *y, *dx, *dt;
  int64_t n;
  A parameter, divisor;
  int32_t kind;
  bool each;
};

template <class A, int V> __global__ void loss_each(Problem<A> p) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * V; i < p.n; i += threads * V) {
    A x[V], t[V];
    load<A, V>(p.x + i, x);
    load<A, V>(p.t + i, t);
    UNROLL for (int j = 0; j < V; j++) x[j] = value(p.kind, p.parameter, x[j], t[j]);
    store<A, V>(p.y + i, x);
  }
}

template <class A, int V> __global__ void loss_backward(Problem<A> p) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  const A common = p.each ? A(0) : p.grad[0] / p.divisor;
  for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * V; i < p.n; i += threads * V) {
    A x[V], t[V], g[V];
    load<A, V>(p.x + i, x);
    load<A, V>(p.t + i, t);
    load_or<V>(p.each ? p.grad : nullptr, i, common, g);
    UNROLL for (int j = 0; j < V; j++) {
      A dx, dt;
      slopes(p.kind, p.parameter, x[j], t[j], dx, dt);
      x[j] = dx * g[j];
      t[j] = dt * g[j];
    }
    if (p.dx) store<A, V>(p.dx + i, x);
    if (p.dt) store<A, V>(p.dt + i, t);
  }
}

/// The sum of the losses.
template <class R> struct Total : OneByOne<Total<R>> {
  struct In { R x, t; };
  using A = R;
  const R *x, *t;
  R* y;
  R parameter, divisor;
  int32_t kind;
  template <int V> DEV void load(int64_t off, In (&v)[V]) const {
    R a[V], b[V];
    smalti::load<R, V>(x + off, a);
    smalti::load<R, V>(t + off, b);
    UNROLL for (int j = 0; j < V; j++) v[j] = {a[j], b[j]};
  }
  DEV R start() const { return 0; }
  DEV R join(R a, R b) const { return a + b; }
  template <class C> DEV void take(R& a, const In& v, int64_t, const C&) const { a += value(kind, parameter, v.x, v.t); }
  DEV void finish(R a, int64_t, int64_t) const { y[0] = a / divisor; }
};

template <class A> FoldPlan plan_total(const void* x, int32_t dtype, int64_t n, const void* pair) {
  const smalti_view in = matrix(x, dtype, 1, n), out = matrix(nullptr, dtype, 1, 1);
  FoldPlan plan;
  plan_fold(in, out, kFoldWidth<A>, plan, pair);
  return plan;
}

template <class A> int run(const Problem<A>& p, int32_t dtype, bool back, void* workspace, void* stream) {
  int rc = 0;
  constexpr int W = kRowWidth<A>;
  if (!back && !p.each) {
    Total<A> f{};
    f.x = p.x;
    f.t = p.t;
    f.y = p.y;
    f.parameter = p.parameter;
    f.divisor = p.divisor;
    f.kind = p.kind;
    return launch_fold<kFoldWidth<A>>(f, plan_total<A>(p.x, dtype, p.n, p.t), workspace, stream);
  }
  if (p.n == 0) return 0;
  const bool whole = p.n % W == 0 && aligned(p.x) && aligned(p.t) && aligned(p.y) && aligned(p.dx) && aligned(p.dt) && (!p.each || aligned(p.grad));
  auto wide = back ? loss_backward<A, W> : loss_each<A, W>;
  auto narrow = back ? loss_backward<A, 1> : loss_each<A, 1>;
  auto kernel = whole ? wide : narrow;
  LAUNCH_FLAT(rc, kernel, dim3(grid_for(p.n / (whole ? W : 1), 256)), dim3(256), stream, p);
  return rc;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_loss_workspace(const smalti_view* x) {
  DISPATCH_REAL(x->dtype, A, return fold_workspace<Total<A>>(plan_total<A>(x->ptr, x->dtype, count(*x), nullptr)));
  return -1;
}

extern "C" int32_t smalti_loss_forward(int32_t loss, const smalti_view* x, const smalti_view* target, const smalti_view* y,
                                       double parameter, double divisor, void* workspace, void* stream) {
  if (loss < 0 || loss > SMALTI_BCE_WITH_LOGITS || !contiguous(*x) || !is_like(target, *x)) return kInvalid;
  const bool each = is_like(y, *x) && x->rank > 0;
  if (!each && !is_vector(y, 1, x->dtype)) return kInvalid;
  DISPATCH_REAL(x->dtype, A, {
    const Problem<A> p{(const A*)x->ptr, (const A*)target->ptr, nullptr, (A*)y->ptr, nullptr, nullptr, count(*x), (A)parameter, (A)divisor, loss, each};
    return run(p, x->dtype, false, workspace, stream);
  });
  return 0;
}

extern "C" int32_t smalti_loss_backward(int32_t loss, const smalti_view* x, const smalti_view* target, const smalti_view* grad,
                                        const smalti_view* dx, const smalti_view* dtarget, double parameter, double divisor,
                                        void* stream) {
  if (loss < 0 || loss > SMALTI_BCE_WITH_LOGITS || !contiguous(*x) || !is_like(target, *x)) return kInvalid;
  if ((dx && !is_like(dx, *x)) || (dtarget && !is_like(dtarget, *x))) return kInvalid;
  const bool each = is_like(grad, *x) && x->rank > 0;
  if (!each && !is_vector(grad, 1, x->dtype)) return kInvalid;
  DISPATCH_REAL(x->dtype, A, {
    const Problem<A> p{(const A*)x->ptr, (const A*)target->ptr, (const A*)grad->ptr, nullptr, pointer<A>(dx), pointer<A>(dtarget),
                       count(*x), (A)parameter, (A)divisor, loss, each};
    return run(p, x->dtype, true, nullptr, stream);
  });
  return 0;
}
