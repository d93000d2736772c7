// Operations on each element. The function is a run-time number: these kernels wait for memory, and one kernel a
// dtype with a uniform switch compiles in a fraction of the time of one a function.
#include <math.h>

#include "common/strided.cuh"
#include "kernels.h"
using namespace smalti;

// ---- mathematics, f32 and f64 under one name ----

#define MATH1(name) DEV float m_##name(float x) { return name##f(x); } DEV double m_##name(double x) { return name(x); }
MATH1(exp) MATH1(log) MATH1(sqrt) MATH1(tanh) MATH1(erf) MATH1(erfc) MATH1(log1p) MATH1(fabs) MATH1(atan)
DEV float m_pow(float x, float e) { return powf(x, e); }
DEV double m_pow(double x, double e) { return pow(x, e); }

constexpr double kTanhLinear = 0.7978845608028654;  // sqrt(2 / pi)
constexpr double kTanhCubic = 0.044715 * kTanhLinear;
constexpr double kQuick = 1.702;

/// Probability that a standard normal variable exceeds |x|.
template <class R> DEV R normal_tail(R x) { return (R)0.5 * m_erfc(m_fabs(x) * (R)0.7071067811865476); }

template <class R> DEV R softplus(R x, R beta, R threshold) {
  const R z = x * beta;
  const R y = ((z < 0 ? (R)0 : z) + m_log1p(m_exp(-m_fabs(z)))) / beta;
  return z > threshold ? x : y;
}

/// The functions of src/ops/unary.rs, in its words.
template <class R> DEV R function(int f, R p, R q, R x) {
  switch (f) {
    case SMALTI_EXP: return m_exp(x);
    case SMALTI_LOG: return m_log(x);
    case SMALTI_SQRT: return m_sqrt(x);
    case SMALTI_RSQRT: return (R)1 / m_sqrt(x);
    case SMALTI_TANH: return m_tanh(x);
    case SMALTI_SIGMOID: return (R)1 / ((R)1 + m_exp(-x));
    case SMALTI_RELU: return x > 0 || x != x ? x : (R)0;
    case SMALTI_ABS: return m_fabs(x);
    case SMALTI_SQUARE: return x * x;
    case SMALTI_RECIP: return (R)1 / x;
    case SMALTI_ERF: return m_erf(x);
    case SMALTI_ATAN: return m_atan(x);
    case SMALTI_SILU: return x / ((R)1 + m_exp(-x));
    case SMALTI_GELU: {
      const R a = m_fabs(x);
      return (x > 0 ? x : (R)0) - (a < 38 ? a : (R)38) * normal_tail(x);
    }
    case SMALTI_GELU_TANH: {
      const R u = x * (x * x * (R)kTanhCubic + (R)kTanhLinear);
      return x / ((R)1 + m_exp(-(u + u)));
    }
    case SMALTI_GELU_QUICK: return x / ((R)1 + m_exp(-(x * (R)kQuick)));
    case SMALTI_SOFTPLUS: return softplus(x, p, q);
    case SMALTI_CLAMP: {
      const R y = x < p ? p : x;
      return y > q ? q : y;
    }
    case SMALTI_CUBE: return x * x * x;
    case SMALTI_POW: return m_pow(x, p);
    // without the part that does nothing, which would not leave -0 and infinities as they are
    case SMALTI_AFFINE: return q == 0 ? x * p : p == 1 ? x + q : x * p + q;
    default: return x;
  }
}

/// Their derivatives times g; s is the saved input or output.
template <class R> DEV R derivative(int f, R p, R q, R g, R s) {
  switch (f) {
    case SMALTI_EXP: return g * s;
    case SMALTI_LOG: return g / s;
    case SMALTI_SQRT: return g / (s + s);
    case SMALTI_RSQRT: return g * (R)-0.5 * s * s * s;
    case SMALTI_TANH: return g * ((R)1 - s * s);
    case SMALTI_SIGMOID: return g * s * ((R)1 - s);
    case SMALTI_RELU: return s > 0 ? g : (R)0;
    case SMALTI_ABS: return s > 0 ? g : s < 0 ? -g : s * (R)0;
    case SMALTI_SQUARE: return g * (s + s);
    case SMALTI_RECIP: return -(g * s * s);
    case SMALTI_ERF: return g * (R)1.1283791670955126 * m_exp(-(s * s));
    case SMALTI_ATAN: return g / ((R)1 + s * s);
    case SMALTI_SILU: {
      const R y = (R)1 / ((R)1 + m_exp(-s));
      return g * y * ((R)1 + s * ((R)1 - y));
    }
    case SMALTI_GELU: {
      const R tail = normal_tail(s), density = m_exp((R)-0.5 * s * s) * (R)0.3989422804014327;
      const R x = s > 38 ? (R)38 : s < -38 ? (R)-38 : s;
      return g * ((s > 0 ? (R)1 - tail : tail) + x * density);
    }
    case SMALTI_GELU_TANH: {
      const R u = s * (s * s * (R)kTanhCubic + (R)kTanhLinear), du = s * s * (R)(3 * kTanhCubic) + (R)kTanhLinear;
      const R a = m_fabs(u), e = m_exp(-(a + a)), y = (R)1 / ((R)1 + e);
      // y (1 - y) is even in u, and e is at most 1, so nothing overflows
      const R slope = e > 0 ? s * (du + du) * e * y * y : (R)0;
      return g * ((u < 0 ? e * y : y) + slope);
    }
    case SMALTI_GELU_QUICK: {
      const R y = (R)1 / ((R)1 + m_exp(-(s * (R)kQuick)));
      return g * y * ((R)1 + s * (R)kQuick * ((R)1 - y));
    }
    case SMALTI_SOFTPLUS: {
      const R z = s * p;
      return z > q ? g : g / ((R)1 + m_exp(-z));
    }
    case SMALTI_CLAMP: {
      const bool above = s > p || (p < 0 && p * (R)0.5 == p), below = s < q || (q > 0 && q * (R)0.5 == q);
      return above && below ? g : (R)0;  // an infinite bound holds nothing back
    }
    case SMALTI_CUBE: return g * (R)3 * s * s;
    case SMALTI_POW: return p == 0 ? (R)0 : g * p * m_pow(s, p - (R)1);
    case SMALTI_AFFINE: return g * p;
    default: return g;
  }
}

template <class R> DEV R arithmetic(int f, R a, R b) {
  switch (f) {
    case SMALTI_ADD: return a + b;
    case SMALTI_SUB: return a - b;
    case SMALTI_MUL: return a * b;
    case SMALTI_DIV: return a / b;
    case SMALTI_MAXIMUM: return a > b || a != a ? a : b;
    case SMALTI_MINIMUM: return a < b || a != a ? a : b;
    case SMALTI_POWER: return m_pow(a, b);
    default: return a > b || a != a || b != b ? (R)1 : a == b ? (R)0.5 : (R)0;  // SHARE
  }
}

/// Wraps around, as the CPU code does.
DEV int64_t arithmetic(int f, int64_t a, int64_t b) {
  switch (f) {
    case SMALTI_ADD: return (int64_t)((uint64_t)a + (uint64_t)b);
    case SMALTI_SUB: return (int64_t)((uint64_t)a - (uint64_t)b);
    case SMALTI_MUL: return (int64_t)((uint64_t)a * (uint64_t)b);
    case SMALTI_MAXIMUM: return b > a ? b : a;
    default: return b < a ? b : a;  // MINIMUM
  }
}

template <class R> DEV bool compare(int f, R a, R b) {
  switch (f) {
    case SMALTI_EQ: return a == b;
    case SMALTI_NE: return a != b;
    case SMALTI_LT: return a < b;
    case SMALTI_LE: return a <= b;
    case SMALTI_GT: return a > b;
    case SMALTI_GE: return a >= b;
    case SMALTI_AND: return a != 0 && b != 0;
    default: return a != 0 || b != 0;  // OR
  }
}

// ---- loops: f on flat memory in pieces of 16 bytes, or anywhere ----

/// Elements of a piece. Those of 8 bytes, which are seldom asked for, go one by one in either case: a piece of one is
/// what has no kernel.
template <class T> HOST_DEV constexpr int pieces() { return sizeof(T) == 8 ? 1 : (int)(16 / sizeof(T)); }

template <class T, class F> __global__ void __launch_bounds__(256) flat1(int64_t n, const T* x, T* y, F f) {
  constexpr int N = pieces<T>();
  const int64_t step = (int64_t)gridDim.x * blockDim.x, whole = n / N;
  const int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < whole; i += step) {
    Pack<T, N> a = ((const Pack<T, N>*)x)[i];
    UNROLL for (int k = 0; k < N; k++) a.v[k] = f(a.v[k]);
    store_whole((Pack<T, N>*)y + i, a);
  }
  for (int64_t i = whole * N + first; i < n; i += step) y[i] = f(x[i]);
}
template <class T, class F> __global__ void __launch_bounds__(256) any1(Strided<2> s, const T* x, T* y, F f) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < s.count; i += step) {
    int64_t at[2];
    locate(s, i, at);
    y[at[1]] = f(x[at[0]]);
  }
}
template <class A, class B, class F> __global__ void __launch_bounds__(256) flat2(int64_t n, const A* x, const A* z, B* y, F f) {
  constexpr int N = pieces<A>();
  const int64_t step = (int64_t)gridDim.x * blockDim.x, whole = n / N;
  const int64_t first = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < whole; i += step) {
    const Pack<A, N> a = ((const Pack<A, N>*)x)[i], b = ((const Pack<A, N>*)z)[i];
    Pack<B, N> c;
    UNROLL for (int k = 0; k < N; k++) c.v[k] = f(a.v[k], b.v[k]);
    store_whole((Pack<B, N>*)y + i, c);
  }
  for (int64_t i = whole * N + first; i < n; i += step) y[i] = f(x[i], z[i]);
}
template <class A, class B, class F> __global__ void __launch_bounds__(256) any2(Strided<3> s, const A* x, const A* z, B* y, F f) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < s.count; i += step) {
    int64_t at[3];
    locate(s, i, at);
    y[at[2]] = f(x[at[0]], z[at[1]]);
  }
}

template <class T, class F> int32_t map1(const smalti_view* x, const smalti_view* y, F f, void* stream) {
  const Strided<2> s = strided<2>({x, y});
  int rc = 0;
  if (s.count == 0) return 0;
  if constexpr (pieces<T>() > 1)
    if (s.flat() && aligned(x->ptr, 16) && aligned(y->ptr, 16)) {
      auto kernel = flat1<T, F>;
      LAUNCH_FLAT(rc, kernel, dim3(grid_for(s.count / pieces<T>(), 256)), dim3(256), stream, s.count, (const T*)x->ptr, (T*)y->ptr, f);
      return rc;
    }
  auto kernel = any1<T, F>;
  LAUNCH_FLAT(rc, kernel, dim3(grid_for(s.count, 256)), dim3(256), stream, s, (const T*)x->ptr, (T*)y->ptr, f);
  return rc;
}
template <class A, class B, class F> int32_t map2(const smalti_view* x, const smalti_view* z, const smalti_view* y, F f, void* stream) {
  const Strided<3> s = strided<3>({x, z, y});
  int rc = 0;
  if (s.count == 0) return 0;
  if constexpr (pieces<A>() > 1)
    if (s.flat() && aligned(x->ptr, 16) && aligned(z->ptr, 16) && aligned(y->ptr, sizeof(Pack<B, pieces<A>()>))) {
      auto kernel = flat2<A, B, F>;
      LAUNCH_FLAT(rc, kernel, dim3(grid_for(s.count / pieces<A>(), 256)), dim3(256), stream, s.count, (const A*)x->ptr, (const A*)z->ptr, (B*)y->ptr, f);
      return rc;
    }
  auto kernel = any2<A, B, F>;
  LAUNCH_FLAT(rc, kernel, dim3(grid_for(s.count, 256)), dim3(256), stream, s, (const A*)x->ptr, (const A*)z->ptr, (B*)y->ptr, f);
  return rc;
}

// ---- what is done to an element ----

template <class T> struct Forward {
  int f; Acc<T> p, q;
  DEV T operator()(T x) const { return narrow<T>(function<Acc<T>>(f, p, q, widen(x))); }
};
template <class T> struct Backward {
  int f; Acc<T> p, q;
  DEV T operator()(T g, T s) const { return narrow<T>(derivative<Acc<T>>(f, p, q, widen(g), widen(s))); }
};
template <class T> struct Integer {
  bool clamp; int64_t p, q;
  DEV T operator()(T x) const {
    const int64_t v = (int64_t)x;
    return (T)(clamp ? (v < p ? (p > q ? q : p) : v > q ? q : v) : arithmetic(SMALTI_ADD, arithmetic(SMALTI_MUL, v, p), q));
  }
};
template <class T> struct Float2 {
  int f;
  DEV T operator()(T a, T b) const { return narrow<T>(arithmetic(f, widen(a), widen(b))); }
};
template <class T> struct Integer2 {
  int f;
  DEV T operator()(T a, T b) const { return (T)arithmetic(f, (int64_t)a, (int64_t)b); }
};
template <class T> struct Compare {
  int f;
  DEV bool operator()(T a, T b) const { return compare(f, widen(a), widen(b)); }
};

/// A bound or factor as a whole number; the ends of the range stand for infinities.
static int64_t whole(double v) {
  if (v != v) return 0;
  return v >= 9.2233720368547758e18 ? INT64_MAX : v <= -9.2233720368547758e18 ? INT64_MIN : (int64_t)v;
}

extern "C" int32_t smalti_unary_forward(int32_t f, double p, double q, const smalti_view* x, const smalti_view* y, void* stream) {
  if (!same_shape(*x, *y) || x->dtype != y->dtype || f < 0 || f > SMALTI_AFFINE) return kInvalid;
  if (x->dtype <= SMALTI_F64) {
    DISPATCH_FLOAT(x->dtype, T, return map1<T>(x, y, Forward<T>{f, (Acc<T>)p, (Acc<T>)q}, stream))
  }
  if (f != SMALTI_CLAMP && f != SMALTI_AFFINE) return kInvalid;
  const bool clamp = f == SMALTI_CLAMP;
  const int64_t a = whole(clamp ? ceil(p) : p), b = whole(clamp ? floor(q) : q);
  switch (x->dtype) {
    case SMALTI_I64: return map1<int64_t>(x, y, Integer<int64_t>{clamp, a, b}, stream);
    case SMALTI_I32: return map1<int32_t>(x, y, Integer<int32_t>{clamp, a, b}, stream);
    case SMALTI_U8: return map1<uint8_t>(x, y, Integer<uint8_t>{clamp, a, b}, stream);
    default: return kInvalid;
  }
}

extern "C" int32_t smalti_unary_backward(int32_t f, double p, double q, const smalti_view* dy, const smalti_view* saved,
                                         const smalti_view* dx, void* stream) {
  const bool fits = same_shape(*dy, *saved) && same_shape(*dy, *dx) && dy->dtype == saved->dtype && dy->dtype == dx->dtype;
  if (!fits || f < 0 || f > SMALTI_AFFINE) return kInvalid;
  DISPATCH_FLOAT(dy->dtype, T, {
    const Backward<T> rule{f, (Acc<T>)p, (Acc<T>)q};
    return map2<T, T>(dy, saved, dx, rule, stream);
  })
  return kInvalid;
}

extern "C" int32_t smalti_binary(int32_t f, const smalti_view* a, const smalti_view* b, const smalti_view* y, void* stream) {
  if (!same_shape(*a, *b) || !same_shape(*a, *y) || a->dtype != b->dtype || f < 0 || f > SMALTI_OR) return kInvalid;
  if (f >= SMALTI_EQ) {
    if (y->dtype != SMALTI_BOOL || (f >= SMALTI_AND && a->dtype != SMALTI_BOOL)) return kInvalid;
    DISPATCH_ALL(a->dtype, T, {
      const Compare<T> rule{f};
      return map2<T, bool>(a, b, y, rule, stream);
    })
  }
  if (y->dtype != a->dtype) return kInvalid;
  if (a->dtype <= SMALTI_F64) {
    DISPATCH_FLOAT(a->dtype, T, {
      const Float2<T> rule{f};
      return map2<T, T>(a, b, y, rule, stream);
    })
  }
  if (f == SMALTI_DIV || f == SMALTI_POWER || f == SMALTI_SHARE) return kInvalid;
  switch (a->dtype) {
    case SMALTI_I64: return map2<int64_t, int64_t>(a, b, y, Integer2<int64_t>{f}, stream);
    case SMALTI_I32: return map2<int32_t, int32_t>(a, b, y, Integer2<int32_t>{f}, stream);
    case SMALTI_U8: return map2<uint8_t, uint8_t>(a, b, y, Integer2<uint8_t>{f}, stream);
    case SMALTI_BOOL:
      if (f != SMALTI_MAXIMUM && f != SMALTI_MINIMUM) return kInvalid;
      return map2<uint8_t, uint8_t>(a, b, y, Integer2<uint8_t>{f}, stream);
    default: return kInvalid;
  }
}

template <class T> __global__ void __launch_bounds__(256) choose(Strided<4> s, const bool* c, const T* a, const T* b, T* y) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < s.count; i += step) {
    int64_t at[4];
    locate(s, i, at);
    y[at[3]] = c[at[0]] ? a[at[1]] : b[at[2]];
  }
}

extern "C" int32_t smalti_where(const smalti_view* c, const smalti_view* a, const smalti_view* b, const smalti_view* y, void* stream) {
  const bool fits = same_shape(*c, *a) && same_shape(*a, *b) && same_shape(*a, *y) && a->dtype == b->dtype && a->dtype == y->dtype;
  if (!fits || c->dtype != SMALTI_BOOL) return kInvalid;
  const Strided<4> s = strided<4>({c, a, b, y});
  if (s.count == 0) return 0;
  int rc = 0;
  DISPATCH_SIZE(a->dtype, T, {
    auto kernel = choose<T>;
    LAUNCH_FLAT(rc, kernel, dim3(grid_for(s.count, 256)), dim3(256), stream, s, (const bool*)c->ptr, (const T*)a->ptr, (const T*)b->ptr, (T*)y->ptr);
  })
  return rc;
}
