// Gates that are made when they are needed: of a block of channels, five products of R numbers each a pixel, direction
// and channel. r and the projection are packed once for all tasks.
#pragma once

#include "lanes.hpp"

namespace {

using gspn::LowRank;

constexpr int kGates = 5;  // the logits, lam and u

// Pixels whose products are held in registers together, five vectors each.
#if defined(__AVX512F__)
constexpr int kPixelsTogether = 5;
#else
constexpr int kPixelsTogether = 2;
#endif

// r as [image][pixel][rank], and the projection as [block][direction][rank][gate][channel].
template <class S, class A>
class Packed {
 public:
  static constexpr int K = kWide<A>;

  Packed(const Params& p, const LowRank& f)
      : rank(f.R),
        pixels_(layout_pixels(p)),
        D_(p.D),
        r_(p.N * pixels_ * rank),
        weights_(lane_blocks<A>(p) * p.D * rank * kGates * K),
        bias_(lane_blocks<A>(p) * p.D * kGates * K) {
    const Layout layout = image_layout(p);
    const int64_t blocks = lane_blocks<A>(p);
    run_tasks(p.N * p.H, p.threads, [&](int64_t task) {
      const int64_t n = task / p.H, row = task % p.H;
      const S* const from = static_cast<const S*>(f.r.data) + n * f.r.n + row * f.r.row;
      A* const to = r_.get() + (n * pixels_ + row * layout.row) * rank;
      for (int64_t q = 0; q < rank; ++q)
        for (int64_t j = 0; j < p.W; ++j) to[j * rank + q] = load1(from + q * f.r.c + j * f.r.col);
    });
    run_tasks(blocks * p.D, p.threads, [&](int64_t task) {
      const int64_t d = task % p.D;
      const LaneBlock b = lane_block<A>(p, 0, task / p.D);
      A* const to = weights_.get() + task * rank * kGates * K;
      for (int64_t g = 0; g < kGates; ++g) {
        const S* const from = block_planes<const S>(f.projection, b, d, g);
        for (int64_t k = 0; k < K; ++k)
          for (int64_t q = 0; q < rank; ++q)
            to[(q * kGates + g) * K + k] = k < b.count ? load1(from + k * f.projection.c + q * f.projection.col) : A(0);
        const S* const from_bias = block_planes<const S>(f.bias, b, d, g);
        for (int64_t k = 0; k < K; ++k)
          bias_.get()[(task * kGates + g) * K + k] = k < b.count ? load1(from_bias + k * f.bias.c) : A(0);
      }
    });
  }

  const A* r(int64_t n) const { return r_.get() + n * pixels_ * rank; }
  const A* weights(int64_t block, int64_t d) const { return weights_.get() + (block * D_ + d) * rank * kGates * K; }
  const A* bias(int64_t block, int64_t d) const { return bias_.get() + (block * D_ + d) * kGates * K; }

  const int64_t rank;

 private:
  int64_t pixels_, D_;
  Scratch<A> r_, weights_, bias_;
};

// Gates of kPixels positions, `step` elements of r apart.
template <int kPixels, class A>
GSPN_INLINE void project(const A* r, int64_t step, int64_t rank, const A* weights, const A* bias,
                         A* const (&out)[kGates], int64_t at) {
  constexpr int K = kWide<A>;
  Wide<A> sums[kGates][kPixels];
#pragma GCC unroll 8
  for (int g = 0; g < kGates; ++g)
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) sums[g][i] = load_wide(bias + g * K);
  for (int64_t q = 0; q < rank; ++q) {
    Wide<A> factor[kPixels];
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) factor[i] = Wide<A>{} + r[i * step + q];
#pragma GCC unroll 8
    for (int g = 0; g < kGates; ++g) {
      const Wide<A> w = load_wide(weights + (q * kGates + g) * K);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) sums[g][i] = multiply_add(w, factor[i], sums[g][i]);
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < kGates; ++g)
#pragma GCC unroll 8
    for (int i = 0; i < kPixels; ++i) store_wide(out[g] + (at + i) * K, sums[g][i]);
}

// The same for fewer positions than kPixels.
template <int kPixels, class A>
GSPN_INLINE void project_rest(int64_t count, const A* r, int64_t step, int64_t rank, const A* weights, const A* bias,
                              A* const (&out)[kGates], int64_t at) {
  if constexpr (kPixels > 1) {
    if (count == kPixels - 1) return project<kPixels - 1>(r, step, rank, weights, bias, out, at);
    project_rest<kPixels - 1>(count, r, step, rank, weights, bias, out, at);
  }
}

// The gates of a block, direction by direction and some lines at a time.
template <class S, class A>
class LowRankGates {
 public:
  LowRankGates(const Params& p, const Packed<S, A>& packed, const LaneBlock& block, int64_t most_lines)
      : p_(p), packed_(packed), block_(block), lines(most_lines * max_length(p)) {}

  void load(const Scan& scan, int64_t d, int64_t i0, int64_t count) {
    const Steps steps(scan, image_layout(p_));
    const int64_t rank = packed_.rank, step = steps.position * rank, index = block_.c0 / kWide<A>;
    const A *const weights = packed_.weights(index, d), *const bias = packed_.bias(index, d);
    A* const out[kGates] = {lines.logits[0].get(), lines.logits[1].get(), lines.logits[2].get(), lines.lam.get(),
                            lines.u.get()};
    for (int64_t t = 0; t < count; ++t) {
      const A* const r = packed_.r(block_.n) + steps.at(i0 + t) * rank;
      int64_t j = 0;
      for (; j + kPixelsTogether <= scan.length; j += kPixelsTogether)
        project<kPixelsTogether>(r + j * step, step, rank, weights, bias, out, t * scan.length + j);
      project_rest<kPixelsTogether>(scan.length - j, r + j * step, step, rank, weights, bias, out, t * scan.length + j);
    }
    lines.normalise(count, scan.length);
  }

 private:
  const Params& p_;
  const Packed<S, A>& packed_;
  LaneBlock block_;

 public:
  GateLines<A> lines;
};

// The gates of a block from memory, the whole image at a time.
template <class S, class A>
class PlaneGates {
 public:
  PlaneGates(const Params& p, const LaneBlock& block) : p_(p), block_(block), lines(p.H * p.W) {}

  void load(const Scan& scan, int64_t d, int64_t, int64_t) {
    const Places places(p_, scan_layout(scan));
    for (int64_t k = 0; k < 3; ++k) load_lanes<S>(places, p_.weights, block_, lines.logits[k].get(), d, k);
    load_gate(places, p_.lam, d, lines.lam.get());
    load_gate(places, p_.u, d, lines.u.get());
    lines.normalise(scan.lines, scan.length);
  }

 private:
  // A gate that is absent is 1.
  void load_gate(const Places& places, const Field& f, int64_t d, A* to) {
    if (f) return load_lanes<S>(places, f, block_, to, d);
    for (int64_t i = 0; i < p_.H * p_.W * kWide<A>; ++i) to[i] = A(1);
  }

  const Params& p_;
  LaneBlock block_;

 public:
  GateLines<A> lines;
};

}  // namespace
