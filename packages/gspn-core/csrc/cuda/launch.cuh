// Launches for one storage type: plans, template arguments of a cover, workspaces.
#pragma once

#include "backward.cuh"
#include "fused.cuh"
#include "plan.hpp"
#include "shared.cuh"
#include "typed.hpp"

namespace gspn::cuda {

// Calls use(Config<...>()) with the configuration of a cover; only the covers in plan.hpp are instantiated.
template <class T, class Use>
auto with_cover(const Cover& c, const Use& use) {
  const auto is = [&](int P, int K, int CW, int SEG) { return c.P == P && c.K == K && c.CW == CW && c.SEG == SEG; };
  if constexpr (sizeof(T) == 8) {
    if (is(1, 4, 1, 1)) return use(Config<T, 1, 4, 1, 1>());
    return use(Config<T, 2, 4, 1, 1>());
  } else {
    if (is(1, 8, 1, 4)) return use(Config<T, 1, 8, 1, 4>());
    if (is(1, 8, 1, 2)) return use(Config<T, 1, 8, 1, 2>());
    if (is(1, 8, 1, 1)) return use(Config<T, 1, 8, 1, 1>());
    if (is(1, 8, 4, 1)) return use(Config<T, 1, 8, 4, 1>());
    if (is(2, 8, 1, 1)) return use(Config<T, 2, 8, 1, 1>());
    if (is(2, 8, 4, 1)) return use(Config<T, 2, 8, 4, 1>());
    if (is(4, 4, 4, 1)) return use(Config<T, 4, 4, 4, 1>());
    if (is(8, 2, 1, 1)) return use(Config<T, 8, 2, 1, 1>());
    return use(Config<T, 4, 4, 1, 1>());
  }
}

template <class T>
bool resident(const Params& p, const Limits& limits, Cover& cover) {
  const auto bytes = [&](const Cover& c) {
    return with_cover<T>(c, [&](auto config) { return ResidentMemory<decltype(config)>::bytes(p); });
  };
  return plan_resident(p, limits, selected_path, bytes, cover);
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
Plan forward_plan(const Params& p, int d, const Limits& limits) {
  return plan_strips(p, d, limits, selected_path, kForwardWarps, kForwardSegments, [&](const Cover& c, int per_block) {
    return with_cover<T>(
        c, [&](auto config) { return strip_forward_bytes<decltype(config)>(p.stochastic, per_block, true); });
  });
}

template <class T>
Plan backward_plan(const Params& p, int d, const Limits& limits) {
  return plan_strips(p, d, limits, selected_path, kBackwardWarps, kBackwardSegments,
                     [&](const Cover& c, int per_block) {
                       return with_cover<T>(
                           c, [&](auto config) { return strip_backward_bytes<decltype(config)>(p, per_block, true); });
                     });
}

inline int64_t elements(const Params& p) { return p.N * p.C * p.H * p.W; }

// Sums over directions need scratch memory if the output is not of the accumulation type.
template <class T>
size_t sums_bytes(const Params& p, const Field& out) {
  const bool needed = sizeof(T) != sizeof(Accumulator<T>) && p.D > 1 && out.data != nullptr;
  return needed ? size_t(elements(p)) * sizeof(Accumulator<T>) : 0;
}

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
  using C = Config<T, kLong.P, kLong.K, kLong.CW, kLong.SEG>;
  if constexpr (kHasRows<C>) {
    const Scan scan = make_scan(p, d);
    const auto bytes = [&](const Cover&, int per_block) { return row_forward_bytes<C>(p, per_block, true); };
    Plan plan;
    if (!rows_fit<C>(p, scan) || !plan_cover(p, d, device, selected_path, kForwardWarps, kLong, bytes, plan))
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

// A vertical scan of rows of vectors, or any other scan.
template <class T>
void launch_strips(const Params& p, int d, const Limits& device, void* sums, cudaStream_t stream) {
  const Plan plan = forward_plan<T>(p, d, device);
  const StripLaunch l = strip_launch(p, plan, d, sums);
  with_cover<T>(plan.cover, [&](auto config) {
    using C = decltype(config);
    if constexpr (kHasColumns<C>) {
      if (columns_fit<C>(p, make_scan(p, d))) {
        const size_t halos = l.strips > 1 ? sizeof(typename C::A) * l.per_block * Strips<C>::kBuffer : 0;
        launch(p.stochastic ? column_forward<C, true> : column_forward<C, false>, blocks_in_all(p, l), 32 * l.per_block,
               halos, l.cluster, stream, p, l);
        return;
      }
    }
    const auto kernel = make_scan(p, d).horizontal ? strip_forward<C, true> : strip_forward<C, false>;
    launch(kernel, blocks_in_all(p, l), 32 * C::CW * l.per_block,
           strip_forward_bytes<C>(p.stochastic, l.per_block, l.strips > 1), l.cluster, stream, p, l);
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
  if (length <= 20) return use(Config<T, 5, 1, 1, 8>());
  if (length <= 28) return use(Config<T, 7, 1, 1, 8>());
  if (length <= 56) return use(Config<T, 7, 1, 1, 4>());
  if (length <= 80) return use(Config<T, 5, 1, 1, 2>());
  if (length <= 112) return use(Config<T, 7, 1, 1, 2>());
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

template <class T>
size_t Typed<T>::forward_workspace(const Params& p) {
  Cover cover;
  const Limits device = device_limits();
  if (fused<T>(p, device)) return 0;
  if (shared_warps<T>(p, device) > 0) return shared_points_bytes<T>(p);
  return resident<T>(p, device, cover) ? 0 : sums_bytes<T>(p, p.y);
}

template <class T>
void Typed<T>::forward(const Params& p, void* workspace, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  const Limits device = device_limits();
  if (fused<T>(p, device)) return launch_fused<T>(p, stream);
  if (const int warps = shared_warps<T>(p, device)) return launch_shared<T>(p, warps, workspace, stream);
  Cover cover;
  if (resident<T>(p, device, cover)) {
    ResidentLaunch l = rounds_of(p);
    l.blocks = blocks_of(p, cover);
    with_cover<T>(cover, [&](auto config) {
      using C = decltype(config);
      if constexpr (sizeof(T) != 8 && C::P <= 4)
        launch(resident_forward<C>, p.N * l.blocks, 64 * C::CW, ResidentMemory<C>::bytes(p), 1, stream, p, l);
    });
    return;
  }
  void* const sums = sums_bytes<T>(p, p.y) > 0 ? workspace : nullptr;
  for (int d = 0; d < p.D; ++d)
    if (!launch_rows<T>(p, d, device, sums, stream)) launch_strips<T>(p, d, device, sums, stream);
}

template <class T>
Partials partials_for(const Params& p, const Plan& plan) {
  return with_cover<T>(plan.cover, [&](auto config) { return partials_of<decltype(config)>(p); });
}

template <class T>
size_t Typed<T>::backward_workspace(const Params& p) {
  int64_t most = 0;
  const Limits device = device_limits();
  for (int d = 0; d < p.D; ++d) {
    const Partials s = partials_for<T>(p, backward_plan<T>(p, d, device));
    const int64_t needed = s.weights + s.lam + s.u;
    most = needed > most ? needed : most;
  }
  return sums_bytes<T>(p, p.dx) + size_t(most) * sizeof(Accumulator<T>);
}

template <class T>
void Typed<T>::backward(const Params& p, void* workspace, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  using A = Accumulator<T>;
  const Limits device = device_limits();
  const size_t sums_size = sums_bytes<T>(p, p.dx);
  A* const partials = reinterpret_cast<A*>(static_cast<char*>(workspace) + sums_size);
  for (int d = 0; d < p.D; ++d) {
    const Plan plan = backward_plan<T>(p, d, device);
    StripLaunch l = strip_launch(p, plan, d, sums_size > 0 ? workspace : nullptr);
    l.partials = partials;
    with_cover<T>(plan.cover, [&](auto config) {
      using C = decltype(config);
      if constexpr (C::SEG <= kBackwardSegments) {
        const auto kernel = make_scan(p, d).horizontal ? strip_backward<C, true> : strip_backward<C, false>;
        launch(kernel, p.N * l.blocks * l.chunks * l.cluster, 32 * C::CW * l.per_block,
               strip_backward_bytes<C>(p, l.per_block, l.strips > 1), l.cluster, stream, p, l);
      }
    });
    const Partials s = partials_for<T>(p, plan);
    const int64_t plane = p.H * p.W;
    const auto finish_blocks = [&](int64_t channels) {
      return (p.N * channels * plane + kFinishThreads - 1) / kFinishThreads;
    };
    const A* next = partials;
    if (s.weights > 0)
      launch(finish_weights<T>, finish_blocks(p.weights.channels), kFinishThreads, 0, 1, stream, p, d, s.parts, next);
    next += s.weights;
    if (s.lam > 0)
      launch(finish_gate<T>, finish_blocks(p.lam.channels), kFinishThreads, 0, 1, stream, p, p.dlam, d, next);
    next += s.lam;
    if (s.u > 0) launch(finish_gate<T>, finish_blocks(p.u.channels), kFinishThreads, 0, 1, stream, p, p.du, d, next);
  }
}

}  // namespace gspn::cuda
