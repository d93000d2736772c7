// Which of two kernels a launcher takes: the one for every GPU, or the one in a folder sm90.
#pragma once
#include "../compat.cuh"

namespace smalti {

/// Whether to take kernels with warpgroup instructions: they were compiled, asked for (smalti_wgmma), and the current
/// device is a Hopper; the emulator has them.
bool wgmma_here();

}  // namespace smalti

// A kernel's body that only sm_90a can have.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ON_SM90(...) __VA_ARGS__
#else
#define ON_SM90(...)
#endif
