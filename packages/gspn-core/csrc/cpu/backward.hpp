// Backward, in scan order: g is the gradient of the state, v the part of it that comes from the next line. Runs through
// the tiles from the last to the first, and recomputes the states of each from the checkpoint before it.
#pragma once

#include "lane_backward.hpp"

namespace {

// Partial sums of one field's gradient, (tasks of a unit, N, D, channels, planes, H, W); zero if a task has no channel
// of a group.
template <class A>
struct Partial {
  Scratch<A> data;
  Field field;
  int64_t stride = 0, tasks = 0;

  Partial(const Params& p, const Split& split, const Field& f, const Field& gradient, int64_t planes) {
    if (!gradient || split.tasks == 1 || !split.cuts(p, f)) return;
    const int64_t plane = p.H * p.W, channels = f.channels;
    stride = p.N * p.D * channels * planes * plane;
    tasks = split.tasks;
    data = Scratch<A>(tasks * stride);
    fill_zero(data.get(), tasks * stride);
    field = {data.get(), channels, p.D * channels * planes * plane, channels * planes * plane, planes * plane, plane,
             p.W,        1};
  }
  Field of_task(int64_t task) const {
    Field f = field;
    f.data = static_cast<A*>(field.data) + task * stride;
    return f;
  }
  // Adds all sums to the first, which then holds the whole sum.
  void reduce(const Params& p) {
    run_tasks((stride + kReducedElements - 1) / kReducedElements, p.threads, [&](int64_t task) {
      const int64_t begin = task * kReducedElements, size = min64(kReducedElements, stride - begin);
      for (int64_t apart = 1; apart < tasks; apart *= 2)
        for (int64_t i = 0; i + apart < tasks; i += 2 * apart)
          scale_line<Write::kAdd, A>(data.get() + (i + apart) * stride + begin, nullptr,
                                     data.get() + i * stride + begin, size);
    });
  }
  explicit operator bool() const { return bool(field); }
};

// Sums of a tile over the channels of a task: over those of a part, and from the part on over ever larger subtrees.
template <class A>
class TileSums {
 public:
  TileSums(bool wanted, int64_t parts, int64_t capacity) : part_(wanted ? capacity : 0) {
    for (int64_t size = 1; wanted && size < parts; size *= 2) subtrees_[levels_++] = Scratch<A>(capacity);
  }
  void begin(int64_t count) {
    count_ = count, held_ = 0;
    fill_zero(part_.get(), count);
  }
  A* part() const { return part_.get(); }
  // Ends the task's part of this index, and begins the next.
  void end_part(int64_t index) {
    if (levels_ == 0) return;
    int level = 0;
    for (; index >> level & 1; ++level) add_subtree(level);
    std::swap(part_, subtrees_[level]);
    held_ |= 1 << level;
    fill_zero(part_.get(), count_);
  }
  // Adds everything to the last part.
  void finish() {
    for (int level = 0; level < levels_; ++level) add_subtree(level);
  }

 private:
  void add_subtree(int level) {
    if (!(held_ >> level & 1)) return;
    held_ &= ~(1 << level);
    scale_line<Write::kAdd, A>(part_.get(), nullptr, subtrees_[level].get(), count_);
    std::swap(part_, subtrees_[level]);
  }

  static constexpr int kMostLevels = 4;  // of 16 parts
  Scratch<A> part_, subtrees_[kMostLevels];
  int levels_ = 0, held_ = 0;  // bit l of held_: subtrees_[l] holds the sum of 2^l parts
  int64_t count_ = 0;
};

// The gradient of one gate in the current tile, summed over channels; stored when the next channel of the gate begins.
template <class S, class A>
class GateGradient {
 public:
  GateGradient(const Params& p, const Field& gate, const Field& gradient, const Field& partial, int64_t parts,
               int64_t capacity)
      : p_(p), gate_(gate), gradient_(gradient), partial_(partial), sums_(bool(gradient), parts, capacity) {}

  void begin(const Scan& scan, int64_t n, int64_t d, int64_t c, const Span& span) {
    if (!gradient_ || shared_channel(p_, gate_, c) == channel_) return;
    flush();
    scan_ = scan, n_ = n, d_ = d, span_ = span;
    channel_ = shared_channel(p_, gate_, c);
    sums_.begin(span.lines * span.pitch);
  }
  void add(int64_t t, const A* a, const A* b) {
    if (gradient_) accumulate_product_line(a, b, sums_.part() + t * span_.pitch, scan_.length);
  }
  void end_part(int64_t index) { sums_.end_part(index); }
  void flush() {
    if (!gradient_ || channel_ < 0) return;
    sums_.finish();
    const Tile<A> tile{sums_.part(), span_.pitch};
    if (partial_)
      store_tile<Write::kStore>(tile, span_plane(scan_plane<A>(partial_, scan_, n_, d_, channel_), span_), span_.lines,
                                scan_.length);
    else
      store_tile<Write::kStore>(tile, span_plane(scan_plane<S>(gradient_, scan_, n_, d_, channel_), span_), span_.lines,
                                scan_.length);
    channel_ = -1;
  }

 private:
  const Params& p_;
  const Field &gate_, &gradient_;
  Field partial_;
  TileSums<A> sums_;
  Scan scan_{};
  Span span_{};
  int64_t n_ = 0, d_ = 0, channel_ = -1;
};

// The same for the weights of a group: for logits, the sums p and q and the Jacobian of the normalisation; otherwise
// the sums of g h[j-1], g h[j], g h[j+1].
template <class S, class A>
class WeightGradient {
 public:
  WeightGradient(const Params& p, const Field& partial, int64_t parts, int64_t capacity)
      : p_(p), partial_(partial), capacity_(capacity), sums_(bool(p.dweights), parts, 3 * capacity) {}

  void begin(const Scan& scan, int64_t n, int64_t d, int64_t group, const Span& span) {
    scan_ = scan, n_ = n, d_ = d, group_ = group, span_ = span;
    if (p_.dweights) sums_.begin(3 * capacity_);
  }
  // h is the state before line t of the span.
  void add(int64_t t, const A* g, const A* h) {
    if (!p_.dweights || starts_chunk(p_, span_.begin + t)) return;
    if (p_.stochastic) {
      accumulate_differences_line(g, h, line(0, t), line(2, t), scan_.length);
    } else {
      for (int64_t k = 0; k < 3; ++k) accumulate_product_line(g, h + k - 1, line(k, t), scan_.length);
    }
  }
  void end_part(int64_t index) { sums_.end_part(index); }
  void flush(const WeightTile<S, A>& weights) {
    if (!p_.dweights) return;
    sums_.finish();
    if (partial_) {
      store<A>(partial_);
      return;
    }
    if (p_.stochastic) apply_jacobian(weights);
    store<S>(p_.dweights);
  }
  // Loads the tile's sums from the partial ones; flush then completes them.
  void read_back(const Field& sums) {
    for (int64_t k = 0; k < 3; k += 2)
      load_tile(span_plane(scan_plane<const A>(sums, scan_, n_, d_, group_, k), span_), tile(k), span_.lines,
                scan_.length);
  }

 private:
  Tile<A> tile(int64_t k) const { return {sums_.part() + k * capacity_, span_.pitch}; }
  A* line(int64_t k, int64_t t) const { return tile(k).line(t); }

  void apply_jacobian(const WeightTile<S, A>& weights) {
    for (int64_t t = 0; t < span_.lines; ++t) {
      if (starts_chunk(p_, span_.begin + t)) continue;  // zero, whatever the logits
      const Weights<A> w = weights.line(t);
      logit_gradients_line(weights.raw(0, t), weights.raw(1, t), weights.raw(2, t), w.a, w.c, line(0, t), line(1, t),
                           line(2, t), scan_.length);
    }
  }
  template <class T>
  void store(const Field& f) {
    for (int64_t k = 0; k < 3; ++k)
      store_tile<Write::kStore>(tile(k), span_plane(scan_plane<T>(f, scan_, n_, d_, group_, k), span_), span_.lines,
                                scan_.length);
  }

  const Params& p_;
  Field partial_;
  int64_t capacity_;
  TileSums<A> sums_;
  Scan scan_{};
  Span span_{};
  int64_t n_ = 0, d_ = 0, group_ = 0;
};

template <class S, class A = Accumulator<S>>
void backward_task(const Params& p, const Split& split, int64_t n, int64_t c0, int64_t c1, const Field& weights_partial,
                   const Field& lam_partial, const Field& u_partial) {
  const int64_t length = max_length(p), pitch = tile_pitch(length), most = most_tile_lines(p);
  const int64_t capacity = most * pitch;
  const int64_t row = state_pitch(length), total = gspn::checkpoint_offset(p, p.D), channels = c1 - c0;
  const bool need_states = p.dweights || p.du;

  WeightTile<S, A> weights(p, capacity);
  GateTile<S, A> lam(p, p.lam, capacity), u(p, p.u, capacity);
  const auto parts = [&](const Field& f) { return split.cuts(p, f) ? split.per_task : 1; };
  GateGradient<S, A> dlam(p, p.lam, p.dlam, lam_partial, parts(p.lam), capacity);
  GateGradient<S, A> du(p, p.u, p.du, u_partial, parts(p.u), capacity);
  WeightGradient<S, A> dweights(p, weights_partial, parts(p.weights), capacity);
  SummedPlanes<S, A> dx(p, p.dx, n, c0, channels);
  Scratch<A> x_scratch(capacity), dy_scratch(capacity), dx_scratch(capacity);
  Scratch<A> adjoints(capacity);                          // g of every line of the tile
  Scratch<A> flow(channels * pitch);                      // v of every channel
  Scratch<A> states(need_states ? (most + 1) * row : 0);  // h of every line of the tile and the one before
  const auto g_line = [&](int64_t t) { return adjoints.get() + t * pitch; };
  const auto h_line = [&](int64_t t) {
    return states.get() + (t + 1) * row + kPad;
  };  // t = -1: the state before the tile

  for (int d = 0; d < p.D; ++d) {
    const Scan scan = gspn::make_scan(p, d);
    const int64_t most_lines = tile_lines(p, scan);
    fill_zero(flow.get(), channels * pitch);
    if (need_states) fill_zero(states.get(), (most + 1) * row);
    for (int64_t i0 = (scan.lines - 1) / most_lines * most_lines; i0 >= 0; i0 -= most_lines) {
      const Span span = make_span(p, scan, i0, -most_lines, pitch, sizeof(S));
      const int64_t lines = span.lines, checkpoint = i0 / p.interval - 1;
      int64_t group = -1;
      for (int64_t c = c0; c < c1; ++c) {
        if (shared_channel(p, p.weights, c) != group) {
          if (group >= 0) dweights.flush(weights);
          group = shared_channel(p, p.weights, c);
          weights.load(scan, n, d, group, span);
          dweights.begin(scan, n, d, group, span);
        }
        const Plane<const S> x_plane = scan_plane<const S>(p.x, scan, n, 0, c);
        const Plane<const S> dy_plane = scan_plane<const S>(p.dy, scan, n, 0, c);
        const Tile<const A> x = fetch<S, A>(x_plane, span, scan.length, x_scratch.get());
        const Tile<const A> dy = fetch<S, A>(dy_plane, span, scan.length, dy_scratch.get());
        lam.load(scan, n, d, c, span);
        u.load(scan, n, d, c, span);
        if (c > c0 && (c - c0) % split.part == 0) {
          const int64_t ended = (c - c0) / split.part - 1;
          dweights.end_part(ended);
          dlam.end_part(ended);
          du.end_part(ended);
        }
        dlam.begin(scan, n, d, c, span);
        du.begin(scan, n, d, c, span);
        if (need_states) {
          if (checkpoint >= 0 && checkpoint < gspn::checkpoint_lines(p, scan))
            load_line(static_cast<const A*>(p.checkpoints) + (n * p.C + c) * total + gspn::checkpoint_offset(p, d) +
                          checkpoint * scan.length,
                      h_line(-1), scan.length);
          FiniteCheck<A> check;
          const auto scan_tile = [&](bool infinities) {
            for (int64_t t = 0; t < lines; ++t) {
              const bool starts = starts_chunk(p, i0 + t);
              if (starts && needs_finite(p)) check.add(h_line(t - 1), scan.length);
              step<1>(starts, Lines<1, A>{{h_line(t - 1)}, {x.line(t)}, {lam.line(t)}, {h_line(t)}}, weights.line(t),
                      scan.length, infinities);
            }
            if (needs_finite(p)) check.add(h_line(lines - 1), scan.length);
          };
          scan_tile(false);
          if (!check.finite()) scan_tile(true);
        }
        LinePrefetcher prefetcher(scan, -most_lines, sizeof(S));
        if (descends(p, scan, false, sizeof(S))) {
          prefetcher.add(x_plane);
          prefetcher.add(dy_plane);
          if (p.dx) prefetcher.add(scan_plane<const S>(p.dx, scan, n, 0, c));
          for (int64_t k = 0; k < 3 && c == c0; ++k)
            prefetcher.add(scan_plane<const S>(p.weights, scan, n, d, group, k));
        }
        A* const v = flow.get() + (c - c0) * pitch;
        for (int64_t t = lines - 1; t >= 0; --t) {
          const A* const g = g_line(t);
          if (prefetcher.select(i0 + t)) prefetcher.whole_line();
          adjoint_line(dy.line(t), u.line(t), v, g_line(t), scan.length);
          dlam.add(t, g, x.line(t));
          if (p.du) du.add(t, dy.line(t), h_line(t));
          if (p.dweights) dweights.add(t, g, h_line(t - 1));
          if (starts_chunk(p, i0 + t))
            fill_zero(v, scan.length);
          else if (p.stochastic)
            propagate_adjoint_line<false>(g, weights.line(t), v, scan.length);
          else
            propagate_adjoint_line<true>(g, weights.line(t), v, scan.length);
        }
        if (p.dx) {
          const SumLines<S, A> sum = dx.lines(scan, d, c, span, {dx_scratch.get(), span.pitch});
          for (int64_t t = 0; t < lines; ++t) sum.add(t, g_line(t), lam.line(t), scan.length);
          sum.finish(lines, scan.length);
        }
      }
      dweights.flush(weights);
      dlam.flush();
      du.flush();
    }
  }
  dx.finish();
}

// Turns the sums over all channels of a group into the gradients of its weights.
template <class S, class A = Accumulator<S>>
void finish_weights(const Params& p, const Field& sums) {
  run_tasks(p.N * p.D * p.weights.channels, p.threads, [&](int64_t task) {
    const int64_t group = task % p.weights.channels, d = task / p.weights.channels % p.D;
    const int64_t n = task / (p.weights.channels * p.D);
    const Scan scan = gspn::make_scan(p, int(d));
    const int64_t pitch = tile_pitch(scan.length), most_lines = tile_lines(p, scan), capacity = most_lines * pitch;
    WeightTile<S, A> weights(p, capacity);
    WeightGradient<S, A> dweights(p, Field{}, 1, capacity);
    for (int64_t i0 = 0; i0 < scan.lines; i0 += most_lines) {
      const Span span = make_span(p, scan, i0, most_lines, pitch, sizeof(S));
      weights.load(scan, n, d, group, span);
      dweights.begin(scan, n, d, group, span);
      dweights.read_back(sums);
      dweights.flush(weights);
    }
  });
}

template <class S, class A = Accumulator<S>>
void finish_gate(const Params& p, const Field& sums, const Field& gradient) {
  const Scan rows{false, false, p.H, p.W};
  run_tasks(p.N * p.D * sums.channels, p.threads, [&](int64_t task) {
    const int64_t c = task % sums.channels, d = task / sums.channels % p.D, n = task / (sums.channels * p.D);
    const Plane<A> from = scan_plane<A>(sums, rows, n, d, c);
    store_tile<Write::kStore>(Tile<A>{from.data, from.line}, scan_plane<S>(gradient, rows, n, d, c), p.H, p.W);
  });
}

template <class S>
void backward_all(const Params& p) {
  using A = Accumulator<S>;
  if (uses_lanes(p)) return backward_lanes<S>(p);
  const Split split(p);
  Partial<A> weights(p, split, p.weights, p.dweights, 3), lam(p, split, p.lam, p.dlam, 1), u(p, split, p.u, p.du, 1);
  const int64_t units = p.C / split.unit;
  run_tasks(p.N * units * split.tasks, p.threads, [&](int64_t task) {
    const int64_t of_unit = task % split.tasks, unit = task / split.tasks % units, n = task / (split.tasks * units);
    const int64_t channels = split.per_task * split.part, c0 = unit * split.unit + of_unit * channels;
    backward_task<S>(p, split, n, c0, min64(c0 + channels, (unit + 1) * split.unit), weights.of_task(of_unit),
                     lam.of_task(of_unit), u.of_task(of_unit));
  });
  if (weights) {
    weights.reduce(p);
    finish_weights<S>(p, weights.field);
  }
  if (lam) {
    lam.reduce(p);
    finish_gate<S>(p, lam.field, p.dlam);
  }
  if (u) {
    u.reduce(p);
    finish_gate<S>(p, u.field, p.du);
  }
}

}  // namespace
