// Forward: y = sum_d u_d h_d. A task owns a block of channels of one image, and all directions of it, so that every
// output is written by one thread, in a fixed order.
#pragma once

#include "bands.hpp"
#include "lane_forward.hpp"

namespace {

// Scans some channels of one image in all directions.
template <class S, class A = Accumulator<S>>
class ForwardTask {
 public:
  ForwardTask(const Params& p, int64_t n, int64_t c0, int64_t c1)
      : p_(p),
        n_(n),
        c0_(c0),
        c1_(c1),
        pitch_(tile_pitch(max_length(p))),
        capacity_(most_tile_lines(p) * pitch_),
        weights_(p, capacity_),
        lam_{{p, p.lam, capacity_}, {p, p.lam, p.lam.channels > 1 ? capacity_ : 0}},
        u_{{p, p.u, capacity_}, {p, p.u, p.u.channels > 1 ? capacity_ : 0}},
        tiles_(kTogether * capacity_),
        state_((c1 - c0) * 2 * pitch_),
        y_(p, p.y, n, c0, c1 - c0) {}

  void run() {
    scan();
    if (!check_.finite()) {  // again, and all of it: the sums over directions hold NaN already
      infinities_ = true;
      scan();
    }
    y_.finish();
  }

 private:
  // Channels that are scanned together, so that each weight is loaded once for them.
  static constexpr int kTogether = 2;

  void scan() {
    for (int d = 0; d < p_.D; ++d) {
      const Scan scan = gspn::make_scan(p_, d);
      const int64_t most_lines = tile_lines(p_, scan);
      fill_zero(state_.get(), (c1_ - c0_) * 2 * pitch_);
      for (int64_t i0 = 0; i0 < scan.lines; i0 += most_lines) {
        const Span span = make_span(p_, scan, i0, most_lines, pitch_, sizeof(S));
        for (int64_t c = c0_, next; c < c1_; c = next) {
          next = min64(c1_, c + kTogether);
          while (group(next - 1) != group(c)) --next;
          weights_.load(scan, n_, d, group(c), span);
          next == c + kTogether ? channels<kTogether>(scan, d, c, span) : channels<1>(scan, d, c, span);
        }
      }
    }
  }

  // Scans the span's lines of K channels from c on.
  template <int K>
  void channels(const Scan& scan, int d, int64_t c, const Span& span) {
    Tile<const A> x[K];
    const GateTile<S, A>*lam[K], *u[K];
    SumLines<S, A> y[K];
    Lines<K, A> lines;
    for (int k = 0; k < K; ++k) {
      const Tile<A> tile{tiles_.get() + k * capacity_, pitch_};  // x, overwritten by h line by line
      x[k] = fetch<S, A>(scan_plane<const S>(p_.x, scan, n_, 0, c + k), span, scan.length, tile.data);
      lam[k] = gate(lam_, p_.lam, scan, d, c, k, span);
      u[k] = gate(u_, p_.u, scan, d, c, k, span);
      y[k] = y_.lines(scan, d, c + k, span, tile);
      lines.next[k] = state(c + k, span.begin + 1);
    }
    const bool direct = !p_.u && y[0].overwrites();  // h is the output, whose lines are the state
    LinePrefetcher prefetcher = prefetcher_of<K>(scan, d, c, span);
    for (int64_t t = 0; t < span.lines; ++t) {
      const int64_t i = span.begin + t;
      for (int k = 0; k < K; ++k) {
        lines.h[k] = lines.next[k];
        lines.x[k] = x[k].line(t);
        lines.lam[k] = lam[k]->line(t);
        lines.next[k] = direct ? y[k].line(t) : state(c + k, i);
      }
      const bool starts = starts_chunk(p_, i);
      for (int k = 0; k < K && starts && needs_finite(p_); ++k) check_.add(lines.h[k], scan.length);
      if (prefetcher.select(i))
        step(starts, lines, weights_.line(t), scan.length, infinities_, prefetcher);
      else
        step(starts, lines, weights_.line(t), scan.length, infinities_);
      for (int k = 0; k < K; ++k) {
        if (!direct) y[k].add(t, lines.next[k], u[k]->line(t), scan.length);
        save_checkpoint(scan, d, c + k, i, lines.next[k]);
      }
    }
    for (int k = 0; k < K; ++k) {
      if (needs_finite(p_) && span.begin + span.lines == scan.lines) check_.add(lines.next[k], scan.length);
      if (direct) load_line(lines.next[k], state(c + k, span.begin + span.lines - 1), scan.length);
      y[k].finish(span.lines, scan.length);
    }
  }

  int64_t group(int64_t c) const { return shared_channel(p_, p_.weights, c); }

  // The state of a channel after line i; the last two are kept.
  A* state(int64_t c, int64_t i) const { return state_.get() + ((c - c0_) * 2 + (i & 1)) * pitch_; }

  // The gate of channel c + k. Channels that share a gate share its tile.
  const GateTile<S, A>* gate(GateTile<S, A> (&tiles)[kTogether], const Field& f, const Scan& scan, int d, int64_t c,
                             int k, const Span& span) {
    if (!f) return &tiles[0];
    const int64_t channel = shared_channel(p_, f, c + k);
    GateTile<S, A>& tile = tiles[channel == shared_channel(p_, f, c) ? 0 : k];
    tile.load(scan, n_, d, c + k, span);
    return &tile;
  }

  void save_checkpoint(const Scan& scan, int d, int64_t c, int64_t i, const A* h) const {
    if (p_.checkpoints == nullptr || (i + 1) % p_.interval != 0) return;
    const int64_t index = i / p_.interval, total = gspn::checkpoint_offset(p_, p_.D);
    if (index >= gspn::checkpoint_lines(p_, scan)) return;
    A* const saved = static_cast<A*>(p_.checkpoints) + (n_ * p_.C + c) * total + gspn::checkpoint_offset(p_, d);
    load_line(h, saved + index * scan.length, scan.length);
  }

  // What to prefetch while K channels from c on are scanned.
  template <int K>
  LinePrefetcher prefetcher_of(const Scan& scan, int d, int64_t c, const Span& span) const {
    const bool descending = descends(p_, scan, true, sizeof(S));
    const int64_t distance = !descending ? 0 : sizeof(S) == sizeof(A) ? 1 : tile_lines(p_, scan);
    LinePrefetcher prefetcher(scan, distance, sizeof(S));
    if (descending) {
      for (int64_t k = 0; k < 3 && (c == c0_ || group(c - 1) != group(c)); ++k)
        prefetcher.add(scan_plane<const S>(p_.weights, scan, n_, d, group(c), k));
      for (int k = 0; k < K; ++k) {
        prefetcher.add(scan_plane<const S>(p_.x, scan, n_, 0, c + k));
        prefetcher.add(scan_plane<const S>(p_.y, scan, n_, 0, c + k));
        if (p_.lam) prefetcher.add(scan_plane<const S>(p_.lam, scan, n_, d, shared_channel(p_, p_.lam, c + k)));
        if (p_.u) prefetcher.add(scan_plane<const S>(p_.u, scan, n_, d, shared_channel(p_, p_.u, c + k)));
      }
    } else if (is_cold(p_, sizeof(S)) && (scan.horizontal || scan.reversed) && span.lines == scan.lines &&
               p_.H * p_.W * int64_t(sizeof(S)) >= kWholePlaneBytes) {
      // Whole planes: while they are scanned, their outputs and the inputs of the next channels are prefetched.
      const auto add = [&](const Field& f, int64_t channel, int64_t k = 0) {
        prefetcher.add(as_parts<S>(p_, f, scan, n_, d, channel, k));
      };
      const auto add_gate = [&](const Field& gate, int64_t channel) {
        if (gate && shared_channel(p_, gate, channel) != shared_channel(p_, gate, channel - 1))
          add(gate, shared_channel(p_, gate, channel));
      };
      for (int64_t k = 0; k < 3 && c + K < c1_ && group(c + K) != group(c); ++k) add(p_.weights, group(c + K), k);
      for (int k = 0; k < K; ++k) {
        if (d == 0) add(p_.y, c + k);
        if (c + K + k >= c1_) continue;
        if (d == 0) add(p_.x, c + K + k);
        add_gate(p_.lam, c + K + k);
        add_gate(p_.u, c + K + k);
      }
    }
    return prefetcher;
  }

  const Params& p_;
  const int64_t n_, c0_, c1_;
  const int64_t pitch_, capacity_;
  WeightTile<S, A> weights_;
  GateTile<S, A> lam_[kTogether], u_[kTogether];
  Scratch<A> tiles_, state_;
  SummedPlanes<S, A> y_;
  FiniteCheck<A> check_;
  bool infinities_ = false;
};

template <class S>
void forward_all(const Params& p) {
  if constexpr (sizeof(Accumulator<S>) == sizeof(float)) {
    if (is_banded<S>(p)) return forward_bands<S>(p);
  }
  if (uses_lanes(p)) return forward_lanes<S>(p);
  const int64_t group = p.C / p.weights.channels, block = forward_block(p, sizeof(Accumulator<S>));
  const int64_t unit = max64(group, block);  // channels after which a task ends in any case
  const int64_t units = (p.C + unit - 1) / unit, blocks = (unit + block - 1) / block;
  run_tasks(p.N * units * blocks, p.threads, [&](int64_t task) {
    const int64_t b = task % blocks, i = task / blocks % units, n = task / (blocks * units);
    const int64_t c0 = i * unit + b * block, c1 = min64(min64(c0 + block, (i + 1) * unit), p.C);
    ForwardTask<S>(p, n, c0, c1).run();
  });
}

}  // namespace
