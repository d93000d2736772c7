// Batches of images for kernel tests, in several memory orders.
#pragma once
#include "harness.hpp"
#include <algorithm>
#include <array>
#include <type_traits>

namespace test {

using Shape = std::array<int64_t, 4>;
inline size_t numel(const Shape& s) { return (size_t)(s[0] * s[1] * s[2] * s[3]); }

/// Dense [N, C, H, W], channels-last, the same with a gap after each pixel, and everything apart.
enum Layout { kFirst, kLast, kLastGap, kStrided };
const Layout kLayouts[] = {kFirst, kLast, kLastGap, kStrided};

inline Shape strides_of(const Shape& s, Layout layout) {
  switch (layout) {
    case kFirst: return {s[1] * s[2] * s[3], s[2] * s[3], s[3], 1};
    case kLast: return {s[1] * s[2] * s[3], 1, s[3] * s[1], s[1]};
    case kLastGap: return {(s[1] + 1) * s[2] * s[3], 1, s[3] * (s[1] + 1), s[1] + 1};
    default: return {(2 * s[3] + 1) * (s[2] + 1) * (s[1] + 2), (2 * s[3] + 1) * (s[2] + 1), 2 * s[3] + 1, 2};
  }
}

/// Images on the device; values are given and read in row-major order.
template <class T> struct Batch {
  Shape shape, step;
  Dev<T> memory;
  smalti_view view{};

  static size_t room(const Shape& s, const Shape& step) {
    if (numel(s) == 0) return 0;
    int64_t last = 1;
    for (int d = 0; d < 4; d++) last += (s[d] - 1) * step[d];
    return (size_t)last;
  }
  template <class F> static void each(const Shape& s, const Shape& step, F f) {
    size_t i = 0;
    for (int64_t n = 0; n < s[0]; n++)
      for (int64_t c = 0; c < s[1]; c++)
        for (int64_t y = 0; y < s[2]; y++)
          for (int64_t x = 0; x < s[3]; x++) f(i++, (size_t)(n * step[0] + c * step[1] + y * step[2] + x * step[3]));
  }
  static std::vector<T> laid(const std::vector<T>& v, const Shape& s, const Shape& step) {
    std::vector<T> out(room(s, step));
    if (out.size()) std::memset((void*)out.data(), 0xff, out.size() * sizeof(T));
    each(s, step, [&](size_t i, size_t at) { out[at] = v[i]; });
    return out;
  }
  Batch(const Shape& s, Layout l, const std::vector<T>& v) : shape(s), step(strides_of(s, l)), memory(laid(v, s, step)) { look(); }
  Batch(const Shape& s, Layout l) : shape(s), step(strides_of(s, l)), memory(room(s, step)) { look(); }
  void look() {
    view.ptr = (void*)memory.p;
    view.dtype = dtype_of<T>();
    view.rank = 4;
    for (int d = 0; d < 4; d++) { view.shape[d] = shape[d]; view.stride[d] = step[d]; }
  }
  std::vector<T> get() const {
    const auto raw = memory.get();
    std::vector<T> out(numel(shape));
    each(shape, step, [&](size_t i, size_t at) { out[i] = raw[at]; });
    return out;
  }
};

/// Half a unit in the last place of T, and what sums in f32 lose.
template <class T> double rounding() {
  return std::is_same<T, smalti::bf16>::value ? 1.0 / 256 : std::is_same<T, smalti::f16>::value ? 1.0 / 2048 : std::is_same<T, double>::value ? 1e-13 : 3e-6;
}

}  // namespace test
