// Forward with channels as lanes. A task owns a vector of channels of one image, and all directions of it.
#pragma once

#include "low_rank.hpp"

namespace {

template <class S, class Gates, class A = Accumulator<S>>
class LaneForward {
 public:
  static constexpr int K = kWide<A>;

  LaneForward(const Params& p, Gates& gates, const LaneBlock& block, int64_t most_lines)
      : p_(p),
        gates_(gates),
        block_(block),
        most_lines_(most_lines),
        places_(p, image_layout(p)),
        x_(layout_pixels(p) * K),
        y_(layout_pixels(p) * K),
        state_(2 * lane_line<A>(max_length(p))) {}

  void run() {
    load_lanes<S>(places_, p_.x, block_, x_.get());
    scan<false>();
    if (!check_.finite()) scan<true>();
    store_lanes<S>(places_, y_.get(), p_.y, block_);
  }

 private:
  template <bool kInfinities>
  void scan() {
    for (int d = 0; d < p_.D; ++d) {
      const Scan scan = gspn::make_scan(p_, d);
      const int64_t row = lane_line<A>(scan.length);
      fill_zero(state_.get(), 2 * row);
      const auto state = [&](int64_t i) { return state_.get() + (i & 1) * row + K; };
      for (int64_t i0 = 0; i0 < scan.lines; i0 += most_lines_) {
        const int64_t lines = min64(most_lines_, scan.lines - i0);
        gates_.load(scan, d, i0, lines);
        for (int64_t t = 0; t < lines; ++t) line<kInfinities>(scan, d, i0 + t, t, state(i0 + t + 1), state(i0 + t));
      }
      if (needs_finite(p_)) check_.add(state(scan.lines - 1), scan.length);
    }
  }

  template <bool kInfinities>
  void line(const Scan& scan, int d, int64_t i, int64_t t, const A* h, A* next) {
    const Steps steps(scan, image_layout(p_));
    const int64_t length = scan.length, at = t * length * K, step = steps.position * K;
    const GateLines<A>& g = gates_.lines;
    const A *const a = g.a.get() + at, *const c = g.c.get() + at, *const lam = g.lam.get() + at;
    const A *const u = g.u.get() + at, *const x = x_.get() + steps.at(i) * K;
    A* const y = y_.get() + steps.at(i) * K;
    const bool starts = starts_chunk(p_, i);
    if (starts && needs_finite(p_)) check_.add(h, length);
    if (starts) {
      d == 0 ? scan_lanes<true, true>(h, next, a, c, lam, u, x, y, step, length)
             : scan_lanes<true, false>(h, next, a, c, lam, u, x, y, step, length);
    } else if (kInfinities) {
      recompute_lanes_with_infinities(h, next, a, c, lam, x, step, length);
      d == 0 ? scale_lanes<true>(next, u, y, step, length) : scale_lanes<false>(next, u, y, step, length);
    } else {
      d == 0 ? scan_lanes<false, true>(h, next, a, c, lam, u, x, y, step, length)
             : scan_lanes<false, false>(h, next, a, c, lam, u, x, y, step, length);
    }
    save_checkpoint(scan, d, i, next);
  }

  void save_checkpoint(const Scan& scan, int d, int64_t i, const A* h) const {
    if (p_.checkpoints == nullptr || (i + 1) % p_.interval != 0) return;
    const int64_t index = i / p_.interval, total = gspn::checkpoint_offset(p_, p_.D);
    if (index >= gspn::checkpoint_lines(p_, scan)) return;
    A* const saved = static_cast<A*>(p_.checkpoints) + (block_.n * p_.C + block_.c0) * total +
                     gspn::checkpoint_offset(p_, d) + index * scan.length;
    for (int64_t k = 0; k < block_.count; ++k)
      for (int64_t j = 0; j < scan.length; ++j) saved[k * total + j] = h[j * K + k];
  }

  const Params& p_;
  Gates& gates_;
  const LaneBlock block_;
  const int64_t most_lines_;
  const Places places_;
  Scratch<A> x_, y_, state_;
  FiniteLanes<A> check_;
};

template <class S>
void forward_low_rank(const Params& p, const LowRank& f) {
  using A = Accumulator<S>;
  const Packed<S, A> packed(p, f);
  const int64_t blocks = lane_blocks<A>(p), lines = max64(1, kLanePositions / max64(1, max_length(p)));
  run_tasks(p.N * blocks, p.threads, [&](int64_t task) {
    const LaneBlock block = lane_block<A>(p, task / blocks, task % blocks);
    LowRankGates<S, A> gates(p, packed, block, lines);
    LaneForward<S, LowRankGates<S, A>>(p, gates, block, lines).run();
  });
}

template <class S>
void forward_lanes(const Params& p) {
  using A = Accumulator<S>;
  const int64_t blocks = lane_blocks<A>(p);
  run_tasks(p.N * blocks, p.threads, [&](int64_t task) {
    const LaneBlock block = lane_block<A>(p, task / blocks, task % blocks);
    PlaneGates<S, A> gates(p, block);
    LaneForward<S, PlaneGates<S, A>>(p, gates, block, max64(p.H, p.W)).run();
  });
}

}  // namespace
