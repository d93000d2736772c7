// Softmax and its logarithm over one dimension, forward and backward.
//
// Where the dimension is the innermost in memory, a group of threads holds a row in registers (16 numbers a
// thread): each element is read once and written once. Longer rows are read twice, the second time from the L2
// cache. Elsewhere a thread has a column, and neighbours have neighbouring columns.
#include "common/online.cuh"

namespace smalti {
namespace {

/// Numbers that a thread keeps of a row.
constexpr int kKeep = 16;
constexpr int kStream = 512;

template <int N> struct Rows {
  Index<N> at;  // offsets of a row in each tensor
  int64_t count, n, step[N];
};

/// Over the block, known to all threads.
template <class A> DEV Online<A> block_online(Online<A> v, Online<A>* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  for (int m = 1; m < 32; m <<= 1) {
    Online<A> o = shuffle_xor(v, m), first = lane & m ? o : v, second = lane & m ? v : o;
    first.join(second);
    v = first;
  }
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  Online<A> total = scratch[0];
  for (int w = 1; w < warps; w++) total.join(scratch[w]);
  __syncthreads();
  return total;
}

template <class T, int V, int G> __global__ void __launch_bounds__(kBlock<G>) softmax_rows(const T* x, T* y, Rows<2> p, bool log) {
  DYN_SMEM(raw);
  using A = Acc<T>;
  A* scratch = reinterpret_cast<A*>(raw);
  const int tid = threadIdx.x, t = G == 32 ? tid & 31 : tid;
  for (int64_t row = first_row<G>(tid); row < p.count; row += row_step<G>()) {
    int64_t off[2];
    p.at.at(row, off);
    A v[kKeep / V][V], max = -infinity<A>(), sum = 0;
    UNROLL for (int k = 0; k < kKeep / V; k++) {
      const int64_t i = (int64_t)(k * G + t) * V;
      if (i < p.n) load<T, V>(x + off[0] + i, v[k]);
      else { UNROLL for (int j = 0; j < V; j++) v[k][j] = -infinity<A>(); }
      UNROLL for (int j = 0; j < V; j++) max = v[k][j] > max ? v[k][j] : max;
    }
    max = group_max<G>(max, scratch);
    UNROLL for (int k = 0; k < kKeep / V; k++) {
      if ((int64_t)(k * G + t) * V >= p.n) continue;
      UNROLL for (int j = 0; j < V; j++) {
        const A shifted = v[k][j] - max, e = exp_of(shifted);
        sum += e;
        v[k][j] = log ? shifted : e;
      }
    }
    sum = group_sum<G>(sum, scratch);
    const A scale = log ? log_of(sum) : A(1) / sum;
    UNROLL for (int k = 0; k < kKeep / V; k++) {
      const int64_t i = (int64_t)(k * G + t) * V;
      if (i >= p.n) continue;
      UNROLL for (int j = 0; j < V; j++) v[k][j] = log ? v[k][j] - scale : v[k][j] * scale;
      store<T, V>(y + off[1] + i, v[k]);
    }
  }
}

/// Rows of any length.
template <class T, int V> __global__ void __launch_bounds__(kStream) softmax_long_rows(const T* x, T* y, Rows<2> p, bool log) {
  DYN_SMEM(raw);
  using A = Acc<T>;
  auto* scratch = reinterpret_cast<Online<A>*>(raw);
  const int tid = threadIdx.x;
  for (int64_t row = blockIdx.x; row < p.count; row += gridDim.x) {
    int64_t off[2];
    p.at.at(row, off);
    auto state = Online<A>::none();
    ROLLED for (int64_t i = (int64_t)tid * V; i < p.n; i += kStream * V) {
      A v[V];
      load<T, V>(x + off[0] + i, v);
      UNROLL for (int j = 0; j < V; j++) state.take(v[j]);
    }
    state = block_online(state, scratch);
    const A scale = log ? log_of(state.sum) : A(1) / state.sum;
    ROLLED for (int64_t i = (int64_t)tid * V; i < p.n; i += kStream * V) {
      A v[V];
      load<T, V>(x + off[0] + i, v);
      UNROLL for (int j = 0; j < V; j++) {
        const A shifted = v[j] - state.max;
        v[j] = log ? shifted - scale : exp_of(shifted) * scale;
      }
      store<T, V>(y + off[1] + i, v);
    }
  }
}

template <class T> __global__ void softmax_columns(const T* x, T* y, Rows<2> p, bool log) {
  using A = Acc<T>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; row < p.count; row += threads) {
    int64_t off[2];
    p.at.at(row, off);
    auto state = Online<A>::none();
    for (int64_t i = 0; i < p.n; i++) state.take(widen(x[off[0] + i * p.step[0]]));
    const A scale = log ? log_of(state.sum) : A(1) / state.sum;
    for (int64_t i = 0; i < p.n; i++) {
      const A shifted = widen(x[off[0] + i * p.step[0]]) - state.max;
      y[off[1] + i * p.step[1]] = narrow<T>(log ? shifted - scale : exp_of(shifted) * scale);
    }
  }
}

/// softmax: dx = y * (dy - sum(dy * y)); log_softmax: dx = dy - e^y * sum(dy).
template <class A> DEV A share(A y, A g, bool log) { return log ? g : g * y; }
template <class A> DEV A slope(A y, A g, A sum, bool log) { return log ? g - exp_of(y) * sum : y * (g - sum); }

template <class T, int V, int G>
__global__ void __launch_bounds__(kBlock<G>) softmax_rows_backward(const T* y, const T* dy, T* dx, Rows<3> p, bool log) {
  DYN_SMEM(raw);
  using A = Acc<T>;
  A* scratch = reinterpret_cast<A*>(raw);
  const int tid = threadIdx.x, t = G == 32 ? tid & 31 : tid;
  for (int64_t row = first_row<G>(tid); row < p.count; row += row_step<G>()) {
    int64_t off[3];
    p.at.at(row, off);
    A v[kKeep / V][V], g[kKeep / V][V], sum = 0;
    UNROLL for (int k = 0; k < kKeep / V; k++) {
      const int64_t i = (int64_t)(k * G + t) * V;
      if (i >= p.n) continue;
      load<T, V>(y + off[0] + i, v[k]);
      load<T, V>(dy + off[1] + i, g[k]);
      UNROLL for (int j = 0; j < V; j++) sum += share(v[k][j], g[k][j], log);
    }
    sum = group_sum<G>(sum, scratch);
    UNROLL for (int k = 0; k < kKeep / V; k++) {
      const int64_t i = (int64_t)(k * G + t) * V;
      if (i >= p.n) continue;
      UNROLL for (int j = 0; j < V; j++) v[k][j] = slope(v[k][j], g[k][j], sum, log);
      store<T, V>(dx + off[2] + i, v[k]);
    }
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kStream) softmax_long_rows_backward(const T* y, const T* dy, T* dx, Rows<3> p, bool log) {
  DYN_SMEM(raw);
  using A = Acc<T>;
  A* scratch = reinterpret_cast<A*>(raw);
  const int tid = threadIdx.x;
  for (int64_t row = blockIdx.x; row < p.count; row += gridDim.x) {
    int64_t off[3];
    p.at.at(row, off);
    A sum = 0, v[V], g[V];
    ROLLED for (int64_t i = (int64_t)tid * V; i < p.n; i += kStream * V) {
      load<T, V>(y + off[0] + i, v);
      load<T, V>(dy + off[1] + i, g);
      UNROLL for (int j = 0; j < V; j++) sum += share(v[j], g[j], log);
    }
    sum = block_sum(sum, scratch);
    ROLLED for (int64_t i = (int64_t)tid * V; i < p.n; i += kStream * V) {
      load<T, V>(y + off[0] + i, v);
      load<T, V>(dy + off[1] + i, g);
      UNROLL for (int j = 0; j < V; j++) v[j] = slope(v[j], g[j], sum, log);
      store<T, V>(dx + off[2] + i, v);
    }
  }
}

template <class T> __global__ void softmax_columns_backward(const T* y, const T* dy, T* dx, Rows<3> p, bool log) {
  using A = Acc<T>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; row < p.count; row += threads) {
    int64_t off[3];
    p.at.at(row, off);
    A sum = 0;
    for (int64_t i = 0; i < p.n; i++) sum += share(widen(y[off[0] + i * p.step[0]]), widen(dy[off[1] + i * p.step[1]]), log);
    for (int64_t i = 0; i < p.n; i++) {
      const A v = widen(y[off[0] + i * p.step[0]]), g = widen(dy[off[1] + i * p.step[1]]);
      dx[off[2] + i * p.step[2]] = narrow<T>(slope(v, g, sum, log));
    }
  }
}

/// The rows of N tensors of one shape and dtype along `dim`; `vectors`: may all be read in 16-byte accesses?
template <int N> bool rows_of(const smalti_view* const (&views)[N], int32_t dim, int64_t width, Rows<N>& p, bool& vectors) {
  const smalti_view& x = *views[0];
  if (x.rank && (dim < 0 || dim >= x.rank)) return false;
  for (int k = 1; k < N; k++)
    if (!same_shape(x, *views[k]) || views[k]->dtype != x.dtype) return false;
  Axis<N> axes[8];
  int outer = 0;
  p = {};
  p.count = p.n = 1;
  for (int k = 0; k < N; k++) p.step[k] = 1;
  for (int d = 0; d < x.rank; d++) {
    if (d == dim) {
      p.n = x.shape[d];
      for (int k = 0; k < N; k++) p.step[k] = p.n == 1 ? 1 : views[k]->stride[d];
      continue;
    }
    axes[outer].n = x.shape[d];
    for (int k = 0; k < N; k++) axes[outer].stride[k] = views[k]->stride[d];
    outer++;
    p.count *= x.shape[d];
  }
  p.at = make_index(axes, outer);
  vectors = p.n % width == 0;
  for (int k = 0; k < N; k++) vectors = vectors && p.step[k] == 1 && aligned(views[k]->ptr) && steps_by(p.at, k, width);
  return true;
}
template <int N> bool along(const Rows<N>& p) {
  bool yes = p.n >= 16;  // shorter ones leave most of a warp idle
  for (int k = 0; k < N; k++) yes = yes && p.step[k] == 1;
  return yes;
}

/// Registers hold rows of up to this many elements. Rows that are read one by one are seldom long, f64 seldom asked
/// for: they have fewer kernels.
constexpr int kBlockRow = 256;

template <class T, int V> int forward(const T* x, T* y, const Rows<2>& p, bool log, void* stream) {
  int rc = 0;
  const int smem = 32 * sizeof(Online<Acc<T>>);
  if constexpr (sizeof(T) < 8) {
    if (p.n <= 32 * kKeep) {
      auto kernel = softmax_rows<T, V, 32>;
      LAUNCH(rc, kernel, row_grid<32>(p.count), dim3(256), smem, stream, x, y, p, log);
      return rc;
    }
  }
  if constexpr (V > 1) {
    if (p.n <= kBlockRow * kKeep) {
      auto kernel = softmax_rows<T, V, kBlockRow>;
      LAUNCH(rc, kernel, row_grid<kBlockRow>(p.count), dim3(kBlockRow), smem, stream, x, y, p, log);
      return rc;
    }
  }
  auto kernel = softmax_long_rows<T, V>;
  LAUNCH(rc, kernel, row_grid<kStream>(p.count), dim3(kStream), smem, stream, x, y, p, log);
  return rc;
}

template <class T, int V> int backward(const T* y, const T* dy, T* dx, const Rows<3>& p, bool log, void* stream) {
  int rc = 0;
  const int smem = 32 * sizeof(Acc<T>);
  if constexpr (sizeof(T) < 8) {
    if (p.n <= 32 * kKeep) {
      auto kernel = softmax_rows_backward<T, V, 32>;
      LAUNCH(rc, kernel, row_grid<32>(p.count), dim3(256), smem, stream, y, dy, dx, p, log);
      return rc;
    }
  }
  if constexpr (V > 1) {
    if (p.n <= kBlockRow * kKeep) {
      auto kernel = softmax_rows_backward<T, V, kBlockRow>;
      LAUNCH(rc, kernel, row_grid<kBlockRow>(p.count), dim3(kBlockRow), smem, stream, y, dy, dx, p, log);
      return rc;
    }
  }
  auto kernel = softmax_long_rows_backward<T, V>;
  LAUNCH(rc, kernel, row_grid<kStream>(p.count), dim3(kStream), smem, stream, y, dy, dx, p, log);
  return rc;
}

template <class T> int forward(const smalti_view& x, const smalti_view& y, int32_t dim, bool log, void* stream) {
  Rows<2> p;
  bool vectors;
  if (!rows_of<2>({&x, &y}, dim, kRowWidth<T>, p, vectors)) return kInvalid;
  if (p.count * p.n == 0) return 0;
  const T* from = (const T*)x.ptr;
  T* to = (T*)y.ptr;
  if (along(p)) return vectors ? forward<T, kRowWidth<T>>(from, to, p, log, stream) : forward<T, 1>(from, to, p, log, stream);
  int rc = 0;
  auto kernel = softmax_columns<T>;
  LAUNCH_FLAT(rc, kernel, dim3(grid_for(p.count, 128)), dim3(128), stream, from, to, p, log);
  return rc;
}

template <class T> int backward(const smalti_view& y, const smalti_view& dy, const smalti_view& dx, int32_t dim, bool log, void* stream) {
  Rows<3> p;
  bool vectors;
  if (!rows_of<3>({&y, &dy, &dx}, dim, kRowWidth<T>, p, vectors)) return kInvalid;
  if (p.count * p.n == 0) return 0;
  const T *out = (const T*)y.ptr, *grad = (const T*)dy.ptr;
  T* to = (T*)dx.ptr;
  if (along(p)) return vectors ? backward<T, kRowWidth<T>>(out, grad, to, p, log, stream) : backward<T, 1>(out, grad, to, p, log, stream);
  int rc = 0;
  auto kernel = softmax_columns_backward<T>;
  LAUNCH_FLAT(rc, kernel, dim3(grid_for(p.count, 128)), dim3(128), stream, out, grad, to, p, log);
  return rc;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_softmax_forward(const smalti_view* x, const smalti_view* y, int32_t dim, int32_t log, void* stream) {
  DISPATCH_FLOAT(x->dtype, T, return forward<T>(*x, *y, dim, log != 0, stream));
  return 0;
}

extern "C" int32_t smalti_softmax_backward(const smalti_view* y, const smalti_view* dy, const smalti_view* dx, int32_t dim,
                                           int32_t log, void* stream) {
  DISPATCH_FLOAT(y->dtype, T, return backward<T>(*y, *dy, *dx, dim, log != 0, stream));
  return 0;
}
