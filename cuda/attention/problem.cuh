// What all attention kernels share: a problem is B images cut in windows, H heads, and two sides (queries, keys).
// Plain attention is one window of one row; global attention over a grid is one window of the whole grid.
//
// Tokens of a window are numbered row by row with the row length rounded up to 8 (`pitch`), so that an 8-wide
// tile of the matrix instruction never holds two window rows: the row term of the relative position is then one
// number a tile, the column term the same registers in every row. Spare columns are masked.
#pragma once
#include "../common/dtype.cuh"

namespace smalti {
namespace attention {

/// A strided tensor [B, H, Y, X, n] with adjacent last axis, read for tokens outside the image from `pad`.
struct Field {
  void* p;
  const void* pad;  // [H, n], or null: zeros
  int64_t b, h, y, x, ph;
  int32_t n;
};

/// One side: image and window in tokens.
struct Side {
  int32_t img_h, img_w, win_h, win_w, pitch;
  HOST_DEV int rows() const { return win_h * pitch; }
};

struct Problem {
  Field q, k, v, o, go, dq, dk, dv;
  Side qs, ks;
  int32_t batch, heads, windows_y, windows_x, causal;
  int32_t wide, pairs;  // 16-byte and two-element accesses are aligned
  double scale;
  const void *rel_h, *rel_w;  // [2 win_h - 1, D], [2 win_w - 1, D], adjacent, or null
  void *lse, *delta;          // [B, H, Y, X] of queries
  void* norm;                 // the same, f32 and f64 only: 1 / sum of exp(logits - lse), which rounding of lse keeps from 1
  void *rel, *drel;           // [B, H, Y, X, win_h + win_w]: relative terms of each query, and their gradients
  void* pad_part;             // [B * border windows, H, slots, 2, D]: sums of dk and dv over padding
  int32_t pad_slots;
  int32_t tiles;              // blocks of a window and head
};

/// The window and head of this block, and which block of it.
struct Place {
  int32_t b, h, wy, wx, tile;
};

DEV Place place_of(const Problem& p) {
  uint32_t i = blockIdx.x;
  Place w;
  w.tile = i % p.tiles; i /= p.tiles;
  w.h = i % p.heads; i /= p.heads;
  w.wx = i % p.windows_x; i /= p.windows_x;
  w.wy = i % p.windows_y;
  w.b = i / p.windows_y;
  return w;
}

/// Number of a query among [B, H, Y, X].
DEV int64_t query_index(const Problem& p, const Place& w, int y, int x) {
  return (((int64_t)w.b * p.heads + w.h) * p.qs.img_h + w.wy * p.qs.win_h + y) * p.qs.img_w + w.wx * p.qs.win_w + x;
}

/// Is token (y, x) of the window in the window and in the image?
DEV bool inside(const Side& s, const Place& w, int y, int x) {
  return y < s.win_h && x < s.win_w && w.wy * s.win_h + y < s.img_h && w.wx * s.win_w + x < s.img_w;
}

/// The token's row in `f`, which must be inside.
template <class T> DEV T* row_at(const Field& f, const Side& s, const Place& w, int y, int x) {
  return (T*)f.p + w.b * f.b + w.h * f.h + (int64_t)(w.wy * s.win_h + y) * f.y + (int64_t)(w.wx * s.win_w + x) * f.x;
}

/// Where to read token (y, x): the tensor, the padding, or null for zeros.
template <class T> DEV const T* source(const Field& f, const Side& s, const Place& w, int y, int x) {
  if (y >= s.win_h || x >= s.win_w) return nullptr;
  if (w.wy * s.win_h + y < s.img_h && w.wx * s.win_w + x < s.img_w) return row_at<const T>(f, s, w, y, x);
  return f.pad ? (const T*)f.pad + w.h * f.ph : nullptr;
}

template <class T> DEV T zero_of() { return narrow<T>((Acc<T>)0); }

/// Every `step`-th token of a window from `first`, and which of them are there: one division a walk, none a token.
struct Walk {
  int y, x, dy, dx, pitch, win_h, win_w, in_h, in_w;
  DEV Walk(const Side& s, const Place& w, int first, int step) : y(0), x(first), dy(0), dx(step), pitch(s.pitch), win_h(s.win_h), win_w(s.win_w) {
    if (win_h > 1) {  // one row: what lies beyond it is beyond win_w too
      y = (uint32_t)first / (uint32_t)pitch; x = first - y * pitch;
      dy = (uint32_t)step / (uint32_t)pitch; dx = step - dy * pitch;
    }
    const int h = s.img_h - w.wy * win_h, l = s.img_w - w.wx * win_w;
    in_h = h < win_h ? h : win_h;
    in_w = l < win_w ? l : win_w;
  }
  DEV bool inside() const { return y < in_h && x < in_w; }
  DEV bool in_window() const { return y < win_h && x < win_w; }
  /// Whether the step went over the end of a window row.
  DEV bool next() {
    y += dy; x += dx;
    if (x < pitch) return false;
    x -= pitch; y++;
    return true;
  }
};

/// Where a walk stands in a field, from one of its columns; the field is aligned.
template <class T> struct Reader {
  const char *at, *pad;
  int64_t step, wrap;  // bytes to the next token, and what the end of a window row adds
  int left;            // columns from here on
  DEV Reader(const Field& f, const Side& s, const Place& w, const Walk& k, int c)
      : at((const char*)(row_at<const T>(f, s, w, k.y, k.x) + c)), pad(f.pad ? (const char*)((const T*)f.pad + w.h * f.ph + c) : nullptr),
        step((k.dy * f.y + k.dx * f.x) * (int)sizeof(T)), wrap((f.y - k.pitch * f.x) * (int)sizeof(T)), left(f.n - c) {}
  DEV void next(bool over) { at += step; if (over) at += wrap; }
  /// This token's chunks of 16 bytes: COUNT of them, LANES apart.
  template <int COUNT, int LANES> DEV void copy(T* to, const Walk& k) const {
    constexpr int V = 16 / (int)sizeof(T);
    const bool inside = k.inside(), padded = pad && k.in_window();
    UNROLL for (int i = 0; i < COUNT * LANES; i += LANES) {
      if (inside && i * V < left) {
        cp16(to + i * V, at + i * 16);
      } else if (padded && i * V < left) {
        cp16(to + i * V, pad + i * 16);
      } else {
        const uint4 zero = {0, 0, 0, 0};
        *(uint4*)(to + i * V) = zero;
      }
    }
  }
};

/// How a row's 16-byte chunks are shared out: as many lanes as divide them evenly, so that a thread keeps its columns.
template <class T, int WIDTH> struct Lanes {
  static constexpr int V = 16 / (int)sizeof(T), CHUNKS = WIDTH / V, N = (CHUNKS & -CHUNKS) < 32 ? (CHUNKS & -CHUNKS) : 32, EACH = CHUNKS / N;
};

/// `load_rows` with an address computation for each 16 bytes: where rows are not aligned, or a kernel has no registers for
/// a walk.
template <class T, int WIDTH> DEV void load_each(T* dst, int ld, const Problem& p, const Field& f, const Side& s, const Place& w,
                                                 int first, int rows, int tid, int threads) {
  constexpr int V = 16 / (int)sizeof(T), CH = WIDTH / V;
  ROLLED for (int i = tid; i < rows * CH; i += threads) {
    const int r = i / CH, c = i % CH * V, y = (first + r) / s.pitch, x = first + r - y * s.pitch;
    const T* from = source<T>(f, s, w, y, x);
    T* to = dst + r * ld + c;
    if (p.wide && from && c < f.n) {
      cp16(to, from + c);
    } else {
      ROLLED for (int e = 0; e < V; e++) to[e] = from && c + e < f.n ? from[c + e] : zero_of<T>();
    }
  }
}

/// Rows `first ..` of a window to shared memory, WIDTH columns at a row stride of `ld`, zeros beyond what is
/// there. Aligned rows go by cp.async: the caller commits, waits and synchronises.
template <class T, int WIDTH> DEV void load_rows(T* dst, int ld, const Problem& p, const Field& f, const Side& s, const Place& w,
                                                 int first, int rows, int tid, int threads) {
  using L = Lanes<T, WIDTH>;
  if (!p.wide) return load_each<T, WIDTH>(dst, ld, p, f, s, w, first, rows, tid, threads);
  const int r0 = tid / L::N, c = tid % L::N * L::V, step = threads / L::N;
  Walk k(s, w, first + r0, step);
  Reader<T> from(f, s, w, k, c);
  for (int r = r0; r < rows; r += step) {
    from.template copy<L::EACH, L::N>(dst + r * ld + c, k);
    from.next(k.next());
  }
}

/// The same for two fields of one side, the second one's rows `apart` elements behind the first one's. `TOGETHER`: in one
/// walk; where a kernel has no registers for two readers at once, in two.
template <class T, int WIDTH, bool TOGETHER = true>
DEV void load_pair(T* dst, int apart, int ld, const Problem& p, const Field& f, const Field& f2, const Side& s, const Place& w,
                   int first, int rows, int tid, int threads) {
  using L = Lanes<T, WIDTH>;
  if (!p.wide || !TOGETHER) {
    load_rows<T, WIDTH>(dst, ld, p, f, s, w, first, rows, tid, threads);
    return load_rows<T, WIDTH>(dst + apart, ld, p, f2, s, w, first, rows, tid, threads);
  }
  const int r0 = tid / L::N, c = tid % L::N * L::V, step = threads / L::N;
  Walk k(s, w, first + r0, step);
  Reader<T> from(f, s, w, k, c), from2(f2, s, w, k, c);
  for (int r = r0; r < rows; r += step) {
    T* to = dst + r * ld + c;
    from.template copy<L::EACH, L::N>(to, k);
    from2.template copy<L::EACH, L::N>(to + apart, k);
    const bool over = k.next();
    from.next(over);
    from2.next(over);
  }
}

/// A dense table [rows, n] to shared memory, in the same way.
template <class T, int WIDTH> DEV void load_table(T* dst, int ld, const Problem& p, const void* table, int rows, int n, int tid, int threads) {
  constexpr int V = 16 / (int)sizeof(T), CH = WIDTH / V;
  ROLLED for (int i = tid; i < rows * CH; i += threads) {
    const int r = i / CH, c = i % CH * V;
    T* d = dst + r * ld + c;
    const T* from = (const T*)table + (int64_t)r * n + c;
    if (c >= n) {
      const uint4 zero = {0, 0, 0, 0};
      *(uint4*)d = zero;
    } else if (p.wide) {
      cp16(d, from);
    } else {
      ROLLED for (int e = 0; e < V; e++) d[e] = c + e < n ? from[e] : zero_of<T>();
    }
  }
}

/// Two adjacent results, `c` even.
template <class T> DEV void store_pair(T* row, int c, int n, bool pairs, float a, float b) {
  if (c + 1 < n && pairs) {
    *(uint32_t*)(row + c) = pack(T{}, a, b);
  } else {
    if (c < n) row[c] = narrow<T>(a);
    if (c + 1 < n) row[c + 1] = narrow<T>(b);
  }
}

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

/// How relative terms are held in the tiles of the half types: not at all, in shared memory, or the column term
/// in registers for window rows of exactly 16 or 64 spare-padded columns.
enum Rel { kNone = -1, kShared = 0, kRow16 = 2, kRow64 = 8 };

}  // namespace attention
}  // namespace smalti
