// The places of affine maps for grid_sample, computed in f64 as on the CPU.
#include "common/exact.cuh"
#include "common/rows.cuh"

namespace smalti {
namespace {

constexpr int kAffineBlock = 256;

/// Coordinate of pixel `i` of `n`.
DEV double coordinate(int64_t i, int64_t n, bool corners) {
  if (corners) return n == 1 ? 0.0 : (double)(2 * i) / (double)(n - 1) - 1.0;
  return (double)(2 * i + 1) / (double)n - 1.0;
}

struct Places { int64_t images, height, width; bool corners; };

template <class T> __global__ void __launch_bounds__(kAffineBlock) affine(const T* theta, int64_t s0, int64_t s1, int64_t s2, T* y, Places p) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x, all = p.images * p.height * p.width * 2;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += threads) {
    const int64_t pixel = i >> 1, k = i & 1, line = divide(pixel, p.width), n = divide(line, p.height);
    const double u = coordinate(pixel - line * p.width, p.width, p.corners), v = coordinate(line - n * p.height, p.height, p.corners);
    const T* t = theta + n * s0 + k * s1;
    y[i] = narrow<T>((Acc<T>)(mul_rn((double)widen(t[0]), u) + mul_rn((double)widen(t[s2]), v) + (double)widen(t[2 * s2])));
  }
}

/// A block a row of theta.
template <class T> __global__ void __launch_bounds__(kAffineBlock) affine_backward(const T* dy, T* dtheta, Places p) {
  DYN_SMEM(raw);
  double* scratch = (double*)raw;
  const int tid = threadIdx.x;
  const int64_t area = p.height * p.width;
  for (int64_t row = blockIdx.x; row < p.images * 2; row += gridDim.x) {
    const int64_t n = row >> 1, k = row & 1;
    double sum[3] = {0, 0, 0};
    for (int64_t i = tid; i < area; i += kAffineBlock) {
      const int64_t y = divide(i, p.width);
      const double g = (double)widen(dy[(n * area + i) * 2 + k]);
      sum[0] += g * coordinate(i - y * p.width, p.width, p.corners);
      sum[1] += g * coordinate(y, p.height, p.corners);
      sum[2] += g;
    }
    UNROLL for (int j = 0; j < 3; j++) {
      sum[j] = block_sum(sum[j], scratch);
      if (tid == 0) dtheta[row * 3 + j] = narrow<T>((Acc<T>)sum[j]);
    }
  }
}

template <class T> int forward(const smalti_view& theta, const smalti_view& y, const Places& p, void* stream) {
  int rc = 0;
  auto kernel = affine<T>;
  LAUNCH_FLAT(rc, kernel, dim3(grid_for(count(y), kAffineBlock)), dim3(kAffineBlock), stream, (const T*)theta.ptr, theta.stride[0], theta.stride[1],
              theta.stride[2], (T*)y.ptr, p);
  return rc;
}
template <class T> int backward(const smalti_view& dy, const smalti_view& dtheta, const Places& p, void* stream) {
  int rc = 0;
  auto kernel = affine_backward<T>;
  LAUNCH(rc, kernel, dim3(grid_for(p.images * 2, 1)), dim3(kAffineBlock), 32 * sizeof(double), stream, (const T*)dy.ptr, (T*)dtheta.ptr, p);
  return rc;
}

bool is_affine(const smalti_view* theta, const smalti_view* y) {
  return theta->rank == 3 && theta->shape[1] == 2 && theta->shape[2] == 3 && y->rank == 4 && y->shape[0] == theta->shape[0] &&
         y->shape[3] == 2 && theta->dtype == y->dtype && contiguous(*y);
}
Places places_of(const smalti_view& y, bool corners) { return {y.shape[0], y.shape[1], y.shape[2], corners}; }

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_affine_grid_forward(const smalti_view* theta, const smalti_view* y, int32_t corners, void* stream) {
  if (!is_affine(theta, y)) return kInvalid;
  if (count(*y) == 0) return 0;
  DISPATCH_FLOAT(y->dtype, T, return forward<T>(*theta, *y, places_of(*y, corners != 0), stream));
  return 0;
}

extern "C" int32_t smalti_affine_grid_backward(const smalti_view* dy, const smalti_view* dtheta, int32_t corners, void* stream) {
  if (!is_affine(dtheta, dy) || !contiguous(*dtheta)) return kInvalid;
  if (dtheta->shape[0] == 0) return 0;
  DISPATCH_FLOAT(dy->dtype, T, return backward<T>(*dy, *dtheta, places_of(*dy, corners != 0), stream));
  return 0;
}
