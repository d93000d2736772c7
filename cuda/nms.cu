// Non-maximum suppression, greedy: boxes in the order of falling scores, each kept unless one that was kept before it
// overlaps it by more than a threshold. What torchvision.ops.nms does; within groups, where they are given.
//
// First every pair is compared, 64 by 64: a word of bits for each box and tile of later boxes. Then one block walks
// the tiles in order: one thread decides within the tile, all threads strike out what its kept boxes overlap. Rows
// come in stripes, so that the words of very many boxes fit into memory.
#include <cmath>
#include "common/exact.cuh"
#include "common/rows.cuh"

namespace smalti {
namespace {

constexpr int kTile = 64;
/// Bytes of words that a stripe may have, and boxes that one block can keep track of.
constexpr int64_t kStripe = 64 << 20, kMost = (int64_t)192 * 1024 * 8;

template <class A> struct Box { A x1, y1, x2, y2; };

#if defined(__CUDA_ARCH__)
DEV double mul_rn(double a, double b) { return __dmul_rn(a, b); }
#else
DEV double mul_rn(double a, double b) {
  const volatile double product = a * b;
  return product;
}
#endif

template <class A> DEV A area(const Box<A>& b) { return mul_rn(b.x2 - b.x1, b.y2 - b.y1); }

/// Rounded as on the CPU (src/ops/nms.rs): a pair at the threshold goes the same way on every device. 0 / 0 is no overlap.
template <class A> DEV bool overlap(const Box<A>& a, const Box<A>& b, A threshold) {
  const A w = (a.x2 < b.x2 ? a.x2 : b.x2) - (a.x1 > b.x1 ? a.x1 : b.x1), h = (a.y2 < b.y2 ? a.y2 : b.y2) - (a.y1 > b.y1 ? a.y1 : b.y1);
  const A both = mul_rn(w > 0 ? w : A(0), h > 0 ? h : A(0));
  return both / (area(a) + area(b) - both) > threshold;
}

/// Words [rows, words] of boxes first .. first + rows: bit j of word w says that the box overlaps later box 64 w + j.
/// Words of tiles before the box's own are left alone.
template <class A>
__global__ void __launch_bounds__(kTile) nms_pairs(const Box<A>* boxes, const int64_t* order, const int64_t* groups, A threshold, int64_t n, int64_t first, int64_t rows, int64_t words, uint64_t* mask) {
  DYN_SMEM(raw);
  Box<A>* others = (Box<A>*)raw;
  int64_t* their = (int64_t*)(others + kTile);
  const int tid = threadIdx.x;
  const int64_t tiles = (rows + kTile - 1) / kTile, jobs = tiles * words;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int64_t down = divide(job, words), across = job - down * words, own = first / kTile + down;
    if (across < own) continue;
    const int64_t other = across * kTile + tid;
    if (other < n) {
      others[tid] = boxes[order[other]];
      if (groups) their[tid] = groups[order[other]];
    }
    __syncthreads();
    const int64_t row = own * kTile + tid;
    if (row < n) {
      const Box<A> mine = boxes[order[row]];
      const int64_t group = groups ? groups[order[row]] : 0;
      const int64_t left = n - across * kTile;
      const int stop = left < kTile ? (int)left : kTile;
      uint64_t bits = 0;
      for (int j = across == own ? tid + 1 : 0; j < stop; j++)
        if ((!groups || their[j] == group) && overlap(mine, others[j], threshold)) bits |= 1ull << j;
      mask[(row - first) * words + across] = bits;
    }
    __syncthreads();
  }
}

/// Goes on with the tiles of a stripe. `struck` [words] and count pass from stripe to stripe.
__global__ void __launch_bounds__(1024) nms_scan(const uint64_t* mask, const int64_t* order, int64_t n, int64_t first, int64_t rows, int64_t words, uint64_t* struck, int64_t* kept, int64_t* count) {
  DYN_SMEM(raw);
  uint64_t* gone = (uint64_t*)raw;
  uint64_t *diagonal = gone + words, *chosen = diagonal + kTile;
  const int tid = threadIdx.x, threads = blockDim.x;
  for (int64_t w = tid; w < words; w += threads) gone[w] = first == 0 ? 0 : struck[w];
  int64_t total = first == 0 ? 0 : *count;
  __syncthreads();
  for (int64_t row = first; row < first + rows; row += kTile) {
    const int64_t tile = row / kTile, left = n - row;
    const int here = left < kTile ? (int)left : kTile;
    const uint64_t* from = mask + (row - first) * words;
    if (tid < here) diagonal[tid] = from[tid * words + tile];
    __syncthreads();
    if (tid == 0) {
      uint64_t dead = gone[tile], keep = 0;
      for (int i = 0; i < here; i++)
        if (!(dead >> i & 1)) {
          keep |= 1ull << i;
          dead |= diagonal[i];
        }
      chosen[0] = keep;
    }
    __syncthreads();
    const uint64_t keep = chosen[0];
    const uint64_t before = keep & ((1ull << (tid & 63)) - 1);
    if (tid < kTile && keep >> tid & 1) kept[total + __popc((uint32_t)before) + __popc((uint32_t)(before >> 32))] = order[row + tid];
    total += __popc((uint32_t)keep) + __popc((uint32_t)(keep >> 32));
    for (int64_t w = tile + 1 + tid; w < words; w += threads) {
      uint64_t bits = gone[w];
      for (int i = 0; i < kTile; i += 8) {
        if (!(keep >> i & 255)) continue;
        // eight loads under way at a time
        UNROLL for (int j = 0; j < 8; j++) bits |= keep >> (i + j) & 1 ? from[(i + j) * words + w] : 0;
      }
      gone[w] = bits;
    }
  }
  __syncthreads();
  for (int64_t w = tid; w < words; w += threads) struck[w] = gone[w];
  if (tid == 0) *count = total;
}

int64_t words_of(int64_t n) { return (n + kTile - 1) / kTile; }
/// Boxes of a stripe.
int64_t stripe_of(int64_t n) {
  const int64_t words = words_of(n), fit = words ? kStripe / (8 * kTile * words) : 1, tiles = fit < 1 ? 1 : fit < words ? fit : words;
  return tiles * kTile;
}

template <class A>
int32_t suppress(const smalti_view& boxes, const int64_t* order, const int64_t* groups, double threshold, int64_t n, int64_t* kept, int64_t* count, uint64_t* workspace, void* stream) {
  // the largest number of the type that is not above: comparing with it is comparing with the threshold
  A limit = (A)threshold;
  if ((double)limit > threshold) limit = (A)std::nextafter(limit, -infinity<A>());
  const int64_t words = words_of(n), stripe = stripe_of(n);
  uint64_t *struck = workspace, *mask = workspace + words;
  const int64_t want = (words + 31) / 32 * 32;
  const unsigned threads = (unsigned)(want < kTile ? kTile : want < 1024 ? want : 1024);
  int rc = 0;
  auto pairs = nms_pairs<A>;
  int64_t first = 0;
  do {
    const int64_t rows = n - first < stripe ? n - first : stripe;
    LAUNCH(rc, pairs, dim3(grid_for(words_of(rows) * words, 1)), dim3(kTile), kTile * (int)(sizeof(Box<A>) + 8), stream,
           (const Box<A>*)boxes.ptr, order, groups, limit, n, first, rows, words, mask);
    if (rc) break;
    LAUNCH(rc, nms_scan, dim3(1), dim3(threads), (int)(8 * (words + kTile + 1)), stream, mask, order, n, first, rows, words, struck, kept, count);
    first += stripe;
  } while (first < n && !rc);
  return rc;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_nms_workspace(int64_t n) {
  return n < 0 || n > kMost ? -1 : 8 * words_of(n) * (1 + stripe_of(n));
}

extern "C" int32_t smalti_nms(const smalti_view* boxes, const smalti_view* order, const smalti_view* groups, double threshold,
                              const smalti_view* kept, const smalti_view* found, void* workspace, void* stream) {
  const int64_t n = order->shape[0];
  if (boxes->rank != 2 || boxes->shape[0] != n || boxes->shape[1] != 4 || !contiguous(*boxes) || n > kMost) return kInvalid;
  if (!is_vector(order, n, SMALTI_I64) || !is_vector_or_null(groups, n, SMALTI_I64) || !is_vector(kept, n, SMALTI_I64) ||
      !is_vector(found, 1, SMALTI_I64))
    return kInvalid;
  DISPATCH_REAL(boxes->dtype, A,
                return suppress<A>(*boxes, (const int64_t*)order->ptr, pointer<const int64_t>(groups), threshold, n,
                                   (int64_t*)kept->ptr, (int64_t*)found->ptr, (uint64_t*)workspace, stream));
  return 0;
}
