// Many tensors in one launch: a table of addresses travels with the kernel's arguments, and a block takes one piece
// of one tensor. Models have hundreds of parameters, most of them small: a launch for each would cost more than the work.
#pragma once
#include "../common/rows.cuh"
#include <cmath>

namespace smalti {

/// Elements of a piece, and threads that take it. Sums are split by these alone.
constexpr int64_t kPiece = 16384;
constexpr int kPieceThreads = 256;

/// What a step needs of one tensor. `first`: the number of its first block in this launch.
struct StepEntry {
  void* p;
  const void* g;
  void *master, *state[3];
  int64_t n;
  int32_t row, first;
};
/// What all else needs.
struct PairEntry {
  void* p;
  const void* g;
  int64_t n;
  int32_t first;
};

/// All of a launch's arguments stay within the 4 KB that every device takes.
template <class E> constexpr int kEntries = (4096 - 128) / (int)sizeof(E);
template <class E> struct Many {
  E e[kEntries<E>];
  int32_t count, blocks;
};

inline void fill(StepEntry& e, const smalti_moving& t) {
  e.master = t.master;
  for (int k = 0; k < 3; k++) e.state[k] = t.state[k];
  e.row = (int32_t)t.row;
}
inline void fill(PairEntry&, const smalti_moving&) {}

/// Calls `f(many)` with the tensors of these dtypes, as many at a time as fit. f returns a status.
template <class E, class F>
int for_many(const smalti_moving* tensors, int64_t count, int32_t dtype, int32_t source, const F& f) {
  Many<E> many{};
  int rc = 0;
  for (int64_t i = 0; i < count && !rc; i++) {
    const smalti_moving& t = tensors[i];
    if (t.dtype != dtype || t.source != source || !t.n) continue;
    E& e = many.e[many.count++];
    e.p = t.p;
    e.g = t.g;
    e.n = t.n;
    e.first = many.blocks;
    fill(e, t);
    many.blocks += (int32_t)((t.n + kPiece - 1) / kPiece);
    if (many.count == kEntries<E>) {
      rc = f(many);
      many.count = many.blocks = 0;
    }
  }
  return rc || !many.count ? rc : f(many);
}

/// The same one dtype after the other: `f(T(), many)`.
template <class E, class F> int for_dtypes(const smalti_moving* tensors, int64_t count, const F& f) {
  for (int64_t i = 0; i < count; i++)
    if (tensors[i].n < 0 || tensors[i].dtype < SMALTI_F32 || tensors[i].dtype > SMALTI_F64) return kInvalid;
  int rc = for_many<E>(tensors, count, SMALTI_F32, SMALTI_F32, [&](Many<E>& m) { return f(float(), m); });
  if (!rc) rc = for_many<E>(tensors, count, SMALTI_BF16, SMALTI_BF16, [&](Many<E>& m) { return f(bf16(), m); });
  if (!rc) rc = for_many<E>(tensors, count, SMALTI_F16, SMALTI_F16, [&](Many<E>& m) { return f(f16(), m); });
  if (!rc) rc = for_many<E>(tensors, count, SMALTI_F64, SMALTI_F64, [&](Many<E>& m) { return f(double(), m); });
  return rc;
}

/// Blocks of all tensors of a list.
inline int64_t blocks_of(const smalti_moving* tensors, int64_t count) {
  int64_t blocks = 0;
  for (int64_t i = 0; i < count; i++) blocks += (tensors[i].n + kPiece - 1) / kPiece;
  return blocks;
}

/// The tensor that a block works on: the last whose first block is not behind it.
template <class E> DEV int entry_of(const Many<E>& many, int block) {
  int low = 0, high = many.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (many.e[middle].first <= block) low = middle;
    else high = middle - 1;
  }
  return low;
}

/// Takes a block's piece of a tensor of n elements. A thread has groups of V neighbours, which `f(i, Width<V>)` takes
/// whole where addresses and length allow; else, in the same order, `f(i, Width<1>)` takes one.
template <int V> struct Width { static constexpr int value = V; };
template <int V, class F> DEV void for_piece(int64_t n, int64_t piece, bool whole, const F& f) {
  const int64_t begin = piece * kPiece, end = begin + kPiece < n ? begin + kPiece : n;
  for (int64_t i = begin + (int64_t)threadIdx.x * V; i < end; i += (int64_t)kPieceThreads * V) {
    if (whole && i + V <= end) {
      f(i, Width<V>());
    } else {
      const int64_t last = i + V < end ? i + V : end;
      ROLLED for (int64_t j = i; j < last; j++) f(j, Width<1>());
    }
  }
}

/// `V` numbers in 16-byte accesses, or one by one.
template <int V, class A> DEV void store_numbers(A* p, const A (&v)[V]) {
  constexpr int W = V < kWidth<A> ? V : kWidth<A>;
  UNROLL for (int j = 0; j < V; j += W) {
    Pack<A, W> raw;
    UNROLL for (int i = 0; i < W; i++) raw.v[i] = v[j + i];
    store_whole(p + j, raw);
  }
}

/// Are all addresses of an entry multiples of 16?
DEV bool whole(const StepEntry& e) {
  return (((uintptr_t)e.p | (uintptr_t)e.g | (uintptr_t)e.master | (uintptr_t)e.state[0] | (uintptr_t)e.state[1] |
           (uintptr_t)e.state[2]) & 15) == 0;
}
DEV bool whole(const PairEntry& e) { return (((uintptr_t)e.p | (uintptr_t)e.g) & 15) == 0; }

/// NaN if either is.
DEV double larger(double a, double b) { return a > b || a != a ? a : b; }

struct Add { DEV double operator()(double a, double b) const { return a + b; } };
struct Larger { DEV double operator()(double a, double b) const { return larger(a, b); } };

/// Joins a number of each thread of the block, in a fixed order; thread 0 knows the result. `scratch`: one a warp.
template <class J> DEV double block_join(double v, double* scratch, const J& join) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  UNROLL for (int m = 16; m > 0; m >>= 1) v = join(v, __shfl_xor_sync(~0u, v, m));
  __syncthreads();  // the scratch may still be read from before
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  double all = scratch[0];
  for (int w = 1; w < kPieceThreads / 32; w++) all = join(all, scratch[w]);
  return all;
}
constexpr int kJoinBytes = kPieceThreads / 32 * (int)sizeof(double);

}  // namespace smalti
