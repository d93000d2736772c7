// delta = rowsum(dO * O), which both backward passes read: as many lanes a query and head as its row has 16 bytes.
#pragma once
#include "launch.cuh"

namespace smalti {
namespace attention {

/// The query and head of row `i`, heads innermost: neighbouring lanes read neighbouring memory of packed tensors.
template <class I> DEV void delta_place(const Problem& p, I i, int64_t (&at)[4]) {
  const I heads = p.heads, across = p.qs.img_w, down = p.qs.img_h, token = i / heads, line = token / across, b = line / down;
  at[0] = b;
  at[1] = i - token * heads;
  at[2] = line - b * down;
  at[3] = token - line * across;
}

/// `lanes`: a power of two. `wide`: rows of O and dO can be read in 16 bytes.
template <class T> __global__ void __launch_bounds__(256) delta_rows(const Problem p, int lanes, bool wide) {
  constexpr int V = 16 / (int)sizeof(T);
  struct alignas(16) Chunk { T v[V]; };
  const int lane = threadIdx.x & 31, own = lane & (lanes - 1), n = p.o.n;
  const int64_t rows = (int64_t)p.batch * p.heads * p.qs.img_h * p.qs.img_w, step = (int64_t)gridDim.x * blockDim.x / lanes;
  // all lanes of a warp leave the loop together: they shuffle
  for (int64_t first = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x - lane) / lanes; first < rows; first += step) {
    const int64_t i = first + lane / lanes;
    int64_t at[4] = {0, 0, 0, 0};
    if (rows >> 31) delta_place<int64_t>(p, i, at);
    else delta_place<uint32_t>(p, (uint32_t)i, at);
    Acc<T> sum = 0;
    if (i < rows) {
      const T* o = (const T*)p.o.p + at[0] * p.o.b + at[1] * p.o.h + at[2] * p.o.y + at[3] * p.o.x;
      const T* go = (const T*)p.go.p + at[0] * p.go.b + at[1] * p.go.h + at[2] * p.go.y + at[3] * p.go.x;
      for (int c = own * V; c < n; c += lanes * V) {
        if (wide) {
          const Chunk a = *(const Chunk*)(o + c), b = *(const Chunk*)(go + c);
          UNROLL for (int e = 0; e < V; e++) sum += widen(a.v[e]) * widen(b.v[e]);
        } else {
          for (int e = 0; e < V && c + e < n; e++) sum += widen(o[c + e]) * widen(go[c + e]);
        }
      }
    }
    for (int m = lanes >> 1; m > 0; m >>= 1) sum += __shfl_xor_sync(~0u, sum, m);
    if (own == 0 && i < rows) ((Acc<T>*)p.delta)[((at[0] * p.heads + at[1]) * p.qs.img_h + at[2]) * p.qs.img_w + at[3]] = sum;
  }
}

template <class T> int32_t run_delta(const Problem& p, void* stream) {
  int rc = 0, lanes = 1;
  const int64_t rows = (int64_t)p.batch * p.heads * p.qs.img_h * p.qs.img_w;
  while (lanes < 32 && lanes * 16 < p.o.n * (int)sizeof(T)) lanes *= 2;
  const bool wide = aligned(p.o, 16, sizeof(T)) && aligned(p.go, 16, sizeof(T));
  LAUNCH(rc, delta_rows<T>, dim3(grid_for(rows, 256 / lanes)), dim3(256), 0, stream, p, lanes, wide);
  return rc;
}

}  // namespace attention
}  // namespace smalti
