// Which patches a masked autoencoder keeps (He et al., CVPR 2022, section 3): a stable sort of noise by sample, in the
// registers of one warp. What random_masking_ids of src/ops/masking.rs does on the CPU, bit for bit.
#include "common/order.cuh"
#include "common/philox.cuh"
#include "common/walk.cuh"

namespace smalti {
namespace {

/// What is sorted: noise [N, L] or, without it, words `4 * block + sample * L + i` of a stream: the order of
/// Tensor::rand([N, L]), whose numbers are a word's upper 24 bits.
struct Source {
  const void* noise;
  int64_t step_n, step_l;
  int32_t dtype;
  uint64_t seed, stream, block;
};

template <class P> DEV void write_keys(const Source& s, int64_t sample, int64_t len, int room, P* items) {
  if (s.noise) {
    write_items(s.noise, s.dtype, sample * s.step_n, s.step_l, len, 0, false, room, items);
    return;
  }
  if constexpr (sizeof(P) == sizeof(Narrow)) {
    const int lane = threadIdx.x & 31;
    const int64_t from = sample * len, end = from + len;
    ROLLED for (int64_t quad = from / 4 + lane; quad * 4 < end; quad += 32) {
      const Words words = philox(s.seed, s.stream, s.block + (uint64_t)quad);
      UNROLL
      for (int j = 0; j < 4; j++) {
        const int64_t i = quad * 4 + j - from;
        if (i >= 0 && i < len) items[i] = (Narrow)(words.w[j] >> 8) << 32 | (uint32_t)i;
      }
    }
    for (int i = (int)len + lane; i < room; i += 32) items[i] = Item<P>::last();
  }
}

constexpr int kIdsBlock = 128;

/// One warp a sample. The permutation and its inverse are put together in shared memory, so that the results are
/// written in whole lines.
template <int R, class P>
__global__ void __launch_bounds__(kIdsBlock) masking_ids(Source source, int64_t n, int len, int64_t keep,
                                                         int64_t* ids_keep, int64_t* ids_restore, float* mask) {
  DYN_SMEM(raw);
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  auto* items = (P*)raw + warp * 32 * R;
  uint16_t* shuffle = (uint16_t*)items;
  uint16_t* restore = shuffle + 32 * R;
  for (int64_t sample = (int64_t)blockIdx.x * warps + warp; sample < n; sample += (int64_t)gridDim.x * warps) {
    P v[R];
    write_keys(source, sample, len, 32 * R, items);
    take_items(items, v);
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

template <class P>
int32_t launch_ids(const Source& source, int64_t n, int64_t len, int64_t keep, int64_t* ids_keep, int64_t* ids_restore,
                   float* mask, void* stream) {
  int rc = 0;
  const int warps = kIdsBlock / 32;
  DISPATCH_LANES(len, R, {
    auto kernel = masking_ids<R, P>;
    LAUNCH(rc, kernel, dim3(grid_for(n, warps)), dim3(kIdsBlock), warps * 32 * R * sizeof(P), stream, source, n,
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
  if (noise->dtype < 0 || noise->dtype > SMALTI_F64) return kInvalid;
  const Source source{noise->ptr, noise->stride[0], noise->stride[1], noise->dtype, 0, 0, 0};
  return noise->dtype == SMALTI_F64 ? launch_ids<Wide>(source, n, len, keep, k, r, m, stream)
                                    : launch_ids<Narrow>(source, n, len, keep, k, r, m, stream);
}

extern "C" int32_t smalti_masking_random(uint64_t seed, uint64_t philox_stream, uint64_t block,
                                         const smalti_view* ids_keep, const smalti_view* ids_restore,
                                         const smalti_view* mask, void* stream) {
  if (!ids_fit(ids_keep, ids_restore, mask)) return kInvalid;
  const int64_t n = mask->shape[0], len = mask->shape[1];
  if (len > kWarpSort) return kInvalid;
  if (n == 0 || len == 0) return 0;
  const Source source{nullptr, 0, 0, 0, seed, philox_stream, block};
  return launch_ids<Narrow>(source, n, len, ids_keep->shape[1], (int64_t*)ids_keep->ptr, (int64_t*)ids_restore->ptr,
                            (float*)mask->ptr, stream);
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
