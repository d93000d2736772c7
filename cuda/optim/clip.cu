// Gradient clipping: the norm of many tensors as one vector, and changes that it decides on the device.
#include "many.cuh"

namespace smalti {
namespace {

enum { kSum, kSquares, kLargest, kPowers };

DEV double term(double x, int32_t kind, double order) {
  const double size = x < 0 ? -x : x;
  return kind == kSquares ? x * x : kind == kPowers ? pow_of(size, order) : size;
}

/// Joins the terms of each piece.
template <class T, class J>
__global__ void __launch_bounds__(kPieceThreads) grad_norm(const __grid_constant__ Many<PairEntry> many, int32_t kind, double order, double* partial) {
  DYN_SMEM(raw);
  const J join;
  const int at = entry_of(many, (int)blockIdx.x);
  const PairEntry& e = many.e[at];
  double sum = 0;
  for_piece<kWidth<T>>(e.n, (int64_t)blockIdx.x - e.first, whole(e), [&](int64_t i, auto width) {
    constexpr int V = decltype(width)::value;
    Acc<T> v[V];
    load<T, V>((const T*)e.p + i, v);
    UNROLL for (int j = 0; j < V; j++) sum = join(sum, term((double)v[j], kind, order));
  });
  sum = block_join(sum, (double*)raw, join);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/// One block joins the pieces.
template <class J>
__global__ void __launch_bounds__(kPieceThreads) grad_norm_join(const double* partial, int64_t count, int32_t kind, double order, double most, double* result) {
  DYN_SMEM(raw);
  const J join;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kPieceThreads) sum = join(sum, partial[i]);
  sum = block_join(sum, (double*)raw, join);
  if (threadIdx.x) return;
  const double norm = kind == kSquares ? sqrt(sum) : kind == kPowers ? pow_of(sum, 1.0 / order) : sum;
  result[0] = norm;
  result[1] = most / (norm + 1e-6);
}

/// p = f(p), for the pieces of a launch.
template <class T, class F> DEV void change(const Many<PairEntry>& many, const F& f) {
  const int at = entry_of(many, (int)blockIdx.x);
  const PairEntry& e = many.e[at];
  for_piece<kWidth<T>>(e.n, (int64_t)blockIdx.x - e.first, whole(e), [&](int64_t i, auto width) {
    constexpr int V = decltype(width)::value;
    Acc<T> v[V];
    load<T, V>((const T*)e.p + i, v);
    UNROLL for (int j = 0; j < V; j++) v[j] = f(v[j]);
    store_whole((T*)e.p + i, packed<T, V>(v));
  });
}

template <class T> __global__ void __launch_bounds__(kPieceThreads) grad_scale(const __grid_constant__ Many<PairEntry> many, const double* factor) {
  const double by = *factor;
  if (by >= 1) return;  // a NaN reaches the gradients
  const Acc<T> scale = (Acc<T>)by;
  change<T>(many, [=](Acc<T> v) { return v * scale; });
}

template <class T> __global__ void __launch_bounds__(kPieceThreads) grad_clamp(const __grid_constant__ Many<PairEntry> many, double most) {
  const Acc<T> high = (Acc<T>)most;
  change<T>(many, [=](Acc<T> v) {
    v = v > -high || v != v ? v : -high;
    return v < high || v != v ? v : high;
  });
}

template <class J>
int norm_of(const smalti_moving* tensors, int64_t count, int32_t kind, double order, double most, double* result, double* partial, void* stream) {
  int64_t before = 0;
  int rc = for_dtypes<PairEntry>(tensors, count, [&](auto type, Many<PairEntry>& many) {
    int rc = 0;
    const auto kernel = grad_norm<decltype(type), J>;
    double* to = partial + before;
    before += many.blocks;
    LAUNCH(rc, kernel, dim3((unsigned)many.blocks), dim3(kPieceThreads), kJoinBytes, stream, many, kind, order, to);
    return rc;
  });
  if (!rc) LAUNCH(rc, grad_norm_join<J>, dim3(1), dim3(kPieceThreads), kJoinBytes, stream, partial, before, kind, order, most, result);
  return rc;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_grad_norm_workspace(const smalti_moving* tensors, int64_t count) {
  return blocks_of(tensors, count) * (int64_t)sizeof(double);
}

extern "C" int32_t smalti_grad_norm(const smalti_moving* tensors, int64_t count, double order, double most, double* result, void* workspace, void* stream) {
  if (!(order > 0)) return kInvalid;
  const int32_t kind = order == 1 ? kSum : order == 2 ? kSquares : std::isinf(order) ? kLargest : kPowers;
  double* partial = (double*)workspace;
  return kind == kLargest ? norm_of<Larger>(tensors, count, kind, order, most, result, partial, stream)
                          : norm_of<Add>(tensors, count, kind, order, most, result, partial, stream);
}

extern "C" int32_t smalti_grad_scale(const smalti_moving* tensors, int64_t count, const double* factor, void* stream) {
  return for_dtypes<PairEntry>(tensors, count, [&](auto type, Many<PairEntry>& many) {
    int rc = 0;
    const auto kernel = grad_scale<decltype(type)>;
    LAUNCH_FLAT(rc, kernel, dim3((unsigned)many.blocks), dim3(kPieceThreads), stream, many, factor);
    return rc;
  });
}

extern "C" int32_t smalti_grad_clamp(const smalti_moving* tensors, int64_t count, double most, void* stream) {
  if (!(most >= 0)) return kInvalid;
  return for_dtypes<PairEntry>(tensors, count, [&](auto type, Many<PairEntry>& many) {
    int rc = 0;
    const auto kernel = grad_clamp<decltype(type)>;
    LAUNCH_FLAT(rc, kernel, dim3((unsigned)many.blocks), dim3(kPieceThreads), stream, many, most);
    return rc;
  });
}
