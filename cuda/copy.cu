// Copies between strided views, with conversion; constants.
#include <type_traits>
#include "common/strided.cuh"
#include "kernels.h"
using namespace smalti;

// ---- conversion: as Rust's `as` (floats truncate and saturate, NaN is 0), anything to bool is != 0 ----

template <class T> struct IsFloat { static constexpr bool value = false; };
template <> struct IsFloat<float> { static constexpr bool value = true; };
template <> struct IsFloat<double> { static constexpr bool value = true; };
template <> struct IsFloat<bf16> { static constexpr bool value = true; };
template <> struct IsFloat<f16> { static constexpr bool value = true; };

template <class T> struct Range;
template <> struct Range<int64_t> { HOST_DEV static double low() { return -9223372036854775808.0; } HOST_DEV static double high() { return 9223372036854775808.0; } HOST_DEV static int64_t most() { return INT64_MAX; } HOST_DEV static int64_t least() { return INT64_MIN; } };
template <> struct Range<int32_t> { HOST_DEV static double low() { return -2147483648.0; } HOST_DEV static double high() { return 2147483648.0; } HOST_DEV static int32_t most() { return INT32_MAX; } HOST_DEV static int32_t least() { return INT32_MIN; } };
template <> struct Range<uint8_t> { HOST_DEV static double low() { return 0.0; } HOST_DEV static double high() { return 256.0; } HOST_DEV static uint8_t most() { return 255; } HOST_DEV static uint8_t least() { return 0; } };

template <class B, bool FLOAT = IsFloat<B>::value> struct To {
  /// integer <- number
  template <class A> HOST_DEV static B from(A a) {
    if constexpr (IsFloat<A>::value) {
      const double x = (double)widen(a);
      return x != x ? (B)0 : x >= Range<B>::high() ? Range<B>::most() : x <= Range<B>::low() ? Range<B>::least() : (B)x;
    } else {
      return (B)a;
    }
  }
};
template <> struct To<bool, false> {
  template <class A> HOST_DEV static bool from(A a) { return widen(a) != (Acc<A>)0; }
};
template <class B> struct To<B, true> {
  template <class A> HOST_DEV static B from(A a) {
    if constexpr (sizeof(Acc<B>) == 8) return narrow<B>((Acc<B>)widen(a));
    else if constexpr (sizeof(B) == 4) return (B)widen(a);
    // halves round once from f32; a double or a large integer rounds to f32 first, as the CPU code does
    else return narrow<B>((float)(double)widen(a));
  }
};

template <class A, class B> __global__ void __launch_bounds__(256) convert(Strided<2> s, const A* x, B* y) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < s.count; i += step) {
    int64_t at[2];
    locate(s, i, at);
    y[at[1]] = To<B>::from(x[at[0]]);
  }
}

template <class A, class B> int32_t run_convert(const Strided<2>& s, const smalti_view* x, const smalti_view* y, void* stream) {
  int rc = 0;
  auto kernel = convert<A, B>;
  LAUNCH_FLAT(rc, kernel, dim3(grid_for(s.count, 256)), dim3(256), stream, s, (const A*)x->ptr, (B*)y->ptr);
  return rc;
}

// ---- plain copies: by element size, 16 bytes at a time where both sides lie so ----

template <class T> __global__ void __launch_bounds__(256) move(Strided<2> s, const T* x, T* y) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < s.count; i += step) {
    int64_t at[2];
    locate(s, i, at);
    y[at[1]] = x[at[0]];
  }
}

constexpr int kTile = 32;

/// [batch, rows, columns] <- its transpose: both sides in whole lines, by way of shared memory.
template <class T> __global__ void __launch_bounds__(256) transpose(int64_t rows, int64_t columns, int64_t from_batch, int64_t from_column, int64_t to_batch, int64_t to_row, const T* x, T* y) {
  DYN_SMEM(raw);
  T* tile = (T*)raw;
  const int64_t r0 = (int64_t)blockIdx.x * kTile, c0 = (int64_t)blockIdx.y * kTile;
  const int lane = threadIdx.x & 31, line = threadIdx.x >> 5;
  x += (int64_t)blockIdx.z * from_batch;
  y += (int64_t)blockIdx.z * to_batch;
  for (int j = line; j < kTile; j += 8)
    if (c0 + j < columns && r0 + lane < rows) tile[lane * (kTile + 1) + j] = x[(c0 + j) * from_column + r0 + lane];
  __syncthreads();
  for (int j = line; j < kTile; j += 8)
    if (r0 + j < rows && c0 + lane < columns) y[(r0 + j) * to_row + c0 + lane] = tile[j * (kTile + 1) + lane];
}

/// Is the copy a batch of transposes, large enough to be worth it?
static bool transposes(const Strided<2>& s) {
  const int r = s.rank;
  if (r < 2 || r > 3) return false;
  return s.step[0][r - 2] == 1 && s.step[1][r - 1] == 1 && s.size[r - 1] >= kTile / 2 && s.size[r - 2] >= kTile / 2 &&
         (s.size[r - 1] + kTile - 1) / kTile <= 65535 && (r == 2 || s.size[0] <= 65535);
}

template <class T> int32_t run_move(Strided<2> s, const void* x, void* y, void* stream) {
  int rc = 0;
  if (transposes(s)) {
    const int r = s.rank;
    const int64_t rows = s.size[r - 2], columns = s.size[r - 1];
    auto kernel = transpose<T>;
    LAUNCH(rc, kernel, dim3((unsigned)((rows + kTile - 1) / kTile), (unsigned)((columns + kTile - 1) / kTile), r == 3 ? (unsigned)s.size[0] : 1),
           dim3(256), kTile * (kTile + 1) * sizeof(T), stream, rows, columns, r == 3 ? s.step[0][0] : 0, s.step[0][r - 1],
           r == 3 ? s.step[1][0] : 0, s.step[1][r - 2], (const T*)x, (T*)y);
    return rc;
  }
  auto kernel = move<T>;
  LAUNCH_FLAT(rc, kernel, dim3(grid_for(s.count, 256)), dim3(256), stream, s, (const T*)x, (T*)y);
  return rc;
}

/// Can elements be joined into pieces `factor` times as large? Then the loop counts those.
static bool join(Strided<2>& s, int factor, size_t element, const void* x, const void* y) {
  const int last = s.rank - 1;
  if (s.rank == 0 || s.step[0][last] != 1 || s.step[1][last] != 1 || s.size[last] % factor) return false;
  if (!aligned(x, element * factor) || !aligned(y, element * factor)) return false;
  for (int d = 0; d < last; d++)
    if (s.step[0][d] % factor || s.step[1][d] % factor) return false;
  s.resize(last, s.size[last] / factor);
  s.count /= factor;
  for (int d = 0; d < last; d++) { s.step[0][d] /= factor; s.step[1][d] /= factor; }
  return true;
}

extern "C" int32_t smalti_copy(const smalti_view* x, const smalti_view* y, void* stream) {
  if (!same_shape(*x, *y)) return kInvalid;
  Strided<2> s = strided<2>({x, y});
  if (s.count == 0) return 0;
  if (x->dtype == y->dtype) {
    DISPATCH_SIZE(x->dtype, T, {
      if (join(s, 16 / sizeof(T), sizeof(T), x->ptr, y->ptr)) return run_move<uint4>(s, x->ptr, y->ptr, stream);
      return run_move<T>(s, x->ptr, y->ptr, stream);
    })
  }
  DISPATCH_ALL(x->dtype, A, DISPATCH_ALL(y->dtype, B, {
    if constexpr (!std::is_same_v<A, B>) return run_convert<A, B>(s, x, y, stream);
  }))
  return kInvalid;
}

template <class T> __global__ void __launch_bounds__(256) fill(Strided<1> s, T value, T* y) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < s.count; i += step) {
    int64_t at[1];
    locate(s, i, at);
    y[at[0]] = value;
  }
}

extern "C" int32_t smalti_fill(double value, const smalti_view* y, void* stream) {
  const Strided<1> s = strided<1>({y});
  if (s.count == 0) return 0;
  int rc = 0;
  uint64_t bits = 0;
  DISPATCH_ALL(y->dtype, T, {
    const T converted = To<T>::from(value);
    __builtin_memcpy(&bits, &converted, sizeof(T));
  })
  DISPATCH_SIZE(y->dtype, T, {
    auto kernel = fill<T>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(s.count, 256)), dim3(256), stream, s, (T)bits, (T*)y->ptr);
  })
  return rc;
}
