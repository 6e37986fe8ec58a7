// Backward of images whose channels are neighbours in memory: the counterpart of lane_forward. The states of an interval
// of lines are recomputed from the checkpoint before it, and stay in shared memory with the thread that owns the
// positions. Weights may be shared by all channels: then each block sums over its 32, and finish_weights over blocks.
#pragma once

#include "gradients.cuh"
#include "lanes.cuh"

namespace gspn::cuda {

constexpr int kLaneBackwardWarps = 12;  // of a line at most: 168 registers remain for a thread

template <class T, bool kSums>
struct LaneGradientConfig : Config<T, 5, 1, 1, 1> {
  static constexpr bool kSumsWeights = kSums;
};

// Of a block: states before an interval and after each of its lines, [line][thread][position], and the edges.
template <class C>
size_t lane_backward_bytes(const Params& p, int warps) {
  using A = typename C::A;
  return kLanePlaneBytes + sizeof(A) * size_t(p.interval + 1) * C::P * 32 * warps + LaneEdges<A>::bytes(warps);
}

// Gates are of every channel, and a gradient is wanted that takes the states: without one there need not be any.
template <class C>
bool lane_gradients_fit(const Params& p, const Limits& limits, Path path) {
  const int64_t length = p.H > p.W ? p.H : p.W;
  return lanes_fit<C>(p, path, kLaneBackwardWarps) && (p.dweights.data != nullptr || p.du.data != nullptr) &&
         (p.lam.data == nullptr || p.lam.channels == p.C) && (p.u.data == nullptr || p.u.channels == p.C) &&
         lane_backward_bytes<C>(p, ceil_div(length, C::P)) <= limits.shared_bytes;
}

inline Partials lane_partials(const Params& p) {
  const bool shared = p.weights.channels == 1 && p.dweights.data != nullptr;
  const int64_t parts = ceil_div(p.C, 32);
  return {parts, shared ? parts * p.N * (p.stochastic ? 2 : 3) * p.H * p.W : 0, 0, 0};
}

// States of a thread's positions: five words, so that threads access different banks.
template <class A, int P>
struct LaneStates {
  A v[P];
};

// What the adjoint of a line reads beside the states.
template <class C>
struct LaneAdjointRow {
  LaneRow<C> inputs;
  LaneOutput<C> output;  // u, and the gradient of x of the directions before
  typename C::T dy[C::P];
};

template <class C, bool kStochastic, bool kHorizontal>
struct LaneAdjoint {
  using T = typename C::T;
  using A = typename C::A;
  using Job = LaneJob<C, kHorizontal>;
  static constexpr int P = C::P;
  const Params& p;
  const LaneLaunch& l;
  const Job job;
  LaneStates<A, P>* states;  // of the thread
  int threads = int(blockDim.x);
  LaneEdges<A> edges;
  A v[P] = {};

  __device__ __forceinline__ LaneAdjoint(const Params& p, const LaneLaunch& l)
      : p(p),
        l(l),
        job(p, l),
        states(reinterpret_cast<LaneStates<A, P>*>(shared_memory() + kLanePlaneBytes) + threadIdx.x),
        edges(shared_memory() + kLanePlaneBytes + sizeof(A) * (p.interval + 1) * P * blockDim.x) {
    note_planes<C>(p, l, job, p.dx);
    Job::template note<T>(kDyPlane, p.dy, job.n, 0);
    for (int k = 0; k < 3; ++k) Job::template note<T>(kDWeightPlanes + k, p.dweights, job.n, l.d, k);
    Job::template note<T>(kDlamPlane, p.dlam, job.n, l.d);
    Job::template note<T>(kDuPlane, p.du, job.n, l.d);
    __syncthreads();
  }

  // The job anew, so that what the compiler derives from it does not stay in registers beyond an interval.
  __device__ __forceinline__ Job fresh() const {
    Job again = job;
    again.channel = opaque(job.channel), again.place = opaque(job.place), again.own = opaque(job.own);
    again.length = opaque(job.length), again.lines = opaque(job.lines);
    return again;
  }
  __device__ __forceinline__ void keep(int number, const A (&h)[P]) const {
    LaneStates<A, P> state;
#pragma unroll
    for (int q = 0; q < P; ++q) state.v[q] = h[q];
    store_shared(states + number * threads, state);
  }

  // The states of the lines [begin, end).
  __device__ __forceinline__ void recompute(int begin, int end) {
    const Job job = fresh();
    A h[P] = {};
    if (begin > job.begin) {
      const A* const from = LaneCheckpoints<A>(p, job, l.d).at(begin);
#pragma unroll
      for (int q = 0; q < P; ++q)
        if (q < job.own) h[q] = from[q];
    }
    keep(0, h);
    LaneRow<C> rows[2];
    load_lanes(rows[0], p, job, job.in_memory(begin));
#pragma unroll 1
    for (int i0 = begin; i0 < end; i0 += 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = i0 + half;
        if (i >= end) break;
        if (i + 1 < end) load_lanes(rows[1 - half], p, job, job.in_memory(i + 1));
        LineOf<C> line;
        prepare_lane<C, kStochastic>(job, rows[half], p.lam.data != nullptr, line);
        A left = A(0), right = A(0);
        if (i > job.begin) edges.exchange(h[0], h[P - 1], left, right);
        advance_between<C>(h, line, left, right, kStochastic, i == job.begin);
        keep(i - begin + 1, h);
      }
    }
  }

  // The adjoint of the lines [begin, end), from the last to the first.
  __device__ __forceinline__ void run(int begin, int end) {
    const Job job = fresh();
#pragma unroll 1
    for (int i = end - 1; i >= begin; --i) adjoint(job, i, begin);
  }
  __device__ __forceinline__ void adjoint(const Job& job, int i, int begin) {
    LaneAdjointRow<C> row;
    const int line = job.in_memory(i);
    load_lanes(row.inputs, p, job, line);
    load_lanes(row.output, p, l, job, line);
    job.read(row.dy, kDyPlane, p.dy, line);
    AdjointLine<C> in;
    LaneStates<A, P>* const at = states + (i - begin) * threads;
    const auto before = load_shared(at), after = load_shared(at + threads);
#pragma unroll
    for (int q = 0; q < P; ++q) {
      in.before[q] = before.v[q], in.after[q] = after.v[q];
#pragma unroll
      for (int k = 0; k < 3; ++k) in.weights[k][q] = widen(row.inputs.weights[k][q]);
      in.x[q] = widen(row.inputs.x[q]), in.dy[q] = widen(row.dy[q]);
      in.lam[q] = p.lam.data != nullptr ? widen(row.inputs.lam[q]) : A(1);
      in.u[q] = p.u.data != nullptr ? widen(row.output.u[q]) : A(1);
    }
    // Those of the warps beside, which have them since the barriers of the recomputation.
    const A lower = edges.warp > 0 ? at[-32].v[P - 1] : A(0);
    const A upper = edges.warp + 1 < edges.warps ? at[32].v[0] : A(0);
    A g[P];
    LineOf<C> weights;
    LineGradients<C> out;
    adjoint_gradients<C, kStochastic>(
        in, v, lower, upper, [&](int q) { return job.has_left(q); }, [&](int q) { return job.has_right(q); },
        i == job.begin, out, g, weights);
#pragma unroll
    for (int q = 0; q < P; ++q)  // where nothing was loaded
      if (q >= job.own) weights.a[q] = weights.b[q] = weights.c[q] = g[q] = A(0);
    if (C::kSumsWeights && l.partials != nullptr) sum(job, line, out);
    if (job.active) store(job, row.output, line, out);
    A from_left, from_right;
    edges.exchange(weights.a[0] * g[0], weights.c[P - 1] * g[P - 1], from_left, from_right);
    step_back<C>(v, weights, g, from_left, from_right);
  }

  // The sums over the warp's channels.
  __device__ __forceinline__ void sum(const Job& job, int line, const LineGradients<C>& out) const {
    A* const partials = static_cast<A*>(l.partials) +
                        ((blockIdx.x / l.chunks % l.blocks) * p.N + job.n) * (kStochastic ? 2 : 3) * p.H * p.W;
    const int lane = int(threadIdx.x) & 31;
    const int64_t plane = p.H * p.W;
#pragma unroll
    for (int q = 0; q < P; ++q) {
      if (q >= job.own) break;
      const int64_t pixel = kHorizontal ? (job.place + q) * p.W + line : line * p.W + job.place + q;
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        if (kStochastic && k == 1) continue;
        A value = job.active ? out.dweights[k][q] : A(0);
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(~0u, value, mask);
        if (lane == 0) partials[(kStochastic ? k / 2 : k) * plane + pixel] = value;
      }
    }
  }
  __device__ __forceinline__ void store(const Job& job, const LaneOutput<C>& before, int line,
                                        const LineGradients<C>& out) const {
    const auto put = [&](int plane, const Field& f, const A(&values)[P]) {
      job.template write<T>(plane, f, line, [&](int q) { return values[q]; });
    };
    if (p.dx.data != nullptr) add_lanes(before, l, p.dx, job, line, [&](int q) { return out.dx[q]; });
    if (!C::kSumsWeights && p.dweights.data != nullptr)
#pragma unroll
      for (int k = 0; k < 3; ++k) put(kDWeightPlanes + k, p.dweights, out.dweights[k]);
    if (p.dlam.data != nullptr) put(kDlamPlane, p.dlam, out.dlam);
    if (p.du.data != nullptr) put(kDuPlane, p.du, out.du);
  }
};

template <class C, bool kStochastic, bool kHorizontal>
__global__ void __launch_bounds__(32 * kLaneBackwardWarps)
    lane_backward(const __grid_constant__ Params p, const __grid_constant__ LaneLaunch l) {
  LaneAdjoint<C, kStochastic, kHorizontal> part(p, l);
  const auto& job = part.job;
  const int interval = int(p.interval);
#pragma unroll 1
  for (int end = job.end, begin; end > job.begin; end = begin) {
    begin = (end - 1) / interval * interval;
    begin = begin > job.begin ? begin : job.begin;
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
    if (!lane_gradients_fit<LaneGradientConfig<T, false>>(p, limits, selected_path)) return false;
    const Partials s = lane_partials(p);
    for (int d = 0; d < p.D; ++d) {
      const Scan scan = make_scan(p, d);
      LaneLaunch l = lane_launch(p, d, p.dx, sums);
      l.partials = s.weights > 0 ? partials : nullptr;
      const auto start = [&](auto config) {
        using C = decltype(config);
        const int warps = ceil_div(scan.length, C::P);
        const auto kernel = p.stochastic
                                ? (scan.horizontal ? lane_backward<C, true, true> : lane_backward<C, true, false>)
                                : (scan.horizontal ? lane_backward<C, false, true> : lane_backward<C, false, false>);
        launch(kernel, p.N * l.blocks * l.chunks, 32 * warps, lane_backward_bytes<C>(p, warps), 1, stream,
               p, l);
      };
      if (p.weights.channels == p.C)
        start(LaneGradientConfig<T, false>());
      else
        start(LaneGradientConfig<T, true>());
      if (s.weights > 0)
        launch(finish_weights<T>, (p.N * p.H * p.W + kFinishThreads - 1) / kFinishThreads, kFinishThreads, 0, 1, stream,
               p, d, s.parts, static_cast<const Accumulator<T>*>(partials));
    }
    return true;
  }
  return false;
}

}  // namespace gspn::cuda
