// Backward with channels as lanes: as in backward.hpp, with weights and gates of every channel. A band of lines at a
// time, from the last to the first: its gates are made again, and its states from the checkpoint before it.
#pragma once

#include "lane_forward.hpp"

namespace {

// Gradients of the gates of a band, [line][position][channel]: of the logits here, of lam and u in place of the gates.
template <class A>
struct BandGradients {
  Scratch<A> logits[3];

  explicit BandGradients(int64_t positions) {
    for (Scratch<A>& buffer : logits) buffer = Scratch<A>(positions * kWide<A>);
  }
};

// One block of channels of one image. give(scan, d, i0, lines, gradients) takes the gradients of a band's gates.
template <class S, class Gates, class Give>
class LaneBackward {
 public:
  using A = Accumulator<S>;
  static constexpr int K = kWide<A>;

  LaneBackward(const Params& p, Gates& gates, const LaneBlock& block, const Places& places, int64_t band,
               const Give& give)
      : p_(p),
        gates_(gates),
        block_(block),
        places_(places),
        give_(give),
        band_(band),
        x_(layout_pixels(p) * K),
        dy_(layout_pixels(p) * K),
        dx_(layout_pixels(p) * K),
        states_((band + 1) * lane_line<A>(max_length(p))),
        adjoint_(max_length(p) * K),
        flow_(max_length(p) * K),
        gradients_(band * max_length(p)) {}

  void run() {
    load_lanes<S>(places_, p_.x, block_, x_.get());
    load_lanes<S>(places_, p_.dy, block_, dy_.get());
    for (int d = 0; d < p_.D; ++d) {
      const Scan scan = gspn::make_scan(p_, d);
      fill_zero(flow_.get(), scan.length * K);
      for (int64_t i0 = (scan.lines - 1) / band_ * band_; i0 >= 0; i0 -= band_)
        band(scan, d, i0, min64(band_, scan.lines - i0));
    }
    if (p_.dx) store_lanes<S>(places_, dx_.get(), p_.dx, block_);
  }

 private:
  void band(const Scan& scan, int d, int64_t i0, int64_t lines) {
    const Steps steps(scan, image_layout(p_));
    const int64_t length = scan.length, step = steps.position * K;
    GateLines<A>& g = gates_.lines;
    gates_.load(scan, d, i0, lines);
    recompute(scan, d, i0, lines);
    for (int64_t t = lines - 1; t >= 0; --t) {
      const int64_t at = t * length * K, pixel = steps.at(i0 + t) * K;
      A* const adjoint = adjoint_.get();
      adjoint_lanes(g.u.get() + at, dy_.get() + pixel, step, flow_.get(), adjoint, length);
      A *const p = gradients_.logits[0].get() + at, *const db = gradients_.logits[1].get() + at,
               *const q = gradients_.logits[2].get() + at;
      if (starts_chunk(p_, i0 + t)) {
        for (A* zero : {p, db, q, flow_.get()}) fill_zero(zero, length * K);
      } else {
        logit_gradient_lanes(g, at, adjoint, state(scan, t - 1), p, db, q, length);
        propagate_adjoint_lanes(adjoint, g.a.get() + at, g.c.get() + at, flow_.get(), length);
      }
      const auto gates = [&](auto first) {
        gate_gradient_lanes<decltype(first)::value>(adjoint, state(scan, t), x_.get() + pixel, dy_.get() + pixel,
                                                    dx_.get() + pixel, step, g.lam.get() + at, g.u.get() + at, length);
      };
      d == 0 ? gates(std::true_type()) : gates(std::false_type());
    }
    give_(scan, d, i0, lines, gradients_);
  }

  // The state after line t of the band; t = -1: before it.
  A* state(const Scan& scan, int64_t t) const { return states_.get() + (t + 1) * lane_line<A>(scan.length) + K; }

  void recompute(const Scan& scan, int d, int64_t i0, int64_t lines) {
    fill_zero(states_.get(), (lines + 1) * lane_line<A>(scan.length));
    const int64_t checkpoint = i0 / p_.interval - 1, total = gspn::checkpoint_offset(p_, p_.D);
    if (checkpoint >= 0 && checkpoint < gspn::checkpoint_lines(p_, scan)) {
      const A* const saved = static_cast<const A*>(p_.checkpoints) + (block_.n * p_.C + block_.c0) * total +
                             gspn::checkpoint_offset(p_, d) + checkpoint * scan.length;
      A* const before = state(scan, -1);
      for (int64_t k = 0; k < block_.count; ++k)
        for (int64_t j = 0; j < scan.length; ++j) before[j * K + k] = saved[k * total + j];
    }
    FiniteLanes<A> check;
    for (int64_t t = 0; t < lines; ++t) state_line(scan, i0, t, false, check);
    if (needs_finite(p_)) check.add(state(scan, lines - 1), scan.length);
    for (int64_t t = 0; t < lines && !check.finite(); ++t) state_line(scan, i0, t, true, check);
  }

  void state_line(const Scan& scan, int64_t i0, int64_t t, bool infinities, FiniteLanes<A>& check) {
    const Steps steps(scan, image_layout(p_));
    const int64_t at = t * scan.length * K, step = steps.position * K;
    const GateLines<A>& g = gates_.lines;
    const A *const a = g.a.get() + at, *const c = g.c.get() + at, *const lam = g.lam.get() + at;
    const A *const x = x_.get() + steps.at(i0 + t) * K, *const h = state(scan, t - 1);
    A* const next = state(scan, t);
    if (starts_chunk(p_, i0 + t)) {
      if (needs_finite(p_)) check.add(h, scan.length);
      recompute_lanes<true>(h, next, a, c, lam, x, step, scan.length);
    } else if (infinities) {
      recompute_lanes_with_infinities(h, next, a, c, lam, x, step, scan.length);
    } else {
      recompute_lanes<false>(h, next, a, c, lam, x, step, scan.length);
    }
  }

  const Params& p_;
  Gates& gates_;
  const LaneBlock block_;
  const Places& places_;
  const Give give_;
  const int64_t band_;
  Scratch<A> x_, dy_, dx_, states_, adjoint_, flow_;
  BandGradients<A> gradients_;
};

// Gates from memory: their gradients go there too, the whole image at a time.
template <class S>
void backward_lanes(const Params& p) {
  using A = Accumulator<S>;
  const int64_t blocks = lane_blocks<A>(p);
  run_tasks(p.N * blocks, p.threads, [&](int64_t task) {
    const LaneBlock block = lane_block<A>(p, task / blocks, task % blocks);
    PlaneGates<S, A> gates(p, block);
    const auto give = [&](const Scan& scan, int64_t d, int64_t, int64_t, const BandGradients<A>& of) {
      const Places places(p, scan_layout(scan));
      for (int64_t k = 0; k < 3 && p.dweights; ++k) store_lanes<S>(places, of.logits[k].get(), p.dweights, block, d, k);
      if (p.dlam) store_lanes<S>(places, gates.lines.lam.get(), p.dlam, block, d);
      if (p.du) store_lanes<S>(places, gates.lines.u.get(), p.du, block, d);
    };
    const Places places(p, image_layout(p));
    LaneBackward<S, PlaneGates<S, A>, decltype(give)>(p, gates, block, places, max64(p.H, p.W), give).run();
  });
}

}  // namespace
