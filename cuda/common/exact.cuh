// Arithmetic that rounds alike everywhere: no contraction of products and sums but where it is written. Functions made
// of these, and their twins in src/cpu/simd.rs, give the same bits on every device.
#pragma once
#include <cmath>
#include "dtype.cuh"

namespace smalti {

#if defined(__CUDA_ARCH__)
DEV float mul_rn(float a, float b) { return __fmul_rn(a, b); }
DEV float add_rn(float a, float b) { return __fadd_rn(a, b); }
DEV float div_rn(float a, float b) { return __fdiv_rn(a, b); }
DEV float sqrt_rn(float a) { return __fsqrt_rn(a); }
DEV float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEV double mul_rn(double a, double b) { return __dmul_rn(a, b); }
#else
// A value that has been through memory the compiler may not look into is not contracted.
template <class A> HOST_DEV A opaque(A v) {
#if defined(__GNUC__) && !defined(__CUDACC__)
  __asm__("" : "+m"(v));
#endif
  return v;
}
HOST_DEV float mul_rn(float a, float b) { return opaque(a * b); }
HOST_DEV double mul_rn(double a, double b) { return opaque(a * b); }
HOST_DEV float add_rn(float a, float b) { return a + b; }
HOST_DEV float div_rn(float a, float b) { return a / b; }
HOST_DEV float sqrt_rn(float a) { return std::sqrt(a); }
HOST_DEV float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
#endif

/// Natural logarithm: `ln_f32` of src/cpu/simd.rs.
DEV float ln_exact(float x) {
  const uint32_t sqrt_half = 0x3f3504f3u;
  const bool subnormal = x < 1.17549435e-38f;
  const float scaled = subnormal ? mul_rn(x, 33554432.0f) : x;
  const uint32_t bits = f2bits(scaled) - sqrt_half;
  const float e = add_rn((float)((int32_t)bits >> 23), subnormal ? -25.0f : 0.0f);
  const float f = add_rn(bits2f((bits & 0x007fffffu) + sqrt_half), -1.0f);
  const float s = div_rn(f, add_rn(2.0f, f)), z = mul_rn(s, s), w = mul_rn(z, z);
  const float r = add_rn(mul_rn(fma_rn(w, 0.24279079f, 0.40000972f), w), mul_rn(fma_rn(w, 0.28498787f, 0.6666666f), z));
  const float half = mul_rn(mul_rn(0.5f, f), f);
  float y = add_rn(add_rn(fma_rn(e, 9.0580006e-6f, mul_rn(s, add_rn(half, r))), -half), f);
  y = fma_rn(e, 0.6931381f, y);
  if (x == 0.0f) y = -INFINITY;
  if (x < 0.0f) y = NAN;
  return x < INFINITY ? y : x;
}

/// Sine and cosine of `t` turns, 0 <= t < 1: `turn_f32` of src/cpu/simd.rs.
DEV void turn_exact(float t, float& sin, float& cos) {
  const float quarters = mul_rn(4.0f, t);
  const int k = (int)add_rn(quarters, 0.5f);
  const float r = add_rn(quarters, -(float)k), q = mul_rn(r, r);
  float s = fma_rn(q, 1.60441185e-4f, -4.6817541e-3f);
  s = fma_rn(s, q, 7.9692626e-2f);
  s = fma_rn(s, q, -6.4596410e-1f);
  s = mul_rn(fma_rn(s, q, 1.57079625f), r);
  float c = fma_rn(q, -2.5202042e-5f, 9.1926027e-4f);
  c = fma_rn(c, q, -2.0863481e-2f);
  c = fma_rn(c, q, 2.5366951e-1f);
  c = fma_rn(c, q, -1.2337005f);
  c = fma_rn(c, q, 1.0f);
  const bool odd = k & 1;
  sin = odd ? c : s;
  cos = odd ? s : c;
  if (k & 2) sin = -sin;
  if ((k + 1) & 2) cos = -cos;
}

}  // namespace smalti
