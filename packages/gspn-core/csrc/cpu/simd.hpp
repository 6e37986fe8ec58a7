// Eight lanes of the accumulation type, loaded from and stored to every storage type, and their transpose.
// Written with the vector extensions of GCC and Clang, which lower to SSE, AVX2, AVX-512 or NEON alike.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Otherwise GCC does not inline these, and passes the vectors through memory.
#define GSPN_INLINE inline __attribute__((always_inline))

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// kStream: non-temporal stores past the caches, of whole cache lines that are not read soon; a thread calls
// end_of_stream after them.
enum class Write { kStore, kAdd, kStream };

constexpr int kLanes = 8;
typedef float Float8 __attribute__((vector_size(32)));
typedef double Double8 __attribute__((vector_size(64)));
typedef uint32_t UInt8x32 __attribute__((vector_size(32)));
typedef uint16_t UInt8x16 __attribute__((vector_size(16)));

template <class A>
struct LanesOf;
template <>
struct LanesOf<float> {
  using type = Float8;
};
template <>
struct LanesOf<double> {
  using type = Double8;
};
template <class A>
using Lanes = typename LanesOf<A>::type;

// The state and all sums are kept in float32, and in float64 for float64.
template <class S>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class S>
using Accumulator = typename AccumulatorOf<S>::type;

template <class To, class From>
GSPN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of one size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// a b + c. Fused, with one rounding, where the instruction set has it, else with two. The compiler contracts nothing by
// itself (-ffp-contract=off): it would choose differently in each copy of a loop, and the result would depend on how
// many channels are scanned together.
#if defined(__FMA__) || defined(__aarch64__)
GSPN_INLINE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
GSPN_INLINE double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
GSPN_INLINE float multiply_add(float a, float b, float c) { return a * b + c; }
GSPN_INLINE double multiply_add(double a, double b, double c) { return a * b + c; }
#endif
#if defined(__FMA__)
GSPN_INLINE Float8 multiply_add(Float8 a, Float8 b, Float8 c) {
  return bit_cast<Float8>(_mm256_fmadd_ps(bit_cast<__m256>(a), bit_cast<__m256>(b), bit_cast<__m256>(c)));
}
#if defined(__AVX512F__)
typedef float Float8x2 __attribute__((vector_size(64)));
GSPN_INLINE Float8x2 multiply_add(Float8x2 a, Float8x2 b, Float8x2 c) {
  return bit_cast<Float8x2>(_mm512_fmadd_ps(bit_cast<__m512>(a), bit_cast<__m512>(b), bit_cast<__m512>(c)));
}
GSPN_INLINE Double8 multiply_add(Double8 a, Double8 b, Double8 c) {
  return bit_cast<Double8>(_mm512_fmadd_pd(bit_cast<__m512d>(a), bit_cast<__m512d>(b), bit_cast<__m512d>(c)));
}
#else
typedef double Double4 __attribute__((vector_size(32)));
GSPN_INLINE Double8 multiply_add(Double8 a, Double8 b, Double8 c) {
  const Double4 low =
      _mm256_fmadd_pd(__builtin_shufflevector(a, a, 0, 1, 2, 3), __builtin_shufflevector(b, b, 0, 1, 2, 3),
                      __builtin_shufflevector(c, c, 0, 1, 2, 3));
  const Double4 high =
      _mm256_fmadd_pd(__builtin_shufflevector(a, a, 4, 5, 6, 7), __builtin_shufflevector(b, b, 4, 5, 6, 7),
                      __builtin_shufflevector(c, c, 4, 5, 6, 7));
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}
#endif
#elif defined(__aarch64__)
struct Float4x2 {
  float32x4_t at[2];
};
struct Double2x4 {
  float64x2_t at[4];
};
GSPN_INLINE Float8 multiply_add(Float8 a, Float8 b, Float8 c) {
  const auto x = bit_cast<Float4x2>(a), y = bit_cast<Float4x2>(b);
  auto sum = bit_cast<Float4x2>(c);
  for (int i = 0; i < 2; ++i) sum.at[i] = vfmaq_f32(sum.at[i], x.at[i], y.at[i]);
  return bit_cast<Float8>(sum);
}
GSPN_INLINE Double8 multiply_add(Double8 a, Double8 b, Double8 c) {
  const auto x = bit_cast<Double2x4>(a), y = bit_cast<Double2x4>(b);
  auto sum = bit_cast<Double2x4>(c);
  for (int i = 0; i < 4; ++i) sum.at[i] = vfmaq_f64(sum.at[i], x.at[i], y.at[i]);
  return bit_cast<Double8>(sum);
}
#else
GSPN_INLINE Float8 multiply_add(Float8 a, Float8 b, Float8 c) { return a * b + c; }
GSPN_INLINE Double8 multiply_add(Double8 a, Double8 b, Double8 c) { return a * b + c; }
#endif

GSPN_INLINE Float8 load8(const float* p) {
  Float8 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
GSPN_INLINE Double8 load8(const double* p) {
  Double8 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
GSPN_INLINE UInt8x32 load_bits8(const void* p) {
  UInt8x16 v;
  std::memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, UInt8x32);
}
GSPN_INLINE Float8 load8(const BFloat16* p) { return bit_cast<Float8>(load_bits8(p) << 16); }
GSPN_INLINE Float8 load8(const Float16* p) {
  const UInt8x32 h = load_bits8(p), magnitude = h & 0x7fffu;
  // Shifted into place, a half is its value times 2^-112, denormals included.
  const Float8 value = bit_cast<Float8>(magnitude << 13) * 0x1p112f;
  const UInt8x32 infinite = (magnitude >= 0x7c00u) & 0x7f800000u;
  return bit_cast<Float8>(bit_cast<UInt8x32>(value) | infinite | ((h & 0x8000u) << 16));
}

GSPN_INLINE void store8(float* p, Float8 v) { std::memcpy(p, &v, sizeof(v)); }
GSPN_INLINE void store8(double* p, Double8 v) { std::memcpy(p, &v, sizeof(v)); }
GSPN_INLINE void store_bits8(void* p, UInt8x32 v) {
  const UInt8x16 narrow = __builtin_convertvector(v, UInt8x16);
  std::memcpy(p, &narrow, sizeof(narrow));
}
GSPN_INLINE UInt8x32 select(UInt8x32 mask, UInt8x32 a, UInt8x32 b) { return (mask & a) | (~mask & b); }
GSPN_INLINE void store8(BFloat16* p, Float8 v) {
  const UInt8x32 bits = bit_cast<UInt8x32>(v);
  const UInt8x32 nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto nan = bit_cast<UInt8x32>((bits & 0x7fffffffu) > 0x7f800000u);
  store_bits8(p, select(nan, (bits >> 16) | 0x40u, nearest_even));
}
GSPN_INLINE void store8(Float16* p, Float8 v) {
  const UInt8x32 bits = bit_cast<UInt8x32>(v), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  // Normal numbers: rebias the exponent and round to nearest even; a carry past 65504 gives infinity.
  const UInt8x32 normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 aligns the half's denormal bits with the float's last bits and rounds them.
  const UInt8x32 denormal = bit_cast<UInt8x32>(bit_cast<Float8>(magnitude) + 0.5f) - 0x3f000000u;
  const auto is_denormal = bit_cast<UInt8x32>(magnitude < 0x38800000u);
  const auto is_large = bit_cast<UInt8x32>(magnitude >= 0x47800000u);
  const auto is_nan = bit_cast<UInt8x32>(magnitude > 0x7f800000u);
  const UInt8x32 large = (is_nan & 0x0200u) | 0x7c00u;
  store_bits8(p, select(is_large, large, select(is_denormal, denormal, normal)) | (sign >> 16));
}

// A non-temporal store; p is aligned to 16 bytes. A plain store on machines without SSE2.
template <class S, class V>
GSPN_INLINE void stream8(S* p, V v) {
#ifdef __SSE2__
  struct Pieces {
    __m128i at[kLanes * sizeof(S) / sizeof(__m128i)];
  };
  S values[kLanes];
  store8(values, v);
  const auto pieces = bit_cast<Pieces>(values);
  auto* out = reinterpret_cast<__m128i*>(p);
  for (const __m128i& piece : pieces.at) _mm_stream_si128(out++, piece);
#else
  store8(p, v);
#endif
}
GSPN_INLINE void end_of_stream() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Scalars go through the vector code, so that the tail of a line rounds as its body does.
template <class S>
GSPN_INLINE Accumulator<S> load1(const S* p) {
  S padded[kLanes] = {*p};
  return load8(padded)[0];
}
template <class S>
GSPN_INLINE void store1(S* p, Accumulator<S> value) {
  S padded[kLanes];
  Lanes<Accumulator<S>> v = {value};
  store8(padded, v);
  *p = padded[0];
}
GSPN_INLINE float load1(const float* p) { return *p; }
GSPN_INLINE double load1(const double* p) { return *p; }
GSPN_INLINE void store1(float* p, float value) { *p = value; }
GSPN_INLINE void store1(double* p, double value) { *p = value; }

// `here` shifted by one position: the eight left (right) neighbours, one of which comes from the neighbouring vector.
template <class V>
GSPN_INLINE V left_of(V left, V here) {
  return __builtin_shufflevector(left, here, 7, 8, 9, 10, 11, 12, 13, 14);
}
template <class V>
GSPN_INLINE V right_of(V here, V right) {
  return __builtin_shufflevector(here, right, 1, 2, 3, 4, 5, 6, 7, 8);
}

// Transposes an 8 x 8 block held in eight vectors, in three rounds of pairwise interleaving.
template <class V>
GSPN_INLINE void transpose8(V (&v)[kLanes]) {
  V t[kLanes], s[kLanes];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    t[2 * i + 1] = __builtin_shufflevector(v[2 * i], v[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    s[4 * i] = __builtin_shufflevector(t[4 * i], t[4 * i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    s[4 * i + 1] = __builtin_shufflevector(t[4 * i], t[4 * i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    s[4 * i + 2] = __builtin_shufflevector(t[4 * i + 1], t[4 * i + 3], 0, 1, 8, 9, 4, 5, 12, 13);
    s[4 * i + 3] = __builtin_shufflevector(t[4 * i + 1], t[4 * i + 3], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = __builtin_shufflevector(s[i], s[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = __builtin_shufflevector(s[i], s[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

}  // namespace
