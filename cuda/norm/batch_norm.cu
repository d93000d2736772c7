// Batch norm, and the forward that it shares with group norm. The statistics are variances of smalti_reduce.
#include "channels.cuh"

namespace smalti {
namespace {

/// (x - mean) * (rstd * weight) + bias
template <class T> struct Normalise {
  using A = Acc<T>;
  const T* x;
  const A *mean, *rstd, *weight, *bias;
  T* y;
  int64_t groups, size;  // 0: statistics of channels; else of groups of `size` channels of images
  A m[kRowWidth<T>], s[kRowWidth<T>], w[kRowWidth<T>], b[kRowWidth<T>];

  template <int V> DEV void prepare(int64_t c) {
    A p[V], q[V];
    load_or<V>(weight, c, A(1), p);
    load_or<V>(bias, c, A(0), q);
    UNROLL for (int j = 0; j < V; j++) {
      w[j] = p[j];
      b[j] = q[j];
    }
  }
  template <int V> DEV void image(int64_t i, int64_t c) {
    UNROLL for (int j = 0; j < V; j++) {
      const int64_t at = groups ? i * groups + divide(c + j, size) : c + j;
      m[j] = mean[at];
      s[j] = rstd[at] * w[j];
    }
  }
  template <int V, bool ONE> DEV void at(int64_t off) const {
    A v[V];
    load<T, V>(x + off, v);
    UNROLL for (int j = 0; j < V; j++) v[j] = fma_of(v[j] - m[ONE ? 0 : j], s[ONE ? 0 : j], b[ONE ? 0 : j]);
    store<T, V>(y + off, v);
  }
};

/// dx = weight * rstd * (dy - dbias / n - (x - mean) * rstd * dweight / n), or without the two means.
template <class T> struct Slope {
  using A = Acc<T>;
  const T *x, *dy;
  const A *mean, *rstd, *weight, *dots, *sums;
  T* dx;
  A share;
  A m[kRowWidth<T>], a[kRowWidth<T>], b[kRowWidth<T>], c[kRowWidth<T>];

  template <int V> DEV void prepare(int64_t k) {
    A w[V];
    load_or<V>(weight, k, A(1), w);
    UNROLL for (int j = 0; j < V; j++) {
      m[j] = mean[k + j];
      a[j] = rstd[k + j] * w[j];
      b[j] = sums[k + j] * share;
      c[j] = dots[k + j] * rstd[k + j] * share;
    }
  }
  template <int V> DEV void image(int64_t, int64_t) {}
  template <int V, bool ONE> DEV void at(int64_t off) const {
    A v[V], g[V];
    load<T, V>(x + off, v);
    load<T, V>(dy + off, g);
    UNROLL for (int j = 0; j < V; j++) {
      const int k = ONE ? 0 : j;
      v[j] = a[k] * (g[j] - b[k] - c[k] * (v[j] - m[k]));
    }
    store<T, V>(dx + off, v);
  }
};

struct Moments {
  int64_t n;
  double eps, momentum, unbiased;
};
template <class A>
__global__ void batch_norm_statistics(const A* mean, const A* var, A* rstd, const A* old_mean, const A* old_var, A* new_mean,
                                      A* new_var, Moments p) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += threads) {
    rstd[i] = A(1) / sqrt_of(var[i] + (A)p.eps);
    if (!new_mean) continue;
    new_mean[i] = old_mean[i] * (A)(1 - p.momentum) + mean[i] * (A)p.momentum;
    new_var[i] = old_var[i] * (A)(1 - p.momentum) + var[i] * (A)p.unbiased * (A)p.momentum;
  }
}

template <class A>
int statistics(const smalti_view& mean, const smalti_view& var, const smalti_view& rstd, const smalti_view* old_mean,
               const smalti_view* old_var, const smalti_view* new_mean, const smalti_view* new_var, const Moments& p, void* stream) {
  int rc = 0;
  auto kernel = batch_norm_statistics<A>;
  LAUNCH_FLAT(rc, kernel, dim3(grid_for(p.n, 256)), dim3(256), stream, (const A*)mean.ptr, (const A*)var.ptr, (A*)rstd.ptr,
              pointer<const A>(old_mean), pointer<const A>(old_var), pointer<A>(new_mean), pointer<A>(new_var), p);
  return rc;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_channel_norm_forward(const smalti_view* x, const smalti_view* mean, const smalti_view* rstd,
                                               const smalti_view* weight, const smalti_view* bias, const smalti_view* y,
                                               int64_t groups, void* stream) {
  Channels p;
  if (!channels_of(*x, p) || !is_like(y, *x) || groups < 0 || (groups && p.channels % groups)) return kInvalid;
  const int64_t numbers = groups ? x->shape[0] * groups : p.channels;
  const int32_t wide = computed_in(x->dtype);
  if (!is_vector(mean, numbers, wide) || !is_vector(rstd, numbers, wide)) return kInvalid;
  if (!is_vector_or_null(weight, p.channels, wide) || !is_vector_or_null(bias, p.channels, wide)) return kInvalid;
  const bool whole = aligned(x->ptr) && aligned(y->ptr) && aligned(pointer<void>(weight)) && aligned(pointer<void>(bias));
  DISPATCH_FLOAT(x->dtype, T, {
    using A = Acc<T>;
    Normalise<T> f{};
    f.x = (const T*)x->ptr;
    f.mean = (const A*)mean->ptr;
    f.rstd = (const A*)rstd->ptr;
    f.weight = pointer<const A>(weight);
    f.bias = pointer<const A>(bias);
    f.y = (T*)y->ptr;
    f.groups = groups;
    f.size = groups ? p.channels / groups : 1;
    return launch_channels<kRowWidth<T>>(f, p, whole, stream);
  });
  return 0;
}

extern "C" int32_t smalti_batch_norm_statistics(const smalti_view* mean, const smalti_view* var, const smalti_view* rstd,
                                                const smalti_view* running_mean, const smalti_view* running_var,
                                                const smalti_view* new_mean, const smalti_view* new_var, double eps,
                                                double momentum, double unbiased, void* stream) {
  const int64_t n = count(*var);
  const smalti_view* all[] = {mean, var, rstd, running_mean, running_var, new_mean, new_var};
  for (int i = 0; i < 7; i++)
    if (i < 3 ? !is_vector(all[i], n, var->dtype) : !is_vector_or_null(all[i], n, var->dtype) || !all[i] != !new_mean) return kInvalid;
  const Moments p{n, eps, momentum, unbiased};
  DISPATCH_REAL(var->dtype, A, return statistics<A>(*mean, *var, *rstd, running_mean, running_var, new_mean, new_var, p, stream));
  return 0;
}

extern "C" int64_t smalti_batch_norm_backward_workspace(const smalti_view* x) {
  Channels p;
  FoldPlan plan;
  if (!channels_of(*x, p) || x->dtype > SMALTI_F64) return -1;
  // Where only dy is not aligned, elements are read one by one, in no more chunks.
  DISPATCH_FLOAT(x->dtype, T, return plan_channels<T>(*x, false, plan, nullptr) ? fold_workspace<ChannelSums<T>>(plan) : -1);
  return -1;
}

extern "C" int32_t smalti_batch_norm_backward(const smalti_view* x, const smalti_view* dy, const smalti_view* mean,
                                              const smalti_view* rstd, const smalti_view* weight, const smalti_view* dx,
                                              const smalti_view* dweight, const smalti_view* dbias, int32_t batch,
                                              void* workspace, void* stream) {
  Channels p;
  if (!channels_of(*x, p) || !is_like(dy, *x) || (dx && !is_like(dx, *x))) return kInvalid;
  const int32_t wide = computed_in(x->dtype);
  for (const smalti_view* v : {mean, rstd, dweight, dbias})
    if (!is_vector(v, p.channels, wide)) return kInvalid;
  if (!is_vector_or_null(weight, p.channels, wide)) return kInvalid;
  const bool whole = aligned(x->ptr) && aligned(dy->ptr) && aligned(pointer<void>(dx)) && aligned(pointer<void>(weight));
  DISPATCH_FLOAT(x->dtype, T, {
    using A = Acc<T>;
    FoldPlan plan;
    plan_channels<T>(*x, false, plan, dy->ptr);
    ChannelSums<T> sums{};
    sums.x = (const T*)x->ptr;
    sums.dy = (const T*)dy->ptr;
    sums.mean = (const A*)mean->ptr;
    sums.rstd = (const A*)rstd->ptr;
    sums.dots = (A*)dweight->ptr;
    sums.sums = (A*)dbias->ptr;
    sums.size = 1;
    const int rc = launch_fold<kFoldWidth<T>>(sums, plan, workspace, stream);
    if (rc || !dx) return rc;
    Slope<T> f{};
    f.x = sums.x;
    f.dy = sums.dy;
    f.mean = sums.mean;
    f.rstd = sums.rstd;
    f.weight = pointer<const A>(weight);
    f.dots = sums.dots;
    f.sums = sums.sums;
    f.dx = (T*)dx->ptr;
    f.share = batch && plan.n ? A(1) / (A)plan.n : A(0);
    return launch_channels<kRowWidth<T>>(f, p, whole, stream);
  });
  return 0;
}
