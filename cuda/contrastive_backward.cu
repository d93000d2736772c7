// Contrastive softmax, backward by recomputation (kernels.md, C3, option a): for each chunk of rows and columns
// one kernel recomputes the logits and writes g = dS, two products take it to dQ = s g K and dK = s g^T Q. At the
// positive g is -(miss of the row + miss of the column), in f32, before it is rounded. Everything is summed in a
// fixed order: the same bits in every run.
#include "contrastive/slopes.cuh"
#include "common/hopper.cuh"
#include "common/reduce.cuh"

namespace smalti {
namespace contrastive {

/// The tile's g to memory; half types by way of shared memory, in pieces of 16 bytes.
template <class T> DEV void store_tile(Fragment<Acc<T>>& s, const Slopes<T>& p, int64_t r0, int64_t c0, T* shared, const Place& at, int tid) {
  if constexpr (sizeof(T) == 2) {
    UNROLL for (int i = 0; i < 8; i++)
      UNROLL for (int j = 0; j < 8; j += 2)
        *(uint32_t*)(shared + at.row(i) * LD_M + at.column(j)) = pack(T{}, s.at(i, j), s.at(i, j + 1));
    __syncthreads();
    for (int i = tid; i < TILE * TILE / 8; i += THREADS) {
      const int r = i >> 4, c = (i & 15) * 8;
      const int64_t row = r0 - p.r0 + r, column = c0 - p.c0 + c;
      if (r0 + r < p.r_end && column < p.ld) *(uint4*)(p.g + row * p.ld + column) = *(const uint4*)(shared + r * LD_M + c);
    }
  } else {
    UNROLL for (int i = 0; i < 8; i++)
      UNROLL for (int j = 0; j < 8; j++) {
        const int64_t row = r0 - p.r0 + at.row(i), column = c0 - p.c0 + at.column(j);
        if (r0 + at.row(i) < p.r_end && column < p.ld) p.g[row * p.ld + column] = s.at(i, j);
      }
  }
}

template <class T, bool KM>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 2 ? 2 : 1) slopes(const Slopes<T> p) {
  using A = Acc<T>;
  DYN_SMEM(shared);
  const int tid = threadIdx.x;
  const Place at(tid);
  const int64_t n = p.q.rows, m = p.k.rows, r0 = p.r0 + (int64_t)blockIdx.x * TILE, c0 = p.c0 + (int64_t)blockIdx.y * TILE;
  const A factor = *p.scale * (A)LOG2E;
  Fragment<A> s;
  product<T, false, KM>(s, p.q, p.k, r0, c0, 0, p.depth, shared, at, tid);
  // p (raw - raw of the positive): the term of the positive itself is zero, so nothing cancels
  A sum = 0;
  A column_lse[8], column_dot[8];
  UNROLL for (int j = 0; j < 8; j++) {
    const int64_t c = c0 + at.column(j);
    const bool inside = p.columns && c < m;
    column_lse[j] = inside ? p.columns[c] : (A)INFINITY;
    column_dot[j] = inside ? p.rows[2 * n + c] : A(0);
  }
  const Bounds in(at, p.r_end - r0, p.c_end - c0, r0 + p.label - c0);
  UNROLL for (int i = 0; i < 8; i++) {
    const int64_t r = r0 + at.row(i);
    const bool inside = in.row(i);
    const A lse = inside ? p.rows[r] : A(0), dot = inside ? p.rows[2 * n + r] : A(0);
    UNROLL for (int j = 0; j < 8; j++) {
      const A raw = s.at(i, j), logit = raw * factor;
      const A by_row = two_to(logit - lse), by_column = two_to(logit - column_lse[j]);
      A g = by_row + by_column;
      if (inside && in.column(j)) {
        if (in.positive(i, j)) g = -(p.rows[n + r] + (p.columns ? p.columns[m + c0 + at.column(j)] : A(0)));
        else sum += by_row * (raw - dot) + by_column * (raw - column_dot[j]);
      } else {
        g = 0;
      }
      s.at(i, j) = g;
    }
  }
  store_tile(s, p, r0, c0, (T*)shared, at, tid);
  if (p.sums) {
    __syncthreads();
    const double total = block_sum((double)sum, (double*)shared);
    if (tid == 0) p.sums[r0 / TILE * p.sum_columns + p.sum_first + blockIdx.y] = total;
  }
}

template <class T, bool AM, bool BM>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 2 ? 2 : 1)
multiply(const Operand<T> a, const Operand<T> b, int64_t depth, int64_t split, const Target<T> to) {
  using A = Acc<T>;
  DYN_SMEM(shared);
  const int tid = threadIdx.x;
  const Place at(tid);
  const int64_t r0 = (int64_t)blockIdx.x * TILE, c0 = (int64_t)blockIdx.y * TILE, begin = (int64_t)blockIdx.z * split;
  Fragment<A> s;
  product<T, AM, BM>(s, a, b, r0, c0, begin, min(depth, begin + split), shared, at, tid);
  A* tile = (A*)shared;
  UNROLL for (int i = 0; i < 8; i++)
    UNROLL for (int j = 0; j < 8; j++) tile[at.row(i) * LD_M + at.column(j)] = s.at(i, j);
  __syncthreads();
  put_tile<T, TILE, TILE, LD_M, THREADS>(to, tile, r0, c0, blockIdx.z, tid);
}

/// Gradient of the positives that stand apart: -miss q.
template <class T>
__global__ void positive_gradient(Operand<T> q, int64_t d, const Acc<T>* miss, const Acc<T>* grad, const Acc<T>* scale, Acc<T> weight, T* out) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  const Acc<T> factor = -(*grad * *scale * weight);
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < q.rows * d; i += threads)
    out[i] = narrow<T>(factor * miss[i / d] * widen(q.p[i / d * q.row_step + i % d]));
}

template <class A> __global__ void scale_gradient(const double* sums, int64_t count, const A* grad, double weight, A* out) {
  DYN_SMEM(shared);
  double s = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) s += sums[i];
  s = block_sum(s, (double*)shared);
  if (threadIdx.x == 0) *out = (A)(s * weight * (double)*grad);
}

/// How the gradients are cut into chunks, and their workspace.
template <class T> struct BackwardPlan {
  using A = Acc<T>;
  int64_t row_tiles, column_tiles, chunk_rows, chunk_columns, ld, groups, sum_columns, bytes;
  int row_splits, column_splits, fused;
  bool wide, wide_products;  // by warpgroups
  T* g;
  A *row_sum, *column_sum, *partial, *fused_partial;
  double* sums;

  /// Parts of a product's depth, so that there are blocks for the whole device.
  int splits(int64_t rows, int64_t d, int64_t depth) const {
    if (wide_products) return (int)clamp(132 / (ceil_div(rows, WIDE_ROWS) * ceil_div(d, WIDE_COLUMNS)), 1, clamp(depth / 256, 1, 64));
    const int64_t blocks = ceil_div(rows, TILE) * ceil_div(d, TILE);
    return (int)clamp(528 / blocks, 1, clamp(depth / 128, 1, 64));
  }

  BackwardPlan(const Problem& x, bool with_dk, bool wide, void* workspace) : wide(wide), wide_products(wide && x.d >= 192) {
    const int64_t unit = (int64_t)sizeof(T) * TILE;
    row_tiles = ceil_div(x.n, TILE);
    column_tiles = ceil_div(x.m, TILE);
    // at most the budget, and an eighth of all tiles: long runs of columns first, they cost no sums of dQ
    const int64_t eighth = column_tiles > 0 ? ceil_div(row_tiles * column_tiles, 8) : 1;
    const int64_t most = clamp(x.budget / (unit * TILE), 1, eighth);
    const int64_t columns = clamp(column_tiles > 0 ? column_tiles : 1, 1, most), rows = clamp(row_tiles, 1, most / columns);
    chunk_rows = rows * TILE;
    chunk_columns = columns * TILE;
    ld = chunk_columns;
    // blocks of warpgroups walk over tiles: one for each multiprocessor; emulated, few
#if defined(__CUDACC__)
    const int64_t blocks = 132;
#else
    const int64_t blocks = 4;
#endif
    groups = clamp(blocks / rows, 1, ceil_div(chunk_columns, WIDE));
    sum_columns = wide ? groups * ceil_div(column_tiles, columns) : column_tiles;
    const bool many_rows = rows < row_tiles, many_columns = columns < column_tiles;
    const int64_t d = x.d > 0 ? x.d : 1, r = min(chunk_rows, x.n), c = min(chunk_columns, x.m);
    row_splits = splits(r, d, c);
    column_splits = splits(c > 0 ? c : 1, d, r);
    Pieces w{(unsigned char*)workspace};
    g = w.take<T>(chunk_rows * chunk_columns);
    row_sum = w.take<A>(many_columns ? r * x.d : 0);
    column_sum = w.take<A>(with_dk && many_rows ? x.m * x.d : 0);
    const int64_t by_row = row_splits > 1 ? row_splits * r * x.d : 0, by_column = with_dk && column_splits > 1 ? column_splits * c * x.d : 0;
    partial = w.take<A>(by_row > by_column ? by_row : by_column);
    sums = w.take<double>(row_tiles * sum_columns);
    bytes = w.used;
    // the fused kernel wants partial sums alone, in the same memory
    fused = with_dk || x.both ? 0 : query_splits(x, sizeof(T) == 2);
    Pieces f{(unsigned char*)workspace};
    fused_partial = f.take<A>(fused * x.n * x.d);
    if (f.used > bytes) bytes = f.used;
  }
};

template <class T, bool AM>
int32_t launch_product(const Operand<T>& a, const Operand<T>& b, int64_t depth, const Target<T>& to, bool b_by_row, bool wide, void* stream) {
  int rc = 0;
  const int64_t split = ceil_div(ceil_div(depth, to.splits), 32) * 32;
  const dim3 grid((unsigned)ceil_div(to.rows, TILE), (unsigned)ceil_div(to.d, TILE), to.splits);
  auto by_row = multiply<T, AM, true>;
  auto by_depth = multiply<T, AM, false>;
  auto kernel = b_by_row ? by_row : by_depth;
  if (wide) rc = product_wide(a, AM, b, depth, to, stream);
  else LAUNCH(rc, kernel, grid, dim3(THREADS), max(shared_bytes<T>(), TILE * LD_M * (int)sizeof(Acc<T>)), stream, a, b, depth, split, to);
  if (!rc && to.splits > 1) LAUNCH_FLAT(rc, combine<T>, dim3(grid_for(to.rows * to.d, 256)), dim3(256), stream, to);
  return rc;
}

template <class T> struct Gradients {
  using A = Acc<T>;
  const A *rows, *columns, *grad;
  T *dq, *dk, *dpositive;
  A* dscale;
};

/// dQ and dK of one chunk whose g is there.
template <class T>
int32_t chunk_products(const Problem& x, const smalti_contrastive& c, const BackwardPlan<T>& plan, const Slopes<T>& s, const Gradients<T>& to, void* stream) {
  using A = Acc<T>;
  int rc = 0;
  const int64_t r = s.r_end - s.r0, w = s.c_end - s.c0;
  const A weight = (A)x.weight(), *scale = (const A*)c.scale;
  const bool apart = x.apart;
  if (to.dq) {
    const Target<T> t{to.dq + s.r0 * x.d, plan.row_sum, plan.partial, r, x.d, plan.row_splits, s.c0 > 0, s.c_end == x.m, to.grad,
                      scale, to.rows + x.n + s.r0, apart ? (const T*)c.positive.ptr + s.r0 * x.d : nullptr, weight};
    const Operand<T> b = operand(s.k.p + s.c0 * s.k.row_step, x.d, s.k.depth_step, s.k.row_step);
    rc = launch_product<T, false>(operand((const T*)plan.g, r, plan.ld, 1), b, w, t, !x.k_by_depth, plan.wide_products, stream);
  }
  if (to.dk && !rc) {
    const Target<T> t{to.dk + s.c0 * x.d, plan.column_sum ? plan.column_sum + s.c0 * x.d : nullptr, plan.partial, w, x.d, plan.column_splits,
                      s.r0 > 0, s.r_end == x.n, to.grad, scale, nullptr, nullptr, weight};
    const Operand<T> b = operand(s.q.p + s.r0 * s.q.row_step, x.d, 1, s.q.row_step);
    rc = launch_product<T, true>(operand((const T*)plan.g, w, 1, plan.ld), b, r, t, true, plan.wide_products, stream);
  }
  return rc;
}

/// dQ, dK and the sums for the scale's gradient, chunk by chunk.
template <class T>
int32_t in_chunks(const Problem& x, const smalti_contrastive& c, const BackwardPlan<T>& plan, const Gradients<T>& to, void* stream) {
  using A = Acc<T>;
  int rc = 0;
  const A* scale = (const A*)c.scale;
  Slopes<T> s{queries<T>(c), keys<T>(c, x), x.d, first_label(x, c), 0, 0, 0, 0, scale, to.rows, x.both ? to.columns : nullptr, plan.g, plan.ld,
              to.dscale ? plan.sums : nullptr, plan.sum_columns, 0};
  for (s.r0 = 0; s.r0 < x.n && !rc; s.r0 += plan.chunk_rows) {
    s.r_end = min(x.n, s.r0 + plan.chunk_rows);
    // no keys at all: one empty chunk still writes dQ
    s.c0 = 0;
    do {
      s.c_end = min(x.m, s.c0 + plan.chunk_columns);
      s.sum_first = plan.wide ? s.c0 / plan.chunk_columns * plan.groups : s.c0 / TILE;
      auto by_row = slopes<T, false>;
      auto by_depth = slopes<T, true>;
      auto kernel = x.k_by_depth ? by_depth : by_row;
      const dim3 grid((unsigned)ceil_div(s.r_end - s.r0, TILE), (unsigned)ceil_div(s.c_end - s.c0, TILE));
      if (plan.wide) rc = slopes_wide(s, plan.groups, stream);
      else if (x.m > 0) LAUNCH(rc, kernel, grid, dim3(THREADS), shared_bytes<T>(), stream, s);
      if (!rc && x.d > 0) rc = chunk_products(x, c, plan, s, to, stream);
      s.c0 += plan.chunk_columns;
    } while (s.c0 < x.m && !rc);
  }
  return rc;
}

template <class T>
int32_t backward(const Problem& x, const smalti_contrastive& c, const Gradients<T>& to, void* workspace, int64_t bytes, void* stream) {
  using A = Acc<T>;
  const bool wide = wgmma_here() && fits_wide(x, queries<T>(c), keys<T>(c, x));
  const BackwardPlan<T> plan(x, to.dk != nullptr, wide, workspace);
  if (bytes < plan.bytes) return kInvalid;
  int rc = 0;
  const A *scale = (const A*)c.scale, *miss = to.rows + x.n;
  const bool only_queries = to.dq && !to.dk && !to.dscale;
  if (only_queries && plan.fused > 0) {
    const Target<T> t{to.dq, nullptr, plan.fused_partial, x.n, x.d, plan.fused, false, true, to.grad, scale, miss,
                      x.apart ? (const T*)c.positive.ptr : nullptr, (A)x.weight()};
    rc = query_gradient(c, x, to.rows, t, stream);
  } else if (to.dq || to.dk || to.dscale) {
    rc = in_chunks(x, c, plan, to, stream);
  }
  if (!rc && to.dscale) {
    auto kernel = scale_gradient<A>;
    LAUNCH(rc, kernel, dim3(1), dim3(512), 16 * sizeof(double), stream, plan.sums, plan.row_tiles * plan.sum_columns, to.grad, x.weight(), to.dscale);
  }
  if (!rc && to.dpositive && x.d > 0) {
    auto kernel = positive_gradient<T>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(x.n * x.d, 256)), dim3(256), stream, queries<T>(c), x.d, miss, to.grad, scale, (A)x.weight(), to.dpositive);
  }
  return rc;
}

}  // namespace contrastive
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_contrastive_backward_workspace(const smalti_contrastive* c, int32_t with_dk) {
  contrastive::Problem x;
  if (!contrastive::Problem::make(*c, &x)) return -1;
  // enough for either kernel: no device is asked here
  DISPATCH_FLOAT(c->q.dtype, T, {
    auto bytes = [&](bool wide) { return contrastive::BackwardPlan<T>(x, with_dk != 0, wide, nullptr).bytes; };
    return max(bytes(false), bytes(true));
  })
  return -1;
}

extern "C" int32_t smalti_contrastive_backward(const smalti_contrastive* c, const void* rows, const void* columns, const void* grad,
                                               void* dq, void* dk, void* dpositive, void* dscale, void* workspace, int64_t bytes, void* stream) {
  contrastive::Problem x;
  if (!contrastive::Problem::make(*c, &x) || !rows || !grad || (x.both && !columns)) return kInvalid;
  if ((dpositive && !x.apart) || (dscale && x.apart) || (dk && x.apart)) return kInvalid;
  DISPATCH_FLOAT(c->q.dtype, T, {
    using A = Acc<T>;
    const contrastive::Gradients<T> to{(const A*)rows, (const A*)columns, (const A*)grad, (T*)dq, (T*)dk, (T*)dpositive, (A*)dscale};
    return contrastive::backward<T>(x, *c, to, workspace, bytes, stream);
  })
  return 0;
}
