// A tile is a few consecutive lines of one plane in scan order, each line contiguous: tile[t * pitch + j].
// Loading and storing convert between the storage type and the accumulation type, and turn columns into lines.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simd.hpp"

namespace {

// Where line i, position j of a plane stands: data + i * line + j * position. Turning columns into lines visits every
// row of the image for a short piece, which the processor's own prefetchers do not follow: with `prefetch` each visit
// asks for a piece some rows further on, after the last row for one of the next tile, `ahead` elements away (0: none).
// With `stream` columns are written past the caches, where their pieces are whole cache lines.
template <class S>
struct Plane {
  S* data;
  int64_t line, position, ahead = 0;
  bool prefetch = false, stream = false;
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
  if constexpr (kWrite == Write::kStream) return stream8(dst, v);
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

// Asks for the pieces of eight rows that stand kAhead rows after `row`. The hint names the second-level cache: asking
// for the first is limited to its few outstanding misses. Inlined by force: GCC takes a function of nothing but
// prefetches for one without effects and drops its calls.
template <class S>
GSPN_INLINE void prefetch_rows(const Plane<S>& plane, int64_t row, int64_t length, int64_t row_elements) {
  // Far enough for the latency of memory. No power of two: rows of a power of two would meet in one set of the cache.
  constexpr int64_t kAhead = 56, kCacheLine = 64;
  if (!plane.prefetch) return;
  row += kAhead;
  S* data = plane.data;
  if (row + kLanes > length) {
    row -= length;
    data += plane.ahead;
    if (plane.ahead == 0 || row < 0 || row + kLanes > length) return;
  }
  for (int64_t r = row; r < row + kLanes; ++r) {
    const char* first = reinterpret_cast<const char*>(data + r * plane.position);
    for (int64_t byte = 0; byte < row_elements * int64_t(sizeof(S)); byte += kCacheLine)
      __builtin_prefetch(first + byte, 0, 2);
  }
}

// Blocks of eight columns that fill a cache line, so that every line of the image is touched once; two at most, which
// the registers hold.
template <class S>
constexpr int kBlocks = sizeof(S) == 8 ? 1 : 2;

// Eight positions of 8 * kCount lines, from the plane's element (line 0, position 0) to the tile's, and back.
template <int kCount, class S, class A>
GSPN_INLINE void load_blocks(const S* src, int64_t position, A* dst, int64_t pitch) {
  Lanes<A> blocks[kCount][kLanes];
  for (int r = 0; r < kLanes; ++r)
    for (int i = 0; i < kCount; ++i) blocks[i][r] = load8(src + r * position + i * kLanes);
  for (int i = 0; i < kCount; ++i) {
    transpose8(blocks[i]);
    for (int r = 0; r < kLanes; ++r) store8(dst + (i * kLanes + r) * pitch, blocks[i][r]);
  }
}
template <Write kWrite, int kCount, class S, class A>
GSPN_INLINE void store_blocks(const A* src, int64_t pitch, S* dst, int64_t position) {
  Lanes<A> blocks[kCount][kLanes];
  for (int i = 0; i < kCount; ++i) {
    for (int r = 0; r < kLanes; ++r) blocks[i][r] = load8(src + (i * kLanes + r) * pitch);
    transpose8(blocks[i]);
  }
  for (int r = 0; r < kLanes; ++r)
    for (int i = 0; i < kCount; ++i) write8<kWrite>(dst + r * position + i * kLanes, blocks[i][r]);
}

template <class S, class A>
void load_tile(Plane<const S> src, Tile<A> dst, int64_t lines, int64_t length) {
  constexpr int64_t kWide = kBlocks<S> * kLanes;
  if (src.position == 1) {
    for (int64_t t = 0; t < lines; ++t) load_line(src.data + t * src.line, dst.line(t), length);
    return;
  }
  make_ascending(src, dst, lines);
  int64_t j = 0, whole = 0;
  if (src.line == 1) {
    whole = lines - lines % kLanes;
    for (; j + kLanes <= length; j += kLanes) {
      prefetch_rows(src, j, length, whole);
      const S* const row = src.data + j * src.position;
      int64_t t = 0;
      for (; t + kWide <= whole; t += kWide) load_blocks<kBlocks<S>>(row + t, src.position, dst.line(t) + j, dst.pitch);
      for (; t < whole; t += kLanes) load_blocks<1>(row + t, src.position, dst.line(t) + j, dst.pitch);
    }
  }
  for (int64_t t = 0; t < lines; ++t)
    for (int64_t i = t < whole ? j : 0; i < length; ++i)
      dst.line(t)[i] = load1(src.data + t * src.line + i * src.position);
}

template <class S>
inline bool whole_cache_lines(const Plane<S>& plane, int64_t lines) {
  constexpr uintptr_t kCacheLine = 64;
  const auto bytes = [](int64_t elements) { return uintptr_t(elements) * sizeof(S); };
  return (reinterpret_cast<uintptr_t>(plane.data) | bytes(plane.position) | bytes(lines)) % kCacheLine == 0;
}

template <Write kWrite, class S, class A>
void store_tile(Tile<A> src, Plane<S> dst, int64_t lines, int64_t length) {
  constexpr int64_t kWide = kBlocks<S> * kLanes;
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
    const bool stream = kWrite == Write::kStore && dst.stream && whole_cache_lines(dst, lines);
    for (; j + kLanes <= length; j += kLanes) {
      if (!stream) prefetch_rows(dst, j, length, whole);
      S* const row = dst.data + j * dst.position;
      int64_t t = 0;
      for (; stream && t + kWide <= whole; t += kWide)
        store_blocks<Write::kStream, kBlocks<S>>(src.line(t) + j, src.pitch, row + t, dst.position);
      for (; t + kWide <= whole; t += kWide)
        store_blocks<kWrite, kBlocks<S>>(src.line(t) + j, src.pitch, row + t, dst.position);
      for (; t < whole; t += kLanes) store_blocks<kWrite, 1>(src.line(t) + j, src.pitch, row + t, dst.position);
    }
  }
  for (int64_t t = 0; t < lines; ++t)
    for (int64_t i = t < whole ? j : 0; i < length; ++i)
      write1<kWrite>(dst.data + t * dst.line + i * dst.position, src.line(t)[i]);
}

}  // namespace
