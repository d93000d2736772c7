// Pieces of the matrix-instruction kernels. A warp's tile has 16 rows; lane (g, t) holds rows g and g + 8,
// columns 2t and 2t + 1 of every 8-wide accumulator.
#pragma once
#include "problem.cuh"

namespace smalti {
namespace attention {

/// Row stride of shared tiles: (D + 8) / 8 is odd for every instance, so ldmatrix meets no bank twice.
template <int DP> constexpr int kLd = DP + 8;

/// A 16x16 operand from rows at `tile` (row stride `ld`), columns from k.
template <class T> DEV void load_a(uint32_t (&a)[4], const T* tile, int ld, int k, int lane) {
  ldsm4(a, tile + (lane & 15) * ld + k + (lane >> 4) * 8);
}
/// Operand B for two 8-wide tiles, where the tile's rows are the product's columns.
template <class T> DEV void load_b(uint32_t (&b)[4], const T* tile, int ld, int k, int lane) {
  ldsm4(b, tile + ((lane & 7) + (lane >> 4) * 8) * ld + k + (lane >> 3 & 1) * 8);
}
/// Operand B for two 8-wide tiles, where the tile's columns (from n) are the product's columns.
template <class T> DEV void load_bt(uint32_t (&b)[4], const T* tile, int ld, int n, int lane) {
  ldsm4t(b, tile + (lane & 15) * ld + n + (lane >> 4) * 8);
}

template <int N> DEV void clear(float (&a)[N][4]) {
  UNROLL for (int n = 0; n < N; n++) UNROLL for (int e = 0; e < 4; e++) a[n][e] = 0.f;
}

/// Accumulators of two 8-wide tiles as a 16x16 operand.
template <class T> DEV void as_a(uint32_t (&a)[4], const float (&x)[4], const float (&y)[4]) {
  a[0] = pack(T{}, x[0], x[1]); a[1] = pack(T{}, x[2], x[3]);
  a[2] = pack(T{}, y[0], y[1]); a[3] = pack(T{}, y[2], y[3]);
}

/// Coordinates of a 16-row tile along one axis: those of this lane's two rows, and the range over the tile.
struct Span { int at[2], low, high; };

/// The window row (`axis` 0) or column of the tile's rows.
DEV Span span_of(const Side& s, int first, int axis, int lane) {
  Span o;
  const int y0 = first / s.pitch, y1 = (first + 8) / s.pitch, x0 = first - y0 * s.pitch, x1 = first + 8 - y1 * s.pitch, g = lane >> 2;
  if (axis == 0) {
    o.at[0] = y0; o.at[1] = y1; o.low = y0; o.high = y1;
  } else {
    o.at[0] = x0 + g; o.at[1] = x1 + g;
    o.low = x0 < x1 ? x0 : x1; o.high = (x0 < x1 ? x1 : x0) + 7;
  }
  return o;
}

/// Products of queries with the rows of a table from `first` on, to scratch[row][k] times `factor`: row at - k + extent - 1
/// is that of k below `extent`, others are dropped.
template <int N> DEV void scatter_terms(const float (&a)[N][4], const Span& s, int first, int extent, float* scratch, int stride, float factor, int lane) {
  const int g = lane >> 2, t2 = (lane & 3) * 2;
  UNROLL for (int i = 0; i < N; i++) UNROLL for (int e = 0; e < 4; e++) {
    const int h = e >> 1, k = s.at[h] + extent - 1 - (first + i * 8 + t2 + (e & 1));
    if ((unsigned)k < (unsigned)extent) scratch[(g + h * 8) * stride + k] = a[i][e] * factor;
  }
}

/// q . table[at - k + extent - 1] for every k below `extent`, to scratch[row][k] times `factor`
/// (ViTDet's decomposed relative positions; q unscaled).
template <class T, int DP> DEV void relative_terms(const uint32_t (&q)[DP / 16][4], const T* table, Span s, int extent, float* scratch,
                                                   int stride, float factor, int lane) {
  constexpr int LD = kLd<DP>;
  const int last = 2 * extent - 2, n = extent + s.high - s.low;
  for (int n0 = 0; n0 < n; n0 += 16) {
    float a[2][4];
    clear(a);
    int row = s.low + n0 + (lane & 7) + (lane >> 4) * 8;
    row = row > last ? last : row;  // such columns belong to no key
    UNROLL for (int k = 0; k < DP / 16; k++) {
      uint32_t b[4];
      ldsm4(b, table + row * LD + k * 16 + (lane >> 3 & 1) * 8);
      mma(T{}, a[0], q[k], b[0], b[1]);
      mma(T{}, a[1], q[k], b[2], b[3]);
    }
    scatter_terms(a, s, s.low + n0, extent, scratch, stride, factor, lane);
  }
}

/// The transpose of `relative_terms`: acc += sum over k of scratch[row][k] * table[at - k + extent - 1].
template <class T, int DP> DEV void relative_back(float (&acc)[DP / 8][4], const T* table, Span s, int extent, const float* scratch,
                                                  int stride, int lane) {
  constexpr int LD = kLd<DP>;
  const int last = 2 * extent - 2, g = lane >> 2, t2 = (lane & 3) * 2, n = extent + s.high - s.low;
  for (int n0 = 0; n0 < n; n0 += 16) {
    float x[2][4];
    UNROLL for (int i = 0; i < 2; i++) UNROLL for (int e = 0; e < 4; e++) {
      const int h = e >> 1, k = s.at[h] + extent - 1 - (s.low + n0 + i * 8 + t2 + (e & 1));
      x[i][e] = k >= 0 && k < extent ? scratch[(g + h * 8) * stride + k] : 0.f;
    }
    uint32_t a[4];
    as_a<T>(a, x[0], x[1]);
    int row = s.low + n0 + (lane & 15);
    row = row > last ? last : row;
    UNROLL for (int d = 0; d < DP / 8; d += 2) {
      uint32_t b[4];
      ldsm4t(b, table + row * LD + d * 8 + (lane >> 4) * 8);
      mma(T{}, acc[d], a, b[0], b[1]);
      mma(T{}, acc[d + 1], a, b[2], b[3]);
    }
  }
}

/// Which window row and column an 8-wide tile of keys starts at.
struct Cursor {
  int y, x;
  DEV void start(const Side& s, int first) { y = first / s.pitch; x = first - y * s.pitch; }
  DEV void next(const Side& s) { x += 8; if (x >= s.pitch) { x = 0; y++; } }
};

/// The keys 0 .. that are all in the window, however they are numbered.
DEV int solid_keys(const Side& s) { return s.win_h == 1 ? s.win_w : s.pitch == s.win_w ? s.rows() : 0; }

/// Without relative terms: `to` for the values (-infinity for logits) of keys from `key` outside the window and, if causal, behind the
/// query, that of the lane's first row being `query`. Tiles that have none such need no call.
template <int N> DEV void mask_keys(float (&s)[N][4], const Problem& p, int key, int query, int lane, float to = -INFINITY) {
  Cursor c;
  c.start(p.ks, key);
  UNROLL for (int n = 0; n < N; n++) {
    UNROLL for (int e = 0; e < 4; e++) {
      const int kx = c.x + (lane & 3) * 2 + (e & 1);
      if (c.y >= p.ks.win_h || kx >= p.ks.win_w || (p.causal && kx > query + (e >> 1) * 8)) s[n][e] = to;
    }
    c.next(p.ks);
  }
}

}  // namespace attention
}  // namespace smalti
