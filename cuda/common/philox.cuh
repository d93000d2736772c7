// Philox4x32-10 (Salmon et al., SC 2011): the same words as src/random.rs.
#pragma once
#include "../compat.cuh"

namespace smalti {

struct Words { uint32_t w[4]; };

/// The four words of block `block` of stream `stream` under `seed`.
DEV Words philox(uint64_t seed, uint64_t stream, uint64_t block) {
  uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = (uint32_t)stream, c3 = (uint32_t)(stream >> 32);
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint32_t ah = __umulhi(c0, 0xD2511F53u), al = c0 * 0xD2511F53u;
    const uint32_t bh = __umulhi(c2, 0xCD9E8D57u), bl = c2 * 0xCD9E8D57u;
    c0 = bh ^ c1 ^ k0; c1 = bl; c2 = ah ^ c3 ^ k1; c3 = al;
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

/// A word as a number in [0, 1), 24 bits.
DEV float unit_f32(uint32_t word) { return (float)(word >> 8) * (1.0f / 16777216.0f); }

}  // namespace smalti
