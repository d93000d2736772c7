// Rows to unit norm. Rows are read twice, the second time from the first-level cache.
#include "../common/rows.cuh"

namespace smalti {
namespace {

template <class T> struct Problem {
  using A = Acc<T>;
  const T *x, *dy;
  T* y;  // or dx
  A* norm;
  int64_t rows, n;
  A p, eps;

  DEV A term(A v) const { return p == A(2) ? v * v : p == A(1) ? abs_of(v) : pow_of(abs_of(v), p); }
  DEV A root(A sum) const { return p == A(2) ? sqrt_of(sum) : p == A(1) ? sum : pow_of(sum, A(1) / p); }
  /// Derivative of the norm by an element.
  DEV A slope(A x, A scale) const {
    if (p == A(2)) return x * scale;
    const A sign = x > A(0) ? A(1) : x < A(0) ? A(-1) : A(0);
    return p == A(1) || sign == A(0) ? sign : sign * pow_of(abs_of(x) * scale, p - A(1));
  }
};

template <class T, int V, int G> __global__ void __launch_bounds__(kBlock<G>) normalize_rows(Problem<T> p) {
  DYN_SMEM(raw);
  using A = Acc<T>;
  A* scratch = reinterpret_cast<A*>(raw);
  const int tid = threadIdx.x, t = G == 32 ? tid & 31 : tid;
  for (int64_t row = first_row<G>(tid); row < p.rows; row += row_step<G>()) {
    A v[V], sum = 0;
    for (int64_t i = (int64_t)t * V; i < p.n; i += G * V) {
      load<T, V>(p.x + row * p.n + i, v);
      UNROLL for (int j = 0; j < V; j++) sum += p.term(v[j]);
    }
    const A norm = p.root(group_sum<G>(sum, scratch));
    const A scale = A(1) / (norm > p.eps || norm != norm ? norm : p.eps);
    for (int64_t i = (int64_t)t * V; i < p.n; i += G * V) {
      load<T, V>(p.x + row * p.n + i, v);
      UNROLL for (int j = 0; j < V; j++) v[j] *= scale;
      store<T, V>(p.y + row * p.n + i, v);
    }
    if (t == 0) p.norm[row] = norm;
  }
}

/// With n = |x|: dx = dy / n - sum(dy * x) / n^2 * dn/dx; dy / eps where eps bounds the norm.
template <class T, int V, int G> __global__ void __launch_bounds__(kBlock<G>) normalize_rows_backward(Problem<T> p) {
  DYN_SMEM(raw);
  using A = Acc<T>;
  A* scratch = reinterpret_cast<A*>(raw);
  const int tid = threadIdx.x, t = G == 32 ? tid & 31 : tid;
  for (int64_t row = first_row<G>(tid); row < p.rows; row += row_step<G>()) {
    const A norm = p.norm[row];
    const bool bounded = norm < p.eps || norm == A(0);
    const A scale = A(1) / (bounded ? p.eps : norm);
    A v[V], g[V], dot = 0;
    for (int64_t i = (int64_t)t * V; i < p.n; i += G * V) {
      load<T, V>(p.x + row * p.n + i, v);
      load<T, V>(p.dy + row * p.n + i, g);
      UNROLL for (int j = 0; j < V; j++) dot = fma_of(v[j], g[j], dot);
    }
    const A share = group_sum<G>(dot, scratch) * scale * scale;
    for (int64_t i = (int64_t)t * V; i < p.n; i += G * V) {
      load<T, V>(p.x + row * p.n + i, v);
      load<T, V>(p.dy + row * p.n + i, g);
      UNROLL for (int j = 0; j < V; j++) v[j] = bounded ? g[j] * scale : g[j] * scale - share * p.slope(v[j], scale);
      store<T, V>(p.y + row * p.n + i, v);
    }
  }
}

template <class T, int V> int run(const Problem<T>& p, void* stream) {
  int rc = 0;
  const int smem = 32 * sizeof(Acc<T>);
  if constexpr (V > 1)  // rows that are read one by one are seldom long, f64 seldom asked for: they have fewer kernels
    if (p.n > 1024) {
      auto kernel = p.dy ? normalize_rows_backward<T, V, 512> : normalize_rows<T, V, 512>;
      LAUNCH(rc, kernel, row_grid<512>(p.rows), dim3(512), smem, stream, p);
      return rc;
    }
  auto kernel = p.dy ? normalize_rows_backward<T, V, 32> : normalize_rows<T, V, 32>;
  LAUNCH(rc, kernel, row_grid<32>(p.rows), dim3(256), smem, stream, p);
  return rc;
}

int normalize(const smalti_view& x, const smalti_view* dy, const smalti_view* y, const smalti_view* norm, double power, double eps, void* stream) {
  if (x.rank != 2 || !contiguous(x) || !is_like(y, x) || (dy && !is_like(dy, x))) return kInvalid;
  if (!is_vector(norm, x.shape[0], computed_in(x.dtype)) || !(power > 0)) return kInvalid;
  if (x.shape[0] == 0) return 0;
  const bool whole = aligned(x.ptr) && aligned(y->ptr) && aligned(pointer<void>(dy));
  DISPATCH_FLOAT(x.dtype, T, {
    using A = Acc<T>;
    const Problem<T> p{(const T*)x.ptr, pointer<const T>(dy), (T*)y->ptr, (A*)norm->ptr, x.shape[0], x.shape[1], (A)power, (A)eps};
    return whole && p.n % kRowWidth<T> == 0 ? run<T, kRowWidth<T>>(p, stream) : run<T, 1>(p, stream);
  });
  return 0;
}

}  // namespace
}  // namespace smalti

extern "C" int32_t smalti_normalize_forward(const smalti_view* x, const smalti_view* y, const smalti_view* norm, double p,
                                            double eps, void* stream) {
  return smalti::normalize(*x, nullptr, y, norm, p, eps, stream);
}

extern "C" int32_t smalti_normalize_backward(const smalti_view* x, const smalti_view* dy, const smalti_view* norm,
                                             const smalti_view* dx, double p, double eps, void* stream) {
  return smalti::normalize(*x, dy, dx, norm, p, eps, stream);
}
