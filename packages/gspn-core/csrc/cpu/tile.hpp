// A tile is a few consecutive lines of one plane in scan order, each line contiguous: tile[t * pitch + j].
// Loading and storing convert between the storage type and the accumulation type, and turn columns into lines.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.hpp"

namespace {

// Where line i, position j of a plane stands: data + i * line + j * position. Turning columns into lines visits every
// row of the image for a short piece, which the processor's own prefetchers do not follow: each visit asks for the
// piece that the next tile needs, `ahead` elements away (0: for nothing).
template <class S>
struct Plane {
  S* data;
  int64_t line, position, ahead = 0;

  Plane from_line(int64_t i, int64_t lines_ahead = 0) const {
    return {data + i * line, line, position, lines_ahead * line};
  }
};

// Lines of a tile, either in scratch or in the tensor itself.
template <class A>
struct Tile {
  A* data = nullptr;
  int64_t pitch = 0;

  A* line(int64_t t) const { return data + t * pitch; }
};

template <class S>
inline void load_line(const S* src, Accumulator<S>* dst, int64_t length) {
  int64_t j = 0;
  for (; j + kLanes <= length; j += kLanes) store8(dst + j, load8(src + j));
  for (; j < length; ++j) dst[j] = load1(src + j);
}

template <Write kWrite, class S>
inline void write8(S* dst, Lanes<Accumulator<S>> v) {
  if constexpr (kWrite == Write::kAdd) v += load8(dst);
  store8(dst, v);
}
template <Write kWrite, class S>
inline void write1(S* dst, Accumulator<S> v) {
  if constexpr (kWrite == Write::kAdd) v += load1(dst);
  store1(dst, v);
}

// A plane whose lines run backwards in memory is the forward one with its tile upside down.
template <class S, class A>
inline void make_ascending(Plane<S>& plane, Tile<A>& tile, int64_t lines) {
  if (plane.line >= 0) return;
  plane.data += (lines - 1) * plane.line;
  plane.line = -plane.line;
  tile.data += (lines - 1) * tile.pitch;
  tile.pitch = -tile.pitch;
}

// Asks for the next tile's part of eight rows. The hint names the second-level cache: asking for the first is limited
// to its few outstanding misses. Inlined by force: GCC takes a function of nothing but prefetches for one without
// effects and drops its calls.
template <class S>
GSPN_INLINE void prefetch_rows(const Plane<S>& plane, int64_t row, int64_t row_elements) {
  constexpr int64_t kCacheLine = 64;
  if (plane.ahead == 0) return;
  for (int64_t r = row; r < row + kLanes; ++r) {
    const char* first = reinterpret_cast<const char*>(plane.data + r * plane.position + plane.ahead);
    for (int64_t byte = 0; byte < row_elements * int64_t(sizeof(S)); byte += kCacheLine)
      __builtin_prefetch(first + byte, 0, 2);
  }
}

template <class S, class A>
void load_tile(Plane<const S> src, Tile<A> dst, int64_t lines, int64_t length) {
  if (src.position == 1) {
    for (int64_t t = 0; t < lines; ++t) load_line(src.data + t * src.line, dst.line(t), length);
    return;
  }
  make_ascending(src, dst, lines);
  int64_t j = 0, whole = 0;
  if (src.line == 1) {
    whole = lines - lines % kLanes;
    for (; j + kLanes <= length; j += kLanes) {
      prefetch_rows(src, j, whole);
      for (int64_t t = 0; t < whole; t += kLanes) {
        Lanes<A> block[kLanes];
        for (int r = 0; r < kLanes; ++r) block[r] = load8(src.data + (j + r) * src.position + t);
        transpose8(block);
        for (int r = 0; r < kLanes; ++r) store8(dst.line(t + r) + j, block[r]);
      }
    }
  }
  for (int64_t t = 0; t < lines; ++t)
    for (int64_t i = t < whole ? j : 0; i < length; ++i)
      dst.line(t)[i] = load1(src.data + t * src.line + i * src.position);
}

template <Write kWrite, class S, class A>
void store_tile(Tile<A> src, Plane<S> dst, int64_t lines, int64_t length) {
  if (dst.position == 1) {
    for (int64_t t = 0; t < lines; ++t) {
      const A* line = src.line(t);
      S* out = dst.data + t * dst.line;
      int64_t j = 0;
      for (; j + kLanes <= length; j += kLanes) write8<kWrite>(out + j, load8(line + j));
      for (; j < length; ++j) write1<kWrite>(out + j, line[j]);
    }
    return;
  }
  make_ascending(dst, src, lines);
  int64_t j = 0, whole = 0;
  if (dst.line == 1) {
    whole = lines - lines % kLanes;
    for (; j + kLanes <= length; j += kLanes) {
      prefetch_rows(dst, j, whole);
      for (int64_t t = 0; t < whole; t += kLanes) {
        Lanes<A> block[kLanes];
        for (int r = 0; r < kLanes; ++r) block[r] = load8(src.line(t + r) + j);
        transpose8(block);
        for (int r = 0; r < kLanes; ++r) write8<kWrite>(dst.data + (j + r) * dst.position + t, block[r]);
      }
    }
  }
  for (int64_t t = 0; t < lines; ++t)
    for (int64_t i = t < whole ? j : 0; i < length; ++i)
      write1<kWrite>(dst.data + t * dst.line + i * dst.position, src.line(t)[i]);
}

}  // namespace
