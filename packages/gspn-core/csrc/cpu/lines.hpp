// The arithmetic of one line, as plain loops over contiguous positions that the compiler vectorises.
// A line of state h has one readable zero before its first and one after its last position.
#pragma once

#include <cstdint>

#include "simd.hpp"

namespace {

constexpr int kPad = 16;  // elements before a line of state: one is needed, a vector's worth keeps lines aligned

template <class A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr float kMagic = 0x1.8p23f, kLog2E = 0x1.715476p0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f,
                         kLowest = -87.0f;
  static constexpr int kTerms = 7, kMantissa = 23, kBias = 127;
};
template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr double kMagic = 0x1.8p52, kLog2E = 0x1.71547652b82fep0, kLn2High = 0x1.62e42fefa38p-1,
                          kLn2Low = 0x1.ef35793c7673p-45, kLowest = -700.0;
  static constexpr int kTerms = 13, kMantissa = 52, kBias = 1023;
};

// exp(x) for x <= 80, within about one unit in the last place; below kLowest it stays at exp(kLowest); NaN stays.
// 2^k times the Taylor polynomial of the remainder |r| <= ln(2)/2, Horner form.
template <class A>
GSPN_INLINE A exponential(A x) {
  using K = ExpConstants<A>;
  using Int = typename K::Int;
  x = x < K::kLowest ? K::kLowest : x;
  const A shifted = x * K::kLog2E + K::kMagic;
  const A k = shifted - K::kMagic;
  const A r = (x - k * K::kLn2High) - k * K::kLn2Low;
  A p = 1;
#pragma GCC unroll 16
  for (int term = K::kTerms; term >= 1; --term) p = p * r * (A(1) / A(term)) + A(1);
  const Int exponent = bit_cast<Int>(shifted) - bit_cast<Int>(A(K::kMagic));
  const Int scale = Int(uint64_t(exponent + K::kBias) << K::kMantissa);
  return p * bit_cast<A>(scale);
}

constexpr int kSaturation = -28;  // logits below saturate: three factors 1 + exp(28) still fit a float

template <class A>
GSPN_INLINE A exp_negative(A logit) {
  return exponential<A>(-(logit < A(kSaturation) ? A(kSaturation) : logit));
}

// Equation (stability-context condition), with e_k = exp(-l_k) and sigma_k = 1 / (1 + e_k):
//   w_k = sigma_k / sum_m sigma_m = prod_{m != k} (1 + e_m) / sum_m prod_{k' != m} (1 + e_k')
// one division instead of four. A neighbour that does not exist has no term; b = 1 - a - c is not stored.
template <class A>
GSPN_INLINE void normalise(A la, A lb, A lc, bool has_left, bool has_right, A& a, A& c) {
  const A ea = has_left ? A(1) + exp_negative(la) : A(1), eb = A(1) + exp_negative(lb),
          ec = has_right ? A(1) + exp_negative(lc) : A(1);
  const A na = has_left ? eb * ec : A(0), nb = ea * ec, nc = has_right ? ea * eb : A(0);
  const A inverse = A(1) / (na + nb + nc);
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

// Weights of one line: a, b, c of neighbours j-1, j, j+1; b is null where it is 1 - a - c.
template <class A>
struct Weights {
  const A *a = nullptr, *b = nullptr, *c = nullptr;
};

// h'[j] = sum_k w_k[j] h[j+k] + lam[j] x[j]. Row-stochastic weights use the difference form,
// h' = (h + lam x) + a (h[j-1] - h) + c (h[j+1] - h), which keeps a constant field exactly constant.
template <bool kLam, class A>
void update_line(const A* __restrict h, const Weights<A>& w, const A* __restrict x, const A* __restrict lam,
                 A* __restrict next, int64_t length) {
  const A* __restrict a = w.a;
  const A* __restrict b = w.b;
  const A* __restrict c = w.c;
  if (b == nullptr) {
    for (int64_t j = 0; j < length; ++j) {
      const A input = kLam ? lam[j] * x[j] : x[j];
      next[j] = (h[j] + input) + a[j] * (h[j - 1] - h[j]) + c[j] * (h[j + 1] - h[j]);
    }
  } else {
    for (int64_t j = 0; j < length; ++j) {
      const A input = kLam ? lam[j] * x[j] : x[j];
      next[j] = a[j] * h[j - 1] + b[j] * h[j] + c[j] * h[j + 1] + input;
    }
    // A given weight may be anything, NaN too; beyond the line's ends it has no neighbour to weigh.
    if (length > 0) {
      const int64_t last = length - 1;
      const A first_input = kLam ? lam[0] * x[0] : x[0], last_input = kLam ? lam[last] * x[last] : x[last];
      next[0] = b[0] * h[0] + (last > 0 ? c[0] * h[1] : A(0)) + first_input;
      if (last > 0) next[last] = a[last] * h[last - 1] + b[last] * h[last] + last_input;
    }
  }
}

// The first line of a chunk: h' = lam x, whatever the weights.
template <bool kLam, class A>
void start_line(const A* __restrict x, const A* __restrict lam, A* __restrict next, int64_t length) {
  for (int64_t j = 0; j < length; ++j) next[j] = kLam ? lam[j] * x[j] : x[j];
}

// out = factor * value, or added to out; a null factor is 1.
template <Write kWrite, class A>
void scale_line(const A* __restrict value, const A* __restrict factor, A* __restrict out, int64_t length) {
  if (factor != nullptr) {
    for (int64_t j = 0; j < length; ++j) {
      const A product = factor[j] * value[j];
      out[j] = kWrite == Write::kAdd ? out[j] + product : product;
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
    for (int64_t j = 0; j < length; ++j) g[j] = u[j] * dy[j] + v[j];
  } else {
    for (int64_t j = 0; j < length; ++j) g[j] = dy[j] + v[j];
  }
}

// v[j] = b[j] g[j] + a[j+1] g[j+1] + c[j-1] g[j-1]: what flows to the previous line.
template <class A>
void propagate_adjoint_line(const A* __restrict g, const Weights<A>& w, A* __restrict v, int64_t length) {
  const A* __restrict a = w.a;
  const A* __restrict b = w.b;
  const A* __restrict c = w.c;
  const int64_t last = length - 1;
  const auto own = [&](int64_t j) { return b != nullptr ? b[j] : (A(1) - a[j]) - c[j]; };
  if (length == 0) return;
  if (b == nullptr) {
    for (int64_t j = 1; j < last; ++j) v[j] = ((A(1) - a[j]) - c[j]) * g[j] + a[j + 1] * g[j + 1] + c[j - 1] * g[j - 1];
  } else {
    for (int64_t j = 1; j < last; ++j) v[j] = b[j] * g[j] + a[j + 1] * g[j + 1] + c[j - 1] * g[j - 1];
  }
  v[0] = own(0) * g[0] + (last > 0 ? a[1] * g[1] : A(0));
  if (last > 0) v[last] = own(last) * g[last] + c[last - 1] * g[last - 1];
}

// sum += a b
template <class A>
void accumulate_product_line(const A* __restrict a, const A* __restrict b, A* __restrict sum, int64_t length) {
  for (int64_t j = 0; j < length; ++j) sum[j] += a[j] * b[j];
}

// p += g (h[j-1] - h[j]), q += g (h[j+1] - h[j]); at the ends of the line they meet a weight that is zero.
template <class A>
void accumulate_differences_line(const A* __restrict g, const A* __restrict h, A* __restrict p, A* __restrict q,
                                 int64_t length) {
  for (int64_t j = 0; j < length; ++j) {
    p[j] += g[j] * (h[j - 1] - h[j]);
    q[j] += g[j] * (h[j + 1] - h[j]);
  }
}

// The Jacobian of the normalisation: gradients of the logits from p and q, in place of p (-1), b (0) and q (+1).
//   t = a p + c q;  da = a (1 - sigma_a) (p - t),  db = -b (1 - sigma_b) t,  dc = c (1 - sigma_c) (q - t)
template <class A>
void logit_gradients_line(const A* __restrict la, const A* __restrict lb, const A* __restrict lc, const A* __restrict a,
                          const A* __restrict c, A* __restrict p, A* __restrict db, A* __restrict q, int64_t length) {
  const auto slope = [](A logit) __attribute__((always_inline)) {  // 1 - sigma, and 0 where the logit is saturated
    const A e = exp_negative(logit);
    return logit < A(kSaturation) ? A(0) : e / (A(1) + e);
  };
  for (int64_t j = 0; j < length; ++j) {
    const A t = a[j] * p[j] + c[j] * q[j];
    p[j] = a[j] * slope(la[j]) * (p[j] - t);
    db[j] = -((A(1) - a[j]) - c[j]) * slope(lb[j]) * t;
    q[j] = c[j] * slope(lc[j]) * (q[j] - t);
  }
  if (length == 0) return;
  p[0] = A(0);  // no neighbour there, whatever its logit says
  q[length - 1] = A(0);
}

}  // namespace
