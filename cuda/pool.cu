// Pooling: largest element or mean of windows, forward and backward. What src/ops/pool does on the CPU, in the same
// order of sums.
//
// A thread has an element of the result, or 16 bytes of channels where they are the innermost in memory, and
// neighbours have neighbouring ones. Backwards too: a pixel gathers from the windows that cover it, so that nothing
// is added by two threads. Windows of many pixels in channels-first images get a warp each.
#include "common/images.cuh"

namespace smalti {
namespace {

/// Indices within a range of windows or of a window's elements.
struct Span { int64_t first, count; };

/// Windows along one axis.
struct PoolAxis {
  int64_t size, windows;  // of the image; how many
  int64_t kernel, stride, padding, dilation;
  bool adaptive;

  /// First pixel of window `i` within the image, and how many of its elements lie there.
  HOST_DEV Span pixels(int64_t i) const {
    if (adaptive) {
      const int64_t start = divide(i * size, windows);
      return {start, divide((i + 1) * size + windows - 1, windows) - start};
    }
    const int64_t first = i * stride - padding, before = first < 0 ? divide(-first + dilation - 1, dilation) : 0;
    const int64_t start = first + before * dilation;
    if (start >= size) return {0, 0};
    const int64_t inside = divide(size - start + dilation - 1, dilation), left = kernel - before;
    return {left > 0 ? start : 0, left < 0 ? 0 : inside < left ? inside : left};
  }
  /// What the size of window `i` counts as: with the padding, or its elements within the image.
  HOST_DEV int64_t weight(int64_t i, bool padded) const {
    if (adaptive || !padded) return pixels(i).count;
    const int64_t room = size + 2 * padding - i * stride;
    return room < 0 ? 0 : room < kernel ? room : kernel;
  }
  /// The windows between whose ends pixel `p` lies.
  HOST_DEV Span covering(int64_t p) const {
    if (adaptive) {
      const int64_t first = divide(p * windows, size), end = divide((p + 1) * windows + size - 1, size);
      return {first, (end < windows ? end : windows) - first};
    }
    const int64_t at = p + padding, reach = at - (kernel - 1) * dilation;
    const int64_t first = reach > 0 ? divide(reach + stride - 1, stride) : 0, end = divide(at, stride) + 1;
    return {first, (end < windows ? end : windows) - first};
  }
  /// Of those, has window `i` an element there? A dilated window that misses the image altogether stores place 0.
  HOST_DEV bool holds(int64_t i, int64_t p) const {
    return adaptive || dilation == 1 || divide(p + padding - i * stride, dilation) * dilation == p + padding - i * stride;
  }
  HOST_DEV int64_t step() const { return adaptive ? 1 : dilation; }
};

struct Pool {
  PoolAxis down, across;
  int64_t divisor;
  template <class A> DEV A weight(int64_t y, int64_t x) const {
    if (divisor > 0) return (A)divisor;
    const int64_t n = down.weight(y, divisor == 0) * across.weight(x, divisor == 0);
    return (A)(n > 1 ? n : 1);
  }
};

template <class T, int V>
__global__ void __launch_bounds__(kImageBlock) max_pool(Image<const T> x, Image<T> y, Image<int32_t> at, Pixels p, Pool pool) {
  using A = Acc<T>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += threads) {
    const Pixels::At o = p.at(i);
    const Span rows = pool.down.pixels(o.y), columns = pool.across.pixels(o.x);
    const int64_t down = pool.down.step(), across = pool.across.step(), width = pool.across.size;
    const T* from = x.at(o.n, o.c * V, rows.first, columns.first);
    const int32_t start = (int32_t)(rows.first * width + columns.first);
    // the first pixel counts even if it is -infinity
    A best[V];
    int32_t where[V];
    UNROLL for (int j = 0; j < V; j++) {
      best[j] = -infinity<A>();
      where[j] = start;
    }
    for (int64_t ky = 0; ky < rows.count; ky++)
      for (int64_t kx = 0; kx < columns.count; kx++) {
        A v[V];
        fetch_wide<T, V>(from + ky * down * x.h + kx * across * x.w, v);
        const int32_t here = start + (int32_t)(ky * down * width + kx * across);
        UNROLL for (int j = 0; j < V; j++)
          if (v[j] > best[j] || v[j] != v[j]) {
            best[j] = v[j];
            where[j] = here;
          }
      }
    put_narrow<T, V>(y.at(o.n, o.c * V, o.y, o.x), best);
    put<int32_t, V>(at.at(o.n, o.c * V, o.y, o.x), where);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kImageBlock) avg_pool(Image<const T> x, Image<T> y, Pixels p, Pool pool) {
  using A = Acc<T>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += threads) {
    const Pixels::At o = p.at(i);
    const Span rows = pool.down.pixels(o.y), columns = pool.across.pixels(o.x);
    const T* from = x.at(o.n, o.c * V, rows.first, columns.first);
    A sum[V];
    UNROLL for (int j = 0; j < V; j++) sum[j] = 0;
    for (int64_t ky = 0; ky < rows.count; ky++)
      for (int64_t kx = 0; kx < columns.count; kx++) {
        A v[V];
        fetch_wide<T, V>(from + ky * x.h + kx * x.w, v);
        UNROLL for (int j = 0; j < V; j++) sum[j] += v[j];
      }
    const A weight = pool.weight<A>(o.y, o.x);
    UNROLL for (int j = 0; j < V; j++) sum[j] /= weight;
    put_narrow<T, V>(y.at(o.n, o.c * V, o.y, o.x), sum);
  }
}

/// p: the pixels of the image.
template <class T, int V>
__global__ void __launch_bounds__(kImageBlock)
    max_pool_backward(Image<const T> dy, Image<const int32_t> at, Image<T> dx, Pixels p, Pool pool) {
  using A = Acc<T>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += threads) {
    const Pixels::At o = p.at(i);
    const Span rows = pool.down.covering(o.y), columns = pool.across.covering(o.x);
    const T* grad = dy.at(o.n, o.c * V, rows.first, columns.first);
    const int32_t* places = at.at(o.n, o.c * V, rows.first, columns.first);
    const int32_t here = (int32_t)(o.y * pool.across.size + o.x);
    A sum[V];
    UNROLL for (int j = 0; j < V; j++) sum[j] = 0;
    for (int64_t ky = 0; ky < rows.count; ky++)
      ROLLED for (int64_t kx = 0; kx < columns.count; kx++) {
        int32_t where[V];
        fetch<int32_t, V>(places + ky * at.h + kx * at.w, where);
        bool any = false;
        UNROLL for (int j = 0; j < V; j++) any = any || where[j] == here;
        if (!any || !pool.down.holds(rows.first + ky, o.y) || !pool.across.holds(columns.first + kx, o.x)) continue;
        A g[V];
        fetch_wide<T, V>(grad + ky * dy.h + kx * dy.w, g);
        UNROLL for (int j = 0; j < V; j++) sum[j] += where[j] == here ? g[j] : A(0);
      }
    put_narrow<T, V>(dx.at(o.n, o.c * V, o.y, o.x), sum);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kImageBlock) avg_pool_backward(Image<const T> dy, Image<T> dx, Pixels p, Pool pool) {
  using A = Acc<T>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += threads) {
    const Pixels::At o = p.at(i);
    const Span rows = pool.down.covering(o.y), columns = pool.across.covering(o.x);
    A sum[V];
    UNROLL for (int j = 0; j < V; j++) sum[j] = 0;
    for (int64_t y = rows.first; y < rows.first + rows.count; y++)
      ROLLED for (int64_t x = columns.first; x < columns.first + columns.count; x++) {
        const A share = A(1) / pool.weight<A>(y, x);
        A g[V];
        fetch_wide<T, V>(dy.at(o.n, o.c * V, y, x), g);
        UNROLL for (int j = 0; j < V; j++) sum[j] += g[j] * share;
      }
    put_narrow<T, V>(dx.at(o.n, o.c * V, o.y, o.x), sum);
  }
}

/// Largest so far; of equal ones the first, of NaNs the last: what a walk in order finds.
template <class A> struct Best {
  A value;
  int32_t at;
  DEV void take(const Best& o) {
    const bool nan = value != value, other = o.value != o.value;
    const bool larger = nan || other ? other && (!nan || o.at > at) : o.value > value || (o.value == value && o.at < at);
    if (larger) *this = o;
  }
};

/// A warp a window of a channels-first image; `at` without memory: its mean.
template <class T>
__global__ void __launch_bounds__(kImageBlock) pool_wide(Image<const T> x, Image<T> y, Image<int32_t> at, Pixels p, Pool pool) {
  using A = Acc<T>;
  const int tid = threadIdx.x, lane = tid & 31;
  for (int64_t i = first_row<32>(tid); i < p.count; i += row_step<32>()) {
    const Pixels::At o = p.at(i);
    const Span rows = pool.down.pixels(o.y), columns = pool.across.pixels(o.x);
    const int64_t down = pool.down.step(), across = pool.across.step(), width = pool.across.size;
    const T* from = x.at(o.n, o.c, rows.first, columns.first);
    Best<A> best{-infinity<A>(), INT32_MAX};
    A sum = 0;
    ROLLED for (int64_t k = lane; k < rows.count * columns.count; k += 32) {
      const int64_t ky = divide(k, columns.count) * down, kx = (k - divide(k, columns.count) * columns.count) * across;
      const A v = widen(from[ky * x.h + kx * x.w]);
      if (at.p) best.take({v, (int32_t)((rows.first + ky) * width + columns.first + kx)});
      else sum += v;
    }
    if (at.p) {
      for (int m = 16; m > 0; m >>= 1) {
        Best<A> o;
        o.value = __shfl_xor_sync(~0u, best.value, m);
        o.at = __shfl_xor_sync(~0u, best.at, m);
        best.take(o);
      }
    } else {
      sum = warp_sum(sum) / pool.weight<A>(o.y, o.x);
    }
    if (lane != 0) continue;
    *y.at(o.n, o.c, o.y, o.x) = narrow<T>(at.p ? best.value : sum);
    if (at.p) *at.at(o.n, o.c, o.y, o.x) = best.at == INT32_MAX ? 0 : best.at;
  }
}

/// The windows from images like `x` to results like `y`.
bool pool_of(const smalti_view* x, const smalti_view* y, const smalti_pool* s, Pool& pool) {
  if (!is_images(x) || !is_images(y) || !same_planes(*x, *y) || x->dtype != y->dtype) return false;
  if (x->shape[2] * x->shape[3] > INT32_MAX || s->divisor < -1) return false;
  for (int d = 0; d < 2; d++) {
    PoolAxis& axis = d ? pool.across : pool.down;
    axis = {x->shape[2 + d], y->shape[2 + d], s->kernel[d], s->stride[d], s->padding[d], s->dilation[d], s->adaptive != 0};
    if (axis.size < 1) return false;
    if (!axis.adaptive && (axis.kernel < 1 || axis.stride < 1 || axis.dilation < 1 || axis.padding < 0)) return false;
  }
  pool.divisor = s->divisor;
  return true;
}

/// Is a window wide, and far from the next? Else neighbouring threads read neighbouring pixels anyway.
bool is_wide(const Pool& pool) {
  const PoolAxis &d = pool.down, &a = pool.across;
  if (d.windows == 0 || a.windows == 0) return false;
  const int64_t pixels = d.adaptive ? d.size / d.windows * (a.size / a.windows) : d.kernel * a.kernel;
  return pixels >= 64 && (a.adaptive ? a.size / a.windows : a.stride) >= 8;
}

template <class T> int32_t wide(const smalti_view& x, const smalti_view& y, const smalti_view* at, const Pool& pool, void* stream) {
  int rc = 0;
  const Pixels p = pixels_of(y, 1, false);
  const Image<int32_t> places = at ? image_of<int32_t>(*at) : Image<int32_t>{};
  auto kernel = pool_wide<T>;
  LAUNCH(rc, kernel, row_grid<32>(p.count), dim3(kImageBlock), 0, stream, image_of<const T>(x), image_of<T>(y), places, p, pool);
  return rc;
}

template <class T, int V>
int32_t forward(const smalti_view& x, const smalti_view& y, const smalti_view* at, const Pool& pool, bool last, void* stream) {
  int rc = 0;
  const Pixels p = pixels_of(y, V, last);
  if (at) {
    auto kernel = max_pool<T, V>;
    LAUNCH_FLAT(rc, kernel, pixel_grid(p), dim3(kImageBlock), stream, image_of<const T>(x), image_of<T>(y), image_of<int32_t>(*at), p, pool);
  } else {
    auto kernel = avg_pool<T, V>;
    LAUNCH_FLAT(rc, kernel, pixel_grid(p), dim3(kImageBlock), stream, image_of<const T>(x), image_of<T>(y), p, pool);
  }
  return rc;
}
template <class T, int V>
int32_t backward(const smalti_view& dy, const smalti_view& dx, const smalti_view* at, const Pool& pool, bool last, void* stream) {
  int rc = 0;
  const Pixels p = pixels_of(dx, V, last);
  if (at) {
    auto kernel = max_pool_backward<T, V>;
    LAUNCH_FLAT(rc, kernel, pixel_grid(p), dim3(kImageBlock), stream, image_of<const T>(dy), image_of<const int32_t>(*at), image_of<T>(dx), p, pool);
  } else {
    auto kernel = avg_pool_backward<T, V>;
    LAUNCH_FLAT(rc, kernel, pixel_grid(p), dim3(kImageBlock), stream, image_of<const T>(dy), image_of<T>(dx), p, pool);
  }
  return rc;
}

/// `x` is the image, `y` the result, or both are gradients of those; `at` may be null.
template <class T>
int32_t run(const smalti_view& x, const smalti_view& y, const smalti_view* at, const Pool& pool, bool back, void* stream) {
  constexpr int V = kRowWidth<T>;
  if (count(back ? x : y) == 0) return 0;
  const bool last = channels_last(back ? x : y);
  if (!back && !last && is_wide(pool)) return wide<T>(x, y, at, pool, stream);
  if constexpr (V > 1)
    if (in_vectors(x, V, sizeof(T)) && in_vectors(y, V, sizeof(T)) && (!at || in_vectors(*at, V, 4)))
      return back ? backward<T, V>(y, x, at, pool, true, stream) : forward<T, V>(x, y, at, pool, true, stream);
  return back ? backward<T, 1>(y, x, at, pool, last, stream) : forward<T, 1>(x, y, at, pool, last, stream);
}

bool is_dense(const smalti_pool* s) { return s->adaptive || (s->dilation[0] == 1 && s->dilation[1] == 1); }
bool are_places(const smalti_view* at, const smalti_view* y) {
  return at && at->dtype == SMALTI_I32 && is_images(y) && same_shape(*at, *y);
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_max_pool_forward(const smalti_view* x, const smalti_view* y, const smalti_view* at,
                                           const smalti_pool* pool, void* stream) {
  Pool windows;
  if (!are_places(at, y) || !pool_of(x, y, pool, windows)) return kInvalid;
  DISPATCH_FLOAT(x->dtype, T, return run<T>(*x, *y, at, windows, false, stream));
  return 0;
}

extern "C" int32_t smalti_max_pool_backward(const smalti_view* dy, const smalti_view* at, const smalti_view* dx,
                                            const smalti_pool* pool, void* stream) {
  Pool windows;
  if (!are_places(at, dy) || !pool_of(dx, dy, pool, windows)) return kInvalid;
  DISPATCH_FLOAT(dx->dtype, T, return run<T>(*dx, *dy, at, windows, true, stream));
  return 0;
}

extern "C" int32_t smalti_avg_pool_forward(const smalti_view* x, const smalti_view* y, const smalti_pool* pool, void* stream) {
  Pool windows;
  if (!is_dense(pool) || !pool_of(x, y, pool, windows)) return kInvalid;
  DISPATCH_FLOAT(x->dtype, T, return run<T>(*x, *y, nullptr, windows, false, stream));
  return 0;
}

extern "C" int32_t smalti_avg_pool_backward(const smalti_view* dy, const smalti_view* dx, const smalti_pool* pool, void* stream) {
  Pool windows;
  if (!is_dense(pool) || !pool_of(dx, dy, pool, windows)) return kInvalid;
  DISPATCH_FLOAT(dx->dtype, T, return run<T>(*dx, *dy, nullptr, windows, true, stream));
  return 0;
}
