// The order of numbers as integer keys, as src/ops/sort.rs has it (NaN last, both zeros equal), and a sort of up
// to 1024 of them in the registers of one warp.
#pragma once
#include "dtype.cuh"

namespace smalti {

/// A key whose unsigned order is the order of the values.
DEV uint32_t key32(float v) {
  if (v != v) return ~0u;
  const uint32_t bits = f2bits(v + 0.0f);
  return bits >> 31 ? ~bits : bits | 1u << 31;
}
DEV uint32_t key32(bf16 v) { return key32(bf2f(v)); }
DEV uint32_t key32(f16 v) { return key32(h2f(v)); }
DEV uint32_t key32(int32_t v) { return (uint32_t)v ^ 1u << 31; }
DEV uint32_t key32(uint8_t v) { return v; }
DEV uint32_t key32(bool v) { return v; }
DEV uint64_t key64(double v) {
  if (v != v) return ~0ull;
  v += 0.0;
  uint64_t bits;
#if defined(__CUDA_ARCH__)
  bits = (uint64_t)__double_as_longlong(v);
#else
  __builtin_memcpy(&bits, &v, 8);
#endif
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}
DEV uint64_t key64(int64_t v) { return (uint64_t)v ^ 1ull << 63; }

/// What is sorted: key and place in one, so that all differ and any sort is stable. 32 bits of each, or 64.
using Narrow = uint64_t;
struct Wide { uint64_t key, place; };

DEV bool before(Narrow a, Narrow b) { return a < b; }
DEV bool before(const Wide& a, const Wide& b) { return a.key < b.key || (a.key == b.key && a.place < b.place); }
DEV int64_t place_of(Narrow p) { return (int64_t)(uint32_t)p; }
DEV int64_t place_of(const Wide& p) { return (int64_t)p.place; }
DEV Narrow across(Narrow v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
DEV Wide across(const Wide& v, int mask) {
  const uint64_t key = __shfl_xor_sync(~0u, v.key, mask);
  return {key, __shfl_xor_sync(~0u, v.place, mask)};
}

/// Item of key and place; `flip` turns the order of the keys round but not that of equal ones.
template <class P> struct Item;
template <> struct Item<Narrow> {
  template <class T> static DEV Narrow of(T v, int64_t place, bool flip) {
    return (Narrow)(key32(v) ^ (flip ? ~0u : 0u)) << 32 | (uint32_t)place;
  }
  static DEV Narrow last() { return ~0ull; }
};
template <> struct Item<Wide> {
  template <class T> static DEV Wide of(T v, int64_t place, bool flip) {
    return {key64(v) ^ (flip ? ~0ull : 0ull), (uint64_t)place};
  }
  static DEV Wide last() { return {~0ull, ~0ull}; }
};

/// A warp's items of `n` elements, `step` apart from `x` on, the first of them at `place`; up to `room` the last ones.
template <class P, class T>
DEV void write_items(const T* x, int64_t step, int64_t n, int64_t place, bool flip, int room, P* items) {
  for (int i = threadIdx.x & 31; i < room; i += 32)
    items[i] = i < n ? Item<P>::of(x[i * step], place + i, flip) : Item<P>::last();
}
/// The same from element `from` of a tensor whose dtype is a run-time number: a kernel for each would have the sort again.
template <class P>
DEV void write_items(const void* x, int32_t dtype, int64_t from, int64_t step, int64_t n, int64_t place, bool flip, int room, P* items) {
#define ITEMS_OF(DTYPE, T) \
  case DTYPE: write_items((const T*)x + from, step, n, place, flip, room, items); break;
  if constexpr (sizeof(P) == sizeof(Wide)) {
    switch (dtype) { ITEMS_OF(SMALTI_F64, double) ITEMS_OF(SMALTI_I64, int64_t) }
  } else {
    switch (dtype) {
      ITEMS_OF(SMALTI_F32, float) ITEMS_OF(SMALTI_BF16, bf16) ITEMS_OF(SMALTI_F16, f16)
      ITEMS_OF(SMALTI_I32, int32_t) ITEMS_OF(SMALTI_U8, uint8_t) ITEMS_OF(SMALTI_BOOL, bool)
    }
  }
#undef ITEMS_OF
}
/// What a warp has written, item number lane * R + r to `v[r]`. The memory is free afterwards.
template <int R, class P> DEV void take_items(const P* items, P (&v)[R]) {
  __syncwarp();
  UNROLL
  for (int r = 0; r < R; r++) v[r] = items[(threadIdx.x & 31) * R + r];
  __syncwarp();
}

/// Sorts the 32 * R items of a warp (Batcher's bitonic network); item number lane * R + r is `v[r]`. Items of one
/// lane are compared in registers, so only distances of R and more cost shuffles.
template <int R, class P> DEV void warp_sort(P (&v)[R]) {
  const int first = (int)(threadIdx.x & 31) * R;
  for (int size = 2; size <= 32 * R; size <<= 1) {
    for (int d = size >> 1; d >= R; d >>= 1) {
      UNROLL
      for (int r = 0; r < R; r++) {
        const P other = across(v[r], d / R);
        const bool up = !((first + r) & size), low = !((first + r) & d);
        if (before(other, v[r]) == (up == low)) v[r] = other;
      }
    }
    UNROLL
    for (int d = R / 2; d > 0; d >>= 1) {
      if (d >= size) continue;
      UNROLL
      for (int r = 0; r < R; r++) {
        if (r & d) continue;
        const bool up = !((first + r) & size);
        if (before(v[r | d], v[r]) == up) {
          const P t = v[r];
          v[r] = v[r | d];
          v[r | d] = t;
        }
      }
    }
  }
}

/// The most that `warp_sort` takes.
constexpr int64_t kWarpSort = 1024;

}  // namespace smalti

/// Runs the statements with `R` the registers a lane needs to sort `n` items (at most 1024).
#define DISPATCH_LANES(n, R, ...)                                                                            \
  if ((n) <= 32) { constexpr int R = 1; __VA_ARGS__; }                                                       \
  else if ((n) <= 64) { constexpr int R = 2; __VA_ARGS__; }                                                  \
  else if ((n) <= 128) { constexpr int R = 4; __VA_ARGS__; }                                                 \
  else if ((n) <= 256) { constexpr int R = 8; __VA_ARGS__; }                                                 \
  else if ((n) <= 512) { constexpr int R = 16; __VA_ARGS__; }                                                \
  else { constexpr int R = 32; __VA_ARGS__; }
