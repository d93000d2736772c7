// What kernel tests need, on the emulator and on a GPU alike: device memory, tolerances, a list of tests.
//
//   TEST(softmax_rows) { Dev<float> x(host), y(n); CHECK_RC(smalti_softmax(..)); check_close("y", y.get(), want, 1e-6); }
#pragma once
#include "../common/dtype.cuh"
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace test {

struct Entry { const char* name; void (*run)(); };
inline std::vector<Entry>& tests() { static std::vector<Entry> t; return t; }
inline int& failures() { static int n = 0; return n; }
inline int& checks() { static int n = 0; return n; }
struct Register { Register(const char* n, void (*f)()) { tests().push_back({n, f}); } };

inline void fail(const std::string& what) {
  failures()++;
  std::printf("    FAILED: %s\n", what.c_str());
}

/// Memory on the device under test, freed with the object.
template <class T> struct Dev {
  T* p = nullptr;
  size_t n = 0;
  explicit Dev(size_t count) : n(count) {
#if defined(__CUDACC__)
    cudaMalloc(&p, n * sizeof(T) + 1);
    cudaMemset(p, 0xff, n * sizeof(T));
#else
    p = (T*)aligned_alloc(256, (n * sizeof(T) + 511) / 256 * 256);
    std::memset((void*)p, 0xff, n * sizeof(T));
#if defined(SIMT_ASAN)
    __asan_poison_memory_region((char*)p + n * sizeof(T), (n * sizeof(T) + 511) / 256 * 256 - n * sizeof(T));
#endif
#endif
  }
  explicit Dev(const std::vector<T>& host) : Dev(host.size()) {
#if defined(__CUDACC__)
    cudaMemcpy(p, host.data(), n * sizeof(T), cudaMemcpyHostToDevice);
#else
    if (n) std::memcpy((void*)p, host.data(), n * sizeof(T));
#endif
  }
  Dev(const Dev&) = delete;
  ~Dev() {
#if defined(__CUDACC__)
    cudaFree(p);
#else
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(p, (n * sizeof(T) + 511) / 256 * 256);
#endif
    free(p);
#endif
  }
  std::vector<T> get() const {
    std::vector<T> out(n);
#if defined(__CUDACC__)
    cudaMemcpy(out.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost);
#else
    if (n) std::memcpy((void*)out.data(), p, n * sizeof(T));
#endif
    return out;
  }
};

template <class T> constexpr int dtype_of();
template <> constexpr int dtype_of<float>() { return SMALTI_F32; }
template <> constexpr int dtype_of<smalti::bf16>() { return SMALTI_BF16; }
template <> constexpr int dtype_of<smalti::f16>() { return SMALTI_F16; }
template <> constexpr int dtype_of<double>() { return SMALTI_F64; }
template <> constexpr int dtype_of<int64_t>() { return SMALTI_I64; }
template <> constexpr int dtype_of<int32_t>() { return SMALTI_I32; }
template <> constexpr int dtype_of<uint8_t>() { return SMALTI_U8; }
template <> constexpr int dtype_of<bool>() { return SMALTI_BOOL; }

/// A contiguous view.
template <class T> smalti_view view(const Dev<T>& d, std::vector<int64_t> shape) {
  smalti_view v{};
  v.ptr = (void*)d.p;
  v.dtype = dtype_of<T>();
  v.rank = (int)shape.size();
  int64_t step = 1;
  for (int i = v.rank - 1; i >= 0; i--) { v.shape[i] = shape[i]; v.stride[i] = step; step *= shape[i]; }
  return v;
}

/// Normal random numbers, rounded to T.
template <class T> std::vector<T> randn(size_t n, unsigned seed, double deviation = 1.0) {
  std::mt19937 r(seed);
  std::normal_distribution<float> d(0.f, (float)deviation);
  std::vector<T> v(n);
  for (auto& x : v) x = smalti::narrow<T>(d(r));
  return v;
}
template <class T> std::vector<double> wide(const std::vector<T>& v) {
  std::vector<double> out;
  for (auto x : v) out.push_back((double)smalti::widen(x));
  return out;
}

/// Every |got - want| at most `tolerance` of the largest |want| (or of 1, if that is larger). NaN fails.
template <class T> void check_close(const char* what, const std::vector<T>& got, const std::vector<double>& want, double tolerance) {
  checks()++;
  if (got.size() != want.size()) return fail(std::string(what) + ": wrong size");
  double scale = 1, worst = 0;
  size_t at = 0;
  for (double w : want) if (std::fabs(w) > scale) scale = std::fabs(w);
  for (size_t i = 0; i < got.size(); i++) {
    const double g = (double)smalti::widen(got[i]), d = std::fabs(g - want[i]);
    if (!(d <= worst) && !(std::isinf(g) && g == want[i])) { worst = d; at = i; if (std::isnan(d)) break; }
  }
  if (!(worst <= tolerance * scale)) {
    char line[256];
    std::snprintf(line, sizeof line, "%s: element %zu is %g, expected %g: off by %.2g of %g, allowed %.2g", what, at,
                  (double)smalti::widen(got[at]), want[at], worst, scale, tolerance);
    fail(line);
  }
}
template <class T> void check_same(const char* what, const std::vector<T>& a, const std::vector<T>& b) {
  checks()++;
  if (a.size() != b.size() || (a.size() && std::memcmp((const void*)a.data(), (const void*)b.data(), a.size() * sizeof(T)) != 0))
    fail(std::string(what) + ": bits differ");
}

/// Kernels with warpgroup instructions are taken while this lives.
struct Wgmma {
  Wgmma() { smalti_wgmma(1); }
  ~Wgmma() { smalti_wgmma(-1); }
};

inline void sync() {
#if defined(__CUDACC__)
  const cudaError_t e = cudaDeviceSynchronize();
  if (e != cudaSuccess) { std::printf("    CUDA: %s\n", cudaGetErrorString(e)); std::exit(3); }
#endif
}

}  // namespace test

#define TEST(name)                                                  \
  static void test_##name();                                        \
  static test::Register register_##name(#name, test_##name);        \
  static void test_##name()
#define CHECK(condition)                                            \
  do { test::checks()++; if (!(condition)) test::fail(#condition); } while (0)
#define CHECK_RC(call)                                              \
  do { const int rc_ = (call); if (rc_) test::fail(std::string(#call) + ": " + smalti_status(rc_)); test::sync(); } while (0)
