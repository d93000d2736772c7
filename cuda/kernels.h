/* The C ABI of the kernels. Launchers take plain structs and a stream, return 0 or a cudaError_t, never
   allocate, never synchronise. The Rust bindings (src/gpu/bindings.rs) are made from this file by
   scripts/bindings.sh; a test in CI proves that they are current. */
#ifndef SMALTI_KERNELS_H
#define SMALTI_KERNELS_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

enum { SMALTI_MAX_RANK = 8 };

/* Numbering of smalti::DType. */
enum {
  SMALTI_F32 = 0,
  SMALTI_BF16 = 1,
  SMALTI_F16 = 2,
  SMALTI_F64 = 3,
  SMALTI_I64 = 4,
  SMALTI_I32 = 5,
  SMALTI_U8 = 6,
  SMALTI_BOOL = 7
};

/* A strided tensor: `ptr` is element (0, .., 0), strides count elements. */
typedef struct {
  void *ptr;
  int32_t dtype, rank;
  int64_t shape[8], stride[8];
} smalti_view;

/* Text of a status. */
const char *smalti_status(int32_t code);

/* Emulator only: the seed of thread and block schedules (0: round robin, odd: greedy warps, even: random). */
void smalti_emulate_schedule(uint32_t seed);

/* ---- elementwise ---- */

/* ---- copy ---- */

/* ---- random ---- */

/* ---- reduce ---- */

/* ---- softmax ---- */

/* ---- loss ---- */

/* ---- norm ---- */

/* ---- gather: index operations ---- */

/* ---- sort ---- */

/* ---- masking: MAE's masked gather, un-shuffle, masked loss ---- */

/* ---- pool ---- */

/* ---- resample: interpolate, grid_sample, point sampling ---- */

/* ---- detection: ROIAlign, NMS ---- */

/* ---- attention ---- */

/* ---- window attention ---- */

/* ---- contrastive ----
   S = scale q k^T, q [n, d] adjacent along d, k [m, d] adjacent along d or along m, of one float dtype. Row i's
   positive is k[offset + i], or, where `positive` [n, d] (contiguous) is given, a column of its own (InfoNCE).
   `both`: the columns are a second direction (n = m, offset = 0). All numbers are of the type that the dtype is
   computed in; n and m stay below 2^31.
   Nothing of size n * m is held: the forward keeps partial sums, the backward a chunk of dS of at most `budget`
   bytes (0: 256 MiB) and, if it is wanted at all, an eighth of the whole, beside f32 sums of the gradients. */
typedef struct {
  smalti_view q, k, positive; /* positive.ptr may be null */
  const void *scale;          /* one number on the device */
  int64_t offset, budget;
  int32_t both;
} smalti_contrastive;

/* Bytes of workspace of the forward, and of the backward with and without the gradient of k. -1: invalid. */
int64_t smalti_contrastive_forward_workspace(const smalti_contrastive *c);
int64_t smalti_contrastive_backward_workspace(const smalti_contrastive *c, int32_t with_dk);

/* loss [1]; rows [3, n]: logarithm to base 2 of the sum of e^S over the row, probability of everything but the
   positive, q . positive; columns [2, m] the first two down the columns, if `both`; rank [n] or null: keys that are
   more similar than the positive. */
int32_t smalti_contrastive_forward(const smalti_contrastive *c, void *loss, void *rows, void *columns, int64_t *rank,
                                   void *workspace, int64_t bytes, void *stream);

/* grad [1] is the gradient of the loss. dq [n, d], dk [m, d], dpositive [n, d] contiguous, of the inputs' dtype;
   dscale [1]; each may be null. */
int32_t smalti_contrastive_backward(const smalti_contrastive *c, const void *rows, const void *columns,
                                    const void *grad, void *dq, void *dk, void *dpositive, void *dscale,
                                    void *workspace, int64_t bytes, void *stream);

/* ---- optim ---- */

#ifdef __cplusplus
}
#endif
#endif
