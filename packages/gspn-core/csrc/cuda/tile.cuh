// Tiles: a few lines of a strip, in shared memory. A strip is the part of a line that one warp computes. A lane owns P
// positions in a row of it, so a step of the scan needs one shuffle to either side.
//
// Every tensor is read in the order of memory, element by element through its strides, into registers. Conversion,
// normalisation and the product with the input gate happen on the way to shared memory, where horizontal scans find
// their lines transposed. So all dtypes, alignments and strides share one code path, and the loads of the next tile
// overlap the computation of the current one.
#pragma once

#include "gspn/params.hpp"
#include "step.cuh"

namespace gspn::cuda {

// One plane of a field in scan order: line i, position j is at data + i * line + j * position. A plane spans less
// than 2^31 elements, a tensor may hold more.
template <class T>
struct Plane {
  T* data = nullptr;
  int line = 0, position = 0;

  __device__ __forceinline__ T* at(int i, int j) const { return data + (i * line + j * position); }
};

template <class T>
__device__ __forceinline__ Plane<T> scan_plane(const Field& f, const Scan& scan, int64_t n, int64_t d, int64_t c,
                                               int64_t k = 0) {
  T* data = static_cast<T*>(f.data) + (n * f.n + d * f.d + c * f.c + k * f.k);
  int line = int(scan.horizontal ? f.col : f.row);
  const int position = int(scan.horizontal ? f.row : f.col);
  if (scan.reversed) {
    data += (scan.lines - 1) * line;
    line = -line;
  }
  return {data, line, position};
}

// The channel of a field with fewer channels that serves channel c of x.
__device__ __forceinline__ int shared_channel(const Params& p, const Field& f, int c) {
  return c / int(p.C / f.channels);
}

// A bool that a function takes as a type.
template <bool kValue>
struct Bool {
  static constexpr bool value = kValue;
};

// Element `index` of a tile; consecutive lanes are consecutive pixels of a row of the image.
struct Place {
  int m, col;
};
template <class C>
__device__ __forceinline__ Place place(bool horizontal, unsigned index) {
  constexpr unsigned kLines = C::K, kWidth = C::kWidth;  // unsigned division by powers of two is a shift
  if (horizontal) return {int(index % kLines), int(index / kLines)};
  return {int(index / kWidth), int(index % kWidth)};
}

// The lines of a tile, and the position of its strip on them.
struct Window {
  int i0, count;  // lines [i0, i0 + count)
  int j0;         // position of column 0; a strip may begin before the line and end after it
  int length;
};

// A pointer for each of a warp's channels. Distances and masks, since the compiler would choose among pointers by an
// array in local memory.
template <class C, class T>
struct Pointers {
  T* first = nullptr;
  int64_t apart[C::SEG] = {};  // elements from the first

  // Pointers are set in their order.
  __device__ __forceinline__ void set(int segment, T* p) {
    if (segment == 0) first = p;
    apart[segment] = p - first;
  }
  // That of the channel which a column of the warp belongs to.
  __device__ __forceinline__ T* of(int col) const {
    T* p = first;
#pragma unroll
    for (int s = 1; s < C::SEG; ++s) p += apart[s] & -int64_t(col / C::kSegment == s);
    return p;
  }
};

// The planes of a warp's channels, which are of one field and so have the same strides.
template <class C, class T>
struct Planes {
  Pointers<C, T> data;
  int line = 0, position = 0;

  __device__ __forceinline__ void set(int segment, const Plane<T>& plane) {
    data.set(segment, plane.data);
    line = plane.line, position = plane.position;
  }
  __device__ __forceinline__ T* at(int col, int i, int j) const { return data.of(col) + (i * line + j * position); }
  __device__ __forceinline__ Planes opaque_strides() const {
    Planes planes = *this;
    planes.line = opaque(line), planes.position = opaque(position);
    return planes;
  }
  __device__ __forceinline__ explicit operator bool() const { return data.first != nullptr; }
};

// The channels of a warp.
template <class C>
struct Channels {
  int first;  // of x; the warp has [first, first + SEG), except channels from `end` on
  int end;

  __device__ __forceinline__ int of_segment(int s) const { return first + s < end ? first + s : end - 1; }
  __device__ __forceinline__ bool owns(int col) const { return first + col / C::kSegment < end; }

  template <class T>
  __device__ __forceinline__ Planes<C, T> planes(const Params& p, const Field& f, const Scan& scan, int64_t n,
                                                 int64_t d, int64_t k = 0) const {
    Planes<C, T> planes;
    if (f.data == nullptr) return planes;
#pragma unroll
    for (int s = 0; s < C::SEG; ++s)
      planes.set(s, scan_plane<T>(f, scan, n, d, shared_channel(p, f, of_segment(s)), k));
    return planes;
  }
};

template <class C>
__device__ __forceinline__ int position_of(const Window& w, int col) {
  return w.j0 + col % C::kSegment;
}
template <class C>
__device__ __forceinline__ bool inside(const Window& w, const Place& at) {
  const int j = position_of<C>(w, at.col);
  return at.m < w.count && j >= 0 && j < w.length;
}

// The elements of a tile that a lane loads, in its registers; warps that share a tile load every CW-th part each.
template <class C, class V, int kCount>
struct Fragment {
  V v[kCount];

  // Elements outside the line are not loaded.
  template <class T>
  __device__ __forceinline__ void load(const Planes<C, T>& from, const Window& w, bool horizontal, int step = 1,
                                       int first = 0) {
    const int start = opaque(first * 32 + int(threadIdx.x & 31));
    const Planes<C, T> planes = from.opaque_strides();
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const Place at = place<C>(horizontal, e * step * 32 + start);
      if (inside<C>(w, at)) v[e] = *planes.at(at.col, w.i0 + at.m, position_of<C>(w, at.col));
    }
  }
};

// Prefetches the tile at `w`, once for every 32 bytes.
template <class C, class T>
__device__ __forceinline__ void prefetch_tile(const Planes<C, T>& from, const Window& w, bool horizontal) {
  constexpr int kStep = 32 / int(sizeof(T));
  const int lane = opaque(threadIdx.x & 31);
#pragma unroll
  for (int e = 0; e < C::kElements; ++e) {
    const int index = e * 32 + lane;
    const Place at = place<C>(horizontal, index);
    const bool first = horizontal ? at.m % kStep == 0 : at.col % kStep == 0;
    if (first && inside<C>(w, at)) prefetch(from.at(at.col, w.i0 + at.m, position_of<C>(w, at.col)));
  }
}

// The weights of a strip's tile. Of row-stochastic weights only a and c are stored: b = 1 - a - c.
template <class C>
struct WeightTile {
  using A = typename C::A;
  A *a, *c, *b;  // b is null for row-stochastic weights

  static GSPN_HOST_DEVICE constexpr size_t size(bool stochastic) {
    return size_t(stochastic ? 2 : 3) * C::K * C::kPitch;
  }
  __device__ __forceinline__ WeightTile(A* memory, bool stochastic)
      : a(memory), c(memory + C::K * C::kPitch), b(stochastic ? nullptr : memory + 2 * C::K * C::kPitch) {}
};

template <class C>
struct WeightLoader {
  using T = typename C::T;
  using A = typename C::A;
  Planes<C, const T> planes[3];
  Fragment<C, T, C::kShare> raw[3];

  __device__ __forceinline__ WeightLoader(const Params& p, const Channels<C>& channels, const Scan& scan, int64_t n,
                                          int64_t d) {
#pragma unroll
    for (int k = 0; k < 3; ++k) planes[k] = channels.template planes<const T>(p, p.weights, scan, n, d, k);
  }
  // Loads the part of channel warp cw.
  __device__ __forceinline__ void load(const Window& w, bool horizontal, int cw) {
#pragma unroll
    for (int k = 0; k < 3; ++k) raw[k].load(planes[k], w, horizontal, C::CW, cw);
  }
  // Normalises the loaded logits into shared memory; other weights are stored unchanged. Neighbours beyond the ends of
  // the line get a weight of zero, whatever was loaded, and positions outside the line keep a state of zero.
  __device__ __forceinline__ void put(const WeightTile<C>& tile, const Window& w, bool horizontal, int cw) const {
    const int lane = opaque(threadIdx.x & 31);
#pragma unroll
    for (int e = 0; e < C::kShare; ++e) {
      const Place at = place<C>(horizontal, (e * C::CW + cw) * 32 + lane);
      if (at.m >= w.count) continue;
      const int j = position_of<C>(w, at.col), o = at.m * C::kPitch + at.col;
      const bool valid = j >= 0 && j < w.length;
      A a = 0, b = 0, c = 0;
      if (valid && tile.b == nullptr) {
        normalise<T>(widen(raw[0].v[e]), widen(raw[1].v[e]), widen(raw[2].v[e]), j > 0, j + 1 < w.length, a, c);
      } else if (valid) {
        a = j > 0 ? widen(raw[0].v[e]) : A(0);
        b = widen(raw[1].v[e]);
        c = j + 1 < w.length ? widen(raw[2].v[e]) : A(0);
      }
      tile.a[o] = a;
      tile.c[o] = c;
      if (tile.b != nullptr) tile.b[o] = b;
    }
  }
};

// Loads the product of a value and its gate, if there is one: lam x in the forward pass, u dy in the backward pass.
// kInShared: the value is in shared memory, and is read only when the product is needed.
template <class C, bool kInShared = false>
struct GatedLoader {
  using T = typename C::T;
  using A = typename C::A;
  Planes<C, const T> value, gate;
  Fragment<C, T, C::kElements> raw_value, raw_gate;

  __device__ __forceinline__ GatedLoader(const Planes<C, const T>& value, const Planes<C, const T>& gate)
      : value(value), gate(gate) {}

  __device__ __forceinline__ void load(const Window& w, bool horizontal) {
    if (!kInShared) raw_value.load(value, w, horizontal);
    if (gate) raw_gate.load(gate, w, horizontal);
  }
  __device__ __forceinline__ void put(A* tile, const Window& w, bool horizontal) const {
    const int lane = opaque(threadIdx.x & 31);
#pragma unroll
    for (int e = 0; e < C::kElements; ++e) {
      const Place at = place<C>(horizontal, e * 32 + lane);
      if (at.m >= w.count) continue;
      A product = 0;
      if (inside<C>(w, at)) {
        const T own = kInShared ? *value.at(at.col, w.i0 + at.m, position_of<C>(w, at.col)) : raw_value.v[e];
        product = gate ? widen(raw_gate.v[e]) * widen(own) : widen(own);
      }
      tile[at.m * C::kPitch + at.col] = product;
    }
  }
};

template <class C>
__device__ __forceinline__ Pack<typename C::A, C::P> row_of_lane(const typename C::A* tile, int m) {
  const int lane = threadIdx.x & 31;
  return *reinterpret_cast<const Pack<typename C::A, C::P>*>(tile + m * C::kPitch + lane * C::P);
}

template <class C>
__device__ __forceinline__ void get_row(const typename C::A* tile, int m, typename C::A (&out)[C::P]) {
  const Pack<typename C::A, C::P> row = row_of_lane<C>(tile, m);
#pragma unroll
  for (int q = 0; q < C::P; ++q) out[q] = row.v[q];
}

template <class C>
__device__ __forceinline__ void put_row(typename C::A* tile, int m, const typename C::A (&h)[C::P]) {
  const int lane = threadIdx.x & 31;
  Pack<typename C::A, C::P> pack;
#pragma unroll
  for (int q = 0; q < C::P; ++q) pack.v[q] = h[q];
  *reinterpret_cast<Pack<typename C::A, C::P>*>(tile + m * C::kPitch + lane * C::P) = pack;
}

// The same on line m of tiles in shared memory.
template <class C>
__device__ __forceinline__ void step(typename C::A (&h)[C::P], const WeightTile<C>& weights, const typename C::A* input,
                                     int m, bool starts_chunk) {
  LineOf<C> line;
  get_row<C>(weights.a, m, line.a);
  get_row<C>(weights.c, m, line.c);
  get_row<C>(input, m, line.f);
  if (weights.b != nullptr) get_row<C>(weights.b, m, line.b);
  advance<C, true>(h, line, weights.b == nullptr, starts_chunk);
}

__device__ __forceinline__ bool starts_chunk(const Params& p, int i) {
  return i == 0 || (p.chunk > 0 && i % int(p.chunk) == 0);
}

// Barrier among the warps that share a strip's weights: of the whole block if there are several, else of the warp.
template <class C>
__device__ __forceinline__ void share_barrier() {
  if constexpr (C::CW > 1)
    __syncthreads();
  else
    __syncwarp();
}

// The strips of a line, and the exchange of their edges. Neighbouring strips overlap by 2 K columns. After an exchange
// all columns of a strip are correct; each line then invalidates one more column at either edge, so that the columns
// which the strip owns stay correct for K lines.
template <class C>
struct Strips {
  using A = typename C::A;
  static constexpr int kUseful = C::kWidth - 2 * C::K;
  // Elements of one warp's buffer: [parity][side][K], double-buffered, so that a neighbour may already send the
  // next edges while a slow warp still reads these.
  static constexpr int kBuffer = 2 * 2 * C::K;

  int index, count;     // this strip, strips of a line
  int per_block, rank;  // strips of a block; this block's rank in its cluster
  int channel_warp;

  __device__ __forceinline__ int first_position() const { return count > 1 ? index * kUseful - C::K : 0; }
  // Whether the strip owns a column, that is, stores its results.
  __device__ __forceinline__ bool owns(int col) const { return count == 1 || (col >= C::K && col < C::kWidth - C::K); }

  __device__ __forceinline__ A* buffer_of(A* all, int strip) const {
    A* const buffer = all + ((strip % per_block) * C::CW + channel_warp) * kBuffer;
    return strip / per_block == rank ? buffer : cluster_map(buffer, strip / per_block);
  }
  __device__ __forceinline__ void exchange(A* all, int parity, A (&h)[C::P], int cluster) const {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int q = 0; q < C::P; ++q) {
      const int col = lane * C::P + q;
      if (index > 0 && col >= C::K && col < 2 * C::K)  // the left edge is the right halo of the previous strip
        buffer_of(all, index - 1)[(parity * 2 + 1) * C::K + col - C::K] = h[q];
      if (index + 1 < count && col >= C::kWidth - 2 * C::K && col < C::kWidth - C::K)
        buffer_of(all, index + 1)[parity * 2 * C::K + col - (C::kWidth - 2 * C::K)] = h[q];
    }
    if (cluster > 1)
      cluster_barrier();
    else
      __syncthreads();
    const A* const mine = all + ((index % per_block) * C::CW + channel_warp) * kBuffer;
#pragma unroll
    for (int q = 0; q < C::P; ++q) {
      const int col = lane * C::P + q;
      if (index > 0 && col < C::K) h[q] = mine[parity * 2 * C::K + col];
      if (index + 1 < count && col >= C::kWidth - C::K) h[q] = mine[(parity * 2 + 1) * C::K + col - (C::kWidth - C::K)];
    }
  }
};

}  // namespace gspn::cuda
