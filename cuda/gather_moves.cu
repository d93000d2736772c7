// Elements chosen or moved by position: masked_fill, triangles, rolls, padding. What src/ops/masked.rs,
// triangle.rs, roll.rs and pad.rs do on the CPU; exact, since nothing is computed.
#include "common/dtype.cuh"
#include "common/walk.cuh"

namespace smalti {
namespace {

constexpr int kBlock = kThreads;

template <class T> T from_bits(uint64_t bits) {
  T v;
  __builtin_memcpy(&v, &bits, sizeof(T));
  return v;
}

/// y = mask ? value : x; operands x, mask, y.
template <class T>
__global__ void __launch_bounds__(kBlock)
    fill_masked(const T* __restrict__ x, const bool* __restrict__ mask, Walk<3> w, T value, T* __restrict__ y) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < w.numel; i += step) {
    int64_t at[3];
    offsets(w, i, at);
    y[at[2]] = mask[at[1]] ? value : x[at[0]];
  }
}

/// Coordinates of an element, each moved by a kernel in its own way; y is dense.
struct Box {
  int rank;
  int64_t shape[8];   // of y
  int64_t source[8];  // sizes of x
  int64_t stride[8];  // of x
  int64_t shift[8];
};

/// 0 outside the triangle: element (row, column) stays if column - row is at least (upper) or at most the diagonal.
template <class T>
__global__ void __launch_bounds__(kBlock)
    triangle(const T* __restrict__ x, Box b, int64_t diagonal, bool upper, int64_t n, T* __restrict__ y) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    int64_t rest = i, from = 0, away = 0;
    for (int d = b.rank - 1; d >= 0; d--) {
      const int64_t q = rest / b.shape[d], c = rest - q * b.shape[d];
      if (d >= b.rank - 2) away += d == b.rank - 1 ? c : -c;
      from += c * b.stride[d];
      rest = q;
    }
    y[i] = (upper ? away >= diagonal : away <= diagonal) ? x[from] : T{};
  }
}

/// y[c] = x[c - shift], round the ends (ROLL) or `value` beyond them.
template <class T, bool ROLL>
__global__ void __launch_bounds__(kBlock) move_box(const T* __restrict__ x, Box b, T value, int64_t n, T* __restrict__ y) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    int64_t rest = i, from = 0;
    bool inside = true;
    for (int d = b.rank - 1; d >= 0; d--) {
      const int64_t q = rest / b.shape[d];
      int64_t c = rest - q * b.shape[d] - b.shift[d];
      if (ROLL) c += c < 0 ? b.source[d] : 0;
      else inside = inside && c >= 0 && c < b.source[d];
      from += c * b.stride[d];
      rest = q;
    }
    y[i] = inside ? x[from] : value;
  }
}

/// The box of x and y, dimensions that do not move merged where x has no gap.
Box box_of(const smalti_view* x, const smalti_view* y, const int64_t* shift) {
  Box b{};
  for (int d = 0; d < x->rank; d++) {
    const bool still = shift[d] == 0 && x->shape[d] == y->shape[d];
    if (still && x->shape[d] == 1) continue;
    const int last = b.rank - 1;
    if (still && last >= 0 && b.shift[last] == 0 && b.shape[last] == b.source[last] &&
        b.stride[last] == x->stride[d] * x->shape[d]) {
      b.shape[last] *= y->shape[d];
      b.source[last] = b.shape[last];
      b.stride[last] = x->stride[d];
      continue;
    }
    b.shape[b.rank] = y->shape[d];
    b.source[b.rank] = x->shape[d];
    b.stride[b.rank] = x->stride[d];
    b.shift[b.rank++] = shift[d];
  }
  return b;
}

/// Bytes that can be moved at once: the last dimension does not move and is dense.
int unit_of(const Box& b, const void* x, const void* y, int size) {
  const int last = b.rank - 1;
  if (last < 0 || b.shift[last] != 0 || b.stride[last] != 1 || b.shape[last] != b.source[last]) return size;
  for (int unit = 16; unit > size; unit /= 2) {
    const int64_t v = unit / size;
    bool fits = b.shape[last] % v == 0 && aligned_to(x, unit) && aligned_to(y, unit);
    for (int d = 0; d < last && fits; d++) fits = b.stride[d] % v == 0;
    if (fits) return unit;
  }
  return size;
}

template <class T, bool ROLL>
int32_t launch_move(const void* x, Box b, T value, int64_t n, void* y, int64_t v, void* stream) {
  int rc = 0;
  if (v > 1) {
    const int last = b.rank - 1;
    n /= v;
    b.shape[last] /= v;
    b.source[last] /= v;
    for (int d = 0; d < last; d++) b.stride[d] /= v;
  }
  auto kernel = move_box<T, ROLL>;
  LAUNCH_FLAT(rc, kernel, dim3(grid_for(n, kBlock)), dim3(kBlock), stream, (const T*)x, b, value, n, (T*)y);
  return rc;
}

template <bool ROLL>
int32_t move(const smalti_view* x, const smalti_view* y, const int64_t* shift, uint64_t bits, void* stream) {
  const int64_t n = count(y);
  if (n == 0) return 0;
  const Box b = box_of(x, y, shift);
  const int size = size_of(x->dtype), unit = unit_of(b, x->ptr, y->ptr, size);
  // the value repeated over a unit
  uint64_t word = bits;
  for (int have = size; have < 8; have *= 2) word = (word & ((1ull << 8 * have) - 1)) | word << 8 * have;
  switch (unit) {
    case 1: return launch_move<uint8_t, ROLL>(x->ptr, b, (uint8_t)word, n, y->ptr, unit / size, stream);
    case 2: return launch_move<uint16_t, ROLL>(x->ptr, b, (uint16_t)word, n, y->ptr, unit / size, stream);
    case 4: return launch_move<uint32_t, ROLL>(x->ptr, b, (uint32_t)word, n, y->ptr, unit / size, stream);
    case 8: return launch_move<uint64_t, ROLL>(x->ptr, b, word, n, y->ptr, unit / size, stream);
    default: {
      const uint32_t low = (uint32_t)word, high = (uint32_t)(word >> 32);
      uint4 four;
      four.x = four.z = low;
      four.y = four.w = high;
      return launch_move<uint4, ROLL>(x->ptr, b, four, n, y->ptr, unit / size, stream);
    }
  }
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_masked_fill(const smalti_view* x, const smalti_view* mask, uint64_t bits, const smalti_view* y,
                                      void* stream) {
  if (mask->dtype != SMALTI_BOOL || x->dtype != y->dtype || !same_shape(x, y) || !same_shape(mask, y)) return kInvalid;
  const int64_t* strides[] = {x->stride, mask->stride, y->stride};
  const Walk<3> w = make_walk<3>(y->rank, y->shape, strides);
  int rc = 0;
  if (w.numel == 0) return 0;
  DISPATCH_SIZE(x->dtype, T, {
    auto kernel = fill_masked<T>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(w.numel, kBlock)), dim3(kBlock), stream, (const T*)x->ptr, (const bool*)mask->ptr, w,
                from_bits<T>(bits), (T*)y->ptr);
  })
  return rc;
}

extern "C" int32_t smalti_triangle(const smalti_view* x, int64_t diagonal, int32_t upper, const smalti_view* y, void* stream) {
  if (x->rank < 2 || x->dtype != y->dtype || !same_shape(x, y) || !is_contiguous(y)) return kInvalid;
  const int64_t n = count(y);
  if (n == 0) return 0;
  Box b{};
  b.rank = x->rank;
  for (int d = 0; d < x->rank; d++) {
    b.shape[d] = b.source[d] = x->shape[d];
    b.stride[d] = x->stride[d];
  }
  int rc = 0;
  DISPATCH_SIZE(x->dtype, T, {
    auto kernel = triangle<T>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(n, kBlock)), dim3(kBlock), stream, (const T*)x->ptr, b, diagonal, upper != 0, n,
                (T*)y->ptr);
  })
  return rc;
}

extern "C" int32_t smalti_roll(const smalti_view* x, const int64_t* places, const smalti_view* y, void* stream) {
  if (x->dtype != y->dtype || !same_shape(x, y) || !is_contiguous(y)) return kInvalid;
  for (int d = 0; d < x->rank; d++)
    if (places[d] < 0 || (places[d] > 0 && places[d] >= x->shape[d])) return kInvalid;
  return move<true>(x, y, places, 0, stream);
}

extern "C" int32_t smalti_pad_constant(const smalti_view* x, const int64_t* before, uint64_t bits, const smalti_view* y,
                                       void* stream) {
  if (x->dtype != y->dtype || x->rank != y->rank || !is_contiguous(y)) return kInvalid;
  return move<false>(x, y, before, bits, stream);
}
