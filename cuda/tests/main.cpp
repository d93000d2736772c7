// Runs the kernel tests: `kernel_tests [FILTER] [SEED]...`; each seed is one schedule of the emulator.
#include "harness.hpp"
#include <chrono>

int main(int argc, char** argv) {
  const std::string filter = argc > 1 ? argv[1] : "";
  std::vector<unsigned> seeds;
  for (int i = 2; i < argc; i++) seeds.push_back((unsigned)std::atoi(argv[i]));
  if (seeds.empty()) seeds = {0, 1};
#if defined(__CUDACC__)
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "no CUDA driver or no GPU on this machine: %s\n", cudaGetErrorString(status));
    return 2;
  }
  seeds = {0};
#endif
  int ran = 0, failed = 0;
  for (unsigned seed : seeds) {
    smalti_emulate_schedule(seed);
    for (auto& t : test::tests()) {
      if (std::string(t.name).find(filter) == std::string::npos) continue;
      const int before = test::failures();
      const auto start = std::chrono::steady_clock::now();
      t.run();
      const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
      const bool ok = test::failures() == before;
      std::printf("schedule %u: %-44s %s %8.1f ms\n", seed, t.name, ok ? "ok    " : "FAILED", ms);
      ran++;
      failed += !ok;
    }
  }
  std::printf("%d checks\n%d passed, %d failed\n", test::checks(), ran - failed, failed);
  return failed ? 1 : ran ? 0 : 2;
}
