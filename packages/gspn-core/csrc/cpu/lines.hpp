// The arithmetic of one line: plain loops over contiguous positions, which the compiler vectorises, and the recurrence
// itself in vectors of eight lanes.
// No function here reads or writes beyond a line unless its comment says so. Lines shorter than a vector are always in
// scratch memory, which has room for a whole vector.
#pragma once

#include <cstdint>
#include <limits>

#include "plan.hpp"
#include "simd.hpp"

namespace {

template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr float kMagic = 0x1.8p23f, kLog2E = 0x1.715476p0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f,
                         kHighest = 87.0f;
  static constexpr int kTerms = 7, kMantissa = 23, kBias = 127;
};
template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr double kMagic = 0x1.8p52, kLog2E = 0x1.71547652b82fep0, kLn2High = 0x1.62e42fefa38p-1,
                          kLn2Low = 0x1.ef35793c7673p-45, kHighest = 700.0;
  static constexpr int kTerms = 13, kMantissa = 52, kBias = 1023;
};

constexpr int kSaturation = -28;  // logits below are clamped: a product of three factors 1 + exp(28) fits a float

// 1 / term!, with the sign of the term of exp(-s).
template <class A>
constexpr A exp_coefficient(int term) {
  double value = 1;
  for (int i = 1; i <= term; ++i) value /= -i;
  return A(value);
}

// exp(-x) + offset for x clamped to at least kSaturation and at most kHighest, within about one unit in the last place;
// NaN stays. 2^k times the Taylor polynomial of the remainder s = x + k ln(2), |s| <= ln(2)/2, in Horner form.
template <class A>
GSPN_INLINE A exp_negative(A x, A offset) {
  using K = ExpConstants<A>;
  using Int = typename K::Int;
  x = x < A(kSaturation) ? A(kSaturation) : x;
  x = x > K::kHighest ? K::kHighest : x;
  const A shifted = multiply_add(x, -K::kLog2E, K::kMagic);
  const A k = shifted - K::kMagic;
  const A s = multiply_add(k, K::kLn2Low, multiply_add(k, K::kLn2High, x));
  A p = exp_coefficient<A>(K::kTerms);
#pragma GCC unroll 16
  for (int term = K::kTerms - 1; term >= 0; --term) p = multiply_add(p, s, exp_coefficient<A>(term));
  const Int exponent = bit_cast<Int>(shifted) - bit_cast<Int>(A(K::kMagic));
  const Int scale = Int(uint64_t(exponent + K::kBias) << K::kMantissa);
  return multiply_add(p, bit_cast<A>(scale), offset);
}

// The stability-context condition, with e_k = exp(-l_k) and sigma_k = 1 / (1 + e_k):
//   w_k = sigma_k / sum_m sigma_m = prod_{m != k} (1 + e_m) / sum_m prod_{k' != m} (1 + e_k')
// with one division instead of four. A missing neighbour has no term; b = 1 - a - c is not stored.
template <class A>
GSPN_INLINE void normalise(A la, A lb, A lc, bool has_left, bool has_right, A& a, A& c) {
  const A ea = has_left ? exp_negative(la, A(1)) : A(1), eb = exp_negative(lb, A(1)),
          ec = has_right ? exp_negative(lc, A(1)) : A(1);
  const A na = has_left ? eb * ec : A(0), nc = has_right ? ea * eb : A(0);
  const A inverse = A(1) / (multiply_add(ea, ec, na) + nc);
  a = na * inverse;
  c = nc * inverse;
}

template <class A>
void normalise_line(const A* __restrict la, const A* __restrict lb, const A* __restrict lc, A* __restrict a,
                    A* __restrict c, int64_t length) {
  for (int64_t j = 0; j < length; ++j) normalise<A>(la[j], lb[j], lc[j], true, true, a[j], c[j]);
  if (length == 0) return;
  const int64_t last = length - 1;
  normalise<A>(la[0], lb[0], lc[0], false, last > 0, a[0], c[0]);
  normalise<A>(la[last], lb[last], lc[last], last > 0, false, a[last], c[last]);
}

// Weights of one line: a, b, c of neighbours j-1, j, j+1. Row-stochastic weights have b = 1 - a - c, which is not
// stored (null); unconstrained ones, used as the caller passed them, have all three.
template <class A>
struct Weights {
  const A *a = nullptr, *b = nullptr, *c = nullptr;
};

// Default no-op at position j of a line; replaced by a prefetcher.
struct NoPrefetch {
  GSPN_INLINE void operator()(int64_t) const {}
};

// h'[j] = sum_k w_k[j] h[j+k] + lam[j] x[j]. Row-stochastic weights use the difference form,
// h' = (h + lam x) + a (h[j-1] - h) + c (h[j+1] - h), which keeps a constant field exactly constant. Unconstrained
// weights start with the right neighbour, which bands.hpp needs no shuffle for.
template <bool kLam, bool kUnconstrained, class V>
GSPN_INLINE V updated(V a, V b, V c, V left, V h, V right, V x, V lam) {
  if (!kUnconstrained)
    return multiply_add(c, right - h, multiply_add(a, left - h, kLam ? multiply_add(lam, x, h) : h + x));
  return multiply_add(a, left, multiply_add(b, h, multiply_add(c, right, kLam ? lam * x : x)));
}

// The weights of eight positions, which all channels of a group share. Unconstrained weights may be anything, NaN too,
// so those of neighbours beyond the ends of the line are replaced by zero.
template <bool kUnconstrained, class A>
struct LaneWeights {
  Lanes<A> a, b{}, c;

  GSPN_INLINE LaneWeights(const Weights<A>& w, int64_t j, bool first, bool last)
      : a(load8(w.a + j)), c(load8(w.c + j)) {
    if (!kUnconstrained) return;
    b = load8(w.b + j);
    const Lanes<A> zero{};
    if (first) a = __builtin_shufflevector(a, zero, 8, 1, 2, 3, 4, 5, 6, 7);
    if (last) c = __builtin_shufflevector(c, zero, 0, 1, 2, 3, 4, 5, 6, 8);
  }
};

// One line of each of K channels: the previous state h, input x, gate lam, and the new state, which may overwrite x.
template <int K, class A>
struct Lines {
  const A *h[K], *x[K], *lam[K];
  A* next[K];
};

// Lines shorter than a vector. Reads eight positions of each; writes eight of the next state, zero beyond the length.
template <int K, bool kLam, bool kUnconstrained, class A>
void update_short_lines(const Lines<K, A>& lines, const Weights<A>& w, int64_t length) {
  const Lanes<A> position = {0, 1, 2, 3, 4, 5, 6, 7}, beyond{};
  Lanes<A> a = load8(w.a), b{}, c = load8(w.c);
  if (kUnconstrained) {
    a = __builtin_shufflevector(a, beyond, 8, 1, 2, 3, 4, 5, 6, 7);
    b = load8(w.b);
    c = position < A(length - 1) ? c : beyond;
  }
  for (int k = 0; k < K; ++k) {
    const Lanes<A> lam = kLam ? load8(lines.lam[k]) : beyond, h = load8(lines.h[k]);
    const Lanes<A> here = position < A(length) ? h : beyond;
    const Lanes<A> next = updated<kLam, kUnconstrained>(a, b, c, left_of(beyond, here), here, right_of(here, beyond),
                                                        load8(lines.x[k]), lam);
    store8(lines.next[k], position < A(length) ? next : beyond);
  }
}

// Neighbours are shuffled out of the vectors of h at j - 8, j and j + 8. A load of h[j - 1] would overlap two recent
// stores, so it could not be forwarded and would stall until these reach the cache, longer than a short line takes.
template <int K, bool kLam, bool kUnconstrained, class A, class Prefetch>
void update_lines(const Lines<K, A>& lines, const Weights<A>& w, int64_t length, const Prefetch& prefetch) {
  const int64_t last = length - kLanes;
  if (last < 0) return update_short_lines<K, kLam, kUnconstrained>(lines, w, length);
  const Lanes<A> beyond{};
  const auto update = [&](const LaneWeights<kUnconstrained, A>& w8, int k, int64_t j, Lanes<A> left, Lanes<A> h,
                          Lanes<A> right) __attribute__((always_inline)) {
    return updated<kLam, kUnconstrained>(w8.a, w8.b, w8.c, left, h, right, load8(lines.x[k] + j),
                                         kLam ? load8(lines.lam[k] + j) : beyond);
  };
  // If eight does not divide the length, the last eight positions overlap the ones before, and are computed first.
  const bool overlap = length % kLanes != 0;
  Lanes<A> end[K] = {};
  if (overlap) {
    const LaneWeights<kUnconstrained, A> weights(w, last, false, true);
    for (int k = 0; k < K; ++k) {
      const Lanes<A> here = load8(lines.h[k] + last);
      end[k] = update(weights, k, last, load8(lines.h[k] + last - 1), here, right_of(here, beyond));
    }
  }
  Lanes<A> left[K], here[K];
  for (int k = 0; k < K; ++k) left[k] = beyond, here[k] = load8(lines.h[k]);
  int64_t j = 0;
  for (; j + 2 * kLanes <= length; j += kLanes) {
    prefetch(j);
    const LaneWeights<kUnconstrained, A> weights(w, j, j == 0, false);
    for (int k = 0; k < K; ++k) {
      const Lanes<A> right = load8(lines.h[k] + j + kLanes);
      store8(lines.next[k] + j, update(weights, k, j, left_of(left[k], here[k]), here[k], right_of(here[k], right)));
      left[k] = here[k];
      here[k] = right;
    }
  }
  prefetch(j);
  const LaneWeights<kUnconstrained, A> weights(w, j, j == 0, !overlap);
  for (int k = 0; k < K; ++k) {
    const Lanes<A> right = overlap ? beyond + lines.h[k][j + kLanes] : beyond;
    store8(lines.next[k] + j, update(weights, k, j, left_of(left[k], here[k]), here[k], right_of(here[k], right)));
    if (overlap) store8(lines.next[k] + last, end[k]);
  }
}

// Tells whether all values of some lines were finite: sums of their products with zero.
template <class A>
struct FiniteCheck {
  Lanes<A> zeros{};

  GSPN_INLINE void add(const A* h, int64_t length) {
    int64_t j = 0;
    for (; j + kLanes <= length; j += kLanes) zeros += load8(h + j) * A(0);
    if (j == length) return;
    if (length >= kLanes) {
      zeros += load8(h + length - kLanes) * A(0);
    } else {
      for (; j < length; ++j) zeros[j] += h[j] * A(0);
    }
  }
  bool finite() const {
    A sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += zeros[i];
    return sum == A(0);
  }
};

// One position with row-stochastic weights and infinities. The difference form gives NaN beside them, since inf - inf
// is NaN: there the weighted sum decides, whose weights are positive where there is a neighbour. sum is h + lam x.
template <class A>
inline A updated_with_infinities(A a, A c, A left, A h, A right, A input, A sum) {
  const auto weighted = [](A weight, A value) { return weight == A(0) ? A(0) : weight * value; };
  const A value = multiply_add(c, right - h, multiply_add(a, left - h, sum));
  if (value == value) return value;
  const A b = (A(1) - a) - c;  // may be rounded to 0 or below
  return weighted(c, right) + (b <= A(0) ? std::numeric_limits<A>::min() : b) * h + weighted(a, left) + input;
}

// The same as update_lines for row-stochastic weights, with infinities.
template <class A>
void update_line_with_infinities(const A* h, const A* x, const A* lam, A* next, const Weights<A>& w, int64_t length) {
  for (int64_t j = 0; j < length; ++j) {
    const A left = j > 0 ? h[j - 1] : A(0), right = j + 1 < length ? h[j + 1] : A(0);
    const A input = lam != nullptr ? lam[j] * x[j] : x[j],
            sum = lam != nullptr ? multiply_add(lam[j], x[j], h[j]) : h[j] + x[j];
    next[j] = updated_with_infinities(w.a[j], w.c[j], left, h[j], right, input, sum);
  }
}

// The first line of a chunk: h' = lam x, whatever the weights.
template <int K, bool kLam, class A>
void start_lines(const Lines<K, A>& lines, int64_t length) {
  for (int k = 0; k < K; ++k) {
    const A *const x = lines.x[k], *const lam = lines.lam[k];
    A* const next = lines.next[k];
#pragma GCC ivdep
    for (int64_t j = 0; j < length; ++j) next[j] = kLam ? lam[j] * x[j] : x[j];
  }
}

// out = factor * value, or out += factor * value; a null factor is 1.
template <Write kWrite, class A>
void scale_line(const A* __restrict value, const A* __restrict factor, A* __restrict out, int64_t length) {
  if (factor != nullptr) {
    for (int64_t j = 0; j < length; ++j) {
      out[j] = kWrite == Write::kAdd ? multiply_add(factor[j], value[j], out[j]) : factor[j] * value[j];
    }
  } else {
    for (int64_t j = 0; j < length; ++j) out[j] = kWrite == Write::kAdd ? out[j] + value[j] : value[j];
  }
}

// ---- backward

// g = u dy + v
template <class A>
void adjoint_line(const A* __restrict dy, const A* __restrict u, const A* __restrict v, A* __restrict g,
                  int64_t length) {
  if (u != nullptr) {
    for (int64_t j = 0; j < length; ++j) g[j] = multiply_add(u[j], dy[j], v[j]);
  } else {
    for (int64_t j = 0; j < length; ++j) g[j] = dy[j] + v[j];
  }
}

// v[j] = b[j] g[j] + a[j+1] g[j+1] + c[j-1] g[j-1], the gradient that flows to the previous line. Neighbouring products
// are shuffled, as in update_lines.
template <bool kUnconstrained, class A>
void propagate_adjoint_line(const A* g, const Weights<A>& w, A* v, int64_t length) {
  if (length < kLanes) {
    for (int64_t j = 0; j < length; ++j) {
      const A own = kUnconstrained ? w.b[j] : (A(1) - w.a[j]) - w.c[j];
      const A left = j > 0 ? w.c[j - 1] * g[j - 1] : A(0), right = j < length - 1 ? w.a[j + 1] * g[j + 1] : A(0);
      v[j] = own * g[j] + right + left;
    }
    return;
  }
  struct Products {
    Lanes<A> a, own, c;
  };
  const auto products = [&](int64_t j) __attribute__((always_inline)) {
    const Lanes<A> a = load8(w.a + j), c = load8(w.c + j), here = load8(g + j);
    const Lanes<A> own = kUnconstrained ? load8(w.b + j) : (A(1) - a) - c;
    return Products{a * here, own * here, c * here};
  };
  const auto sum = [](Lanes<A> left, const Products& here, Lanes<A> right) __attribute__((always_inline)) {
    return here.own + right_of(here.a, right) + left_of(left, here.c);
  };
  const Lanes<A> beyond{};
  const int64_t last = length - kLanes;
  Lanes<A> left = beyond;
  Products here = products(0);
  int64_t j = 0;
  for (; j + kLanes <= last; j += kLanes) {
    const Products right = products(j + kLanes);
    store8(v + j, sum(left, here, right.a));
    left = here.c;
    here = right;
  }
  if (j == last) {
    store8(v + j, sum(left, here, beyond));
  } else {  // the last eight positions overlap the ones before
    store8(v + j, sum(left, here, beyond + w.a[j + kLanes] * g[j + kLanes]));
    store8(v + last, sum(beyond + w.c[last - 1] * g[last - 1], products(last), beyond));
  }
}

// sum += a b
template <class A>
void accumulate_product_line(const A* __restrict a, const A* __restrict b, A* __restrict sum, int64_t length) {
  for (int64_t j = 0; j < length; ++j) sum[j] = multiply_add(a[j], b[j], sum[j]);
}

// p += g (h[j-1] - h[j]), q += g (h[j+1] - h[j]). Reads h one position before and one after the line; what these add is
// multiplied by a weight of zero later.
template <class A>
void accumulate_differences_line(const A* __restrict g, const A* __restrict h, A* __restrict p, A* __restrict q,
                                 int64_t length) {
  for (int64_t j = 0; j < length; ++j) {
    p[j] = multiply_add(g[j], h[j - 1] - h[j], p[j]);
    q[j] = multiply_add(g[j], h[j + 1] - h[j], q[j]);
  }
}

// The Jacobian of the normalisation: gradients of the logits from p and q, in place of p (-1), b (0) and q (+1).
//   t = a p + c q;  da = a (1 - sigma_a) (p - t),  db = -b (1 - sigma_b) t,  dc = c (1 - sigma_c) (q - t)
template <class A>
void logit_gradients_line(const A* __restrict la, const A* __restrict lb, const A* __restrict lc, const A* __restrict a,
                          const A* __restrict c, A* __restrict p, A* __restrict db, A* __restrict q, int64_t length) {
  const auto slope = [](A logit) __attribute__((always_inline)) {  // 1 - sigma, and 0 where the logit is saturated
    const A e = exp_negative(logit, A(0));
    return logit < A(kSaturation) ? A(0) : e / (A(1) + e);
  };
  for (int64_t j = 0; j < length; ++j) {
    const A t = multiply_add(a[j], p[j], c[j] * q[j]);
    p[j] = a[j] * slope(la[j]) * (p[j] - t);
    db[j] = -((A(1) - a[j]) - c[j]) * slope(lb[j]) * t;
    q[j] = c[j] * slope(lc[j]) * (q[j] - t);
  }
  if (length == 0) return;
  p[0] = A(0);  // no neighbour there, whatever the logit
  q[length - 1] = A(0);
}

}  // namespace
