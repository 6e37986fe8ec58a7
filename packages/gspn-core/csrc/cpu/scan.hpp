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
  constexpr int64_t kWhole = 16384, kElements = 8192;
  const int64_t all = round_up(scan.lines, p.interval);
  if (p.H * p.W <= kWhole) return all;
  const int64_t fitting = kElements / max64(1, p.interval * scan.length);
  return min64(all, p.interval * max64(fitting, scan.horizontal ? 2 : 1));
}

// Whether a tile holds all lines, in every direction.
inline bool tiles_are_whole(const Params& p) {
  for (int d = 0; d < p.D; ++d) {
    const Scan scan = gspn::make_scan(p, d);
    if (tile_lines(p, scan) < scan.lines) return false;
  }
  return true;
}

inline int64_t most_tile_lines(const Params& p) {
  int64_t lines = 0;
  for (int d = 0; d < p.D; ++d) lines = max64(lines, tile_lines(p, gspn::make_scan(p, d)));
  return lines;
}

// Distance between the lines of a scratch tile; the odd number of cache lines keeps tiles of large images
// from falling on the same cache sets.
inline int64_t tile_pitch(int64_t length) { return round_up(length, kLanes) + 16; }

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

constexpr int64_t kPrefetchBytes = 64 * 1024;       // smaller planes stay in the cache between their tiles
constexpr int64_t kColdBytes = 14 * 1024 * 1024;    // more come from memory, fewer from a cache
constexpr int64_t kStreamBytes = 64 * 1024 * 1024;  // larger outputs do not stay in any cache

// Whether what the forward pass reads and writes comes from memory.
inline bool is_cold(const Params& p, int64_t element) {
  const int64_t per_direction = 3 * p.weights.channels + (p.lam ? p.lam.channels : 0) + (p.u ? p.u.channels : 0);
  return p.N * (2 * p.C + p.D * per_direction) * p.H * p.W * element >= kColdBytes;
}

inline bool is_large(const Params& p, int64_t element) { return p.H * p.W * element >= kPrefetchBytes; }

// Whether the output is written past the caches: a single direction is not read again here, and the caches do not hold
// so many planes for whoever reads them next.
template <class S>
bool streams(const Params& p) {
  return p.D == 1 && p.N * p.C * p.H * p.W * int64_t(sizeof(S)) >= kStreamBytes;
}

// The lines [begin, begin + lines) of a scan that are worked on together.
struct Span {
  int64_t begin, lines;
  int64_t pitch;      // between lines of scratch
  int64_t ahead = 0;  // lines from here to the tile that follows, negative in the backward pass; 0: none follows
  bool prefetch = false;
};

inline Span make_span(const Params& p, const Scan& scan, int64_t begin, int64_t step, int64_t pitch, int64_t element) {
  const int64_t next = begin + step, most_lines = step < 0 ? -step : step;
  const bool prefetch = scan.horizontal && is_large(p, element);
  return {begin, min64(most_lines, scan.lines - begin), pitch, next >= 0 && next < scan.lines ? step : 0, prefetch};
}

template <class S>
inline Plane<S> span_plane(const Plane<S>& plane, const Span& span) {
  return {plane.data + span.begin * plane.line, plane.line, plane.position, span.ahead * plane.line, span.prefetch};
}

// Whether lines can be worked on where they stand.
template <class S>
inline bool serves_as_lines(const Plane<S>& plane, int64_t length) {
  return plane.position == 1 && length >= kLanes;
}

// A span of a plane: the tensor's own memory where it serves as it is, else a converted copy.
template <class S, class A>
inline Tile<const A> fetch(Plane<const S> plane, const Span& span, int64_t length, A* scratch) {
  const Plane<const S> from = span_plane(plane, span);
  if constexpr (sizeof(S) == sizeof(A)) {
    if (serves_as_lines(plane, length)) return {from.data, from.line};
  }
  const Tile<A> copy{scratch, span.pitch};
  load_tile(from, copy, span.lines, length);
  return {copy.data, copy.pitch};
}

// The channel of a field with fewer channels that serves channel c of x.
inline int64_t shared_channel(const Params& p, const Field& f, int64_t c) { return c / (p.C / f.channels); }

// Asks for a line of some planes with every line that is computed: where the processor's own prefetchers do not see it
// coming.
class LinePrefetcher {
 public:
  // lead: lines from the one that is computed to the one asked for, negative in the backward pass.
  LinePrefetcher(const Scan& scan, int64_t lead, int64_t element)
      : lines_(scan.lines), length_(scan.length), lead_(lead), element_(element) {}
  template <class S>
  void add(const Plane<const S>& plane) {
    if (plane.position != 1 || count_ == kMost) return;
    planes_[count_++] = {reinterpret_cast<const char*>(plane.data), plane.line * int64_t(sizeof(S)), nullptr};
  }
  // Tells whether line i has a line ahead of it, and aims at that.
  bool aim(int64_t i) {
    const int64_t line = i + lead_;
    if (count_ == 0 || line < 0 || line >= lines_) return false;
    for (int k = 0; k < count_; ++k) planes_[k].row = planes_[k].data + line * planes_[k].stride;
    return true;
  }
  // Called with every eighth position, asks for each cache line of the rows once. Inlined by force, as prefetch_rows
  // is.
  GSPN_INLINE void operator()(int64_t j) const {
    const int64_t byte = j * element_;
    if (byte % kCacheLine >= kLanes * element_) return;
    for (int k = 0; k < count_; ++k) __builtin_prefetch(planes_[k].row + byte, 0, 2);
  }
  GSPN_INLINE void whole_line() const {
    for (int64_t j = 0; j < length_; j += kLanes) (*this)(j);
  }

 private:
  static constexpr int kMost = 12;
  struct PlaneRows {
    const char* data;
    int64_t stride;
    const char* row;
  };
  int count_ = 0;
  int64_t lines_, length_, lead_, element_;
  PlaneRows planes_[kMost];
};

// Rows in descending order, which the processor does not follow. (Those in ascending order it does.)
inline bool descends(const Params& p, const Scan& scan, bool forward, int64_t element) {
  return !scan.horizontal && scan.reversed == forward && is_large(p, element);
}

// A dense plane as if it were in lines of this scan: a part of the plane for each of the scan's lines. Else nothing.
template <class S>
inline Plane<const S> in_parts(const Params& p, const Field& f, const Scan& scan, int64_t n, int64_t d, int64_t c,
                               int64_t k) {
  const Plane<const S> rows = scan_plane<const S>(f, Scan{false, false, p.H, p.W}, n, d, c, k);
  const bool dense = rows.position == 1 && rows.line == p.W;
  return {rows.data, scan.length, dense ? 1 : 0};
}

// A gate (lam or u) line by line; without a field every line is null, which stands for 1.
template <class S, class A>
class GateTile {
 public:
  GateTile(const Params& p, const Field& f, int64_t capacity) : p_(p), f_(f), scratch_(f ? capacity : 0) {}

  void load(const Scan& scan, int64_t n, int64_t d, int64_t c, const Span& span) {
    if (!f_) return;
    const int64_t channel = shared_channel(p_, f_, c);
    if (channel == channel_ && d == d_ && span.begin == begin_) return;  // a neighbouring channel has loaded it
    channel_ = channel, d_ = d, begin_ = span.begin;
    tile_ = fetch<S, A>(scan_plane<const S>(f_, scan, n, d, channel), span, scan.length, scratch_.get());
  }
  const A* line(int64_t t) const { return f_ ? tile_.line(t) : nullptr; }

 private:
  const Params& p_;
  const Field& f_;
  Scratch<A> scratch_;
  Tile<const A> tile_;
  int64_t channel_ = -1, d_ = -1, begin_ = -1;
};

// The weights of a tile, shared by all channels of a group: given ones as they stand, logits normalised once.
template <class S, class A>
class WeightTile {
 public:
  WeightTile(const Params& p, int64_t capacity)
      : p_(p), capacity_(capacity), raw_scratch_(3 * capacity), normalised_(p.stochastic ? 2 * capacity : 0) {}

  void load(const Scan& scan, int64_t n, int64_t d, int64_t group, const Span& span) {
    if (group == group_ && d == d_ && span.begin == begin_) return;
    group_ = group, d_ = d, begin_ = span.begin;
    for (int64_t k = 0; k < 3; ++k)
      raw_[k] = fetch<S, A>(scan_plane<const S>(p_.weights, scan, n, d, group, k), span, scan.length,
                            raw_scratch_.get() + k * capacity_);
    if (!p_.stochastic) return;
    a_ = {normalised_.get(), span.pitch};
    c_ = {normalised_.get() + capacity_, span.pitch};
    for (int64_t t = 0; t < span.lines; ++t)
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
  int64_t group_ = -1, d_ = -1, begin_ = -1;
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

// One step of the recurrence for K channels. All of them have a gate lam, or none has.
template <int K, class A, class Ahead = NothingAhead>
inline void step(const Params& p, int64_t i, const Lines<K, A>& lines, const Weights<A>& w, int64_t length,
                 const Ahead& ahead = {}) {
  const bool lam = lines.lam[0] != nullptr;
  if (starts_chunk(p, i)) {
    lam ? start_lines<K, true>(lines, length) : start_lines<K, false>(lines, length);
  } else if (w.b == nullptr) {
    lam ? update_lines<K, true, false>(lines, w, length, ahead)
        : update_lines<K, false, false>(lines, w, length, ahead);
  } else {
    lam ? update_lines<K, true, true>(lines, w, length, ahead) : update_lines<K, false, true>(lines, w, length, ahead);
  }
}

inline int64_t max_length(const Params& p) {
  int64_t length = 0;
  for (int d = 0; d < p.D; ++d) length = max64(length, gspn::make_scan(p, d).length);
  return length;
}

// Where the lines of a span of one channel's sum over directions go: into the tensor where it serves as it is, else
// into a tile that is stored in the end.
template <class S, class A>
class SumLines {
 public:
  SumLines() = default;
  // One of the planes is null: sums in the accumulation type, or the tensor.
  SumLines(const Plane<A>& sums, const Plane<S>& tensor, bool first, const Tile<A>& tile, int64_t length)
      : sums_(sums),
        tensor_(tensor),
        tile_(tile),
        first_(first),
        in_place_(sums.data != nullptr && serves_as_lines(sums, length)) {}

  // Whether a line may be written as if nothing were to be added to.
  bool stores() const { return first_ || !in_place_; }
  A* line(int64_t t) const { return in_place_ ? sums_.data + t * sums_.line : tile_.line(t); }
  // Adds (for the first direction: stores) factor * value, where a null factor is 1.
  void add(int64_t t, const A* value, const A* factor, int64_t length) const {
    stores() ? scale_line<Write::kStore>(value, factor, line(t), length)
             : scale_line<Write::kAdd>(value, factor, line(t), length);
  }
  void finish(int64_t lines, int64_t length) const {
    if (in_place_) return;
    if (sums_.data == nullptr)
      store_tile<Write::kStore>(tile_, tensor_, lines, length);
    else if (first_)
      store_tile<Write::kStore>(tile_, sums_, lines, length);
    else
      store_tile<Write::kAdd>(tile_, sums_, lines, length);
  }

 private:
  Plane<A> sums_;
  Plane<S> tensor_;
  Tile<A> tile_;
  bool first_ = false, in_place_ = false;
};

// Sums over directions need the accumulation type: in place where the tensor has it, else in planes of scratch.
template <class S, class A>
class SummedPlanes {
 public:
  SummedPlanes(const Params& p, const Field& out, int64_t n, int64_t c0, int64_t count)
      : p_(p), out_(out), n_(n), c0_(c0), count_(count), planes_(direct() || !out ? 0 : count * p.H * p.W) {}

  SumLines<S, A> lines(const Scan& scan, int64_t d, int64_t c, const Span& span, const Tile<A>& tile) const {
    Plane<A> sums{};
    Plane<S> tensor{};
    if constexpr (sizeof(S) == sizeof(A)) {
      sums = scan_plane<A>(out_, scan, n_, 0, c);
    } else if (direct()) {
      tensor = scan_plane<S>(out_, scan, n_, 0, c);
    } else {
      const Field field{planes_.get(), count_, 0, 0, p_.H * p_.W, 0, p_.W, 1};
      sums = scan_plane<A>(field, scan, 0, 0, c - c0_);
    }
    if (sums.data != nullptr) sums = span_plane(sums, span);
    if (tensor.data != nullptr) tensor = span_plane(tensor, span);
    sums.stream = tensor.stream = streams<S>(p_);
    return {sums, tensor, d == 0, tile, scan.length};
  }

  // Converts the sums into the output, after the last direction.
  void finish() {
    end_of_stream();
    if (direct() || !out_) return;
    const Scan rows{false, false, p_.H, p_.W};
    for (int64_t c = 0; c < count_; ++c)
      store_tile<Write::kStore>(Tile<A>{planes_.get() + c * p_.H * p_.W, p_.W},
                                scan_plane<S>(out_, rows, n_, 0, c0_ + c), p_.H, p_.W);
  }

 private:
  bool direct() const { return sizeof(S) == sizeof(A) || p_.D == 1; }

  const Params& p_;
  const Field& out_;
  int64_t n_, c0_, count_;
  Scratch<A> planes_;
};

}  // namespace
