// What forward and backward share: scratch memory, planes of a field in scan order, and the weights of a tile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "gspn/params.hpp"
#include "lines.hpp"
#include "tile.hpp"

namespace {

using gspn::Field;
using gspn::Params;
using gspn::Scan;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// An aligned array of one task, uninitialised unless zeroed. No std::vector here: its code would be compiled for
// this instruction set and could be merged by the linker into callers that run on any machine.
template <class A>
class Scratch {
 public:
  Scratch() = default;
  explicit Scratch(int64_t count) {
    if (count == 0) return;
    data_ = static_cast<A*>(std::aligned_alloc(64, size_t(round_up(count * int64_t(sizeof(A)), 64))));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Scratch(Scratch&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Scratch() { std::free(data_); }
  A* get() const { return data_; }

 private:
  A* data_ = nullptr;
};

template <class A>
inline void fill_zero(A* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = A(0);
}

// Lines of a tile, a multiple of the checkpoint interval. Small images fit whole, so that every plane is read in one
// go. In a horizontal scan lines are columns, of which every row of a large image holds a piece in a page of its own:
// twice as many make half as many visits to each page.
inline int64_t tile_lines(const Params& p, const Scan& scan) {
  constexpr int64_t kElements = 8192;
  const int64_t fitting = kElements / max64(1, p.interval * scan.length);
  const int64_t lines = p.interval * max64(fitting, scan.horizontal ? 2 : 1);
  return min64(lines, round_up(scan.lines, p.interval));
}

inline int64_t most_tile_lines(const Params& p) {
  int64_t lines = 0;
  for (int d = 0; d < p.D; ++d) lines = max64(lines, tile_lines(p, gspn::make_scan(p, d)));
  return lines;
}

// Distance between the lines of a scratch tile; the odd number of cache lines keeps tiles of large images
// from falling on the same cache sets.
inline int64_t tile_pitch(int64_t length) { return round_up(length, 16) + 16; }

// Lines of state with their pads: line t starts at data + kPad + t * pitch.
inline int64_t state_pitch(int64_t length) { return round_up(length, 16) + 2 * kPad; }

template <class S>
inline Plane<S> scan_plane(const Field& f, const Scan& scan, int64_t n, int64_t d, int64_t c, int64_t k = 0) {
  S* data = static_cast<S*>(f.data) + n * f.n + d * f.d + c * f.c + k * f.k;
  int64_t line = scan.horizontal ? f.col : f.row;
  const int64_t position = scan.horizontal ? f.row : f.col;
  if (scan.reversed) {
    data += (scan.lines - 1) * line;
    line = -line;
  }
  return {data, line, position};
}

// Lines [i0, i0 + lines) of a plane: the tensor's own memory where it serves as it is, else a converted copy.
template <class S, class A>
inline Tile<const A> fetch(Plane<const S> plane, int64_t i0, int64_t lines, int64_t length, Tile<A> scratch) {
  const Plane<const S> from = plane.from_line(i0);
  if constexpr (sizeof(S) == sizeof(A)) {
    if (plane.position == 1) return {from.data, from.line};
  }
  load_tile(from, scratch, lines, length);
  return {scratch.data, scratch.pitch};
}

constexpr int64_t kPrefetchBytes = 64 * 1024;  // smaller planes stay in the cache between their tiles

// The channel of a field with fewer channels that serves channel c of x.
inline int64_t shared_channel(const Params& p, const Field& f, int64_t c) { return c / (p.C / f.channels); }

// Asks for the memory that comes next while the current tile is computed, a slice with every line. The processor's
// own prefetchers follow rows in ascending order, but neither columns nor rows in descending order, and large images
// wait for memory there. The hint names the second-level cache: asking for the first is limited to its few outstanding
// misses.
class Prefetcher {
 public:
  explicit Prefetcher(int64_t plane_bytes) : enabled_(plane_bytes >= kPrefetchBytes) {}

  // Forgets the planes added so far; of those that follow the tile that starts at line `next` is to come. Rows that are
  // read in ascending order are left to the processor.
  void begin(const Scan& scan, int64_t next, int64_t tile_lines, bool descending) {
    count_ = 0;
    next_ = next;
    lines_ = min64(tile_lines, scan.lines - next_);
    slices_ = tile_lines;
    active_ = enabled_ && next_ >= 0 && lines_ > 0 && (scan.horizontal || descending);
  }
  template <class S>
  void add(Plane<const S> plane, const Scan& scan) {
    const int64_t line = max64(plane.line, -plane.line);
    const bool rows_are_dense = (scan.horizontal ? line : plane.position) == 1;
    if (!active_ || !rows_are_dense || count_ == kMost) return;
    const int64_t low = plane.line < 0 ? next_ + lines_ - 1 : next_;
    const char* data = reinterpret_cast<const char*>(plane.from_line(low).data);
    if (scan.horizontal)
      pieces_[count_++] = {data, scan.length, lines_ * int64_t(sizeof(S)), plane.position * int64_t(sizeof(S))};
    else
      pieces_[count_++] = {data + (lines_ - 1) * line * int64_t(sizeof(S)), lines_, scan.length * int64_t(sizeof(S)),
                           -line * int64_t(sizeof(S))};
  }
  // The slice that goes with line t of the current tile. Inlined by force: GCC takes a function of nothing but
  // prefetches for one without effects and drops its calls.
  GSPN_INLINE void run(int64_t t) const {
    for (int i = 0; i < count_; ++i) {
      const Piece& piece = pieces_[i];
      const int64_t end = piece.rows * (t + 1) / slices_;
      for (int64_t row = piece.rows * t / slices_; row < end; ++row) {
        const char* first = piece.data + row * piece.stride;
        for (int64_t byte = 0; byte < piece.row_bytes; byte += kCacheLine) __builtin_prefetch(first + byte, 0, 2);
        __builtin_prefetch(first + piece.row_bytes - 1, 0, 2);
      }
    }
  }

 private:
  static constexpr int kMost = 8, kCacheLine = 64;
  struct Piece {
    const char* data;
    int64_t rows, row_bytes, stride;
  };
  bool enabled_, active_ = false;
  int count_ = 0;
  int64_t next_ = 0, lines_ = 0, slices_ = 1;
  Piece pieces_[kMost];
};

// A gate (lam or u) line by line; without a field every line is null, which stands for 1.
template <class S, class A>
class GateTile {
 public:
  GateTile(const Params& p, const Field& f, int64_t capacity) : p_(p), f_(f), scratch_(f ? capacity : 0) {}

  void load(const Scan& scan, int64_t n, int64_t d, int64_t c, int64_t i0, int64_t lines, int64_t pitch) {
    if (!f_) return;
    const int64_t channel = shared_channel(p_, f_, c);
    if (channel == channel_ && d == d_ && i0 == i0_) return;  // a neighbouring channel has loaded it
    channel_ = channel, d_ = d, i0_ = i0;
    tile_ = fetch<S, A>(scan_plane<const S>(f_, scan, n, d, channel), i0, lines, scan.length,
                        Tile<A>{scratch_.get(), pitch});
  }
  const A* line(int64_t t) const { return f_ ? tile_.line(t) : nullptr; }

 private:
  const Params& p_;
  const Field& f_;
  Scratch<A> scratch_;
  Tile<const A> tile_;
  int64_t channel_ = -1, d_ = -1, i0_ = -1;
};

// The weights of a tile, shared by all channels of a group: given ones as they stand, logits normalised once.
template <class S, class A>
class WeightTile {
 public:
  WeightTile(const Params& p, int64_t capacity)
      : p_(p), capacity_(capacity), raw_scratch_(3 * capacity), normalised_(p.stochastic ? 2 * capacity : 0) {}

  void load(const Scan& scan, int64_t n, int64_t d, int64_t group, int64_t i0, int64_t lines, int64_t pitch) {
    if (group == group_ && d == d_ && i0 == i0_) return;
    group_ = group, d_ = d, i0_ = i0;
    for (int64_t k = 0; k < 3; ++k)
      raw_[k] = fetch<S, A>(scan_plane<const S>(p_.weights, scan, n, d, group, k), i0, lines, scan.length,
                            Tile<A>{raw_scratch_.get() + k * capacity_, pitch});
    if (!p_.stochastic) return;
    a_ = {normalised_.get(), pitch};
    c_ = {normalised_.get() + capacity_, pitch};
    for (int64_t t = 0; t < lines; ++t)
      normalise_line(raw_[0].line(t), raw_[1].line(t), raw_[2].line(t), a_.line(t), c_.line(t), scan.length);
  }
  // Logits, or the given weights.
  const A* raw(int64_t k, int64_t t) const { return raw_[k].line(t); }
  Weights<A> line(int64_t t) const {
    if (p_.stochastic) return {a_.line(t), nullptr, c_.line(t)};
    return {raw(0, t), raw(1, t), raw(2, t)};
  }

 private:
  const Params& p_;
  int64_t capacity_;
  Scratch<A> raw_scratch_, normalised_;
  Tile<const A> raw_[3];
  Tile<A> a_, c_;
  int64_t group_ = -1, d_ = -1, i0_ = -1;
};

// Runs independent tasks on the given number of threads. An exception may not leave a parallel region; the only
// one a task throws is std::bad_alloc.
template <class Task>
void run_tasks(int64_t tasks, int threads, Task task) {
  bool out_of_memory = false;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && tasks > 1)
  for (int64_t i = 0; i < tasks; ++i) {
    try {
      task(i);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      out_of_memory = true;
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

inline bool starts_chunk(const Params& p, int64_t i) { return i == 0 || (p.chunk > 0 && i % p.chunk == 0); }

// One step of the recurrence; next and h are lines of state.
template <class A>
inline void step(const Params& p, int64_t i, const A* h, const Weights<A>& w, const A* x, const A* lam, A* next,
                 int64_t length) {
  if (starts_chunk(p, i)) {
    lam ? start_line<true>(x, lam, next, length) : start_line<false>(x, lam, next, length);
  } else {
    lam ? update_line<true>(h, w, x, lam, next, length) : update_line<false>(h, w, x, lam, next, length);
  }
}

inline int64_t max_length(const Params& p) {
  int64_t length = 0;
  for (int d = 0; d < p.D; ++d) length = max64(length, gspn::make_scan(p, d).length);
  return length;
}

// Sums over directions need the accumulation type: in place where the tensor has it, else in planes of scratch.
template <class S, class A>
class SummedPlanes {
 public:
  SummedPlanes(const Params& p, const Field& out, int64_t n, int64_t c0, int64_t count)
      : p_(p), out_(out), n_(n), c0_(c0), count_(count), planes_(direct() || !out ? 0 : count * p.H * p.W) {}

  // Adds (for the first direction: stores) factor * value, line by line, into channel c of the sum.
  template <class LineOf>
  void add(const Scan& scan, int64_t d, int64_t c, int64_t i0, int64_t lines, Tile<A> scratch, LineOf line_of) {
    if constexpr (sizeof(S) == sizeof(A)) {
      add_to(scan_plane<A>(out_, scan, n_, 0, c), scan, d == 0, i0, lines, scratch, line_of);
    } else if (direct()) {
      add_to(scan_plane<S>(out_, scan, n_, 0, c), scan, true, i0, lines, scratch, line_of);
    } else {
      const Field sums{planes_.get(), count_, 0, 0, p_.H * p_.W, 0, p_.W, 1};
      add_to(scan_plane<A>(sums, scan, 0, 0, c - c0_), scan, d == 0, i0, lines, scratch, line_of);
    }
  }

  // Converts the sums into the output, after the last direction.
  void finish() {
    if (direct() || !out_) return;
    const Scan rows{false, false, p_.H, p_.W};
    for (int64_t c = 0; c < count_; ++c)
      store_tile<Write::kStore>(Tile<A>{planes_.get() + c * p_.H * p_.W, p_.W},
                                scan_plane<S>(out_, rows, n_, 0, c0_ + c), p_.H, p_.W);
  }

 private:
  bool direct() const { return sizeof(S) == sizeof(A) || p_.D == 1; }

  template <class T, class LineOf>
  static void add_to(Plane<T> plane, const Scan& scan, bool first, int64_t i0, int64_t lines, Tile<A> scratch,
                     LineOf line_of) {
    plane = plane.from_line(i0);
    bool in_place = false;
    if constexpr (sizeof(T) == sizeof(A)) in_place = plane.position == 1;
    for (int64_t t = 0; t < lines; ++t) {
      A* out = scratch.line(t);
      if constexpr (sizeof(T) == sizeof(A)) {
        if (in_place) out = plane.data + t * plane.line;
      }
      const std::pair<const A*, const A*> value = line_of(t);
      if (first || !in_place)
        scale_line<Write::kStore>(value.first, value.second, out, scan.length);
      else
        scale_line<Write::kAdd>(value.first, value.second, out, scan.length);
    }
    if (in_place) return;
    if (first)
      store_tile<Write::kStore>(scratch, plane, lines, scan.length);
    else
      store_tile<Write::kAdd>(scratch, plane, lines, scan.length);
  }

  const Params& p_;
  const Field& out_;
  int64_t n_, c0_, count_;
  Scratch<A> planes_;
};

}  // namespace
