// The one copy of the emulator's stack switch, and its switchboard.
#define SIMT_IMPL
#include "simt.hpp"
#include "../kernels.h"

extern "C" const char* smalti_status(int32_t code) { return code == 0 ? "no error" : "invalid argument"; }
extern "C" void smalti_emulate_schedule(uint32_t seed) { simt::seed() = seed; }
