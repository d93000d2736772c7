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

/* Ids are i64 and contiguous; results are contiguous; workspaces are aligned to 16 bytes. */

/* noise [N, L], L <= 1024: ids_keep [N, keep], ids_restore [N, L], mask [N, L] (f32; 1 = removed). */
int32_t smalti_masking_ids(const smalti_view *noise, const smalti_view *ids_keep, const smalti_view *ids_restore, const smalti_view *mask, void *stream);
/* The same with the numbers of Tensor::rand([N, L]) from block `block` of a Philox stream on. */
int32_t smalti_masking_random(uint64_t seed, uint64_t philox_stream, uint64_t block, const smalti_view *ids_keep, const smalti_view *ids_restore, const smalti_view *mask, void *stream);
/* The same from an argsort of the noise, for any L. */
int32_t smalti_masking_invert(const smalti_view *shuffle, const smalti_view *ids_keep, const smalti_view *ids_restore, const smalti_view *mask, void *stream);
/* *flag = 0 if every row of ids [N, L] is a permutation of 0..L. L <= 1,638,400. */
int32_t smalti_masking_check(const smalti_view *ids, int32_t *flag, void *stream);
/* y [N, K, D] = x[n, ids[n, k]] (+ pos[ids[n, k]], where pos [L, D] is not null). x [N, L, D] with dense rows. */
int32_t smalti_gather_tokens(const smalti_view *x, const smalti_view *pos, const smalti_view *ids, const smalti_view *y, void *stream);
/* y [N, len, D]: sums of the x [N, K, D] that ids name. Looks through K ids for each row: for small K. */
int32_t smalti_ungather_tokens(const smalti_view *x, const smalti_view *ids, const smalti_view *y, void *stream);
/* dpos [L, D] from g [N, K, D]. */
int64_t smalti_gather_tokens_pos_workspace(int64_t n, int64_t len, int64_t d, int32_t dtype);
int32_t smalti_gather_tokens_pos_backward(const smalti_view *g, const smalti_view *ids, const smalti_view *dpos, void *workspace, void *stream);
/* y [N, 1 + L, D] from x [N, 1 + K, D], token [D], restore [N, L] (permutations), pos [1 + L, D]. */
int32_t smalti_unshuffle_forward(const smalti_view *x, const smalti_view *token, const smalti_view *restore, const smalti_view *pos, const smalti_view *y, void *stream);
/* dx [N, 1 + keep, D], dtoken [D], dpos [1 + L, D] (each may be null) from g [N, 1 + L, D], read once. */
int64_t smalti_unshuffle_workspace(int64_t n, int64_t length, int64_t d, int32_t dtype, int32_t want_mask, int32_t want_pos);
int32_t smalti_unshuffle_backward(const smalti_view *g, const smalti_view *restore, int64_t keep, const smalti_view *dx, const smalti_view *dtoken, const smalti_view *dpos, void *workspace, void *stream);
/* y [N, L, p p C] or, where ids [N, K] is not null, [N, K, p p C] from images x [N, C, H, W] of any strides; `last`: the
   channel is the fastest of a patch's values, else the slowest. Where scale and shift (host memory, C <= 16 of each)
   are not null, x * scale[c] + shift[c]. Dtypes: the same; u8 to f32, bf16, f16; f32 to bf16, f16. */
int32_t smalti_patchify(const smalti_view *x, const smalti_view *ids, int64_t p, int32_t last, const double *scale, const double *shift, const smalti_view *y, void *stream);
/* Images y [N, C, H, W] from patches x [N, L, p p C]. */
int32_t smalti_unpatchify(const smalti_view *x, int64_t p, int32_t last, const smalti_view *y, void *stream);
/* Loss of masked autoencoders: pred [N, L, p p C] (contiguous) against images [N, C, H, W] (any strides; of the same
   dtype, or f32 or u8 for predictions of 32 or 16 bits), weighted by mask [N, L] (f32, or f64 for f64; contiguous). norm: each target patch by its
   own mean and unbiased variance + eps. workspace (f64): [0] is the sum of the mask afterwards. loss: one f32 (f64 for
   f64). grad (may be null): like pred, for a cotangent of 1. p p C <= 25600. */
int64_t smalti_masked_loss_workspace(int64_t patches);
int32_t smalti_masked_loss(const smalti_view *pred, const smalti_view *images, const smalti_view *mask, int64_t p, int32_t norm, double eps, double *workspace, const smalti_view *loss, const smalti_view *grad, void *stream);

/* ---- pool ---- */

/* ---- resample: interpolate, grid_sample, point sampling ---- */

/* ---- detection: ROIAlign, NMS ---- */

/* ---- attention ---- */

/* ---- window attention ---- */

/* ---- contrastive ---- */

/* ---- optim ---- */

#ifdef __cplusplus
}
#endif
#endif
