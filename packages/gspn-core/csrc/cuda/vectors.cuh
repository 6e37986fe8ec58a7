// Launches of the kernels for dense aligned rows, and of those for small images: each says whether it serves a call.
#pragma once

#include "column_backward.cuh"
#include "fused.cuh"
#include "plan.hpp"
#include "row_backward.cuh"
#include "shared.cuh"

namespace gspn::cuda {

template <class T>
using LongConfig = Config<T, kLong.P, kLong.K, kLong.CW, kLong.SEG>;
template <class T>
using NarrowConfig = Config<T, kNarrow.P, kNarrow.K, kNarrow.CW, kNarrow.SEG>;

inline StripLaunch strip_launch(const Params& p, const Plan& plan, int d, void* sums) {
  StripLaunch l;
  l.d = d;
  l.strips = plan.strips, l.per_block = plan.per_block, l.cluster = plan.cluster;
  l.chunks = chunks_of(p, make_scan(p, d));
  l.blocks = blocks_of(p, plan.cover);
  l.first = d == 0, l.last = d == p.D - 1;
  l.sums = sums;
  return l;
}

inline int64_t blocks_in_all(const Params& p, const StripLaunch& l) { return p.N * l.blocks * l.chunks * l.cluster; }

// A horizontal scan of rows of vectors. Returns false if the direction is not one.
template <class T>
bool launch_rows(const Params& p, int d, const Limits& device, void* sums, cudaStream_t stream) {
  using C = LongConfig<T>;
  if constexpr (kHasRows<C>) {
    const Scan scan = make_scan(p, d);
    const auto bytes = [&](const Cover&, int per_block) { return row_forward_bytes<C>(p, per_block, true); };
    Plan plan;
    if (scan.length < kVectorLength || !rows_fit<C>(p, scan) ||
        !plan_cover(p, d, device, selected_path, kForwardWarps, kLong, bytes, plan))
      return false;
    const StripLaunch l = strip_launch(p, plan, d, sums);
    const auto kernel = p.stochastic ? (scan.reversed ? row_forward<C, true, true> : row_forward<C, true, false>)
                                     : (scan.reversed ? row_forward<C, false, true> : row_forward<C, false, false>);
    launch(kernel, blocks_in_all(p, l), 32 * l.per_block, row_forward_bytes<C>(p, l.per_block, l.strips > 1), l.cluster,
           stream, p, l);
    return true;
  }
  return false;
}

// A vertical scan of rows of vectors by warps of a configuration. Returns false if the direction is not one.
template <class C>
bool launch_columns_of(const Params& p, int d, const Limits& device, void* sums, cudaStream_t stream) {
  const auto halos = [](int per_block) { return sizeof(typename C::A) * per_block * Strips<C>::kBuffer; };
  const auto bytes = [&](const Cover&, int per_block) { return halos(per_block); };
  constexpr Cover kCover = {C::P, C::K, C::CW, C::SEG};
  Plan plan;
  const Scan scan = make_scan(p, d);
  const int most_warps = p.stochastic ? kColumnWarps<C, true> : kColumnWarps<C, false>;
  if (!columns_fit<C>(p, scan) || !plan_cover(p, d, device, selected_path, most_warps, kCover, bytes, plan))
    return false;
  const StripLaunch l = strip_launch(p, plan, d, sums);
  launch(p.stochastic ? column_forward<C, true> : column_forward<C, false>, blocks_in_all(p, l), 32 * l.per_block,
         l.strips > 1 ? halos(l.per_block) : 0, l.cluster, stream, p, l);
  return true;
}
template <class T>
bool launch_columns(const Params& p, int d, const Limits& device, void* sums, cudaStream_t stream) {
  if constexpr (kHasColumns<LongConfig<T>>) {
    const Scan scan = make_scan(p, d);
    if (scan.length < kVectorLength) return false;
    const int few = p.stochastic ? kFewStochasticWarps : kFewWarps;
    if (has_few_warps(p, scan, device, few) && launch_columns_of<NarrowConfig<T>>(p, d, device, sums, stream))
      return true;
    return launch_columns_of<LongConfig<T>>(p, d, device, sums, stream);
  }
  return false;
}

// The same of the backward pass, with weights and gates of every channel.
template <class C>
bool launch_column_backward(const Params& p, int d, const Limits& device, void* sums, cudaStream_t stream) {
  const auto bytes = [&](const Cover&, int per_block) { return column_backward_bytes<C>(p, per_block, true); };
  constexpr Cover kCover = {C::P, C::K, C::CW, C::SEG};
  Plan plan;
  if (!column_gradients_fit<C>(p, make_scan(p, d)) ||
      !plan_cover(p, d, device, selected_path, kColumnBackwardWarps<C>, kCover, bytes, plan))
    return false;
  const StripLaunch l = strip_launch(p, plan, d, sums);
  launch(p.stochastic ? column_backward<C, true> : column_backward<C, false>, blocks_in_all(p, l), 32 * l.per_block,
         column_backward_bytes<C>(p, l.per_block, l.strips > 1), l.cluster, stream, p, l);
  return true;
}
template <class C>
bool launch_row_backward(const Params& p, int d, const Limits& device, void* sums, cudaStream_t stream) {
  const auto bytes = [&](const Cover&, int per_block) { return row_backward_bytes<C>(p, per_block, true); };
  const Scan scan = make_scan(p, d);
  Plan plan;
  if (!row_gradients_fit<C>(p, scan) || !plan_cover(p, d, device, selected_path, kBackwardWarps, kLong, bytes, plan))
    return false;
  const StripLaunch l = strip_launch(p, plan, d, sums);
  const auto kernel = p.stochastic ? (scan.reversed ? row_backward<C, true, true> : row_backward<C, true, false>)
                                   : (scan.reversed ? row_backward<C, false, true> : row_backward<C, false, false>);
  launch(kernel, blocks_in_all(p, l), 32 * l.per_block, row_backward_bytes<C>(p, l.per_block, l.strips > 1), l.cluster,
         stream, p, l);
  return true;
}
template <class T>
bool launch_vector_backward(const Params& p, int d, const Limits& device, void* sums, cudaStream_t stream) {
  if constexpr (kHasRows<LongConfig<T>>) {
    const Scan scan = make_scan(p, d);
    if (scan.length < kVectorLength) return false;
    if (has_few_warps(p, scan, device, kFewWarps) &&
        launch_column_backward<NarrowConfig<T>>(p, d, device, sums, stream))
      return true;
    return launch_column_backward<LongConfig<T>>(p, d, device, sums, stream) ||
           launch_row_backward<LongConfig<T>>(p, d, device, sums, stream);
  }
  return false;
}

// Calls use(Config<...>()) for the fused kernel of images of at most this length; as many channels are side by side in
// a warp as fit it.
template <class T, class Use>
bool with_fused(int64_t length, const Use& use) {
  if (length <= 16) return use(Config<T, 4, 4, 1, 8>());
  if (length <= 32) return use(Config<T, 4, 4, 1, 4>());
  if (length <= 64) return use(Config<T, 4, 4, 1, 2>());
  return use(Config<T, 4, 4, 1, 1>());
}

inline bool has_horizontal(const Params& p) {
  bool has = false;
  for (int d = 0; d < p.D; ++d) has = has || make_scan(p, d).horizontal;
  return has;
}

// Whether the fused kernel serves a call.
template <class T>
bool fused(const Params& p, const Limits& limits) {
  if constexpr (sizeof(T) == 8) return false;
  if (!may_be_resident(p, selected_path)) return false;
  return with_fused<T>(p.H > p.W ? p.H : p.W, [&](auto config) {
    using C = decltype(config);
    if constexpr (kHasFused<C>)
      return fused_fits<C>(p) && FusedMemory<C>::bytes(p, has_horizontal(p)) <= limits.shared_bytes;
    else
      return false;
  });
}

template <class T>
void launch_fused(const Params& p, cudaStream_t stream) {
  FusedLaunch l;
  int of_axis[2][kMaxDirections], count[2] = {};
  for (int d = 0; d < p.D; ++d) {
    const int axis = make_scan(p, d).horizontal ? 0 : 1;
    of_axis[axis][count[axis]++] = d;
  }
  int place = 0;
  for (int k = 0; k < kMaxDirections; ++k) {
    l.horizontal[k] = k < count[0] ? of_axis[0][k] : -1;
    for (int axis = 0; axis < 2; ++axis)
      if (k < count[axis]) l.order[place++] = of_axis[axis][k];
  }
  with_fused<T>(p.H > p.W ? p.H : p.W, [&](auto config) {
    using C = decltype(config);
    if constexpr (kHasFused<C>) {
      l.blocks = ceil_div(p.C, C::SEG);
      launch(fused_forward<C>, p.N * l.blocks, 32, FusedMemory<C>::bytes(p, count[0] > 0), 1, stream, p, l);
    }
    return true;
  });
}

// Calls use(Config<...>()) for the kernel of shared weights and images of at most this length.
template <class T, class Use>
auto with_shared(int64_t length, const Use& use) {
  if (length <= 7) return use(Config<T, 7, 1, 1, 32>());
  if (length <= 14) return use(Config<T, 7, 1, 1, 16>());
  if (length <= 28) return use(Config<T, 7, 1, 1, 8>());
  if (length <= 56) return use(Config<T, 7, 1, 1, 4>());
  if (length <= 80) return use(Config<T, 5, 1, 1, 2>());
  return use(Config<T, 5, 1, 1, 1>());
}

// Warps of a block and direction for a call that the kernel of shared weights serves, otherwise 0.
template <class T>
int shared_warps(const Params& p, const Limits& limits) {
  if constexpr (sizeof(T) == 8) return 0;
  if (!p.stochastic || shared_channels(p) < kShared || !may_be_resident(p, selected_path)) return 0;
  return with_shared<T>(p.H > p.W ? p.H : p.W, [&](auto config) {
    using C = decltype(config);
    int warps = kSharedWarps < ceil_div(p.C, C::SEG) ? kSharedWarps : ceil_div(p.C, C::SEG);
    if constexpr (kHasShared<C>) {
      while (warps > 0 && SharedMemory<C>::bytes(p, warps) > limits.shared_bytes) --warps;
      while (warps > 1 && p.N * ceil_div(p.C, warps * C::SEG) < limits.multiprocessors) --warps;
    }
    return warps;
  });
}

template <class T>
size_t shared_points_bytes(const Params& p) {
  return with_shared<T>(p.H > p.W ? p.H : p.W, [&](auto config) {
    return size_t(p.N * (p.C / shared_channels(p)) * shared_points(p, decltype(config)::kSegment, p.D)) *
           sizeof(SharedPoint);
  });
}

// Pairs of opposite directions; a direction without its opposite is a round of its own.
inline ResidentLaunch rounds_of(const Params& p) {
  ResidentLaunch l;
  bool taken[kMaxDirections] = {};
  for (int d = 0; d < p.D; ++d) {
    if (taken[d]) continue;
    int opposite = -1;
    for (int e = d + 1; e < p.D; ++e)
      if (!taken[e] && (int(p.directions[d]) ^ 1) == int(p.directions[e])) opposite = e;
    if (opposite >= 0) taken[opposite] = true;
    l.slots[l.rounds][0] = d, l.slots[l.rounds][1] = opposite;
    ++l.rounds;
  }
  return l;
}

template <class T>
void launch_shared(const Params& p, int warps, void* workspace, cudaStream_t stream) {
  SharedLaunch l;
  l.rounds = rounds_of(p);
  l.share = int(shared_channels(p));
  l.warps = warps;
  l.points = static_cast<SharedPoint*>(workspace);
  with_shared<T>(p.H > p.W ? p.H : p.W, [&](auto config) {
    using C = decltype(config);
    if constexpr (kHasShared<C>) {
      const int64_t points = shared_points_bytes<T>(p) / sizeof(SharedPoint);
      launch(prepare_shared<C>, (points + kPrepareThreads - 1) / kPrepareThreads, kPrepareThreads, 0, 1, stream, p, l);
      l.rounds.blocks = ceil_div(p.C, warps * C::SEG);
      launch(shared_forward<C>, p.N * l.rounds.blocks, 64 * warps, SharedMemory<C>::bytes(p, warps), 1, stream, p, l);
    }
  });
}

}  // namespace gspn::cuda
