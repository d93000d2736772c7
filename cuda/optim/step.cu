// Optimizer steps over many tensors: SGD, Adam, LARS, LAMB.
#include "rules.cuh"

namespace smalti {
namespace {

template <class T, template <class> class Rule>
__global__ void __launch_bounds__(kPieceThreads) optim_step(const __grid_constant__ Many<StepEntry> many, const double* numbers) {
  using R = Rule<Acc<T>>;
  const int at = entry_of(many, (int)blockIdx.x);
  const StepEntry& e = many.e[at];
  const R rule(numbers + (int64_t)e.row * 8);
  for_piece<kGroup<T>>(e.n, (int64_t)blockIdx.x - e.first, whole(e), [&](int64_t i, auto width) {
    constexpr int V = decltype(width)::value;
    Group<T, R, V> group;
    group.load(e, i);
    UNROLL for (int j = 0; j < V; j++)
      group.p[j] = group.at(j, [&](Acc<T> p, Acc<T> g, Acc<T>* s) { return rule.step(p, g, s); });
    group.save_states(e, i);
    group.save_parameter(e, i);
  });
}

/// The first pass of LARS and LAMB: for each piece the sums of squares of the parameter and of what the rule looks at.
template <class T, template <class> class Rule>
__global__ void __launch_bounds__(kPieceThreads) optim_look(const __grid_constant__ Many<StepEntry> many, const double* numbers, double* partial) {
  DYN_SMEM(raw);
  using R = Rule<Acc<T>>;
  const int at = entry_of(many, (int)blockIdx.x);
  const StepEntry& e = many.e[at];
  const R rule(numbers + (int64_t)e.row * 8);
  double sums[2] = {0, 0};
  for_piece<kGroup<T>>(e.n, (int64_t)blockIdx.x - e.first, whole(e), [&](int64_t i, auto width) {
    constexpr int V = decltype(width)::value;
    Group<T, R, V> group;
    group.load(e, i);
    UNROLL for (int j = 0; j < V; j++) {
      const double p = (double)group.p[j];
      const double u = (double)group.at(j, [&](Acc<T> p, Acc<T> g, Acc<T>* s) { return rule.look(p, g, s); });
      sums[0] += p * p;
      sums[1] += u * u;
    }
    group.save_states(e, i);
  });
  for (int k = 0; k < 2; k++) {
    const double sum = block_join(sums[k], (double*)raw, Add());
    if (threadIdx.x == 0) partial[(int64_t)blockIdx.x * 2 + k] = sum;
  }
}

/// From a tensor's norms to the row of numbers that its step goes by. `norms`: of the parameter, of what was looked at.
DEV void settle_lamb(const double* k, const double* norms, double* row) {
  for (int i = 0; i < 8; i++) row[i] = k[i];
  if (k[7] != 0 && norms[0] > 0 && norms[1] > 0) row[6] *= norms[0] / norms[1];
}
DEV void settle_lars(int32_t rule, const double* k, const double* norms, double* row) {
  for (int i = 0; i < 8; i++) row[i] = k[i];
  const double coefficient = k[0], w = norms[0], g = norms[1], lr = k[5];
  double ratio = 1, decay = k[1];
  const bool none = w == 0 || g == 0;
  if (k[6] == 0 || (none && rule != SMALTI_LARS)) {
    decay = 0;
  } else if (rule == SMALTI_LARS) {
    if (!none) ratio = coefficient * w / g;
  } else {
    ratio = coefficient * w / (g + w * decay + 1e-8);
    if (rule == SMALTI_LARC_CLIPPED) ratio = ratio / lr < 1 ? ratio / lr : 1;
  }
  row[0] = ratio;
  row[1] = ratio * decay;
}

/// A block for each tensor.
__global__ void __launch_bounds__(kPieceThreads) optim_settle(const __grid_constant__ Many<StepEntry> many, int32_t rule,
                                                              const double* numbers, const double* partial, double* settled) {
  DYN_SMEM(raw);
  const int tid = (int)threadIdx.x, at = (int)blockIdx.x;
  const int first = many.e[at].first, last = at + 1 < many.count ? many.e[at + 1].first : many.blocks;
  double norms[2];
  for (int k = 0; k < 2; k++) {
    double sum = 0;
    for (int b = first + tid; b < last; b += kPieceThreads) sum += partial[(int64_t)b * 2 + k];
    norms[k] = sqrt(block_join(sum, (double*)raw, Add()));
  }
  if (tid) return;
  const double* k = numbers + (int64_t)many.e[at].row * 8;
  if (rule == SMALTI_LAMB) settle_lamb(k, norms, settled + at * 8);
  else settle_lars(rule, k, norms, settled + at * 8);
}

template <class T, template <class> class Rule> int launch_step(const Many<StepEntry>& many, const double* numbers, void* stream) {
  int rc = 0;
  const auto kernel = optim_step<T, Rule>;
  LAUNCH_FLAT(rc, kernel, dim3((unsigned)many.blocks), dim3(kPieceThreads), stream, many, numbers);
  return rc;
}

/// Norms, ratios, step. One launch of tensors after the other, so they share the workspace.
template <class T, template <class> class Look, template <class> class Rule>
int launch_adaptive(int32_t rule, Many<StepEntry>& many, const double* numbers, double* workspace, void* stream) {
  double *settled = workspace, *partial = workspace + kEntries<StepEntry> * 8;
  int rc = 0;
  const auto look = optim_look<T, Look>;
  LAUNCH(rc, look, dim3((unsigned)many.blocks), dim3(kPieceThreads), kJoinBytes, stream, many, numbers, partial);
  if (!rc) LAUNCH(rc, optim_settle, dim3((unsigned)many.count), dim3(kPieceThreads), kJoinBytes, stream, many, rule, numbers, partial, settled);
  for (int i = 0; i < many.count; i++) many.e[i].row = i;
  return rc ? rc : launch_step<T, Rule>(many, settled, stream);
}

template <class T> int launch(int32_t rule, Many<StepEntry>& many, const double* numbers, double* workspace, void* stream) {
  switch (rule) {
    case SMALTI_SGD: return launch_step<T, PlainRule>(many, numbers, stream);
    case SMALTI_MOMENTUM: return launch_step<T, MomentumRule>(many, numbers, stream);
    case SMALTI_ADAM: return launch_step<T, AdamRule>(many, numbers, stream);
    case SMALTI_ADAM_MAX: return launch_step<T, AdamMaxRule>(many, numbers, stream);
    case SMALTI_LARS: return launch_adaptive<T, LarsLook, MomentumRule>(rule, many, numbers, workspace, stream);
    case SMALTI_LARC:
    case SMALTI_LARC_CLIPPED: return launch_adaptive<T, LarcLook, MomentumRule>(rule, many, numbers, workspace, stream);
    case SMALTI_LAMB: return launch_adaptive<T, LambLook, LambRule>(rule, many, numbers, workspace, stream);
  }
  return kInvalid;
}

/// Has every tensor what the rule needs?
bool complete(int32_t rule, const smalti_moving* tensors, int64_t count) {
  const int states[] = {0, 1, 2, 3, 1, 1, 1, 2};
  if (rule < SMALTI_SGD || rule > SMALTI_LAMB) return false;
  for (int64_t i = 0; i < count; i++) {
    const smalti_moving& t = tensors[i];
    const bool half = t.dtype == SMALTI_BF16 || t.dtype == SMALTI_F16;
    if (t.source != t.dtype || (half && !t.master) || t.row < 0 || t.row > INT32_MAX) return false;
    for (int k = 0; k < states[rule]; k++)
      if (!t.state[k]) return false;
  }
  return true;
}

}  // namespace
}  // namespace smalti

using namespace smalti;

extern "C" int64_t smalti_optim_workspace(int32_t rule, const smalti_moving* tensors, int64_t count) {
  if (!complete(rule, tensors, count)) return -1;
  if (rule < SMALTI_LARS) return 0;
  return (kEntries<StepEntry> * 8 + 2 * blocks_of(tensors, count)) * (int64_t)sizeof(double);
}

extern "C" int32_t smalti_optim_step(int32_t rule, const smalti_moving* tensors, int64_t count, const double* numbers,
                                     void* workspace, void* stream) {
  if (!complete(rule, tensors, count)) return kInvalid;
  return for_dtypes<StepEntry>(tensors, count, [&](auto type, Many<StepEntry>& many) {
    return launch<decltype(type)>(rule, many, numbers, (double*)workspace, stream);
  });
}
