// Runs the kernels on the host, one fiber a CUDA thread, so that every barrier, shuffle and matrix instruction
// is really exchanged between threads, in schedules that a seed chooses. Included by compat.cuh when the compiler
// is not nvcc. Blocks run one after another, in an order that the seed shuffles; launches on several OS threads
// are independent.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <tuple>
#include <vector>
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#include <sanitizer/asan_interface.h>
#define SIMT_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SIMT_TSAN 1
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int); void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int); void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif
#if defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __constant__ static const
#define __grid_constant__

struct dim3 { unsigned x, y, z; dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };

namespace simt {
struct Ignore {  // shim-internal accesses are not the kernel's: hide them from TSan
#ifndef SIMT_TSAN
  Ignore() {}
#else
  Ignore() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__); AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Ignore() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
#endif
};
enum State : uint8_t { READY, WAIT_WARP, WAIT_GROUP, WAIT_BLOCK, DONE };
struct Copy { void* dst; const void* src; uint32_t bytes, group; };
struct Thread {
  State st; uint8_t lane; uint16_t warp; dim3 tid; int line;
#ifdef SIMT_UCONTEXT
  ucontext_t uc;
#else
  void* sp;
#endif
  char* stack; uint32_t cp_group; std::vector<Copy> cp;
#ifdef SIMT_TSAN
  void* fiber;
#endif
#ifdef SIMT_ASAN
  void* fake = nullptr;
#endif
};
struct Warp { uint32_t arrived, live; int op, line; alignas(16) unsigned char in[32][64], out[32][64]; char sync; };
struct Work;  // an instruction of a warpgroup, see wgmma.hpp
struct Warpgroup {
  struct Lane { float* c; uint64_t a, b; std::array<uint32_t, 4> regs; };
  unsigned arrived = 0, batch = 0; int op = 0, line = 0; bool fenced = false; char read = 0;
  std::array<Lane, 128> lanes; std::vector<std::shared_ptr<Work>> work;
};
constexpr size_t kSharedStart = 1024;  // as on a GPU, where the first KiB is the system's
struct Stats { uint64_t switches, collectives, ldsm_phases, ldsm_conflicts, blocks; };

struct Ctx {  // one per OS thread: runs one block at a time
  std::vector<Thread> th; std::vector<Warp> wp; std::vector<Warpgroup> wg;
  Thread* cur = nullptr; unsigned arrived = 0, live = 0; int bline = 0; char bsync, lsync;
  dim3 bid, bdim, gdim; unsigned char* dyn = nullptr; size_t dyn_bytes = 0;
  const std::function<void()>* body = nullptr; bool flat = false; std::mt19937 rng; uint32_t seed = 0; Stats s{};
#ifdef SIMT_UCONTEXT
  ucontext_t main_uc;
#else
  void* main_sp = nullptr;
#endif
#ifdef SIMT_TSAN
  void *main_fiber = nullptr, *proxy_fiber = nullptr; char proxy;  // proxy: what reads shared memory for wgmma
#endif
#ifdef SIMT_ASAN
  void* main_fake = nullptr; const void* main_bottom = nullptr; size_t main_size = 0;
#endif
};
inline Ctx& ctx() { static thread_local Ctx c; return c; }
constexpr size_t kStack = 256 * 1024;

[[noreturn]] inline void die(const char* what, int line) {
  Ctx& c = ctx();
  std::fprintf(stderr, "simt: %s (kernel line %d, block %u,%u,%u thread %u)\n", what, line, c.bid.x, c.bid.y, c.bid.z,
               c.cur ? c.cur->tid.x : ~0u);
  std::abort();
}
#ifndef SIMT_UCONTEXT
extern "C" void simt_switch(void** save, void* load);
#endif
inline void to_main() {
  Ctx& c = ctx(); Thread* t;
#ifdef SIMT_TSAN
  void* back;
#endif
  { Ignore _; t = c.cur; c.s.switches++;
#ifdef SIMT_TSAN
    back = c.main_fiber;
#endif
  }
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(t->st == DONE ? nullptr : &t->fake, c.main_bottom, c.main_size);
#endif
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(back, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef SIMT_UCONTEXT
  swapcontext(&t->uc, &c.main_uc);
#else
  simt_switch(&t->sp, c.main_sp);
#endif
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(t->fake, &c.main_bottom, &c.main_size);
#endif
}
// Under TSan a fiber lives on and meets its next block in the loop: making one costs a millisecond. Elsewhere each
// block starts on a fresh stack.
inline void entry() {
 for (;;) {
  Ctx& c = ctx();
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &c.main_bottom, &c.main_size);
#endif
#ifdef SIMT_TSAN
  __tsan_acquire(&c.lsync);
#endif
  (*c.body)();
#ifdef SIMT_TSAN
  __tsan_release(&c.lsync);
#endif
  { Ignore _;
    Thread* t = c.cur; if (!t->cp.empty()) die("thread exits with cp.async in flight", t->line);
    if (!c.wg.empty() && !c.wg[t->warp / 4].work.empty()) die("thread exits with wgmma in flight", t->line);
    t->st = DONE; c.live--; c.wp[t->warp].live--;
    if (c.arrived) die("thread exits while others wait in __syncthreads", c.bline); }
  to_main();
#ifndef SIMT_TSAN
  std::abort();
#endif
 }
}
inline void run(Thread& t) {
  Ctx& c = ctx(); c.cur = &t;
#ifdef SIMT_ASAN
  __sanitizer_start_switch_fiber(&c.main_fake, t.stack, kStack);
#endif
#ifdef SIMT_TSAN
  __tsan_switch_to_fiber(t.fiber, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef SIMT_UCONTEXT
  swapcontext(&c.main_uc, &t.uc);
#else
  simt_switch(&c.main_sp, t.sp);
#endif
#ifdef SIMT_ASAN
  __sanitizer_finish_switch_fiber(c.main_fake, nullptr, nullptr);
#endif
  c.cur = nullptr;
}
// ---- collectives -------------------------------------------------------------------------
inline void block_sync(int line) {
  Ctx& c = ctx();
  if (c.flat) die("a barrier in a kernel launched with LAUNCH_FLAT", line);
#ifdef SIMT_TSAN
  __tsan_release(&c.bsync);
#endif
  { Ignore _; Thread* t = c.cur;
    if (c.arrived == 0) c.bline = line; else if (c.bline != line) die("divergent __syncthreads", line);
    if (++c.arrived == c.live) { c.arrived = 0; for (auto& q : c.th) if (q.st == WAIT_BLOCK) q.st = READY; }
    else { t->st = WAIT_BLOCK; t->line = line; to_main(); } }
#ifdef SIMT_TSAN
  __tsan_acquire(&c.bsync);
#endif
}
template <class In, class Out, class F> inline Out collective(int op, int line, const In& in, bool sync, F f) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64, "slot"); (void)sync;
  Ctx& c = ctx(); Thread* t = c.cur;
  if (c.flat) die("a warp operation in a kernel launched with LAUNCH_FLAT", line);
  Warp& w = c.wp[t->warp]; Out r;
#ifdef SIMT_TSAN
  if (sync) __tsan_release(&w.sync);
#endif
  { Ignore _;
    std::memcpy(w.in[t->lane], &in, sizeof(In));
    if (!w.arrived) { w.op = op; w.line = line; }
    else if (w.op != op || w.line != line) die("warp-divergent collective", line);
    if (++w.arrived == w.live) {
      if (w.live != 32) die("collective with exited lanes", line);
      w.arrived = 0; c.s.collectives++;
      f(reinterpret_cast<unsigned char(*)[64]>(w.in), reinterpret_cast<unsigned char(*)[64]>(w.out));
      unsigned b = t->warp * 32u; for (unsigned i = 0; i < 32; i++) if (c.th[b + i].st == WAIT_WARP) c.th[b + i].st = READY;
    } else { t->st = WAIT_WARP; t->line = line; to_main(); }
    std::memcpy(&r, w.out[t->lane], sizeof(Out)); }
#ifdef SIMT_TSAN
  if (sync) __tsan_acquire(&w.sync);
#endif
  return r;
}
// ---- launch ------------------------------------------------------------------------------
inline uint32_t& seed() { static uint32_t s = 0; return s; }
// Threads that never meet need no fibers: a loop over them, forwards or backwards by the seed.
inline void launch_flat(dim3 g, dim3 b, const std::function<void()>& body) {
  Ctx& c = ctx(); unsigned n = b.x * b.y * b.z; uint64_t nb = (uint64_t)g.x * g.y * g.z;
  Thread one{}; c.cur = &one; c.bdim = b; c.gdim = g; c.flat = true;
  const bool back = seed() & 1;
  for (uint64_t k = 0; k < nb; k++) {
    const uint64_t bi = back ? nb - 1 - k : k;
    c.bid = dim3(bi % g.x, bi / g.x % g.y, bi / g.x / g.y); c.s.blocks++;
    for (unsigned j = 0; j < n; j++) {
      const unsigned i = back ? n - 1 - j : j;
      one.tid = dim3(i % b.x, i / b.x % b.y, i / b.x / b.y); one.lane = i & 31; one.warp = i >> 5;
      body();
    }
  }
  c.flat = false; c.cur = nullptr;
}
inline void run_grid(dim3 g, dim3 b, size_t smem, bool flat, const std::function<void()>& body) {
#ifndef SIMT_TSAN
  if (flat) return launch_flat(g, b, body);
#endif
  Ignore _main;  // scheduler bookkeeping is not the kernel's
  Ctx& c = ctx(); c.flat = false; (void)flat; unsigned n = b.x * b.y * b.z;
  if (n % 32) die("block size must be a multiple of 32 in this emulator", 0);
  if (smem > 227 * 1024) die("dynamic shared memory over 227 KiB", 0);
#ifdef SIMT_TSAN
  c.main_fiber = __tsan_get_current_fiber();
  if (!c.proxy_fiber) c.proxy_fiber = __tsan_create_fiber(0);  // here: it begins with what its maker knows
#endif
  c.th.reserve(1024); c.wp.reserve(32);                          // suspended fibers stay where they are
  if (c.th.size() < n) { c.th.resize(n); c.wp.resize(n / 32); }  // never fewer: they own stacks
  c.bdim = b; c.gdim = g; c.body = &body; c.rng.seed(seed()); c.seed = seed();
  for (auto& t : c.th) if (!t.stack)
    t.stack = (char*)mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  std::vector<unsigned> order(n);
  uint64_t nb = (uint64_t)g.x * g.y * g.z;
  std::vector<uint64_t> border(nb); for (uint64_t i = 0; i < nb; i++) border[i] = i;
  if (c.seed) for (uint64_t i = nb; i > 1; i--) std::swap(border[i - 1], border[c.rng() % i]);
#ifdef SIMT_TSAN
  __tsan_release(&c.lsync);
#endif
  for (uint64_t bi : border) {
    c.bid = dim3(bi % g.x, bi / g.x % g.y, bi / g.x / g.y); c.s.blocks++;
    const size_t room = (smem + 1023) / 1024 * 1024 + 1024;
    c.dyn = (unsigned char*)aligned_alloc(1024, room); c.dyn_bytes = smem;
    std::memset(c.dyn, 0xFF, smem);  // every bf16/f32 bit pattern of ones is a NaN: uninitialised reads show
#ifdef SIMT_ASAN
    __asan_poison_memory_region(c.dyn + smem, room - smem);
#endif
    c.arrived = 0; c.live = n;
    for (auto& w : c.wp) { w.arrived = 0; w.live = 32; }
    c.wg.resize(n % 128 ? 0 : n / 128);
    for (auto& g : c.wg) { g.arrived = g.batch = 0; g.fenced = false; }
    for (unsigned i = 0; i < n; i++) {
      Thread& t = c.th[i]; order[i] = i; t.st = READY; t.lane = i & 31; t.warp = i >> 5; t.cp.clear(); t.cp_group = 0; t.line = 0;
      t.tid = dim3(i % b.x, i / b.x % b.y, i / b.x / b.y);
#ifdef SIMT_ASAN
      __asan_unpoison_memory_region(t.stack, kStack);  // frames of the last block never returned
#endif
#ifdef SIMT_TSAN
      if (t.fiber) continue;
      t.fiber = __tsan_create_fiber(0);
#endif
#ifdef SIMT_UCONTEXT
      getcontext(&t.uc); t.uc.uc_stack.ss_sp = t.stack; t.uc.uc_stack.ss_size = kStack; t.uc.uc_link = nullptr;
      makecontext(&t.uc, entry, 0);
#else
      void** p = (void**)(t.stack + kStack); *--p = nullptr; *--p = (void*)entry; for (int k = 0; k < 6; k++) *--p = nullptr; t.sp = p;
#endif
    }
    // Schedules: seed 0 = round robin. Odd seeds = greedy, one warp runs as far as it can (largest skew).
    // Even seeds = random order of threads, a quarter of the warps held back each round.
    while (c.live) {
      bool ran = false;
      if (c.seed & 1) {
        unsigned nw = n / 32, w0 = c.rng() % nw;
        for (unsigned k = 0; k < nw && !ran; k++) {
          unsigned w = (w0 + k) % nw, l0 = c.rng() & 31;
          for (bool more = true; more;) {
            more = false;
            for (unsigned l = 0; l < 32; l++) { Thread& t = c.th[w * 32 + (l + l0) % 32]; if (t.st == READY) { ran = more = true; run(t); } }
          }
        }
      } else {
        if (c.seed) for (unsigned i = n; i > 1; i--) std::swap(order[i - 1], order[c.rng() % i]);
        uint32_t hold = c.seed ? c.rng() & c.rng() : 0;
        for (int pass = 0; pass < 2 && !ran; pass++)
          for (unsigned i : order) {
            if (pass == 0 && (hold >> (i / 32 % 32) & 1)) continue;
            if (c.th[i].st == READY) { ran = true; run(c.th[i]); }
          }
      }
      if (!ran && c.live) {
        for (auto& t : c.th) if (t.st != DONE) { c.cur = &t; std::fprintf(stderr, "  thread %u waits (%s) at line %d\n", t.tid.x, t.st == WAIT_BLOCK ? "block" : t.st == WAIT_GROUP ? "warpgroup" : "warp", t.line); break; }
        die("deadlock", 0);
      }
    }
#ifdef SIMT_ASAN
    __asan_unpoison_memory_region(c.dyn + smem, room - smem);
#endif
    free(c.dyn);
  }
#ifdef SIMT_TSAN
  __tsan_acquire(&c.lsync);
#endif
}
// The kernel with its arguments, which are evaluated and converted now, as at a real launch.
template <class... P, class... A> std::function<void()> bind(void (*kernel)(P...), A&&... a) {
  return [kernel, args = std::tuple<P...>(std::forward<A>(a)...)] { std::apply(kernel, args); };
}
// Work that was recorded instead of done. A stream is null, or the graph that is being recorded on it.
struct Graph { std::vector<std::function<void()>> work; };
inline void launch(void* stream, dim3 g, dim3 b, size_t smem, bool flat, std::function<void()> body) {
  if (!stream) return run_grid(g, b, smem, flat, body);
  static_cast<Graph*>(stream)->work.push_back([=, body = std::move(body)] { run_grid(g, b, smem, flat, body); });
}
}  // namespace simt

#if !defined(SIMT_UCONTEXT) && defined(SIMT_IMPL)
#if defined(__x86_64__)
asm(".text\n.globl simt_switch\n.type simt_switch,@function\nsimt_switch:\n"
    " pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
    " movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
    " popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n.size simt_switch,.-simt_switch\n");
#else
#error "use -DSIMT_UCONTEXT on this architecture"
#endif
#endif

#define threadIdx (simt::ctx().cur->tid)
#define blockIdx (simt::ctx().bid)
#define blockDim (simt::ctx().bdim)
#define gridDim (simt::ctx().gdim)
inline void __syncthreads(int line = __builtin_LINE()) { simt::block_sync(line); }
inline void __syncwarp(unsigned = ~0u, int line = __builtin_LINE()) {
  simt::collective<int, int>(1, line, 0, true, [](auto, auto) {});
}
// One shuffle: lane i receives the value of lane source(i).
template <class T, class F> inline T simt_shuffle(int op, int line, T v, F source) {
  return simt::collective<T, T>(op, line, v, false, [source](unsigned char(*in)[64], unsigned char(*out)[64]) {
    for (int i = 0; i < 32; i++) std::memcpy(out[i], in[source(i) & 31], sizeof(T)); });
}
template <class T> inline T __shfl_xor_sync(unsigned, T v, int m, int = 32, int line = __builtin_LINE()) {
  return simt_shuffle(2, line, v, [m](int i) { return i ^ m; });
}
template <class T> inline T __shfl_down_sync(unsigned, T v, unsigned d, int = 32, int line = __builtin_LINE()) {
  return simt_shuffle(6, line, v, [d](int i) { return i + (int)d < 32 ? i + (int)d : i; });
}
template <class T> inline T __shfl_up_sync(unsigned, T v, unsigned d, int = 32, int line = __builtin_LINE()) {
  return simt_shuffle(7, line, v, [d](int i) { return i >= (int)d ? i - (int)d : i; });
}
template <class T> inline T __shfl_sync(unsigned, T v, int lane, int = 32, int line = __builtin_LINE()) {
  struct In { T v; int lane; };
  return simt::collective<In, T>(8, line, In{v, lane}, false, [](unsigned char(*in)[64], unsigned char(*out)[64]) {
    for (int i = 0; i < 32; i++) std::memcpy(out[i], &((In*)in[((In*)in[i])->lane & 31])->v, sizeof(T)); });
}
inline unsigned __ballot_sync(unsigned, int predicate, int line = __builtin_LINE()) {
  return simt::collective<int, unsigned>(9, line, predicate, false, [](unsigned char(*in)[64], unsigned char(*out)[64]) {
    unsigned bits = 0;
    for (int i = 0; i < 32; i++) bits |= (*(int*)in[i] ? 1u : 0u) << i;
    for (int i = 0; i < 32; i++) std::memcpy(out[i], &bits, 4); });
}
inline int __any_sync(unsigned m, int p, int line = __builtin_LINE()) { return __ballot_sync(m, p, line) != 0; }
inline int __all_sync(unsigned m, int p, int line = __builtin_LINE()) { return __ballot_sync(m, p, line) == ~0u; }
// Whole numbers only: sums of floats in an order that chance decides are not allowed in the kernels.
inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz((unsigned)v) : 32; }
inline float __uint_as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t __float_as_uint(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return (uint32_t)((uint64_t)a * b >> 32); }
using std::isnan; using std::isinf; using std::min; using std::max;
