// Channels as lanes: kWide channels of an image side by side, [pixel][channel], in scratch memory. A position's
// neighbours are whole vectors then, short lines waste nothing, and no direction needs a transpose.
#pragma once

#include <type_traits>

#include "scan.hpp"

namespace {

// ---- vectors of channels: as wide as the machine's own, of eight lanes at least

template <class A>
struct WideOf {
  using type = Lanes<A>;
};
#if defined(__AVX512F__)
template <>
struct WideOf<float> {
  using type = Float8x2;
};
#endif
template <class A>
using Wide = typename WideOf<A>::type;
template <class A>
constexpr int kWide = sizeof(Wide<A>) / sizeof(A);

template <class A>
struct WideIntOf;
template <>
struct WideIntOf<float> {
  typedef int32_t type __attribute__((vector_size(sizeof(Wide<float>))));
};
template <>
struct WideIntOf<double> {
  typedef int64_t type __attribute__((vector_size(sizeof(Wide<double>))));
};

// x, or the nearest bound; NaN stays. Of the machine's minimum and maximum the second operand is the result if one is
// NaN; GCC would take six instructions for the comparisons of AVX-512.
template <class V, class A>
GSPN_INLINE V clamped(V x, A low, A high) {
  const V lowest = V{} + low, highest = V{} + high;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4 && sizeof(V) == 64) {
    const __mmask16 all = 0xffff;  // GCC 12 warns of the forms without a mask
    const __m512 above = _mm512_maskz_max_ps(all, bit_cast<__m512>(lowest), bit_cast<__m512>(x));
    return bit_cast<V>(_mm512_maskz_min_ps(all, bit_cast<__m512>(highest), above));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4 && sizeof(V) == 32) {
    const __m256 above = _mm256_max_ps(bit_cast<__m256>(lowest), bit_cast<__m256>(x));
    return bit_cast<V>(_mm256_min_ps(bit_cast<__m256>(highest), above));
  }
#endif
  const V above = x < lowest ? lowest : x;
  return above > highest ? highest : above;
}

template <class A>
GSPN_INLINE Wide<A> load_wide(const A* p) {
  Wide<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class A>
GSPN_INLINE void store_wide(A* p, Wide<A> v) {
  std::memcpy(p, &v, sizeof(v));
}

// ---- images

// Where the pixels of an image lie in scratch memory, in units of pixels.
struct Layout {
  int64_t row, column, first = 0;
};

// Row by row. A row has one more pixel than it needs where columns would otherwise fall into the same cache sets.
inline Layout image_layout(const Params& p) { return {p.W % 16 == 0 && p.W > 16 ? p.W + 1 : p.W, 1}; }
inline int64_t layout_pixels(const Params& p) { return p.H * image_layout(p).row; }

// Line by line in scan order, without gaps.
inline Layout scan_layout(const Scan& scan) {
  const int64_t line = scan.reversed ? -scan.length : scan.length;
  const int64_t first = scan.reversed ? (scan.lines - 1) * scan.length : 0;
  return scan.horizontal ? Layout{1, line, first} : Layout{line, 1, first};
}

// In an image of the given layout, the pixels between two positions and between two lines of a scan.
struct Steps {
  int64_t position, line, first;

  Steps(const Scan& scan, const Layout& layout)
      : position(scan.horizontal ? layout.row : layout.column), line(scan.horizontal ? layout.column : layout.row) {
    first = scan.reversed ? (scan.lines - 1) * line : 0;
    line = scan.reversed ? -line : line;
  }
  int64_t at(int64_t i) const { return first + i * line; }
};

// Four pixels of kWide channels, `apart` elements from each other, between memory and a vector a pixel. Parts of four
// pixels are read into their places within a vector, so that half the shuffles of transpose8 remain.
#if defined(__AVX2__)
constexpr bool kQuads = true;

GSPN_INLINE Float8 load_halves(const float* p, int64_t apart) {
  return bit_cast<Float8>(_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + apart), 1));
}
GSPN_INLINE void store_halves(float* p, int64_t apart, Float8 v) {
  _mm_storeu_ps(p, _mm256_castps256_ps128(bit_cast<__m256>(v)));
  _mm_storeu_ps(p + apart, _mm256_extractf128_ps(bit_cast<__m256>(v), 1));
}
#if defined(__AVX512F__)
using Quad = Float8x2;
GSPN_INLINE Quad load_parts(const float* p, int64_t apart) {
  return __builtin_shufflevector(load_halves(p, apart), load_halves(p + 2 * apart, apart), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9,
                                 10, 11, 12, 13, 14, 15);
}
GSPN_INLINE void store_parts(float* p, int64_t apart, Quad v) {
  store_halves(p, apart, __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7));
  store_halves(p + 2 * apart, apart, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
GSPN_INLINE void transpose4(Quad (&v)[4]) {
  const Quad a = __builtin_shufflevector(v[0], v[1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  const Quad b = __builtin_shufflevector(v[0], v[1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  const Quad c = __builtin_shufflevector(v[2], v[3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  const Quad d = __builtin_shufflevector(v[2], v[3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  v[0] = __builtin_shufflevector(a, c, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  v[1] = __builtin_shufflevector(a, c, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  v[2] = __builtin_shufflevector(b, d, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
  v[3] = __builtin_shufflevector(b, d, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
}
#else
using Quad = Float8;
GSPN_INLINE Quad load_parts(const float* p, int64_t apart) { return load_halves(p, apart); }
GSPN_INLINE void store_parts(float* p, int64_t apart, Quad v) { store_halves(p, apart, v); }
GSPN_INLINE void transpose4(Quad (&v)[4]) {
  const Quad a = __builtin_shufflevector(v[0], v[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const Quad b = __builtin_shufflevector(v[0], v[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const Quad c = __builtin_shufflevector(v[2], v[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const Quad d = __builtin_shufflevector(v[2], v[3], 2, 10, 3, 11, 6, 14, 7, 15);
  v[0] = __builtin_shufflevector(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
  v[1] = __builtin_shufflevector(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
  v[2] = __builtin_shufflevector(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
  v[3] = __builtin_shufflevector(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
}
#endif

GSPN_INLINE void load_quad(const float* p, int64_t apart, Quad (&v)[4]) {
  for (int64_t i = 0; i < 4; ++i) v[i] = load_parts(p + i * apart, 4 * apart);
  transpose4(v);
}
GSPN_INLINE void store_quad(float* p, int64_t apart, Quad (&v)[4]) {
  transpose4(v);
  for (int64_t i = 0; i < 4; ++i) store_parts(p + i * apart, 4 * apart, v[i]);
}
#else
constexpr bool kQuads = false;
using Quad = Float8;
inline void load_quad(const float*, int64_t, Quad (&)[4]) {}
inline void store_quad(float*, int64_t, Quad (&)[4]) {}
#endif

// The place of every pixel, row by row, in a layout.
class Places {
 public:
  Places(const Params& p, const Layout& layout) : H_(p.H), W_(p.W), at_(p.H * p.W) {
    int32_t* at = at_.get();
    for (int64_t r = 0; r < H_; ++r)
      for (int64_t c = 0; c < W_; ++c) *at++ = int32_t(layout.first + r * layout.row + c * layout.column);
  }

  // From up to kWide planes, `apart` elements from each other, to lanes; lanes without a plane become zero.
  template <class S, class A>
  void load(const Field& f, const S* planes, int64_t count, int64_t apart, A* to) const {
    constexpr int K = kWide<A>;
    if constexpr (kQuads && std::is_same<S, float>::value) {
      if (count == K && can_quads(f))
        return for_quads(f, [&](int64_t from, const int32_t* at) __attribute__((always_inline)) {
          Quad v[4];
          load_quad(planes + from, apart, v);
          for (int64_t i = 0; i < 4; ++i) store_wide(to + at[i] * int64_t(K), v[i]);
        });
    }
    for_blocks(
        f, K,
        [&](int64_t from, const int32_t* at, int64_t k) __attribute__((always_inline)) {
          Lanes<A> v[kLanes] = {};
          for (int64_t i = 0; i < kLanes; ++i)
            if (k + i < count) v[i] = load8(planes + from + (k + i) * apart);
          transpose8(v);
          for (int64_t i = 0; i < kLanes; ++i) store8(to + at[i] * int64_t(K) + k, v[i]);
        },
        [&](int64_t from, const int32_t* at, int64_t k) __attribute__((always_inline)) {
          for (int64_t i = 0; i < kLanes; ++i)
            to[*at * int64_t(K) + k + i] = k + i < count ? load1(planes + from + (k + i) * apart) : A(0);
        });
  }
  template <class S, class A>
  void store(const A* from, const Field& f, S* planes, int64_t count, int64_t apart) const {
    constexpr int K = kWide<A>;
    if constexpr (kQuads && std::is_same<S, float>::value) {
      if (count == K && can_quads(f))
        return for_quads(f, [&](int64_t to, const int32_t* at) __attribute__((always_inline)) {
          Quad v[4];
          for (int64_t i = 0; i < 4; ++i) v[i] = load_wide(from + at[i] * int64_t(K));
          store_quad(planes + to, apart, v);
        });
    }
    for_blocks(
        f, K,
        [&](int64_t to, const int32_t* at, int64_t k) __attribute__((always_inline)) {
          Lanes<A> v[kLanes];
          for (int64_t i = 0; i < kLanes; ++i) v[i] = load8(from + at[i] * int64_t(K) + k);
          transpose8(v);
          for (int64_t i = 0; i < kLanes; ++i)
            if (k + i < count) store8(planes + to + (k + i) * apart, v[i]);
        },
        [&](int64_t to, const int32_t* at, int64_t k) __attribute__((always_inline)) {
          for (int64_t i = 0; i < kLanes; ++i)
            if (k + i < count) store1(planes + to + (k + i) * apart, from[*at * int64_t(K) + k + i]);
        });
  }

 private:
  // Calls run(offset in a plane, places, length) for pixels that lie evenly: a row, or a whole dense plane.
  template <class Run>
  GSPN_INLINE void for_runs(const Field& f, const Run& run) const {
    const bool dense = f.col == 1 && (f.row == W_ || H_ == 1);
    const int64_t runs = dense ? 1 : H_, length = dense ? H_ * W_ : W_;
    for (int64_t r = 0; r < runs; ++r) run(r * f.row, at_.get() + r * length, length);
  }
  bool can_quads(const Field& f) const { return f.col == 1 && (W_ >= 4 || (f.row == W_ && H_ * W_ >= 4)); }
  // Calls quad(offset in a plane, places) for four consecutive pixels; the last four may overlap the ones before.
  template <class Visit>
  GSPN_INLINE void for_quads(const Field& f, const Visit& quad) const {
    for_runs(f, [&](int64_t begin, const int32_t* at, int64_t length) __attribute__((always_inline)) {
      for (int64_t q = 0; q < length; q += 4) {
        const int64_t j = block_begin(q, length - 4);
        quad(begin + j, at + j);
      }
    });
  }
  // Calls block(offset in a plane, places, channel) for eight consecutive pixels and eight channels, or one(...) for a
  // single pixel. The last eight pixels may overlap the ones before.
  template <class Block, class One>
  GSPN_INLINE void for_blocks(const Field& f, int64_t channels, const Block& block, const One& one) const {
    for_runs(f, [&](int64_t begin, const int32_t* at, int64_t length) __attribute__((always_inline)) {
      for (int64_t k = 0; k < channels; k += kLanes) {
        if (f.col == 1 && length >= kLanes) {
          for (int64_t q = 0; q < length; q += kLanes) {
            const int64_t j = block_begin(q, length - kLanes);
            block(begin + j, at + j, k);
          }
        } else {
          for (int64_t j = 0; j < length; ++j) one(begin + j * f.col, at + j, k);
        }
      }
    });
  }

  int64_t H_, W_;
  Scratch<int32_t> at_;
};

// A vector of channels of one image: what a task works on.
struct LaneBlock {
  int64_t n, c0, count;
};

template <class A>
inline int64_t lane_blocks(const Params& p) {
  return (p.C + kWide<A> - 1) / kWide<A>;
}
template <class A>
inline LaneBlock lane_block(const Params& p, int64_t n, int64_t block) {
  const int64_t c0 = block * kWide<A>;
  return {n, c0, min64(kWide<A>, p.C - c0)};
}

// A block's planes of a field.
template <class S>
inline S* block_planes(const Field& f, const LaneBlock& b, int64_t d = 0, int64_t k = 0) {
  return static_cast<S*>(f.data) + b.n * f.n + d * f.d + b.c0 * f.c + k * f.k;
}
template <class S, class A>
void load_lanes(const Places& places, const Field& f, const LaneBlock& b, A* to, int64_t d = 0, int64_t k = 0) {
  places.load(f, block_planes<const S>(f, b, d, k), b.count, f.c, to);
}
template <class S, class A>
void store_lanes(const Places& places, const A* from, const Field& f, const LaneBlock& b, int64_t d = 0,
                 int64_t k = 0) {
  places.store(from, f, block_planes<S>(f, b, d, k), b.count, f.c);
}

// ---- weights

// exp_negative of a vector, without an offset.
template <class A>
GSPN_INLINE Wide<A> exp_negative_wide(Wide<A> logit) {
  using K = ExpConstants<A>;
  using Int = typename WideIntOf<A>::type;
  const Wide<A> zero{}, x = clamped(logit, A(kSaturation), A(K::kHighest));
  const Wide<A> shifted = multiply_add(x, zero - K::kLog2E, zero + K::kMagic);
  const Wide<A> k = shifted - K::kMagic;
  const Wide<A> s = multiply_add(k, zero + K::kLn2Low, multiply_add(k, zero + K::kLn2High, x));
  Wide<A> p = zero + exp_coefficient<A>(K::kTerms);
#pragma GCC unroll 16
  for (int term = K::kTerms - 1; term >= 0; --term) p = multiply_add(p, s, zero + exp_coefficient<A>(term));
  const Int exponent = bit_cast<Int>(shifted) - bit_cast<typename K::Int>(A(K::kMagic)) + typename K::Int(K::kBias);
  return p * bit_cast<Wide<A>>(exponent << K::kMantissa);
}

// `normalise` of vectors.
template <class A>
GSPN_INLINE void normalise_wide(const A* l0, const A* l1, const A* l2, bool has_left, bool has_right, A* a, A* c) {
  const Wide<A> zero{}, one = zero + A(1);
  const Wide<A> ea = has_left ? exp_negative_wide<A>(load_wide(l0)) + one : one,
                eb = exp_negative_wide<A>(load_wide(l1)) + one,
                ec = has_right ? exp_negative_wide<A>(load_wide(l2)) + one : one;
  const Wide<A> na = has_left ? eb * ec : zero, nc = has_right ? ea * eb : zero;
  const Wide<A> inverse = one / (multiply_add(ea, ec, na) + nc);
  store_wide(a, na * inverse);
  store_wide(c, nc * inverse);
}

// ---- the gates of some lines, [line][position][channel] without gaps

template <class A>
struct GateLines {
  Scratch<A> logits[3], a, c, lam, u;

  explicit GateLines(int64_t positions) {
    const int64_t count = positions * kWide<A>;
    for (Scratch<A>* buffer : {&logits[0], &logits[1], &logits[2], &a, &c, &lam, &u}) *buffer = Scratch<A>(count);
  }
  // Normalises the weights of `lines` lines.
  void normalise(int64_t lines, int64_t length) {
    constexpr int64_t K = kWide<A>;
    for (int64_t t = 0; t < lines; ++t) {
      const int64_t at = t * length * K, last = at + (length - 1) * K;
      const auto one = [&](int64_t i, bool has_left, bool has_right) __attribute__((always_inline)) {
        normalise_wide(logits[0].get() + i, logits[1].get() + i, logits[2].get() + i, has_left, has_right, a.get() + i,
                       c.get() + i);
      };
      one(at, false, length > 1);
      for (int64_t i = at + K; i < last; i += K) one(i, true, true);
      if (length > 1) one(last, true, false);
    }
  }
};

// ---- lines

// The first `length` positions of a line of state have a vector of zeros before and after them.
template <class A>
inline int64_t lane_line(int64_t length) {
  return (length + 2) * kWide<A>;
}

// One line of kWide channels. x and y are `step` elements apart between positions.
template <bool kStarts, bool kFirst, class A>
void scan_lanes(const A* h, A* next, const A* a, const A* c, const A* lam, const A* u, const A* x, A* y, int64_t step,
                int64_t length) {
  constexpr int K = kWide<A>;
  Wide<A> left{}, here = load_wide(h);
  for (int64_t j = 0; j < length; ++j) {
    const Wide<A> gate = load_wide(lam + j * K), in = load_wide(x + j * step);
    Wide<A> value = gate * in;
    if constexpr (!kStarts) {
      const Wide<A> right = load_wide(h + (j + 1) * K);
      value = updated<true, false>(load_wide(a + j * K), Wide<A>{}, load_wide(c + j * K), left, here, right, in, gate);
      left = here;
      here = right;
    }
    store_wide(next + j * K, value);
    const Wide<A> out = load_wide(u + j * K);
    store_wide(y + j * step, kFirst ? out * value : multiply_add(out, value, load_wide(y + j * step)));
  }
}

// The state alone, for the backward pass.
template <bool kStarts, class A>
void recompute_lanes(const A* h, A* next, const A* a, const A* c, const A* lam, const A* x, int64_t step,
                     int64_t length) {
  constexpr int K = kWide<A>;
  Wide<A> left{}, here = load_wide(h);
  for (int64_t j = 0; j < length; ++j) {
    const Wide<A> gate = load_wide(lam + j * K), in = load_wide(x + j * step);
    Wide<A> value = gate * in;
    if constexpr (!kStarts) {
      const Wide<A> right = load_wide(h + (j + 1) * K);
      value = updated<true, false>(load_wide(a + j * K), Wide<A>{}, load_wide(c + j * K), left, here, right, in, gate);
      left = here;
      here = right;
    }
    store_wide(next + j * K, value);
  }
}

// The state alone, with infinities; see updated_with_infinities.
template <class A>
void recompute_lanes_with_infinities(const A* h, A* next, const A* a, const A* c, const A* lam, const A* x,
                                     int64_t step, int64_t length) {
  constexpr int K = kWide<A>;
  for (int64_t j = 0; j < length; ++j) {
    for (int64_t i = j * K; i < (j + 1) * K; ++i) {
      const A in = x[j * step + i - j * K];
      next[i] = updated_with_infinities(a[i], c[i], j > 0 ? h[i - K] : A(0), h[i], j + 1 < length ? h[i + K] : A(0),
                                        lam[i] * in, multiply_add(lam[i], in, h[i]));
    }
  }
}

// ---- backward, per line; see backward.hpp

// g = u dy + v
template <class A>
void adjoint_lanes(const A* u, const A* dy, int64_t step, const A* v, A* g, int64_t length) {
  constexpr int K = kWide<A>;
  for (int64_t j = 0; j < length; ++j)
    store_wide(g + j * K, multiply_add(load_wide(u + j * K), load_wide(dy + j * step), load_wide(v + j * K)));
}

// What flows to the previous line: v[j] = b[j] g[j] + a[j+1] g[j+1] + c[j-1] g[j-1].
template <class A>
void propagate_adjoint_lanes(const A* g, const A* a, const A* c, A* v, int64_t length) {
  constexpr int K = kWide<A>;
  Wide<A> left{};
  for (int64_t j = 0; j < length; ++j) {
    const Wide<A> here = load_wide(g + j * K), own = (Wide<A>{} + A(1) - load_wide(a + j * K)) - load_wide(c + j * K);
    const Wide<A> right = j + 1 < length ? load_wide(a + (j + 1) * K) * load_wide(g + (j + 1) * K) : Wide<A>{};
    store_wide(v + j * K, own * here + right + left);
    left = load_wide(c + j * K) * here;
  }
}

// dlam = g x and du = dy h, in place of lam and u; dx = lam g, or dx += lam g. x, dy and dx are `step` elements apart.
template <bool kFirst, class A>
void gate_gradient_lanes(const A* g, const A* h, const A* x, const A* dy, A* dx, int64_t step, A* lam, A* u,
                         int64_t length) {
  constexpr int K = kWide<A>;
  for (int64_t j = 0; j < length; ++j) {
    const Wide<A> adjoint = load_wide(g + j * K), gate = load_wide(lam + j * K);
    store_wide(dx + j * step, kFirst ? gate * adjoint : multiply_add(gate, adjoint, load_wide(dx + j * step)));
    store_wide(lam + j * K, adjoint * load_wide(x + j * step));
    store_wide(u + j * K, load_wide(dy + j * step) * load_wide(h + j * K));
  }
}

// Gradients of the logits from g and the state before the line; see logit_gradients_line.
template <class A>
void logit_gradient_lanes(const GateLines<A>& lines, int64_t at, const A* g, const A* h, A* da, A* db, A* dc,
                          int64_t length) {
  constexpr int K = kWide<A>;
  const Wide<A> zero{}, one = zero + A(1);
  const auto saturated = [&](Wide<A> logit, Wide<A> slope)
                             __attribute__((always_inline)) { return logit < zero + A(kSaturation) ? zero : slope; };
  for (int64_t j = 0; j < length; ++j) {
    const int64_t i = at + j * K;
    const Wide<A> la = load_wide(lines.logits[0].get() + i), lb = load_wide(lines.logits[1].get() + i),
                  lc = load_wide(lines.logits[2].get() + i);
    const Wide<A> a = load_wide(lines.a.get() + i), c = load_wide(lines.c.get() + i), here = load_wide(h + j * K);
    const Wide<A> adjoint = load_wide(g + j * K);
    const Wide<A> p = adjoint * (load_wide(h + (j - 1) * K) - here), q = adjoint * (load_wide(h + (j + 1) * K) - here);
    const Wide<A> t = multiply_add(a, p, c * q);
    // 1 - sigma = e / (1 + e), with one division for all three.
    const Wide<A> ea = exp_negative_wide<A>(la), eb = exp_negative_wide<A>(lb), ec = exp_negative_wide<A>(lc);
    const Wide<A> sa = one + ea, sb = one + eb, sc = one + ec, sbc = sb * sc, inverse = one / (sa * sbc);
    const Wide<A> slope_a = saturated(la, ea * sbc * inverse), slope_b = saturated(lb, eb * (sa * sc) * inverse),
                  slope_c = saturated(lc, ec * (sa * sb) * inverse);
    store_wide(da + j * K, j > 0 ? a * slope_a * (p - t) : zero);  // no neighbour there, whatever the logit
    store_wide(db + j * K, zero - ((one - a) - c) * slope_b * t);
    store_wide(dc + j * K, j + 1 < length ? c * slope_c * (q - t) : zero);
  }
}

// y = u h, or y += u h.
template <bool kFirst, class A>
void scale_lanes(const A* h, const A* u, A* y, int64_t step, int64_t length) {
  constexpr int K = kWide<A>;
  for (int64_t j = 0; j < length; ++j) {
    const Wide<A> out = load_wide(u + j * K), value = load_wide(h + j * K);
    store_wide(y + j * step, kFirst ? out * value : multiply_add(out, value, load_wide(y + j * step)));
  }
}

template <class A>
struct FiniteLanes {
  Wide<A> zeros{};

  void add(const A* h, int64_t length) {
    for (int64_t j = 0; j < length; ++j) zeros += load_wide(h + j * kWide<A>) * A(0);
  }
  bool finite() const {
    A sum = 0;
    for (int i = 0; i < kWide<A>; ++i) sum += zeros[i];
    return sum == A(0);
  }
};

}  // namespace
