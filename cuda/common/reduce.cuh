// Sums and maxima over warps and blocks, in a fixed order: bit-identical from run to run.
#pragma once
#include "../compat.cuh"

namespace smalti {

template <class T> DEV T warp_sum(T v) {
  for (int m = 16; m > 0; m >>= 1) v += __shfl_xor_sync(~0u, v, m);
  return v;
}
template <class T> DEV T warp_max(T v) {
  for (int m = 16; m > 0; m >>= 1) {
    const T o = __shfl_xor_sync(~0u, v, m);
    v = o > v ? o : v;
  }
  return v;
}
/// Sum over the block, known to all its threads. `scratch` has one T a warp; it may be used again right away.
template <class T> DEV T block_sum(T v, T* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  v = warp_sum(v);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  T s = scratch[0];
  for (int w = 1; w < warps; w++) s += scratch[w];
  __syncthreads();
  return s;
}

}  // namespace smalti
