// Which of two kernels a launcher takes: the one for every GPU, or the one in a folder sm90.
#pragma once
#include "../compat.cuh"

namespace smalti {

/// Whether to take kernels with warpgroup instructions: they were compiled, asked for (smalti_wgmma), and the current
/// device is a Hopper; the emulator has them.
bool wgmma_here();

}  // namespace smalti
