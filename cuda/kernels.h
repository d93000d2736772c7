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

/* ---- contrastive ---- */

/* ---- optim ---- */

#ifdef __cplusplus
}
#endif
#endif
