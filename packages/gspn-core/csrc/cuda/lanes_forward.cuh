// Forward of images of channels_last, see lanes.cuh. Each warp copies the inputs of its positions to shared memory two
// lines ahead, asynchronously; weights that all channels share are normalised by one lane for each position.
#pragma once

#include "lanes.cuh"

namespace gspn::cuda {

template <class T>
using LaneConfig = Config<T, 8, 1, 1, 1>;
constexpr int kLaneWarps = 10;  // of a line at most

template <class C, bool kShared>
using LaneForwardRing = LaneRing<C, kShared ? 3 : 6, 3>;

// A block per image, 32 channels and chunk.
template <class C, bool kStochastic, bool kHorizontal, bool kShared>
__global__ void __launch_bounds__(32 * kLaneWarps, 2)
    lane_forward(const __grid_constant__ Params p, const __grid_constant__ LaneLaunch l) {
  using T = typename C::T;
  using A = typename C::A;
  using Ring = LaneForwardRing<C, kShared>;
  constexpr int kX = kShared ? 0 : 3;
  const LaneJob<C, kHorizontal> job(p, l);
  const LaneCheckpoints<A> checkpoints(p, job, l.d);
  LaneEdges<A> edges(shared_memory() + kLanePlaneBytes);
  Ring ring(shared_memory() + kLanePlaneBytes + LaneEdges<A>::bytes(edges.warps), edges.warp);
  note_planes<C>(p, l, job, p.y);
  __syncthreads();
  const auto copy = [&](int i) {
    if (i < job.end) {
      const int line = job.in_memory(i);
      if (!kShared)
#pragma unroll
        for (int k = 0; k < 3; ++k) ring.copy(k, p, job, kWeightPlanes + k, p.weights, line);
      ring.copy(kX, p, job, kXPlane, p.x, line);
      ring.copy(kX + 1, p, job, kLamPlane, p.lam, line);
      ring.copy(kX + 2, p, job, kUPlane, p.u, line);
      if (!l.first) ring.copy_sum(p, job, l.sums, line);
    }
    ring.commit();
  };
  SharedLaneWeights<C> weights;
  if (kShared) weights.load(p, job, job.begin);
#pragma unroll
  for (int ahead = 0; ahead < Ring::kSlots - 1; ++ahead) copy(job.begin + ahead);
  A h[C::P] = {};
  int due = checkpoints.after(job.begin - 1);
#pragma unroll 1
  for (int i = job.begin; i < job.end; ++i) {
    ring.wait();
    copy(i + Ring::kSlots - 1);
    const bool starts = i == job.begin;
    if (i == due) {
      A* const to = checkpoints.at(i);
#pragma unroll
      for (int q = 0; q < C::P; ++q)
        if (q < job.own && job.active) to[q] = starts ? A(0) : h[q];
      due = checkpoints.after(i);
    }
    LineOf<C> line;
    if (kShared) {
      weights.template prepare<kStochastic>(job, line);
      weights.load(p, job, i + 1);
    }
    prepare_lanes<C, kStochastic, kShared>(ring, p, job, line);
    A left = A(0), right = A(0);
    if (!starts) edges.exchange(h[0], h[C::P - 1], left, right);
    advance_between<C>(h, line, left, right, kStochastic, starts);
    const bool scaled = p.u.data != nullptr;
    const auto value = [&](int q) {
      const A own = scaled ? ring.input(kX + 2, q) * h[q] : h[q];
      return l.first ? own : own + ring.sum(q);
    };
    if (job.active && l.last) job.template write<T>(kOutPlane, p.y, job.in_memory(i), value);
    if (job.active && !l.last) job.template write<A>(kSumsPlane, l.sums, job.in_memory(i), value);
    ring.next();
  }
}

template <class C, bool kShared>
size_t lane_forward_bytes(int warps) {
  return kLanePlaneBytes + LaneEdges<typename C::A>::bytes(warps) + LaneForwardRing<C, kShared>::bytes(warps);
}

// Whether the channels are lanes.
template <class T>
bool lanes_serve(const Params& p, const Limits& limits) {
  if constexpr (sizeof(T) < 8) {
    using C = LaneConfig<T>;
    const int warps = ceil_div(p.H > p.W ? p.H : p.W, C::P);
    return lanes_fit<C>(p, selected_path, kLaneWarps) && lane_forward_bytes<C, false>(warps) <= limits.shared_bytes;
  }
  return false;
}

// Returns false if they are not.
template <class T>
bool launch_lanes(const Params& p, const Limits& limits, void* sums, cudaStream_t stream) {
  if constexpr (sizeof(T) < 8) {
    using C = LaneConfig<T>;
    if (!lanes_serve<T>(p, limits)) return false;
    for (int d = 0; d < p.D; ++d) {
      const Scan scan = make_scan(p, d);
      const LaneLaunch l = lane_launch(p, d, p.y, sums);
      const int warps = ceil_div(scan.length, C::P);
      const auto start = [&](auto is_shared) {
        constexpr bool kShared = decltype(is_shared)::value;
        const auto kernel =
            p.stochastic
                ? (scan.horizontal ? lane_forward<C, true, true, kShared> : lane_forward<C, true, false, kShared>)
                : (scan.horizontal ? lane_forward<C, false, true, kShared> : lane_forward<C, false, false, kShared>);
        launch(kernel, p.N * l.blocks * l.chunks, 32 * warps, lane_forward_bytes<C, kShared>(warps), 1, stream, p, l);
      };
      if (p.weights.channels == p.C)
        start(Bool<false>());
      else
        start(Bool<true>());
    }
    return true;
  }
  return false;
}

}  // namespace gspn::cuda
