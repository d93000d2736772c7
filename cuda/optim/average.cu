// Exponential moving averages of many tensors in a launch.
#include "many.cuh"

namespace smalti {
namespace {

/// p = decay p + (1 - decay) g, with p of T and g of S.
template <class T, class S>
__global__ void __launch_bounds__(kPieceThreads) average(const __grid_constant__ Many<PairEntry> many, const double* decay, double fixed) {
  using A = Acc<T>;
  const double share = decay ? *decay : fixed;
  const A keep = (A)share, take = (A)(1.0 - share);
  const int at = entry_of(many, (int)blockIdx.x);
  const PairEntry& e = many.e[at];
  for_piece<kWidth<S>>(e.n, (int64_t)blockIdx.x - e.first, whole(e), [&](int64_t i, auto width) {
    constexpr int V = decltype(width)::value;
    A p[V], g[V];
    if (sizeof(T) == sizeof(S)) load<T, V>((const T*)e.p + i, p);
    else load_numbers<V>((const A*)e.p + i, p);
    load<S, V>((const S*)e.g + i, g);
    UNROLL for (int j = 0; j < V; j++) p[j] = keep * p[j] + take * g[j];
    if (sizeof(T) == sizeof(S)) store_whole((T*)e.p + i, packed<T, V>(p));
    else store_numbers<V>((A*)e.p + i, p);
  });
}

struct Request {
  const smalti_moving* tensors;
  int64_t count;
  const double* decay;
  double fixed;
  void* stream;

  template <class T, class S> int run(int32_t dtype, int32_t source) const {
    return for_many<PairEntry>(tensors, count, dtype, source, [&](Many<PairEntry>& many) {
      int rc = 0;
      const auto kernel = average<T, S>;
      LAUNCH_FLAT(rc, kernel, dim3((unsigned)many.blocks), dim3(kPieceThreads), stream, many, decay, fixed);
      return rc;
    });
  }
};

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int32_t smalti_average(const smalti_moving* tensors, int64_t count, const double* decay, double fixed, void* stream) {
  for (int64_t i = 0; i < count; i++) {
    const int32_t to = tensors[i].dtype, from = tensors[i].source;
    const bool widens = to == SMALTI_F32 && (from == SMALTI_BF16 || from == SMALTI_F16);
    if (to < SMALTI_F32 || to > SMALTI_F64 || (from != to && !widens)) return kInvalid;
  }
  const Request r{tensors, count, decay, fixed, stream};
  int rc = r.run<float, float>(SMALTI_F32, SMALTI_F32);
  if (!rc) rc = r.run<float, bf16>(SMALTI_F32, SMALTI_BF16);
  if (!rc) rc = r.run<float, f16>(SMALTI_F32, SMALTI_F16);
  if (!rc) rc = r.run<bf16, bf16>(SMALTI_BF16, SMALTI_BF16);
  if (!rc) rc = r.run<f16, f16>(SMALTI_F16, SMALTI_F16);
  if (!rc) rc = r.run<double, double>(SMALTI_F64, SMALTI_F64);
  return rc;
}
