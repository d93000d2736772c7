// Element types: storage structs for the half types, the type that each is computed in, dispatch by dtype value.
#pragma once
#include "../compat.cuh"
#include "../kernels.h"
#include "../mma.cuh"

namespace smalti {

/// The type that `T` is computed in: f32 for the half types, else itself.
template <class T> struct Compute { using type = T; };
template <> struct Compute<bf16> { using type = float; };
template <> struct Compute<f16> { using type = float; };
template <class T> using Acc = typename Compute<T>::type;

/// Widens for computing.
template <class T> HOST_DEV Acc<T> widen(T v) { return v; }
template <> HOST_DEV float widen<bf16>(bf16 v) { return bf2f(v); }
template <> HOST_DEV float widen<f16>(f16 v) { return h2f(v); }

/// Rounds a result to nearest, ties to even, for storing.
template <class T> HOST_DEV T narrow(Acc<T> v) { return v; }
template <> HOST_DEV bf16 narrow<bf16>(float v) { return f2bf(v); }
template <> HOST_DEV f16 narrow<f16>(float v) { return f2h(v); }

}  // namespace smalti

/// Runs the statements with `T` the element type of `dtype`; other dtypes return kInvalid from the launcher.
#define DISPATCH_FLOAT(dtype, T, ...)                                                                        \
  switch (dtype) {                                                                                           \
    case SMALTI_F32: { using T = float; __VA_ARGS__; break; }                                                \
    case SMALTI_BF16: { using T = smalti::bf16; __VA_ARGS__; break; }                                        \
    case SMALTI_F16: { using T = smalti::f16; __VA_ARGS__; break; }                                          \
    case SMALTI_F64: { using T = double; __VA_ARGS__; break; }                                               \
    default: return smalti::kInvalid;                                                                        \
  }
/// The same for f32 and f64.
#define DISPATCH_REAL(dtype, T, ...)                                                                         \
  switch (dtype) {                                                                                           \
    case SMALTI_F32: { using T = float; __VA_ARGS__; break; }                                                \
    case SMALTI_F64: { using T = double; __VA_ARGS__; break; }                                               \
    default: return smalti::kInvalid;                                                                        \
  }
/// The same for all eight dtypes; bool is `bool`.
#define DISPATCH_ALL(dtype, T, ...)                                                                          \
  switch (dtype) {                                                                                           \
    case SMALTI_F32: { using T = float; __VA_ARGS__; break; }                                                \
    case SMALTI_BF16: { using T = smalti::bf16; __VA_ARGS__; break; }                                        \
    case SMALTI_F16: { using T = smalti::f16; __VA_ARGS__; break; }                                          \
    case SMALTI_F64: { using T = double; __VA_ARGS__; break; }                                               \
    case SMALTI_I64: { using T = int64_t; __VA_ARGS__; break; }                                              \
    case SMALTI_I32: { using T = int32_t; __VA_ARGS__; break; }                                              \
    case SMALTI_U8: { using T = uint8_t; __VA_ARGS__; break; }                                               \
    case SMALTI_BOOL: { using T = bool; __VA_ARGS__; break; }                                                \
    default: return smalti::kInvalid;                                                                        \
  }
/// For pure moves: `T` an unsigned integer of the dtype's size.
#define DISPATCH_SIZE(dtype, T, ...)                                                                         \
  switch (dtype) {                                                                                           \
    case SMALTI_F64: case SMALTI_I64: { using T = uint64_t; __VA_ARGS__; break; }                            \
    case SMALTI_F32: case SMALTI_I32: { using T = uint32_t; __VA_ARGS__; break; }                            \
    case SMALTI_BF16: case SMALTI_F16: { using T = uint16_t; __VA_ARGS__; break; }                           \
    case SMALTI_U8: case SMALTI_BOOL: { using T = uint8_t; __VA_ARGS__; break; }                             \
    default: return smalti::kInvalid;                                                                        \
  }
