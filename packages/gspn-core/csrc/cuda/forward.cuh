// Forward: y = sum_d u_d h_d.
//
// strip_forward scans images of any size, one direction per launch; y is summed over the launches, in order, in the
// accumulation type. resident_forward keeps small images in shared memory and scans all directions in one launch.
#pragma once

#include "plan.hpp"
#include "tile.cuh"

namespace gspn::cuda {

// Parameters of one launch of a strip kernel, in addition to Params.
struct StripLaunch {
  int d = 0;                       // place of the direction
  int strips = 1, per_block = 1;   // of a line, of a block
  int cluster = 1;                 // blocks that share a line
  int chunks = 1;                  // independent scans of an image
  int64_t blocks = 1;              // channel blocks of an image
  bool first = true, last = true;  // whether d is the first, the last of the directions
  void* sums = nullptr;            // (N, C, H, W) in the accumulation type, if the output has another type
  void* partials = nullptr;        // backward: sums over some of the channels that share a weight or a gate
};

// Channel blocks of an image: warps that share weights stay within a group.
template <class C>
GSPN_HOST_DEVICE inline int64_t channel_blocks(const Params& p) {
  const int64_t groups = p.weights.channels, group = p.C / groups;
  if (C::CW > 1) return groups * ((group + C::CW - 1) / C::CW);
  return (p.C + C::SEG - 1) / C::SEG;
}

// The work of a warp; blocks of a cluster differ in the strip only.
template <class C>
struct Job {
  int64_t n;
  int block;  // channel block of the image
  Channels<C> channels;
  bool active = true;  // false for a warp beyond the last channel of its group, which only loads weights
  int warps = 1;       // active warps that share a strip's weights
  int begin, end;      // lines of the chunk
  Strips<C> strips;

  __device__ __forceinline__ Job(const Params& p, const StripLaunch& l, const Scan& scan) {
    const int warp = int(threadIdx.x) / 32;
    strips.channel_warp = warp % C::CW;
    strips.per_block = l.per_block, strips.count = l.strips;
    strips.rank = l.cluster > 1 ? cluster_rank() : 0;
    strips.index = strips.rank * l.per_block + warp / C::CW;
    int64_t id = int64_t(blockIdx.x) / l.cluster;
    const int chunk = int(id % l.chunks);
    id /= l.chunks;
    block = int(id % l.blocks);
    n = id / l.blocks;
    const int lines = p.chunk > 0 && p.chunk < scan.lines ? int(p.chunk) : int(scan.lines);
    begin = chunk * lines;
    end = begin + lines < int(scan.lines) ? begin + lines : int(scan.lines);
    if (C::CW > 1) {
      const int group = int(p.C / p.weights.channels), per_group = (group + C::CW - 1) / C::CW;
      const int first = block / per_group * group + block % per_group * C::CW;
      channels.end = (block / per_group + 1) * group;
      channels.first = first + strips.channel_warp;
      warps = channels.end - first < C::CW ? channels.end - first : C::CW;
      active = strips.channel_warp < warps;
      if (!active) channels.first = channels.end - 1;
    } else {
      channels.end = int(p.C);
      channels.first = block * C::SEG;
    }
  }
};

// The checkpoints of a channel for the backward pass: the states before lines interval, 2 * interval, ...
template <class C>
struct Checkpoints {
  using A = typename C::A;
  Pointers<C, A> data;
  int count = 0, interval, length;

  __device__ __forceinline__ Checkpoints(const Params& p, const Channels<C>& channels, const Scan& scan, int64_t n,
                                         int d)
      : interval(int(p.interval)), length(int(scan.length)) {
    if (p.checkpoints == nullptr) return;
    count = int(checkpoint_lines(p, scan));
#pragma unroll
    for (int s = 0; s < C::SEG; ++s)
      data.set(s, static_cast<A*>(p.checkpoints) + (n * p.C + channels.of_segment(s)) * checkpoint_offset(p, p.D) +
                      checkpoint_offset(p, d));
  }
  __device__ __forceinline__ A* at(int line, int col, int j) const {
    return data.of(col) + int64_t(line / interval - 1) * length + j;
  }
  __device__ __forceinline__ bool due(int line) const {
    return count > 0 && line > 0 && line % interval == 0 && line / interval <= count;
  }
  // The next line after `line` before which the state is saved; -1 if there is none.
  __device__ __forceinline__ int after(int line) const {
    const int number = line < interval ? 1 : line / interval + 1;
    return number <= count ? number * interval : -1;
  }
  // A chunk starts from a state of zero, whatever the lane still holds.
  __device__ __forceinline__ void save(int line, const Window& w, const Channels<C>& channels, const Strips<C>& strips,
                                       const A (&h)[C::P], bool starts_chunk) const {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int q = 0; q < C::P; ++q) {
      const int col = lane * C::P + q, j = position_of<C>(w, col);
      if (strips.owns(col) && channels.owns(col) && j >= 0 && j < w.length)
        *at(line, col, j) = starts_chunk ? A(0) : h[q];
    }
  }
  __device__ __forceinline__ void restore(int line, const Window& w, A (&h)[C::P]) const {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int q = 0; q < C::P; ++q) {
      const int col = lane * C::P + q, j = position_of<C>(w, col);
      h[q] = j >= 0 && j < w.length ? *at(line, col, j) : A(0);
    }
  }
};

// The scan over the lines of a tile; `tile` holds the gated input and receives the state.
template <class C>
__device__ __forceinline__ void scan_tile(const Params& p, typename C::A (&h)[C::P], const WeightTile<C>& weights,
                                          typename C::A* tile, const Window& w, const Checkpoints<C>& checkpoints,
                                          const Channels<C>& channels, const Strips<C>& strips, bool active) {
#pragma unroll 1
  for (int m = 0; m < w.count; ++m) {
    const int i = w.i0 + m;
    const bool starts = starts_chunk(p, i);
    if (checkpoints.due(i) && active) checkpoints.save(i, w, channels, strips, h, starts);
    step<C>(h, weights, tile, m, starts);
    put_row<C>(tile, m, h);
  }
}

// Adds u h to the sum over directions.
template <class C>
struct Output {
  using T = typename C::T;
  using A = typename C::A;
  Planes<C, const T> u;
  Planes<C, T> y;
  Planes<C, A> sums;
  bool first, last;
  Fragment<C, T, C::kElements> raw_u;

  __device__ __forceinline__ Output(const Params& p, const StripLaunch& l, const Channels<C>& channels,
                                    const Scan& scan, int64_t n)
      : u(channels.template planes<const T>(p, p.u, scan, n, l.d)),
        y(channels.template planes<T>(p, p.y, scan, n, 0)),
        first(l.first),
        last(l.last) {
    Field f = p.y;
    if (l.sums != nullptr) {
      f.data = l.sums;
      f.n = p.C * p.H * p.W, f.c = p.H * p.W, f.row = p.W, f.col = 1;
    }
    sums = channels.template planes<A>(p, f, scan, n, 0);
  }
  __device__ __forceinline__ void load(const Window& w, bool horizontal) {
    if (u) raw_u.load(u, w, horizontal);
  }
  __device__ __forceinline__ void store(const A* tile, const Window& w, bool horizontal, const Channels<C>& channels,
                                        const Strips<C>& strips) const {
    const int lane = opaque(threadIdx.x & 31);
#pragma unroll
    for (int e = 0; e < C::kElements; ++e) {
      const Place at = place<C>(horizontal, e * 32 + lane);
      if (!inside<C>(w, at) || !strips.owns(at.col) || !channels.owns(at.col)) continue;
      const int i = w.i0 + at.m, j = position_of<C>(w, at.col);
      A value = tile[at.m * C::kPitch + at.col];
      if (u) value *= widen(raw_u.v[e]);
      if (!first) value += *sums.at(at.col, i, j);
      if (last)
        narrow(value, *y.at(at.col, i, j));
      else
        *sums.at(at.col, i, j) = value;
    }
  }
};

template <class C>
size_t strip_forward_bytes(bool stochastic, int per_block, bool halos) {
  const size_t buffers = halos ? size_t(per_block) * C::CW * Strips<C>::kBuffer : 0;
  return sizeof(typename C::A) *
         (per_block * (WeightTile<C>::size(stochastic) + size_t(C::CW) * C::K * C::kPitch) + buffers);
}

template <class C>
__device__ __forceinline__ Window window(const Job<C>& job, const Scan& scan, int i0, int end) {
  return {i0, end - i0 < C::K ? end - i0 : C::K, job.strips.first_position(), int(scan.length)};
}

// One block (or cluster) per image, channel block and chunk; a warp per strip and channel of the block. The direction
// is a template argument, so that addresses are computed for it alone.
template <class C, bool kHorizontal>
__global__ void __launch_bounds__(32 * kForwardWarps)
    strip_forward(const __grid_constant__ Params p, const __grid_constant__ StripLaunch l) {
  using T = typename C::T;
  using A = typename C::A;
  const Scan scan = make_scan(p, l.d);
  const Job<C> job(p, l, scan);
  const int strip = int(threadIdx.x) / 32 / C::CW, cw = job.strips.channel_warp;
  A* const memory = reinterpret_cast<A*>(shared_memory());
  const size_t weights_size = WeightTile<C>::size(p.stochastic);
  const WeightTile<C> weights(memory + strip * weights_size, p.stochastic);
  A* const tile = memory + l.per_block * weights_size + (threadIdx.x / 32) * (C::K * C::kPitch);
  A* const halos = memory + l.per_block * (weights_size + C::CW * C::K * C::kPitch);

  WeightLoader<C> weight_loader(p, job.channels, scan, job.n, l.d);
  GatedLoader<C> input(job.channels.template planes<const T>(p, p.x, scan, job.n, 0),
                       job.channels.template planes<const T>(p, p.lam, scan, job.n, l.d));
  Output<C> output(p, l, job.channels, scan, job.n);
  const Checkpoints<C> checkpoints(p, job.channels, scan, job.n, l.d);

  A h[C::P] = {};
  Window w = window(job, scan, job.begin, job.end);
  weight_loader.load(w, kHorizontal, cw);
  input.load(w, kHorizontal);
  if (l.cluster > 1) cluster_barrier();  // no block stores to the memory of a neighbour that has not started
#pragma unroll 1
  for (int t = 0; w.i0 < job.end; ++t) {
    weight_loader.put(weights, w, kHorizontal, cw);
    input.put(tile, w, kHorizontal);
    share_barrier<C>();
    if (job.active) output.load(w, kHorizontal);
    const Window next = window(job, scan, w.i0 + C::K, job.end);
    if (next.i0 < job.end) {  // loads overlap the computation of this tile
      weight_loader.load(next, kHorizontal, cw);
      input.load(next, kHorizontal);
    }
    if (t > 0 && l.strips > 1) job.strips.exchange(halos, t & 1, h, l.cluster);
    scan_tile<C>(p, h, weights, tile, w, checkpoints, job.channels, job.strips, job.active);
    __syncwarp();
    if (job.active) output.store(tile, w, kHorizontal, job.channels, job.strips);
    share_barrier<C>();
    w = next;
  }
  if (l.cluster > 1) cluster_barrier();  // no block exits while a neighbour may still write to its memory
}

// ---- images that stay in shared memory

struct ResidentLaunch {
  int64_t blocks = 1;
  int rounds = 0;
  int slots[kMaxDirections][2];  // directions of a round: opposite ones, or one and -1
};

template <class C>
struct ResidentMemory {
  using T = typename C::T;
  using A = typename C::A;
  static constexpr int kChannels = C::CW * C::SEG;

  // An odd pitch avoids bank conflicts along rows and along columns.
  static GSPN_HOST_DEVICE int pitch(const Params& p) { return int(p.W) | 1; }
  static GSPN_HOST_DEVICE size_t plane(const Params& p) { return size_t(p.H) * size_t(pitch(p)); }
  static size_t bytes(const Params& p) {
    const size_t tiles = 2 * (WeightTile<C>::size(p.stochastic) + size_t(C::CW) * C::K * C::kPitch);
    return sizeof(A) * (tiles + kChannels * plane(p)) + sizeof(T) * kChannels * plane(p);
  }
};

// A block holds x and the sums of a few channels, and scans two opposite directions at a time, with a warp per
// direction and channel. In the first phase each warp scans the first half of its lines, in opposite halves of the
// image, so that they never add to the same pixels; after a barrier each scans its second half.
template <class C>
__global__ void __launch_bounds__(64 * C::CW)
    resident_forward(const __grid_constant__ Params p, const __grid_constant__ ResidentLaunch l) {
  using T = typename C::T;
  using A = typename C::A;
  using Memory = ResidentMemory<C>;
  StripLaunch whole;
  whole.blocks = l.blocks;
  const int warp = int(threadIdx.x) / 32, side = warp / C::CW, cw = warp % C::CW;
  const int pitch = Memory::pitch(p);
  const size_t plane = Memory::plane(p);
  A* const memory = reinterpret_cast<A*>(shared_memory());
  const size_t weights_size = WeightTile<C>::size(p.stochastic);
  const WeightTile<C> weights(memory + side * weights_size, p.stochastic);
  A* const tile = memory + 2 * weights_size + warp * (C::K * C::kPitch);
  A* const sums = memory + 2 * (weights_size + C::CW * C::K * C::kPitch);
  T* const xs = reinterpret_cast<T*>(sums + Memory::kChannels * plane);

  const Scan rows{false, false, p.H, p.W};
  Job<C> job(p, whole, rows);
  job.strips.channel_warp = cw, job.strips.index = 0;
  const Field x_field{xs + cw * C::SEG * plane, 0, 0, 0, int64_t(plane), 0, pitch, 1};
  const Field sums_field{sums + cw * C::SEG * plane, 0, 0, 0, int64_t(plane), 0, pitch, 1};
  const int lane = int(threadIdx.x) & 31, pixels = int(p.H) * int(p.W);
  // Both warps of a channel copy it in, and out at the end.
#pragma unroll
  for (int s = 0; s < C::SEG; ++s) {
    if (!job.active || job.channels.first + s >= job.channels.end) continue;
    const Plane<const T> from = scan_plane<const T>(p.x, rows, job.n, 0, job.channels.first + s);
    const Plane<T> to = scan_plane<T>(x_field, rows, 0, 0, s);
    for (int e = side * 32 + lane; e < pixels; e += 64)
      *to.at(e / int(p.W), e % int(p.W)) = *from.at(e / int(p.W), e % int(p.W));
  }
  __syncthreads();

  // One round: two opposite directions, or one; a function of their axis, so that addresses are computed for it alone.
  const auto run = [&](int round, auto axis) {
    constexpr bool kHorizontal = decltype(axis)::value;
    const bool runs = l.slots[round][side] >= 0, paired = l.slots[round][0] >= 0 && l.slots[round][1] >= 0;
    const int d = l.slots[round][runs ? side : 1 - side];
    const Scan scan = make_scan(p, d);
    const int lines = int(scan.lines), length = int(scan.length);

    WeightLoader<C> weight_loader(p, job.channels, scan, job.n, d);
    Planes<C, const T> x;
    Planes<C, A> y;
#pragma unroll
    for (int s = 0; s < C::SEG; ++s) {
      x.set(s, scan_plane<const T>(x_field, scan, 0, 0, s));
      y.set(s, scan_plane<A>(sums_field, scan, 0, 0, s));
    }
    GatedLoader<C, true> input(x, job.channels.template planes<const T>(p, p.lam, scan, job.n, d));
    const Planes<C, const T> u = job.channels.template planes<const T>(p, p.u, scan, job.n, d);
    const Checkpoints<C> checkpoints(p, job.channels, scan, job.n, d);

    // First phase: the first warp's lines up to `half`, and the second warp's remaining ones. A single warp has one
    // phase.
    const int half = lines / 2;
    const int middle = !paired ? lines : side == 0 ? half : lines - half;
    const int tiles = ((paired ? lines - half : lines) + C::K - 1) / C::K;  // of the longer half, in every warp
    A h[C::P] = {};
    for (int phase = 0; phase < (paired ? 2 : 1); ++phase) {
      const int begin = phase == 0 ? 0 : middle, end = !runs ? begin : phase == 0 ? middle : lines;
      const auto window_of = [&](int t) {
        const int left = end - begin - t * C::K;
        return Window{begin + t * C::K, left < 0 ? 0 : left < C::K ? left : C::K, 0, length};
      };
      const bool stores = round == 0 && phase == 0;  // the first to write the sums
      weight_loader.load(window_of(0), kHorizontal, cw);
      input.load(window_of(0), kHorizontal);
#pragma unroll 1
      for (int t = 0; t < tiles; ++t) {
        const Window w = window_of(t), next = window_of(t + 1);
        weight_loader.put(weights, w, kHorizontal, cw);
        input.put(tile, w, kHorizontal);
        share_barrier<C>();
        Fragment<C, T, C::kElements> raw_u;
        if (u) raw_u.load(u, w, kHorizontal);
        weight_loader.load(next, kHorizontal, cw);  // overlaps the computation of this tile
        input.load(next, kHorizontal);
        scan_tile<C>(p, h, weights, tile, w, checkpoints, job.channels, job.strips, job.active);
        __syncwarp();
        const int opaque_lane = opaque(lane);
#pragma unroll
        for (int e = 0; e < C::kElements; ++e) {
          const Place at = place<C>(kHorizontal, e * 32 + opaque_lane);
          if (!inside<C>(w, at)) continue;
          A* const sum = y.at(at.col, w.i0 + at.m, position_of<C>(w, at.col));
          A value = tile[at.m * C::kPitch + at.col];
          if (u) value *= widen(raw_u.v[e]);
          *sum = stores ? value : *sum + value;
        }
        share_barrier<C>();
      }
      __syncthreads();
    }
  };
  for (int round = 0; round < l.rounds; ++round) {
    const int d = l.slots[round][l.slots[round][0] >= 0 ? 0 : 1];
    if (make_scan(p, d).horizontal)
      run(round, Bool<true>());
    else
      run(round, Bool<false>());
  }

#pragma unroll
  for (int s = 0; s < C::SEG; ++s) {
    if (!job.active || job.channels.first + s >= job.channels.end) continue;
    const Plane<A> from = scan_plane<A>(sums_field, rows, 0, 0, s);
    const Plane<T> to = scan_plane<T>(p.y, rows, job.n, 0, job.channels.first + s);
    for (int e = side * 32 + lane; e < pixels; e += 64)
      narrow(*from.at(e / int(p.W), e % int(p.W)), *to.at(e / int(p.W), e % int(p.W)));
  }
}

}  // namespace gspn::cuda
