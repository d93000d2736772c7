// Layer norm (alone or after a residual sum) and rms norm over contiguous rows.
//
// A group of threads holds a row in registers, 16 numbers a thread, so that each element is read once. In the
// backward a thread has the same columns of all rows that its block works on: it sums their share of dweight and
// dbias in registers, and a second kernel adds the blocks' shares in order. Rows of more than 8192 elements are
// streamed, and their parameters' gradients are a fold over columns.
#include "../common/fold.cuh"

namespace smalti {
namespace {

constexpr int kKeep = 16;
/// Threads of a block that streams a row, at most.
constexpr int kStream = 512;

template <class T> struct Forward {
  using A = Acc<T>;
  const T *x, *residual;
  const A *weight, *bias;
  T *y, *sum;
  A *mean, *rstd;  // mean: null for rms norm
  A eps;
  int64_t rows, n;

  /// V elements of the row to be normalised; with a residual the sum is rounded and stored first.
  template <int V> DEV void read(int64_t at, A (&v)[V]) const {
    load<T, V>(x + at, v);
    if (!residual) return;
    A r[V];
    load<T, V>(residual + at, r);
    UNROLL for (int j = 0; j < V; j++) v[j] = widen(narrow<T>(v[j] + r[j]));
    store<T, V>(sum + at, v);
  }
  template <int V> DEV void write(int64_t row, int64_t i, A m, A s, A (&v)[V]) const {
    A w[V], b[V];
    load_or<V>(weight, i, A(1), w);
    load_or<V>(bias, i, A(0), b);
    UNROLL for (int j = 0; j < V; j++) v[j] = fma_of((v[j] - m) * s, w[j], b[j]);
    store<T, V>(y + row * n + i, v);
  }
};

template <class T, int V, int G> __global__ void __launch_bounds__(kBlock<G>) layer_norm_rows(Forward<T> p) {
  DYN_SMEM(raw);
  using A = Acc<T>;
  A* scratch = reinterpret_cast<A*>(raw);
  const int tid = threadIdx.x, t = G == 32 ? tid & 31 : tid;
  const A share = A(1) / (A)p.n;
  for (int64_t row = first_row<G>(tid); row < p.rows; row += row_step<G>()) {
    A v[kKeep / V][V], m = 0, squares = 0;
    UNROLL for (int k = 0; k < kKeep / V; k++) {
      const int64_t i = (int64_t)(k * G + t) * V;
      if (i >= p.n) continue;
      p.template read<V>(row * p.n + i, v[k]);
      UNROLL for (int j = 0; j < V; j++) m += v[k][j];
    }
    m = p.mean ? group_sum<G>(m, scratch) * share : A(0);
    UNROLL for (int k = 0; k < kKeep / V; k++) {
      if ((int64_t)(k * G + t) * V >= p.n) continue;
      UNROLL for (int j = 0; j < V; j++) squares += (v[k][j] - m) * (v[k][j] - m);
    }
    const A s = A(1) / sqrt_of(group_sum<G>(squares, scratch) * share + p.eps);
    UNROLL for (int k = 0; k < kKeep / V; k++) {
      const int64_t i = (int64_t)(k * G + t) * V;
      if (i < p.n) p.template write<V>(row, i, m, s, v[k]);
    }
    if (t == 0) {
      if (p.mean) p.mean[row] = m;
      p.rstd[row] = s;
    }
  }
}

/// Rows of any length: the mean, the squares of what is left, the result. A residual sum is re-read as stored.
template <class T, int V> __global__ void __launch_bounds__(kStream) layer_norm_long_rows(Forward<T> p) {
  DYN_SMEM(raw);
  using A = Acc<T>;
  A* scratch = reinterpret_cast<A*>(raw);
  const int tid = threadIdx.x, step = blockDim.x * V;
  const A share = A(1) / (A)p.n;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const T* from = (p.residual ? p.sum : p.x) + row * p.n;
    A v[V], m = 0, squares = 0;
    if (p.mean || p.residual) {
      ROLLED for (int64_t i = (int64_t)tid * V; i < p.n; i += step) {
        p.template read<V>(row * p.n + i, v);
        UNROLL for (int j = 0; j < V; j++) m += v[j];
      }
      m = block_sum(m, scratch) * share;
    }
    if (!p.mean) m = 0;
    ROLLED for (int64_t i = (int64_t)tid * V; i < p.n; i += step) {
      load<T, V>(from + i, v);
      UNROLL for (int j = 0; j < V; j++) squares += (v[j] - m) * (v[j] - m);
    }
    const A s = A(1) / sqrt_of(block_sum(squares, scratch) * share + p.eps);
    ROLLED for (int64_t i = (int64_t)tid * V; i < p.n; i += step) {
      load<T, V>(from + i, v);
      p.template write<V>(row, i, m, s, v);
    }
    if (tid == 0) {
      if (p.mean) p.mean[row] = m;
      p.rstd[row] = s;
    }
  }
}

/// With xhat = (x - mean) * rstd and g = dy * weight:
/// dx = rstd * (g - mean(g) - xhat * mean(g * xhat)); rms norm without both means of x and g.
template <class T> struct Backward {
  using A = Acc<T>;
  const T *x, *dy, *pending;
  const A *weight, *mean, *rstd;
  T* dx;
  A* shares;  // [blocks][2][n], or null
  int64_t rows, n;

  template <int V> DEV void write(int64_t at, int64_t i, A m, A s, A mean_g, A slope, const A (&x_)[V], const A (&g)[V]) const {
    A w[V], out[V], p[V];
    load_or<V>(weight, i, A(1), w);
    if (pending) load<T, V>(pending + at, p);
    UNROLL for (int j = 0; j < V; j++) {
      out[j] = s * (g[j] * w[j] - mean_g - (x_[j] - m) * slope);
      if (pending) out[j] += p[j];
    }
    store<T, V>(dx + at, out);
  }
};

template <class T, int V, int G> __global__ void __launch_bounds__(kBlock<G>) layer_norm_rows_backward(Backward<T> p) {
  DYN_SMEM(raw);
  using A = Acc<T>;
  A* scratch = reinterpret_cast<A*>(raw);
  const int tid = threadIdx.x, t = G == 32 ? tid & 31 : tid;
  const A share = A(1) / (A)p.n;
  A dw[kKeep / V][V], db[kKeep / V][V];
  UNROLL for (int k = 0; k < kKeep / V; k++) UNROLL for (int j = 0; j < V; j++) dw[k][j] = db[k][j] = 0;
  for (int64_t row = first_row<G>(tid); row < p.rows; row += row_step<G>()) {
    const A m = p.mean ? p.mean[row] : A(0), s = p.rstd[row];
    A x[kKeep / V][V], g[kKeep / V][V], sum = 0, dot = 0;
    UNROLL for (int k = 0; k < kKeep / V; k++) {
      const int64_t i = (int64_t)(k * G + t) * V;
      if (i >= p.n) continue;
      load<T, V>(p.x + row * p.n + i, x[k]);
      load<T, V>(p.dy + row * p.n + i, g[k]);
      A w[V];
      load_or<V>(p.weight, i, A(1), w);
      UNROLL for (int j = 0; j < V; j++) {
        const A gw = g[k][j] * w[j], d = x[k][j] - m;
        sum += gw;
        dot = fma_of(gw, d, dot);
        dw[k][j] = fma_of(d * s, g[k][j], dw[k][j]);
        db[k][j] += g[k][j];
      }
    }
    if (!p.dx) continue;  // the same for all threads
    const A mean_g = p.mean ? group_sum<G>(sum, scratch) * share : A(0);
    const A slope = group_sum<G>(dot, scratch) * s * s * share;
    UNROLL for (int k = 0; k < kKeep / V; k++) {
      const int64_t i = (int64_t)(k * G + t) * V;
      if (i < p.n) p.template write<V>(row * p.n + i, i, m, s, mean_g, slope, x[k], g[k]);
    }
  }
  if (!p.shares) return;
  A* out = p.shares + (int64_t)blockIdx.x * 2 * p.n;
  if (G > 32) {
    UNROLL for (int k = 0; k < kKeep / V; k++) {
      const int64_t i = (int64_t)(k * G + t) * V;
      if (i >= p.n) continue;
      UNROLL for (int j = 0; j < V; j++) {
        out[i + j] = dw[k][j];
        out[p.n + i + j] = db[k][j];
      }
    }
    return;
  }
  // The eight warps of the block, in order.
  const int n = (int)p.n, warp = tid >> 5;
  UNROLL for (int k = 0; k < kKeep / V; k++) {
    const int i = (k * 32 + t) * V;
    if (i >= n) continue;
    UNROLL for (int j = 0; j < V; j++) {
      scratch[warp * 2 * n + i + j] = dw[k][j];
      scratch[warp * 2 * n + n + i + j] = db[k][j];
    }
  }
  __syncthreads();
  for (int i = tid; i < 2 * n; i += 256) {
    A total = scratch[i];
    for (int w = 1; w < 8; w++) total += scratch[w * 2 * n + i];
    out[i] = total;
  }
}

template <class T, int V> __global__ void __launch_bounds__(kStream) layer_norm_long_rows_backward(Backward<T> p) {
  DYN_SMEM(raw);
  using A = Acc<T>;
  A* scratch = reinterpret_cast<A*>(raw);
  const int tid = threadIdx.x, step = blockDim.x * V;
  const A share = A(1) / (A)p.n;
  for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const A m = p.mean ? p.mean[row] : A(0), s = p.rstd[row];
    A x[V], g[V], w[V], sum = 0, dot = 0;
    ROLLED for (int64_t i = (int64_t)tid * V; i < p.n; i += step) {
      load<T, V>(p.x + row * p.n + i, x);
      load<T, V>(p.dy + row * p.n + i, g);
      load_or<V>(p.weight, i, A(1), w);
      UNROLL for (int j = 0; j < V; j++) {
        sum += g[j] * w[j];
        dot = fma_of(g[j] * w[j], x[j] - m, dot);
      }
    }
    sum = block_sum(sum, scratch);
    dot = block_sum(dot, scratch);
    const A mean_g = p.mean ? sum * share : A(0), slope = dot * s * s * share;
    ROLLED for (int64_t i = (int64_t)tid * V; i < p.n; i += step) {
      load<T, V>(p.x + row * p.n + i, x);
      load<T, V>(p.dy + row * p.n + i, g);
      p.template write<V>(row * p.n + i, i, m, s, mean_g, slope, x, g);
    }
  }
}

/// The blocks' shares, in order.
template <class A_> struct Shares : OneByOne<Shares<A_>> {
  using A = A_;
  using In = A_;
  const A *x;
  A *dweight, *dbias;
  int64_t width;
  template <int V> DEV void load(int64_t off, A (&v)[V]) const { load_numbers<V>(x + off, v); }
  DEV A start() const { return 0; }
  DEV A join(A a, A b) const { return a + b; }
  template <class C> DEV void take(A& a, A v, int64_t, const C&) const { a += v; }
  DEV void finish(A a, int64_t, int64_t r) const {
    A* out = r < width ? dweight : dbias;
    if (out) out[r < width ? r : r - width] = a;
  }
};

/// dweight and dbias of long rows, straight from x and dy.
template <class T> struct Parameters : OneByOne<Parameters<T>> {
  using R = Acc<T>;
  struct In { R x, g; };
  struct A { R dot, sum; };
  const T *x, *dy;
  const R *mean, *rstd;
  R *dweight, *dbias;
  template <int V> DEV void load(int64_t off, In (&v)[V]) const {
    R a[V], b[V];
    smalti::load<T, V>(x + off, a);
    smalti::load<T, V>(dy + off, b);
    UNROLL for (int j = 0; j < V; j++) v[j] = {a[j], b[j]};
  }
  DEV A start() const { return {R(0), R(0)}; }
  DEV A join(const A& a, const A& b) const { return {a.dot + b.dot, a.sum + b.sum}; }
  template <class C> DEV void take(A& a, const In& v, int64_t row, const C&) const {
    a.dot += (v.x - (mean ? mean[row] : R(0))) * rstd[row] * v.g;
    a.sum += v.g;
  }
  DEV void finish(const A& a, int64_t, int64_t r) const {
    if (dweight) dweight[r] = a.dot;
    if (dbias) dbias[r] = a.sum;
  }
};

/// Do registers hold a row? Not one that is read element by element: those, and f64, are seldom asked for, and streaming
/// does for all of them.
template <int V> bool in_registers(int64_t n) { return V > 1 && n <= 512 * kKeep; }
/// Threads that stream a row.
template <int V> dim3 streaming(int64_t n) {
  const int64_t warps = (n + 32 * V - 1) / (32 * V);
  return dim3((unsigned)(warps * 32 < kStream ? warps * 32 : kStream));
}
/// Blocks of the backward: 16 warps a multiprocessor, each with rows enough to be worth a share.
int64_t backward_blocks(int64_t rows, int64_t n) {
  const int64_t at_once = n <= 32 * kKeep ? 8 : 1, most = n <= 32 * kKeep || n > 128 * kKeep ? 2 * 132 : 4 * 132;
  const int64_t want = (rows + 4 * at_once - 1) / (4 * at_once);
  return want < 1 ? 1 : want < most ? want : most;
}
template <class T> FoldPlan parameters_plan(const smalti_view& x, const void* pair) {
  const smalti_view in = matrix(x.ptr, x.dtype, x.shape[0], x.shape[1]), out = matrix(nullptr, x.dtype, 1, x.shape[1]);
  FoldPlan plan;
  plan_fold(in, out, kFoldWidth<T>, plan, pair);
  return plan;
}

template <class T, int V> int forward(const Forward<T>& p, void* stream) {
  int rc = 0;
  const int smem = 32 * sizeof(Acc<T>);
  if constexpr (V > 1) {
    if (p.n <= 32 * kKeep) {
      auto kernel = layer_norm_rows<T, V, 32>;
      LAUNCH(rc, kernel, row_grid<32>(p.rows), dim3(256), smem, stream, p);
      return rc;
    }
    if (p.n <= 128 * kKeep) {
      auto kernel = layer_norm_rows<T, V, 128>;
      LAUNCH(rc, kernel, row_grid<128>(p.rows), dim3(128), smem, stream, p);
      return rc;
    }
    if (in_registers<V>(p.n)) {
      auto kernel = layer_norm_rows<T, V, 512>;
      LAUNCH(rc, kernel, row_grid<512>(p.rows), dim3(512), smem, stream, p);
      return rc;
    }
  }
  auto kernel = layer_norm_long_rows<T, V>;
  LAUNCH(rc, kernel, row_grid<kStream>(p.rows), streaming<V>(p.n), smem, stream, p);
  return rc;
}

template <class T, int V> int backward_rows(const Backward<T>& p, void* stream) {
  using A = Acc<T>;
  int rc = 0;
  const dim3 blocks((unsigned)backward_blocks(p.rows, p.n));
  if constexpr (V > 1) {
    if (p.n <= 32 * kKeep) {
      auto kernel = layer_norm_rows_backward<T, V, 32>;
      LAUNCH(rc, kernel, blocks, dim3(256), (p.shares ? 16 * p.n : 0) * sizeof(A), stream, p);
      return rc;
    }
    if (p.n <= 128 * kKeep) {
      auto kernel = layer_norm_rows_backward<T, V, 128>;
      LAUNCH(rc, kernel, blocks, dim3(128), 32 * sizeof(A), stream, p);
      return rc;
    }
    if (in_registers<V>(p.n)) {
      auto kernel = layer_norm_rows_backward<T, V, 512>;
      LAUNCH(rc, kernel, blocks, dim3(512), 32 * sizeof(A), stream, p);
      return rc;
    }
  }
  if (!p.dx) return rc;
  auto kernel = layer_norm_long_rows_backward<T, V>;
  LAUNCH(rc, kernel, row_grid<kStream>(p.rows), streaming<V>(p.n), 32 * sizeof(A), stream, p);
  return rc;
}

/// dx, and the parameters' gradients by the blocks' shares or by a fold.
template <class T, int V>
int backward(Backward<T> p, const smalti_view& x, Acc<T>* dweight, Acc<T>* dbias, void* workspace, void* stream) {
  using A = Acc<T>;
  const bool affine = dweight || dbias, shares = affine && in_registers<V>(p.n);
  if (shares && !workspace) return kInvalid;
  p.shares = shares ? (A*)workspace : nullptr;
  const int rc = backward_rows<T, V>(p, stream);
  if (rc || !affine) return rc;
  if (shares) {
    Shares<A> f{};
    f.x = p.shares;
    f.dweight = dweight;
    f.dbias = dbias;
    f.width = p.n;
    const smalti_view in = matrix(p.shares, SMALTI_F32, backward_blocks(p.rows, p.n), 2 * p.n), out = matrix(nullptr, SMALTI_F32, 1, 2 * p.n);
    FoldPlan plan;
    plan_fold(in, out, kFoldWidth<A>, plan);
    plan.chunk = plan.n;
    plan.chunks = 1;
    return launch_fold<kFoldWidth<A>>(f, plan, nullptr, stream);
  }
  Parameters<T> f{};
  f.x = p.x;
  f.dy = p.dy;
  f.mean = p.mean;
  f.rstd = p.rstd;
  f.dweight = dweight;
  f.dbias = dbias;
  return launch_fold<kFoldWidth<T>>(f, parameters_plan<T>(x, p.dy), workspace, stream);
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_layer_norm_forward(const smalti_view* x, const smalti_view* residual, const smalti_view* weight,
                                             const smalti_view* bias, const smalti_view* y, const smalti_view* sum,
                                             const smalti_view* mean, const smalti_view* rstd, double eps, void* stream) {
  if (x->rank != 2 || !contiguous(*x) || !is_like(y, *x)) return kInvalid;
  const int64_t rows = x->shape[0], n = x->shape[1];
  const int32_t wide = computed_in(x->dtype);
  if (!residual != !sum || (residual && (!is_like(residual, *x) || !is_like(sum, *x)))) return kInvalid;
  if (!is_vector_or_null(weight, n, wide) || !is_vector_or_null(bias, n, wide)) return kInvalid;
  if (!is_vector_or_null(mean, rows, wide) || !is_vector(rstd, rows, wide)) return kInvalid;
  if (rows == 0) return 0;
  const bool whole = aligned(x->ptr) && aligned(y->ptr) && aligned(pointer<void>(residual)) && aligned(pointer<void>(sum)) &&
                     aligned(pointer<void>(weight)) && aligned(pointer<void>(bias));
  DISPATCH_FLOAT(x->dtype, T, {
    using A = Acc<T>;
    const Forward<T> p{(const T*)x->ptr,   pointer<const T>(residual), pointer<const A>(weight), pointer<const A>(bias), (T*)y->ptr,
                       pointer<T>(sum), pointer<A>(mean),           (A*)rstd->ptr,            (A)eps,                 rows,
                       n};
    return whole && n % kRowWidth<T> == 0 ? forward<T, kRowWidth<T>>(p, stream) : forward<T, 1>(p, stream);
  });
  return 0;
}

extern "C" int64_t smalti_layer_norm_backward_workspace(const smalti_view* x, int32_t affine) {
  if (x->rank != 2 || x->dtype > SMALTI_F64) return -1;
  if (!affine) return 0;
  // Which way is taken, and in how many chunks, depends on the other tensors' alignment too: room for either.
  const int64_t rows = x->shape[0], n = x->shape[1], shares = n <= 512 * kKeep ? backward_blocks(rows, n) * 2 * n * 4 : 0;
  DISPATCH_FLOAT(x->dtype, T, {
    const int64_t fold = fold_workspace<Parameters<T>>(parameters_plan<T>(*x, nullptr));
    return fold > shares ? fold : shares;
  });
  return -1;
}

extern "C" int32_t smalti_layer_norm_backward(const smalti_view* x, const smalti_view* dy, const smalti_view* weight,
                                              const smalti_view* mean, const smalti_view* rstd, const smalti_view* pending,
                                              const smalti_view* dx, const smalti_view* dweight, const smalti_view* dbias,
                                              void* workspace, void* stream) {
  if (x->rank != 2 || !contiguous(*x) || !is_like(dy, *x)) return kInvalid;
  const int64_t rows = x->shape[0], n = x->shape[1];
  const int32_t wide = computed_in(x->dtype);
  if ((dx && !is_like(dx, *x)) || (pending && !is_like(pending, *x))) return kInvalid;
  if (!is_vector_or_null(weight, n, wide) || !is_vector_or_null(dweight, n, wide) || !is_vector_or_null(dbias, n, wide)) return kInvalid;
  if (!is_vector_or_null(mean, rows, wide) || !is_vector(rstd, rows, wide)) return kInvalid;
  if (n == 0 || (rows == 0 && !dweight && !dbias)) return 0;
  const bool whole = aligned(x->ptr) && aligned(dy->ptr) && aligned(pointer<void>(pending)) && aligned(pointer<void>(dx)) &&
                     aligned(pointer<void>(weight));
  DISPATCH_FLOAT(x->dtype, T, {
    using A = Acc<T>;
    const Backward<T> p{(const T*)x->ptr, (const T*)dy->ptr, pointer<const T>(pending), pointer<const A>(weight), pointer<const A>(mean),
                        (const A*)rstd->ptr, pointer<T>(dx), nullptr, rows, n};
    A *dw = pointer<A>(dweight), *db = pointer<A>(dbias);
    return whole && n % kRowWidth<T> == 0 ? backward<T, kRowWidth<T>>(p, *x, dw, db, workspace, stream)
                                          : backward<T, 1>(p, *x, dw, db, workspace, stream);
  });
  return 0;
}
