// What optimizers do to one element: the twins of the rules in src/optim. `k` is the tensor's row of numbers.
#pragma once
#include "many.cuh"

namespace smalti {

/// kStates: numbers that an element keeps; kSaves: does the step change them?
template <class A> struct PlainRule {
  static constexpr int kStates = 0;
  static constexpr bool kSaves = false, kReadsGradient = true;
  A sign, decay, lr;
  DEV explicit PlainRule(const double* k) : sign((A)k[0]), decay((A)k[1]), lr((A)k[2]) {}
  DEV A step(A p, A g, A*) const { return p - lr * (sign * g + decay * p); }
};

template <class A> struct MomentumRule {
  static constexpr int kStates = 1;
  static constexpr bool kSaves = true, kReadsGradient = true;
  A sign, decay, old, fresh, ahead, lr;
  DEV explicit MomentumRule(const double* k)
      : sign((A)k[0]), decay((A)k[1]), old((A)k[2]), fresh((A)k[3]), ahead((A)k[4]), lr((A)k[5]) {}
  DEV A step(A p, A g, A* s) const {
    g = sign * g + decay * p;
    s[0] = old * s[0] + fresh * g;
    return p - lr * (ahead != A(0) ? g + ahead * s[0] : s[0]);
  }
};

/// Adam's moments after one more gradient.
template <class A> struct Moments {
  A b1, b2, c1, c2;
  DEV explicit Moments(const double* k) : b1((A)k[0]), b2((A)k[1]), c1((A)(1.0 - k[0])), c2((A)(1.0 - k[1])) {}
  DEV void take(A g, A* s) const {
    s[0] = b1 * s[0] + c1 * g;
    s[1] = b2 * s[1] + c2 * g * g;
  }
};

template <class A, bool MAX> struct AdamRules {
  static constexpr int kStates = MAX ? 3 : 2;
  static constexpr bool kSaves = true, kReadsGradient = true;
  Moments<A> moments;
  A eps, sign, keep, decay, lr, root;
  DEV explicit AdamRules(const double* k)
      : moments(k), eps((A)k[2]), sign((A)k[3]), keep((A)k[4]), decay((A)k[5]), lr((A)k[6]), root((A)k[7]) {}
  DEV A step(A p, A g, A* s) const {
    moments.take(sign * g + decay * p, s);
    if (MAX) s[kStates - 1] = s[1] > s[kStates - 1] || s[1] != s[1] ? s[1] : s[kStates - 1];
    return p * keep - lr * s[0] / (sqrt_of(s[kStates - 1]) * root + eps);
  }
};
template <class A> using AdamRule = AdamRules<A, false>;
template <class A> using AdamMaxRule = AdamRules<A, true>;

/// LAMB: a first look updates the moments and gives the direction, whose norm decides how far the step then goes.
template <class A> struct LambRule {
  static constexpr int kStates = 2;
  static constexpr bool kSaves = false, kReadsGradient = false;
  Moments<A> moments;
  A eps, first, root, decay, lr;
  DEV explicit LambRule(const double* k)
      : moments(k), eps((A)k[2]), first((A)k[3]), root((A)k[4]), decay((A)k[5]), lr((A)k[6]) {}
  DEV A direction(A p, const A* s) const { return first * s[0] / (sqrt_of(s[1]) * root + eps) + decay * p; }
  DEV A step(A p, A, A* s) const { return p - lr * direction(p, s); }
};
template <class A> struct LambLook {
  static constexpr int kStates = 2;
  static constexpr bool kSaves = true, kReadsGradient = true;
  LambRule<A> rule;
  DEV explicit LambLook(const double* k) : rule(k) {}
  DEV A look(A p, A g, A* s) const {
    rule.moments.take(g, s);
    return rule.direction(p, s);
  }
};

/// LARS looks at the gradient with the decay added, LARC at the plain one.
template <class A, bool DECAYED> struct LarsLooks {
  static constexpr int kStates = 0;
  static constexpr bool kSaves = false, kReadsGradient = true;
  A decay;
  DEV explicit LarsLooks(const double* k) : decay(DECAYED ? (A)k[1] : A(0)) {}
  DEV A look(A p, A g, A*) const { return g + decay * p; }
};
template <class A> using LarsLook = LarsLooks<A, true>;
template <class A> using LarcLook = LarsLooks<A, false>;

/// V neighbours of a tensor: parameters (of the f32 copy where there is one), gradients, states.
template <class T, class R, int V> struct Group {
  using A = Acc<T>;
  static constexpr int N = R::kStates;
  A p[V], g[V], s[N ? N : 1][V];

  DEV void load(const StepEntry& e, int64_t i) {
    if (sizeof(T) == 2) load_numbers<V>((const A*)e.master + i, p);
    else smalti::load<T, V>((const T*)e.p + i, p);
    if (R::kReadsGradient) smalti::load<T, V>((const T*)e.g + i, g);
    UNROLL for (int k = 0; k < N; k++) load_numbers<V>((const A*)e.state[k] + i, s[k]);
  }
  DEV void save_states(const StepEntry& e, int64_t i) const {
    if constexpr (R::kSaves) {
      UNROLL for (int k = 0; k < N; k++) store_numbers<V>((A*)e.state[k] + i, s[k]);
    }
  }
  DEV void save_parameter(const StepEntry& e, int64_t i) const {
    store_whole((T*)e.p + i, packed<T, V>(p));
    if (sizeof(T) == 2) store_numbers<V>((A*)e.master + i, p);
  }
  /// `f(p, g, states)` of the j-th.
  template <class F> DEV A at(int j, const F& f) {
    A own[N ? N : 1];
    UNROLL for (int k = 0; k < N; k++) own[k] = s[k][j];
    const A result = f(p[j], R::kReadsGradient ? g[j] : A(0), own);
    UNROLL for (int k = 0; k < N; k++) s[k][j] = own[k];
    return result;
  }
};

/// Elements that a thread takes at a time: 16 bytes of the parameter.
template <class T> constexpr int kGroup = kWidth<T>;

}  // namespace smalti
