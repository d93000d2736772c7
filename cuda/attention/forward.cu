// softmax(scale q k^T) v for [B, H, L, D] in any strides: the packed projection is read and written in place.
#include "forward_mma.cuh"
#include "launch.cuh"
#include "simt.cuh"

namespace smalti {
namespace attention {
namespace {

template <class T> int32_t run_simt(Problem p, void* stream) {
  int rc = 0;
  ATTENTION_WIDTH_SIMT(p.q.n > p.v.n ? p.q.n : p.v.n, DP, {
    const uint32_t blocks = blocks_of(p, (int64_t)p.qs.win_h * p.qs.win_w, kSide<T>);
    const int64_t bytes = simt_forward_bytes<T, DP>(p);
    auto kernel = simt_forward<T, DP>;
    if (!blocks || bytes > kMaxSmem) return kInvalid;
    LAUNCH(rc, kernel, dim3(blocks), dim3(256), bytes, stream, p);
  })
  return rc;
}

template <class T> int32_t run_mma(Problem p, void* stream) {
  int rc = 0;
  ATTENTION_WIDTH(p.q.n > p.v.n ? p.q.n : p.v.n, DP, {
    constexpr int MT = 2, NT = DP <= 80 ? 8 : 4;
    const int warps = warps_of(p.qs.rows(), MT * 16, 4);
    const uint32_t blocks = blocks_of(p, p.qs.rows(), warps * MT * 16);
    const ForwardLayout<DP, MT, NT, kNone> layout(p.ks, warps);
    auto kernel = forward_mma<T, DP, MT, NT, NT, kNone, 128, 2>;
    if (!blocks) return kInvalid;
    LAUNCH(rc, kernel, dim3(blocks), dim3(warps * 32), layout.bytes, stream, p);
  })
  return rc;
}

}  // namespace

int32_t forward_any(Problem p, int dtype, void* stream) {
  const int32_t rc = forward_sm90(p, dtype, stream);
  if (rc != kElsewhere) return rc;
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

extern "C" int32_t smalti_attention_forward(const smalti_view* q, const smalti_view* k, const smalti_view* v, const smalti_view* out,
                                            const smalti_view* lse, double scale, int32_t causal, void* stream) {
  Problem p;
  if (!plain_problem(p, q, k, v, out, lse, scale, causal)) return kInvalid;
  if (elements(*lse) == 0) return 0;
  return forward_any(p, q->dtype, stream);
}
