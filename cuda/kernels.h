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
/* grad and out as out, dq, dk, dv as q, k, v; delta [B,H,Lq] is a workspace like lse. */
int32_t smalti_attention_backward(const smalti_view *q, const smalti_view *k, const smalti_view *v,
                                  const smalti_view *out, const smalti_view *grad, const smalti_view *lse,
                                  const smalti_view *delta, const smalti_view *dq, const smalti_view *dk,
                                  const smalti_view *dv, double scale, int32_t causal, void *stream);

/* ---- window attention ---- */

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

/* ---- optim ---- */

#ifdef __cplusplus
}
#endif
#endif
