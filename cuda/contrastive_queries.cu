// Gradient of the queries alone (MoCo's queue; keys without gradient), half types, d <= 256: dS never leaves the
// block. As in attention a block recomputes a tile of logits, and multiplies g, rounded once, with the same keys; it
// keeps 128 rows x 128 columns of dQ in registers and walks over a part of the keys. The parts are added in order.
#include "contrastive/target.cuh"

namespace smalti {
namespace contrastive {

constexpr int MOST_D = 256;

template <class T> struct Walk {
  Operand<T> q, k, keys_by_column;  // the keys twice: rows of S, and columns of dQ
  int64_t d, label, tiles, part;    // part: column tiles a block
  const float *scale, *rows;
  float* out;  // [part][n][d]
};

template <class T, bool KM> __global__ void __launch_bounds__(THREADS, 1) walk_keys(const Walk<T> p) {
  DYN_SMEM(shared);
  T* g = (T*)(shared + shared_bytes<T>());
  const int tid = threadIdx.x;
  const Place at(tid);
  const int64_t n = p.q.rows, m = p.k.rows, r0 = (int64_t)blockIdx.x * TILE, part = blockIdx.y, d0 = (int64_t)blockIdx.z * TILE;
  const float factor = *p.scale * (float)LOG2E;
  const int64_t end = min((part + 1) * p.part, p.tiles);
  Fragment<float> sum, s;
  sum.zero();
  for (int64_t tile = part * p.part; tile < end; tile++) {
    const int64_t c0 = tile * TILE;
    product<T, false, KM>(s, p.q, p.k, r0, c0, 0, p.d, shared, at, tid);
    const Bounds in(at, n - r0, m - c0, r0 + p.label - c0);
    UNROLL for (int i = 0; i < 8; i++) {
      const int64_t r = r0 + at.row(i);
      const float lse = r < n ? p.rows[r] : INFINITY, miss = r < n ? p.rows[n + r] : 0.f;
      UNROLL for (int j = 0; j < 8; j++) {
        const float x = two_to(s.at(i, j) * factor - lse);
        s.at(i, j) = in.positive(i, j) ? -miss : in.column(j) ? x : 0.f;
      }
      UNROLL for (int j = 0; j < 8; j += 2)
        *(uint32_t*)(g + at.row(i) * LD_M + at.column(j)) = pack(T{}, s.at(i, j), s.at(i, j + 1));
    }
    // the first barrier inside shows g to all; the last keeps the next tile from overwriting it
    multiply_shared<T, !KM>(sum, g, p.keys_by_column, d0, c0, min(m, c0 + TILE), shared, at, tid);
  }
  float* out = p.out + part * n * p.d;
  UNROLL for (int i = 0; i < 8; i++)
    UNROLL for (int j = 0; j < 8; j += 2) {
      const int64_t r = r0 + at.row(i), c = d0 + at.column(j);
      if (r < n && c < p.d) out[r * p.d + c] = sum.at(i, j);
      if (r < n && c + 1 < p.d) out[r * p.d + c + 1] = sum.at(i, j + 1);
    }
}

int query_splits(const Problem& x, bool half) {
  if (!half || x.d < 1 || x.d > MOST_D || x.m < 1) return 0;
  const int64_t blocks = ceil_div(x.n, TILE) * ceil_div(x.d, TILE), tiles = ceil_div(x.m, TILE);
  const int64_t part = ceil_div(tiles, clamp(132 / blocks, 1, ceil_div(tiles, 2)));
  return (int)ceil_div(tiles, part);
}

template <class T>
int32_t run(const smalti_contrastive& c, const Problem& x, const float* rows, const Target<T>& to, void* stream) {
  int rc = 0;
  const Operand<T> k = keys<T>(c, x);
  const int64_t tiles = ceil_div(x.m, TILE), part = ceil_div(tiles, to.splits);
  const Walk<T> w{queries<T>(c), k, operand(k.p, x.d, k.depth_step, k.row_step), x.d, first_label(x, c), tiles, part,
                  (const float*)c.scale, rows, (float*)to.partial};
  auto by_row = walk_keys<T, false>;
  auto by_depth = walk_keys<T, true>;
  auto kernel = x.k_by_depth ? by_depth : by_row;
  const dim3 grid((unsigned)ceil_div(x.n, TILE), (unsigned)to.splits, (unsigned)ceil_div(x.d, TILE));
  const int smem = shared_bytes<T>() + TILE * LD_M * 2;
  LAUNCH(rc, kernel, grid, dim3(THREADS), smem, stream, w);
  auto add = combine<T>;
  if (!rc) LAUNCH_FLAT(rc, add, dim3(grid_for(x.n * x.d, 256)), dim3(256), stream, to);
  return rc;
}

int32_t query_gradient(const smalti_contrastive& c, const Problem& x, const float* rows, const Target<bf16>& to, void* stream) {
  return run(c, x, rows, to, stream);
}
int32_t query_gradient(const smalti_contrastive& c, const Problem& x, const float* rows, const Target<f16>& to, void* stream) {
  return run(c, x, rows, to, stream);
}

}  // namespace contrastive
}  // namespace smalti
