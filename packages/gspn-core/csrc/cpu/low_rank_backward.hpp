// Backward of gates that are made when they are needed: the gradients of a band's gates are contracted at once, with
// the projection for dr, and with r for the projection's own gradient.
#pragma once

#include "lane_backward.hpp"

namespace {

// Tasks own some blocks of channels of some images. Sums over tasks are added in their order, and how work is cut
// depends on shapes alone, so that results do not depend on the number of threads.
struct LowRankSplit {
  int64_t parts, images;  // of the channels' blocks, and of the batch

  LowRankSplit(const Params& p, int64_t blocks) {
    constexpr int64_t kTasks = 16;  // keeps most machines busy
    parts = min64(blocks, kTasks);
    images = min64(p.N, max64(1, kTasks / parts));
  }
};

// Pixels of dr, and rows of the projection's gradient, that are held in registers together.
#if defined(__AVX512F__)
constexpr int kGradientPixels = 8, kGradientRows = 4;
#else
constexpr int kGradientPixels = 4, kGradientRows = 2;
#endif

template <class A>
using GateGradients = const A* const (&)[kGates];

// dr of kPixels positions, from `at` on: dr += sum over gates and channels of their gradient times the projection,
// [gate][channel][rank], of which one vector of ranks.
template <int kPixels, class A>
GSPN_INLINE void add_dr(GateGradients<A> gradients, int64_t at, const A* projection, int64_t padded, A* dr,
                        int64_t step) {
  constexpr int K = kWide<A>;
  Wide<A> sums[kPixels];
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) sums[i] = load_wide(dr + i * step);
  for (int64_t g = 0; g < kGates; ++g) {
    const A* const from = gradients[g] + at * K;
    for (int64_t k = 0; k < K; ++k) {
      const Wide<A> w = load_wide(projection + (g * K + k) * padded);
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i) sums[i] = multiply_add(w, Wide<A>{} + from[i * K + k], sums[i]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) store_wide(dr + i * step, sums[i]);
}

// The projection's gradient, [rank][gate][channel], of kRows ranks: += sum over positions of r times the gates'. Each
// line is summed up by itself: a sum of sums rounds less.
template <int kRows, class A>
GSPN_INLINE void add_dprojection(GateGradients<A> gradients, int64_t at, int64_t count, const A* r, int64_t step,
                                 A* out) {
  constexpr int K = kWide<A>;
  Wide<A> sums[kRows][kGates];
#pragma GCC unroll 8
  for (int q = 0; q < kRows; ++q)
#pragma GCC unroll 8
    for (int g = 0; g < kGates; ++g) sums[q][g] = Wide<A>{};
  for (int64_t j = 0; j < count; ++j) {
    Wide<A> factor[kRows];
#pragma GCC unroll 8
    for (int q = 0; q < kRows; ++q) factor[q] = Wide<A>{} + r[j * step + q];
#pragma GCC unroll 8
    for (int g = 0; g < kGates; ++g) {
      const Wide<A> gradient = load_wide(gradients[g] + (at + j) * K);
#pragma GCC unroll 8
      for (int q = 0; q < kRows; ++q) sums[q][g] = multiply_add(factor[q], gradient, sums[q][g]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < kRows; ++q)
#pragma GCC unroll 8
    for (int g = 0; g < kGates; ++g) {
      A* const to = out + (q * kGates + g) * K;
      store_wide(to, load_wide(to) + sums[q][g]);
    }
}

template <class A>
GSPN_INLINE void add_dbias(GateGradients<A> gradients, int64_t at, int64_t count, A* out) {
  constexpr int K = kWide<A>;
  for (int64_t g = 0; g < kGates; ++g) {
    Wide<A> sum{};
    for (int64_t j = 0; j < count; ++j) sum += load_wide(gradients[g] + (at + j) * K);
    store_wide(out + g * K, load_wide(out + g * K) + sum);
  }
}

template <class S>
class LowRankBackward {
 public:
  using A = Accumulator<S>;
  static constexpr int K = kWide<A>;

  LowRankBackward(const Params& p, const LowRank& f)
      : p_(p),
        f_(f),
        blocks_(lane_blocks<A>(p)),
        split_(p, blocks_),
        packed_(p, f),
        padded_(round_up(f.R, K)),
        pixels_(layout_pixels(p)),
        row_((f.R + 1) * kGates * K),
        transposed_(f.dr ? blocks_ * p.D * kGates * K * padded_ : 0),
        dr_(f.dr ? split_.parts * p.N * pixels_ * padded_ : 0),
        dprojection_(split_.images * blocks_ * p.D * row_) {}

  void run() {
    if (f_.dr) run_tasks(blocks_ * p_.D, p_.threads, [&](int64_t task) { transpose(task); });
    run_tasks(split_.parts * split_.images, p_.threads,
              [&](int64_t task) { scan_part(task % split_.parts, task / split_.parts); });
    if (f_.dr) run_tasks(p_.N * p_.H, p_.threads, [&](int64_t task) { finish_dr(task / p_.H, task % p_.H); });
    if (f_.dprojection || f_.dbias)
      run_tasks(blocks_ * p_.D, p_.threads, [&](int64_t task) { finish_projection(task); });
  }

 private:
  // The packed projection of a block and direction as [gate][channel][rank], padded with zeros.
  void transpose(int64_t task) {
    const A* const from = packed_.weights(task / p_.D, task % p_.D);
    A* const to = transposed_.get() + task * kGates * K * padded_;
    for (int64_t row = 0; row < kGates * K; ++row)
      for (int64_t q = 0; q < padded_; ++q) to[row * padded_ + q] = q < f_.R ? from[q * kGates * K + row] : A(0);
  }

  void scan_part(int64_t part, int64_t group) {
    const int64_t n0 = group * p_.N / split_.images, n1 = (group + 1) * p_.N / split_.images;
    const int64_t b0 = part * blocks_ / split_.parts, b1 = (part + 1) * blocks_ / split_.parts;
    if (f_.dr) fill_zero(dr(part, n0), (n1 - n0) * pixels_ * padded_);
    const int64_t band = min64(p_.interval, max64(p_.H, p_.W));
    const Places places(p_, image_layout(p_));
    for (int64_t b = b0; b < b1; ++b) {
      A* const sums = dprojection(group, b, 0);
      fill_zero(sums, p_.D * row_);
      for (int64_t n = n0; n < n1; ++n) {
        const LaneBlock block = lane_block<A>(p_, n, b);
        LowRankGates<S, A> gates(p_, packed_, block, band);
        const auto give = [&](const Scan& scan, int64_t d, int64_t i0, int64_t lines, const BandGradients<A>& of) {
          const A* const gradients[kGates] = {of.logits[0].get(), of.logits[1].get(), of.logits[2].get(),
                                              gates.lines.lam.get(), gates.lines.u.get()};
          contract(scan, b, n, d, i0, lines, gradients, f_.dr ? dr(part, n) : nullptr, sums + d * row_);
        };
        LaneBackward<S, LowRankGates<S, A>, decltype(give)>(p_, gates, block, places, band, give).run();
      }
    }
  }

  void contract(const Scan& scan, int64_t b, int64_t n, int64_t d, int64_t i0, int64_t lines,
                GateGradients<A> gradients, A* dr, A* sums) {
    const Steps steps(scan, image_layout(p_));
    const int64_t length = scan.length;
    if (dr != nullptr) {
      const A* const projection = transposed_.get() + (b * p_.D + d) * kGates * K * padded_;
      const int64_t step = steps.position * padded_;
      for (int64_t t = 0; t < lines; ++t) {
        for (int64_t v = 0; v < padded_; v += K) {
          A* const to = dr + steps.at(i0 + t) * padded_ + v;
          int64_t j = 0;
          for (; j + kGradientPixels <= length; j += kGradientPixels)
            add_dr<kGradientPixels>(gradients, t * length + j, projection + v, padded_, to + j * step, step);
          for (; j < length; ++j) add_dr<1>(gradients, t * length + j, projection + v, padded_, to + j * step, step);
        }
      }
    }
    if (f_.dprojection) {
      const int64_t step = steps.position * f_.R;
      int64_t q = 0;
      for (; q + kGradientRows <= f_.R; q += kGradientRows)
        for (int64_t t = 0; t < lines; ++t)
          add_dprojection<kGradientRows>(gradients, t * length, length, packed_.r(n) + steps.at(i0 + t) * f_.R + q,
                                         step, sums + q * kGates * K);
      for (; q < f_.R; ++q)
        for (int64_t t = 0; t < lines; ++t)
          add_dprojection<1>(gradients, t * length, length, packed_.r(n) + steps.at(i0 + t) * f_.R + q, step,
                             sums + q * kGates * K);
    }
    for (int64_t t = 0; t < lines && f_.dbias; ++t) add_dbias(gradients, t * length, length, sums + f_.R * kGates * K);
  }

  // Adds the parts' sums of a row of an image, and stores them.
  void finish_dr(int64_t n, int64_t row) {
    const int64_t count = p_.W * padded_, begin = row * image_layout(p_).row * padded_;
    A* const sum = dr(0, n) + begin;
    for (int64_t part = 1; part < split_.parts; ++part)
      scale_line<Write::kAdd, A>(dr(part, n) + begin, nullptr, sum, count);
    S* const to = static_cast<S*>(f_.dr.data) + n * f_.dr.n + row * f_.dr.row;
    for (int64_t q = 0; q < f_.R; ++q)
      for (int64_t j = 0; j < p_.W; ++j) store1(to + q * f_.dr.c + j * f_.dr.col, sum[j * padded_ + q]);
  }

  void finish_projection(int64_t task) {
    const int64_t b = task / p_.D, d = task % p_.D;
    A* const sum = dprojection(0, b, d);
    for (int64_t group = 1; group < split_.images; ++group)
      scale_line<Write::kAdd, A>(dprojection(group, b, d), nullptr, sum, row_);
    const LaneBlock block = lane_block<A>(p_, 0, b);
    for (int64_t g = 0; g < kGates; ++g) {
      for (int64_t k = 0; k < block.count; ++k) {
        if (f_.dprojection) {
          S* const to = block_planes<S>(f_.dprojection, block, d, g) + k * f_.dprojection.c;
          for (int64_t q = 0; q < f_.R; ++q) store1(to + q * f_.dprojection.col, sum[(q * kGates + g) * K + k]);
        }
        if (f_.dbias) store1(block_planes<S>(f_.dbias, block, d, g) + k * f_.dbias.c, sum[(f_.R * kGates + g) * K + k]);
      }
    }
  }

  A* dr(int64_t part, int64_t n) const { return dr_.get() + (part * p_.N + n) * pixels_ * padded_; }
  A* dprojection(int64_t group, int64_t b, int64_t d) const {
    return dprojection_.get() + ((group * blocks_ + b) * p_.D + d) * row_;
  }

  const Params& p_;
  const LowRank& f_;
  const int64_t blocks_;
  const LowRankSplit split_;
  const Packed<S, A> packed_;
  const int64_t padded_, pixels_;  // R in whole vectors; pixels of an image
  const int64_t row_;              // sums of a block and direction: [rank][gate][channel], and those of the bias
  Scratch<A> transposed_, dr_, dprojection_;
};

template <class S>
void backward_low_rank(const Params& p, const LowRank& f) {
  LowRankBackward<S>(p, f).run();
}

}  // namespace
