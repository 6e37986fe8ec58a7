// Launches for one storage type: plans, template arguments of a cover, workspaces.
#pragma once

#include "lanes_backward.cuh"
#include "lanes_forward.cuh"
#include "typed.hpp"
#include "vectors.cuh"

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

// Any scan.
template <class T>
void launch_strips(const Params& p, int d, const Limits& device, void* sums, cudaStream_t stream) {
  const Plan plan = forward_plan<T>(p, d, device);
  const StripLaunch l = strip_launch(p, plan, d, sums);
  with_cover<T>(plan.cover, [&](auto config) {
    using C = decltype(config);
    const auto kernel = make_scan(p, d).horizontal ? strip_forward<C, true> : strip_forward<C, false>;
    launch(kernel, blocks_in_all(p, l), 32 * C::CW * l.per_block,
           strip_forward_bytes<C>(p.stochastic, l.per_block, l.strips > 1), l.cluster, stream, p, l);
  });
}

template <class T>
size_t Typed<T>::forward_workspace(const Params& p) {
  Cover cover;
  const Limits device = device_limits();
  if (lanes_serve<T>(p, device)) return sums_bytes<T>(p, p.y);
  if (fused<T>(p, device)) return 0;
  if (shared_warps<T>(p, device) > 0) return shared_points_bytes<T>(p);
  return resident<T>(p, device, cover) ? 0 : sums_bytes<T>(p, p.y);
}

template <class T>
void Typed<T>::forward(const Params& p, void* workspace, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  const Limits device = device_limits();
  if (launch_lanes<T>(p, device, sums_bytes<T>(p, p.y) > 0 ? workspace : nullptr, stream)) return;
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
    if (!launch_rows<T>(p, d, device, sums, stream) && !launch_columns<T>(p, d, device, sums, stream))
      launch_strips<T>(p, d, device, sums, stream);
}

template <class T>
Partials partials_for(const Params& p, const Plan& plan) {
  return with_cover<T>(plan.cover, [&](auto config) { return partials_of<decltype(config)>(p); });
}

template <class T>
size_t Typed<T>::backward_workspace(const Params& p) {
  int64_t most = lane_partials(p).weights;
  const Limits device = device_limits();
  for (int d = 0; d < p.D; ++d) {
    const Partials s = partials_for<T>(p, backward_plan<T>(p, d, device));
    const int64_t needed = s.weights + s.lam + s.u;
    most = needed > most ? needed : most;
  }
  return sums_bytes<T>(p, p.dx) + size_t(most) * sizeof(Accumulator<T>);
}

// Any scan, and the sums over channels that share weights or gates.
template <class T>
void launch_strip_backward(const Params& p, int d, const Limits& device, void* sums, Accumulator<T>* partials,
                           cudaStream_t stream) {
  using A = Accumulator<T>;
  const Plan plan = backward_plan<T>(p, d, device);
  StripLaunch l = strip_launch(p, plan, d, sums);
  l.partials = partials;
  with_cover<T>(plan.cover, [&](auto config) {
    using C = decltype(config);
    if constexpr (C::SEG <= kBackwardSegments) {
      const auto kernel = make_scan(p, d).horizontal ? strip_backward<C, true> : strip_backward<C, false>;
      launch(kernel, blocks_in_all(p, l), 32 * C::CW * l.per_block,
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

template <class T>
void Typed<T>::backward(const Params& p, void* workspace, void* raw_stream) {
  const auto stream = static_cast<cudaStream_t>(raw_stream);
  const Limits device = device_limits();
  const size_t sums_size = sums_bytes<T>(p, p.dx);
  void* const sums = sums_size > 0 ? workspace : nullptr;
  auto* const partials = reinterpret_cast<Accumulator<T>*>(static_cast<char*>(workspace) + sums_size);
  if (launch_lanes_backward<T>(p, device, sums, partials, stream)) return;
  for (int d = 0; d < p.D; ++d)
    if (!launch_vector_backward<T>(p, d, device, sums, stream))
      launch_strip_backward<T>(p, d, device, sums, partials, stream);
}

}  // namespace gspn::cuda
