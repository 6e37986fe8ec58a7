// Forward of all directions of small images in one launch, where many channels share their weights and gates. A kernel
// of its own normalises the weights once and lays them out in scan order, of either axis: a step of the scan then reads
// what a position needs by one load, whatever the direction, the strides and the type of the logits.
//
// A block holds x and the sums over directions of a few channels, which lie side by side in its warps. As in
// resident_forward two warps scan opposite directions and meet in the middle.
#pragma once

#include "forward.cuh"

namespace gspn::cuda {

// What a position takes from a line of shared weights. Positions that do not exist take zeros.
struct alignas(16) SharedPoint {
  float a, c, lam, u;
};

struct SharedLaunch {
  ResidentLaunch rounds;
  int share = 1;                  // channels of a set, which share weights and gates
  int warps = 1;                  // of a block and direction
  SharedPoint* points = nullptr;  // (N, sets) of shared_points(p, slots, D)
};

// Points before those of direction d: of each line, first the slots for the first positions of all lanes, and so on.
GSPN_HOST_DEVICE inline int64_t shared_points(const Params& p, int slots, int d) {
  int64_t points = 0;
  for (int e = 0; e < d; ++e) points += make_scan(p, e).lines * slots;
  return points;
}

// Channels that share both weights and gates, in runs of this many.
inline int64_t shared_channels(const Params& p) {
  const auto common = [](int64_t a, int64_t b) {
    while (b != 0) {
      const int64_t rest = a % b;
      a = b, b = rest;
    }
    return a;
  };
  int64_t share = p.C / p.weights.channels;
  for (const Field* f : {&p.lam, &p.u})
    if (f->data != nullptr) share = common(share, p.C / f->channels);
  return share;
}

template <class C>
constexpr bool kHasShared = C::P % 2 == 1 && C::K == 1 && sizeof(typename C::T) < 8;

template <class C>
struct SharedMemory {
  using T = typename C::T;
  using A = typename C::A;

  // In elements. Rows have room for all positions of a vertical scan, those that do not exist too. Lanes, which are an
  // odd number of positions apart, are in different banks along rows and along columns, and so are the channels of a
  // warp. For the shortest lines that would take more memory than it is worth.
  static constexpr int kStep = 32 / C::kLanes < 8 ? 32 / C::kLanes : 8;
  static constexpr int kPitch = (C::kSegment + kStep - 2) / kStep * kStep + 1;
  static GSPN_HOST_DEVICE int plane(const Params& p) {
    const int least = int(p.H) * kPitch;
    return least + ((C::kSegment - least) % 32 + 32) % 32;
  }
  // Of x, whose elements may have half the width of a bank: the channels of a warp share the banks evenly.
  static GSPN_HOST_DEVICE int plane_of_x(const Params& p) {
    if (sizeof(T) == sizeof(A) || C::SEG == 1) return plane(p);
    constexpr int kShare = 64 / C::SEG;
    return (plane(p) - kShare + 63) / 64 * 64 + kShare;
  }
  // Behind the images there is what horizontal scans read of rows that do not exist.
  static GSPN_HOST_DEVICE size_t slack(const Params& p) {
    return sizeof(T) * size_t(C::kSegment > p.H ? C::kSegment - p.H : 0) * kPitch;
  }
  static GSPN_HOST_DEVICE size_t bytes(const Params& p, int warps) {
    const size_t images = plane(p) * sizeof(A) + plane_of_x(p) * sizeof(T);
    return warps * C::SEG * images + slack(p);
  }
};

constexpr int kPrepareThreads = 256;

template <class C>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_shared(const __grid_constant__ Params p, const __grid_constant__ SharedLaunch l) {
  using T = typename C::T;
  constexpr int kSlots = C::kSegment;
  const int64_t of_set = shared_points(p, kSlots, p.D), sets = p.C / l.share;
  const int64_t e = int64_t(blockIdx.x) * kPrepareThreads + threadIdx.x;
  if (e >= p.N * sets * of_set) return;
  const int64_t n = e / (of_set * sets);
  const int c = int(e / of_set % sets) * l.share;
  int64_t rest = e % of_set;
  int d = 0;
  while (rest >= make_scan(p, d).lines * kSlots) rest -= make_scan(p, d++).lines * kSlots;
  const Scan scan = make_scan(p, d);
  const int i = int(rest / kSlots), slot = int(rest % kSlots), length = int(scan.length);
  const int j = slot % C::kLanes * C::P + slot / C::kLanes;
  SharedPoint point = {0, 0, 0, 0};
  if (j < length) {
    const auto value = [&](const Field& f, int64_t k) {
      return widen(*scan_plane<const T>(f, scan, n, d, shared_channel(p, f, c), k).at(i, j));
    };
    normalise<T>(value(p.weights, 0), value(p.weights, 1), value(p.weights, 2), j > 0, j + 1 < length, point.a,
                 point.c);
    point.lam = p.lam.data == nullptr ? 1.0f : value(p.lam, 0);
    point.u = p.u.data == nullptr ? 1.0f : value(p.u, 0);
  }
  l.points[e] = point;
}

// A warp's channels, and the images of a lane's channel in shared memory.
template <class C>
struct SharedWarp {
  using T = typename C::T;
  using A = typename C::A;
  const Params& p;
  const SharedPoint* points;  // of the channel's set
  int64_t n;
  int first, channel, place;  // place: the lane's first position on a line
  static constexpr int kPitch = SharedMemory<C>::kPitch;
  int plane;
  bool active;  // the lane has a channel
  T *warp_x, *x;
  A *warp_sums, *sums;

  __device__ __forceinline__ SharedWarp(const Params& p, const SharedLaunch& l)
      : p(p), plane(SharedMemory<C>::plane(p)) {
    const int lane = threadIdx.x & 31, segment = lane / C::kLanes, warp = int(threadIdx.x) / 32 % l.warps;
    n = blockIdx.x / l.rounds.blocks;
    first = (int(blockIdx.x % l.rounds.blocks) * l.warps + warp) * C::SEG;
    active = first + segment < int(p.C);
    channel = active ? first + segment : int(p.C) - 1;
    place = lane % C::kLanes * C::P;
    points = l.points + (n * (p.C / l.share) + channel / l.share) * shared_points(p, C::kSegment, p.D);
    A* const all = reinterpret_cast<A*>(shared_memory());
    warp_sums = all + warp * C::SEG * plane;
    sums = warp_sums + segment * plane;
    const int plane_of_x = SharedMemory<C>::plane_of_x(p);
    warp_x = reinterpret_cast<T*>(all + l.warps * C::SEG * plane) + warp * C::SEG * plane_of_x;
    x = warp_x + segment * plane_of_x;
  }
  // Calls use(place in memory, place in shared memory) for the pixels of a field of the warp's channels, whose images
  // are `apart` elements apart there: in either of the two warps of a channel for half of the rows.
  template <class V, class Use>
  __device__ __forceinline__ void for_pixels(const Field& f, int apart, const Use& use) const {
    const int lane = threadIdx.x & 31, side = int(threadIdx.x) >= int(blockDim.x) / 2 ? 1 : 0;
    for (int s = 0; s < C::SEG && first + s < int(p.C); ++s) {
      V* const image = static_cast<V*>(f.data) + (n * f.n + (first + s) * f.c);
#pragma unroll 2
      for (int row = side; row < int(p.H); row += 2)
        for (int column = lane; column < int(p.W); column += 32)
          use(image[row * int(f.row) + column * int(f.col)], s * apart + row * kPitch + column);
    }
  }
};

// A lane's part of a scan over a direction's lines. A template argument says whether a horizontal one is from right to
// left, so that places in memory are known but for a lane's own.
template <class C, bool kHorizontal, bool kReversed>
struct SharedScan {
  using A = typename C::A;
  using T = typename C::T;
  static constexpr int P = C::P;
  static constexpr int kLines = P <= 5 ? 3 : 2;  // lines whose points are loaded at once: registers bound them
  static constexpr int kPosition = kHorizontal ? SharedMemory<C>::kPitch : 1;  // steps in memory
  int vertical_step = SharedMemory<C>::kPitch;
  const SharedWarp<C>& warp;
  int own;                          // positions of the lane, if less than P
  int start, chunk;                 // the next line that starts a chunk
  int due, saved, count, interval;  // the next line before which the state is saved; its number
  int64_t length;
  const T* x;
  A *sums, *checkpoints;
  const SharedPoint* points;

  // From line `begin` on.
  __device__ __forceinline__ SharedScan(const SharedWarp<C>& warp, int d, int begin)
      : warp(warp), interval(int(warp.p.interval)) {
    const Params& p = warp.p;
    const Scan scan = make_scan(p, d);
    const int lines = int(scan.lines);
    length = scan.length;
    own = int(length) - warp.place;
    if (!kHorizontal && scan.reversed) vertical_step = -vertical_step;
    const int at =
        warp.place * kPosition + (scan.reversed ? lines - 1 - begin : begin) * (kHorizontal ? 1 : warp.kPitch);
    x = warp.x + at, sums = warp.sums + at;
    points = warp.points + shared_points(p, C::kSegment, d) + (threadIdx.x & 31) % C::kLanes + begin * C::kSegment;
    chunk = p.chunk > 0 && p.chunk < lines ? int(p.chunk) : lines;
    start = (begin + chunk - 1) / chunk * chunk;
    saved = (begin + interval - 1) / interval;
    saved = saved > 0 ? saved : 1;
    count = p.checkpoints != nullptr && warp.active && own > 0 ? int(checkpoint_lines(p, scan)) : 0;
    due = saved <= count ? saved * interval : -1;
    checkpoints = static_cast<A*>(p.checkpoints) + (warp.n * p.C + warp.channel) * checkpoint_offset(p, p.D) +
                  checkpoint_offset(p, d) + warp.place;
  }
  __device__ __forceinline__ int next_line() const { return kHorizontal ? (kReversed ? -1 : 1) : vertical_step; }

  template <int kCount>
  __device__ __forceinline__ void load(SharedPoint (&to)[kCount][P]) {
#pragma unroll
    for (int m = 0; m < kCount; ++m)
#pragma unroll
      for (int q = 0; q < P; ++q) to[m][q] = load_vector(points + m * C::kSegment + q * C::kLanes);
    points += kCount * C::kSegment;
  }
  // Saves the state before line i + m, which is `due`.
  template <int kCount>
  __device__ __forceinline__ void save(int i, unsigned starts, const A (&before)[P], const A (&states)[kCount][P]) {
#pragma unroll
    for (int m = 0; m < kCount; ++m)
#pragma unroll
      for (int q = 0; q < P; ++q)
        if (due == i + m && q < own)
          checkpoints[(saved - 1) * length + q] = (starts >> m & 1) != 0 ? A(0)
                                                  : m == 0               ? before[q]
                                                                         : states[m > 0 ? m - 1 : 0][q];
    ++saved;
    due = saved <= count ? saved * interval : -1;
  }
  // The lines i, i + 1, ... whose points have been loaded.
  template <int kCount>
  __device__ __forceinline__ void run(int i, const SharedPoint (&loaded)[kCount][P], A (&h)[P]) {
    unsigned exists[P];
#pragma unroll
    for (int q = 0; q < P; ++q) exists[q] = q < own ? ~0u : 0u;
    A inputs[kCount][P];
#pragma unroll
    for (int m = 0; m < kCount; ++m)
#pragma unroll
      for (int q = 0; q < P; ++q)
        inputs[m][q] = existing(exists[q], widen(load_shared(x + (m * next_line() + q * kPosition))));
    const auto read = [&](int m, int q) {
      const SharedPoint& point = loaded[m][q];
      return NormalPoint<A>(point.a, point.c, inputs[m][q], point.lam);
    };
    unsigned starts = 0;
    for (; start < i + kCount; start += chunk) starts |= 1u << (start - i);
    A before[P], states[kCount][P];
#pragma unroll
    for (int q = 0; q < P; ++q) before[q] = h[q];
    scan_lines<C, kCount>(h, read, true, true, own > 0, starts, states);
    if (due >= i && due < i + kCount) save<kCount>(i, starts, before, states);
#pragma unroll
    for (int q = 0; q < P; ++q) {
      if (kHorizontal && q >= own) break;  // along a row there is room for positions that do not exist
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
        A* const sum = sums + (m * next_line() + q * kPosition);
        store_shared(sum, load_shared(sum) + loaded[m][q].u * states[m][q]);
      }
    }
    x += kCount * next_line(), sums += kCount * next_line();
  }
};

// Scans the lines [begin, end) of a direction; h is the state before and after.
template <class C, bool kHorizontal, bool kReversed>
__device__ __forceinline__ void scan_shared(const SharedWarp<C>& warp, int d, int begin, int end,
                                            typename C::A (&h)[C::P]) {
  using Part = SharedScan<C, kHorizontal, kReversed>;
  constexpr int kLines = Part::kLines;
  Part scan(warp, d, begin);
  SharedPoint loaded[2][kLines][C::P];
  int i = begin;
  if (i + kLines <= end) scan.load(loaded[0]);
#pragma unroll 1
  while (i + kLines <= end) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (i + 2 * kLines <= end) scan.load(loaded[1 - half]);
      scan.run(i, loaded[half], h);
      i += kLines;
      if (i + kLines > end) break;
    }
  }
#pragma unroll 1
  for (; i < end; ++i) {
    SharedPoint rest[1][C::P];
    scan.load(rest);
    scan.run(i, rest, h);
  }
}

constexpr int kSharedWarps = 4;  // of a direction

template <class C>
__global__ void __launch_bounds__(64 * kSharedWarps)
    shared_forward(const __grid_constant__ Params p, const __grid_constant__ SharedLaunch l) {
  using T = typename C::T;
  using A = typename C::A;
  const SharedWarp<C> warp(p, l);
  const int side = int(threadIdx.x) / 32 / l.warps;
  T* const warp_x = warp.warp_x;
  A* const warp_sums = warp.warp_sums;
  warp.template for_pixels<const T>(p.x, SharedMemory<C>::plane_of_x(p),
                                    [&](const T& pixel, int at) { warp_x[at] = load_vector(&pixel); });
  warp.template for_pixels<T>(p.y, warp.plane, [&](T&, int at) { warp_sums[at] = A(0); });
  __syncthreads();
#pragma unroll 1
  for (int round = 0; round < l.rounds.rounds; ++round) {
    const int (&slots)[2] = l.rounds.slots[round];
    const bool runs = slots[side] >= 0, paired = slots[0] >= 0 && slots[1] >= 0;
    const int d = slots[runs ? side : 1 - side];
    const Scan scan = make_scan(p, d);
    // Of a pair, each warp scans the lines up to the middle of the image, and after a barrier the others, so that two
    // never add to the same pixel at a time. A single direction has one phase.
    const int lines = int(scan.lines), half = lines / 2, middle = !paired ? lines : side == 0 ? half : lines - half;
    A h[C::P] = {};
#pragma unroll 1
    for (int phase = 0; phase < (paired ? 2 : 1); ++phase) {
      const int begin = phase == 0 ? 0 : middle, end = phase == 0 ? middle : lines;
      if (!runs) {
      } else if (scan.horizontal && scan.reversed) {
        scan_shared<C, true, true>(warp, d, begin, end, h);
      } else if (scan.horizontal) {
        scan_shared<C, true, false>(warp, d, begin, end, h);
      } else {
        scan_shared<C, false, false>(warp, d, begin, end, h);
      }
      __syncthreads();
    }
  }
  warp.template for_pixels<T>(p.y, warp.plane, [&](T& pixel, int at) { narrow(warp_sums[at], pixel); });
}

}  // namespace gspn::cuda
