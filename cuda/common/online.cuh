// The softmax of numbers that come one by one (Milakov and Gimelshein, 2018).
#pragma once
#include "rows.cuh"

namespace smalti {

/// A running maximum and the sum of e^(x - maximum). Until there is a maximum the sum is 0, or the NaN of a NaN
/// element, and nothing is taken out: e^(0 - x) could overflow, and -infinity + infinity is NaN.
template <class A> struct Online {
  A max, sum;
  DEV static Online none() { return {-infinity<A>(), A(0)}; }
  /// e^(from - to), by which a sum changes when its maximum does; 1 where there was none.
  DEV static A factor(A from, A to) { return from == -infinity<A>() ? A(1) : exp_of(from - to); }
  DEV void take(A v) {
    if (v > max) {
      sum = sum * factor(max, v) + A(1);
      max = v;
      if (v == infinity<A>()) sum = v - v;  // NaN, as e^(inf - inf) is
    } else {
      sum += exp_of(max == -infinity<A>() ? v : v - max);
    }
  }
  DEV void join(const Online& o) {
    const A m = o.max > max ? o.max : max;
    sum = sum * factor(max, m) + o.sum * factor(o.max, m);
    max = m;
  }
};

}  // namespace smalti
