// Every instruction that CUDA C++ has no portable spelling for, with two bodies each: inline PTX (nvcc) and a
// warp-collective emulation (host). Kernels hold no asm of their own and pass pointers, never 32-bit shared
// addresses, across this boundary.
#pragma once
#include "compat.cuh"
namespace smalti {
struct bf16 { uint16_t x; };
struct f16 { uint16_t x; };
/// Conversions to nearest, ties to even: instructions on a GPU, else integer arithmetic, which gives the same but for the
/// bits of a NaN.
HOST_DEV float bits2f(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float f; __builtin_memcpy(&f, &u, 4); return f;
#endif
}
HOST_DEV uint32_t f2bits(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t u; __builtin_memcpy(&u, &f, 4); return u;
#endif
}
HOST_DEV float bf2f(bf16 v) { return bits2f((uint32_t)v.x << 16); }
HOST_DEV bf16 f2bf(float f) {
#if defined(__CUDA_ARCH__)
  bf16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h.x) : "f"(f)); return h;
#else
  const uint32_t u = f2bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {(uint16_t)(u >> 16 | 0x40)};
  return {(uint16_t)((u + 0x7fffu + (u >> 16 & 1)) >> 16)};
#endif
}
HOST_DEV float h2f(f16 v) {
#if defined(__CUDA_ARCH__)
  float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.x)); return f;
#else
  const uint32_t sign = (uint32_t)(v.x & 0x8000) << 16, body = (uint32_t)(v.x & 0x7fff) << 13, exponent = body & (0x7c00u << 13);
  if (exponent == (0x7c00u << 13)) return bits2f(sign | (body + ((255u - 31u) << 23)));
  if (exponent == 0) return bits2f(sign | f2bits(bits2f(body + (113u << 23)) - bits2f(113u << 23)));
  return bits2f(sign | (body + (112u << 23)));
#endif
}
HOST_DEV f16 f2h(float f) {
#if defined(__CUDA_ARCH__)
  f16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.x) : "f"(f)); return h;
#else
  const uint32_t u = f2bits(f), sign = u >> 16 & 0x8000, body = u & 0x7fffffff, sub = 126u << 23;
  if (body > 0x7f800000u) return {(uint16_t)(sign | 0x7e00)};
  if (body >= (143u << 23)) return {(uint16_t)(sign | 0x7c00)};
  if (body < (113u << 23)) return {(uint16_t)(sign | (f2bits(bits2f(body) + bits2f(sub)) - sub))};
  return {(uint16_t)(sign | ((body - (112u << 23) + 0xfff + (body >> 13 & 1)) >> 13))};
#endif
}
#if defined(__CUDACC__)
DEV uint32_t sptr(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
DEV uint32_t pack2(float lo, float hi) { uint32_t d; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo)); return d; }
DEV uint32_t pack2h(float lo, float hi) { uint32_t d; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo)); return d; }
DEV float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEV float lg2(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEV void ldsm4(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(sptr(p)) : "memory"); }
DEV void ldsm4t(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(sptr(p)) : "memory"); }
DEV void mma16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); }
DEV void mma16816h(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); }
DEV void st16(void* g, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(__cvta_generic_to_global(g)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory"); }
DEV void cp16(void* s, const void* g) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(sptr(s)), "l"(g) : "memory"); }
/// The same, of `bytes` (16 or 0) bytes, the rest zeros.
DEV void cp16z(void* s, const void* g, int bytes) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(sptr(s)), "l"(g), "r"(bytes) : "memory"); }
DEV void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEV void cp_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }
#else
inline uint32_t pack2(float lo, float hi) { return f2bf(lo).x | (uint32_t)f2bf(hi).x << 16; }
inline uint32_t pack2h(float lo, float hi) { return f2h(lo).x | (uint32_t)f2h(hi).x << 16; }
inline float ex2(float x) { return std::exp2(x); }
inline float lg2(float x) { return std::log2(x); }
struct Row { uint16_t v[8]; uintptr_t a; };
struct R4 { uint32_t r[4]; };
template <bool T> inline void ldsm4_(uint32_t (&r)[4], const void* p, int line) {
  if ((uintptr_t)p & 15) simt::die("ldmatrix: address not 16-byte aligned", line);
  Row row; std::memcpy(row.v, p, 16); row.a = (uintptr_t)p;  // each lane reads its own row: sanitizers see it
  R4 o = simt::collective<Row, R4>(T ? 4 : 3, line, row, false, [](unsigned char(*in)[64], unsigned char(*out)[64]) {
    for (int m = 0; m < 4; m++) {
      int hit[8] = {0}, worst = 0;  // bank groups of 16 bytes touched in one 8-row phase
      for (int i = 0; i < 8; i++) { int g = (int)(((Row*)in[m * 8 + i])->a / 16 % 8); if (++hit[g] > worst) worst = hit[g]; }
      simt::ctx().s.ldsm_phases++; simt::ctx().s.ldsm_conflicts += worst - 1;
      for (int l = 0; l < 32; l++) {
        auto at = [&](int rr, int cc) -> uint32_t { return ((Row*)in[m * 8 + rr])->v[cc]; };
        int a = l >> 2, b = (l & 3) * 2;
        ((R4*)out[l])->r[m] = T ? at(b, a) | at(b + 1, a) << 16 : at(a, b) | at(a, b + 1) << 16;
      }
    } });
  for (int i = 0; i < 4; i++) r[i] = o.r[i];
}
inline void ldsm4(uint32_t (&r)[4], const void* p, int line = __builtin_LINE()) { ldsm4_<false>(r, p, line); }
inline void ldsm4t(uint32_t (&r)[4], const void* p, int line = __builtin_LINE()) { ldsm4_<true>(r, p, line); }
struct MmaIn { float c[4]; uint32_t a[4], b[2]; };
struct F4 { float c[4]; };
template <bool HALF> inline void mma16816_(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
  MmaIn in{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  F4 o = simt::collective<MmaIn, F4>(HALF ? 15 : 5, line, in, false, [](unsigned char(*in)[64], unsigned char(*out)[64]) {
    float A[16][16], B[8][16];  // B as [n][k]
    auto f = [](uint32_t h) { return HALF ? h2f({(uint16_t)h}) : bf2f({(uint16_t)h}); };
    for (int l = 0; l < 32; l++) {
      const MmaIn& m = *(MmaIn*)in[l]; int g = l >> 2, t = (l & 3) * 2;
      for (int h = 0; h < 2; h++) {
        A[g][t + h] = f(m.a[0] >> 16 * h & 0xffff); A[g + 8][t + h] = f(m.a[1] >> 16 * h & 0xffff);
        A[g][t + 8 + h] = f(m.a[2] >> 16 * h & 0xffff); A[g + 8][t + 8 + h] = f(m.a[3] >> 16 * h & 0xffff);
        B[g][t + h] = f(m.b[0] >> 16 * h & 0xffff); B[g][t + 8 + h] = f(m.b[1] >> 16 * h & 0xffff);
      } }
    for (int l = 0; l < 32; l++) {
      const MmaIn& m = *(MmaIn*)in[l]; F4& o = *(F4*)out[l]; int g = l >> 2, t = (l & 3) * 2;
      for (int i = 0; i < 4; i++) {
        float s = 0; const float *x = A[g + (i >> 1) * 8], *y = B[t + (i & 1)];
        for (int k = 0; k < 16; k++) s += x[k] * y[k];
        o.c[i] = m.c[i] + s;
      } } });
  for (int i = 0; i < 4; i++) c[i] = o.c[i];
}
inline void mma16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE()) { mma16816_<false>(c, a, b0, b1, line); }
inline void mma16816h(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line = __builtin_LINE()) { mma16816_<true>(c, a, b0, b1, line); }
inline void st16(void* g, uint4 v, int line = __builtin_LINE()) {
  if ((uintptr_t)g & 15) simt::die("16-byte store: address not aligned", line);
  std::memcpy(g, &v, 16);
}
// cp.async really is asynchronous here: data lands at issue or only at wait, by seed.
inline void cp16(void* s, const void* g, int line = __builtin_LINE()) {
  if (((uintptr_t)s | (uintptr_t)g) & 15) simt::die("cp.async: address not 16-byte aligned", line);
  auto& c = simt::ctx();
  bool now; { simt::Ignore _; now = c.seed && (c.rng() & 1); }
  if (now) { std::memcpy(s, g, 16); return; }
  c.cur->line = line; c.cur->cp.push_back({s, g, 16, c.cur->cp_group});
}
inline void cp16z(void* s, const void* g, int bytes, int line = __builtin_LINE()) {
  alignas(16) static const unsigned char zeros[16] = {};
  cp16(s, bytes ? g : zeros, line);
}
inline void cp_commit() { simt::ctx().cur->cp_group++; }
template <int N> inline void cp_wait() {
  auto* t = simt::ctx().cur; size_t k = 0;
  for (auto& q : t->cp) { if (q.group + N < t->cp_group) std::memcpy(q.dst, q.src, q.bytes); else t->cp[k++] = q; }
  t->cp.resize(k);
}
#endif
/// Stores a vector to global memory at once: one that is assigned, the compiler may cut into its elements.
template <class R> DEV void store_whole(void* to, const R& v) {
  auto as = [&](auto words) {
    __builtin_memcpy(&words, &v, sizeof(R));
    return words;
  };
  if constexpr (sizeof(R) == 16) st16(to, as(uint4()));
  else if constexpr (sizeof(R) == 8) *(uint64_t*)to = as(uint64_t());
  else if constexpr (sizeof(R) == 4) *(uint32_t*)to = as(uint32_t());
  else *(R*)to = v;
}
/// The matrix instruction and the pair packing of an element type.
DEV void mma(bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma16816(c, a, b0, b1); }
DEV void mma(f16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma16816h(c, a, b0, b1); }
DEV uint32_t pack(bf16, float lo, float hi) { return pack2(lo, hi); }
DEV uint32_t pack(f16, float lo, float hi) { return pack2h(lo, hi); }
template <class T> DEV T quad_max(T v) { T o = __shfl_xor_sync(~0u, v, 1); v = o > v ? o : v; o = __shfl_xor_sync(~0u, v, 2); return o > v ? o : v; }
template <class T> DEV T quad_sum(T v) { v += __shfl_xor_sync(~0u, v, 1); return v + __shfl_xor_sync(~0u, v, 2); }
}  // namespace smalti
