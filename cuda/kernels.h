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

/* ---- reduce ---- */

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
