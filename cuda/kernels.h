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

/* Whether kernels with Hopper's warpgroup instructions (wgmma) are taken where there are some and the device has them:
   1 yes, 0 no, -1 as $SMALTI_WGMMA says (1 or 0; not set: 0, until they have been seen to run on a GPU). */
void smalti_wgmma(int32_t use);

/* ---- elementwise ---- */

/* Functions of one number; p and q are their constants. */
typedef enum {
  SMALTI_EXP, SMALTI_LOG, SMALTI_SQRT, SMALTI_RSQRT, SMALTI_TANH, SMALTI_SIGMOID, SMALTI_RELU, SMALTI_ABS,
  SMALTI_SQUARE, SMALTI_RECIP, SMALTI_ERF, SMALTI_ATAN, SMALTI_SILU, SMALTI_GELU, SMALTI_GELU_TANH,
  SMALTI_GELU_QUICK,
  SMALTI_SOFTPLUS, /* beta, threshold */
  SMALTI_CLAMP,    /* min, max; integers too */
  SMALTI_CUBE,
  SMALTI_POW,      /* exponent */
  SMALTI_AFFINE    /* p * x + q; integers too */
} smalti_unary;
/* y = f(x). Float types, and integers where it says so. */
int32_t smalti_unary_forward(int32_t function, double p, double q, const smalti_view *x, const smalti_view *y, void *stream);
/* dx from dy and what the forward saved (its input or its output, as src/ops/unary.rs has it). */
int32_t smalti_unary_backward(int32_t function, double p, double q, const smalti_view *dy, const smalti_view *saved,
                              const smalti_view *dx, void *stream);

/* Functions of two numbers of one type. */
typedef enum {
  SMALTI_ADD, SMALTI_SUB, SMALTI_MUL, SMALTI_DIV, SMALTI_MAXIMUM, SMALTI_MINIMUM,
  SMALTI_POWER,
  SMALTI_SHARE,    /* 1 where a > b, 1/2 where equal, else 0; 1 beside NaN */
  SMALTI_EQ, SMALTI_NE, SMALTI_LT, SMALTI_LE, SMALTI_GT, SMALTI_GE, /* to bool */
  SMALTI_AND, SMALTI_OR                                             /* of bools */
} smalti_binary_function;
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

enum {
  SMALTI_SUM = 0,       /* divided by `parameter` for floats */
  SMALTI_PROD = 1,
  SMALTI_MAX = 2,       /* NaN counts as largest and smallest; `extra`, if not null: the first one's position, i64 */
  SMALTI_MIN = 3,
  SMALTI_NORM = 4,      /* of order `parameter` */
  SMALTI_LOGSUMEXP = 5,
  SMALTI_VAR = 6,       /* squared distances divided by `parameter`; `extra`, if not null: the mean */
  SMALTI_STD = 7        /* its root */
};
/* Bytes of workspace that the reduction of `x` to `y` needs; -1 where it is refused. */
int64_t smalti_reduce_workspace(int32_t op, const smalti_view *x, const smalti_view *y);
/* Folds `x` over the dimensions in which `y` has size 1. Dtypes: sums f32, bf16, f16, f64, i64, bool; variances floats;
   products and extremes f32, f64, i64; norms and log-sum-exp f32, f64. `y` has the dtype of `x` but for sums of bool
   (i64) and variances (f32 where x is half). `extra` lies as `y` does. */
int32_t smalti_reduce(int32_t op, const smalti_view *x, const smalti_view *y, const smalti_view *extra,
                      double parameter, void *workspace, void *stream);
/* Running sums along `dim`, from the last element on if `back`; f32 (carried in f64), f64, i64. */
int32_t smalti_cumsum(const smalti_view *x, const smalti_view *y, int32_t dim, int32_t back, void *stream);

/* ---- linear: what stands around a product ---- */

/* Elements of workspace, f32 (f64 for f64), that the two below want. */
int64_t smalti_linear_partials(int64_t rows, int64_t columns);
/* y = gelu(product + bias), the exact one. Matrices here are [rows, columns] row-major, vectors dense. */
int32_t smalti_linear_gelu_forward(const smalti_view *product, const smalti_view *bias, const smalti_view *y,
                                   void *stream);
/* dz = grad gelu'(product + bias), and db its column sums. */
int32_t smalti_linear_gelu_backward(const smalti_view *grad, const smalti_view *product, const smalti_view *bias,
                                    const smalti_view *dz, const smalti_view *db, void *partial, void *stream);
/* y = column sums of x. */
int32_t smalti_linear_column_sums(const smalti_view *x, const smalti_view *y, void *partial, void *stream);

/* ---- softmax ---- */

/* y = softmax of x over `dim`, or its logarithm. */
int32_t smalti_softmax_forward(const smalti_view *x, const smalti_view *y, int32_t dim, int32_t log, void *stream);
/* dx from the output y and its gradient. */
int32_t smalti_softmax_backward(const smalti_view *y, const smalti_view *dy, const smalti_view *dx, int32_t dim,
                                int32_t log, void *stream);

/* ---- loss ---- */

/* x [rows, classes], contiguous. target: labels i64 [rows], or probabilities like x. weight [classes] or null. For each
   row: maximum, log of the sum of e^(x - maximum), loss, and weight in the mean. Labels outside give NaN. */
int32_t smalti_cross_entropy_forward(const smalti_view *x, const smalti_view *target, const smalti_view *weight,
                                     const smalti_view *max, const smalti_view *log_sum, const smalti_view *loss,
                                     const smalti_view *share, int64_t ignore, double smoothing, void *stream);
/* Gradients of the logits and of the probabilities; each may be null. grad: one for each row, or one for all, which
   is divided by the number that `divisor` (if not null) points to. */
int32_t smalti_cross_entropy_backward(const smalti_view *x, const smalti_view *target, const smalti_view *weight,
                                      const smalti_view *max, const smalti_view *log_sum, const smalti_view *grad,
                                      const smalti_view *divisor, const smalti_view *dx, const smalti_view *dtarget,
                                      int64_t ignore, double smoothing, void *stream);
/* Negative log-likelihood: for each row its loss and its weight, in f32 where x is half. */
int32_t smalti_nll_forward(const smalti_view *x, const smalti_view *labels, const smalti_view *weight,
                           const smalti_view *loss, const smalti_view *share, int64_t ignore, void *stream);
int32_t smalti_nll_backward(const smalti_view *labels, const smalti_view *weight, const smalti_view *grad,
                            const smalti_view *divisor, const smalti_view *dx, int64_t ignore, void *stream);
/* found [2]: position and value of the first label that is neither ignored nor one of the classes; -1 without one. */
int32_t smalti_wrong_label(const smalti_view *labels, const smalti_view *found, int64_t classes, int64_t ignore,
                           void *stream);

enum {
  SMALTI_MSE = 0,
  SMALTI_L1 = 1,
  SMALTI_SMOOTH_L1 = 2,       /* parameter: beta */
  SMALTI_HUBER = 3,           /* parameter: delta */
  SMALTI_KL_DIV = 4,
  SMALTI_KL_DIV_LOG = 5,      /* targets are logarithms */
  SMALTI_BCE_WITH_LOGITS = 6
};
int64_t smalti_loss_workspace(const smalti_view *x);
/* x and target contiguous, f32 or f64. y: like x, or one number: the sum divided by `divisor`. */
int32_t smalti_loss_forward(int32_t loss, const smalti_view *x, const smalti_view *target, const smalti_view *y,
                            double parameter, double divisor, void *workspace, void *stream);
/* grad: like x, or one number, divided by `divisor`. dx and dtarget may be null. */
int32_t smalti_loss_backward(int32_t loss, const smalti_view *x, const smalti_view *target, const smalti_view *grad,
                             const smalti_view *dx, const smalti_view *dtarget, double parameter, double divisor,
                             void *stream);

/* ---- norm ---- */

/* Rows [rows, n], contiguous. mean and rstd: [rows]; they, weight and bias are f32 where x is half. Without `mean`:
   rms norm. With `residual`: x + residual is stored to `sum` and normalised. weight, bias, residual and sum may be null. */
int32_t smalti_layer_norm_forward(const smalti_view *x, const smalti_view *residual, const smalti_view *weight,
                                  const smalti_view *bias, const smalti_view *y, const smalti_view *sum,
                                  const smalti_view *mean, const smalti_view *rstd, double eps, void *stream);
int64_t smalti_layer_norm_backward_workspace(const smalti_view *x, int32_t affine);
/* dx (plus `pending`, a gradient that waits for it), and dweight and dbias [n]; each may be null. */
int32_t smalti_layer_norm_backward(const smalti_view *x, const smalti_view *dy, const smalti_view *weight,
                                   const smalti_view *mean, const smalti_view *rstd, const smalti_view *pending,
                                   const smalti_view *dx, const smalti_view *dweight, const smalti_view *dbias,
                                   void *workspace, void *stream);

/* The norms of channels take x, y, dy and dx as contiguous memory [images, positions, channels, area], where positions
   (channels-first) or area (channels-last) is 1. y = (x - mean) * rstd * weight + bias, where mean and rstd have a
   number for each channel, or with `groups` > 0 for each group of channels of each image. */
int32_t smalti_channel_norm_forward(const smalti_view *x, const smalti_view *mean, const smalti_view *rstd,
                                    const smalti_view *weight, const smalti_view *bias, const smalti_view *y,
                                    int64_t groups, void *stream);
/* rstd = 1 / sqrt(var + eps); with `running`: mean and variance moved towards the batch's by the share `momentum`,
   the variance times `unbiased`. Vectors of f32 or f64. */
int32_t smalti_batch_norm_statistics(const smalti_view *mean, const smalti_view *var, const smalti_view *rstd,
                                     const smalti_view *running_mean, const smalti_view *running_var,
                                     const smalti_view *new_mean, const smalti_view *new_var, double eps,
                                     double momentum, double unbiased, void *stream);
int64_t smalti_batch_norm_backward_workspace(const smalti_view *x);
/* dweight = sum(dy * xhat), dbias = sum(dy); dx, which may be null, with statistics of the batch or fixed ones. */
int32_t smalti_batch_norm_backward(const smalti_view *x, const smalti_view *dy, const smalti_view *mean,
                                   const smalti_view *rstd, const smalti_view *weight, const smalti_view *dx,
                                   const smalti_view *dweight, const smalti_view *dbias, int32_t batch,
                                   void *workspace, void *stream);
/* mean and rstd: [images, groups]. */
int64_t smalti_group_norm_backward_workspace(const smalti_view *x, int64_t groups);
int32_t smalti_group_norm_backward(const smalti_view *x, const smalti_view *dy, const smalti_view *mean,
                                   const smalti_view *rstd, const smalti_view *weight, const smalti_view *dx,
                                   const smalti_view *dweight, const smalti_view *dbias, int64_t groups,
                                   void *workspace, void *stream);

/* Rows [rows, n], contiguous: y = x / max(|x|_p, eps), norm [rows]. */
int32_t smalti_normalize_forward(const smalti_view *x, const smalti_view *y, const smalti_view *norm, double p,
                                 double eps, void *stream);
int32_t smalti_normalize_backward(const smalti_view *x, const smalti_view *dy, const smalti_view *norm,
                                  const smalti_view *dx, double p, double eps, void *stream);

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

/* Windows of a pooling, (height, width); images are [N, C, H, W] of any strides. `adaptive`: window i of n takes
   floor(i size / n) .. ceil((i + 1) size / n), and kernel, stride, padding and dilation are not looked at. */
typedef struct {
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t divisor; /* of means; 0: the elements of the window with those of the padding, -1: those within the image */
  int32_t adaptive;
} smalti_pool;
/* y and, i32, where in the H x W plane (H W < 2^31) each stands. The first of equal elements; NaN wins. */
int32_t smalti_max_pool_forward(const smalti_view *x, const smalti_view *y, const smalti_view *at, const smalti_pool *pool,
                                void *stream);
int32_t smalti_max_pool_backward(const smalti_view *dy, const smalti_view *at, const smalti_view *dx,
                                 const smalti_pool *pool, void *stream);
/* Without dilation. */
int32_t smalti_avg_pool_forward(const smalti_view *x, const smalti_view *y, const smalti_pool *pool, void *stream);
int32_t smalti_avg_pool_backward(const smalti_view *dy, const smalti_view *dx, const smalti_pool *pool, void *stream);

/* ---- resample: interpolate, grid_sample, point sampling ---- */

typedef enum {
  SMALTI_NEAREST, SMALTI_NEAREST_EXACT, SMALTI_LINEAR, SMALTI_CUBIC, SMALTI_AREA
} smalti_interpolation;
/* One axis of a resizing: `scale` pixels of the input are one of the output. */
typedef struct {
  int64_t input, output; /* below 2^31 */
  double scale;
  int32_t mode, align_corners, antialias;
} smalti_resize;
/* y [N, C, H', W'] from x [N, C, H, W] of any strides, by axes[0] for the height and axes[1] for the width; `back`: y is
   the gradient of the input, x that of the output. Workspaces are aligned to 16 bytes. */
int64_t smalti_interpolate_workspace(const smalti_view *x, const smalti_view *y, const smalti_resize *axes, int32_t back);
int32_t smalti_interpolate(const smalti_view *x, const smalti_view *y, const smalti_resize *axes, int32_t back,
                           void *workspace, void *stream);

typedef enum { SMALTI_PAD_ZEROS, SMALTI_PAD_BORDER, SMALTI_PAD_REFLECTION } smalti_grid_padding;
typedef struct {
  int32_t mode; /* SMALTI_NEAREST (halves to even), SMALTI_LINEAR, SMALTI_CUBIC */
  int32_t padding, align_corners;
} smalti_grid;
/* y [N, C, H', W'] from images x [N, C, H, W] at places grid [N, H', W', 2] (f32, or f64 for f64), all of any strides.
   H W and 16 H' W' are below 2^31. */
int32_t smalti_grid_sample_forward(const smalti_view *x, const smalti_view *grid, const smalti_view *y,
                                   const smalti_grid *options, void *stream);
/* dgrid: like grid. */
int32_t smalti_grid_sample_backward_grid(const smalti_view *x, const smalti_view *grid, const smalti_view *dy,
                                         const smalti_view *dgrid, const smalti_grid *options, void *stream);
/* What the gradient of x needs: places [N, H' W' K] (i32, contiguous) in the H x W plane (H W: outside) of the K = 1, 4
   or 16 pixels that each sample takes, and their weights, of the dtype of the grid. */
int32_t smalti_grid_sample_taps(const smalti_view *grid, int64_t height, int64_t width, const smalti_view *places,
                                const smalti_view *weights, const smalti_grid *options, void *stream);
/* dx from those and the stable argsort `order` of each row of places; starts [N, H W + 1] (i32) is a workspace. */
int32_t smalti_grid_sample_backward_input(const smalti_view *dy, const smalti_view *places, const smalti_view *weights,
                                          const smalti_view *order, const smalti_view *starts, const smalti_view *dx,
                                          void *stream);
/* Contiguous y [N, H, W, 2] = theta [N, 2, 3] applied to (x, y, 1) of each pixel, and the gradient of theta. */
int32_t smalti_affine_grid_forward(const smalti_view *theta, const smalti_view *y, int32_t align_corners, void *stream);
int32_t smalti_affine_grid_backward(const smalti_view *dy, const smalti_view *dtheta, int32_t align_corners, void *stream);

/* ---- unfold ---- */

/* Windows of unfold and fold, (height, width). */
typedef struct {
  int64_t kernel[2], dilation[2], padding[2], stride[2];
} smalti_windows;
/* Columns y [N, C kh kw, L] from images x [N, C, H, W], L positions of the window; y contiguous, x of any strides. */
int32_t smalti_unfold(const smalti_view *x, const smalti_view *y, const smalti_windows *windows, void *stream);
/* Images y [N, C, H, W], contiguous, as sums of columns x [N, C kh kw, L] of any strides. */
int32_t smalti_fold(const smalti_view *x, const smalti_view *y, const smalti_windows *windows, void *stream);

/* ---- detection: ROIAlign, NMS ---- */

/* x [N,C,H,W], boxes [R,5] (image, x1, y1, x2, y2; contiguous, f32 or f64 for f64), y [R,C,h,w]; x and y of any strides.
   samples <= 0: as many as a bin has pixels. Boxes of images that are not there give NaN, and no gradient. */
int32_t smalti_roi_align_forward(const smalti_view *x, const smalti_view *boxes, double scale, int64_t samples,
                                 int32_t aligned, const smalti_view *y, void *stream);
/* Bytes that the backward needs. */
int64_t smalti_roi_align_workspace(int64_t boxes);
int32_t smalti_roi_align_backward(const smalti_view *dy, const smalti_view *boxes, double scale, int64_t samples,
                                  int32_t aligned, const smalti_view *dx, void *workspace, void *stream);
/* Bytes that n boxes need; -1 if they are too many. */
int64_t smalti_nms_workspace(int64_t n);
/* boxes [n,4] (x1, y1, x2, y2; contiguous, f32 or f64), order [n] their indices (i64) by falling score, groups [n] (i64)
   or null. The first found[0] of kept [n] are the indices that are kept, in that order; both i64. */
int32_t smalti_nms(const smalti_view *boxes, const smalti_view *order, const smalti_view *groups, double threshold,
                   const smalti_view *kept, const smalti_view *found, void *workspace, void *stream);

/* ---- attention ---- */

/* softmax(scale q k^T) v. q [B,H,Lq,D], k [B,H,Lk,D], v [B,H,Lk,Dv], out [B,H,Lq,Dv], D and Dv at most 128, any
   strides with an adjacent last axis; lse [B,H,Lq], dense, f32 (f64 for f64). causal: query i sees keys 0..=i. */
int32_t smalti_attention_forward(const smalti_view *q, const smalti_view *k, const smalti_view *v,
                                 const smalti_view *out, const smalti_view *lse, double scale, int32_t causal,
                                 void *stream);
/* grad and out as out, dq, dk, dv as q, k, v; delta [2,B,H,Lq], dense, is a workspace of the dtype of lse. */
int32_t smalti_attention_backward(const smalti_view *q, const smalti_view *k, const smalti_view *v,
                                  const smalti_view *out, const smalti_view *grad, const smalti_view *lse,
                                  const smalti_view *delta, const smalti_view *dq, const smalti_view *dk,
                                  const smalti_view *dv, double scale, int32_t causal, void *stream);

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
/* Attention within windows of win_h x win_w tokens, or with win_h, win_w the whole image over all of it.
   q, k, v, out [B,H,Y,X,D], D at most 128, any strides with an adjacent last axis; lse [B,H,Y,X], dense, f32 (f64
   for f64). Tokens of a window beyond the image are keys all the same: rows 1 and 2 of bias [3,H,D] (null: zeros).
   rel_h [2 win_h - 1, D] and rel_w [2 win_w - 1, D] (or both null) add q . rel_h[y - ky + win_h - 1] +
   q . rel_w[x - kx + win_w - 1] to the logits, with q unscaled. */
int32_t smalti_window_attention_forward(const smalti_view *q, const smalti_view *k, const smalti_view *v,
                                        const smalti_view *bias, const smalti_view *rel_h, const smalti_view *rel_w,
                                        const smalti_view *out, const smalti_view *lse, int64_t win_h, int64_t win_w,
                                        double scale, void *stream);
/* Bytes that the backward needs beside its results; -1 if it does not do this. */
int64_t smalti_window_attention_workspace(const smalti_view *q, int32_t bias, int32_t relative, int64_t win_h,
                                          int64_t win_w);
/* grad as out, dq, dk, dv as q, k, v; dbias, drel_h, drel_w as their inputs, dense, f32 (f64 for f64). */
int32_t smalti_window_attention_backward(const smalti_view *q, const smalti_view *k, const smalti_view *v,
                                         const smalti_view *bias, const smalti_view *rel_h, const smalti_view *rel_w,
                                         const smalti_view *out, const smalti_view *grad, const smalti_view *lse,
                                         void *workspace, const smalti_view *dq, const smalti_view *dk,
                                         const smalti_view *dv, const smalti_view *dbias, const smalti_view *drel_h,
                                         const smalti_view *drel_w, int64_t win_h, int64_t win_w, double scale,
                                         void *stream);

/* ---- contrastive ---- */

/* ---- optim: many tensors in a launch ---- */

/* A tensor and what goes with it, all dense; any of them may be unaligned, n may be 0. */
typedef struct {
  void *p;          /* what is changed: a parameter, a gradient that is clipped, an average */
  const void *g;    /* the gradient of p; for averages what is averaged */
  void *master;     /* f32 copy of a parameter of a half type, else null */
  void *state[3];   /* of the type that the dtype is computed in; as many as the rule has */
  int64_t n;
  int32_t dtype;    /* of p */
  int32_t source;   /* of g; but for averages that of p */
  int64_t row;      /* of `numbers` */
} smalti_moving;

/* How a parameter moves. Numbers that may change from step to step are read from the device, so that a recorded
   launch can be repeated with others: a row of 8 f64 for each tensor, as listed. */
enum {
  SMALTI_SGD = 0,          /* sign, decay, lr */
  SMALTI_MOMENTUM = 1,     /* sign, decay, old, new, ahead (0: none), lr; state: momentum */
  SMALTI_ADAM = 2,         /* b1, b2, eps, sign, keep, decay, lr, root; state: two moments */
  SMALTI_ADAM_MAX = 3,     /* the same; and the largest second moment */
  /* Trust ratios from norms that stay on the device. First, the numbers of SMALTI_MOMENTUM with the trust
     coefficient in place of sign, and 1 or 0 (does it adapt?) as the seventh. */
  SMALTI_LARS = 4,
  SMALTI_LARC = 5,
  SMALTI_LARC_CLIPPED = 6,
  SMALTI_LAMB = 7          /* b1, b2, eps, first, root, decay, lr, adapts; state: two moments */
};
/* Bytes of workspace of a step, aligned to 16; -1 where it is refused. */
int64_t smalti_optim_workspace(int32_t rule, const smalti_moving *tensors, int64_t count);
/* Moves every tensor one step, and master and p in one pass. */
int32_t smalti_optim_step(int32_t rule, const smalti_moving *tensors, int64_t count, const double *numbers,
                          void *workspace, void *stream);

int64_t smalti_grad_norm_workspace(const smalti_moving *tensors, int64_t count);
/* result[0] = (sum |p|^order)^(1/order) over all elements of all p, the largest |p| for infinity;
   result[1] = most / (result[0] + 1e-6). */
int32_t smalti_grad_norm(const smalti_moving *tensors, int64_t count, double order, double most, double *result,
                         void *workspace, void *stream);
/* p *= *factor where that is below 1 or NaN; else nothing is read. */
int32_t smalti_grad_scale(const smalti_moving *tensors, int64_t count, const double *factor, void *stream);
/* p = p cut off at -most and most. */
int32_t smalti_grad_clamp(const smalti_moving *tensors, int64_t count, double most, void *stream);
/* p = decay p + (1 - decay) g, decay = *decay or, where that is null, `fixed`. g of the dtype of p, or half for f32. */
int32_t smalti_average(const smalti_moving *tensors, int64_t count, const double *decay, double fixed, void *stream);

#ifdef __cplusplus
}
#endif
#endif
