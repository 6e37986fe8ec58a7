// A tile is a few consecutive lines of one plane in scan order, each line contiguous: tile[t * pitch + j].
// Loads and stores convert between the storage type and the accumulation type, and transpose columns into lines.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.hpp"
#include "simd.hpp"

namespace {

// Line i, position j of a plane is at data + i * line + j * position. Turning columns into lines reads a short piece of
// every row of the image, a pattern that hardware prefetchers do not follow. With `prefetch`, each read prefetches the
// piece kRowsAhead rows ahead, and at the end of the plane a piece of the next tile, which is `next_tile` elements away
// (0: there is none). With `stream`, columns are written past the caches if their pieces are whole cache lines.
template <class S>
struct Plane {
  S* data = nullptr;
  int64_t line = 0, position = 0, next_tile = 0;
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

// Reverses a plane whose lines descend in memory, together with its tile.
template <class S, class A>
inline void make_ascending(Plane<S>& plane, Tile<A>& tile, int64_t lines) {
  if (plane.line >= 0) return;
  plane.data += (lines - 1) * plane.line;
  plane.line = -plane.line;
  tile.data += (lines - 1) * tile.pitch;
  tile.pitch = -tile.pitch;
}

// Prefetches eight rows, kRowsAhead rows ahead of `row`, into the second-level cache: the first-level cache allows only
// few outstanding misses. Always inlined: GCC considers a function of prefetches alone free of effects and drops calls.
template <class S>
GSPN_INLINE void prefetch_rows(const Plane<S>& plane, int64_t row, int64_t length, int64_t row_elements) {
  if (!plane.prefetch) return;
  row += kRowsAhead;
  S* data = plane.data;
  if (row + kLanes > length) {
    row -= length;
    data += plane.next_tile;
    if (plane.next_tile == 0 || row < 0 || row + kLanes > length) return;
  }
  for (int64_t r = row; r < row + kLanes; ++r) {
    const char* line = reinterpret_cast<const char*>(data + r * plane.position);
    const char* const end = line + row_elements * int64_t(sizeof(S));
    for (line -= reinterpret_cast<uintptr_t>(line) % kCacheLine; line < end; line += kCacheLine)
      __builtin_prefetch(line, 0, 2);
  }
}

// For a tile of whole rows of a dense plane: prefetches as many bytes as a block has, kNearBytes ahead. Blocks jump
// from row to row, so hardware prefetchers do not detect the sequential stream. After the last row this prefetches the
// next channel. Always inlined, as prefetch_rows is.
template <class S>
GSPN_INLINE void prefetch_near(const S* rows, int64_t line) {
  constexpr int64_t kBlock = kLanes * kLanes * int64_t(sizeof(S));
  const char* const first = reinterpret_cast<const char*>(rows) + kNearBytes + line / kLanes * kBlock;
  for (int64_t byte = 0; byte < kBlock; byte += kCacheLine) __builtin_prefetch(first + byte, 0, 2);
}

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
// Adds one block, except its first lines and positions, which an overlapping block has added already.
template <class S, class A>
inline void add_rest_of_block(const A* src, int64_t pitch, S* dst, int64_t position, int64_t lines_done,
                              int64_t positions_done) {
  const Lanes<A> line = {0, 1, 2, 3, 4, 5, 6, 7};
  Lanes<A> block[kLanes];
  for (int r = 0; r < kLanes; ++r) block[r] = load8(src + r * pitch);
  transpose8(block);
  for (int64_t r = positions_done; r < kLanes; ++r)
    write8<Write::kAdd>(dst + r * position, line >= A(lines_done) ? block[r] : Lanes<A>{});
}

// The lines that are loaded in pairs of blocks. On large planes a pair fills a cache line of float32, so that each
// cache line is touched once; small planes are in the cache anyway, and one block of float64 fills a cache line.
template <class S>
inline int64_t paired_lines(const Plane<S>& plane, int64_t lines) {
  return plane.prefetch && sizeof(S) < 8 ? lines - lines % (2 * kLanes) : 0;
}

// If eight does not divide the size, the last block, which begins at `last`, overlaps the one before.
inline int64_t block_begin(int64_t begin, int64_t last) { return begin < last ? begin : last; }

template <class S, class A>
void load_tile(Plane<const S> src, Tile<A> dst, int64_t lines, int64_t length) {
  if (src.position == 1) {
    for (int64_t t = 0; t < lines; ++t) load_line(src.data + t * src.line, dst.line(t), length);
    return;
  }
  make_ascending(src, dst, lines);
  if (src.line == 1 && lines >= kLanes && length >= kLanes) {
    const int64_t paired = paired_lines(src, lines);
    const bool dense = src.position == lines;
    for (int64_t begin = 0; begin < length; begin += kLanes) {
      const int64_t j = block_begin(begin, length - kLanes);
      prefetch_rows(src, j, length, lines);
      const S* const row = src.data + j * src.position;
      int64_t t = 0;
      for (; t < paired; t += 2 * kLanes) load_blocks<2>(row + t, src.position, dst.line(t) + j, dst.pitch);
      for (; t < lines; t += kLanes) {
        const int64_t line = block_begin(t, lines - kLanes);
        if (dense) prefetch_near(row, t);
        load_blocks<1>(row + line, src.position, dst.line(line) + j, dst.pitch);
      }
    }
    return;
  }
  for (int64_t t = 0; t < lines; ++t)
    for (int64_t j = 0; j < length; ++j) dst.line(t)[j] = load1(src.data + t * src.line + j * src.position);
}

// Whether every row of a tile begins at a cache line.
template <class S>
inline bool begins_cache_lines(const Plane<S>& plane) {
  return (reinterpret_cast<uintptr_t>(plane.data) | uintptr_t(plane.position) * sizeof(S)) % kCacheLine == 0;
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
  if (dst.line == 1 && lines >= kLanes && length >= kLanes) {
    const int64_t paired = paired_lines(dst, lines);
    const bool dense = dst.position == lines;
    const bool stream = kWrite == Write::kStore && dst.stream && paired == lines && begins_cache_lines(dst);
    for (int64_t begin = 0; begin < length; begin += kLanes) {
      const int64_t j = block_begin(begin, length - kLanes);
      if (!stream) prefetch_rows(dst, j, length, lines);
      S* const row = dst.data + j * dst.position;
      int64_t t = 0;
      if (stream) {
        for (; t < paired; t += 2 * kLanes)
          store_blocks<Write::kStream, 2>(src.line(t) + j, src.pitch, row + t, dst.position);
      } else if (kWrite == Write::kStore || j == begin) {
        for (; t < paired; t += 2 * kLanes) store_blocks<kWrite, 2>(src.line(t) + j, src.pitch, row + t, dst.position);
      }
      for (; t < lines; t += kLanes) {
        const int64_t line = block_begin(t, lines - kLanes);
        if (dense) prefetch_near(row, t);
        if (kWrite == Write::kAdd && (j < begin || line < t))
          add_rest_of_block(src.line(line) + j, src.pitch, row + line, dst.position, t - line, begin - j);
        else
          store_blocks<kWrite, 1>(src.line(line) + j, src.pitch, row + line, dst.position);
      }
    }
    return;
  }
  for (int64_t t = 0; t < lines; ++t)
    for (int64_t j = 0; j < length; ++j) write1<kWrite>(dst.data + t * dst.line + j * dst.position, src.line(t)[j]);
}

}  // namespace
