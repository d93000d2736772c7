// ROIAlign (He et al., 2017, "Mask R-CNN", section 3), as torchvision.ops.roi_align counts: a bin of a box is the mean of
// samples that lie evenly in it, each read bilinearly. One pixel beyond the image a sample still reads the edge,
// farther out it is 0.
//
// A sample's weight is a product of one along each axis, and so is the weight of a pixel in a bin. The backward uses
// that: a block owns a tile of the gradient for some channels, walks the boxes that touch it in their order, and has
// the weights of the tile's rows and columns in tables. No atomics: the same bits in every run.
#include "common/rows.cuh"

namespace smalti {
namespace {

/// What all kernels know. `step`: strides of the images [N, C, H, W] and of the bins [R, C, oh, ow].
struct Roi {
  int64_t boxes, images, channels;
  int size[2], bins[2];
  int64_t image[4], bin[4];
  double scale;
  int samples;  // along a bin; 0: as many as it has pixels
  bool aligned;
};

/// A box along one axis.
template <class A> struct Side {
  A start, length, samples;  // of a bin, from the start of the box
  int taken, size;

  /// In f64, as on the CPU: what is rounded up to a number of samples is the same on every device.
  DEV static Side of(A low, A high, int bins, int size, const Roi& p) {
    const double shift = p.aligned ? 0.5 : 0, first = (double)low * p.scale - shift;
    double extent = (double)high * p.scale - shift - first;
    if (!p.aligned && extent < 1) extent = 1;
    const double one = extent / bins, samples = p.samples > 0 ? (double)p.samples : ceil(one);
    Side s;
    s.start = (A)first;
    s.length = (A)one;
    s.samples = (A)samples;
    s.size = size;
    // boxes that are none, and sides that point backwards, have no samples; no number overflows
    const bool finite = s.start - s.start == 0 && s.length - s.length == 0;
    s.taken = finite && samples > 0 ? (samples < 1 << 30 ? (int)samples : 1 << 30) : 0;
    return s;
  }

  /// Sample `i` of bin `b`.
  DEV A place(int b, int i) const { return start + (A)b * length + ((A)i + A(0.5)) * length / samples; }

  /// Which samples of bin `b` can lie between two places; a few too many.
  DEV void between(int b, A low, A high, int& first, int& last) const {
    first = 0;
    last = taken;
    if (taken <= 4 || !(length > 0)) return;
    const A origin = start + (A)b * length, dense = samples / length;
    const A from = (low - origin) * dense - A(0.5), to = (high - origin) * dense - A(0.5), n = (A)taken;
    const A a = from - 1 - abs_of(from) * A(1e-6), z = to + 2 + abs_of(to) * A(1e-6);
    first = a > 0 ? (a < n ? (int)a : taken) : 0;
    last = z > 0 ? (z < n ? (int)z : taken) : 0;
  }

  /// The two pixels that a place reads, and the share of the second. False where it reads none.
  DEV bool pixels(A at, int& low, int& high, A& share) const {
    if (!(at >= -1 && at <= (A)size)) return false;
    at = at > 0 ? at : A(0);
    low = (int)at;
    high = low + 1;
    share = at - (A)low;
    if (high >= size) {
      low = high = size - 1;
      share = 0;
    }
    return true;
  }

  /// The weight of a pixel in bin `b`.
  DEV A weight(int b, int pixel) const {
    int first, last, low, high;
    between(b, pixel == 0 ? A(-1) : (A)(pixel - 1), pixel == size - 1 ? (A)size : (A)(pixel + 1), first, last);
    A sum = 0, share;
    ROLLED for (int i = first; i < last; i++)
      if (pixels(place(b, i), low, high, share)) sum += low == pixel ? 1 - share : high == pixel ? share : A(0);
    return sum / samples;
  }

  /// Can the box have weights in pixels first .. first + n?
  DEV bool touches(int bins, int first, int n) const {
    if (taken == 0) return false;
    const A end = start + (A)bins * length, last = (A)(size - 1);
    A low = start < end ? start : end, high = start < end ? end : start;
    low = low < 0 ? A(0) : low > last ? last : low;
    high = high < 0 ? A(0) : high > last ? last : high;
    return (A)(first + n) >= low && (A)first <= high + 1;
  }
};

/// The image of a box, -1 if there is no such.
template <class A> DEV int64_t image_of(const A* box, const Roi& p) {
  return box[0] > -1 && box[0] < (A)p.images ? (int64_t)box[0] : -1;
}
template <class A> DEV Side<A> rows_of(const A* box, const Roi& p) { return Side<A>::of(box[2], box[4], p.bins[0], p.size[0], p); }
template <class A> DEV Side<A> columns_of(const A* box, const Roi& p) { return Side<A>::of(box[1], box[3], p.bins[1], p.size[1], p); }

/// A box as the tiles need it.
template <class A> struct Prepared {
  Side<A> rows, columns;
  int64_t image;
};
template <class A> __global__ void __launch_bounds__(128) roi_align_prepare(const A* boxes, Prepared<A>* out, Roi p) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < p.boxes; i += threads)
    out[i] = {rows_of(boxes + 5 * i, p), columns_of(boxes + 5 * i, p), image_of(boxes + 5 * i, p)};
}

/// A thread makes `V` neighbouring channels of a bin. Channels are the fastest where they are adjacent, else columns.
template <class T, int V> __global__ void __launch_bounds__(128) roi_align_bins(const T* x, const Acc<T>* boxes, T* y, Roi p, int64_t count) {
  using A = Acc<T>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x, packs = p.channels / V;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += threads) {
    const int64_t fast = V > 1 ? packs : p.bins[1], q = divide(i, fast), a = i - q * fast;
    const int64_t middle = V > 1 ? p.bins[1] : p.bins[0], s = divide(q, middle), b = q - s * middle;
    const int64_t slow = V > 1 ? p.bins[0] : p.channels, box = divide(s, slow), c = s - box * slow;
    const int64_t channel = V > 1 ? a * V : c;
    const int row = (int)(V > 1 ? c : b), column = (int)(V > 1 ? b : a);
    const A* of = boxes + 5 * box;
    const int64_t image = image_of(of, p);
    A sum[V];
    UNROLL for (int v = 0; v < V; v++) sum[v] = image < 0 ? A(0) * infinity<A>() : A(0);
    if (image >= 0) {
      const Side<A> down = rows_of(of, p), across = columns_of(of, p);
      const T* from = x + image * p.image[0] + channel * p.image[1];
      int y0, y1, x0, x1, low, high, left, right;
      A below, beside;
      down.between(row, A(-1), (A)down.size, y0, y1);
      across.between(column, A(-1), (A)across.size, x0, x1);
      for (int j = y0; j < y1; j++) {
        if (!down.pixels(down.place(row, j), low, high, below)) continue;
        const T *upper = from + low * p.image[2], *lower = from + high * p.image[2];
        for (int k = x0; k < x1; k++) {
          if (!across.pixels(across.place(column, k), left, right, beside)) continue;
          A tap[4][V];
          load<T, V>(upper + left * p.image[3], tap[0]);
          load<T, V>(upper + right * p.image[3], tap[1]);
          load<T, V>(lower + left * p.image[3], tap[2]);
          load<T, V>(lower + right * p.image[3], tap[3]);
          const A w3 = below * beside, w2 = below - w3, w1 = beside - w3, w0 = 1 - below - w1;
          UNROLL for (int v = 0; v < V; v++) sum[v] += w0 * tap[0][v] + w1 * tap[1][v] + w2 * tap[2][v] + w3 * tap[3][v];
        }
      }
      const A n = down.samples * across.samples;
      UNROLL for (int v = 0; v < V; v++) sum[v] = n > 1 ? sum[v] / n : sum[v];
    }
    store<T, V>(y + box * p.bin[0] + channel * p.bin[1] + row * p.bin[2] + column * p.bin[3], sum);
  }
}

constexpr int kWarps = 8, kRows = 4, kColumns = 8, kLines = kRows + kColumns;
/// Boxes whose tables are in memory together, at most, and the bytes that they take then.
constexpr int kTables = 8;
constexpr int64_t kTableBytes = 160 * 1024;
/// Channels of a block: a warp has a column of the tile and 32 packs of channels, or four channels and the tile.
template <int V> constexpr int kChannels = V > 1 ? 32 * V : kWarps * 4;

inline int64_t table_size(const Roi& p) { return (int64_t)kRows * p.bins[0] + (int64_t)kColumns * p.bins[1]; }

/// Weights of the tile's rows and columns in all bins of a box, and the bins where they are not 0. By one warp.
template <class A> DEV void make_table(const Prepared<A>& box, const Roi& p, int y0, int x0, int lane, A* table, int* ends) {
  const int above = kRows * p.bins[0], all = above + kColumns * p.bins[1];
  ROLLED for (int i = lane; i < all; i += 32) {
    const bool upright = i < above;
    const int at = upright ? i : i - above, bins = upright ? p.bins[0] : p.bins[1], line = at / bins, b = at - line * bins;
    const int pixel = (upright ? y0 : x0) + line;
    const Side<A> side = upright ? box.rows : box.columns;
    table[i] = pixel < side.size ? side.weight(b, pixel) : A(0);
  }
  __syncwarp();
  if (lane < kLines) {
    const bool upright = lane < kRows;
    const int bins = upright ? p.bins[0] : p.bins[1];
    const A* line = upright ? table + lane * bins : table + above + (lane - kRows) * bins;
    int first = 0, last = bins;
    ROLLED while (first < last && line[first] == 0) first++;
    ROLLED while (first < last && line[last - 1] == 0) last--;
    ends[2 * lane] = first;
    ends[2 * lane + 1] = last;
  }
}

/// What a box sends to this thread's four pixels (of V channels), or to its four channels (of one pixel).
template <class T, int V> DEV void add_box(const T* dy, const Roi& p, const Acc<T>* table, const int* ends, int warp, int lane, int64_t left, Acc<T> (&sum)[4][V]) {
  using A = Acc<T>;
  const int column = V > 1 ? warp : lane & 7, own = lane >> 3;
  const A* across = table + kRows * p.bins[0] + column * p.bins[1];
  const int q0 = ends[2 * (kRows + column)], q1 = ends[2 * (kRows + column) + 1];
  if (q0 >= q1) return;
  if constexpr (V > 1) {
    int p0 = p.bins[0], p1 = 0;
    UNROLL for (int r = 0; r < kRows; r++) {
      const int a = ends[2 * r], z = ends[2 * r + 1];
      if (a < z) {
        p0 = a < p0 ? a : p0;
        p1 = z > p1 ? z : p1;
      }
    }
    for (int b = p0; b < p1; b++) {
      A line[V], g[V];
      UNROLL for (int v = 0; v < V; v++) line[v] = 0;
      for (int q = q0; q < q1; q++) {
        load<T, V>(dy + b * p.bin[2] + q * p.bin[3], g);
        const A w = across[q];
        UNROLL for (int v = 0; v < V; v++) line[v] += w * g[v];
      }
      UNROLL for (int r = 0; r < kRows; r++) {
        const A w = table[r * p.bins[0] + b];
        UNROLL for (int v = 0; v < V; v++) sum[r][v] += w * line[v];
      }
    }
  } else {
    const A* down = table + own * p.bins[0];
    for (int b = ends[2 * own]; b < ends[2 * own + 1]; b++)
      for (int k = 0; k < 4 && k < left; k++) {
        A line = 0;
        for (int q = q0; q < q1; q++) line += across[q] * widen(dy[k * p.bin[1] + b * p.bin[2] + q * p.bin[3]]);
        sum[k][0] += down[b] * line;
      }
  }
}

/// A block makes a tile of kRows x kColumns pixels of some channels of an image. `tables`: boxes at a time.
template <class T, int V> __global__ void __launch_bounds__(32 * kWarps, 2) roi_align_tiles(const T* dy, const Prepared<Acc<T>>* boxes, T* dx, Roi p, int tables, int64_t jobs) {
  using A = Acc<T>;
  DYN_SMEM(raw);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int size = (int)(kRows * p.bins[0] + kColumns * p.bins[1]);
  A* table = (A*)raw;
  int* ends = (int*)(table + (int64_t)tables * size);
  int *found = ends + tables * 2 * kLines, *counts = found + 32 * kWarps;
  const int64_t high = (p.size[0] + kRows - 1) / kRows, wide = (p.size[1] + kColumns - 1) / kColumns;
  const int64_t chunks = (p.channels + kChannels<V> - 1) / kChannels<V>;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int64_t a = divide(job, chunks), chunk = job - a * chunks, b = divide(a, wide), image = divide(b, high);
    const int x0 = (int)(a - b * wide) * kColumns, y0 = (int)(b - image * high) * kRows;
    const int64_t channel = chunk * kChannels<V> + (V > 1 ? lane * V : warp * 4), left = p.channels - channel;
    A sum[4][V];
    UNROLL for (int k = 0; k < 4; k++) { UNROLL for (int v = 0; v < V; v++) sum[k][v] = 0; }
    for (int64_t base = 0; base < p.boxes; base += 32 * kWarps) {
      const Prepared<A>* mine = boxes + base + tid;
      const bool touches = base + tid < p.boxes && mine->image == image && mine->rows.touches(p.bins[0], y0, kRows) &&
                           mine->columns.touches(p.bins[1], x0, kColumns);
      const unsigned votes = __ballot_sync(~0u, touches);
      if (lane == 0) counts[warp] = __popc(votes);
      __syncthreads();
      int before = 0, total = 0;
      UNROLL for (int w = 0; w < kWarps; w++) {
        before += w < warp ? counts[w] : 0;
        total += counts[w];
      }
      if (touches) found[before + __popc(votes & ((1u << lane) - 1))] = tid;
      __syncthreads();
      for (int first = 0; first < total; first += tables) {
        const int here = total - first < tables ? total - first : tables;
        if (warp < here) make_table(boxes[base + found[first + warp]], p, y0, x0, lane, table + warp * size, ends + warp * 2 * kLines);
        __syncthreads();
        for (int k = 0; k < here && left > 0; k++)
          add_box<T, V>(dy + (base + found[first + k]) * p.bin[0] + channel * p.bin[1], p, table + k * size, ends + k * 2 * kLines, warp, lane, left, sum);
        __syncthreads();
      }
    }
    const int x = x0 + (V > 1 ? warp : lane & 7), y = y0 + (V > 1 ? 0 : lane >> 3);
    if (x >= p.size[1] || y >= p.size[0]) continue;
    T* to = dx + image * p.image[0] + channel * p.image[1] + y * p.image[2] + x * p.image[3];
    UNROLL for (int k = 0; k < 4; k++) {
      if (V > 1 ? left > 0 && y + k < p.size[0] : k < left) store<T, V>(to + k * (V > 1 ? p.image[2] : p.image[1]), sum[k]);
    }
  }
}

/// From the views; false where they do not fit together.
bool problem(const smalti_view& image, const smalti_view* boxes, const smalti_view& bins, double scale, int64_t samples, int32_t aligned, Roi& p) {
  const int64_t most = (int64_t)1 << 30;
  if (image.rank != 4 || bins.rank != 4 || image.dtype != bins.dtype || image.shape[1] != bins.shape[1]) return false;
  if (!is_vector(boxes, 5 * bins.shape[0], computed_in(image.dtype)) || samples > most) return false;
  p = {};
  p.boxes = bins.shape[0];
  p.images = image.shape[0];
  p.channels = image.shape[1];
  for (int d = 0; d < 2; d++) {
    if (image.shape[2 + d] > most || bins.shape[2 + d] > most) return false;
    p.size[d] = (int)image.shape[2 + d];
    p.bins[d] = (int)bins.shape[2 + d];
  }
  for (int d = 0; d < 4; d++) {
    p.image[d] = image.stride[d];
    p.bin[d] = bins.stride[d];
  }
  p.scale = scale;
  p.samples = samples > 0 ? (int)samples : 0;
  p.aligned = aligned != 0;
  return true;
}

/// Are `v` channels side by side everywhere, and aligned?
bool in_packs(const smalti_view& t, int64_t v) {
  return v > 1 && t.shape[1] % v == 0 && t.stride[1] == 1 && t.stride[0] % v == 0 && t.stride[2] % v == 0 && t.stride[3] % v == 0 && aligned(t.ptr);
}

template <class T, int V> int32_t bins(const smalti_view& x, const smalti_view& boxes, const smalti_view& y, const Roi& p, void* stream) {
  int rc = 0;
  const int64_t n = count(y) / V;
  auto kernel = roi_align_bins<T, V>;
  LAUNCH_FLAT(rc, kernel, dim3(grid_for(n, 128)), dim3(128), stream, (const T*)x.ptr, (const Acc<T>*)boxes.ptr, (T*)y.ptr, p, n);
  return rc;
}

template <class T, int V> int32_t tiles(const smalti_view& dy, const smalti_view& boxes, const smalti_view& dx, const Roi& p, void* workspace, void* stream) {
  using A = Acc<T>;
  int rc = 0;
  const int64_t one = table_size(p) * (int64_t)sizeof(Acc<T>) + 2 * kLines * (int64_t)sizeof(int);
  if (one > kTableBytes) return kInvalid;
  // what fits without asking for more, so that several blocks share a processor; one, where that is too little
  const int64_t fit = 40 * 1024 / one, tables = fit < 1 ? 1 : fit < kTables ? fit : kTables;
  const int64_t smem = tables * one + (32 * kWarps + kWarps) * (int64_t)sizeof(int);
  const int64_t high = (p.size[0] + kRows - 1) / kRows, wide = (p.size[1] + kColumns - 1) / kColumns;
  const int64_t jobs = p.images * high * wide * ((p.channels + kChannels<V> - 1) / kChannels<V>);
  auto* prepared = (Prepared<A>*)workspace;
  auto prepare = roi_align_prepare<A>;
  LAUNCH_FLAT(rc, prepare, dim3(grid_for(p.boxes, 128)), dim3(128), stream, (const A*)boxes.ptr, prepared, p);
  if (rc) return rc;
  auto kernel = roi_align_tiles<T, V>;
  LAUNCH(rc, kernel, dim3(grid_for(jobs, 1)), dim3(32 * kWarps), (int)smem, stream, (const T*)dy.ptr, prepared, (T*)dx.ptr, p, (int)tables, jobs);
  return rc;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_roi_align_forward(const smalti_view* x, const smalti_view* boxes, double scale, int64_t samples,
                                            int32_t aligned, const smalti_view* y, void* stream) {
  Roi p;
  if (!problem(*x, boxes, *y, scale, samples, aligned, p)) return kInvalid;
  if (count(*y) == 0) return 0;
  if (p.size[0] == 0 || p.size[1] == 0) return kInvalid;
  DISPATCH_FLOAT(x->dtype, T, {
    constexpr int V = kRowWidth<T>;
    return in_packs(*x, V) && in_packs(*y, V) ? bins<T, V>(*x, *boxes, *y, p, stream) : bins<T, 1>(*x, *boxes, *y, p, stream);
  })
  return 0;
}

extern "C" int64_t smalti_roi_align_workspace(int64_t boxes) { return boxes * (int64_t)sizeof(Prepared<double>); }

extern "C" int32_t smalti_roi_align_backward(const smalti_view* dy, const smalti_view* boxes, double scale, int64_t samples,
                                             int32_t aligned, const smalti_view* dx, void* workspace, void* stream) {
  Roi p;
  if (!problem(*dx, boxes, *dy, scale, samples, aligned, p)) return kInvalid;
  if (count(*dx) == 0) return 0;
  DISPATCH_FLOAT(dx->dtype, T, {
    constexpr int V = kRowWidth<T>;
    return in_packs(*dy, V) && in_packs(*dx, V) ? tiles<T, V>(*dy, *boxes, *dx, p, workspace, stream)
                                                  : tiles<T, 1>(*dy, *boxes, *dx, p, workspace, stream);
  })
  return 0;
}
