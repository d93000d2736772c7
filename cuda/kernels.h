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

/* Functions of one number; p and q are their constants. */
enum {
  SMALTI_EXP, SMALTI_LOG, SMALTI_SQRT, SMALTI_RSQRT, SMALTI_TANH, SMALTI_SIGMOID, SMALTI_RELU, SMALTI_ABS,
  SMALTI_SQUARE, SMALTI_RECIP, SMALTI_ERF, SMALTI_SILU, SMALTI_GELU, SMALTI_GELU_TANH,
  SMALTI_SOFTPLUS, /* beta, threshold */
  SMALTI_CLAMP,    /* min, max; integers too */
  SMALTI_CUBE,
  SMALTI_POW,      /* exponent */
  SMALTI_AFFINE    /* p * x + q; integers too */
};
/* y = f(x). Float types, and integers where it says so. */
int32_t smalti_unary_forward(int32_t function, double p, double q, const smalti_view *x, const smalti_view *y, void *stream);
/* dx from dy and what the forward saved (its input or its output, as src/ops/unary.rs has it). */
int32_t smalti_unary_backward(int32_t function, double p, double q, const smalti_view *dy, const smalti_view *saved,
                              const smalti_view *dx, void *stream);

/* Functions of two numbers of one type. */
enum {
  SMALTI_ADD, SMALTI_SUB, SMALTI_MUL, SMALTI_DIV, SMALTI_MAXIMUM, SMALTI_MINIMUM,
  SMALTI_POWER,
  SMALTI_SHARE,    /* 1 where a > b, 1/2 where equal, else 0; 1 beside NaN */
  SMALTI_EQ, SMALTI_NE, SMALTI_LT, SMALTI_LE, SMALTI_GT, SMALTI_GE, /* to bool */
  SMALTI_AND, SMALTI_OR                                             /* of bools */
};
/* y = f(a, b); operands of one shape, broadcast by stride 0. */
int32_t smalti_binary(int32_t function, const smalti_view *a, const smalti_view *b, const smalti_view *y, void *stream);
/* y = condition ? a : b. */
int32_t smalti_where(const smalti_view *condition, const smalti_view *a, const smalti_view *b, const smalti_view *y, void *stream);

/* ---- copy ---- */

/* y = x, converted to y's dtype: floats to integers truncate and saturate, anything to bool is != 0. */
int32_t smalti_copy(const smalti_view *x, const smalti_view *y, void *stream);
/* y = value, converted likewise. */
int32_t smalti_fill(double value, const smalti_view *y, void *stream);

/* ---- random ---- */

/* f32 numbers (contiguous, aligned to 16 bytes) of blocks `block` .. of a Philox stream: uniform in [0, 1) or normal. */
int32_t smalti_random(uint64_t seed, uint64_t philox_stream, uint64_t block, int32_t normal, const smalti_view *y, void *stream);
/* y = x * scale where word i of the stream, from block `block` on, is at least threshold, else x * 0. Contiguous. */
int32_t smalti_dropout(const smalti_view *x, uint64_t seed, uint64_t philox_stream, uint64_t block, uint32_t threshold, double scale, const smalti_view *y, void *stream);

/* ---- reduce ---- */

/* ---- softmax ---- */

/* ---- loss ---- */

/* ---- norm ---- */

/* ---- gather: index operations ---- */

/* result[0] = number, in row-major order, of the first index (i64) outside 0..size, or -1; result[1] = that index.
   Whoever reads the result back waits for the stream. */
int64_t smalti_index_check_workspace(void);
int32_t smalti_index_check(const smalti_view *index, int64_t size, int64_t *result, void *stream);
/* The kernels below trust their indices (i64). y is contiguous, all others have any strides; broadcast ones stride 0. */
int32_t smalti_gather(const smalti_view *x, int32_t dim, const smalti_view *index, const smalti_view *y, void *stream);
/* y[index[..]] = src (the last of repeated ones) or += src, in the order of src. Without `order` a thread goes along the
   whole dimension; with the stable argsort of the index along it, a thread takes the elements of one index. */
int32_t smalti_scatter(const smalti_view *y, int32_t dim, const smalti_view *index, const smalti_view *order, const smalti_view *src, void *stream);
int32_t smalti_scatter_add(const smalti_view *y, int32_t dim, const smalti_view *index, const smalti_view *order, const smalti_view *src, void *stream);
int32_t smalti_one_hot(const smalti_view *ids, const smalti_view *y, void *stream);
/* `bits`: the value in the dtype. Operands have the shape of y. */
int32_t smalti_masked_fill(const smalti_view *x, const smalti_view *mask, uint64_t bits, const smalti_view *y, void *stream);
int32_t smalti_triangle(const smalti_view *x, int64_t diagonal, int32_t upper, const smalti_view *y, void *stream);
/* Element 0 of dimension d goes to places[d], 0 <= places[d] < its size. */
int32_t smalti_roll(const smalti_view *x, const int64_t *places, const smalti_view *y, void *stream);
/* x stands at `before` (negative: cropped) in y, the rest of which is the value. */
int32_t smalti_pad_constant(const smalti_view *x, const int64_t *before, uint64_t bits, const smalti_view *y, void *stream);

/* ---- sort ---- */

/* Where the first K elements in order of each line of x [lines, n] stand: index [lines, K] (i64). Both contiguous.
   Stable; NaN is the largest. n < 2^32 for dtypes of up to 4 bytes. The workspace is aligned to 16 bytes. */
int64_t smalti_argsort_workspace(int64_t lines, int64_t n, int64_t k, int32_t dtype);
int32_t smalti_argsort(const smalti_view *x, int32_t descending, const smalti_view *index, void *workspace, void *stream);

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
