// The reconstruction loss of masked autoencoders and its gradient (He et al., CVPR 2022, section 3 and "Normalized
// pixels" of 4.1): targets are read straight from the images, normalised in registers, compared, and the gradient
// written, in one pass. What masked_patch_loss of src/ops/patchify.rs does on the CPU.
#include "common/dtype.cuh"
#include "common/reduce.cuh"
#include "common/walk.cuh"

namespace smalti {
namespace {

constexpr int kBlock = 128, kWarps = kBlock / 32;
/// Blocks of a sum, by its length alone, so that its order is the same on every device.
constexpr int kSumBlocks = 64;
int blocks_of(int64_t n) {
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  return (int)(blocks < 1 ? 1 : blocks < kSumBlocks ? blocks : kSumBlocks);
}
/// Target values that a lane keeps in registers: patches of up to 1024 values are read once.
constexpr int kKept = 32;

/// part[block] = sum of what the block's threads stride over.
template <class T>
__global__ void __launch_bounds__(kBlock) sum_blocks(const T* x, int64_t n, double* part) {
  DYN_SMEM(raw);
  double sum = 0;
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) sum += (double)x[i];
  sum = block_sum(sum, (double*)raw);
  if (threadIdx.x == 0) part[blockIdx.x] = sum;
}

/// *out = (sum of part) / (width * *total), or the sum alone where total is null.
template <class Out>
__global__ void sum_parts(const double* part, int n, double width, const double* total, Out* out) {
  double sum = 0;
  for (int i = 0; i < n; i++) sum += part[i];
  if (threadIdx.x == 0) *out = (Out)(total ? sum / (width * *total) : sum);
}

struct Patches {
  int64_t step_n, step_row, step_column;  // of the images: sample, row of patches, column of patches
  int64_t step_c, step_y, step_x;
  int64_t patches, columns, all;  // of a sample, of a row of patches, of the batch
  int p, c, width;
};

/// What the lanes of a warp do with the values of one patch; value j is lane j % 32's.
template <class A, class In> struct Target {
  const In* corner;
  const int64_t* offset;
  DEV A at(int j) const { return (A)widen(corner[offset[j]]); }
};

/// Mean and 1 / deviation of a patch. Measured from the first value the mean of a constant patch is exact: its
/// variance is 0, so an error would grow by 1 / sqrt(eps).
template <bool KEPT, class A, class In>
DEV void moments(const Target<A, In>& target, const A (&t)[kKept], int width, A eps, A& mean, A& inverse) {
  const int lane = threadIdx.x & 31;
  const A first = target.at(0);
  A sum = 0, squares = 0;
  if constexpr (KEPT) {
    UNROLL
    for (int r = 0; r < kKept; r++) if (lane + 32 * r < width) sum += t[r] - first;
  } else {
    ROLLED for (int j = lane; j < width; j += 32) sum += target.at(j) - first;
  }
  mean = first + warp_sum(sum) / (A)width;
  if constexpr (KEPT) {
    UNROLL
    for (int r = 0; r < kKept; r++) if (lane + 32 * r < width) squares += (t[r] - mean) * (t[r] - mean);
  } else {
    ROLLED for (int j = lane; j < width; j += 32) {
      const A d = target.at(j) - mean;
      squares += d * d;
    }
  }
  inverse = (A)1 / sqrt(warp_sum(squares) / (A)(width - 1) + eps);
}

/// A warp a patch: each[patch] = mask * sum of (pred - target)^2, grad = 2 mask (pred - target) / (width * total).
template <class T, class In, class M, bool KEPT>
__global__ void __launch_bounds__(kBlock)
    masked_loss(const T* __restrict__ pred, const In* __restrict__ images, const M* __restrict__ mask, Patches s, bool norm,
                double eps, const double* __restrict__ total, double* __restrict__ each, T* __restrict__ grad) {
  using A = Acc<T>;
  DYN_SMEM(raw);
  int64_t* offset = (int64_t*)raw;  // of a patch's values in (row, column, channel) order
  ROLLED for (int j = threadIdx.x; j < s.width; j += blockDim.x) {
    const int pixel = j / s.c, y = pixel / s.p;
    offset[j] = (j - pixel * s.c) * s.step_c + y * s.step_y + (pixel - y * s.p) * s.step_x;
  }
  __syncthreads();
  const int lane = threadIdx.x & 31;
  const int64_t step = (int64_t)gridDim.x * kWarps;
  for (int64_t at = (int64_t)blockIdx.x * kWarps + (threadIdx.x >> 5); at < s.all; at += step) {
    const double weight = (double)mask[at];
    T* to = grad ? grad + at * s.width : nullptr;
    if (weight == 0) {
      ROLLED for (int j = lane; j < s.width && to; j += 32) to[j] = narrow<T>((A)0);
      if (lane == 0) each[at] = 0;
      continue;
    }
    const int64_t n = at / s.patches, patch = at - n * s.patches, row = patch / s.columns;
    const Target<A, In> target{
        images + n * s.step_n + row * s.step_row + (patch - row * s.columns) * s.step_column, offset};
    A t[kKept];
    if constexpr (KEPT) {
      UNROLL
      for (int r = 0; r < kKept; r++) t[r] = lane + 32 * r < s.width ? target.at(lane + 32 * r) : (A)0;
    }
    A mean = 0, inverse = 1, sum = 0;
    if (norm) moments<KEPT>(target, t, s.width, (A)eps, mean, inverse);
    const A scale = (A)(2.0 * weight / ((double)s.width * *total));
    const T* x = pred + at * s.width;
    const auto value = [&](int j, A pixel) {
      const A d = widen(x[j]) - (pixel - mean) * inverse;
      sum += d * d;
      if (to) to[j] = narrow<T>(d * scale);
    };
    if constexpr (KEPT) {
      UNROLL
      for (int r = 0; r < kKept; r++) if (lane + 32 * r < s.width) value(lane + 32 * r, t[r]);
    } else {
      ROLLED for (int j = lane; j < s.width; j += 32) value(j, target.at(j));
    }
    sum = warp_sum(sum);
    if (lane == 0) each[at] = (double)sum * weight;
  }
}

template <class T, class In, class M>
int32_t launch_loss(const smalti_view* pred, const smalti_view* images, const smalti_view* mask, const Patches& s, bool norm,
                    double eps, double* work, const smalti_view* loss, const smalti_view* grad, void* stream) {
  int rc = 0;
  double *total = work, *part = work + 1, *each = part + kSumBlocks;
  const int blocks = blocks_of(s.all);
  const size_t sums = kWarps * sizeof(double);
  LAUNCH(rc, sum_blocks<M>, dim3(blocks), dim3(kBlock), sums, stream, (const M*)mask->ptr, s.all, part);
  if (!rc)
    LAUNCH_FLAT(rc, sum_parts<double>, dim3(1), dim3(32), stream, part, blocks, 0.0, (const double*)nullptr, total);
  auto kernel = s.width <= 32 * kKept ? masked_loss<T, In, M, true> : masked_loss<T, In, M, false>;
  if (!rc)
    LAUNCH(rc, kernel, dim3(grid_for(s.all, kWarps)), dim3(kBlock), s.width * sizeof(int64_t), stream, (const T*)pred->ptr,
           (const In*)images->ptr, (const M*)mask->ptr, s, norm, eps, total, each, grad ? (T*)grad->ptr : nullptr);
  if (!rc) LAUNCH(rc, sum_blocks<double>, dim3(blocks), dim3(kBlock), sums, stream, each, s.all, part);
  if (!rc)
    LAUNCH_FLAT(rc, sum_parts<Acc<T>>, dim3(1), dim3(32), stream, part, blocks, (double)s.width, total,
                (Acc<T>*)loss->ptr);
  return rc;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_masked_loss_workspace(int64_t patches) {
  return (patches + 1 + kSumBlocks) * (int64_t)sizeof(double);
}

extern "C" int32_t smalti_masked_loss(const smalti_view* pred, const smalti_view* images, const smalti_view* mask, int64_t p,
                                      int32_t norm, double eps, double* workspace, const smalti_view* loss,
                                      const smalti_view* grad, void* stream) {
  if (images->rank != 4 || p < 1 || pred->rank != 3 || mask->rank != 2 || !is_contiguous(pred) || !is_contiguous(mask) ||
      images->shape[2] % p || images->shape[3] % p)
    return kInvalid;
  const int64_t *size = images->shape, *step = images->stride, c = size[1], rows = size[2] / p, columns = size[3] / p;
  const int64_t width = p * p * c;
  if (width > 25600 || pred->shape[0] != size[0] || pred->shape[1] != rows * columns || pred->shape[2] != width ||
      mask->shape[0] != size[0] || mask->shape[1] != rows * columns)
    return kInvalid;
  if (grad && (!same_shape(grad, pred) || grad->dtype != pred->dtype || !is_contiguous(grad))) return kInvalid;
  if (loss->dtype != (pred->dtype == SMALTI_F64 ? SMALTI_F64 : SMALTI_F32) || count(loss) != 1) return kInvalid;
  const Patches s{step[0], p * step[2], p * step[3], step[1],      step[2], step[3],   rows * columns,
                  columns, size[0] * rows * columns, (int)p, (int)c, (int)width};
#define CASE(PRED, IMAGES, MASK, T, In, M)                                                                   \
  if (pred->dtype == PRED && images->dtype == IMAGES && mask->dtype == MASK)                                 \
    return launch_loss<T, In, M>(pred, images, mask, s, norm != 0, eps, workspace, loss, grad, stream);
  CASE(SMALTI_F32, SMALTI_F32, SMALTI_F32, float, float, float)
  CASE(SMALTI_F32, SMALTI_U8, SMALTI_F32, float, uint8_t, float)
  CASE(SMALTI_BF16, SMALTI_BF16, SMALTI_F32, bf16, bf16, float)
  CASE(SMALTI_BF16, SMALTI_F32, SMALTI_F32, bf16, float, float)
  CASE(SMALTI_BF16, SMALTI_U8, SMALTI_F32, bf16, uint8_t, float)
  CASE(SMALTI_F16, SMALTI_F16, SMALTI_F32, f16, f16, float)
  CASE(SMALTI_F16, SMALTI_F32, SMALTI_F32, f16, float, float)
  CASE(SMALTI_F16, SMALTI_U8, SMALTI_F32, f16, uint8_t, float)
  CASE(SMALTI_F64, SMALTI_F64, SMALTI_F32, double, double, float)
  CASE(SMALTI_F64, SMALTI_F64, SMALTI_F64, double, double, double)
#undef CASE
  return kInvalid;
}
