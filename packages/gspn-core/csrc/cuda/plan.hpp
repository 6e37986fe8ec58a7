// Chooses the kernel and its launch configuration for a call: all thresholds, in one place, with their reasons. Depends
// on shapes and the limits of the device only.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "gspn/params.hpp"

namespace gspn::cuda {

enum class Path { kAuto, kResident, kStrip, kCluster };
inline std::atomic<Path> selected_path{Path::kAuto};

struct Limits {
  int major;  // compute capability that the kernels were compiled for; clusters from 9 on
  int multiprocessors;
  size_t shared_bytes;  // of one block
};

// How lines are covered; see Config.
struct Cover {
  int P, K, CW, SEG;
};

struct Plan {
  Cover cover;
  int strips = 1, per_block = 1, cluster = 1;
};

// ---- the table
//
// Lines that fit one warp need no exchange between warps, and P is the smallest that fits, for idle lanes cost as much
// as busy ones. K = 8 lines of 4 bytes are a sector of 32 bytes of each row that a horizontal scan reads; P = 4 allows
// only K = 4, because registers hold K P elements of every plane.
constexpr Cover kShort[] = {{1, 8, 1, 4}, {1, 8, 1, 2}, {1, 8, 1, 1}, {2, 8, 1, 1}, {4, 4, 1, 1}};
// Longer lines are cut into strips that overlap by 2 K positions: 120 of 128 positions are useful at P = 4, K = 4.
constexpr Cover kLong = {4, 4, 1, 1};
// The same of narrower warps, of which there are twice as many: 56 of 64 positions are useful. A warp waits for most of
// its time, so that a multiprocessor with few of them is idle.
constexpr Cover kNarrow = {2, 4, 1, 1};
// Warps of a multiprocessor that are few; fewer in a forward pass which normalises, for that keeps narrow warps busy.
constexpr int kFewWarps = 12, kFewStochasticWarps = 4;
// Fallback without clusters, if one block must hold a line of thousands: 252 of 256 positions are useful.
constexpr Cover kLongest = {8, 2, 1, 1};
// float64 has a single, simple configuration.
constexpr Cover kDouble[] = {{1, 4, 1, 1}, {2, 4, 1, 1}};
// A block has four channels that share weights, which are then normalised once for the four.
constexpr int kSharing = 4;
// Kernels of vectors cover 128 positions with a warp. Shorter lines than this are cheaper in general ones, which cover
// fewer, or several channels.
constexpr int kVectorLength = 32;
// Weights that at least so many channels share are normalised and laid out once for all, which takes 16 bytes a
// position of every direction.
constexpr int kShared = 8;
// Twelve warps leave 168 registers per thread, which the forward kernels need; backward kernels need up to 255.
constexpr int kForwardWarps = 12, kBackwardWarps = 8;
// Threads of narrow warps need 102 registers at most, 128 if they normalise, 204 in backward kernels.
constexpr int kNarrowForwardWarps = 20, kNarrowStochasticWarps = 16, kNarrowBackwardWarps = 10;
// Each channel side by side in a warp needs its own pointers, of which the backward kernels have most.
constexpr int kForwardSegments = 4, kBackwardSegments = 2;
constexpr int kMostCluster = 8;  // supported by every device with clusters
// Longer lines do not fit one warp, and the resident kernel has no strips.
constexpr int kResidentLength = 128;

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }
inline int width(const Cover& c) { return 32 * c.P; }
inline int useful(const Cover& c) { return width(c) - 2 * c.K; }

inline bool fits_one_warp(const Cover& c, int64_t length) { return length <= width(c) / c.SEG; }

inline Cover cover_of(const Params& p, int64_t length, bool may_share, int most_segments) {
  if (p.dtype == Dtype::kFloat64) return fits_one_warp(kDouble[0], length) ? kDouble[0] : kDouble[1];
  for (Cover c : kShort) {
    if (!fits_one_warp(c, length) || c.SEG > most_segments) continue;
    if (c.SEG == 1 && may_share && p.C / p.weights.channels > 1) c.CW = kSharing;
    return c;
  }
  return kLong;
}

inline int64_t blocks_of(const Params& p, const Cover& c) {
  const int64_t group = p.C / p.weights.channels;
  return c.CW > 1 ? p.weights.channels * ceil_div(group, c.CW) : ceil_div(p.C, c.SEG);
}

inline int chunks_of(const Params& p, const Scan& scan) {
  return p.chunk > 0 && p.chunk < scan.lines ? ceil_div(scan.lines, p.chunk) : 1;
}

// Cuts lines into strips for blocks and clusters. bytes(cover, strips of a block) is the shared memory needed.
template <class Bytes>
bool cut(const Cover& cover, int64_t length, const Limits& limits, int most_warps, const Bytes& bytes, Plan& plan) {
  plan.cover = cover;
  plan.strips = fits_one_warp(cover, length) ? 1 : ceil_div(length, useful(cover));
  for (plan.cluster = 1; plan.cluster <= (limits.major >= 9 ? kMostCluster : 1); plan.cluster *= 2) {
    plan.per_block = ceil_div(plan.strips, plan.cluster);
    if (plan.per_block * cover.CW <= most_warps && bytes(cover, plan.per_block) <= limits.shared_bytes) return true;
  }
  return false;
}

// If there are too few scans to fill the device, a cluster of blocks per line uses more of it.
inline void spread(const Params& p, const Scan& scan, const Limits& limits, Path path, Plan& plan) {
  const int64_t blocks = p.N * blocks_of(p, plan.cover) * chunks_of(p, scan);
  const auto may_grow = [&] {
    if (limits.major < 9 || plan.cluster * 2 > kMostCluster || plan.per_block == 1) return false;
    return path == Path::kCluster || blocks * plan.cluster * 2 <= limits.multiprocessors;
  };
  while (path != Path::kStrip && may_grow()) {
    plan.cluster *= 2;
    plan.per_block = ceil_div(plan.strips, plan.cluster);
  }
}

// A plan with the given cover, if its shared memory suffices.
template <class Bytes>
bool plan_cover(const Params& p, int d, const Limits& limits, Path path, int most_warps, const Cover& cover,
                const Bytes& bytes, Plan& plan) {
  const Scan scan = make_scan(p, d);
  if (!cut(cover, scan.length, limits, most_warps, bytes, plan)) return false;
  spread(p, scan, limits, path, plan);
  return true;
}

template <class Bytes>
Plan plan_strips(const Params& p, int d, const Limits& limits, Path path, int most_warps, int most_segments,
                 const Bytes& bytes) {
  const int64_t length = make_scan(p, d).length;
  Plan plan;
  if (plan_cover(p, d, limits, path, most_warps, cover_of(p, length, true, most_segments), bytes, plan)) return plan;
  if (p.dtype != Dtype::kFloat64 && plan_cover(p, d, limits, path, most_warps, kLongest, bytes, plan)) return plan;
  throw std::invalid_argument("gspn_core: lines of " + std::to_string(length) +
                              " positions are longer than the CUDA kernels support on this device");
}

// Whether a vertical scan has so few warps that narrow ones serve it better.
inline bool has_few_warps(const Params& p, const Scan& scan, const Limits& limits, int few) {
  const int64_t strips = fits_one_warp(kLong, scan.length) ? 1 : ceil_div(scan.length, useful(kLong));
  return p.N * blocks_of(p, kLong) * chunks_of(p, scan) * strips < int64_t(few) * limits.multiprocessors;
}

// Whether all directions may run in shared memory at once. Pays off from two directions on, each of which would
// otherwise read x and add to y in global memory.
inline bool may_be_resident(const Params& p, Path path) {
  const int64_t length = p.H > p.W ? p.H : p.W;
  if (path == Path::kStrip || path == Path::kCluster || p.dtype == Dtype::kFloat64) return false;
  return length <= kResidentLength && (p.D >= 2 || path == Path::kResident);
}

template <class Bytes>
bool plan_resident(const Params& p, const Limits& limits, Path path, const Bytes& bytes, Cover& cover) {
  if (!may_be_resident(p, path)) return false;
  for (const bool share : {true, false}) {
    cover = cover_of(p, p.H > p.W ? p.H : p.W, share, kForwardSegments);
    if (bytes(cover) <= limits.shared_bytes) return true;
  }
  return false;
}

}  // namespace gspn::cuda
