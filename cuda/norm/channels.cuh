// The norms of channels: memory [images, positions, channels, area], where positions or area is 1.
#pragma once
#include "../common/fold.cuh"

namespace smalti {

/// Which channel an access falls on. Channels-last: an access has V channels, and a thread has the same ones of
/// all rows, so that their parameters are read once. Channels-first: V elements of one channel.
struct Channels {
  int64_t rows;  // images * positions (channels-last), else planes: images * channels
  int64_t positions, channels, area;
  bool last;
};

inline bool channels_of(const smalti_view& x, Channels& c) {
  if (x.rank != 4 || !contiguous(x) || (x.shape[1] != 1 && x.shape[3] != 1)) return false;
  c.positions = x.shape[1];
  c.channels = x.shape[2];
  c.area = x.shape[3];
  c.last = c.area == 1;
  c.rows = c.last ? x.shape[0] * x.shape[1] : x.shape[0] * x.shape[2];
  return true;
}

/// `f.prepare<V>(channel)` and `f.image<V>(image, channel)` when either changes, and `f.at<V, ONE>(offset)` for all
/// accesses. Channels-last, all are for V channels from `channel` on; else (ONE) the first two are for one.
template <class F, int V, bool LAST> __global__ void __launch_bounds__(256) each_channel(F f, Channels p) {
  const int64_t id = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, threads = (int64_t)gridDim.x * blockDim.x;
  if (LAST) {
    const int64_t columns = p.channels / V, step = threads / columns;  // at least one, by the launch
    const int64_t first = divide(id, columns), c = (id - first * columns) * V;
    if (first >= step) return;
    f.template prepare<V>(c);
    int64_t image = -1;
    for (int64_t row = first; row < p.rows; row += step) {
      const int64_t i = divide(row, p.positions);
      if (i != image) f.template image<V>(i, c);
      image = i;
      f.template at<V, false>(row * p.channels + c);
    }
  } else {
    const int64_t width = p.area / V, total = p.rows * width;
    int64_t plane = -1;
    for (int64_t i = id; i < total; i += threads) {
      const int64_t at = divide(i, width);
      if (at != plane) {
        const int64_t image = divide(at, p.channels), c = at - image * p.channels;
        f.template prepare<1>(c);
        f.template image<1>(image, c);
      }
      plane = at;
      f.template at<V, true>(i * V);
    }
  }
}

template <int W, class F> inline int launch_channels(const F& f, const Channels& p, bool whole, void* stream) {
  int rc = 0;
  const int64_t total = p.rows * (p.last ? p.channels : p.area);
  if (total == 0) return 0;
  const bool wide = whole && (p.last ? p.channels : p.area) % W == 0;
  unsigned blocks = grid_for(total / (wide ? W : 1), 256);
  if (p.last) {
    const int64_t least = (p.channels / (wide ? W : 1) + 255) / 256;  // threads for a whole row
    if (least > blocks) blocks = (unsigned)least;
    if (wide) {
      auto kernel = each_channel<F, W, true>;
      LAUNCH_FLAT(rc, kernel, dim3(blocks), dim3(256), stream, f, p);
    } else {
      auto kernel = each_channel<F, 1, true>;
      LAUNCH_FLAT(rc, kernel, dim3(blocks), dim3(256), stream, f, p);
    }
  } else if (wide) {
    auto kernel = each_channel<F, W, false>;
    LAUNCH_FLAT(rc, kernel, dim3(blocks), dim3(256), stream, f, p);
  } else {
    auto kernel = each_channel<F, 1, false>;
    LAUNCH_FLAT(rc, kernel, dim3(blocks), dim3(256), stream, f, p);
  }
  return rc;
}

/// Sums of dy * (x - mean) and of dy over what is not kept: for each channel, or each channel of each image.
/// `size`: channels that share a mean, which is that of result / size.
template <class T> struct ChannelSums {
  using R = Acc<T>;
  struct In { R x, g; };
  struct A { R dot, sum; };
  struct Context { R mean; };
  const T *x, *dy;
  const R *mean, *rstd;
  R *dots, *sums;  // dots: times rstd
  int64_t size;
  DEV Context context(int64_t r) const { return {mean[r / size]}; }
  template <int V> DEV void load(int64_t off, In (&v)[V]) const {
    R a[V], b[V];
    smalti::load<T, V>(x + off, a);
    smalti::load<T, V>(dy + off, b);
    UNROLL for (int j = 0; j < V; j++) v[j] = {a[j], b[j]};
  }
  DEV A start() const { return {R(0), R(0)}; }
  DEV A settle(const A& a) const { return a; }
  DEV A join(const A& a, const A& b) const { return {a.dot + b.dot, a.sum + b.sum}; }
  DEV void take(A& a, const In& v, const Context& c) const {
    a.dot = fma_of(v.g, v.x - c.mean, a.dot);
    a.sum += v.g;
  }
  template <int V> DEV void row(A& a, const In (&v)[V], int64_t, const Context& c) const {
    UNROLL for (int j = 0; j < V; j++) take(a, v[j], c);
  }
  template <int V> DEV void column(A (&a)[V], const In (&v)[V], int64_t, const Context (&c)[V]) const {
    UNROLL for (int j = 0; j < V; j++) take(a[j], v[j], c[j]);
  }
  DEV void finish(const A& a, int64_t, int64_t r) const {
    dots[r] = a.dot * rstd[r / size];
    sums[r] = a.sum;
  }
};

/// The fold of [images, positions, channels, area] to channels, or to channels of images.
template <class T> inline bool plan_channels(const smalti_view& x, bool images, FoldPlan& plan, const void* pair) {
  smalti_view y = x;
  if (!images) y.shape[0] = 1;
  y.shape[1] = y.shape[3] = 1;
  return plan_fold(x, y, kFoldWidth<T>, plan, pair);
}

}  // namespace smalti
