// Tiles of tokens in shared memory as wgmma reads them: lines of 64 columns in the 128-byte swizzle, one block of lines for
// each 64 columns. A tile serves as rows (S = Q K^T) and as depth (O = P V) alike. All of this needs `wide` fields.
#pragma once
#include "../../wgmma.cuh"
#include "../tile.cuh"

namespace smalti {
namespace attention {

/// `lines` tokens, a multiple of 8, of DP columns, from a multiple of 1024 bytes.
template <class T, int DP> struct Tile {
  unsigned char* at;
  int lines;
  HOST_DEV static constexpr int bytes(int lines) { return (DP + 63) / 64 * lines * 128; }
  /// Operand with the tokens from `row` as rows and the columns from `k` as depth.
  DEV uint64_t by_rows(int row, int k) const { return rows_operand(at + k / 64 * lines * 128, row, k % 64); }
  /// Operand with the columns as rows and the tokens from `k` as depth.
  DEV uint64_t by_depth(int k) const { return depth_operand(at, k, lines * 128); }
};

/// What a thread copies of each line: chunks of 16 bytes from `chunk`, every L::N-th. The number of threads that share a
/// tile makes their step from line to line a multiple of 8, so that the swizzle of a thread's lines is one.
template <class T, int DP> struct Share {
  using L = Lanes<T, DP>;
  int line, chunk, step, swizzle, apart;
  DEV Share(int lines, int tid, int threads)
      : line(tid / L::N), chunk(tid % L::N), step(threads / L::N), swizzle(line & 7), apart(lines * 128) {}
  /// From `from`, or zeros where it is not `there`; `left`: columns from the first chunk on.
  DEV void copy(unsigned char* to, const char* from, bool there, int left) const {
    UNROLL for (int i = 0; i < L::EACH; i++) {
      const int c = chunk + i * L::N;
      cp16z(to + c / 8 * apart + ((c % 8 ^ swizzle) << 4), from + i * L::N * 16, there && i * L::N * L::V < left ? 16 : 0);
    }
  }
  DEV void copy(unsigned char* to, const Reader<T>& from, const Walk& k) const {
    const bool inside = k.inside();
    copy(to, inside ? from.at : from.pad, inside || (from.pad && k.in_window()), from.left);
  }
};

/// Rows `first ..` of a window in two fields to the lines of two tiles from `line`, a multiple of 8, `rows` of them; zeros
/// beyond what is there. By cp.async: the caller commits, waits, calls proxy_fence and synchronises.
template <class T, int DP> DEV void load_tiles(const Tile<T, DP>& to, const Tile<T, DP>& to2, int line, const Field& f, const Field& f2,
                                               const Side& s, const Place& w, int first, int rows, int tid, int threads) {
  const Share<T, DP> mine(to.lines, tid, threads);
  Walk k(s, w, first + mine.line, mine.step);
  Reader<T> from(f, s, w, k, mine.chunk * Share<T, DP>::L::V), from2(f2, s, w, k, mine.chunk * Share<T, DP>::L::V);
  for (int r = mine.line; r < rows; r += mine.step) {
    mine.copy(to.at + (line + r) * 128, from, k);
    mine.copy(to2.at + (line + r) * 128, from2, k);
    const bool over = k.next();
    from.next(over);
    from2.next(over);
  }
}

/// Tile after tile of a field of DP columns, LINES tokens each, where the compiler knows the shape of a window: rows of PITCH
/// tokens, or for PITCH 0 a single row. A third of the instructions of a walk, few registers, and no branches, behind each of
/// which copies cost more. Strides of tokens are `near`. CUT: windows may reach beyond the image, where tokens are the
/// field's padding or zeros; else there is no padding, and tiles that are loaded begin in the window.
template <class T, int DP, int LINES, int PITCH, bool CUT, int THREADS> struct Feed {
  using L = Lanes<T, DP>;
  static constexpr int COPY = THREADS == 384 ? 256 : THREADS;  // that copy
  static constexpr int STEP = COPY / L::N < LINES || PITCH ? COPY / L::N : LINES;
  static constexpr int DOWN = PITCH && STEP >= PITCH ? STEP / PITCH : 0, RIGHT = DOWN ? 0 : STEP;  // to a thread's next token
  static constexpr int ROWS = PITCH ? LINES / PITCH : 0, COLUMNS = PITCH ? 0 : LINES;              // to the next tile
  static_assert(!PITCH || DOWN || (PITCH == LINES && !CUT), "a thread stays in its column, or in its row");
  const char *at, *pad;
  int here;        // row of this thread's next token if it goes down, else the column
  int real, some;  // those before `real` are in the image, those before `some` are not zeros

  DEV Feed(const Field& f, const Side& s, const Place& w, int first, int tid) {
    const int line = first + tid / L::N, y = PITCH ? line / PITCH : 0, x = PITCH ? line % PITCH : line, chunk = tid % L::N * 16;
    const int in_h = CUT ? min(s.win_h, s.img_h - w.wy * s.win_h) : s.win_h, in_w = CUT ? min(s.win_w, s.img_w - w.wx * s.win_w) : s.win_w;
    at = (const char*)row_at<const T>(f, s, w, 0, 0) + bytes(f, y, x) + chunk;
    pad = CUT && f.pad ? (const char*)((const T*)f.pad + w.h * f.ph) + chunk : nullptr;
    here = DOWN ? y : x;
    real = !DOWN ? in_w : x < in_w ? in_h : 0;
    some = pad && x < s.win_w ? s.win_h : real;
  }
  DEV static int64_t bytes(const Field& f, int y, int x) { return (y * (int64_t)(int)f.y + x * (int64_t)(int)f.x) * 2; }
  /// The next tile, to lines from `first` on.
  DEV void load(const Field& f, const Tile<T, DP>& to, int first, int tid) {
    const Share<T, DP> mine(to.lines, tid, COPY);
    if (STEP * L::N == THREADS || tid < STEP * L::N) {
      UNROLL for (int i = 0; i * STEP < LINES; i++) {
        if ((i + 1) * STEP > LINES && mine.line + i * STEP >= LINES) continue;
        const int n = here + i * (DOWN ? DOWN : RIGHT);
        const char* from = at + bytes(f, i * DOWN, i * RIGHT);
        if (CUT) from = n < real ? from : pad;
        mine.copy(to.at + (first + mine.line + i * STEP) * 128, from, n < (CUT ? some : real), DP);
      }
    }
    here += DOWN ? ROWS : COLUMNS;
    at += bytes(f, ROWS, COLUMNS);
  }
};
/// Whether strides of tokens are such.
inline bool near(const Field& f) { return f.x < 1 << 24 && f.x > -(1 << 24) && f.y < 1 << 24 && f.y > -(1 << 24); }

/// A dense table of `rows` rows of n columns, from `first`, to all lines of a tile: zeros beyond it.
template <class T, int DP> DEV void load_table_tile(const Tile<T, DP>& to, const void* table, int rows, int n, int first, int tid, int threads) {
  const Share<T, DP> mine(to.lines, tid, threads);
  const int c = mine.chunk * Share<T, DP>::L::V;
  for (int r = mine.line; r < to.lines; r += mine.step)
    mine.copy(to.at + r * 128, (const char*)((const T*)table + (int64_t)(first + r) * n + c), first + r < rows, n - c);
}

/// Accumulators as columns of 8: [i][e] is value 4 i + e, as in the tiles of mma.sync.
template <int N> DEV float (&eights(float (&c)[N]))[N / 4][4] { return *(float (*)[N / 4][4])c; }

/// Issues c = A B^T: 64 tokens of `a` from `row`, N tokens of `b` from `row_b`, all columns.
template <class T, int N, int DP> DEV void multiply_rows(float (&c)[N / 2], const Tile<T, DP>& a, int row, const Tile<T, DP>& b, int row_b) {
  UNROLL for (int k = 0; k < DP; k += 16) Wgmma<T, N>::template run<false, false>(c, a.by_rows(row, k), b.by_rows(row_b, k), k > 0);
}

/// Issues c (+)= A B: A in registers as operands of 16 columns, each met by 16 tokens of `b` from `first` on. `add`: else
/// c starts from zero.
template <class T, int DEPTH, int DP> DEV void multiply_depth(float (&c)[DP / 2], const uint32_t (&a)[DEPTH / 16][4], const Tile<T, DP>& b,
                                                             int first, bool add) {
  UNROLL for (int k = 0; k < DEPTH; k += 16) Wgmma<T, DP>::template run<true>(c, a[k / 16], b.by_depth(first + k), add || k > 0);
}

}  // namespace attention
}  // namespace smalti
