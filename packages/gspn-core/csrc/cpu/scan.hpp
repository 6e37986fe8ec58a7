// What forward and backward share: scratch memory, planes of a field in scan order, tiles of weights and gates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "gspn/params.hpp"
#include "lines.hpp"
#include "plan.hpp"
#include "tile.hpp"

namespace {

// An aligned, uninitialised array of one task. No std::vector here: its code would be compiled for
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

// The lines [begin, begin + lines) of a scan, which are processed together.
struct Span {
  int64_t begin, lines;
  int64_t pitch;     // between lines of scratch
  int64_t next = 0;  // distance in lines to the tile that follows, negative in the backward pass; 0: none follows
  bool prefetch = false;
};

inline Span make_span(const Params& p, const Scan& scan, int64_t begin, int64_t step, int64_t pitch, int64_t element) {
  const int64_t next = begin + step, most_lines = step < 0 ? -step : step;
  const bool prefetch = scan.horizontal && is_large(p, element);
  return {begin, min64(most_lines, scan.lines - begin), pitch, next >= 0 && next < scan.lines ? step : 0, prefetch};
}

template <class S>
inline Plane<S> span_plane(const Plane<S>& plane, const Span& span) {
  return {plane.data + span.begin * plane.line, plane.line, plane.position, span.next * plane.line, span.prefetch};
}

// Whether lines can be processed in place.
template <class S>
inline bool usable_in_place(const Plane<S>& plane, int64_t length) {
  return plane.position == 1 && length >= kLanes;
}

// A span of a plane: the tensor's own memory if usable in place, else a converted copy.
template <class S, class A>
inline Tile<const A> fetch(Plane<const S> plane, const Span& span, int64_t length, A* scratch) {
  const Plane<const S> from = span_plane(plane, span);
  if constexpr (sizeof(S) == sizeof(A)) {
    if (usable_in_place(plane, length)) return {from.data, from.line};
  }
  const Tile<A> copy{scratch, span.pitch};
  load_tile(from, copy, span.lines, length);
  return {copy.data, copy.pitch};
}

// The channel of a field with fewer channels that serves channel c of x.
inline int64_t shared_channel(const Params& p, const Field& f, int64_t c) { return c / (p.C / f.channels); }

// Prefetches a line of several planes for every line that is computed, in patterns that hardware prefetchers miss.
class LinePrefetcher {
 public:
  // distance: lines from the computed line to the prefetched one, negative in the backward pass.
  LinePrefetcher(const Scan& scan, int64_t distance, int64_t element)
      : lines_(scan.lines), length_(scan.length), distance_(distance), element_(element) {}
  template <class S>
  void add(const Plane<const S>& plane) {
    if (plane.position != 1 || count_ == kMostPrefetchedPlanes) return;
    planes_[count_++] = {reinterpret_cast<const char*>(plane.data), plane.line * int64_t(sizeof(S)), nullptr};
  }
  // Selects the line to prefetch while line i is computed; false if there is none.
  bool select(int64_t i) {
    const int64_t line = i + distance_;
    if (count_ == 0 || line < 0 || line >= lines_) return false;
    for (int k = 0; k < count_; ++k) planes_[k].row = planes_[k].data + line * planes_[k].stride;
    return true;
  }
  // Called with every eighth position; prefetches each cache line of the rows once. Always inlined, as prefetch_rows
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
  struct PlaneRows {
    const char* data;
    int64_t stride;
    const char* row;
  };
  int count_ = 0;
  int64_t lines_, length_, distance_, element_;
  PlaneRows planes_[kMostPrefetchedPlanes];
};

// A dense plane cut into as many parts of contiguous memory as the scan has lines, to be prefetched part by part. If
// the plane is not dense, its position is 0, and it is not prefetched.
template <class S>
inline Plane<const S> as_parts(const Params& p, const Field& f, const Scan& scan, int64_t n, int64_t d, int64_t c,
                               int64_t k) {
  const Plane<const S> rows = scan_plane<const S>(f, Scan{false, false, p.H, p.W}, n, d, c, k);
  const bool dense = rows.position == 1 && rows.line == p.W;
  return {rows.data, scan.length, dense ? 1 : 0};
}

// The lines of a gate, lam or u; null, which stands for 1, if there is no gate.
template <class S, class A>
class GateTile {
 public:
  GateTile(const Params& p, const Field& f, int64_t capacity) : p_(p), f_(f), scratch_(f ? capacity : 0) {}

  void load(const Scan& scan, int64_t n, int64_t d, int64_t c, const Span& span) {
    if (!f_) return;
    const int64_t channel = shared_channel(p_, f_, c);
    if (channel == channel_ && d == d_ && span.begin == begin_) return;  // loaded for a neighbouring channel
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

// The weights of a tile, shared by all channels of a group: used unchanged, or logits that are normalised once.
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
  // Logits, or the weights themselves.
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

// Runs independent tasks on a number of threads. Exceptions must not leave a parallel region; tasks throw only
// std::bad_alloc.
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

// Whether infinities in the state need update_line_with_infinities. The difference form never makes a state finite
// again, so that the last line of a chunk tells.
inline bool needs_finite(const Params& p) { return p.stochastic && p.chunk != 1; }

// One step of the recurrence for K channels, which all have a gate lam, or none.
template <int K, class A, class Prefetch = NoPrefetch>
inline void step(bool starts_chunk, const Lines<K, A>& lines, const Weights<A>& w, int64_t length, bool infinities,
                 const Prefetch& prefetch = {}) {
  const bool lam = lines.lam[0] != nullptr;
  if (starts_chunk) {
    lam ? start_lines<K, true>(lines, length) : start_lines<K, false>(lines, length);
  } else if (infinities) {
    for (int k = 0; k < K; ++k)
      update_line_with_infinities(lines.h[k], lines.x[k], lines.lam[k], lines.next[k], w, length);
  } else if (w.b == nullptr) {
    lam ? update_lines<K, true, false>(lines, w, length, prefetch)
        : update_lines<K, false, false>(lines, w, length, prefetch);
  } else {
    lam ? update_lines<K, true, true>(lines, w, length, prefetch)
        : update_lines<K, false, true>(lines, w, length, prefetch);
  }
}

// Destination of the lines of a span, in one channel's sum over directions: the memory of the sums if usable in place,
// else a tile that `finish` stores.
template <class S, class A>
class SumLines {
 public:
  SumLines() = default;
  // One of the planes is null: `sums` in the accumulation type, or the output `tensor`.
  SumLines(const Plane<A>& sums, const Plane<S>& tensor, bool first, const Tile<A>& tile, int64_t length)
      : sums_(sums),
        tensor_(tensor),
        tile_(tile),
        first_(first),
        in_place_(sums.data != nullptr && usable_in_place(sums, length)) {}

  // Whether lines are overwritten rather than added to.
  bool overwrites() const { return first_ || !in_place_; }
  A* line(int64_t t) const { return in_place_ ? sums_.data + t * sums_.line : tile_.line(t); }
  // Adds factor * value, or stores it for the first direction; a null factor is 1.
  void add(int64_t t, const A* value, const A* factor, int64_t length) const {
    overwrites() ? scale_line<Write::kStore>(value, factor, line(t), length)
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

// Sums over directions, in the accumulation type: in the output itself if it has that type, else in scratch memory.
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

  // After the last direction: converts the sums into the output.
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
