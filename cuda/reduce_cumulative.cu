// Running sums. f32 is carried in f64, so that long sums keep their digits.
#include "common/rows.cuh"

namespace smalti {
namespace {

constexpr int kScanThreads = 256, kScanItems = 4;

struct Lines {
  Index<2> lines;  // offsets of a line in x and y
  int64_t count, n, step, out_step;
};

/// One line a thread: neighbouring lines are neighbours in memory.
template <class T, class A> __global__ void cumsum_columns(const T* x, T* y, Lines p) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t line = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; line < p.count; line += threads) {
    int64_t off[2];
    p.lines.at(line, off);
    A sum = 0;
    for (int64_t i = 0; i < p.n; i++) {
      sum = (A)(sum + (A)x[off[0] + i * p.step]);
      y[off[1] + i * p.out_step] = (T)sum;
    }
  }
}

/// One line a block, in pieces of 1024: each thread sums four, the threads' sums are scanned, the total carried.
template <class T, class A> __global__ void __launch_bounds__(kScanThreads) cumsum_rows(const T* x, T* y, Lines p) {
  DYN_SMEM(raw);
  A* shared = reinterpret_cast<A*>(raw);
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  for (int64_t line = blockIdx.x; line < p.count; line += gridDim.x) {
    int64_t off[2];
    p.lines.at(line, off);
    A carry = 0;
    for (int64_t from = 0; from < p.n; from += kScanThreads * kScanItems) {
      A v[kScanItems], sum = 0;
      UNROLL for (int j = 0; j < kScanItems; j++) {
        const int64_t i = from + tid * kScanItems + j;
        sum += i < p.n ? (A)x[off[0] + i * p.step] : A(0);
        v[j] = sum;
      }
      A before = sum;  // inclusive over the warp
      for (int m = 1; m < 32; m <<= 1) {
        const A o = __shfl_up_sync(~0u, before, m);
        if (lane >= m) before += o;
      }
      if (lane == 31) shared[warp] = before;
      __syncthreads();
      A total = 0, offset = carry;
      for (int w = 0; w < kScanThreads / 32; w++) {
        if (w == warp) offset += total;
        total += shared[w];
      }
      const A start = offset + (before - sum);
      UNROLL for (int j = 0; j < kScanItems; j++) {
        const int64_t i = from + tid * kScanItems + j;
        if (i < p.n) y[off[1] + i * p.out_step] = (T)(start + v[j]);
      }
      carry += total;
      __syncthreads();
    }
  }
}

template <class T, class A> int cumsum(const smalti_view& x, const smalti_view& y, const Lines& p, int64_t back, void* stream) {
  const T* from = (const T*)x.ptr + (back ? (p.n - 1) * -p.step : 0);
  T* to = (T*)y.ptr + (back ? (p.n - 1) * -p.out_step : 0);
  int rc = 0;
  const int64_t step = p.step < 0 ? -p.step : p.step;
  if (p.n >= 128 && (step == 1 || (p.count < 4096 && p.n >= 1024))) {
    auto kernel = cumsum_rows<T, A>;
    LAUNCH(rc, kernel, dim3(grid_for(p.count, 1)), dim3(kScanThreads), kScanThreads / 32 * sizeof(A), stream, from, to, p);
  } else {
    auto kernel = cumsum_columns<T, A>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(p.count, 128)), dim3(128), stream, from, to, p);
  }
  return rc;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_cumsum(const smalti_view* x, const smalti_view* y, int32_t dim, int32_t back, void* stream) {
  if (!same_shape(*x, *y) || x->dtype != y->dtype || (x->rank && (dim < 0 || dim >= x->rank))) return kInvalid;
  Lines p{};
  Axis<2> axes[8];
  int outer = 0;
  p.count = p.n = 1;
  for (int d = 0; d < x->rank; d++) {
    if (d == dim) {
      p.n = x->shape[d];
      p.step = back ? -x->stride[d] : x->stride[d];
      p.out_step = back ? -y->stride[d] : y->stride[d];
    } else {
      axes[outer++] = {x->shape[d], {x->stride[d], y->stride[d]}};
      p.count *= x->shape[d];
    }
  }
  if (p.count * p.n == 0) return 0;
  p.lines = make_index(axes, outer);
  switch (x->dtype) {
    case SMALTI_F32: return cumsum<float, double>(*x, *y, p, back, stream);
    case SMALTI_F64: return cumsum<double, double>(*x, *y, p, back, stream);
    case SMALTI_I64: return cumsum<int64_t, int64_t>(*x, *y, p, back, stream);
    default: return kInvalid;
  }
}
