// Cross-entropy of logits, fused with the softmax, and negative log-likelihood. Logits are read once for maximum and
// log-sum (and once more, from the cache, where the whole target counts); the backward writes dx in one pass.
#include "../common/online.cuh"

namespace smalti {
namespace {

template <class A> struct Problem {
  const A *x, *probabilities;  // probabilities: null for labels
  const int64_t* labels;
  const A* weight;
  A *max, *log_sum, *loss, *share;
  const A *grad, *divisor;
  A *dx, *dtarget;
  int64_t rows, classes, ignore;
  A smoothing;
  bool each;  // a gradient for each row

  DEV A weight_of(int64_t c) const { return weight ? weight[c] : A(1); }
  /// The share of the target that smoothing gives to each class.
  DEV A spread() const { return smoothing / (A)classes; }
  /// Weighted target of class c.
  DEV A target(int64_t row, int64_t c) const {
    return weight_of(c) * fma_of(probabilities[row * classes + c], A(1) - smoothing, spread());
  }
  DEV bool valid(int64_t label) const { return label >= 0 && label < classes; }
};

template <class A, int V, int G> __global__ void __launch_bounds__(kBlock<G>) cross_entropy_forward(Problem<A> p) {
  DYN_SMEM(raw);
  A* scratch = reinterpret_cast<A*>(raw);
  const int tid = threadIdx.x, t = G == 32 ? tid & 31 : tid;
  for (int64_t row = first_row<G>(tid); row < p.rows; row += row_step<G>()) {
    const A* x = p.x + row * p.classes;
    auto s = Online<A>::none();
    for (int64_t c = (int64_t)t * V; c < p.classes; c += G * V) {
      A v[V];
      load<A, V>(x + c, v);
      UNROLL for (int j = 0; j < V; j++) s.take(v[j]);
    }
    const A max = group_max<G>(s.max, scratch);
    const A sum = group_sum<G>(s.sum * Online<A>::factor(s.max, max), scratch);
    const A log_sum = log_of(sum) + (max == -infinity<A>() ? max - max : A(0));  // of nothing finite: NaN
    // Differences to the maximum first: the log-sum-exp of large logits has no digits to spare.
    A loss = 0, share = 1;
    const int64_t label = p.labels ? p.labels[row] : 0;
    const bool ignored = p.labels && label == p.ignore, valid = !p.labels || p.valid(label);
    if (!ignored && (!p.labels || p.smoothing != A(0))) {
      for (int64_t c = t; c < p.classes; c += G) {
        const A distance = max - x[c] + log_sum;
        loss += (p.labels ? p.weight_of(c) : p.target(row, c)) * distance;
      }
      loss = group_sum<G>(loss, scratch);
    }
    if (ignored) {
      share = 0;
    } else if (p.labels && valid) {
      share = p.weight_of(label);
      const A plain = share * (max - x[label] + log_sum) * (A(1) - p.smoothing);
      loss = p.smoothing == A(0) ? plain : plain + p.spread() * loss;
    } else if (p.labels) {
      loss = share = infinity<A>() - infinity<A>();
    }
    if (t == 0) {
      p.max[row] = max;
      p.log_sum[row] = log_sum;
      p.loss[row] = loss;
      p.share[row] = share;
    }
  }
}

/// With p the softmax, u = weight * t after smoothing: dx = (p * sum(u) - u) * g, dt = -weight * log p * g.
template <class A, int V, int G> __global__ void __launch_bounds__(kBlock<G>) cross_entropy_backward(Problem<A> p) {
  DYN_SMEM(raw);
  A* scratch = reinterpret_cast<A*>(raw);
  const int tid = threadIdx.x, t = G == 32 ? tid & 31 : tid;
  const bool smooth = p.smoothing != A(0);
  A weight_sum = (A)p.classes;
  if (p.labels && p.weight && smooth) {
    weight_sum = 0;
    for (int64_t c = t; c < p.classes; c += G) weight_sum += p.weight[c];
    weight_sum = group_sum<G>(weight_sum, scratch);
  }
  for (int64_t row = first_row<G>(tid); row < p.rows; row += row_step<G>()) {
    const int64_t at = row * p.classes, label = p.labels ? p.labels[row] : 0;
    const A max = p.max[row], log_sum = p.log_sum[row];
    const A g = p.each ? p.grad[row] : p.divisor ? p.grad[0] / p.divisor[0] : p.grad[0];
    const bool ignored = p.labels && label == p.ignore, valid = p.labels && p.valid(label);
    A total = 0, keep = 0;
    if (!p.labels) {
      for (int64_t c = t; c < p.classes; c += G) total += p.target(row, c);
      total = group_sum<G>(total, scratch);
    } else if (valid && !ignored) {
      keep = (A(1) - p.smoothing) * p.weight_of(label);
      total = keep + p.spread() * weight_sum;
    }
    for (int64_t c = (int64_t)t * V; c < p.classes; c += G * V) {
      A x[V], w[V];
      load<A, V>(p.x + at + c, x);
      if (p.dx) {
        A out[V];
        UNROLL for (int j = 0; j < V; j++) {
          const A softmax = exp_of(x[j] - max - log_sum);
          const A u = !p.labels ? p.target(row, c + j) : (smooth ? p.spread() * p.weight_of(c + j) : A(0)) + (c + j == label ? keep : A(0));
          out[j] = ignored ? A(0) : (softmax * total - u) * g;
        }
        store<A, V>(p.dx + at + c, out);
      }
      if (p.dtarget) {
        load_or<V>(p.weight, c, A(1), w);
        UNROLL for (int j = 0; j < V; j++) w[j] *= (max - x[j] + log_sum) * g * (A(1) - p.smoothing);
        store<A, V>(p.dtarget + at + c, w);
      }
    }
  }
}

template <class A, int V> int run(const Problem<A>& p, bool back, void* stream) {
  int rc = 0;
  const int smem = 32 * sizeof(A);
  if (p.classes <= 1024) {
    auto kernel = back ? cross_entropy_backward<A, V, 32> : cross_entropy_forward<A, V, 32>;
    LAUNCH(rc, kernel, row_grid<32>(p.rows), dim3(256), smem, stream, p);
  } else {
    auto kernel = back ? cross_entropy_backward<A, V, 512> : cross_entropy_forward<A, V, 512>;
    LAUNCH(rc, kernel, row_grid<512>(p.rows), dim3(512), smem, stream, p);
  }
  return rc;
}
template <class A> int run(const Problem<A>& p, bool back, void* stream) {
  const bool whole = aligned(p.x) && aligned(p.dx) && aligned(p.dtarget) && aligned(p.weight) && p.classes % kRowWidth<A> == 0;
  return whole ? run<A, kRowWidth<A>>(p, back, stream) : run<A, 1>(p, back, stream);
}

/// What both directions are handed; false if it does not fit.
template <class A>
bool problem(const smalti_view& x, const smalti_view& target, const smalti_view* weight, const smalti_view& max,
             const smalti_view& log_sum, int64_t ignore, double smoothing, Problem<A>& p) {
  if (x.rank != 2 || !contiguous(x)) return false;
  p = {};
  p.rows = x.shape[0];
  p.classes = x.shape[1];
  const bool labels = target.dtype == SMALTI_I64;
  if (labels ? !is_vector(&target, p.rows, SMALTI_I64) : !is_like(&target, x)) return false;
  if (!is_vector_or_null(weight, p.classes, x.dtype) || !is_vector(&max, p.rows, x.dtype) || !is_vector(&log_sum, p.rows, x.dtype)) return false;
  p.x = (const A*)x.ptr;
  p.labels = labels ? (const int64_t*)target.ptr : nullptr;
  p.probabilities = labels ? nullptr : (const A*)target.ptr;
  p.weight = pointer<const A>(weight);
  p.max = (A*)max.ptr;
  p.log_sum = (A*)log_sum.ptr;
  p.ignore = ignore;
  p.smoothing = (A)smoothing;
  return true;
}

template <class T> __global__ void nll_forward(const T* x, const int64_t* labels, const T* weight, Acc<T>* loss, Acc<T>* share, int64_t rows,
                                               int64_t classes, int64_t ignore) {
  using A = Acc<T>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < rows; i += threads) {
    const int64_t y = labels[i];
    A w = 0, l = 0;
    if (y != ignore) {
      const bool valid = y >= 0 && y < classes;
      w = !valid ? infinity<A>() - infinity<A>() : weight ? widen(weight[y]) : A(1);
      l = valid ? -(w * widen(x[i * classes + y])) : w;
    }
    loss[i] = l;
    share[i] = w;
  }
}

template <class T> __global__ void nll_backward(const int64_t* labels, const T* weight, const T* grad, const Acc<T>* divisor, T* dx,
                                                int64_t rows, int64_t classes, int64_t ignore, bool each) {
  using A = Acc<T>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  ROLLED for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < rows * classes; i += threads) {
    const int64_t row = divide(i, classes), y = labels[row];
    A v = 0;
    if (y != ignore && y == i - row * classes) v = -((weight ? widen(weight[y]) : A(1)) * widen(grad[each ? row : 0]) / (divisor ? divisor[0] : A(1)));
    dx[i] = narrow<T>(v);
  }
}

/// The first of the wrong labels, by one block.
__global__ void __launch_bounds__(256) wrong_label(const int64_t* labels, int64_t* found, int64_t n, int64_t classes, int64_t ignore) {
  DYN_SMEM(raw);
  int64_t* scratch = reinterpret_cast<int64_t*>(raw);
  const int tid = threadIdx.x;
  int64_t first = INT64_MAX;
  ROLLED for (int64_t i = tid; i < n; i += blockDim.x) {
    const int64_t y = labels[i];
    if (y != ignore && (y < 0 || y >= classes) && i < first) first = i;
  }
  scratch[tid] = first;
  __syncthreads();
  if (tid == 0) {
    ROLLED for (int t = 1; t < 256; t++) first = scratch[t] < first ? scratch[t] : first;
    found[0] = first == INT64_MAX ? -1 : first;
    found[1] = first == INT64_MAX ? -1 : labels[first];
  }
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_cross_entropy_forward(const smalti_view* x, const smalti_view* target, const smalti_view* weight,
                                                const smalti_view* max, const smalti_view* log_sum, const smalti_view* loss,
                                                const smalti_view* share, int64_t ignore, double smoothing, void* stream) {
  DISPATCH_REAL(x->dtype, A, {
    Problem<A> p;
    if (!problem(*x, *target, weight, *max, *log_sum, ignore, smoothing, p)) return kInvalid;
    if (!is_vector(loss, p.rows, x->dtype) || !is_vector(share, p.rows, x->dtype)) return kInvalid;
    p.loss = (A*)loss->ptr;
    p.share = (A*)share->ptr;
    return p.rows ? run(p, false, stream) : 0;
  });
  return 0;
}

extern "C" int32_t smalti_cross_entropy_backward(const smalti_view* x, const smalti_view* target, const smalti_view* weight,
                                                 const smalti_view* max, const smalti_view* log_sum, const smalti_view* grad,
                                                 const smalti_view* divisor, const smalti_view* dx, const smalti_view* dtarget,
                                                 int64_t ignore, double smoothing, void* stream) {
  DISPATCH_REAL(x->dtype, A, {
    Problem<A> p;
    if (!problem(*x, *target, weight, *max, *log_sum, ignore, smoothing, p)) return kInvalid;
    if (!is_vector_or_null(divisor, 1, x->dtype) || (dx && !is_like(dx, *x)) || (dtarget && (p.labels || !is_like(dtarget, *x)))) return kInvalid;
    p.each = !divisor && count(*grad) == p.rows && grad->rank > 0;
    if (!is_vector(grad, p.each ? p.rows : 1, x->dtype)) return kInvalid;
    p.grad = (const A*)grad->ptr;
    p.divisor = pointer<const A>(divisor);
    p.dx = pointer<A>(dx);
    p.dtarget = pointer<A>(dtarget);
    return p.rows && p.classes ? run(p, true, stream) : 0;
  });
  return 0;
}

extern "C" int32_t smalti_nll_forward(const smalti_view* x, const smalti_view* labels, const smalti_view* weight,
                                      const smalti_view* loss, const smalti_view* share, int64_t ignore, void* stream) {
  if (x->rank != 2 || !contiguous(*x)) return kInvalid;
  const int64_t rows = x->shape[0], classes = x->shape[1];
  const int32_t wide = computed_in(x->dtype);
  if (!is_vector(labels, rows, SMALTI_I64) || !is_vector_or_null(weight, classes, x->dtype)) return kInvalid;
  if (!is_vector(loss, rows, wide) || !is_vector(share, rows, wide)) return kInvalid;
  int rc = 0;
  if (rows == 0) return rc;
  DISPATCH_FLOAT(x->dtype, T, {
    auto kernel = nll_forward<T>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(rows, 128)), dim3(128), stream, (const T*)x->ptr, (const int64_t*)labels->ptr,
                pointer<const T>(weight), (Acc<T>*)loss->ptr, (Acc<T>*)share->ptr, rows, classes, ignore);
  });
  return rc;
}

extern "C" int32_t smalti_nll_backward(const smalti_view* labels, const smalti_view* weight, const smalti_view* grad,
                                       const smalti_view* divisor, const smalti_view* dx, int64_t ignore, void* stream) {
  if (dx->rank != 2 || !contiguous(*dx)) return kInvalid;
  const int64_t rows = dx->shape[0], classes = dx->shape[1];
  const bool each = !divisor && grad->rank > 0 && count(*grad) == rows;
  if (!is_vector(labels, rows, SMALTI_I64) || !is_vector_or_null(weight, classes, dx->dtype)) return kInvalid;
  if (!is_vector(grad, each ? rows : 1, dx->dtype) || !is_vector_or_null(divisor, 1, computed_in(dx->dtype))) return kInvalid;
  int rc = 0;
  if (rows * classes == 0) return rc;
  DISPATCH_FLOAT(dx->dtype, T, {
    auto kernel = nll_backward<T>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(rows * classes, 256)), dim3(256), stream, (const int64_t*)labels->ptr, pointer<const T>(weight),
                (const T*)grad->ptr, pointer<const Acc<T>>(divisor), (T*)dx->ptr, rows, classes, ignore, each);
  });
  return rc;
}

extern "C" int32_t smalti_wrong_label(const smalti_view* labels, const smalti_view* found, int64_t classes, int64_t ignore, void* stream) {
  const int64_t n = count(*labels);
  if (!is_vector(labels, n, SMALTI_I64) || !is_vector(found, 2, SMALTI_I64)) return kInvalid;
  int rc = 0;
  LAUNCH(rc, wrong_label, dim3(1), dim3(256), 256 * sizeof(int64_t), stream, (const int64_t*)labels->ptr, (int64_t*)found->ptr, n, classes,
         ignore);
  return rc;
}
