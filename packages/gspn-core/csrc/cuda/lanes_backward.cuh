// Backward of images of channels_last, see lanes.cuh. The states of an interval of lines are recomputed from the
// checkpoint before it, and stay in shared memory with the thread that owns the positions; then the adjoint runs back.
// Weights may be shared by all channels: then each block sums over its 32, and finish_weights over blocks.
#pragma once

#include "lanes.cuh"
#include "partials.cuh"

namespace gspn::cuda {

template <class T>
using LaneGradientConfig = Config<T, 8, 1, 1, 1>;
constexpr int kLaneBackwardWarps = 8;  // of a line at most

// Weights, x, its gate; then u and dy.
template <class C, bool kShared>
using LaneBackwardRing = LaneRing<C, kShared ? 4 : 7, 2>;

// Of a block: where planes begin, edges, inputs, and the states before an interval and after each of its lines,
// [line][position][thread].
template <class C, bool kShared>
size_t lane_backward_bytes(const Params& p, int warps) {
  using A = typename C::A;
  return kLanePlaneBytes + LaneEdges<A>::bytes(warps) + LaneBackwardRing<C, kShared>::bytes(warps) +
         sizeof(A) * size_t(p.interval + 1) * C::P * 32 * warps;
}

// Whether the channels are lanes, and a gradient is wanted that takes the states: without one there need not be any.
template <class T>
bool lane_gradients_serve(const Params& p, const Limits& limits) {
  if constexpr (sizeof(T) < 8) {
    using C = LaneGradientConfig<T>;
    const int warps = ceil_div(p.H > p.W ? p.H : p.W, C::P);
    return lanes_fit<C>(p, selected_path, kLaneBackwardWarps) && (p.dweights.data != nullptr || p.du.data != nullptr) &&
           lane_backward_bytes<C, false>(p, warps) <= limits.shared_bytes;
  }
  return false;
}

inline Partials lane_partials(const Params& p) {
  const bool shared = p.weights.channels == 1 && p.dweights.data != nullptr;
  const int64_t parts = ceil_div(p.C, 32);
  return {parts, shared ? parts * p.N * (p.stochastic ? 2 : 3) * p.H * p.W : 0, 0, 0};
}

template <class C, bool kStochastic, bool kHorizontal, bool kShared>
struct LaneAdjoint {
  using T = typename C::T;
  using A = typename C::A;
  using Job = LaneJob<C, kHorizontal>;
  using Ring = LaneBackwardRing<C, kShared>;
  static constexpr int P = C::P, kX = kShared ? 0 : 3, kLam = kX + 1, kU = kX + 2, kDy = kX + 3;
  const Params& p;
  const LaneLaunch& l;
  const Job job;
  LaneEdges<A> edges;
  Ring ring;
  A* states;  // of the thread
  int threads = int(blockDim.x);
  A v[P] = {};

  __device__ __forceinline__ LaneAdjoint(const Params& p, const LaneLaunch& l)
      : p(p),
        l(l),
        job(p, l),
        edges(shared_memory() + kLanePlaneBytes),
        ring(shared_memory() + kLanePlaneBytes + LaneEdges<A>::bytes(edges.warps), edges.warp),
        states(reinterpret_cast<A*>(shared_memory() + kLanePlaneBytes + LaneEdges<A>::bytes(edges.warps) +
                                    Ring::bytes(edges.warps)) +
               threadIdx.x) {
    note_planes<C>(p, l, job, p.dx);
    Job::template note<T>(kDyPlane, p.dy, job.n, 0);
    for (int k = 0; k < 3; ++k) Job::template note<T>(kDWeightPlanes + k, p.dweights, job.n, l.d, k);
    Job::template note<T>(kDlamPlane, p.dlam, job.n, l.d);
    Job::template note<T>(kDuPlane, p.du, job.n, l.d);
    __syncthreads();
  }
  __device__ __forceinline__ A* state(int number) const { return states + number * P * threads; }
  __device__ __forceinline__ void keep(int number, const A (&h)[P]) const {
    A* const to = state(number);
#pragma unroll
    for (int q = 0; q < P; ++q) store_shared(to + q * threads, h[q]);
  }
  // The inputs of the recomputation; the adjoint takes more.
  __device__ __forceinline__ void copy(int i, bool exists, bool adjoint) {
    if (exists) {
      const int line = job.in_memory(i);
      if (!kShared)
#pragma unroll
        for (int k = 0; k < 3; ++k) ring.copy(k, p, job, kWeightPlanes + k, p.weights, line);
      ring.copy(kX, p, job, kXPlane, p.x, line);
      ring.copy(kLam, p, job, kLamPlane, p.lam, line);
      if (adjoint) {
        ring.copy(kU, p, job, kUPlane, p.u, line);
        ring.copy(kDy, p, job, kDyPlane, p.dy, line);
        if (!l.first && p.dx.data != nullptr) ring.copy_sum(p, job, l.sums, line);
      }
    }
    ring.commit();
  }

  // The states of the lines [begin, end).
  __device__ __forceinline__ void recompute(int begin, int end) {
    SharedLaneWeights<C> weights;
    if (kShared) weights.load(p, job, begin);
    copy(begin, true, false);
    A h[P] = {};
    if (begin > job.begin) {
      const A* const from = LaneCheckpoints<A>(p, job, l.d).at(begin);
#pragma unroll
      for (int q = 0; q < P; ++q)
        if (q < job.own) h[q] = from[q];
    }
    keep(0, h);
#pragma unroll 1
    for (int i = begin; i < end; ++i) {
      ring.wait();
      copy(i + 1, i + 1 < end, false);
      LineOf<C> line;
      if (kShared) {
        weights.template prepare<kStochastic>(job, line);
        weights.load(p, job, i + 1);
      }
      prepare_lanes<C, kStochastic, kShared>(ring, p, job, line);
      A left = A(0), right = A(0);
      if (i > job.begin) edges.exchange(h[0], h[P - 1], left, right);
      advance_between<C>(h, line, left, right, kStochastic, i == job.begin);
      keep(i - begin + 1, h);
      ring.next();
    }
    ring.wait();  // so that the slot which a group of no copies has taken is free
    ring.next();
  }

  // The adjoint of the lines [begin, end), from the last to the first.
  __device__ __forceinline__ void run(int begin, int end) {
    SharedLaneWeights<C> weights;
    if (kShared) weights.load(p, job, end - 1);
    copy(end - 1, true, true);
#pragma unroll 1
    for (int i = end - 1; i >= begin; --i) {
      ring.wait();
      copy(i - 1, i - 1 >= begin, true);
      LineOf<C> shared;
      if (kShared) {
        weights.template prepare<kStochastic>(job, shared);
        if (i > begin) weights.load(p, job, i - 1);
      }
      adjoint(i, begin, shared);
      ring.next();
    }
    ring.wait();
    ring.next();
  }
  // One line: its gradients, and v of the line before.
  __device__ __forceinline__ void adjoint(int i, int begin, const LineOf<C>& shared) {
    const int line = job.in_memory(i);
    const A *const before = state(i - begin), *const after = before + P * threads;
    A next[P] = {}, first = A(0), last = A(0);
    // Those of the warps beside, which have them since the barriers of the recomputation.
    A below = edges.warp > 0 ? before[(P - 1) * threads - 32] : A(0), own = load_shared(before);
#pragma unroll
    for (int q = 0; q < P; ++q) {
      if (q >= job.own) break;
      const A above = q < P - 1                      ? load_shared(before + (q < P - 1 ? q + 1 : 0) * threads)
                      : edges.warp + 1 < edges.warps ? before[32]
                                                     : A(0);
      const bool has_left = job.has_left(q), has_right = job.has_right(q);
      const A dy = ring.input(kDy, q), x = ring.input(kX, q);
      const A lam = p.lam.data != nullptr ? ring.input(kLam, q) : A(1);
      const A u = p.u.data != nullptr ? ring.input(kU, q) : A(1);
      const A g = u * dy + v[q];
      A logits[3] = {}, a, b, c, dw[3] = {};
      if (kShared) {
        a = shared.a[q], b = shared.b[q], c = shared.c[q];
      } else {
#pragma unroll
        for (int k = 0; k < 3; ++k) logits[k] = ring.input(k, q);
        prepare_weights<T, kStochastic>(logits[0], logits[1], logits[2], has_left, has_right, a, b, c);
      }
      if (kStochastic) b = (A(1) - a) - c;
      if (i == job.begin) {  // zero, whatever the weights
      } else if (kStochastic) {
        const A to_left = existing(has_left, g * (below - own)), to_right = existing(has_right, g * (above - own));
        const A t = a * to_left + c * to_right;
        dw[0] = kShared ? to_left : existing(has_left, a * slope<T>(logits[0]) * (to_left - t));
        dw[1] = kShared ? A(0) : -(b * slope<T>(logits[1]) * t);
        dw[2] = kShared ? to_right : existing(has_right, c * slope<T>(logits[2]) * (to_right - t));
      } else {
        dw[0] = existing(has_left, g * below), dw[1] = g * own, dw[2] = existing(has_right, g * above);
      }
      store(q, line, lam * g, dw, g * x, dy * load_shared(after + q * threads));
      next[q] += b * g;
      (q > 0 ? next[q > 0 ? q - 1 : 0] : first) += a * g;
      (q < P - 1 ? next[q < P - 1 ? q + 1 : 0] : last) += c * g;
      below = own, own = above;
    }
    A from_left, from_right;
    edges.exchange(first, last, from_left, from_right);
    next[0] += from_left, next[P - 1] += from_right;
#pragma unroll
    for (int q = 0; q < P; ++q) v[q] = q < job.own ? next[q] : A(0);
  }
  __device__ __forceinline__ void store(int q, int line, A dx, const A (&dw)[3], A dlam, A du) const {
    if (kShared && l.partials != nullptr) sum(q, line, dw);
    if (!job.active) return;
    if (p.dx.data != nullptr) {
      if (!l.first) dx += ring.sum(q);
      if (l.last)
        narrow(dx, *job.template at<T>(kOutPlane, p.dx, line, q));
      else
        *job.template at<A>(kSumsPlane, l.sums, line, q) = dx;
    }
    if (!kShared && p.dweights.data != nullptr)
#pragma unroll
      for (int k = 0; k < 3; ++k) narrow(dw[k], *job.template at<T>(kDWeightPlanes + k, p.dweights, line, q));
    if (p.dlam.data != nullptr) narrow(dlam, *job.template at<T>(kDlamPlane, p.dlam, line, q));
    if (p.du.data != nullptr) narrow(du, *job.template at<T>(kDuPlane, p.du, line, q));
  }
  // The sums over the warp's channels.
  __device__ __forceinline__ void sum(int q, int line, const A (&dw)[3]) const {
    constexpr int kPlanes = kStochastic ? 2 : 3;
    const int64_t plane = p.H * p.W, block = blockIdx.x / l.chunks % l.blocks;
    A* const partials = static_cast<A*>(l.partials) + (block * p.N + job.n) * kPlanes * plane;
    const int64_t pixel = kHorizontal ? (job.place + q) * p.W + line : line * p.W + job.place + q;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if (kStochastic && k == 1) continue;
      A value = job.active ? dw[k] : A(0);
#pragma unroll
      for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
      if ((threadIdx.x & 31) == 0) partials[(kStochastic ? k / 2 : k) * plane + pixel] = value;
    }
  }
};

template <class C, bool kStochastic, bool kHorizontal, bool kShared>
__global__ void __launch_bounds__(32 * kLaneBackwardWarps, 2)
    lane_backward(const __grid_constant__ Params p, const __grid_constant__ LaneLaunch l) {
  LaneAdjoint<C, kStochastic, kHorizontal, kShared> part(p, l);
  const int interval = int(p.interval), first = part.job.begin;
#pragma unroll 1
  for (int end = part.job.end, begin; end > first; end = begin) {
    begin = (end - 1) / interval * interval;
    begin = begin > first ? begin : first;
    part.recompute(begin, end);
    __syncthreads();  // warps read the states of those beside
    part.run(begin, end);
    __syncthreads();  // before the next states
  }
}

// Returns false if the channels are not lanes. Sums over blocks go to `partials`.
template <class T>
bool launch_lanes_backward(const Params& p, const Limits& limits, void* sums, void* partials, cudaStream_t stream) {
  if constexpr (sizeof(T) < 8) {
    using C = LaneGradientConfig<T>;
    if (!lane_gradients_serve<T>(p, limits)) return false;
    const Partials s = lane_partials(p);
    for (int d = 0; d < p.D; ++d) {
      const Scan scan = make_scan(p, d);
      LaneLaunch l = lane_launch(p, d, p.dx, sums);
      l.partials = s.weights > 0 ? partials : nullptr;
      const int warps = ceil_div(scan.length, C::P);
      const auto start = [&](auto is_shared) {
        constexpr bool kShared = decltype(is_shared)::value;
        const auto kernel =
            p.stochastic
                ? (scan.horizontal ? lane_backward<C, true, true, kShared> : lane_backward<C, true, false, kShared>)
                : (scan.horizontal ? lane_backward<C, false, true, kShared> : lane_backward<C, false, false, kShared>);
        launch(kernel, p.N * l.blocks * l.chunks, 32 * warps, lane_backward_bytes<C, kShared>(p, warps), 1, stream, p,
               l);
      };
      if (p.weights.channels == p.C)
        start(Bool<false>());
      else
        start(Bool<true>());
      if (s.weights > 0)
        launch(finish_weights<T>, (p.N * p.H * p.W + kFinishThreads - 1) / kFinishThreads, kFinishThreads, 0, 1, stream,
               p, d, s.parts, static_cast<const Accumulator<T>*>(partials));
    }
    return true;
  }
  return false;
}

}  // namespace gspn::cuda
