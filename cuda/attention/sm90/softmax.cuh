// The running softmax of the two rows of a product that a thread of a warpgroup has columns of.
#pragma once
#include "../../mma.cuh"

namespace smalti {
namespace attention {

/// What a thread knows of its two queries, h = 0 and 1, after some of the keys: the logits' maximum in units of log2, the
/// sum of exponentials of its own columns, and the sum of values.
template <int DP> struct Running {
  float top[2], sum[2], o[DP / 2];
  DEV Running() {
    UNROLL for (int h = 0; h < 2; h++) { top[h] = -INFINITY; sum[h] = 0.f; }
    UNROLL for (int i = 0; i < DP / 2; i++) o[i] = 0.f;
  }
  /// A larger maximum: what `sum` is to be multiplied by was; so must `o`.
  DEV float rise(int h, float now) {
    now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
    now = fmaxf(top[h], fmaxf(now, __shfl_xor_sync(~0u, now, 2)));
    const float keep = ex2(top[h] - now);
    top[h] = now;
    sum[h] *= keep;
    return keep;
  }
  /// A maximum rises seldom once many keys are seen.
  DEV void rescale(const float (&keep)[2]) {
    if (!__any_sync(~0u, keep[0] != 1.f || keep[1] != 1.f)) return;
    UNROLL for (int i = 0; i < DP / 2; i++) o[i] *= keep[i >> 1 & 1];
  }
};

/// Logits to exponentials, without relative terms. `scale`: positive, with log2(e).
template <int DP, int N> DEV void exponentials(float (&s)[N][4], float scale, Running<DP>& r, float (&keep)[2]) {
  UNROLL for (int h = 0; h < 2; h++) {
    float now = fmaxf(s[0][2 * h], s[0][2 * h + 1]);
    UNROLL for (int n = 1; n < N; n++) { now = fmaxf(now, s[n][2 * h]); now = fmaxf(now, s[n][2 * h + 1]); }
    keep[h] = r.rise(h, now * scale);
  }
  UNROLL for (int n = 0; n < N; n++) UNROLL for (int e = 0; e < 4; e++) {
    s[n][e] = ex2(s[n][e] * scale - r.top[e >> 1]);
    r.sum[e >> 1] += s[n][e];
  }
}

/// The same for query h of the two, with its terms: `column` of these columns of a window row, `row` of the window rows from
/// the first one on. First the maximum, for which a window row needs its row term only once; logits lack it still.
template <int DP, int N, int CW> DEV float find_top(float (&s)[N][4], int h, float scale, const float (&column)[2 * CW], const float* row,
                                                 float (&term)[N / CW], Running<DP>& r) {
  float now = -INFINITY;
  UNROLL for (int y = 0; y < N / CW; y++) {
    float most = -INFINITY;
    UNROLL for (int c = 0; c < 2 * CW; c++) {
      float& x = s[y * CW + c / 2][2 * h + c % 2];
      x = x * scale + column[c];
      most = fmaxf(most, x);
    }
    term[y] = row[y];
    now = fmaxf(now, most + term[y]);
  }
  return r.rise(h, now);
}
/// And then the exponentials.
template <int DP, int N, int CW> DEV void exponentials(float (&s)[N][4], int h, const float (&term)[N / CW], Running<DP>& r) {
  UNROLL for (int y = 0; y < N / CW; y++) {
    const float shift = term[y] - r.top[h];
    UNROLL for (int c = 0; c < 2 * CW; c++) {
      float& x = s[y * CW + c / 2][2 * h + c % 2];
      x = ex2(x + shift);
      r.sum[h] += x;
    }
  }
}

}  // namespace attention
}  // namespace smalti
