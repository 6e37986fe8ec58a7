// Forward of images whose channels are neighbours in memory (channels_last): a lane is a channel, so that every access
// is to neighbours, whatever the direction and the length of a line. A warp has a few positions of a line, which a lane
// computes one after another; the warps of a line exchange the states at their edges through shared memory. The inputs
// of a line are loaded while the line before is computed.
#pragma once

#include "forward.cuh"

namespace gspn::cuda {

constexpr int kLaneWarps = 16;     // of a line at most: 128 registers remain for a thread
constexpr int kLaneChannels = 16;  // with fewer, most lanes would be idle

template <class T>
using LaneConfig = Config<T, 5, 1, 1, 1>;

// Whether channels, if there are several, are neighbours.
inline bool are_lanes(const Params& p, const Field& f) {
  return f.data == nullptr || f.channels == 1 || (f.channels == p.C && f.c == 1);
}

template <class C>
bool lanes_fit(const Params& p, Path path, int most_warps) {
  const int64_t length = p.H > p.W ? p.H : p.W;
  bool fit = path == Path::kAuto && p.dtype != Dtype::kFloat64 && p.C >= kLaneChannels &&
             length <= C::P * most_warps;
  for (const Field* f : {&p.x, &p.weights, &p.lam, &p.u, &p.y, &p.dy, &p.dx, &p.dweights, &p.dlam, &p.du})
    fit = fit && are_lanes(p, *f);
  return fit;
}

// Parameters of one launch, in addition to Params.
struct LaneLaunch {
  int d = 0;                       // place of the direction
  int chunks = 1;                  // independent scans of an image
  int64_t blocks = 1;              // of 32 channels, of an image
  bool first = true, last = true;  // whether d is the first, the last of the directions
  Field sums;                      // over the directions, in the accumulation type
  void* partials = nullptr;        // backward: sums over a block's channels, which share their weights
};

// `out` is y, or the gradient of x; its sums are in `sums`, or in itself where that is null.
inline LaneLaunch lane_launch(const Params& p, int d, const Field& out, void* sums) {
  LaneLaunch l;
  l.d = d, l.first = d == 0, l.last = d == p.D - 1;
  l.chunks = chunks_of(p, make_scan(p, d)), l.blocks = ceil_div(p.C, 32);
  l.sums = sums == nullptr ? out : Field{sums, p.C, p.C * p.H * p.W, 0, 1, 0, p.W * p.C, p.C};
  return l;
}

// The planes that a block uses, of one image and direction.
enum LanePlane { kWeightPlanes = 0, kXPlane = 3, kLamPlane, kUPlane, kOutPlane, kSumsPlane, kForwardPlanes };
enum LaneGradientPlane { kDyPlane = kForwardPlanes, kDWeightPlanes, kDlamPlane = kDWeightPlanes + 3, kDuPlane };
constexpr int kLanePlanes = kDuPlane + 1;
constexpr size_t kLanePlaneBytes = 128;  // of shared memory
static_assert(kLanePlanes * sizeof(void*) <= kLanePlaneBytes, "room for all planes");

// What a thread has: a channel, and positions [place, place + own) of every line of a chunk.
template <class C, bool kHorizontal>
struct LaneJob {
  int64_t n;
  int channel, place, own, lines, length, begin, end, warp;
  bool active;  // there is such a channel
  bool reversed;

  __device__ __forceinline__ LaneJob(const Params& p, const LaneLaunch& l) {
    const Scan scan = make_scan(p, l.d);
    int64_t id = blockIdx.x;
    const int chunk = int(id % l.chunks);
    id /= l.chunks;
    channel = int(id % l.blocks) * 32 + int(threadIdx.x & 31);
    n = id / l.blocks;
    active = channel < int(p.C);
    if (!active) channel = int(p.C) - 1;
    warp = int(threadIdx.x) / 32, place = warp * C::P;
    lines = int(scan.lines), length = int(scan.length), reversed = scan.reversed;
    own = length - place < C::P ? length - place : C::P;
    const int size = p.chunk > 0 && p.chunk < scan.lines ? int(p.chunk) : lines;
    begin = chunk * size;
    end = begin + size < lines ? begin + size : lines;
  }
  __device__ __forceinline__ bool has_left(int q) const { return q > 0 || place > 0; }
  __device__ __forceinline__ bool has_right(int q) const { return place + q + 1 < length; }
  // A line in the order of memory.
  __device__ __forceinline__ int in_memory(int i) const { return reversed ? lines - 1 - i : i; }

  // Notes where a plane begins. In shared memory, since registers are few; a barrier has to follow.
  template <class T>
  static __device__ __forceinline__ void note(int plane, const Field& f, int64_t n, int64_t d, int64_t k = 0) {
    if (threadIdx.x == 0)
      static_cast<T**>(planes())[plane] = static_cast<T*>(f.data) + (n * f.n + d * f.d + k * f.k);
  }
  static __device__ __forceinline__ void* planes() { return shared_memory(); }
  // The thread's first position on a line, in the order of memory.
  template <class T>
  __device__ __forceinline__ T* at(int plane, const Field& f, int line) const {
    T* const base = static_cast<T* const volatile*>(planes())[plane];
    return base + (line * int(kHorizontal ? f.col : f.row) + opaque(place) * step(f) + (f.channels == 1 ? 0 : channel));
  }
  // Elements from a position to the next.
  static __device__ __forceinline__ int step(const Field& f) { return int(kHorizontal ? f.row : f.col); }

  template <class V>
  __device__ __forceinline__ void read(V (&to)[C::P], int plane, const Field& f, int line) const {
    const V* const from = at<V>(plane, f, line);
    const int step = opaque(LaneJob::step(f));  // or the compiler keeps a multiple of it for every position
#pragma unroll
    for (int q = 0; q < C::P; ++q)
      if (q < own) to[q] = load_vector(from + q * step);
  }
  template <class V, class Value>
  __device__ __forceinline__ void write(int plane, const Field& f, int line, const Value& value) const {
    V* const to = at<V>(plane, f, line);
    const int step = opaque(LaneJob::step(f));
#pragma unroll
    for (int q = 0; q < C::P; ++q)
      if (q < own) narrow(value(q), to[q * step]);
  }
};

template <class C, class Job>
__device__ __forceinline__ void note_planes(const Params& p, const LaneLaunch& l, const Job& job, const Field& out) {
  using T = typename C::T;
  for (int k = 0; k < 3; ++k) Job::template note<T>(kWeightPlanes + k, p.weights, job.n, l.d, k);
  Job::template note<T>(kXPlane, p.x, job.n, 0);
  Job::template note<T>(kLamPlane, p.lam, job.n, l.d);
  Job::template note<T>(kUPlane, p.u, job.n, l.d);
  Job::template note<T>(kOutPlane, out, job.n, 0);
  Job::template note<typename C::A>(kSumsPlane, l.sums, job.n, 0);
}

// The edges of all warps of a line: [parity][warp][side][lane].
template <class A>
struct LaneEdges {
  A* own;
  int warp, warps, parity = 0;

  static GSPN_HOST_DEVICE size_t bytes(int warps) { return warps > 1 ? sizeof(A) * 2 * 2 * 32 * warps : 0; }
  __device__ __forceinline__ explicit LaneEdges(void* memory)
      : warp(int(threadIdx.x) / 32), warps(int(blockDim.x) / 32) {
    own = static_cast<A*>(memory) + warp * 64 + int(threadIdx.x & 31);
  }
  // Gives the neighbours `first` and `last`, and returns theirs: 0 where there is no neighbour.
  __device__ __forceinline__ void exchange(A first, A last, A& left, A& right) {
    left = right = A(0);
    if (warps == 1) return;
    parity ^= 1;
    A* const at = own + parity * warps * 64;
    at[0] = first, at[32] = last;
    __syncthreads();
    if (warp > 0) left = at[-64 + 32];
    if (warp + 1 < warps) right = at[64];
  }
};

// The inputs of a line at the thread's positions, and what its output needs beside the states: the sum over the
// directions before.
template <class C>
struct LaneRow {
  typename C::T weights[3][C::P], x[C::P], lam[C::P];
};
template <class C>
struct LaneOutput {
  typename C::T u[C::P];
  typename C::A before[C::P];
};

template <class C, class Job>
__device__ __forceinline__ void load_lanes(LaneRow<C>& row, const Params& p, const Job& job, int line) {
#pragma unroll
  for (int k = 0; k < 3; ++k) job.read(row.weights[k], kWeightPlanes + k, p.weights, line);
  job.read(row.x, kXPlane, p.x, line);
  if (p.lam.data != nullptr) job.read(row.lam, kLamPlane, p.lam, line);
}
template <class C, class Job>
__device__ __forceinline__ void load_lanes(LaneOutput<C>& row, const Params& p, const LaneLaunch& l, const Job& job,
                                           int line) {
  if (p.u.data != nullptr) job.read(row.u, kUPlane, p.u, line);
  if (l.first || l.sums.data == nullptr) return;
  const auto* const from = job.template at<typename C::A>(kSumsPlane, l.sums, line);
  const int step = opaque(Job::step(l.sums));
#pragma unroll
  for (int q = 0; q < C::P; ++q)
    if (q < job.own) row.before[q] = from[q * step];
}
// Adds values to the sum over directions; the last direction writes it to `out`.
template <class C, class Job, class Value>
__device__ __forceinline__ void add_lanes(const LaneOutput<C>& row, const LaneLaunch& l, const Field& out,
                                          const Job& job, int line, const Value& value) {
  const auto sum = [&](int q) { return l.first ? value(q) : value(q) + row.before[q]; };
  if (l.last)
    job.template write<typename C::T>(kOutPlane, out, line, sum);
  else
    job.template write<typename C::A>(kSumsPlane, l.sums, line, sum);
}

// Weights and gated input of a line; zero at positions that do not exist.
template <class C, bool kStochastic, class Job>
__device__ __forceinline__ void prepare_lane(const Job& job, const LaneRow<C>& row, bool gated, LineOf<C>& line) {
  using A = typename C::A;
#pragma unroll
  for (int q = 0; q < C::P; ++q) {
    line.a[q] = line.b[q] = line.c[q] = line.f[q] = A(0);
    if (q >= job.own) continue;
    line.f[q] = gated ? widen(row.lam[q]) * widen(row.x[q]) : widen(row.x[q]);
    prepare_weights<typename C::T, kStochastic>(widen(row.weights[0][q]), widen(row.weights[1][q]),
                                                widen(row.weights[2][q]), job.has_left(q), job.has_right(q), line.a[q],
                                                line.b[q], line.c[q]);
  }
}

// The states of the lane's channel before the lines interval, 2 * interval, ...
template <class A>
struct LaneCheckpoints {
  A* data = nullptr;
  int count = 0, interval, length;

  template <class Job>
  __device__ __forceinline__ LaneCheckpoints(const Params& p, const Job& job, int d)
      : interval(int(p.interval)), length(job.length) {
    if (p.checkpoints == nullptr) return;
    count = int(checkpoint_lines(p, make_scan(p, d)));
    data = static_cast<A*>(p.checkpoints) + (job.n * p.C + job.channel) * checkpoint_offset(p, p.D) +
           checkpoint_offset(p, d) + job.place;
  }
  // The next line after `line` before which the state is saved; -1 if there is none.
  __device__ __forceinline__ int after(int line) const {
    const int number = line < interval ? 1 : line / interval + 1;
    return number <= count ? number * interval : -1;
  }
  __device__ __forceinline__ A* at(int line) const { return data + int64_t(line / interval - 1) * length; }
};

// A block per image, 32 channels and chunk.
template <class C, bool kStochastic, bool kHorizontal>
__global__ void __launch_bounds__(32 * kLaneWarps)
    lane_forward(const __grid_constant__ Params p, const __grid_constant__ LaneLaunch l) {
  using A = typename C::A;
  const LaneJob<C, kHorizontal> job(p, l);
  const LaneCheckpoints<A> checkpoints(p, job, l.d);
  LaneEdges<A> edges(shared_memory() + kLanePlaneBytes);
  note_planes<C>(p, l, job, p.y);
  __syncthreads();
  A h[C::P] = {};
  LaneRow<C> rows[2];
  load_lanes(rows[0], p, job, job.in_memory(job.begin));
  int due = checkpoints.after(job.begin - 1);
#pragma unroll 1
  for (int i0 = job.begin; i0 < job.end; i0 += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = i0 + half;
      if (i >= job.end) break;
      if (i + 1 < job.end) load_lanes(rows[1 - half], p, job, job.in_memory(i + 1));
      const bool starts = i == job.begin;
      if (i == due) {
        A* const to = checkpoints.at(i);
#pragma unroll
        for (int q = 0; q < C::P; ++q)
          if (q < job.own && job.active) to[q] = starts ? A(0) : h[q];
        due = checkpoints.after(i);
      }
      LineOf<C> line;
      prepare_lane<C, kStochastic>(job, rows[half], p.lam.data != nullptr, line);
      LaneOutput<C> output;
      load_lanes(output, p, l, job, job.in_memory(i));
      A left = A(0), right = A(0);
      if (!starts) edges.exchange(h[0], h[C::P - 1], left, right);
      advance_between<C>(h, line, left, right, kStochastic, starts);
      const bool scaled = p.u.data != nullptr;
      if (job.active)
        add_lanes(output, l, p.y, job, job.in_memory(i), [&](int q) { return scaled ? widen(output.u[q]) * h[q] : h[q]; });
    }
  }
}

// Returns false if the channels are not lanes.
template <class T>
bool launch_lanes(const Params& p, void* sums, cudaStream_t stream) {
  if constexpr (sizeof(T) < 8) {
    using C = LaneConfig<T>;
    if (!lanes_fit<C>(p, selected_path, kLaneWarps)) return false;
    for (int d = 0; d < p.D; ++d) {
      const Scan scan = make_scan(p, d);
      const LaneLaunch l = lane_launch(p, d, p.y, sums);
      const int warps = ceil_div(scan.length, C::P);
      const auto kernel = p.stochastic ? (scan.horizontal ? lane_forward<C, true, true> : lane_forward<C, true, false>)
                                       : (scan.horizontal ? lane_forward<C, false, true> : lane_forward<C, false, false>);
      launch(kernel, p.N * l.blocks * l.chunks, 32 * warps, kLanePlaneBytes + LaneEdges<typename C::A>::bytes(warps), 1, stream, p, l);
    }
    return true;
  }
  return false;
}

}  // namespace gspn::cuda
