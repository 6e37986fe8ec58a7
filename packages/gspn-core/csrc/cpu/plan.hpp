// How a call is cut into tasks and tiles, and when memory is prefetched or written past the caches: all thresholds of
// the CPU kernels, in one place, with their reasons. Knows shapes, computes nothing. No result depends on a threshold.
#pragma once

#include <cstdint>

#include "gspn/params.hpp"

namespace {

using gspn::Field;
using gspn::Params;
using gspn::Scan;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- the caches

constexpr int64_t kCacheLine = 64;                  // bytes
constexpr int64_t kPrefetchBytes = 64 * 1024;       // smaller planes stay in the cache between their tiles
constexpr int64_t kColdBytes = 14 * 1024 * 1024;    // larger working sets come from DRAM
constexpr int64_t kStreamBytes = 64 * 1024 * 1024;  // larger outputs do not stay in any cache

// ---- prefetch distances

// In rows, for columns of large planes: enough to hide the latency of DRAM. No power of two: such rows of an image with
// a power of two of columns would map to one set of the cache.
constexpr int64_t kRowsAhead = 72;
// In bytes, for blocks of small planes: enough to hide the latency of the cache that cores share.
constexpr int64_t kNearBytes = 8192;
// Whole planes are prefetched line by line only from this size on. Of smaller planes prefetch_near has already fetched
// the columns, and rows gain nothing.
constexpr int64_t kWholePlaneBytes = kNearBytes / 2;
// Planes that a LinePrefetcher follows at most: the weights, and x, y, lam and u of two channels, are eleven.
constexpr int kMostPrefetchedPlanes = 12;

// ---- tiles

// Images of up to so many pixels fit whole in a tile, so that every plane is read in one pass.
constexpr int64_t kWholePixels = 16384;
// Elements of a tile of a larger image, as long as a tile has one checkpoint interval of lines.
constexpr int64_t kTileElements = 8192;
// In a horizontal scan lines are columns, and each row of a large image holds a piece of them in a page of its own: two
// intervals of lines visit each page half as often.
constexpr int64_t kHorizontalIntervals = 2;

// Lines of a tile, a multiple of the checkpoint interval.
inline int64_t tile_lines(const Params& p, const Scan& scan) {
  const int64_t all = round_up(scan.lines, p.interval);
  if (p.H * p.W <= kWholePixels) return all;
  const int64_t fitting = kTileElements / max64(1, p.interval * scan.length);
  return min64(all, p.interval * max64(fitting, scan.horizontal ? kHorizontalIntervals : 1));
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

inline int64_t max_length(const Params& p) {
  int64_t length = 0;
  for (int d = 0; d < p.D; ++d) length = max64(length, gspn::make_scan(p, d).length);
  return length;
}

// Distance between the lines of a tile in scratch memory, where a line has room for a vector of eight. The extra cache
// line, of float32, keeps the lines of large images from mapping to the same cache sets.
inline int64_t tile_pitch(int64_t length) { return round_up(length, 8) + 16; }

// Elements before and after a line of state: one is needed on either side, a cache line of float32 keeps lines aligned.
constexpr int kPad = 16;

// Distance between lines of state with their padding: line t starts at data + kPad + t * pitch.
inline int64_t state_pitch(int64_t length) { return round_up(length, 16) + 2 * kPad; }

// ---- channels as lanes (lanes.hpp)

// Positions whose gates are made at once: they stay in the first-level cache.
constexpr int64_t kLanePositions = 64;
// Images of more pixels, with gates from memory, have lines long enough to be vectors, and more gates than a cache
// holds.
constexpr int64_t kLanePixels = 1024;
// Fewer channels waste most of a vector.
constexpr int64_t kFewestLanes = 8;

// Whether a call whose weights and gates are in memory has channels as lanes: each channel has its own.
inline bool uses_lanes(const Params& p) {
  const bool own = p.weights.channels == p.C && (!p.lam || p.lam.channels == p.C) && (!p.u || p.u.channels == p.C);
  return p.stochastic && own && p.C >= kFewestLanes && p.H * p.W <= kLanePixels;
}

// ---- when to prefetch, and when to write past the caches

// Whether the working set of the forward pass comes from DRAM.
inline bool is_cold(const Params& p, int64_t element) {
  const int64_t per_direction = 3 * p.weights.channels + (p.lam ? p.lam.channels : 0) + (p.u ? p.u.channels : 0);
  return p.N * (2 * p.C + p.D * per_direction) * p.H * p.W * element >= kColdBytes;
}

// Whether a plane is dropped from the cache between its tiles.
inline bool is_large(const Params& p, int64_t element) { return p.H * p.W * element >= kPrefetchBytes; }

// Whether rows are read in descending order, which hardware prefetchers do not follow, unlike ascending order.
inline bool descends(const Params& p, const Scan& scan, bool forward, int64_t element) {
  return !scan.horizontal && scan.reversed == forward && is_large(p, element);
}

// Whether the output is written past the caches: the output of a single direction is not read again here, and is too
// large to be in a cache when it is read next.
template <class S>
bool streams(const Params& p) {
  return p.D == 1 && p.N * p.C * p.H * p.W * int64_t(sizeof(S)) >= kStreamBytes;
}

// ---- tasks

// Channels of a forward task: whole groups of channels that share weights, or a part of one group. They share the
// normalised weights of a tile, and prefetch the next channel's planes while one is scanned, so more are better, as
// long as every thread gets work and, if several directions read them, their planes stay in the second-level cache.
inline int64_t forward_block(const Params& p, int64_t element_size) {
  constexpr int64_t kFewest = 8;
  const int64_t group = p.C / p.weights.channels;
  const int64_t fitting = max64(kFewest, p.second_level_bytes / max64(1, 2 * p.H * p.W * element_size));
  const int64_t parallel = max64(1, p.N * p.C / p.threads);
  const int64_t block = min64(p.D == 1 ? max64(group, fitting) : fitting, parallel);
  if (block < group) return block;
  return tiles_are_whole(p) ? block / group * group : group;
}

// How the channels of an image are split into tasks of the backward pass. Weights and gates shared by several channels
// collect sums over them. These are added up by parts, and the sums of the parts in the order of a balanced binary
// tree, so that an image gives the same bits in every batch and with every number of threads. A task owns a subtree of
// the parts, all of them if the batch alone gives enough tasks; the sums of tasks are added afterwards.
struct Split {
  int64_t unit;      // channels after which all sharing groups end
  int64_t part;      // channels whose sums are added up first; depends on an image's shape alone
  int64_t parts;     // of a unit
  int64_t per_task;  // parts of a task, a power of two
  int64_t tasks;     // of a unit

  static int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

  explicit Split(const Params& p) {
    constexpr int64_t kEnoughTasks = 16, kSmallestPart = 16;  // keeps most machines busy; worth the sum over parts
    unit = 1;
    for (const Field* f : {&p.weights, &p.lam, &p.u}) {
      if (!*f) continue;
      const int64_t sharing = p.C / f->channels;
      unit = unit / gcd(unit, sharing) * sharing;
    }
    const int64_t units = p.C / unit;
    const int64_t wanted = units >= kEnoughTasks ? 1 : (kEnoughTasks + units - 1) / units;
    part = min64(unit, max64((unit + wanted - 1) / wanted, kSmallestPart));
    parts = (unit + part - 1) / part;
    for (per_task = 1; per_task < parts; per_task *= 2) {
      if ((parts + per_task - 1) / per_task * p.N * units < 2 * kEnoughTasks) break;
    }
    tasks = (parts + per_task - 1) / per_task;
  }

  // Whether channels that share one channel of f can fall into different parts.
  bool cuts(const Params& p, const Field& f) const { return f && parts > 1 && part % (p.C / f.channels) != 0; }
};

// Elements of a task that adds the partial sums of parts.
constexpr int64_t kReducedElements = 1 << 14;

// ---- bands (bands.hpp)

// Columns and rows of a band. Columns of whole cache lines in every dtype; the rings of four planes take 28 KiB.
constexpr int64_t kBandLines = 32, kBandRows = 16;
// Rows from a band to the one it prefetches.
constexpr int64_t kBandRowsAhead = 2 * kBandRows;
// In lower images more than half of the bands would reach beyond an edge, which is slower.
constexpr int64_t kLowestBanded = 4 * kBandLines;

template <class S>
bool rows_begin_cache_lines(const Field& f) {
  const uintptr_t strides = uintptr_t(f.n | f.c | f.k | f.row) * sizeof(S);
  return f.col == 1 && (reinterpret_cast<uintptr_t>(f.data) | strides) % kCacheLine == 0;
}

// Whether a call is scanned in bands: whole bands of whole cache lines, and an output written past the caches.
template <class S>
bool is_banded(const Params& p) {
  const bool plain = p.D == 1 && p.chunk == 0 && !p.stochastic && !p.lam && !p.u && p.weights.channels == p.C;
  return plain && gspn::make_scan(p, 0).horizontal && streams<S>(p) && p.W % kBandLines == 0 && p.H % kBandRows == 0 &&
         p.H >= kLowestBanded && rows_begin_cache_lines<S>(p.x) && rows_begin_cache_lines<S>(p.weights) &&
         rows_begin_cache_lines<S>(p.y);
}

}  // namespace
