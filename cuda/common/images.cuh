// Images [N, C, H, W] of any strides: which element a thread has, so that neighbours have neighbouring memory in both
// orders, and vectors of channels for channels-last ones.
#pragma once
#include "rows.cuh"

namespace smalti {

constexpr int kImageBlock = 256;

template <class T> struct Image {
  T* p;
  int64_t n, c, h, w;  // strides
  HOST_DEV T* at(int64_t in, int64_t ic) const { return p + in * n + ic * c; }
  HOST_DEV T* at(int64_t in, int64_t ic, int64_t y, int64_t x) const { return at(in, ic) + y * h + x * w; }
};
template <class T> inline Image<T> image_of(const smalti_view& v) {
  return {(T*)v.ptr, v.stride[0], v.stride[1], v.stride[2], v.stride[3]};
}

/// Walks [N, C, H, W] in the order of memory, `V` channels at a time (channels-last only).
struct Pixels {
  int64_t channels, height, width, count;  // channels and count: of vectors
  bool last;
  struct At { int64_t n, c, y, x; };  // c: of vectors

  DEV At at(int64_t i) const {
    At a;
    if (last) {
      const int64_t pixel = divide(i, channels), line = divide(pixel, width);
      a.c = i - pixel * channels;
      a.x = pixel - line * width;
      a.n = divide(line, height);
      a.y = line - a.n * height;
    } else {
      const int64_t line = divide(i, width), plane = divide(line, height);
      a.x = i - line * width;
      a.y = line - plane * height;
      a.n = divide(plane, channels);
      a.c = plane - a.n * channels;
    }
    return a;
  }
};

/// Are the channels the innermost in memory?
inline bool channels_last(const smalti_view& v) { return v.stride[1] == 1 && v.shape[1] > 1 && v.shape[2] * v.shape[3] > 1; }
inline Pixels pixels_of(const smalti_view& v, int64_t vector, bool last) {
  Pixels p;
  p.channels = v.shape[1] / vector;
  p.height = v.shape[2];
  p.width = v.shape[3];
  p.count = v.shape[0] * p.channels * p.height * p.width;
  p.last = last;
  return p;
}
inline dim3 pixel_grid(const Pixels& p) { return dim3(grid_for(p.count, kImageBlock)); }

inline bool is_images(const smalti_view* v) { return v && v->rank == 4; }
inline bool same_planes(const smalti_view& a, const smalti_view& b) {
  return a.shape[0] == b.shape[0] && a.shape[1] == b.shape[1];
}
/// May `vector` channels of every pixel be read and written in accesses of up to 16 bytes?
inline bool in_vectors(const smalti_view& v, int64_t vector, int64_t bytes) {
  bool yes = v.stride[1] == 1 && v.shape[1] % vector == 0 && aligned(v.ptr, (size_t)(vector * bytes < 16 ? vector * bytes : 16));
  for (int d = 0; d < 4; d++) yes = yes && (d == 1 || v.shape[d] == 1 || v.stride[d] % vector == 0);
  return yes;
}

/// `V` elements in accesses of up to 16 bytes, as they are.
template <class T, int V> DEV void fetch(const T* p, T (&v)[V]) {
  constexpr int W = V < kWidth<T> ? V : kWidth<T>;
  UNROLL for (int j = 0; j < V; j += W) {
    const Pack<T, W> raw = *reinterpret_cast<const Pack<T, W>*>(p + j);
    UNROLL for (int i = 0; i < W; i++) v[j + i] = raw.v[i];
  }
}
template <class T, int V> DEV void put(T* p, const T (&v)[V]) {
  constexpr int W = V < kWidth<T> ? V : kWidth<T>;
  UNROLL for (int j = 0; j < V; j += W) {
    Pack<T, W> raw;
    UNROLL for (int i = 0; i < W; i++) raw.v[i] = v[j + i];
    store_whole(p + j, raw);
  }
}
/// The same, widened and rounded.
template <class T, int V> DEV void fetch_wide(const T* p, Acc<T> (&v)[V]) {
  T raw[V];
  fetch<T, V>(p, raw);
  UNROLL for (int j = 0; j < V; j++) v[j] = widen(raw[j]);
}
template <class T, int V> DEV void put_narrow(T* p, const Acc<T> (&v)[V]) {
  T raw[V];
  UNROLL for (int j = 0; j < V; j++) raw[j] = narrow<T>(v[j]);
  put<T, V>(p, raw);
}

}  // namespace smalti
