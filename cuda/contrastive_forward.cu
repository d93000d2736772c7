// Contrastive softmax, forward: log-sum-exp of rows and, if wanted, of columns from one product (kernels.md, C3:
// one sweep of tiles, partial results with one writer each, merged in order; so the same bits in every run).
//
// A block keeps a tile of rows and walks over a group of column tiles; it writes one partial (maximum, sum) a row
// and group, and one a column and row tile. The positive is left out of both sums: with r the log-sum-exp of the
// others less the positive's logit, the loss is log(1 + e^r) and p - 1 at the positive is -1 / (1 + e^-r), neither
// of which cancels where the loss is nearly zero.
#include "contrastive/sweep.cuh"
#include "common/hopper.cuh"
#include "common/reduce.cuh"

namespace smalti {
namespace contrastive {

/// Maximum and sum over the tile's columns, one partial a warp and row.
template <class A> DEV void row_partials(Fragment<A>& s, const Place& at, A* max, A* sum) {
  UNROLL for (int i = 0; i < 8; i++) {
    A m = s.at(i, 0), l = 0;
    UNROLL for (int j = 1; j < 8; j++) m = s.at(i, j) > m ? s.at(i, j) : m;
    m = quad_max(m);
    const A shift = m == -(A)INFINITY ? A(0) : m;
    UNROLL for (int j = 0; j < 8; j++) l += two_to(s.at(i, j) - shift);
    l = quad_sum(l);
    if ((at.lane & 3) == 0) {
      max[(at.warp & 3) * TILE + at.row(i)] = m;
      sum[(at.warp & 3) * TILE + at.row(i)] = l;
    }
  }
}

template <class A> DEV void column_partials(Fragment<A>& s, const Place& at, A* max, A* sum) {
  UNROLL for (int j = 0; j < 8; j++) {
    A m = s.at(0, j), l = 0;
    UNROLL for (int i = 1; i < 8; i++) m = s.at(i, j) > m ? s.at(i, j) : m;
    for (int x = 4; x < 32; x <<= 1) {
      const A o = __shfl_xor_sync(~0u, m, x);
      m = o > m ? o : m;
    }
    const A shift = m == -(A)INFINITY ? A(0) : m;
    UNROLL for (int i = 0; i < 8; i++) l += two_to(s.at(i, j) - shift);
    for (int x = 4; x < 32; x <<= 1) l += __shfl_xor_sync(~0u, l, x);
    if (at.lane < 4) {
      max[(at.warp >> 2) * TILE + at.column(j)] = m;
      sum[(at.warp >> 2) * TILE + at.column(j)] = l;
    }
  }
}

/// Products become logits to base 2; what does not count becomes -infinity.
template <class A> DEV void logits(Fragment<A>& s, const Bounds& in, A factor) {
  UNROLL for (int i = 0; i < 8; i++)
    UNROLL for (int j = 0; j < 8; j++)
      s.at(i, j) = in.row(i) && in.column(j) && !in.positive(i, j) ? s.at(i, j) * factor : -(A)INFINITY;
}

template <class T, bool KM>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 2 ? 2 : 1) lse_tiles(const Sweep<T> p) {
  using A = Acc<T>;
  DYN_SMEM(shared);
  A *row_m = (A*)shared, *row_l = row_m + 4 * TILE, *column_m = row_l + 4 * TILE, *column_l = column_m + 2 * TILE;
  int32_t* counts = (int32_t*)(column_l + 2 * TILE);
  const int tid = threadIdx.x;
  const Place at(tid);
  const int64_t n = p.q.rows, m = p.k.rows, local = (int64_t)blockIdx.x * TILE, r0 = p.first + local, group = blockIdx.y;
  const A factor = *p.scale * (A)LOG2E;
  const int64_t end = min((group + 1) * p.group_tiles, p.tiles);
  A run_m = -(A)INFINITY, run_l = 0;
  int32_t above = 0;
  Fragment<A> s;
  for (int64_t tile = group * p.group_tiles; tile < end; tile++) {
    const int64_t c0 = tile * TILE;
    product<T, false, KM>(s, p.q, p.k, r0, c0, 0, p.depth, shared, at, tid);
    logits(s, Bounds(at, n - r0, m - c0, r0 + p.label - c0), factor);
    row_partials(s, at, row_m, row_l);
    if (p.column_part) column_partials(s, at, column_m, column_l);
    if (p.above_part) {
      UNROLL for (int i = 0; i < 8; i++) {
        const int64_t r = r0 + at.row(i);
        const A limit = r < n ? p.dots[r] * factor : (A)INFINITY;
        int32_t count = 0;
        UNROLL for (int j = 0; j < 8; j++) count += s.at(i, j) > limit;
        count = quad_sum(count);
        if ((at.lane & 3) == 0) counts[(at.warp & 3) * TILE + at.row(i)] = count;
      }
    }
    __syncthreads();
    if (tid < TILE) {
      for (int w = 0; w < 4; w++) join(run_m, run_l, row_m[w * TILE + tid], row_l[w * TILE + tid]);
      if (p.above_part)
        for (int w = 0; w < 4; w++) above += counts[w * TILE + tid];
    } else if (p.column_part) {
      const int c = tid - TILE;
      A cm = column_m[c], cl = column_l[c];
      join(cm, cl, column_m[TILE + c], column_l[TILE + c]);
      if (c0 + c < m) {
        A* out = p.column_part + ((int64_t)blockIdx.x * m + c0 + c) * 2;
        out[0] = cm;
        out[1] = cl;
      }
    }
    __syncthreads();  // the next product overwrites the partials
  }
  if (tid < TILE && r0 + tid < n) {
    const int64_t i = group * p.chunk_rows + local + tid;
    p.row_part[i * 2] = run_m;
    p.row_part[i * 2 + 1] = run_l;
    if (p.above_part) p.above_part[i] = above;
  }
}

/// q . positive, one warp a row.
template <class T>
__global__ void positive_dots(Operand<T> q, const T* positive, int64_t row_step, int64_t step, int64_t d, Acc<T>* dots) {
  const int64_t warps = (int64_t)gridDim.x * (blockDim.x >> 5);
  const int lane = threadIdx.x & 31;
  for (int64_t i = (int64_t)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); i < q.rows; i += warps) {
    double s = 0;
    for (int64_t c = lane; c < d; c += 32) s += (double)widen(q.p[i * q.row_step + c]) * (double)widen(positive[i * row_step + c * step]);
    s = warp_sum(s);
    if (lane == 0) dots[i] = (Acc<T>)s;
  }
}

/// log2-sum-exp with the positive, probability of the rest, loss; from the others' maximum and sum (to base 2).
template <class A> HOST_DEV void settle(A m, A l, A positive, A* lse, A* miss, double* loss) {
  const double others = (double)m + log2((double)l), mine = (double)positive, r = (others - mine) * LN2;
  const double tail = exp(-fabs(r));  // at most 1: nothing overflows
  *lse = (A)((others > mine ? others : mine) + log1p(tail) * LOG2E);
  *miss = (A)(r > 0 ? 1 / (1 + tail) : tail / (1 + tail));
  *loss = (r > 0 ? r : 0) + log1p(tail);
}

template <class A> struct Merge {
  const A *part, *scale, *dots;
  const int32_t* above;
  A *running, *side;  // side: [2][size]
  double* losses;
  int64_t* rank;
  int64_t parts, step, size, first, count;  // `step` results a part; results first .. first + count of `size`
  bool start, last;
};

/// Threads of a block that share the parts of a result.
constexpr int SLICES = 16;
template <class A> constexpr int merge_bytes = 32 * SLICES * (2 * (int)sizeof(A) + 4);

/// Partial results of `count` rows or columns: 32 neighbours a block, each with its parts in SLICES runs, which are then
/// joined in order.
template <class A> __global__ void __launch_bounds__(32 * SLICES) merge(const Merge<A> p) {
  DYN_SMEM(shared);
  A *maxima = (A*)shared, *sums = maxima + 32 * SLICES;
  int32_t* counts = (int32_t*)(sums + 32 * SLICES);
  const int tid = threadIdx.x, slice = tid >> 5;
  const int64_t run = (p.parts + SLICES - 1) / SLICES, from = slice * run, to = min(from + run, p.parts);
  for (int64_t first = (int64_t)blockIdx.x * 32; first < p.count; first += (int64_t)gridDim.x * 32) {
    const int64_t i = first + (tid & 31), at = p.first + i;
    const bool inside = i < p.count;
    A m = -(A)INFINITY, l = 0;
    int32_t above = 0;
    for (int64_t t = from; t < to && inside; t++) {
      const A* part = p.part + (t * p.step + i) * 2;
      join(m, l, part[0], part[1]);
      if (p.rank) above += p.above[t * p.step + i];
    }
    maxima[tid] = m;
    sums[tid] = l;
    counts[tid] = above;
    __syncthreads();
    if (slice == 0 && inside) {
      if (!p.start) join(m, l, p.running[at * 2], p.running[at * 2 + 1]);
      ROLLED for (int s = tid + 32; s < 32 * SLICES; s += 32) {
        join(m, l, maxima[s], sums[s]);
        above += counts[s];
      }
      if (p.last) {
        settle(m, l, p.dots[at] * *p.scale * (A)LOG2E, p.side + at, p.side + p.size + at, p.losses + at);
      } else {
        p.running[at * 2] = m;
        p.running[at * 2 + 1] = l;
      }
      if (p.rank) p.rank[at] = above;
    }
    __syncthreads();  // the next results overwrite the slices
  }
}

template <class A> __global__ void mean_loss(const double* losses, int64_t count, double weight, A* loss) {
  DYN_SMEM(shared);
  double s = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) s += losses[i];
  s = block_sum(s, (double*)shared);
  if (threadIdx.x == 0) *loss = (A)(s * weight);
}

/// How the sweep is cut, and its workspace.
template <class A> struct ForwardPlan {
  int64_t tiles, group_tiles, groups, chunk_tiles, bytes;
  double* losses;
  A *row_part, *column_part, *running;
  int32_t* above;

  /// `width`: columns of a tile.
  ForwardPlan(const Problem& x, int width, void* workspace) {
    const int64_t row_tiles = ceil_div(x.n, TILE);
    tiles = ceil_div(x.m, width);
    // four rounds of blocks on the largest device, in groups as long as that allows; emulated, long ones for the tests
#if defined(__CUDACC__)
    const int64_t blocks = 1056;
#else
    const int64_t blocks = 4;
#endif
    groups = clamp(blocks / row_tiles, 1, tiles > 0 ? tiles : 1);
    group_tiles = ceil_div(tiles, groups);
    groups = group_tiles > 0 ? ceil_div(tiles, group_tiles) : 0;
    const int64_t tile_bytes = x.both ? x.m * 2 * (int64_t)sizeof(A) : groups * TILE * 2 * (int64_t)sizeof(A);
    chunk_tiles = clamp(x.budget / 2 / (tile_bytes > 0 ? tile_bytes : 1), 1, row_tiles);
    Pieces w{(unsigned char*)workspace};
    losses = w.take<double>(x.n * (x.both ? 2 : 1));
    row_part = w.take<A>(groups * chunk_tiles * TILE * 2);
    above = w.take<int32_t>(groups * chunk_tiles * TILE);
    column_part = w.take<A>(x.both ? chunk_tiles * x.m * 2 : 0);
    running = w.take<A>(x.both ? x.m * 2 : 0);
    bytes = w.used;
  }
};

template <class T>
int32_t forward(const Problem& x, const smalti_contrastive& c, Acc<T>* loss, Acc<T>* rows, Acc<T>* columns, int64_t* rank,
                void* workspace, int64_t bytes, void* stream) {
  using A = Acc<T>;
  const bool wide = !rank && wgmma_here() && fits_wide(x, queries<T>(c), keys<T>(c, x));
  const ForwardPlan<A> plan(x, wide ? WIDE : TILE, workspace);
  if (bytes < plan.bytes) return kInvalid;
  int rc = 0;
  A* dots = rows + 2 * x.n;
  const A* scale = (const A*)c.scale;
  Sweep<T> s{queries<T>(c), keys<T>(c, x), x.d, first_label(x, c), 0, plan.chunk_tiles * TILE, plan.tiles, plan.group_tiles,
             scale, dots, plan.row_part, x.both ? plan.column_part : nullptr, rank ? plan.above : nullptr};
  const T* positive = x.apart ? (const T*)c.positive.ptr : s.k.p + c.offset * s.k.row_step;
  const int64_t row_step = x.apart ? x.d : s.k.row_step, step = x.apart ? 1 : s.k.depth_step;
  LAUNCH(rc, positive_dots<T>, dim3(grid_for(x.n, 8)), dim3(256), 0, stream, s.q, positive, row_step, step, x.d, dots);
  const int64_t row_tiles = ceil_div(x.n, TILE);
  for (int64_t tile = 0; tile < row_tiles && !rc; tile += plan.chunk_tiles) {
    const int64_t here = min(plan.chunk_tiles, row_tiles - tile);
    const bool last = tile + here == row_tiles;
    s.first = tile * TILE;
    if (wide) {
      rc = sweep_wide(s, here, plan.groups, stream);
    } else if (plan.groups > 0) {
      auto by_row = lse_tiles<T, false>;
      auto by_depth = lse_tiles<T, true>;
      auto kernel = x.k_by_depth ? by_depth : by_row;
      const int smem = shared_bytes<T>();
      LAUNCH(rc, kernel, dim3((unsigned)here, (unsigned)plan.groups), dim3(THREADS), smem, stream, s);
    }
    Merge<A> r{plan.row_part, scale, dots, plan.above, nullptr, rows, plan.losses, rank, plan.groups, s.chunk_rows, x.n,
               s.first, min(here * TILE, x.n - s.first), true, true};
    if (!rc) LAUNCH(rc, merge<A>, dim3(grid_for(r.count, 32)), dim3(32 * SLICES), merge_bytes<A>, stream, r);
    Merge<A> k{plan.column_part, scale, dots, nullptr, plan.running, columns, plan.losses + x.n, nullptr, here, x.m, x.m, 0, x.m, tile == 0, last};
    if (!rc && x.both) LAUNCH(rc, merge<A>, dim3(grid_for(x.m, 32)), dim3(32 * SLICES), merge_bytes<A>, stream, k);
  }
  if (!rc)
    LAUNCH(rc, mean_loss<A>, dim3(1), dim3(512), 16 * sizeof(double), stream, plan.losses, x.n * (x.both ? 2 : 1), x.weight(), loss);
  return rc;
}

}  // namespace contrastive
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_contrastive_forward_workspace(const smalti_contrastive* c) {
  contrastive::Problem x;
  if (!contrastive::Problem::make(*c, &x)) return -1;
  // enough for either kernel: no device is asked here
  auto bytes = [&](int width) {
    return c->q.dtype == SMALTI_F64 ? contrastive::ForwardPlan<double>(x, width, nullptr).bytes : contrastive::ForwardPlan<float>(x, width, nullptr).bytes;
  };
  return max(bytes(contrastive::TILE), bytes(contrastive::WIDE));
}

extern "C" int32_t smalti_contrastive_forward(const smalti_contrastive* c, void* loss, void* rows, void* columns, int64_t* rank,
                                              void* workspace, int64_t bytes, void* stream) {
  contrastive::Problem x;
  if (!contrastive::Problem::make(*c, &x) || (x.both && !columns) || !rows || !loss) return kInvalid;
  DISPATCH_FLOAT(c->q.dtype, T, {
    using A = Acc<T>;
    return contrastive::forward<T>(x, *c, (A*)loss, (A*)rows, (A*)columns, rank, workspace, bytes, stream);
  })
  return 0;
}
