// Which forward problems the warpgroup kernels take, and how they are cut.
#include "../../common/hopper.cuh"
#include "../launch.cuh"
#include "forward.cuh"

namespace smalti {
namespace attention {
namespace {

template <class Room, class F> int32_t go(F kernel, Problem p, int groups, int tiles, bool ring, void* stream) {
  const uint32_t blocks = blocks_of(p, p.qs.rows(), tiles * 64);
  const Room room(p.ks, ring, groups);
  if (!blocks || room.bytes > kMaxSmem) return kElsewhere;
  int rc = 0;
  LAUNCH(rc, kernel, dim3(blocks), dim3(groups * 128), room.bytes, stream, p);
  return rc;
}

template <class T, int DP, int N, int REL, int GROUPS, int BLOCKS, int TILES, int STAGES> int32_t whole(const Problem& p, void* stream) {
  auto kernel = forward_whole<T, DP, N, REL, GROUPS, BLOCKS, TILES, STAGES>;
  return go<ForwardRoom<T, DP, N, REL, TILES, STAGES>>(kernel, p, GROUPS, TILES, false, stream);
}
template <class T, int DP, int N, int REL, int GROUPS, int BLOCKS> int32_t ring(const Problem& p, void* stream) {
  auto kernel = forward_ring<T, DP, N, REL, GROUPS, BLOCKS>;
  return go<ForwardRoom<T, DP, N, REL, GROUPS, kStages>>(kernel, p, GROUPS, GROUPS, true, stream);
}

// Groups and blocks of a multiprocessor as shared memory and registers allow: of 80 columns, a tile takes the room of 128.
template <class T, int DP> int32_t plain(const Problem& p, void* stream) {
  constexpr bool narrow = DP == 64;
  const int keys = p.ks.rows();
  if (p.ks.win_h > 1 || p.ks.img_h > 1 || p.ks.img_w != p.ks.win_w) return kElsewhere;  // windows
  if (keys <= 64) return whole<T, DP, 64, kNone, 1, 4, 1, 1>(p, stream);
  if (keys <= 112) return whole<T, DP, 112, kNone, 2, narrow ? 2 : 1, 2, 1>(p, stream);
  if (keys <= 224) return whole<T, DP, 112, kNone, narrow ? 2 : 4, narrow ? 2 : 1, 4, 2>(p, stream);
  return ring<T, DP, 80, kNone, narrow ? 2 : 3, narrow ? 2 : 1>(p, stream);
}

template <class T, int DP> int32_t windows(const Problem& p, void* stream) {
  const Side& s = p.ks;
  if (s.pitch == 16 && s.rows() <= 224) return whole<T, DP, 112, kRow16, 2, DP == 64 ? 2 : 1, 4, 2>(p, stream);
  if (s.pitch == 64 && s.img_h % s.win_h == 0 && s.img_w % s.win_w == 0) return ring<T, DP, 64, kRow64, 3, 1>(p, stream);
  return kElsewhere;
}

template <class T> int32_t width(const Problem& p, void* stream) {
  if (p.q.n == 64 && p.v.n == 64) return p.rel_h ? windows<T, 64>(p, stream) : plain<T, 64>(p, stream);
  if (p.q.n == 80 && p.v.n == 80) return p.rel_h ? windows<T, 80>(p, stream) : plain<T, 80>(p, stream);
  return kElsewhere;
}

}  // namespace

int32_t forward_sm90(const Problem& p, int dtype, void* stream) {
  if (!p.wide || !p.pairs || !wgmma_here()) return kElsewhere;
  for (const Field* f : {&p.q, &p.k, &p.v, &p.o}) if (!near(*f)) return kElsewhere;
  if (!(p.scale > 1e-30)) return kElsewhere;  // maxima are taken before the logits are scaled, minus infinity among them
  if (dtype == SMALTI_BF16) return width<bf16>(p, stream);
  return dtype == SMALTI_F16 ? width<f16>(p, stream) : kElsewhere;
}

}  // namespace attention
}  // namespace smalti
