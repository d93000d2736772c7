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

/* softmax(scale q k^T) v. q [B,H,Lq,D], k [B,H,Lk,D], v [B,H,Lk,Dv], out [B,H,Lq,Dv], D and Dv at most 128, any
   strides with an adjacent last axis; lse [B,H,Lq], dense, f32 (f64 for f64). causal: query i sees keys 0..=i. */
int32_t smalti_attention_forward(const smalti_view *q, const smalti_view *k, const smalti_view *v,
                                 const smalti_view *out, const smalti_view *lse, double scale, int32_t causal,
                                 void *stream);

/* ---- window attention ---- */

/* ---- contrastive ---- */

/* ---- optim ---- */

#ifdef __cplusplus
}
#endif
#endif
