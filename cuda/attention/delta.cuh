// delta = rowsum(dO * O), which both backward passes read: a warp a query and head.
#pragma once
#include "../common/reduce.cuh"
#include "problem.cuh"

namespace smalti {
namespace attention {

template <class T> __global__ void __launch_bounds__(256) delta_rows(const Problem p) {
  const int lane = threadIdx.x & 31;
  const int64_t rows = (int64_t)p.batch * p.heads * p.qs.img_h * p.qs.img_w, step = (int64_t)gridDim.x * (blockDim.x >> 5);
  for (int64_t i = (int64_t)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); i < rows; i += step) {
    // heads innermost: neighbouring warps read neighbouring memory of packed tensors
    int64_t r = i;
    const int64_t h = r % p.heads; r /= p.heads;
    const int64_t x = r % p.qs.img_w; r /= p.qs.img_w;
    const int64_t y = r % p.qs.img_h, b = r / p.qs.img_h;
    const T* o = (const T*)p.o.p + b * p.o.b + h * p.o.h + y * p.o.y + x * p.o.x;
    const T* go = (const T*)p.go.p + b * p.go.b + h * p.go.h + y * p.go.y + x * p.go.x;
    Acc<T> sum = 0;
    for (int c = lane * 2; c < p.o.n; c += 64) {
      sum += widen(o[c]) * widen(go[c]);
      if (c + 1 < p.o.n) sum += widen(o[c + 1]) * widen(go[c + 1]);
    }
    sum = warp_sum(sum);
    if (lane == 0) ((Acc<T>*)p.delta)[((b * p.heads + h) * p.qs.img_h + y) * p.qs.img_w + x] = sum;
  }
}

template <class T> int32_t run_delta(const Problem& p, void* stream) {
  int rc = 0;
  const int64_t rows = (int64_t)p.batch * p.heads * p.qs.img_h * p.qs.img_w;
  LAUNCH(rc, delta_rows<T>, dim3(grid_for(rows, 8)), dim3(256), 0, stream, p);
  return rc;
}

}  // namespace attention
}  // namespace smalti
