// Resizing of images. Along each axis an element of the result is a weighted sum of consecutive elements: what
// src/ops/interpolate does on the CPU, with the same weights.
//
// A first kernel writes the tables of weights into the workspace, in f64 and without contraction, so that places and
// weights are the CPU's bit for bit; made here they need no upload, which a captured graph could not have. The
// gradient gathers: the outputs that use an input are consecutive too, because the windows move in one direction. Few
// weights are applied in one pass over both axes; many (wide antialiasing kernels, gradients of enlargements) in two
// passes with f32 (f64 for f64) in between.
#include "common/exact.cuh"
#include "common/images.cuh"
#include <algorithm>

namespace smalti {
namespace {

/// The weights of one axis: output i takes inputs start[i] .. start[i] + count[i], at most `width` of them.
template <class A> struct Table {
  smalti_resize axis;
  int32_t *start, *count;  // [output]
  A* weights;              // [output, width]
  int32_t *first, *users;  // [input], for gradients: outputs first[j] .. first[j] + users[j] use input j
  int64_t width;
};

DEV double triangle(double x) { return fabs(x) < 1.0 ? 1.0 - fabs(x) : 0.0; }
/// Keys' cubic convolution kernel.
DEV double cubic(double x, double a) {
  x = fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
}

/// `n` (at most 4) weights from input `first` on. What lies outside falls on the edge.
template <class A> DEV void add(const Table<A>& t, int64_t i, int64_t first, const double* weights, int n) {
  const int64_t end = t.axis.input - 1;
  const int64_t start = first < 0 ? 0 : first > end ? end : first;
  const int64_t far = first + n - 1, last = far < 0 ? 0 : far > end ? end : far;
  double sums[4] = {0, 0, 0, 0};
  for (int k = 0; k < n; k++) {
    const int64_t at = first + k;
    sums[(at < start ? start : at > last ? last : at) - start] += weights[k];
  }
  int64_t count = last - start + 1;
  // an edge that counts with weight 0 would turn an infinity there into NaN
  if (n == 2 && weights[1] == 0.0 && count == 2) count = 1;
  for (int64_t k = 0; k < count; k++) t.weights[i * t.width + k] = (A)sums[k];
  t.start[i] = (int32_t)start;
  t.count[i] = (int32_t)count;
}

/// A kernel as wide as the scale demands, cut at the edges and normalised (Pillow's way).
template <class A> DEV void add_wide(const Table<A>& t, int64_t i) {
  const bool linear = t.axis.mode == SMALTI_LINEAR;
  const double scale = t.axis.scale, stretch = scale > 1.0 ? scale : 1.0, support = mul_rn(linear ? 1.0 : 2.0, stretch);
  const double centre = mul_rn(scale, (double)i + 0.5);
  const int64_t low = (int64_t)(centre - support + 0.5), high = (int64_t)(centre + support + 0.5), n = t.axis.input;
  const int64_t start = low < 0 ? 0 : low > n - 1 ? n - 1 : low, end = high <= start ? start + 1 : high > n ? n : high;
  auto weight = [&](int64_t j) {
    const double x = ((double)j - centre + 0.5) / stretch;
    return linear ? triangle(x) : cubic(x, -0.5);
  };
  double sum = 0;
  for (int64_t j = start; j < end; j++) sum += weight(j);
  for (int64_t j = start; j < end; j++) t.weights[i * t.width + j - start] = (A)(sum == 0.0 ? 0.0 : weight(j) / sum);
  t.start[i] = (int32_t)start;
  t.count[i] = (int32_t)(end - start);
}

template <class A> DEV void make_taps(const Table<A>& t, int64_t i) {
  const smalti_resize& a = t.axis;
  double w[4] = {1, 0, 0, 0};
  const double centre = a.align_corners ? mul_rn(a.scale, (double)i) : mul_rn(a.scale, (double)i + 0.5) - 0.5;
  if (a.antialias) {
    add_wide(t, i);
  } else if (a.mode == SMALTI_AREA) {
    const int64_t start = i * a.input / a.output, end = ((i + 1) * a.input + a.output - 1) / a.output;
    for (int64_t k = 0; k < end - start; k++) t.weights[i * t.width + k] = (A)(1.0 / (double)(end - start));
    t.start[i] = (int32_t)start;
    t.count[i] = (int32_t)(end - start);
  } else if (a.mode == SMALTI_LINEAR) {
    const double x = centre > 0.0 ? centre : 0.0, low = floor(x);
    w[0] = 1.0 - (x - low);
    w[1] = x - low;
    add(t, i, (int64_t)low, w, 2);
  } else if (a.mode == SMALTI_CUBIC) {
    const double low = floor(centre), x = centre - low;
    w[0] = cubic(x + 1.0, -0.75);
    w[1] = cubic(x, -0.75);
    w[2] = cubic(1.0 - x, -0.75);
    w[3] = cubic(2.0 - x, -0.75);
    add(t, i, (int64_t)low - 1, w, 4);
  } else {
    add(t, i, (int64_t)floor(mul_rn(a.mode == SMALTI_NEAREST ? (double)i : (double)i + 0.5, a.scale)), w, 1);
  }
}

template <class A> __global__ void __launch_bounds__(kImageBlock) interpolate_taps(Table<A> rows, Table<A> columns) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x, all = rows.axis.output + columns.axis.output;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += threads) {
    const bool first = i < rows.axis.output;
    make_taps(first ? rows : columns, first ? i : i - rows.axis.output);
  }
}

/// The first output whose inputs end (or, `start`, start) beyond input `j`; both move in one direction.
template <class A> DEV int64_t beyond(const Table<A>& t, int64_t j, bool start) {
  int64_t low = 0, high = t.axis.output;
  while (low < high) {
    const int64_t mid = (low + high) / 2;
    if (t.start[mid] + (start ? 0 : t.count[mid] - 1) < j + start) low = mid + 1;
    else high = mid;
  }
  return low;
}
template <class A> __global__ void __launch_bounds__(kImageBlock) interpolate_users(Table<A> rows, Table<A> columns) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x, all = rows.axis.input + columns.axis.input;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += threads) {
    const bool is_row = i < rows.axis.input;
    const Table<A>& t = is_row ? rows : columns;
    const int64_t j = is_row ? i : i - rows.axis.input, first = beyond(t, j, false);
    t.first[j] = (int32_t)first;
    t.users[j] = (int32_t)(beyond(t, j, true) - first);
  }
}

/// What an element of a result takes along one axis. Without `first`: the element at its own place.
template <class A> struct Line {
  const int32_t *first, *count, *start;  // start: of tables for gradients
  const A* weights;
  int64_t width;
  DEV int64_t begin(int64_t i) const { return first ? first[i] : i; }
  DEV int64_t length(int64_t i) const { return first ? count[i] : 1; }
  DEV A weight(int64_t i, int64_t from, int64_t begin) const {
    if (!first) return A(1);
    return start ? weights[from * width + i - start[from]] : weights[i * width + from - begin];
  }
};

template <class From, class To, int V>
__global__ void __launch_bounds__(kImageBlock)
    resample(Image<const From> x, Image<To> y, Pixels p, Line<Acc<To>> rows, Line<Acc<To>> columns) {
  using A = Acc<To>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.count; i += threads) {
    const Pixels::At o = p.at(i);
    const int64_t top = rows.begin(o.y), bottom = top + rows.length(o.y), left = columns.begin(o.x), n = columns.length(o.x);
    A sum[V];
    UNROLL for (int j = 0; j < V; j++) sum[j] = 0;
    for (int64_t r = top; r < bottom; r++) {
      const From* from = x.at(o.n, o.c * V, r, left);
      A line[V];
      UNROLL for (int j = 0; j < V; j++) line[j] = 0;
      for (int64_t k = 0; k < n; k++) {
        const A w = columns.weight(o.x, left + k, left);
        A v[V];
        fetch_wide<From, V>(from + k * x.w, v);
        UNROLL for (int j = 0; j < V; j++) line[j] += v[j] * w;
      }
      const A w = rows.weight(o.y, r, top);
      UNROLL for (int j = 0; j < V; j++) sum[j] += line[j] * w;
    }
    put_narrow<To, V>(y.at(o.n, o.c * V, o.y, o.x), sum);
  }
}

/// Does the axis change nothing, whatever the values are? (A cubic's zero weights make NaN of infinities.)
bool is_identity(const smalti_resize& a) {
  return a.input == a.output && (a.scale == 1.0 || (a.input == 1 && a.align_corners)) && !a.antialias && a.mode != SMALTI_CUBIC;
}

bool is_resize(const smalti_resize& a) {
  const bool smooth = a.mode == SMALTI_LINEAR || a.mode == SMALTI_CUBIC;
  return a.input > 0 && a.output > 0 && a.input <= INT32_MAX && a.output <= INT32_MAX && a.scale >= 0 && a.scale < 1e300 &&
         a.mode >= SMALTI_NEAREST && a.mode <= SMALTI_AREA && (smooth || !(a.antialias || a.align_corners));
}

/// Most weights of an output.
int64_t width_of(const smalti_resize& a) {
  double wide = a.mode == SMALTI_CUBIC ? 4 : a.mode == SMALTI_LINEAR ? 2 : 1;
  if (a.mode == SMALTI_AREA) wide = std::ceil((double)a.input / (double)a.output) + 1;
  else if (a.antialias) wide = std::ceil(wide * std::max(a.scale, 1.0)) + 2;
  return wide < (double)a.input ? (int64_t)wide : a.input;
}

/// What the workspace holds: the tables of both axes, and an image between two passes.
template <class A> struct Plan {
  Table<A> tables[2];
  smalti_view between;
  bool two_passes, columns_first;
  int64_t bytes = 0;
  void* base;

  template <class P> P* take(int64_t n) {
    P* p = base ? (P*)((char*)base + bytes) : nullptr;
    bytes += (n * (int64_t)sizeof(P) + 15) / 16 * 16;
    return p;
  }
  Plan(const smalti_view& x, const smalti_view& y, const smalti_resize* axes, bool back, void* memory) : base(memory) {
    double taps[2];
    for (int d = 0; d < 2; d++) {
      Table<A>& t = tables[d];
      t.axis = axes[d];
      t.width = width_of(t.axis);
      t.start = take<int32_t>(t.axis.output);
      t.count = take<int32_t>(t.axis.output);
      t.weights = take<A>(t.axis.output * t.width);
      t.first = back ? take<int32_t>(t.axis.input) : nullptr;
      t.users = back ? take<int32_t>(t.axis.input) : nullptr;
      taps[d] = is_identity(t.axis) ? 1 : (double)t.width * (back ? (double)t.axis.output / (double)t.axis.input : 1);
    }
    // 16: those of a bicubic; beyond, the second pass over a smaller image is the cheaper
    two_passes = taps[0] > 1 && taps[1] > 1 && taps[0] * taps[1] > 16;
    columns_first = y.shape[2] >= x.shape[2];  // the axis that grows goes last
    if (two_passes) place_between(x, y);
  }
  /// The image between, in the order of `y`.
  void place_between(const smalti_view& x, const smalti_view& y) {
    between = y;
    between.dtype = computed_in(y.dtype);
    if (columns_first) between.shape[2] = x.shape[2];
    else between.shape[3] = x.shape[3];
    const int64_t c = y.shape[1], h = between.shape[2], w = between.shape[3];
    const int64_t first[] = {c * h * w, h * w, w, 1}, last[] = {c * h * w, 1, w * c, c};
    std::copy_n(channels_last(y) ? last : first, 4, between.stride);
    between.ptr = take<A>(count(between));
  }
  Line<A> line(int d, bool back) const {
    const Table<A>& t = tables[d];
    if (is_identity(t.axis)) return {};
    if (back) return {t.first, t.users, t.start, t.weights, t.width};
    return {t.start, t.count, nullptr, t.weights, t.width};
  }
};

template <class From, class To, int V, class A>
int pass(const smalti_view& x, const smalti_view& y, const Line<A>& rows, const Line<A>& columns, bool last, void* stream) {
  int rc = 0;
  const Pixels p = pixels_of(y, V, last);
  auto kernel = resample<From, To, V>;
  LAUNCH_FLAT(rc, kernel, pixel_grid(p), dim3(kImageBlock), stream, image_of<const From>(x), image_of<To>(y), p, rows, columns);
  return rc;
}
/// `T`: the dtype of the images, which sets how many channels go together.
template <class T, class From, class To, class A>
int pass(const smalti_view& x, const smalti_view& y, const Line<A>& rows, const Line<A>& columns, void* stream) {
  constexpr int V = kRowWidth<T>;
  if constexpr (V > 1)
    if (in_vectors(x, V, sizeof(From)) && in_vectors(y, V, sizeof(To))) return pass<From, To, V>(x, y, rows, columns, true, stream);
  return pass<From, To, 1>(x, y, rows, columns, channels_last(y), stream);
}

template <class T> int interpolate(const smalti_view& x, const smalti_view& y, const smalti_resize* axes, bool back, void* workspace, void* stream) {
  using A = Acc<T>;
  if (count(y) == 0) return 0;
  const Plan<A> plan(x, y, axes, back, workspace);
  int rc = 0;
  auto taps = interpolate_taps<A>;
  LAUNCH_FLAT(rc, taps, dim3(grid_for(axes[0].output + axes[1].output, kImageBlock)), dim3(kImageBlock), stream, plan.tables[0], plan.tables[1]);
  if (back && !rc) {
    auto users = interpolate_users<A>;
    LAUNCH_FLAT(rc, users, dim3(grid_for(axes[0].input + axes[1].input, kImageBlock)), dim3(kImageBlock), stream, plan.tables[0], plan.tables[1]);
  }
  if (rc) return rc;
  const Line<A> rows = plan.line(0, back), columns = plan.line(1, back), none{};
  if (!plan.two_passes) return pass<T, T, T>(x, y, rows, columns, stream);
  const bool wide = plan.columns_first;
  rc = pass<T, T, A>(x, plan.between, wide ? none : rows, wide ? columns : none, stream);
  return rc ? rc : pass<T, A, T>(plan.between, y, wide ? rows : none, wide ? none : columns, stream);
}

bool is_resizing(const smalti_view* x, const smalti_view* y, const smalti_resize* axes, bool back) {
  if (!is_images(x) || !is_images(y) || !same_planes(*x, *y) || x->dtype != y->dtype) return false;
  for (int d = 0; d < 2; d++) {
    const int64_t input = (back ? y : x)->shape[2 + d], output = (back ? x : y)->shape[2 + d];
    if (!is_resize(axes[d]) || axes[d].input != input || axes[d].output != output) return false;
  }
  return true;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_interpolate_workspace(const smalti_view* x, const smalti_view* y, const smalti_resize* axes, int32_t back) {
  if (!is_resizing(x, y, axes, back != 0)) return -1;
  if (x->dtype == SMALTI_F64) return Plan<double>(*x, *y, axes, back != 0, nullptr).bytes;
  return Plan<float>(*x, *y, axes, back != 0, nullptr).bytes;
}

extern "C" int32_t smalti_interpolate(const smalti_view* x, const smalti_view* y, const smalti_resize* axes, int32_t back,
                                      void* workspace, void* stream) {
  if (!is_resizing(x, y, axes, back != 0)) return kInvalid;
  DISPATCH_FLOAT(x->dtype, T, return interpolate<T>(*x, *y, axes, back != 0, workspace, stream));
  return 0;
}
