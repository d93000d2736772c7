#include "compat.cuh"
#include "kernels.h"

#if defined(__CUDACC__)
extern "C" const char* smalti_status(int32_t code) { return cudaGetErrorString((cudaError_t)code); }
extern "C" void smalti_emulate_schedule(uint32_t) {}
#endif
