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

enum {
  SMALTI_SUM = 0,       /* divided by `parameter` for floats; whole numbers sum to i64 */
  SMALTI_PROD = 1,      /* whole numbers multiply to i64 */
  SMALTI_MAX = 2,       /* NaN counts as largest and smallest; `extra`, if not null: the first one's position, i64 */
  SMALTI_MIN = 3,
  SMALTI_NORM = 4,      /* of order `parameter` */
  SMALTI_LOGSUMEXP = 5,
  SMALTI_VAR = 6,       /* squared distances divided by `parameter`; `extra`, if not null: the mean */
  SMALTI_STD = 7        /* its root */
};
/* Bytes of workspace that the reduction of `x` to `y` needs; -1 where it is refused. */
int64_t smalti_reduce_workspace(int32_t op, const smalti_view *x, const smalti_view *y);
/* Folds `x` over the dimensions in which `y` has size 1. `y` has the dtype of `x` but for sums and products of
   whole numbers (i64) and for variances (f32 where x is half). `extra` lies as `y` does. */
int32_t smalti_reduce(int32_t op, const smalti_view *x, const smalti_view *y, const smalti_view *extra,
                      double parameter, void *workspace, void *stream);
/* Running sums along `dim`, from the last element on if `back`; f32 (carried in f64), f64, i64. */
int32_t smalti_cumsum(const smalti_view *x, const smalti_view *y, int32_t dim, int32_t back, void *stream);

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

/* ---- contrastive ---- */

/* ---- optim ---- */

#ifdef __cplusplus
}
#endif
#endif
