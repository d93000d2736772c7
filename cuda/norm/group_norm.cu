// Backward of group norm: sums for each channel of each image, their means over groups, then dx. The forward is
// smalti_channel_norm_forward.
#include "channels.cuh"

namespace smalti {
namespace {

/// What the groups of an image share: mean(dy * weight) and mean(dy * weight * xhat).
template <class A> struct Means {
  const A *dots, *sums, *weight;
  A *mean_g, *slope;
  int64_t images, channels, groups, elements;
};
template <class A> __global__ void group_means(Means<A> p) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x, size = p.channels / p.groups;
  const A share = A(1) / (A)p.elements;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.images * p.groups; i += threads) {
    const int64_t first = i % p.groups * size;
    A sum = 0, dot = 0;
    for (int64_t c = 0; c < size; c++) {
      const A w = p.weight ? p.weight[first + c] : A(1);
      sum += p.sums[i * size + c] * w;
      dot += p.dots[i * size + c] * w;
    }
    p.mean_g[i] = sum * share;
    p.slope[i] = dot * share;
  }
}

/// dweight and dbias: the images' shares, in order.
template <class A> __global__ void group_parameters(const A* dots, const A* sums, A* dweight, A* dbias, int64_t images, int64_t channels) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t c = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; c < channels; c += threads) {
    A dw = 0, db = 0;
    for (int64_t i = 0; i < images; i++) {
      dw += dots[i * channels + c];
      db += sums[i * channels + c];
    }
    dweight[c] = dw;
    dbias[c] = db;
  }
}

/// dx = rstd * (dy * weight - mean_g - (x - mean) * rstd * slope)
template <class T> struct Slope {
  using A = Acc<T>;
  const T *x, *dy;
  const A *mean, *rstd, *weight, *mean_g, *slope;
  T* dx;
  int64_t groups, size;
  A m[kRowWidth<T>], r[kRowWidth<T>], w[kRowWidth<T>], b[kRowWidth<T>], k[kRowWidth<T>];

  template <int V> DEV void prepare(int64_t c) {
    A p[V];
    load_or<V>(weight, c, A(1), p);
    UNROLL for (int j = 0; j < V; j++) w[j] = p[j];
  }
  template <int V> DEV void image(int64_t i, int64_t c) {
    UNROLL for (int j = 0; j < V; j++) {
      const int64_t at = i * groups + divide(c + j, size);
      m[j] = mean[at];
      r[j] = rstd[at];
      b[j] = mean_g[at];
      k[j] = slope[at] * r[j];
    }
  }
  template <int V, bool ONE> DEV void at(int64_t off) const {
    A v[V], g[V];
    load<T, V>(x + off, v);
    load<T, V>(dy + off, g);
    UNROLL for (int j = 0; j < V; j++) {
      const int c = ONE ? 0 : j;
      v[j] = r[c] * (g[j] * w[c] - b[c] - (v[j] - m[c]) * k[c]);
    }
    store<T, V>(dx + off, v);
  }
};

template <class T> int64_t partial_bytes(const smalti_view& x) {
  FoldPlan plan;
  if (!plan_channels<T>(x, true, plan, nullptr)) return -1;
  return (fold_workspace<ChannelSums<T>>(plan) + 15) / 16 * 16;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_group_norm_backward_workspace(const smalti_view* x, int64_t groups) {
  Channels p;
  if (!channels_of(*x, p) || x->dtype > SMALTI_F64 || groups < 1) return -1;
  const int64_t size = x->dtype == SMALTI_F64 ? 8 : 4, numbers = 2 * x->shape[0] * (p.channels + groups);
  DISPATCH_FLOAT(x->dtype, T, return partial_bytes<T>(*x) + numbers * size);
  return -1;
}

extern "C" int32_t smalti_group_norm_backward(const smalti_view* x, const smalti_view* dy, const smalti_view* mean,
                                              const smalti_view* rstd, const smalti_view* weight, const smalti_view* dx,
                                              const smalti_view* dweight, const smalti_view* dbias, int64_t groups,
                                              void* workspace, void* stream) {
  Channels p;
  if (!channels_of(*x, p) || !is_like(dy, *x) || !is_like(dx, *x) || groups < 1 || p.channels % groups) return kInvalid;
  const int32_t wide = computed_in(x->dtype);
  const int64_t images = x->shape[0];
  if (!is_vector(mean, images * groups, wide) || !is_vector(rstd, images * groups, wide)) return kInvalid;
  if (!is_vector(dweight, p.channels, wide) || !is_vector(dbias, p.channels, wide) || !is_vector_or_null(weight, p.channels, wide)) return kInvalid;
  const bool whole = aligned(x->ptr) && aligned(dy->ptr) && aligned(dx->ptr) && aligned(pointer<void>(weight));
  if (p.channels == 0) return 0;
  DISPATCH_FLOAT(x->dtype, T, {
    using A = Acc<T>;
    if (!workspace && images) return kInvalid;
    const int64_t size = p.channels / groups;
    A* numbers = (A*)((char*)workspace + partial_bytes<T>(*x));
    ChannelSums<T> sums{};
    sums.x = (const T*)x->ptr;
    sums.dy = (const T*)dy->ptr;
    sums.mean = (const A*)mean->ptr;
    sums.rstd = (const A*)rstd->ptr;
    sums.dots = numbers;
    sums.sums = numbers + images * p.channels;
    sums.size = size;
    A* means = numbers + 2 * images * p.channels;
    FoldPlan plan;
    plan_channels<T>(*x, true, plan, dy->ptr);
    int rc = launch_fold<kFoldWidth<T>>(sums, plan, workspace, stream);
    if (rc) return rc;
    auto parameters = group_parameters<A>;
    LAUNCH_FLAT(rc, parameters, dim3(grid_for(p.channels, 128)), dim3(128), stream, sums.dots, sums.sums, (A*)dweight->ptr,
                (A*)dbias->ptr, images, p.channels);
    if (rc || images == 0) return rc;
    const Means<A> each{sums.dots, sums.sums, pointer<const A>(weight), means, means + images * groups, images, p.channels, groups,
                        size * p.positions * p.area};
    auto kernel = group_means<A>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(images * groups, 128)), dim3(128), stream, each);
    if (rc) return rc;
    Slope<T> f{};
    f.x = sums.x;
    f.dy = sums.dy;
    f.mean = sums.mean;
    f.rstd = sums.rstd;
    f.weight = each.weight;
    f.mean_g = each.mean_g;
    f.slope = each.slope;
    f.dx = (T*)dx->ptr;
    f.groups = groups;
    f.size = size;
    return launch_channels<kRowWidth<T>>(f, p, whole, stream);
  });
  return 0;
}
