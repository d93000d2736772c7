// The loop of all reductions: folds a strided view over some of its dimensions, in a fixed order.
//
// A fold `F` (passed by value) has
//   In, A                        what is loaded for an element; what is carried (whole 32-bit words)
//   Context context(result)      what all elements of a result share
//   load<V>(off, in)             V neighbours in memory, from element offset `off` of the first tensor on
//   start()                      joins to anything without effect
//   row<V>(a, in, pos, c)        takes V elements of one result into `a`; `pos` is the first one's position
//   column<V>(a, in, pos, c)     takes one element each into the V neighbouring results `a`
//   settle(a)                    what a thread has taken, ready to be joined
//   join(a, b)                   `a` stands before `b`
//   finish(a, off, result)       stores at element offset `off` of the second tensor (the result)
//
// Three ways, by geometry: a thread a result (of few elements), a block of one to eight warps a result where the
// innermost dimension in memory is reduced, and 32 x 8 threads over neighbouring results where it is kept. Few long
// folds are cut into chunks, whose partial results a second kernel joins in order.
#pragma once
#include "rows.cuh"

namespace smalti {

struct FoldPlan {
  Index<2> kept;     // result -> offsets in the input and in the result
  Index<1> reduced;  // position -> offset in the input
  int64_t results, n;
  int64_t chunk, chunks;  // positions of a chunk, and how many
  int32_t way, width;     // elements of an access
  int32_t threads;        // of a block, by block
  int64_t side;           // result offset between neighbouring results of a column access
};
enum { kByThread, kByBlock, kByColumns };

/// Blocks that fill the device twice over; more results than that are not cut into chunks.
constexpr int64_t kFoldBlocks = 2 * 132;
constexpr int kFoldThreads = 256;

/// `x` folded to `y`, which has size 1 where dimensions are reduced. `width`: elements of a 16-byte access.
/// `pair`: a second input with the strides of `x`. False if the shapes do not belong together.
inline bool plan_fold(const smalti_view& x, const smalti_view& y, int width, FoldPlan& p, const void* pair = nullptr) {
  if (x.rank != y.rank) return false;
  Axis<2> kept[8];
  Axis<1> reduced[8];
  int nk = 0, nr = 0;
  p = {};
  p.results = p.n = 1;
  for (int d = 0; d < x.rank; d++) {
    if (x.shape[d] == y.shape[d]) {
      kept[nk++] = {x.shape[d], {x.stride[d], y.stride[d]}};
      p.results *= x.shape[d];
    } else if (y.shape[d] == 1) {
      reduced[nr++] = {x.shape[d], {x.stride[d]}};
      p.n *= x.shape[d];
    } else {
      return false;
    }
  }
  p.kept = make_index(kept, nk);
  p.reduced = make_index(reduced, nr);
  p.width = 1;
  p.chunk = p.n;
  p.chunks = 1;
  if (!p.results || !p.n) return true;
  const Index<2>& k = p.kept;
  const Index<1>& r = p.reduced;
  const bool whole = aligned(x.ptr) && aligned(pair);
  const int last = k.rank - 1, inner = r.rank - 1;
  if (last >= 0 && k.stride[0][last] == 1 && p.results >= 32 && p.n > 16) {
    p.way = kByColumns;
    if (whole && k.shape[last] % width == 0 && steps_by(k, 0, width, last) && steps_by(r, 0, width)) p.width = width;
    p.side = k.stride[1][last];
    const int64_t blocks = (p.results + 32 * p.width - 1) / (32 * p.width), rows = p.n;
    const int64_t want = (kFoldBlocks + blocks - 1) / blocks, most = (rows + 63) / 64;
    p.chunks = want < most ? want : most;
  } else {
    const bool along = inner >= 0 && r.stride[0][inner] == 1;
    const bool beside = last >= 0 && k.stride[0][last] == 1 && p.results >= 1024;  // few to fold: neighbours read neighbours
    if (p.n <= 8 || (beside && p.n <= 16)) {
      p.way = kByThread;
      return true;
    }
    if (along && whole && r.shape[inner] % width == 0 && steps_by(k, 0, width) && steps_by(r, 0, width, inner)) p.width = width;
    const int64_t steps = p.n / p.width;
    p.way = kByBlock;
    p.threads = steps <= 64 ? 32 : steps <= 256 ? 64 : kFoldThreads;
    if (p.threads == kFoldThreads && p.results < kFoldBlocks) {
      const int64_t want = (kFoldBlocks + p.results - 1) / p.results, most = (p.n + 4095) / 4096;
      p.chunks = want < most ? want : most;
    }
  }
  p.chunk = (p.n + p.chunks - 1) / p.chunks;
  p.chunk = (p.chunk + p.width - 1) / p.width * p.width;
  p.chunks = (p.n + p.chunk - 1) / p.chunk;
  return true;
}
/// Bytes of partial results.
template <class F> inline int64_t fold_workspace(const FoldPlan& p) {
  return p.chunks > 1 ? p.chunks * p.results * (int64_t)sizeof(typename F::A) : 0;
}

/// Positions from..to of one result, every `step`th access of them from the `first` on.
template <int V, class F>
DEV typename F::A fold_row(const F& f, const FoldPlan& p, int64_t base, int64_t from, int64_t to, int64_t step,
                           const typename F::Context& c) {
  typename F::A a = f.start();
  // Two accesses at once: twice the bytes in flight.
  ROLLED for (int64_t i = from; i < to; i += 2 * step * V) {
    typename F::In u[V], v[V];
    const bool more = i + step * V < to;
    f.template load<V>(base + p.reduced.first(i), u);
    f.template load<V>(base + p.reduced.first(more ? i + step * V : i), v);
    f.template row<V>(a, u, i, c);
    if (more) f.template row<V>(a, v, i + step * V, c);
  }
  return f.settle(a);
}

template <class F> __global__ void fold_by_thread(F f, FoldPlan p) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t r = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; r < p.results; r += threads) {
    int64_t off[2];
    p.kept.at(r, off);
    const auto c = f.context(r);
    f.finish(fold_row<1>(f, p, off[0], 0, p.n, 1, c), off[1], r);
  }
}

template <class F> DEV typename F::A fold_warp(const F& f, typename F::A a) {
  const int lane = threadIdx.x & 31;
  ROLLED for (int m = 1; m < 32; m <<= 1) {
    const auto o = shuffle_xor(a, m);
    a = lane & m ? f.join(o, a) : f.join(a, o);
  }
  return a;
}

template <class F, int V> __global__ void __launch_bounds__(kFoldThreads) fold_by_block(F f, FoldPlan p, typename F::A* partial) {
  DYN_SMEM(raw);
  auto* shared = reinterpret_cast<typename F::A*>(raw);
  const int tid = threadIdx.x, warps = p.threads >> 5;
  for (int64_t task = blockIdx.x; task < p.results * p.chunks; task += gridDim.x) {
    const int64_t r = task / p.chunks, k = task - r * p.chunks;
    int64_t off[2];
    p.kept.at(r, off);
    const auto c = f.context(r);
    const int64_t from = k * p.chunk, end = from + p.chunk < p.n ? from + p.chunk : p.n;
    const auto a = fold_warp(f, fold_row<V>(f, p, off[0], from + (int64_t)tid * V, end, p.threads, c));
    if ((tid & 31) == 0) shared[tid >> 5] = a;
    __syncthreads();
    if (tid == 0) {
      auto total = shared[0];
      ROLLED for (int w = 1; w < warps; w++) total = f.join(total, shared[w]);
      if (p.chunks == 1) f.finish(total, off[1], r);
      else partial[k * p.results + r] = total;
    }
    __syncthreads();
  }
}

constexpr int kFoldRows = 8;
/// 32 threads (times V) on neighbouring results, 8 deep in the reduced positions.
template <class F, int V> __global__ void __launch_bounds__(kFoldThreads) fold_by_columns(F f, FoldPlan p, typename F::A* partial) {
  DYN_SMEM(raw);
  using A = typename F::A;
  auto* shared = reinterpret_cast<A*>(raw);  // [8][32 * V]
  const int tid = threadIdx.x, column = tid & 31, deep = tid >> 5;
  const int64_t groups = (p.results / V + 31) / 32;
  for (int64_t task = blockIdx.x; task < groups * p.chunks; task += gridDim.x) {
    const int64_t g = task / p.chunks, k = task - g * p.chunks, r = (g * 32 + column) * V;
    const bool inside = r < p.results;
    int64_t off[2] = {0, 0};
    A a[V];
    UNROLL for (int j = 0; j < V; j++) a[j] = f.start();
    if (inside) {
      p.kept.at(r, off);
      typename F::Context c[V];
      UNROLL for (int j = 0; j < V; j++) c[j] = f.context(r + j);
      const int64_t end = (k + 1) * p.chunk < p.n ? (k + 1) * p.chunk : p.n;
      ROLLED for (int64_t i = k * p.chunk + deep; i < end; i += 2 * kFoldRows) {
        typename F::In u[V], v[V];
        const bool more = i + kFoldRows < end;
        f.template load<V>(off[0] + p.reduced.first(i), u);
        f.template load<V>(off[0] + p.reduced.first(more ? i + kFoldRows : i), v);
        f.template column<V>(a, u, i, c);
        if (more) f.template column<V>(a, v, i + kFoldRows, c);
      }
    }
    UNROLL for (int j = 0; j < V; j++) shared[deep * 32 * V + j * 32 + column] = f.settle(a[j]);
    __syncthreads();
    if (deep == 0 && inside) {
      ROLLED for (int j = 0; j < V; j++) {
        A total = shared[j * 32 + column];
        ROLLED for (int d = 1; d < kFoldRows; d++) total = f.join(total, shared[d * 32 * V + j * 32 + column]);
        if (p.chunks == 1) f.finish(total, off[1] + j * p.side, r + j);
        else partial[k * p.results + r + j] = total;
      }
    }
    __syncthreads();
  }
}

constexpr int kChunkRows = 16;
/// 32 threads on neighbouring results, 16 deep in their chunks.
template <class F> __global__ void __launch_bounds__(32 * kChunkRows) fold_chunks(F f, FoldPlan p, const typename F::A* partial) {
  DYN_SMEM(raw);
  auto* shared = reinterpret_cast<typename F::A*>(raw);
  const int tid = threadIdx.x, column = tid & 31, deep = tid >> 5;
  for (int64_t first = (int64_t)blockIdx.x * 32; first < p.results; first += (int64_t)gridDim.x * 32) {
    const int64_t r = first + column;
    auto a = f.start();
    if (r < p.results)
      for (int64_t k = deep; k < p.chunks; k += kChunkRows) a = f.join(a, partial[k * p.results + r]);
    shared[tid] = a;
    __syncthreads();
    if (deep == 0 && r < p.results) {
      ROLLED for (int d = 1; d < kChunkRows; d++) a = f.join(a, shared[d * 32 + column]);
      int64_t off[2];
      p.kept.at(r, off);
      f.finish(a, off[1], r);
    }
    __syncthreads();
  }
}

template <class F, int V> inline int launch_fold_width(const F& f, const FoldPlan& p, void* workspace, void* stream) {
  using A = typename F::A;
  int rc = 0;
  A* partial = (A*)workspace;
  if (p.way == kByThread) {
    auto kernel = fold_by_thread<F>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(p.results, kFoldThreads)), dim3(kFoldThreads), stream, f, p);
    return rc;
  }
  if (p.chunks > 1 && !workspace) return kInvalid;
  if (p.way == kByBlock) {
    auto kernel = fold_by_block<F, V>;
    LAUNCH(rc, kernel, dim3(grid_for(p.results * p.chunks, 1)), dim3(p.threads), kFoldThreads / 32 * sizeof(A), stream, f,
           p, partial);
  } else {
    auto kernel = fold_by_columns<F, V>;
    const int64_t blocks = (p.results / V + 31) / 32 * p.chunks;
    LAUNCH(rc, kernel, dim3(grid_for(blocks, 1)), dim3(kFoldThreads), kFoldThreads * V * sizeof(A), stream, f, p, partial);
  }
  if (rc || p.chunks == 1) return rc;
  auto kernel = fold_chunks<F>;
  LAUNCH(rc, kernel, dim3(grid_for(p.results, 32)), dim3(32 * kChunkRows), 32 * kChunkRows * sizeof(A), stream, f, p, partial);
  return rc;
}

/// Elements of an access: 8-byte ones are read one by one, which keeps the number of kernels down.
template <class T> constexpr int kFoldWidth = sizeof(T) == 8 ? 1 : sizeof(T) == 4 ? 4 : 8;

/// Runs a planned fold. W is the `width` that it was planned with.
template <int W, class F> inline int launch_fold(const F& f, const FoldPlan& p, void* workspace, void* stream) {
  if (p.results == 0) return 0;
  if (p.width == W) return launch_fold_width<F, W>(f, p, workspace, stream);
  return launch_fold_width<F, 1>(f, p, workspace, stream);
}

/// Takes elements one by one: what most folds do. `Self` has `take(a, value, pos, context)`.
template <class Self> struct OneByOne {
  struct Context {};
  DEV Context context(int64_t) const { return {}; }
  template <class A> DEV A settle(const A& a) const { return a; }
  template <int V, class A, class In, class C> DEV void row(A& a, const In (&v)[V], int64_t pos, const C& c) const {
    UNROLL for (int j = 0; j < V; j++) static_cast<const Self*>(this)->take(a, v[j], pos + j, c);
  }
  template <int V, class A, class In, class C> DEV void column(A (&a)[V], const In (&v)[V], int64_t pos, const C (&c)[V]) const {
    UNROLL for (int j = 0; j < V; j++) static_cast<const Self*>(this)->take(a[j], v[j], pos, c[j]);
  }
};

}  // namespace smalti
