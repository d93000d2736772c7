// Gradients of plain attention, in three passes without atomics: delta, queries, keys and values.
#include "delta.cuh"
#include "dkv_mma.cuh"
#include "dq_mma.cuh"
#include "simt_backward.cuh"

namespace smalti {
namespace attention {
namespace {

template <class T> int32_t run_simt(Problem& p, void* stream) {
  int rc = run_delta<T>(p, stream);
  if (rc) return rc;
  ATTENTION_WIDTH_SIMT(p.q.n > p.v.n ? p.q.n : p.v.n, DP, {
    auto dq = simt_dq<T, DP>;
    auto dkv = simt_dkv<T, DP>;
    const int64_t bytes = simt_dq_bytes<T, DP>(p);
    uint32_t blocks = blocks_of(p, (int64_t)p.qs.win_h * p.qs.win_w, kSide<T>);
    if (!blocks || bytes > kMaxSmem) return kInvalid;
    LAUNCH(rc, dq, dim3(blocks), dim3(256), bytes, stream, p);
    if (rc) return rc;
    blocks = blocks_of(p, (int64_t)p.ks.win_h * p.ks.win_w, kSide<T>);
    if (!blocks) return kInvalid;
    p.pad_slots = p.tiles;
    LAUNCH(rc, dkv, dim3(blocks), dim3(256), (simt_dkv_bytes<T, DP>()), stream, p);
  })
  return rc;
}

template <class T, int DP> int32_t queries(Problem p, void* stream) {
  constexpr int NT = DP <= 80 ? 8 : 4, THREADS = 128;
  int rc = run_delta<T>(p, stream);
  if (rc) return rc;
  const int warps = warps_of(p.qs.rows(), 16, THREADS / 32);
  const uint32_t blocks = blocks_of(p, p.qs.rows(), warps * 16);
  if (!blocks) return kInvalid;
  const DqLayout<DP, NT, kNone> layout(p.ks, warps);
  auto kernel = dq_mma<T, DP, NT, kNone, THREADS, DP <= 48 ? 4 : 3>;
  LAUNCH(rc, kernel, dim3(blocks), dim3(warps * 32), layout.bytes, stream, p);
  return rc;
}

template <class T, int DP> int32_t keys(Problem& p, void* stream) {
  constexpr int THREADS = 128;
  const int warps = warps_of(p.ks.rows(), 16, THREADS / 32);
  const uint32_t blocks = blocks_of(p, p.ks.rows(), warps * 16);
  if (!blocks) return kInvalid;
  p.pad_slots = p.tiles * warps;
  const DkvLayout<DP> layout(p.ks, warps, false);
  int rc = 0;
  auto kernel = dkv_mma<T, DP, false, THREADS, DP <= 48 ? 4 : DP <= 64 ? 3 : 2>;
  LAUNCH(rc, kernel, dim3(blocks), dim3(warps * 32), layout.bytes, stream, p);
  return rc;
}

template <class T> int32_t run_mma(Problem& p, void* stream) {
  ATTENTION_WIDTH(p.q.n > p.v.n ? p.q.n : p.v.n, DP, {
    int32_t rc = queries_sm90<T>(p, stream);
    if (rc == kElsewhere) rc = queries<T, DP>(p, stream);
    if (!rc) rc = keys_sm90<T>(p, stream);
    return rc == kElsewhere ? keys<T, DP>(p, stream) : rc;
  })
}

}  // namespace

int32_t delta_any(const Problem& p, int dtype, void* stream) {
  DISPATCH_FLOAT(dtype, T, return run_delta<T>(p, stream))
  return kInvalid;
}

int32_t backward_any(Problem& p, int dtype, void* stream) {
  switch (dtype) {
    case SMALTI_BF16: return run_mma<bf16>(p, stream);
    case SMALTI_F16: return run_mma<f16>(p, stream);
    case SMALTI_F32: return run_simt<float>(p, stream);
    case SMALTI_F64: return run_simt<double>(p, stream);
    default: return kInvalid;
  }
}

}  // namespace attention
}  // namespace smalti

using namespace smalti;
using namespace smalti::attention;

extern "C" int32_t smalti_attention_backward(const smalti_view* q, const smalti_view* k, const smalti_view* v, const smalti_view* out,
                                             const smalti_view* grad, const smalti_view* lse, const smalti_view* delta, const smalti_view* dq,
                                             const smalti_view* dk, const smalti_view* dv, double scale, int32_t causal, void* stream) {
  Problem p;
  if (!plain_problem(p, q, k, v, out, lse, scale, causal)) return kInvalid;
  if (!field(p.go, *grad, 4) || !field(p.dq, *dq, 4) || !field(p.dk, *dk, 4) || !field(p.dv, *dv, 4)) return kInvalid;
  if (!same(*grad, *out) || !same(*dq, *q) || !same(*dk, *k) || !same(*dv, *v) || delta->rank != 4 || delta->shape[0] != 2 || !dense(*delta)) return kInvalid;
  for (int i = 0; i < 3; i++) if (delta->shape[i + 1] != lse->shape[i]) return kInvalid;
  for (const smalti_view* t : {grad, dq, dk, dv}) if (t->dtype != q->dtype) return kInvalid;
  if (delta->dtype != lse->dtype) return kInvalid;
  if (elements(*q) == 0 && elements(*dk) == 0) return 0;
  p.delta = delta->ptr;
  p.norm = (char*)delta->ptr + elements(*lse) * bytes_of(delta->dtype);
  note_alignment(p, q->dtype);
  return backward_any(p, q->dtype, stream);
}
