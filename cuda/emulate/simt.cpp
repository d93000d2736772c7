// The one copy of the emulator's stack switch, and its switchboard.
#define SIMT_IMPL
#include "simt.hpp"
#include "../kernels.h"
#include <memory>

extern "C" const char* smalti_status(int32_t code) { return code == 0 ? "no error" : "invalid argument"; }
extern "C" void smalti_emulate_schedule(uint32_t seed) { simt::seed() = seed; }

// Graphs, for src/gpu/driver/emulated/graph.rs. `run(data)` is work of the host that stands for a library's kernel;
// `drop(data)` ends it.
extern "C" void* smalti_graph_new() { return new simt::Graph; }
extern "C" void smalti_graph_add(void* graph, void (*run)(void*), void* data, void (*drop)(void*)) {
  std::shared_ptr<void> owned(data, drop);
  static_cast<simt::Graph*>(graph)->work.push_back([=] { run(owned.get()); });
}
extern "C" void smalti_graph_launch(const void* graph) {
  for (const auto& work : static_cast<const simt::Graph*>(graph)->work) work();
}
extern "C" void smalti_graph_free(void* graph) { delete static_cast<simt::Graph*>(graph); }
