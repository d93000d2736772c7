// Choice of the wgmma kernels of the gradients.
#include "../launch.cuh"
#include "dkv.cuh"
#include "dq.cuh"

namespace smalti {
namespace attention {
namespace {

/// Whether the tiles of 64 columns and their copies fit; below 49 columns the tiles of dq_mma.cuh and dkv_mma.cuh waste less.
bool fits(const Problem& p) {
  const int widest = p.q.n > p.v.n ? p.q.n : p.v.n;
  return wgmma_here() && p.wide && widest > 48 && widest <= 80;
}

/// Warpgroups of a block.
int groups_of(const Side& s) { return s.rows() > 64 ? 2 : 1; }

template <class T, int DP, int REL> int32_t queries(Problem p, void* stream) {
  const int groups = groups_of(p.qs);
  const QueriesLayout<T, DP, REL> layout(p.ks, groups);
  if (layout.bytes > kMaxSmem) return kElsewhere;
  const uint32_t blocks = blocks_of(p, p.qs.rows(), groups * 64);
  if (!blocks) return kInvalid;
  int rc = 0;
  auto kernel = dq_wgmma<T, DP, REL>;
  LAUNCH(rc, kernel, dim3(blocks), dim3(groups * 128), layout.bytes, stream, p);
  return rc;
}

template <class T, int DP> int32_t queries_of_width(const Problem& p, void* stream) {
  if (!p.rel_h) return queries<T, DP, kNone>(p, stream);
  if ((p.ks.win_h | p.ks.win_w) % 2) return kElsewhere;
  if (p.ks.pitch == 16) return queries<T, DP, kRow16>(p, stream);
  return p.ks.pitch == 64 ? queries<T, DP, kRow64>(p, stream) : kElsewhere;
}

template <class T, int DP, int REL> int32_t keys(Problem& p, void* stream) {
  const int groups = groups_of(p.ks);
  const KeysLayout<T, DP, REL> layout(groups);
  if (layout.bytes > kMaxSmem || (REL != kNone && !KeyTerms<REL>::fits(p.ks, groups * 64))) return kElsewhere;
  const uint32_t blocks = blocks_of(p, p.ks.rows(), groups * 64);
  if (!blocks) return kInvalid;
  p.pad_slots = p.tiles * groups * 4;
  int rc = 0;
  auto kernel = dkv_wgmma<T, DP, REL>;
  LAUNCH(rc, kernel, dim3(blocks), dim3(groups * 128), layout.bytes, stream, p);
  return rc;
}

template <class T, int DP> int32_t keys_of_width(Problem& p, void* stream) {
  if (!p.rel_h) return keys<T, DP, kNone>(p, stream);
  if (p.ks.pitch == 16) return keys<T, DP, kRow16>(p, stream);
  return p.ks.pitch == 64 ? keys<T, DP, kRow64>(p, stream) : kElsewhere;
}

}  // namespace

template <class T> int32_t queries_sm90(const Problem& p, void* stream) {
  if (!fits(p) || !aligned(p.o, 16, sizeof(T))) return kElsewhere;
  return p.q.n <= 64 && p.v.n <= 64 ? queries_of_width<T, 64>(p, stream) : queries_of_width<T, 80>(p, stream);
}

template <class T> int32_t keys_sm90(Problem& p, void* stream) {
  if (!fits(p)) return kElsewhere;
  return p.q.n <= 64 && p.v.n <= 64 ? keys_of_width<T, 64>(p, stream) : keys_of_width<T, 80>(p, stream);
}

template int32_t queries_sm90<bf16>(const Problem&, void*);
template int32_t queries_sm90<f16>(const Problem&, void*);
template int32_t keys_sm90<bf16>(Problem&, void*);
template int32_t keys_sm90<f16>(Problem&, void*);

}  // namespace attention
}  // namespace smalti
