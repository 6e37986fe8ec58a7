// Forward: y = sum_d u_d h_d. A task owns a block of channels of one image and one weight group, and all directions
// of it, so that every output is written by one thread, in a fixed order.
#pragma once

#include "scan.hpp"

namespace {

// Channels of a task. They share the normalised weights of a tile, so more are better, as long as their planes
// stay in the second-level cache and every thread gets work. No result depends on the choice.
inline int64_t forward_block(const Params& p, int64_t element_size) {
  constexpr int64_t kCacheBytes = 512 * 1024, kFewest = 8;
  const int64_t group = p.C / p.weights.channels;
  const int64_t fitting = kCacheBytes / max64(1, 2 * p.H * p.W * element_size);
  const int64_t cached = min64(group, max64(fitting, kFewest));
  const int64_t parallel = max64(1, p.N * p.C / p.threads);
  return max64(1, min64(cached, parallel));
}

template <class S>
void forward_task(const Params& p, int64_t n, int64_t c0, int64_t c1) {
  using A = Accumulator<S>;
  const int64_t length = max_length(p), pitch = tile_pitch(length), capacity = most_tile_lines(p) * pitch;
  const int64_t channels = c1 - c0, group = shared_channel(p, p.weights, c0);
  const int64_t row = state_pitch(length), total = gspn::checkpoint_offset(p, p.D);
  const bool cold = p.N * p.C * p.H * p.W * int64_t(sizeof(S)) >= kColdBytes;

  WeightTile<S, A> weights(p, capacity);
  GateTile<S, A> lam(p, p.lam, capacity), u(p, p.u, capacity);
  Scratch<A> tile(capacity + kPad), state(channels * 2 * row);  // the tile of x, line by line overwritten by that of h
  SummedPlanes<S, A> y(p, p.y, n, c0, channels);
  fill_zero(tile.get(), capacity + kPad);

  for (int d = 0; d < p.D; ++d) {
    const Scan scan = gspn::make_scan(p, d);
    const int64_t most_lines = tile_lines(p, scan), checkpoint_lines = gspn::checkpoint_lines(p, scan);
    fill_zero(state.get(), channels * 2 * row);
    for (int64_t i0 = 0; i0 < scan.lines; i0 += most_lines) {
      const Span span = make_span(p, scan, i0, most_lines, pitch, sizeof(S));
      weights.load(scan, n, d, group, span);
      for (int64_t c = c0; c < c1; ++c) {
        const Plane<const S> x_plane = scan_plane<const S>(p.x, scan, n, 0, c);
        const Tile<const A> x = fetch<S, A>(x_plane, span, scan.length, tile, kPad);
        lam.load(scan, n, d, c, span);
        u.load(scan, n, d, c, span);
        const bool descending = descends(p, scan, true, sizeof(S));
        LinePrefetcher prefetcher(scan, !descending ? 0 : sizeof(S) == sizeof(A) ? 1 : most_lines, sizeof(S));
        if (descending) {
          prefetcher.add(x_plane);
          prefetcher.add(scan_plane<const S>(p.y, scan, n, 0, c));
          for (int64_t k = 0; k < 3 && c == c0; ++k)
            prefetcher.add(scan_plane<const S>(p.weights, scan, n, d, group, k));
          if (p.lam) prefetcher.add(scan_plane<const S>(p.lam, scan, n, d, shared_channel(p, p.lam, c)));
          if (p.u) prefetcher.add(scan_plane<const S>(p.u, scan, n, d, shared_channel(p, p.u, c)));
        } else if (d == 0 && cold && (scan.horizontal || scan.reversed) && span.lines == scan.lines) {
          // A whole plane in one go: while it is scanned, the memory of its output and of the next input is asked for.
          prefetcher.add(in_parts<S>(p, p.y, scan, n, c));
          if (c + 1 < c1) prefetcher.add(in_parts<S>(p, p.x, scan, n, c + 1));
        }
        A* const states = state.get() + (c - c0) * 2 * row + kPad;  // the last two lines, by parity
        const auto state_line = [&](int64_t i) { return states + (i & 1) * row; };
        A* const checkpoints = p.checkpoints == nullptr ? nullptr
                                                        : static_cast<A*>(p.checkpoints) + (n * p.C + c) * total +
                                                              gspn::checkpoint_offset(p, d);
        y.add(scan, d, c, span, tile, [&](int64_t t, A* out) {
          const int64_t i = i0 + t;
          // Where h is the output, the tile of the output serves as state.
          const bool direct = out != nullptr && !p.u;
          const A* const before = direct && t > 0 ? out - span.pitch : state_line(i + 1);
          A* const h = direct ? out : state_line(i);
          if (prefetcher.aim(i))
            step(p, i, before, weights.line(t), x.line(t), lam.line(t), h, scan.length, prefetcher);
          else
            step(p, i, before, weights.line(t), x.line(t), lam.line(t), h, scan.length);
          if (direct) {
            h[scan.length] = A(0);
            if (t == span.lines - 1) load_line(h, state_line(i), scan.length);
          }
          if (checkpoints != nullptr && (i + 1) % p.interval == 0 && i / p.interval < checkpoint_lines)
            load_line(h, checkpoints + i / p.interval * scan.length, scan.length);
          return std::pair<const A*, const A*>(h, u.line(t));
        });
      }
    }
  }
  y.finish();
}

template <class S>
void forward_all(const Params& p) {
  const int64_t group = p.C / p.weights.channels, block = forward_block(p, sizeof(Accumulator<S>));
  const int64_t blocks_per_group = (group + block - 1) / block;
  const int64_t tasks = p.N * p.weights.channels * blocks_per_group;
  run_tasks(tasks, p.threads, [&](int64_t task) {
    const int64_t b = task % blocks_per_group, g = task / blocks_per_group % p.weights.channels;
    const int64_t n = task / (blocks_per_group * p.weights.channels);
    const int64_t c0 = g * group + b * block, c1 = min64(c0 + block, (g + 1) * group);
    forward_task<S>(p, n, c0, c1);
  });
}

}  // namespace
