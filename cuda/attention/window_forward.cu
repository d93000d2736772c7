// Attention in windows of an image, or over the whole of it, with decomposed relative positions (ViTDet).
// Windows are addressed in place; tokens beyond the image are the qkv bias and take part as keys.
#include "forward_mma.cuh"
#include "launch.cuh"

namespace smalti {
namespace attention {
namespace {

template <class T, int DP, int REL, int MT, int NT, int SUB, int THREADS, int BLOCKS> int32_t go(Problem p, void* stream) {
  const int warps = warps_for(p.qs.rows(), MT * 16, THREADS / 32);
  const uint32_t blocks = blocks_of(p, p.qs.rows(), warps * MT * 16);
  const ForwardLayout<DP, MT, NT, REL> layout(p.ks, warps);
  if (!blocks || layout.bytes > kMaxSmem) return kInvalid;
  int rc = 0;
  auto kernel = forward_mma<T, DP, MT, NT, SUB, REL, THREADS, BLOCKS>;
  LAUNCH(rc, kernel, dim3(blocks), dim3(warps * 32), layout.bytes, stream, p);
  return rc;
}

template <class T> int32_t run(const Problem& p, void* stream) {
  ATTENTION_WIDTH_REL(p.q.n, DP, {
    if constexpr (DP == 64 || DP == 80) {
      if (p.ks.pitch == 16) return go<T, DP, kRow16, 1, 4, 4, 224, 2>(p, stream);
      if (p.ks.pitch == 64) return go<T, DP, kRow64, 2, 8, 4, 128, 2>(p, stream);
    }
    // of 80 columns, other windows than these are not worth kernels of their own
    return go<T, DP == 80 ? 128 : DP, kShared, 1, 8, 8, 128, 2>(p, stream);
  })
}

}  // namespace
}  // namespace attention
}  // namespace smalti

using namespace smalti;
using namespace smalti::attention;

extern "C" int32_t smalti_window_attention_forward(const smalti_view* q, const smalti_view* k, const smalti_view* v, const smalti_view* bias,
                                                   const smalti_view* rel_h, const smalti_view* rel_w, const smalti_view* out,
                                                   const smalti_view* lse, int64_t win_h, int64_t win_w, double scale, void* stream) {
  Problem p;
  if (!window_problem(p, q, k, v, bias, rel_h, rel_w, out, lse, win_h, win_w, scale)) return kInvalid;
  if (elements(*lse) == 0) return 0;
  const int32_t rc = p.rel_h ? forward_sm90(p, q->dtype, stream) : kElsewhere;
  if (rc != kElsewhere) return rc;
  if (p.rel_h && q->dtype == SMALTI_BF16) return run<bf16>(p, stream);
  if (p.rel_h && q->dtype == SMALTI_F16) return run<f16>(p, stream);
  return forward_any(p, q->dtype, stream);
}
