// The arithmetic of a scan: the weights of a position, and one line's step on the positions of a lane. A lane owns P
// neighbouring positions, so that a step needs one shuffle to either side.
#pragma once

#include <type_traits>

#include "device.cuh"

namespace gspn::cuda {

// How a kernel covers its lines:
//   P     positions of a lane              K   lines of a tile
//   CW    channel warps that share the normalised weights of a strip
//   SEG   channels side by side in one warp, for lines much shorter than it
template <class T_, int P_, int K_, int CW_, int SEG_>
struct Config {
  using T = T_;
  using A = Accumulator<T>;
  static constexpr int P = P_, K = K_, CW = CW_, SEG = SEG_;
  static constexpr int kWidth = 32 * P;
  static constexpr int kPitch = kWidth + 4;      // no bank conflicts between lanes that write a column
  static constexpr int kElements = K * P;        // of a tile, per lane
  static constexpr int kShare = kElements / CW;  // of a tile of weights, per lane
  static constexpr int kSegment = kWidth / SEG;  // positions of one channel
  static constexpr int kLanes = 32 / SEG;        // lanes of one channel
  static_assert(kElements % CW == 0 && (CW == 1 || SEG == 1), "weights are shared by whole warps");
};

template <class A, int P>
struct alignas(P * sizeof(A) < 16 ? P * sizeof(A) : 16) Pack {
  A v[P];
};

// P elements as a lane loads them: words, from which elements are taken by one instruction each.
template <class T, int P>
struct Vector {
  using Word = std::conditional_t<P * sizeof(T) % 4 == 0, uint32_t, uint16_t>;
  static constexpr int kPerWord = sizeof(T) < sizeof(Word) ? int(sizeof(Word) / sizeof(T)) : 1;
  static constexpr int kWords = int(P * sizeof(T) / sizeof(Word));
  Word words[kWords];

  Vector() = default;
  __device__ __forceinline__ Vector(Pack<T, P> pack) { memcpy(words, pack.v, sizeof(words)); }
  // From aligned shared memory.
  static __device__ __forceinline__ Vector at(const void* place) {
    const auto loaded = load_shared(static_cast<const Pack<Word, kWords>*>(place));
    Vector vector;
#pragma unroll
    for (int w = 0; w < kWords; ++w) vector.words[w] = loaded.v[w];
    return vector;
  }
  static __device__ __forceinline__ Vector of(Accumulator<T> value) {
    Pack<T, P> pack;
#pragma unroll
    for (int q = 0; q < P; ++q) narrow(value, pack.v[q]);
    return Vector(pack);
  }
  __device__ __forceinline__ Pack<T, P> pack() const {
    Pack<T, P> pack;
    memcpy(pack.v, words, sizeof(words));
    return pack;
  }
  // The n-th four elements.
  __device__ __forceinline__ Vector<T, 4> part(int n) const {
    Vector<T, 4> four;
#pragma unroll
    for (int w = 0; w < four.kWords; ++w) four.words[w] = words[n * four.kWords + w];
    return four;
  }
  // In the accumulation type.
  __device__ __forceinline__ Accumulator<T> operator[](int q) const {
    if constexpr (kPerWord == 2) {
      return widen(Halves<T>{words[q / 2]}, q % 2);
    } else {
      T value;
      memcpy(&value, words + q * int(sizeof(T) / sizeof(Word)), sizeof(value));
      return widen(value);
    }
  }
};

// A vector in the storage type.
template <class T, int P>
__device__ __forceinline__ Pack<T, P> narrowed(const Pack<Accumulator<T>, P>& wide) {
  Pack<T, P> vector;
  if constexpr (sizeof(T) == 2 && P % 2 == 0) {
#pragma unroll
    for (int q = 0; q < P; q += 2) {
      Halves<T> halves;
      narrow(wide.v[q], wide.v[q + 1], halves);
      memcpy(vector.v + q, &halves, sizeof(halves));
    }
  } else {
#pragma unroll
    for (int q = 0; q < P; ++q) narrow(wide.v[q], vector.v[q]);
  }
  return vector;
}

constexpr int kSaturation = -28;  // logits below are clamped: a product of three factors 1 + exp(28) fits a float

// The ternary preserves NaN, fmax would not.
template <class T, class A>
__device__ __forceinline__ A exp_negative(A logit) {
  return exponential<T>(-(logit < A(kSaturation) ? A(kSaturation) : logit));
}

// A value, or 0 if it does not exist. Existence is a bool, or, where no predicate register is left for it, a mask of
// all bits or none.
template <class A>
__device__ __forceinline__ A existing(bool exists, A value) {
  return exists ? value : A(0);
}
__device__ __forceinline__ float existing(unsigned mask, float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof(bits));
  bits &= mask;
  memcpy(&value, &bits, sizeof(bits));
  return value;
}

// The stability-context condition with e_k = exp(-l_k): sigma_k / sum = prod_{m != k} (1 + e_m) / sum of such products.
// Numerators of the weights of both neighbours, and the inverse of the sum of all three.
template <class T, class A, class Existence>
__device__ __forceinline__ void numerators(A la, A lb, A lc, Existence has_left, Existence has_right, A& na, A& nc,
                                           A& inverse) {
  const A ea = A(1) + existing(has_left, exp_negative<T>(la)), eb = A(1) + exp_negative<T>(lb);
  const A ec = A(1) + existing(has_right, exp_negative<T>(lc));
  na = existing(has_left, eb * ec), nc = existing(has_right, ea * eb);
  inverse = reciprocal<T>(na + ea * ec + nc);
}

template <class T, class A, class Existence>
__device__ __forceinline__ void normalise(A la, A lb, A lc, Existence has_left, Existence has_right, A& a, A& c) {
  A na, nc, inverse;
  numerators<T>(la, lb, lc, has_left, has_right, na, nc, inverse);
  a = na * inverse;
  c = nc * inverse;
}

// The weights of a position from logits, or from weights of a call that does not normalise; b is of the latter.
template <class T, bool kStochastic, class A, class Existence>
__device__ __forceinline__ void prepare_weights(A la, A lb, A lc, Existence has_left, Existence has_right, A& a, A& b,
                                                A& c) {
  if (kStochastic)
    normalise<T>(la, lb, lc, has_left, has_right, a, c);
  else
    a = existing(has_left, la), b = lb, c = existing(has_right, lc);
}

// 1 - sigma, and 0 where the logit is saturated.
template <class T, class A>
__device__ __forceinline__ A slope(A logit) {
  const A e = exp_negative<T>(logit);
  return logit < A(kSaturation) ? A(0) : e * reciprocal<T>(A(1) + e);
}

// Of row-stochastic weights; a weight of zero stands for a neighbour that does not exist.
template <class A>
__device__ __forceinline__ A weighted_sum(A a, A c, A left, A own, A right) {
  const A b = (A(1) - a) - c;  // may be rounded to 0 or below
  A sum = (b > A(0) ? b : b == b ? A(1e-30) : b) * own;
  if (a != A(0)) sum += a * left;
  if (c != A(0)) sum += c * right;
  return sum;
}

// A lane's part of a line: its weights, of which b is of weights that are not row-stochastic, and the gated input.
template <class C>
struct LineOf {
  typename C::A a[C::P], b[C::P], c[C::P], f[C::P];
};

// h'[j] = sum_k w_k[j] h[j+k] + f[j] on the lane's positions. Row-stochastic weights use the difference form,
// h' = (h + f) + a (h[j-1] - h) + c (h[j+1] - h), which keeps a constant field exactly constant. Beside an
// infinity it gives NaN, since inf - inf is NaN: there the weighted sum decides. A chunk starts from f alone, whatever
// the weights. from_left and from_right are the states beside the lane's positions.
// kSelects: whether that is chosen for every position, which takes fewer registers than a branch.
template <class C, bool kSelects = false>
__device__ __forceinline__ void advance_between(typename C::A (&h)[C::P], const LineOf<C>& line,
                                                typename C::A from_left, typename C::A from_right, bool stochastic,
                                                bool starts_chunk) {
  using A = typename C::A;
  constexpr int P = C::P;
  A next[P];
  const auto left = [&](int q) { return q > 0 ? h[q > 0 ? q - 1 : 0] : from_left; };
  const auto right = [&](int q) { return q < P - 1 ? h[q < P - 1 ? q + 1 : 0] : from_right; };
  if (stochastic) {
    A probe = h[0];  // a sum, which is not finite if a state is not
#pragma unroll
    for (int q = 1; q < P; ++q) probe += h[q];
    const bool careful = (!kSelects && starts_chunk) || !(probe - probe == A(0));
#pragma unroll
    for (int q = 0; q < P; ++q) {
      next[q] = (h[q] + line.f[q]) + line.a[q] * (left(q) - h[q]) + line.c[q] * (right(q) - h[q]);
      if (kSelects && careful && next[q] != next[q])
        next[q] = weighted_sum(line.a[q], line.c[q], left(q), h[q], right(q)) + line.f[q];
    }
    if (!kSelects && careful) {
#pragma unroll
      for (int q = 0; q < P; ++q) {
        if (starts_chunk)
          next[q] = line.f[q];
        else if (next[q] != next[q])
          next[q] = weighted_sum(line.a[q], line.c[q], left(q), h[q], right(q)) + line.f[q];
      }
    }
  } else {
#pragma unroll
    for (int q = 0; q < P; ++q) next[q] = line.a[q] * left(q) + line.b[q] * h[q] + line.c[q] * right(q) + line.f[q];
    if (!kSelects && starts_chunk) {
#pragma unroll
      for (int q = 0; q < P; ++q) next[q] = line.f[q];
    }
  }
#pragma unroll
  for (int q = 0; q < P; ++q) h[q] = kSelects && starts_chunk ? line.f[q] : next[q];
}

// The same with the states of the lanes beside. Without positions to its left or right, a lane gets 0 from there.
template <class C, bool kSelects = false, class Existence = bool>
__device__ __forceinline__ void advance(typename C::A (&h)[C::P], const LineOf<C>& line, bool stochastic,
                                        bool starts_chunk, Existence left_exists = true,
                                        Existence right_exists = true) {
  using A = typename C::A;
  const A from_left = existing(left_exists, from_lower_lane<C::kLanes>(h[C::P - 1]));
  const A from_right = existing(right_exists, from_upper_lane<C::kLanes>(h[0]));
  advance_between<C, kSelects>(h, line, from_left, from_right, stochastic, starts_chunk);
}

// What a position takes from a line: numerators of the weights of its neighbours, the inverse of the sum of all three,
// and the input with its gate. For weights that have been normalised the inverse is 1.
template <class A>
struct Point {
  A na, nc, inverse, x, lam;
};
template <class A>
struct NormalPoint : Point<A> {
  __device__ __forceinline__ NormalPoint(A a, A c, A x, A lam) : Point<A>{a, c, A(1), x, lam} {}
};

// h + lam x + a (left - h) + c (right - h)
template <class A>
__device__ __forceinline__ A step(const Point<A>& point, A h, A to_left, A to_right) {
  return (h + point.lam * point.x) + point.inverse * (point.na * to_left + point.nc * to_right);
}
template <class A>
__device__ __forceinline__ A step(const NormalPoint<A>& point, A h, A to_left, A to_right) {
  return (h + point.lam * point.x) + point.na * to_left + point.nc * to_right;
}

// A few lines on the positions of a lane, with row-stochastic weights. read(m, q) returns what position q takes from
// line m. Bit m of `starts` says that a chunk starts with line m. The state after each line goes to `states`. Lines are
// first computed as if all states were finite. What is not finite stays so, so that the last line tells; if there is
// such a state in the warp, the lines are computed again with care.
template <class C, int kLines, class Read, class Existence>
__device__ __forceinline__ void scan_lines(typename C::A (&h)[C::P], const Read& read, Existence left, Existence right,
                                           bool in, unsigned starts, typename C::A (&states)[kLines][C::P]) {
  using A = typename C::A;
  constexpr int P = C::P;
  if (starts == 0) {
    A s[P];
#pragma unroll
    for (int q = 0; q < P; ++q) s[q] = h[q];
#pragma unroll
    for (int m = 0; m < kLines; ++m) {
      const A from_left = existing(left, from_lower_lane<C::kLanes>(s[P - 1]));
      const A from_right = existing(right, from_upper_lane<C::kLanes>(s[0]));
#pragma unroll
      for (int q = 0; q < P; ++q) {
        const auto point = read(m, q);
        const A to_left = (q > 0 ? s[q > 0 ? q - 1 : 0] : from_left) - s[q];
        const A to_right = (q < P - 1 ? s[q < P - 1 ? q + 1 : 0] : from_right) - s[q];
        states[m][q] = step(point, s[q], to_left, to_right);
      }
#pragma unroll
      for (int q = 0; q < P; ++q) s[q] = states[m][q];
    }
    A probe = s[0];  // a sum, which is not finite if a state is not
#pragma unroll
    for (int q = 1; q < P; ++q) probe += s[q];
    if (!any_lane(in && !(probe - probe == A(0)))) {
#pragma unroll
      for (int q = 0; q < P; ++q) h[q] = s[q];
      return;
    }
  }
#pragma unroll
  for (int m = 0; m < kLines; ++m) {
    LineOf<C> line;
#pragma unroll
    for (int q = 0; q < P; ++q) {
      const auto point = read(m, q);
      line.a[q] = point.na * point.inverse, line.c[q] = point.nc * point.inverse;
      line.f[q] = point.lam * point.x;
    }
    advance<C>(h, line, true, (starts >> m & 1) != 0, left, right);
#pragma unroll
    for (int q = 0; q < P; ++q) states[m][q] = h[q];
  }
}

// A point from logits, for position q of a lane: only its first and last one may lack a neighbour.
template <class T, int P, class A>
__device__ __forceinline__ Point<A> point_of(A la, A lb, A lc, A x, A lam, int q, unsigned left, unsigned right) {
  Point<A> point;
  numerators<T>(la, lb, lc, q > 0 ? ~0u : left, q < P - 1 ? ~0u : right, point.na, point.nc, point.inverse);
  point.x = x, point.lam = lam;
  return point;
}

}  // namespace gspn::cuda
