// Sliding windows as columns and back, as src/ops/unfold.rs does on the CPU. Each thread has an element of the result,
// neighbours have neighbouring ones: fold gathers what falls on a pixel, tap by tap, in the CPU's order.
#include "common/images.cuh"

namespace smalti {
namespace {

/// Windows along one axis.
struct WindowAxis {
  int64_t image, count, kernel, dilation, padding, stride;
  /// The window whose tap `k` falls on pixel `p`, or -1.
  DEV int64_t window(int64_t p, int64_t k) const {
    const int64_t at = p + padding - k * dilation, i = at < 0 ? -1 : divide(at, stride);
    return i >= 0 && i < count && i * stride == at ? i : -1;
  }
};
struct Moving { WindowAxis down, across; };

/// y [N, C, kh, kw, positions], row-major; T stands for all types of its size.
template <class T>
__global__ void __launch_bounds__(kImageBlock) unfold(Image<const T> x, T* y, int64_t count, int64_t channels, Moving m) {
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += threads) {
    const int64_t line = divide(i, m.across.count), row = divide(line, m.down.count);
    const int64_t taps = divide(row, m.across.kernel), plane = divide(taps, m.down.kernel), n = divide(plane, channels);
    const int64_t kx = row - taps * m.across.kernel, ky = taps - plane * m.down.kernel;
    const int64_t px = (i - line * m.across.count) * m.across.stride + kx * m.across.dilation - m.across.padding;
    const int64_t py = (line - row * m.down.count) * m.down.stride + ky * m.down.dilation - m.down.padding;
    const bool inside = py >= 0 && py < m.down.image && px >= 0 && px < m.across.image;
    y[i] = inside ? *x.at(n, plane - n * channels, py, px) : T{};
  }
}

/// y [N, C, H, W], row-major; s: strides of the columns.
template <class T>
__global__ void __launch_bounds__(kImageBlock)
    fold(const T* x, int64_t s0, int64_t s1, int64_t s2, T* y, int64_t count, int64_t channels, Moving m) {
  using A = Acc<T>;
  const int64_t threads = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += threads) {
    const int64_t line = divide(i, m.across.image), plane = divide(line, m.down.image), n = divide(plane, channels);
    const int64_t px = i - line * m.across.image, py = line - plane * m.down.image, c = plane - n * channels;
    const T* from = x + n * s0 + c * m.down.kernel * m.across.kernel * s1;
    A sum = 0;
    for (int64_t ky = 0; ky < m.down.kernel; ky++) {
      const int64_t wy = m.down.window(py, ky);
      if (wy < 0) continue;
      for (int64_t kx = 0; kx < m.across.kernel; kx++) {
        const int64_t wx = m.across.window(px, kx);
        if (wx >= 0) sum += widen(from[(ky * m.across.kernel + kx) * s1 + (wy * m.across.count + wx) * s2]);
      }
    }
    y[i] = narrow<T>(sum);
  }
}

/// The windows that connect images and columns.
bool moving_of(const smalti_view* image, const smalti_view* columns, const smalti_windows* w, Moving& m) {
  if (!is_images(image) || columns->rank != 3 || columns->dtype != image->dtype || columns->shape[0] != image->shape[0]) return false;
  for (int d = 0; d < 2; d++) {
    WindowAxis& a = d ? m.across : m.down;
    a = {image->shape[2 + d], 0, w->kernel[d], w->dilation[d], w->padding[d], w->stride[d]};
    if (a.kernel < 1 || a.dilation < 1 || a.padding < 0 || a.stride < 1) return false;
    const int64_t rest = a.image + 2 * a.padding - a.dilation * (a.kernel - 1) - 1;
    if (rest < 0) return false;
    a.count = rest / a.stride + 1;
  }
  return columns->shape[1] == image->shape[1] * m.down.kernel * m.across.kernel && columns->shape[2] == m.down.count * m.across.count;
}

bool is_float(int32_t dtype) { return dtype == SMALTI_F32 || dtype == SMALTI_BF16 || dtype == SMALTI_F16 || dtype == SMALTI_F64; }

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_unfold(const smalti_view* x, const smalti_view* y, const smalti_windows* windows, void* stream) {
  Moving m;
  if (!moving_of(x, y, windows, m) || !is_float(x->dtype) || !contiguous(*y)) return kInvalid;
  const int64_t n = count(*y);
  int rc = 0;
  if (n == 0) return 0;
  DISPATCH_SIZE(x->dtype, T, {
    auto kernel = unfold<T>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(n, kImageBlock)), dim3(kImageBlock), stream, image_of<const T>(*x), (T*)y->ptr, n, x->shape[1], m);
  });
  return rc;
}

extern "C" int32_t smalti_fold(const smalti_view* x, const smalti_view* y, const smalti_windows* windows, void* stream) {
  Moving m;
  if (!moving_of(y, x, windows, m) || !contiguous(*y)) return kInvalid;
  const int64_t n = count(*y);
  int rc = 0;
  if (n == 0) return 0;
  DISPATCH_FLOAT(x->dtype, T, {
    auto kernel = fold<T>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(n, kImageBlock)), dim3(kImageBlock), stream, (const T*)x->ptr, x->stride[0], x->stride[1], x->stride[2],
                (T*)y->ptr, n, y->shape[1], m);
  });
  return rc;
}
