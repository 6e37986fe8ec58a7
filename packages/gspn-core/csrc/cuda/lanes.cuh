// Images whose channels are neighbours in memory (channels_last): a lane is a channel, so that every access is to
// neighbours, whatever the direction and the length of a line. A warp has a few positions of a line, which a lane
// computes one after another; the warps of a line exchange the states at their edges through shared memory.
#pragma once

#include "forward.cuh"

namespace gspn::cuda {

constexpr int kLaneChannels = 16;  // with fewer, most lanes would be idle

// Whether every channel has planes of its own, and the channels of a pixel are neighbours, in units of 16 bytes.
template <class T>
bool are_lanes(const Params& p, const Field& f) {
  if (f.data == nullptr) return true;
  for (const int64_t stride : {f.n, f.d, f.k, f.row, f.col})
    if (stride % (16 / int(sizeof(T))) != 0) return false;
  return f.channels == p.C && f.c == 1 && reinterpret_cast<uintptr_t>(f.data) % 16 == 0;
}

template <class C>
bool lanes_fit(const Params& p, Path path, int most_warps) {
  const int64_t length = p.H > p.W ? p.H : p.W;
  bool fit = path == Path::kAuto && p.dtype != Dtype::kFloat64 && p.C >= kLaneChannels && length <= C::P * most_warps;
  for (const Field* f : {&p.x, &p.lam, &p.u, &p.y, &p.dy, &p.dx, &p.dlam, &p.du})
    fit = fit && are_lanes<typename C::T>(p, *f);
  for (const Field* f : {&p.weights, &p.dweights})  // which all channels may share
    fit = fit && (f->channels == 1 || are_lanes<typename C::T>(p, *f));
  return fit && p.C % (16 / int(sizeof(typename C::T))) == 0;
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

// What a thread has: a channel of 32 from `first` on, and positions [place, place + own) of every line of a chunk.
template <class C, bool kHorizontal>
struct LaneJob {
  int64_t n;
  int first, channel, place, own, lines, length, begin, end, warp;
  bool active;  // there is such a channel
  bool reversed;

  __device__ __forceinline__ LaneJob(const Params& p, const LaneLaunch& l) {
    const Scan scan = make_scan(p, l.d);
    int64_t id = blockIdx.x;
    const int chunk = int(id % l.chunks);
    id /= l.chunks;
    first = int(id % l.blocks) * 32, channel = first + int(threadIdx.x & 31);
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
    if (threadIdx.x == 0) static_cast<T**>(planes())[plane] = static_cast<T*>(f.data) + (n * f.n + d * f.d + k * f.k);
  }
  static __device__ __forceinline__ void* planes() { return shared_memory(); }
  template <class T>
  static __device__ __forceinline__ T* base(int plane) {
    return static_cast<T* const volatile*>(planes())[plane];
  }
  // The thread's position q on a line, in the order of memory, of a field with planes for every channel.
  template <class T>
  __device__ __forceinline__ T* at(int plane, const Field& f, int line, int q = 0) const {
    return base<T>(plane) + (q * step(f) + line * LaneJob::line(f) + opaque(place) * step(f) + channel);
  }
  // Elements from a position, a line to the next.
  static __device__ __forceinline__ int step(const Field& f) { return int(kHorizontal ? f.row : f.col); }
  static __device__ __forceinline__ int line(const Field& f) { return int(kHorizontal ? f.col : f.row); }

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

// The inputs of a few lines in shared memory, of a warp: slots of rows of 32 channels, one row for each input and
// position; last comes the sum over the directions before, in the accumulation type. A warp copies what it computes
// with, so that it waits for itself alone.
template <class C, int kInputs, int kSlots_>
struct LaneRing {
  using T = typename C::T;
  using A = typename C::A;
  static constexpr int kSlots = kSlots_, kRow = 32 * int(sizeof(T)), kInput = C::P * kRow;
  static constexpr int kSlot = kInputs * kInput + C::P * 32 * int(sizeof(A));

  static GSPN_HOST_DEVICE size_t bytes(int warps) { return size_t(kSlots) * kSlot * warps; }

  unsigned char* memory;  // of the warp
  int to = 0, from = 0;   // the slots of the next line to copy, to compute

  __device__ __forceinline__ LaneRing(unsigned char* all, int warp) : memory(all + warp * kSlots * kSlot) {}

  template <class V, class Job>
  static __device__ __forceinline__ void copy_rows(unsigned char* rows, const Params& p, const Job& job, int plane,
                                                   const Field& f, int line) {
    constexpr int kChunk = 16 / int(sizeof(V)), kChunks = 32 / kChunk;  // elements of a copy, copies of a row
    const V* const base =
        Job::template base<const V>(plane) + (line * Job::line(f) + job.place * Job::step(f) + job.first);
#pragma unroll
    for (int e = int(threadIdx.x) & 31; e < C::P * kChunks; e += 32) {
      const int q = e / kChunks, channel = e % kChunks * kChunk;
      if (q < job.own && job.first + channel < int(p.C)) copy_async(rows + 16 * e, base + (q * Job::step(f) + channel));
    }
  }
  // Starts the copy of an input, if it exists, of a line in the order of memory, to the next slot.
  template <class Job>
  __device__ __forceinline__ void copy(int input, const Params& p, const Job& job, int plane, const Field& f,
                                       int line) const {
    if (f.data != nullptr) copy_rows<T>(memory + to * kSlot + input * kInput, p, job, plane, f, line);
  }
  template <class Job>
  __device__ __forceinline__ void copy_sum(const Params& p, const Job& job, const Field& f, int line) const {
    copy_rows<A>(memory + to * kSlot + kInputs * kInput, p, job, kSumsPlane, f, line);
  }
  // Ends the line's copies, of which there need be none.
  __device__ __forceinline__ void commit() {
    commit_copies();
    to = to + 1 == kSlots ? 0 : to + 1;
  }
  // Waits until the copies of the line to compute are there for all lanes, and no lane reads the line before any more.
  static __device__ __forceinline__ void wait() {
    wait_for_copies<kSlots - 2>();
    __syncwarp();
  }
  __device__ __forceinline__ void next() { from = from + 1 == kSlots ? 0 : from + 1; }
  // Of the lane's channel.
  __device__ __forceinline__ A input(int number, int q) const {
    const unsigned char* const row = memory + from * kSlot + number * kInput + q * kRow;
    return widen(load_shared(reinterpret_cast<const T*>(row) + (threadIdx.x & 31)));
  }
  __device__ __forceinline__ A sum(int q) const {
    const unsigned char* const sums = memory + from * kSlot + kInputs * kInput;
    return load_shared(reinterpret_cast<const A*>(sums) + (q * 32 + int(threadIdx.x & 31)));
  }
};

// Weights that all channels share: a lane loads and normalises those of one position, of which all get them.
template <class C>
struct SharedLaneWeights {
  using T = typename C::T;
  T raw[3];

  template <class Job>
  __device__ __forceinline__ void load(const Params& p, const Job& job, int i) {
    const int lane = int(threadIdx.x) & 31;
    if (i >= job.end || lane >= job.own) return;
    const int64_t at = job.in_memory(i) * Job::line(p.weights) + (job.place + lane) * Job::step(p.weights);
#pragma unroll
    for (int k = 0; k < 3; ++k) raw[k] = load_vector(Job::template base<const T>(kWeightPlanes + k) + at);
  }
  template <bool kStochastic, class Job>
  __device__ __forceinline__ void prepare(const Job& job, LineOf<C>& line) const {
    using A = typename C::A;
    const int lane = int(threadIdx.x) & 31;
    A a = A(0), b = A(0), c = A(0);
    if (lane < job.own)
      prepare_weights<T, kStochastic>(widen(raw[0]), widen(raw[1]), widen(raw[2]), job.has_left(lane),
                                      job.has_right(lane), a, b, c);
#pragma unroll
    for (int q = 0; q < C::P; ++q) {
      line.a[q] = __shfl_sync(~0u, a, q), line.c[q] = __shfl_sync(~0u, c, q);
      line.b[q] = kStochastic ? A(0) : __shfl_sync(~0u, b, q);
    }
  }
};

// Weights and gated input of a line whose inputs are weights, unless all channels share them, then x and its gate. Zero
// at positions that do not exist.
template <class C, bool kStochastic, bool kShared, class Ring, class Job>
__device__ __forceinline__ void prepare_lanes(const Ring& ring, const Params& p, const Job& job, LineOf<C>& line) {
  using A = typename C::A;
  constexpr int kX = kShared ? 0 : 3;
  const bool gated = p.lam.data != nullptr;
#pragma unroll
  for (int q = 0; q < C::P; ++q) {
    const bool exists = q < job.own;
    const A x = ring.input(kX, q);
    line.f[q] = existing(exists, gated ? ring.input(kX + 1, q) * x : x);
    if (kShared) continue;
    A a = A(0), b = A(0), c = A(0);
    prepare_weights<typename C::T, kStochastic>(ring.input(0, q), ring.input(1, q), ring.input(2, q), job.has_left(q),
                                                job.has_right(q), a, b, c);
    line.a[q] = existing(exists, a), line.b[q] = existing(exists, b), line.c[q] = existing(exists, c);
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

}  // namespace gspn::cuda
