// wgmma on the host: matrix instructions of four warps that read shared memory by descriptor, in the background. What a
// kernel forgets shows: registers hold NaN until the wait, operands are read when the instruction is issued or only at
// the wait (by seed), addresses go through the swizzle bit by bit, and under TSan the reads are a thread of their own that
// knows of other threads' writes by fence.proxy.async alone.
#pragma once
#include "simt.hpp"

namespace simt {

/// An operand as its descriptor says (PTX ISA, "Matrix Descriptor Format"), of `rows` rows or columns and 16 of depth.
struct Operand {
  uint64_t bits; bool by_depth;
  /// Byte offset in the block's shared memory of the half type at (row, k), and of the seven that follow it.
  size_t at(int row, int k, int line) const {
    const size_t start = (bits & 0x3fff) << 4, lead = (bits >> 16 & 0x3fff) << 4, stride = (bits >> 32 & 0x3fff) << 4;
    if (bits >> 62 != 1 || (bits >> 49 & 7)) die("wgmma: only descriptors of the 128-byte swizzle are known", line);
    size_t a = by_depth ? start + row / 64 * lead + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                        : start + row / 8 * stride + row % 8 * 128 + k * 2;
    a ^= (a >> 7 & 7) << 4;
    if (a + 16 > kSharedStart + ctx().dyn_bytes || a < kSharedStart) die("wgmma: a descriptor leads out of shared memory", line);
    return a - kSharedStart;
  }
};

/// The 16-byte pieces of an operand from `first`, each `step`-th, as reads that sanitizers see.
inline void touch(const Operand& o, int rows, int first, int step, int line) {
#if defined(SIMT_TSAN) || defined(SIMT_ASAN)
  for (int i = first; i < rows * 2; i += step) {
    size_t a; { Ignore _; a = o.by_depth ? o.at(i % (rows / 8) * 8, i / (rows / 8), line) : o.at(i / 2, i % 2 * 8, line); }
    volatile const uint64_t* p = (volatile const uint64_t*)(ctx().dyn + a);
    (void)p[0]; (void)p[1];
  }
#else
  (void)o; (void)rows; (void)first; (void)step; (void)line;
#endif
}

/// All 128 threads of a warpgroup meet; the last does the work.
template <class F> inline void meet(int op, int line, F work) {
  Ctx& c = ctx(); Thread* t = c.cur;
  if (c.flat || c.bdim.x % 128) die("wgmma needs whole warpgroups", line);
  Ignore _;
  Warpgroup& g = c.wg[t->warp / 4];
  if (!g.arrived) { g.op = op; g.line = line; }
  else if (g.op != op || g.line != line) die("warpgroup-divergent wgmma", line);
  if (++g.arrived < 128) { t->st = WAIT_GROUP; t->line = line; to_main(); return; }
  g.arrived = 0;
  for (int w = 0; w < 4; w++) if (c.wp[t->warp / 4 * 4 + w].live != 32) die("wgmma with exited lanes", line);
  work(g);
  for (int i = 0; i < 128; i++) { Thread& o = c.th[t->warp / 4 * 128 + i]; if (o.st == WAIT_GROUP) o.st = READY; }
}

/// Where value i of a thread lies in the 64 x N result.
inline int value_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i >> 1 & 1) * 8; }
inline int value_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + (i & 1); }

struct Matrices { Operand a, b; bool registers, add; int n; float (*widen)(uint32_t); };
/// Results that are on their way: 64 x N.
struct Flight { std::vector<float*> to; std::vector<float> c; int open = 0; };
struct Work { Matrices m; std::vector<std::array<uint32_t, 4>> regs; std::shared_ptr<Flight> flight; unsigned batch; bool done; int line; };

inline void multiply(Work& w) {
  if (w.done) return;
  w.done = true;
  const int n = w.m.n;
  std::vector<float> a(64 * 16), b(16 * (size_t)n);
  // eight values that lie side by side; to[row * by_row + k * by_k]
  auto read = [&](const Operand& o, int rows, float* to, int by_row, int by_k) {
    for (int i = 0; i < rows * 2; i++) {
      const int row = o.by_depth ? i % (rows / 8) * 8 : i / 2, k = o.by_depth ? i / (rows / 8) : i % 2 * 8;
      uint16_t h[8];
      std::memcpy(h, ctx().dyn + o.at(row, k, w.line), 16);
      for (int e = 0; e < 8; e++) to[(row + (o.by_depth ? e : 0)) * by_row + (k + (o.by_depth ? 0 : e)) * by_k] = w.m.widen(h[e]);
    }
  };
  read(w.m.b, n, b.data(), 1, n);
  if (!w.m.registers) read(w.m.a, 64, a.data(), 16, 1);
  for (int l = 0; l < 128 && w.m.registers; l++) for (int e = 0; e < 8; e++) {
    const int row = l / 32 * 16 + l % 32 / 4 + (e >> 1 & 1) * 8, k = l % 4 * 2 + (e & 1) + (e >> 2) * 8;
    a[row * 16 + k] = w.m.widen(w.regs[l][e >> 1] >> 16 * (e & 1) & 0xffff);
  }
  std::vector<float> sum(n);
  for (int i = 0; i < 64; i++) {
    std::fill(sum.begin(), sum.end(), 0.f);
    for (int k = 0; k < 16; k++) for (int j = 0; j < n; j++) sum[j] += a[i * 16 + k] * b[k * n + j];
    float* to = &w.flight->c[(size_t)i * n];
    for (int j = 0; j < n; j++) to[j] = w.m.add ? to[j] + sum[j] : sum[j];
  }
}

#if defined(SIMT_TSAN)
/// The operands' reads as those of a thread that knows what was fenced; `done` tells who waits of them.
inline void read_by_proxy(const Matrices& wanted, char* done, int line) {
  Ctx& c = ctx();
  static thread_local struct { Matrices m; char* done; int line; } task;  // not on the stack: that is another thread's
  task = {wanted, done, line};
  void* back = c.cur->fiber;
  __tsan_switch_to_fiber(c.proxy_fiber, __tsan_switch_to_fiber_no_sync);
  __tsan_acquire(&ctx().proxy);
  if (!task.m.registers) touch(task.m.a, 64, 0, 1, task.line);
  touch(task.m.b, task.m.n, 0, 1, task.line);
  __tsan_release(task.done);
  __tsan_switch_to_fiber(back, __tsan_switch_to_fiber_no_sync);
}
#endif

inline void issue(const Matrices& m, const uint32_t* regs, float* c, int line) {
  const int lane = ctx().cur->tid.x % 128;
  if (!m.registers) touch(m.a, 64, lane, 128, line);
  touch(m.b, m.n, lane, 128, line);
  { Ignore _;
    Warpgroup& g = ctx().wg[ctx().cur->warp / 4];
    auto& d = g.lanes[lane];
    d.c = c; d.a = m.a.bits; d.b = m.b.bits; if (regs) std::memcpy(d.regs.data(), regs, 16); }
  meet(20, line, [&](Warpgroup& g) {
    if (!g.fenced) die("wgmma without wgmma.fence since the last wait", line);
    for (auto& l : g.lanes) if (l.b != m.b.bits || (!m.registers && l.a != m.a.bits)) die("wgmma: threads of a warpgroup differ in a descriptor", line);
    std::shared_ptr<Flight> f;
    for (auto& w : g.work) if (w->flight->to[0] == g.lanes[0].c) f = w->flight;
    if (!f) {
      f = std::make_shared<Flight>();
      f->c.resize(64 * (size_t)m.n);
      for (int l = 0; l < 128; l++) {
        f->to.push_back(g.lanes[l].c);
        for (int i = 0; i < m.n / 2; i++) { float& r = g.lanes[l].c[i]; f->c[(size_t)value_row(l, i) * m.n + value_column(l, i)] = r; r = NAN; }
      }
    }
    f->open++;
    auto w = std::make_shared<Work>(Work{m, {}, f, g.batch, false, line});
    for (auto& l : g.lanes) w->regs.push_back(l.regs);
    g.work.push_back(w);
    if (ctx().seed && (ctx().rng() & 1)) for (auto& all : g.work) multiply(*all);
#if defined(SIMT_TSAN)
    read_by_proxy(m, &g.read, line);
#endif
  });
}

inline void wait(int pending, int line) {
  meet(21, line, [&](Warpgroup& g) {
    size_t kept = 0;
    for (auto w : g.work) {
      if (w->batch + pending >= g.batch) { g.work[kept++] = w; continue; }
      multiply(*w);
      Flight& f = *w->flight;
      if (--f.open) continue;
      for (int l = 0; l < 128; l++)
        for (int i = 0; i < w->m.n / 2; i++) f.to[l][i] = f.c[(size_t)value_row(l, i) * w->m.n + value_column(l, i)];
    }
    g.work.resize(kept);
    g.fenced = false;
  });
#if defined(SIMT_TSAN)
  __tsan_acquire(&ctx().wg[ctx().cur->warp / 4].read);
#endif
}
inline void commit(int line) { meet(22, line, [](Warpgroup& g) { g.batch++; }); }
inline void fence(int line) { meet(23, line, [](Warpgroup& g) { g.fenced = true; }); }
inline void proxy_fence() {
#if defined(SIMT_TSAN)
  __tsan_release(&ctx().proxy);
#endif
}

}  // namespace simt
