// Which patches a masked autoencoder keeps (He et al., CVPR 2022, section 3): a stable sort of noise by sample, in the
// registers of one warp. What random_masking_ids of src/ops/masking.rs does on the CPU, bit for bit.
#include <type_traits>
#include "common/order.cuh"
#include "common/philox.cuh"
#include "common/walk.cuh"

namespace smalti {
namespace {

/// Noise [N, L] as keys.
template <class T, class P> struct FromNoise {
  using Item = P;
  const T* noise;
  int64_t step_n, step_l;
  template <int R> DEV void fill(P (&v)[R], int64_t sample, int64_t len) const {
    const int64_t first = (int64_t)(threadIdx.x & 31) * R;
    UNROLL
    for (int r = 0; r < R; r++) {
      const int64_t at = first + r;
      v[r] = at < len ? smalti::Item<P>::of(noise[sample * step_n + at * step_l], at, false) : smalti::Item<P>::last();
    }
  }
};

/// Words `4 * block + sample * L + i` of a stream: the order of Tensor::rand([N, L]), whose numbers are a word's
/// upper 24 bits.
struct FromPhilox {
  using Item = Narrow;
  uint64_t seed, stream, block;
  template <int R> DEV void fill(Narrow (&v)[R], int64_t sample, int64_t len) const {
    const int64_t first = (int64_t)(threadIdx.x & 31) * R;
    uint64_t current = ~0ull;
    Words words{};
    UNROLL
    for (int r = 0; r < R; r++) {
      const uint64_t at = (uint64_t)(sample * len + first + r), wanted = block + at / 4;
      if (first + r >= len) {
        v[r] = smalti::Item<Narrow>::last();
        continue;
      }
      if (wanted != current) words = philox(seed, stream, current = wanted);
      const uint32_t j = (uint32_t)at & 3;
      const uint32_t word = j == 0 ? words.w[0] : j == 1 ? words.w[1] : j == 2 ? words.w[2] : words.w[3];
      v[r] = (Narrow)(word >> 8) << 32 | (uint32_t)(first + r);
    }
  }
};

constexpr int kIdsBlock = 128;

/// One warp a sample. The permutation and its inverse are put together in shared memory, so that the results are
/// written in whole lines.
template <int R, class Source>
__global__ void __launch_bounds__(kIdsBlock) masking_ids(Source source, int64_t n, int len, int64_t keep,
                                                         int64_t* ids_keep, int64_t* ids_restore, float* mask) {
  DYN_SMEM(raw);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  uint16_t* shuffle = (uint16_t*)raw + warp * 64 * R;
  uint16_t* restore = shuffle + 32 * R;
  for (int64_t sample = (int64_t)blockIdx.x * warps + warp; sample < n; sample += (int64_t)gridDim.x * warps) {
    typename Source::Item v[R];
    source.fill(v, sample, len);
    warp_sort(v);
    UNROLL
    for (int r = 0; r < R; r++) {
      const int at = lane * R + r;
      if (at >= len) continue;
      const int patch = (int)place_of(v[r]);
      shuffle[at] = (uint16_t)patch;
      restore[patch] = (uint16_t)at;
    }
    __syncwarp();
    for (int i = lane; i < len; i += 32) {
      if (i < keep) ids_keep[sample * keep + i] = shuffle[i];
      ids_restore[sample * len + i] = restore[i];
      mask[sample * len + i] = restore[i] < keep ? 0.0f : 1.0f;
    }
    __syncwarp();
  }
}

template <class Source>
int32_t launch_ids(Source source, int64_t n, int64_t len, int64_t keep, int64_t* ids_keep, int64_t* ids_restore,
                   float* mask, void* stream) {
  int rc = 0;
  const int warps = kIdsBlock / 32;
  DISPATCH_LANES(len, R, {
    auto kernel = masking_ids<R, Source>;
    LAUNCH(rc, kernel, dim3(grid_for(n, warps)), dim3(kIdsBlock), warps * 64 * R * sizeof(uint16_t), stream, source, n,
           (int)len, keep, ids_keep, ids_restore, mask);
  })
  return rc;
}

/// Inverse permutations and the mask of what stands at `keep` and behind: for rows too long for a warp.
__global__ void masking_invert(const int64_t* shuffle, int64_t n, int64_t len, int64_t keep, int64_t* ids_keep,
                               int64_t* ids_restore, float* mask) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n * len; i += step) {
    const int64_t sample = i / len, place = i - sample * len, patch = sample * len + shuffle[i];
    if (place < keep) ids_keep[sample * keep + place] = shuffle[i];
    ids_restore[patch] = place;
    mask[patch] = place < keep ? 0.0f : 1.0f;
  }
}

bool ids_fit(const smalti_view* keep, const smalti_view* restore, const smalti_view* mask) {
  const int64_t n = restore->shape[0], len = restore->shape[1];
  return keep->dtype == SMALTI_I64 && restore->dtype == SMALTI_I64 && mask->dtype == SMALTI_F32 && keep->rank == 2 &&
         restore->rank == 2 && same_shape(restore, mask) && keep->shape[0] == n && keep->shape[1] <= len &&
         is_contiguous(keep) && is_contiguous(restore) && is_contiguous(mask);
}

/// flag = 1 if a row of ids [N, L] is no permutation of 0..L. A block a sample; one bit a number in shared memory. (A
/// bit set twice carries into others, but then the answer is known.)
__global__ void masking_check(const int64_t* ids, int64_t n, int64_t len, int32_t* flag) {
  DYN_SMEM(raw);
  unsigned* seen = (unsigned*)raw;
  const int64_t words = (len + 31) / 32;
  for (int64_t sample = blockIdx.x; sample < n; sample += gridDim.x) {
    for (int64_t i = threadIdx.x; i < words; i += blockDim.x) seen[i] = 0;
    __syncthreads();
    bool bad = false;
    for (int64_t i = threadIdx.x; i < len; i += blockDim.x) {
      const int64_t id = ids[sample * len + i];
      if (id < 0 || id >= len) bad = true;
      else if (atomicAdd(&seen[id / 32], 1u << (id % 32)) >> (id % 32) & 1) bad = true;
    }
    if (bad) atomicAdd(flag, 1);
    __syncthreads();
  }
}

__global__ void masking_clear(int32_t* flag) {
  if (threadIdx.x == 0) *flag = 0;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_masking_ids(const smalti_view* noise, const smalti_view* ids_keep,
                                      const smalti_view* ids_restore, const smalti_view* mask, void* stream) {
  if (!ids_fit(ids_keep, ids_restore, mask) || !same_shape(noise, ids_restore)) return kInvalid;
  const int64_t n = noise->shape[0], len = noise->shape[1], keep = ids_keep->shape[1];
  if (len > kWarpSort) return kInvalid;
  if (n == 0 || len == 0) return 0;
  int64_t *k = (int64_t*)ids_keep->ptr, *r = (int64_t*)ids_restore->ptr;
  float* m = (float*)mask->ptr;
  int rc = 0;
  DISPATCH_FLOAT(noise->dtype, T, {
    using P = std::conditional_t<sizeof(T) == 8, Wide, Narrow>;
    const FromNoise<T, P> source{(const T*)noise->ptr, noise->stride[0], noise->stride[1]};
    rc = launch_ids(source, n, len, keep, k, r, m, stream);
  })
  return rc;
}

extern "C" int32_t smalti_masking_random(uint64_t seed, uint64_t philox_stream, uint64_t block,
                                         const smalti_view* ids_keep, const smalti_view* ids_restore,
                                         const smalti_view* mask, void* stream) {
  if (!ids_fit(ids_keep, ids_restore, mask)) return kInvalid;
  const int64_t n = mask->shape[0], len = mask->shape[1];
  if (len > kWarpSort) return kInvalid;
  if (n == 0 || len == 0) return 0;
  return launch_ids(FromPhilox{seed, philox_stream, block}, n, len, ids_keep->shape[1], (int64_t*)ids_keep->ptr,
                    (int64_t*)ids_restore->ptr, (float*)mask->ptr, stream);
}

extern "C" int32_t smalti_masking_invert(const smalti_view* shuffle, const smalti_view* ids_keep,
                                         const smalti_view* ids_restore, const smalti_view* mask, void* stream) {
  if (!ids_fit(ids_keep, ids_restore, mask) || shuffle->dtype != SMALTI_I64 || !is_contiguous(shuffle) ||
      !same_shape(shuffle, mask))
    return kInvalid;
  int rc = 0;
  const int64_t n = mask->shape[0], len = mask->shape[1];
  if (n * len > 0)
    LAUNCH_FLAT(rc, masking_invert, dim3(grid_for(n * len, kThreads)), dim3(kThreads), stream, (const int64_t*)shuffle->ptr, n, len,
                ids_keep->shape[1], (int64_t*)ids_keep->ptr, (int64_t*)ids_restore->ptr, (float*)mask->ptr);
  return rc;
}

extern "C" int32_t smalti_masking_check(const smalti_view* ids, int32_t* flag, void* stream) {
  if (ids->rank != 2 || ids->dtype != SMALTI_I64 || !is_contiguous(ids)) return kInvalid;
  const int64_t n = ids->shape[0], len = ids->shape[1], bytes = (len + 31) / 32 * 4;
  if (bytes > 200 * 1024) return kInvalid;
  int rc = 0;
  LAUNCH_FLAT(rc, masking_clear, dim3(1), dim3(32), stream, flag);
  if (!rc && n * len > 0)
    LAUNCH(rc, masking_check, dim3(grid_for(n, 1)), dim3(128), bytes, stream, (const int64_t*)ids->ptr, n, len, flag);
  return rc;
}
