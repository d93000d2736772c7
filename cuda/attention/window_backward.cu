// Gradients of attention in windows: of queries, keys, values, of both tables and of the vectors used as padding.
#include "dq_mma.cuh"
#include "launch.cuh"
#include "table.cuh"

namespace smalti {
namespace attention {
namespace {

template <class T, int DP, int REL, int NT, int THREADS, int BLOCKS> int32_t queries(Problem p, void* stream) {
  const int warps = warps_for(p.qs.rows(), 16, THREADS / 32);
  const uint32_t blocks = blocks_of(p, p.qs.rows(), warps * 16);
  const DqLayout<DP, NT, REL> layout(p.ks, warps);
  if (!blocks || layout.bytes > kMaxSmem) return kInvalid;
  int rc = 0;
  auto kernel = dq_mma<T, DP, NT, REL, THREADS, BLOCKS>;
  LAUNCH(rc, kernel, dim3(blocks), dim3(warps * 32), layout.bytes, stream, p);
  return rc;
}

template <class T, int DP> int32_t all_queries(const Problem& p, void* stream) {
  if constexpr (DP == 64 || DP == 80) {
    if (p.ks.pitch == 16) return queries<T, DP, kRow16, 4, 128, 3>(p, stream);
    if (p.ks.pitch == 64) return queries<T, DP, kRow64, 8, 128, 2>(p, stream);
  }
  // of 80 columns, other windows than these are not worth kernels of their own
  return queries<T, DP == 80 ? 128 : DP, kShared, DP < 80 ? 8 : 4, 128, 2>(p, stream);
}

template <class T, int DP> int32_t all_keys(Problem& p, void* stream) {
  constexpr int THREADS = 128;
  const int warps = warps_for(p.ks.rows(), 16, THREADS / 32);
  const uint32_t blocks = blocks_of(p, p.ks.rows(), warps * 16);
  const DkvLayout<DP> layout(p.ks, warps, true);
  if (!blocks || layout.bytes > kMaxSmem) return kInvalid;
  p.pad_slots = p.tiles * warps;
  int rc = 0;
  auto kernel = dkv_mma<T, DP, true, THREADS, DP <= 32 ? 4 : DP <= 64 ? 3 : 2>;
  LAUNCH(rc, kernel, dim3(blocks), dim3(warps * 32), layout.bytes, stream, p);
  return rc;
}

template <class T> int32_t run(Problem& p, int dtype, void* stream) {
  int rc = queries_sm90<T>(p, stream);
  ATTENTION_WIDTH_REL(p.q.n, DP, {
    if (rc == kElsewhere) {
      rc = delta_any(p, dtype, stream);
      if (!rc) rc = all_queries<T, DP>(p, stream);
    }
    if (!rc) rc = keys_sm90<T>(p, stream);
    return rc == kElsewhere ? all_keys<T, DP>(p, stream) : rc;
  })
}

/// Pieces of the workspace, in order, each 256-byte aligned.
struct Workspace {
  int64_t delta, norm, rel, drel, pad, table, bytes;
  Workspace(const Problem& p, int dtype) {
    const int64_t element = bytes_of(sum_dtype(dtype)), rows = (int64_t)p.batch * p.heads * p.qs.img_h * p.qs.img_w;
    const int64_t n = p.rel_h ? p.ks.win_h + p.ks.win_w : 0;
    const int64_t windows = p.k.pad ? (int64_t)p.batch * border_windows(p.ks, p.windows_y, p.windows_x) : 0;
    int64_t at = 0;
    auto piece = [&](int64_t count) { const int64_t here = at; at += (count * element + 255) / 256 * 256; return here; };
    delta = piece(rows);
    norm = piece(rows);
    rel = piece(rows * n);
    drel = piece(rows * n);
    // never more slots than warps of 16 keys, rounded up to whole blocks of up to 7
    pad = piece(windows * p.heads * (p.ks.rows() / 16 + 8) * 2 * p.k.n);
    table = piece(p.rel_h ? (int64_t)kTableBlocks * 2 * n * p.q.n : 0);
    bytes = at;
  }
};

}  // namespace
}  // namespace attention
}  // namespace smalti

using namespace smalti;
using namespace smalti::attention;

extern "C" int64_t smalti_window_attention_workspace(const smalti_view* q, int32_t bias, int32_t relative, int64_t win_h, int64_t win_w) {
  Problem p = {};
  if (q->rank != 5 || !field(p.q, *q, 5) || win_h < 1 || win_w < 1 || win_h > 4096 || win_w > 4096) return -1;
  p.k = p.q;
  p.k.pad = bias ? q : nullptr;
  p.rel_h = relative ? q : nullptr;
  p.batch = (int32_t)q->shape[0]; p.heads = (int32_t)q->shape[1];
  p.qs = p.ks = {(int32_t)q->shape[2], (int32_t)q->shape[3], (int32_t)win_h, (int32_t)win_w, round8(win_w)};
  p.windows_y = (int32_t)((q->shape[2] + win_h - 1) / win_h); p.windows_x = (int32_t)((q->shape[3] + win_w - 1) / win_w);
  return Workspace(p, q->dtype).bytes;
}

extern "C" int32_t smalti_window_attention_backward(const smalti_view* q, const smalti_view* k, const smalti_view* v, const smalti_view* bias,
                                                    const smalti_view* rel_h, const smalti_view* rel_w, const smalti_view* out,
                                                    const smalti_view* grad, const smalti_view* lse, void* workspace, const smalti_view* dq,
                                                    const smalti_view* dk, const smalti_view* dv, const smalti_view* dbias,
                                                    const smalti_view* drel_h, const smalti_view* drel_w, int64_t win_h, int64_t win_w,
                                                    double scale, void* stream) {
  Problem p;
  if (!window_problem(p, q, k, v, bias, rel_h, rel_w, out, lse, win_h, win_w, scale)) return kInvalid;
  if (!field(p.go, *grad, 5) || !field(p.dq, *dq, 5) || !field(p.dk, *dk, 5) || !field(p.dv, *dv, 5)) return kInvalid;
  for (const smalti_view* t : {grad, dq, dk, dv}) if (t->dtype != q->dtype || !same(*t, *q)) return kInvalid;
  if (!bias != !dbias || !rel_h != !drel_h || !rel_w != !drel_w) return kInvalid;
  const int sums = sum_dtype(q->dtype);
  if (dbias && (!same(*dbias, *bias) || !dense(*dbias) || dbias->dtype != sums)) return kInvalid;
  if (rel_h && (!same(*drel_h, *rel_h) || !dense(*drel_h) || drel_h->dtype != sums || !same(*drel_w, *rel_w) || !dense(*drel_w) || drel_w->dtype != sums)) return kInvalid;
  if (elements(*q) == 0) return kInvalid;  // nothing to launch: gradients of tables would stay unwritten
  const Workspace at(p, q->dtype);
  char* base = (char*)workspace;
  p.delta = base + at.delta; p.norm = base + at.norm; p.rel = base + at.rel; p.drel = base + at.drel;
  p.pad_part = bias && border_windows(p.ks, p.windows_y, p.windows_x) ? base + at.pad : nullptr;
  note_alignment(p, q->dtype);
  int32_t rc;
  if (p.rel_h && q->dtype == SMALTI_BF16) rc = run<bf16>(p, q->dtype, stream);
  else if (p.rel_h && q->dtype == SMALTI_F16) rc = run<f16>(p, q->dtype, stream);
  else rc = backward_any(p, q->dtype, stream);
  if (rc) return rc;
  DISPATCH_FLOAT(q->dtype, T, {
    if (p.rel_h) rc = run_tables<T>(p, base + at.table, drel_h->ptr, drel_w->ptr, stream);
    if (!rc && dbias) rc = run_padding<T>(p, dbias->ptr, stream);
  })
  return rc;
}
