// Host side: from views to a Problem, and the choice of an instance.
#pragma once
#include "../common/hopper.cuh"
#include "problem.cuh"

namespace smalti {
namespace attention {

inline int32_t round8(int64_t n) { return (int32_t)((n + 7) / 8 * 8); }
inline bool dense(const smalti_view& v) {
  int64_t step = 1;
  for (int i = v.rank - 1; i >= 0; i--) {
    if (v.shape[i] != 1 && v.stride[i] != step) return false;
    step *= v.shape[i];
  }
  return true;
}
inline bool same(const smalti_view& a, const smalti_view& b) {
  if (a.rank != b.rank) return false;
  for (int i = 0; i < a.rank; i++) if (a.shape[i] != b.shape[i]) return false;
  return true;
}
inline int64_t elements(const smalti_view& v) {
  int64_t n = 1;
  for (int i = 0; i < v.rank; i++) n *= v.shape[i];
  return n;
}
inline int64_t bytes_of(int dtype) { return dtype == SMALTI_F64 ? 8 : dtype == SMALTI_F32 ? 4 : 2; }
/// The dtype that sums are kept in.
inline int sum_dtype(int dtype) { return dtype == SMALTI_F64 ? SMALTI_F64 : SMALTI_F32; }

/// [B, H, L, n] as one row of L tokens, or [B, H, Y, X, n].
inline bool field(Field& f, const smalti_view& v, int rank) {
  if (v.rank != rank || (v.shape[rank - 1] > 1 && v.stride[rank - 1] != 1) || v.shape[rank - 1] > 128) return false;
  f = {};
  f.p = v.ptr; f.b = v.stride[0]; f.h = v.stride[1]; f.x = v.stride[rank - 2]; f.n = (int32_t)v.shape[rank - 1];
  f.y = rank == 5 ? v.stride[2] : 0;
  return true;
}

/// Alignment that 16-byte reads and pair writes need.
inline bool aligned(const Field& f, int64_t bytes, int64_t element) {
  auto fits = [&](int64_t stride) { return stride * element % bytes == 0; };
  return (uintptr_t)f.p % bytes == 0 && fits(f.b) && fits(f.h) && fits(f.y) && fits(f.x) && fits(f.n) &&
         (!f.pad || ((uintptr_t)f.pad % bytes == 0 && fits(f.ph)));
}
inline void note_alignment(Problem& p, int dtype) {
  const int64_t element = bytes_of(dtype);
  p.wide = p.pairs = 1;
  for (const Field* f : {&p.q, &p.k, &p.v, &p.go}) if (f->p && !aligned(*f, 16, element)) p.wide = 0;
  if ((uintptr_t)p.rel_h % 16 || (uintptr_t)p.rel_w % 16) p.wide = 0;
  for (const Field* f : {&p.o, &p.dq, &p.dk, &p.dv}) if (f->p && !aligned(*f, 2 * element, element)) p.pairs = 0;
}

/// Plain attention: [B, H, L, n] each.
inline bool plain_problem(Problem& p, const smalti_view* q, const smalti_view* k, const smalti_view* v, const smalti_view* o,
                          const smalti_view* lse, double scale, int causal) {
  p = {};
  if (!field(p.q, *q, 4) || !field(p.k, *k, 4) || !field(p.v, *v, 4) || !field(p.o, *o, 4) || lse->rank != 3 || !dense(*lse)) return false;
  const int dtype = q->dtype;
  if (k->dtype != dtype || v->dtype != dtype || o->dtype != dtype || lse->dtype != sum_dtype(dtype)) return false;
  const int64_t B = q->shape[0], H = q->shape[1], Lq = q->shape[2], Lk = k->shape[2];
  for (const smalti_view* t : {k, v, o, lse}) if (t->shape[0] != B || t->shape[1] != H) return false;
  if (v->shape[2] != Lk || o->shape[2] != Lq || lse->shape[2] != Lq || p.k.n != p.q.n || p.o.n != p.v.n) return false;
  if (Lk < 1 || Lq > (1 << 30) || Lk > (1 << 30)) return false;
  p.qs = {1, (int32_t)Lq, 1, (int32_t)Lq, round8(Lq)};
  p.ks = {1, (int32_t)Lk, 1, (int32_t)Lk, round8(Lk)};
  if (B > INT32_MAX || H > INT32_MAX) return false;
  p.batch = (int32_t)B; p.heads = (int32_t)H; p.windows_y = p.windows_x = 1;
  p.causal = causal; p.scale = scale; p.lse = lse->ptr;
  note_alignment(p, dtype);
  return true;
}

/// Windows: [B, H, Y, X, D] each; `bias` [3, H, D] or null; tables [2 win - 1, D] or both null.
inline bool window_problem(Problem& p, const smalti_view* q, const smalti_view* k, const smalti_view* v, const smalti_view* bias,
                           const smalti_view* rel_h, const smalti_view* rel_w, const smalti_view* o, const smalti_view* lse,
                           int64_t win_h, int64_t win_w, double scale) {
  p = {};
  if (!field(p.q, *q, 5) || !field(p.k, *k, 5) || !field(p.v, *v, 5) || !field(p.o, *o, 5) || lse->rank != 4 || !dense(*lse)) return false;
  const int dtype = q->dtype;
  if (k->dtype != dtype || v->dtype != dtype || o->dtype != dtype || lse->dtype != sum_dtype(dtype)) return false;
  if (!same(*q, *k) || !same(*q, *v) || !same(*q, *o)) return false;
  for (int i = 0; i < 4; i++) if (lse->shape[i] != q->shape[i]) return false;
  const int64_t B = q->shape[0], H = q->shape[1], Y = q->shape[2], X = q->shape[3], D = q->shape[4];
  if (win_h < 1 || win_w < 1 || win_h > 4096 || win_w > 4096 || B > INT32_MAX || H > INT32_MAX || Y > (1 << 24) || X > (1 << 24)) return false;
  if (bias) {
    if (bias->rank != 3 || bias->dtype != dtype || !dense(*bias) || bias->shape[0] != 3 || bias->shape[1] != H || bias->shape[2] != D) return false;
    const char* at = (const char*)bias->ptr;
    p.k.pad = at + H * D * bytes_of(dtype);
    p.v.pad = at + 2 * H * D * bytes_of(dtype);
    p.k.ph = p.v.ph = D;
  }
  if (!rel_h != !rel_w) return false;
  if (rel_h) {
    for (const smalti_view* t : {rel_h, rel_w}) if (t->rank != 2 || t->dtype != dtype || !dense(*t) || t->shape[1] != D) return false;
    if (rel_h->shape[0] != 2 * win_h - 1 || rel_w->shape[0] != 2 * win_w - 1) return false;
    p.rel_h = rel_h->ptr; p.rel_w = rel_w->ptr;
  }
  p.qs = p.ks = {(int32_t)Y, (int32_t)X, (int32_t)win_h, (int32_t)win_w, round8(win_w)};
  p.batch = (int32_t)B; p.heads = (int32_t)H;
  p.windows_y = (int32_t)((Y + win_h - 1) / win_h); p.windows_x = (int32_t)((X + win_w - 1) / win_w);
  p.scale = scale; p.lse = lse->ptr;
  note_alignment(p, dtype);
  return true;
}

/// Blocks of a launch with `rows` of a window and head in each block; 0: too many.
inline uint32_t blocks_of(Problem& p, int64_t total, int64_t rows) {
  const int64_t tiles = (total + rows - 1) / rows;
  const __int128 n = (__int128)p.batch * p.heads * p.windows_y * p.windows_x * tiles;
  p.tiles = (int32_t)tiles;
  return n > INT32_MAX ? 0 : (uint32_t)n;
}

/// Warps that a block needs for `rows` of `per_warp` each, at most `most`.
inline int warps_of(int64_t rows, int per_warp, int most) {
  const int64_t n = (rows + per_warp - 1) / per_warp;
  return n < most ? (int)n : most;
}

/// The same with the rows shared evenly among blocks.
inline int warps_for(int64_t rows, int per_warp, int most) {
  const int64_t tiles = (rows + per_warp - 1) / per_warp, blocks = (tiles + most - 1) / most;
  return (int)((tiles + blocks - 1) / blocks);
}

/// The pass before all gradients, but for those that make delta themselves (backward.cu).
int32_t delta_any(const Problem& p, int dtype, void* stream);
/// Without tables in the half types, and everything in f32 and f64 (forward.cu, backward.cu).
int32_t forward_any(Problem p, int dtype, void* stream);
int32_t backward_any(Problem& p, int dtype, void* stream);

/// With wgmma (sm90/forward.cu, sm90/backward.cu): the forward; delta and the gradients of queries, then those of keys and
/// values. kElsewhere where that is not for this device or problem.
constexpr int32_t kElsewhere = -1;
#if defined(SMALTI_NO_SM90)
inline int32_t forward_sm90(const Problem&, int, void*) { return kElsewhere; }
template <class T> int32_t queries_sm90(const Problem&, void*) { return kElsewhere; }
template <class T> int32_t keys_sm90(Problem&, void*) { return kElsewhere; }
#else
int32_t forward_sm90(const Problem& p, int dtype, void* stream);
template <class T> int32_t queries_sm90(const Problem& p, void* stream);
template <class T> int32_t keys_sm90(Problem& p, void* stream);
#endif

constexpr int64_t kMaxSmem = 227 * 1024;

}  // namespace attention
}  // namespace smalti

/// Runs the statements with `DP` the smallest instance that holds `n` columns.
#define ATTENTION_WIDTH(n, DP, ...)                                                                          \
  if ((n) <= 32) { constexpr int DP = 32; __VA_ARGS__; }                                                     \
  else if ((n) <= 48) { constexpr int DP = 48; __VA_ARGS__; }                                                \
  else if ((n) <= 64) { constexpr int DP = 64; __VA_ARGS__; }                                                \
  else if ((n) <= 80) { constexpr int DP = 80; __VA_ARGS__; }                                                \
  else if ((n) <= 96) { constexpr int DP = 96; __VA_ARGS__; }                                                \
  else { constexpr int DP = 128; __VA_ARGS__; }
/// The same for the kernels with relative positions.
#define ATTENTION_WIDTH_REL(n, DP, ...)                                                                      \
  if ((n) <= 32) { constexpr int DP = 32; __VA_ARGS__; }                                                     \
  else if ((n) <= 64) { constexpr int DP = 64; __VA_ARGS__; }                                                \
  else if ((n) <= 80) { constexpr int DP = 80; __VA_ARGS__; }                                                \
  else { constexpr int DP = 128; __VA_ARGS__; }
/// Columns padded for the kernels without matrix instructions.
#define ATTENTION_WIDTH_SIMT(n, DP, ...)                                                                     \
  if ((n) <= 32) { constexpr int DP = 32; __VA_ARGS__; }                                                     \
  else if ((n) <= 64) { constexpr int DP = 64; __VA_ARGS__; }                                                \
  else { constexpr int DP = 128; __VA_ARGS__; }
