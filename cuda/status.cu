#include "common/hopper.cuh"
#include "kernels.h"
#include <atomic>
#include <stdlib.h>

#if defined(__CUDACC__)
extern "C" const char* smalti_status(int32_t code) { return cudaGetErrorString((cudaError_t)code); }
extern "C" void smalti_emulate_schedule(uint32_t) {}
#endif

namespace smalti {

namespace {
std::atomic<int32_t> wanted{-1};

bool device_has_wgmma() {
#if defined(SMALTI_NO_SM90)
  return false;
#elif defined(__CUDACC__)
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major == 9;
#else
  return true;
#endif
}
}  // namespace

bool wgmma_here() {
  static const char* set = getenv("SMALTI_WGMMA");
  const int32_t use = wanted >= 0 ? wanted.load() : set && set[0] == '1';
  return use && device_has_wgmma();
}

}  // namespace smalti

extern "C" void smalti_wgmma(int32_t use) { smalti::wanted = use; }
