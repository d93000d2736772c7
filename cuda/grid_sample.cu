// Images sampled at given places: what src/ops/grid_sample.rs does on the CPU. Places and weights are computed in f64
// and without contraction, as there, so that every sample takes the same pixels. Channels-first, a thread finds the
// pixels of a sample once for eight channels; channels-last, for 16 bytes of them.
//
// The gradient of the image adds samples into pixels, in any pattern. To be the same from run to run without atomics
// it is turned round: a kernel lists the pixel of every tap, the list is argsorted by pixel (stable: a pixel's taps
// stay in the order of the samples, which is the CPU's), and each pixel then gathers its own. That costs a sort of
// 4 H' W' places an image (16 for bicubic), shared by all channels, and 16 or 20 bytes a tap beside the sort's
// workspace. A pixel that all samples fall on is summed by one thread for each channel.
#include "common/exact.cuh"
#include "common/images.cuh"

namespace smalti {
namespace {

/// Channels that a thread takes one after another where they are apart.
constexpr int64_t kGroup = 8;

/// One axis of an image.
struct GridAxis {
  int64_t size;
  int32_t padding, corners;
};

struct Mirrored { double x, slope; };
/// `x` mirrored at `low` and at `low + span`. A call: its remainders, inlined for each tap, would be most of the file.
APART Mirrored reflect(double x, double low, double span) {
  if (span == 0.0) return {0.0, 1.0};
  const double from = x < low ? low - x : x - low, sign = x < low ? -1.0 : 1.0, rest = fmod(from, span);
  const bool even = fmod(floor(from / span), 2.0) == 0.0;
  return {even ? rest + low : span - rest + low, even ? sign : -sign};
}

/// Brings a place into the image as the padding demands.
DEV double pad(const GridAxis& a, double x, double& slope) {
  const double last = (double)(a.size - 1);
  slope = 1.0;
  if (a.padding == SMALTI_PAD_ZEROS) return x;
  if (a.padding == SMALTI_PAD_REFLECTION) {
    const Mirrored m = a.corners ? reflect(x, 0.0, last) : reflect(x, -0.5, last + 1.0);
    x = m.x;
    slope = m.slope;
  }
  if (x > 0.0 && x < last) return x;
  slope = 0.0;
  return x >= last && x > 0.0 ? last : 0.0;  // NaN goes to the first pixel
}

/// Weight of a pixel |x| away from the sample and its derivative (cubic convolution, coefficient -0.75).
DEV double keys(double x, bool far, double& slope) {
  const double a = -0.75;
  slope = far ? ((3.0 * x - 10.0) * x + 8.0) * a : (3.0 * (a + 2.0) * x - 2.0 * (a + 3.0)) * x;
  return far ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
}

/// The pixels along one axis that a sample takes (-1: none), their weights and the weights' derivatives.
template <int K> struct Taps {
  int32_t at[K];
  double weight[K], slope[K];
  int kept;

  DEV void set(const GridAxis& a, int k, double x, double w, double d) {
    at[k] = x >= 0.0 && x < (double)a.size ? (int32_t)x : -1;
    weight[k] = w;
    slope[k] = d;
  }
  /// K = 2: linear or nearest; 4: cubic.
  DEV void find(const GridAxis& a, double x, int32_t mode) {
    const double n = (double)a.size;
    const double unit = a.corners ? (n - 1.0) / 2.0 : n / 2.0;
    x = a.corners ? mul_rn((x + 1.0) / 2.0, n - 1.0) : (mul_rn(x + 1.0, n) - 1.0) / 2.0;
    double turn;
    kept = K;
    if constexpr (K == 2) {
      x = pad(a, x, turn);
      if (mode == SMALTI_NEAREST) {
        set(a, 0, rint(x), 1.0, 0.0);
        set(a, 1, -1.0, 0.0, 0.0);
        kept = 1;
        return;
      }
      const double low = floor(x), t = x - low, d = unit * turn;
      set(a, 0, low, 1.0 - t, -d);
      set(a, 1, low + 1.0, t, d);
    } else {
      // here each pixel is padded on its own
      const double low = floor(x), t = x - low;
      UNROLL for (int k = 0; k < 4; k++) {
        double d;
        const double away = k < 2 ? t + (1.0 - k) : k - 1.0 - t, w = keys(away, k == 0 || k == 3, d);
        set(a, k, pad(a, low - 1.0 + k, turn), w, (k < 2 ? d : -d) * unit);
      }
    }
  }
};

struct Sampler {
  GridAxis down, across;
  int32_t mode;
  template <class A, int K> DEV void find(const Image<const A>& grid, int64_t n, int64_t y, int64_t x, Taps<K>& rows, Taps<K>& columns) const {
    const A* place = grid.at(n, y, x, 0);
    columns.find(across, (double)place[0], mode);
    rows.find(down, (double)place[grid.w], mode);
  }
};

/// p: groups of `group` channels of the result.
template <class T, int K, int V>
__global__ void __launch_bounds__(kImageBlock)
    sample(Image<const T> x, Image<const Acc<T>> grid, Image<T> y, Pixels p, int64_t channels, int64_t group, Sampler s) {
  using A = Acc<T>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += threads) {
    const Pixels::At o = p.at(i);
    Taps<K> rows, columns;
    s.find<A>(grid, o.n, o.y, o.x, rows, columns);
    A across[K], down[K];
    UNROLL for (int a = 0; a < K; a++) {
      across[a] = (A)columns.weight[a];
      down[a] = (A)rows.weight[a];
    }
    const int64_t first = o.c * group, end = first + group < channels ? first + group : channels;
    auto channels_at = [&](int64_t c) {
      const T* from = x.at(o.n, c);
      A sum[V];
      UNROLL for (int j = 0; j < V; j++) sum[j] = 0;
      UNROLL for (int a = 0; a < K; a++) {
        if (rows.at[a] < 0) continue;
        UNROLL for (int b = 0; b < K; b++) {
          if (columns.at[b] < 0) continue;
          A v[V];
          fetch_wide<T, V>(from + rows.at[a] * x.h + columns.at[b] * x.w, v);
          UNROLL for (int j = 0; j < V; j++) sum[j] += v[j] * (across[b] * down[a]);
        }
      }
      put_narrow<T, V>(y.at(o.n, c, o.y, o.x), sum);
    };
    // a loop of one round would still have its offsets computed ahead, into registers that are not there
    if constexpr (V > 1) channels_at(first);
    else { ROLLED for (int64_t c = first; c < end; c++) channels_at(c); }
  }
}

/// A thread a sample, or (WARP) a warp, whose lanes share the channels. p: the samples.
template <class T, int K, bool WARP>
__global__ void __launch_bounds__(kImageBlock) sample_grad_grid(Image<const T> x, Image<const Acc<T>> grid, Image<const T> dy,
                                                                Image<Acc<T>> dgrid, Pixels p, int64_t channels, Sampler s) {
  using A = Acc<T>;
  constexpr int lanes = WARP ? 32 : 1;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x / lanes, id = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (int64_t i = id / lanes; i < p.count; i += threads) {
    const Pixels::At o = p.at(i);
    Taps<K> rows, columns;
    s.find<A>(grid, o.n, o.y, o.x, rows, columns);
    A sum[2] = {0, 0};
    ROLLED for (int64_t c = WARP ? id % lanes : 0; c < channels; c += lanes) {
      const T* from = x.at(o.n, c);
      const A g = widen(*dy.at(o.n, c, o.y, o.x));
      UNROLL for (int a = 0; a < K; a++) {
        if (rows.at[a] < 0) continue;
        A slope = 0, value = 0;
        UNROLL for (int b = 0; b < K; b++) {
          if (columns.at[b] < 0) continue;
          const A v = widen(from[rows.at[a] * x.h + columns.at[b] * x.w]);
          slope += v * (A)columns.slope[b];
          value += v * (A)columns.weight[b];
        }
        sum[0] += g * slope * (A)rows.weight[a];
        sum[1] += g * value * (A)rows.slope[a];
      }
    }
    if constexpr (WARP) {
      sum[0] = warp_sum(sum[0]);
      sum[1] = warp_sum(sum[1]);
      if (id % lanes != 0) continue;
    }
    A* to = dgrid.at(o.n, o.y, o.x, 0);
    to[0] = sum[0];
    to[dgrid.w] = sum[1];
  }
}

/// Places and weights of all samples' taps, row by row.
template <class A, int K>
__global__ void __launch_bounds__(kImageBlock) sample_taps(Image<const A> grid, Pixels p, Sampler s, int32_t* places, A* weights) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  const int32_t outside = (int32_t)(s.down.size * s.across.size);
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += threads) {
    const Pixels::At o = p.at(i);
    Taps<K> rows, columns;
    s.find<A>(grid, o.n, o.y, o.x, rows, columns);
    const int64_t kept = rows.kept;
    UNROLL for (int a = 0; a < K; a++) {
      UNROLL for (int b = 0; b < K; b++) {
        if (a >= kept || b >= kept) continue;
        const int64_t to = (i * kept + a) * kept + b;
        const bool inside = rows.at[a] >= 0 && columns.at[b] >= 0;
        places[to] = inside ? (int32_t)(rows.at[a] * s.across.size + columns.at[b]) : outside;
        weights[to] = (A)(columns.weight[b] * rows.weight[a]);
      }
    }
  }
}

/// Where the taps of each pixel start in the sorted list.
struct Sorted {
  const int32_t* places;
  const int64_t* order;
  int32_t* starts;
  int64_t images, taps, pixels;  // an image
};
__global__ void __launch_bounds__(kImageBlock) sample_starts(Sorted s) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x, all = s.images * (s.pixels + 1);
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += threads) {
    const int64_t n = divide(i, s.pixels + 1), pixel = i - n * (s.pixels + 1);
    const int32_t* places = s.places + n * s.taps;
    const int64_t* order = s.order + n * s.taps;
    int64_t low = 0, high = s.taps;
    while (low < high) {
      const int64_t mid = (low + high) / 2;
      if (places[order[mid]] < pixel) low = mid + 1;
      else high = mid;
    }
    s.starts[i] = (int32_t)low;
  }
}

/// p: the pixels of the image; `each`: taps of a sample.
template <class T, int V>
__global__ void __launch_bounds__(kImageBlock)
    sample_grad_input(Image<const T> dy, Image<T> dx, Pixels p, Sorted s, const Acc<T>* weights, int64_t width, int64_t each) {
  using A = Acc<T>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += threads) {
    const Pixels::At o = p.at(i);
    const int32_t* starts = s.starts + o.n * (s.pixels + 1) + o.y * p.width + o.x;
    const int64_t end = starts[1];
    A sum[V];
    UNROLL for (int j = 0; j < V; j++) sum[j] = 0;
    for (int64_t k = starts[0]; k < end; k++) {
      const int64_t tap = s.order[o.n * s.taps + k], point = divide(tap, each), y = divide(point, width);
      const A w = weights[o.n * s.taps + tap];
      A g[V];
      fetch_wide<T, V>(dy.at(o.n, o.c * V, y, point - y * width), g);
      UNROLL for (int j = 0; j < V; j++) sum[j] += g[j] * w;
    }
    put_narrow<T, V>(dx.at(o.n, o.c * V, o.y, o.x), sum);
  }
}

// ---- launchers ----

/// [N, H', W', 2] as samples.
Pixels samples_of(const smalti_view& grid) {
  Pixels p;
  p.channels = 1;
  p.height = grid.shape[1];
  p.width = grid.shape[2];
  p.count = grid.shape[0] * p.height * p.width;
  p.last = false;
  return p;
}
Sampler sampler_of(int64_t height, int64_t width, const smalti_grid& o) {
  return {{height, o.padding, o.align_corners}, {width, o.padding, o.align_corners}, o.mode};
}
bool is_grid(const smalti_view* grid, const smalti_grid* o, int32_t dtype) {
  const bool mode = o->mode == SMALTI_NEAREST || o->mode == SMALTI_LINEAR || o->mode == SMALTI_CUBIC;
  return mode && o->padding >= SMALTI_PAD_ZEROS && o->padding <= SMALTI_PAD_REFLECTION && grid->rank == 4 &&
         grid->shape[3] == 2 && grid->dtype == computed_in(dtype) && grid->shape[1] * grid->shape[2] <= INT32_MAX / 16;
}
/// The image, the places, and the samples [N, C, H', W'].
bool is_sampling(const smalti_view* x, const smalti_view* grid, const smalti_view* y, const smalti_grid* o) {
  return is_images(x) && is_images(y) && x->dtype == y->dtype && same_planes(*x, *y) && is_grid(grid, o, x->dtype) &&
         grid->shape[0] == y->shape[0] && grid->shape[1] == y->shape[2] && grid->shape[2] == y->shape[3] &&
         x->shape[2] > 0 && x->shape[3] > 0 && x->shape[2] * x->shape[3] < INT32_MAX;
}

template <class T, int K, int V>
int forward(const smalti_view& x, const smalti_view& grid, const smalti_view& y, const Sampler& s, bool last, void* stream) {
  int rc = 0;
  const int64_t channels = y.shape[1], group = last ? V : kGroup;
  Pixels p = pixels_of(y, 1, last);
  p.channels = (channels + group - 1) / group;
  p.count = y.shape[0] * p.channels * p.height * p.width;
  auto kernel = sample<T, K, V>;
  LAUNCH_FLAT(rc, kernel, pixel_grid(p), dim3(kImageBlock), stream, image_of<const T>(x), image_of<const Acc<T>>(grid), image_of<T>(y), p,
              channels, group, s);
  return rc;
}
template <class T, int K> int forward(const smalti_view& x, const smalti_view& grid, const smalti_view& y, const Sampler& s, void* stream) {
  constexpr int V = kRowWidth<T>;
  if (count(y) == 0) return 0;
  if constexpr (V > 1 && K == 2)  // bicubic sampling is seldom asked for: fewer kernels
    if (in_vectors(x, V, sizeof(T)) && in_vectors(y, V, sizeof(T))) return forward<T, K, V>(x, grid, y, s, true, stream);
  return forward<T, K, 1>(x, grid, y, s, channels_last(y), stream);
}

template <class T, int K>
int backward_grid(const smalti_view& x, const smalti_view& grid, const smalti_view& dy, const smalti_view& dgrid, const Sampler& s,
                  void* stream) {
  int rc = 0;
  const Pixels p = samples_of(grid);
  if (p.count == 0) return 0;
  const auto images = image_of<const T>(x), grads = image_of<const T>(dy);
  const auto places = image_of<const Acc<T>>(grid);
  const auto to = image_of<Acc<T>>(dgrid);
  if constexpr (K == 2)
    if (channels_last(x)) {
      auto kernel = sample_grad_grid<T, K, true>;
      LAUNCH(rc, kernel, row_grid<32>(p.count), dim3(kImageBlock), 0, stream, images, places, grads, to, p, x.shape[1], s);
      return rc;
    }
  auto kernel = sample_grad_grid<T, K, false>;
  LAUNCH_FLAT(rc, kernel, pixel_grid(p), dim3(kImageBlock), stream, images, places, grads, to, p, x.shape[1], s);
  return rc;
}

template <class A, int K>
int list_taps(const smalti_view& grid, const Sampler& s, const smalti_view& places, const smalti_view& weights, void* stream) {
  int rc = 0;
  const Pixels p = samples_of(grid);
  if (p.count == 0) return 0;
  auto kernel = sample_taps<A, K>;
  LAUNCH_FLAT(rc, kernel, pixel_grid(p), dim3(kImageBlock), stream, image_of<const A>(grid), p, s, (int32_t*)places.ptr, (A*)weights.ptr);
  return rc;
}

template <class T, int V>
int gather(const smalti_view& dy, const smalti_view& dx, const Sorted& s, const void* weights, int64_t each, bool last, void* stream) {
  int rc = 0;
  const Pixels p = pixels_of(dx, V, last);
  auto kernel = sample_grad_input<T, V>;
  LAUNCH_FLAT(rc, kernel, pixel_grid(p), dim3(kImageBlock), stream, image_of<const T>(dy), image_of<T>(dx), p, s, (const Acc<T>*)weights,
              dy.shape[3], each);
  return rc;
}
template <class T> int backward_input(const smalti_view& dy, const smalti_view& dx, const Sorted& s, const void* weights, int64_t each, void* stream) {
  constexpr int V = kRowWidth<T>;
  int rc = 0;
  if (count(dx) == 0) return 0;
  LAUNCH_FLAT(rc, sample_starts, dim3(grid_for(s.images * (s.pixels + 1), kImageBlock)), dim3(kImageBlock), stream, s);
  if (rc) return rc;
  if constexpr (V > 1)
    if (in_vectors(dy, V, sizeof(T)) && in_vectors(dx, V, sizeof(T))) return gather<T, V>(dy, dx, s, weights, each, true, stream);
  return gather<T, 1>(dy, dx, s, weights, each, channels_last(dx), stream);
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_grid_sample_forward(const smalti_view* x, const smalti_view* grid, const smalti_view* y,
                                              const smalti_grid* o, void* stream) {
  if (!is_sampling(x, grid, y, o)) return kInvalid;
  const Sampler s = sampler_of(x->shape[2], x->shape[3], *o);
  DISPATCH_FLOAT(x->dtype, T, return o->mode == SMALTI_CUBIC ? forward<T, 4>(*x, *grid, *y, s, stream) : forward<T, 2>(*x, *grid, *y, s, stream));
  return 0;
}

extern "C" int32_t smalti_grid_sample_backward_grid(const smalti_view* x, const smalti_view* grid, const smalti_view* dy,
                                                    const smalti_view* dgrid, const smalti_grid* o, void* stream) {
  if (!is_sampling(x, grid, dy, o) || !same_shape(*grid, *dgrid) || grid->dtype != dgrid->dtype) return kInvalid;
  const Sampler s = sampler_of(x->shape[2], x->shape[3], *o);
  DISPATCH_FLOAT(x->dtype, T, return o->mode == SMALTI_CUBIC ? backward_grid<T, 4>(*x, *grid, *dy, *dgrid, s, stream)
                                                             : backward_grid<T, 2>(*x, *grid, *dy, *dgrid, s, stream));
  return 0;
}

extern "C" int32_t smalti_grid_sample_taps(const smalti_view* grid, int64_t height, int64_t width, const smalti_view* places,
                                           const smalti_view* weights, const smalti_grid* o, void* stream) {
  const int64_t each = o->mode == SMALTI_CUBIC ? 16 : o->mode == SMALTI_LINEAR ? 4 : 1;
  if (!is_grid(grid, o, grid->dtype) || height < 1 || width < 1 || height * width >= INT32_MAX) return kInvalid;
  const int64_t n = count(*grid) / 2 * each;
  if (!is_vector(places, n, SMALTI_I32) || !is_vector(weights, n, grid->dtype)) return kInvalid;
  const Sampler s = sampler_of(height, width, *o);
  DISPATCH_REAL(grid->dtype, A, return o->mode == SMALTI_CUBIC ? list_taps<A, 4>(*grid, s, *places, *weights, stream)
                                                               : list_taps<A, 2>(*grid, s, *places, *weights, stream));
  return 0;
}

extern "C" int32_t smalti_grid_sample_backward_input(const smalti_view* dy, const smalti_view* places, const smalti_view* weights,
                                                     const smalti_view* order, const smalti_view* starts, const smalti_view* dx,
                                                     void* stream) {
  if (!is_images(dy) || !is_images(dx) || dy->dtype != dx->dtype || !same_planes(*dy, *dx)) return kInvalid;
  const int64_t images = dx->shape[0], samples = dy->shape[2] * dy->shape[3], pixels = dx->shape[2] * dx->shape[3], n = count(*places);
  const int64_t each = images * samples > 0 ? n / (images * samples) : 1;
  if (n != images * samples * each || samples * each > INT32_MAX || pixels >= INT32_MAX || !is_vector(places, n, SMALTI_I32) ||
      !is_vector(weights, n, computed_in(dy->dtype)) || !is_vector(order, n, SMALTI_I64) ||
      !is_vector(starts, images * (pixels + 1), SMALTI_I32))
    return kInvalid;
  const Sorted s{(const int32_t*)places->ptr, (const int64_t*)order->ptr, (int32_t*)starts->ptr, images, samples * each, pixels};
  DISPATCH_FLOAT(dx->dtype, T, return backward_input<T>(*dy, *dx, s, weights->ptr, each, stream));
  return 0;
}
