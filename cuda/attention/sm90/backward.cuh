// What both wgmma passes of the gradients share: 64 tokens of the other side a step, in a ring of stages.
#pragma once
#include "tile.cuh"

namespace smalti {
namespace attention {

constexpr int kStep = 64, kStages = 3;  // tokens; steps in shared memory: read, multiplied, on their way

/// Stages of two tiles each, of step j.
template <class T, int DP> struct Ring {
  static constexpr int BYTES = kStages * 2 * Tile<T, DP>::bytes(kStep);
  unsigned char* at;
  DEV Tile<T, DP> one(int j) const { return {at + j % kStages * 2 * Tile<T, DP>::bytes(kStep), kStep}; }
  DEV Tile<T, DP> two(int j) const { return {one(j).at + Tile<T, DP>::bytes(kStep), kStep}; }
};

/// What a thread copies to a ring of two fields of one side, step after step: it knows its place from one to the next.
template <class T, int DP> struct PairFeed {
  using L = Lanes<T, DP>;
  Share<T, DP> mine;
  Walk at;
  Reader<T> one, two;
  bool here;  // there may be more threads than a step needs
  DEV PairFeed(const Field& f, const Field& f2, const Side& s, const Place& w, int first, int tid, int threads)
      : mine(kStep, tid, threads < kStep * L::N ? threads : kStep * L::N), at(s, w, first + mine.line, mine.step),
        one(f, s, w, at, mine.chunk * L::V), two(f2, s, w, at, mine.chunk * L::V), here(mine.line < kStep) {}
  template <bool PADDED> DEV void copy(unsigned char* to, const Reader<T>& from) const {
    if (PADDED) mine.copy(to, from, at);
    else mine.copy(to, from.at, at.inside(), from.left);
  }
  /// `PADDED`: tokens outside the image are read from the padding.
  template <bool PADDED> DEV void step(const Ring<T, DP>& ring, int j) {
    if (!here) return;
    unsigned char *to = ring.one(j).at + mine.line * 128, *to2 = ring.two(j).at + mine.line * 128;
    for (int r = 0; r < kStep; r += mine.step) {
      copy<PADDED>(to + r * 128, one);
      copy<PADDED>(to2 + r * 128, two);
      const bool over = at.next();
      one.next(over);
      two.next(over);
    }
  }
};

/// Accumulators of 64 columns as left operands.
template <class T> DEV void as_operands(uint32_t (&a)[4][4], const float (&x)[8][4]) {
  UNROLL for (int i = 0; i < 4; i++) as_a<T>(a[i], x[2 * i], x[2 * i + 1]);
}

}  // namespace attention
}  // namespace smalti
