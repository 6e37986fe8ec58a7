// Forward of vertical scans whose rows are dense and aligned: a lane reads and writes its P positions of a row as one
// vector, straight from and to global memory, and keeps its weights in registers. The lines of a tile are loaded half a
// tile ahead. Strips, their exchange and the arithmetic are those of strip_forward, which serves all other layouts.
#pragma once

#include <type_traits>

#include "forward.cuh"

namespace gspn::cuda {

// Whether a configuration has such a kernel: lanes lie within or outside the halo as a whole, and no warps share
// weights.
template <class C>
constexpr bool kHasColumns = C::CW == 1 && C::SEG == 1 && C::K % C::P == 0 && sizeof(typename C::T) < 8;

// Warps of a block at most.
template <class C, bool kStochastic>
constexpr int kColumnWarps = C::P != kNarrow.P ? kForwardWarps
                             : kStochastic     ? kNarrowStochasticWarps
                                               : kNarrowForwardWarps;

// Whether every row of a field is a sequence of aligned vectors of P elements of T.
template <class T, int P>
bool rows_of_vectors(const Field& f) {
  if (f.data == nullptr) return true;
  for (const int64_t stride : {f.n, f.d, f.c, f.k, f.row})
    if (stride % P != 0) return false;
  return f.col == 1 && reinterpret_cast<uintptr_t>(f.data) % sizeof(Pack<T, P>) == 0;
}

template <class C>
bool columns_fit(const Params& p, const Scan& scan) {
  bool fit = !scan.horizontal && p.W % C::P == 0;
  for (const Field* f : {&p.x, &p.weights, &p.lam, &p.u, &p.y}) fit = fit && rows_of_vectors<typename C::T, C::P>(*f);
  return fit;
}

// The positions of a lane in a plane: at `line` elements from each other, in scan order.
template <class T, int P>
struct Column {
  T* first = nullptr;
  int line = 0;

  __device__ __forceinline__ Pack<std::remove_const_t<T>, P> load(int i, int64_t plane = 0) const {
    const auto* row = reinterpret_cast<const Pack<std::remove_const_t<T>, P>*>(first + (plane + i * line));
    if constexpr (std::is_const<T>::value)
      return load_vector(row);
    else
      return *row;  // the kernel writes there too, which the cache of load_vector need not see
  }
  __device__ __forceinline__ void store(int i, const Pack<T, P>& values, int64_t plane = 0) const {
    store_vector(reinterpret_cast<Pack<T, P>*>(first + (plane + i * line)), values);
  }
};

template <int P, class T>
__device__ __forceinline__ Column<T, P> column(const Plane<T>& plane, int j) {
  return {plane.data + j, plane.line};
}

// What a lane reads, and where it writes.
template <class C>
struct Columns {
  using T = typename C::T;
  using A = typename C::A;
  Column<const T, C::P> weights, x, lam, u;
  int64_t weight;  // elements from a weight's plane to the next
  Column<T, C::P> y;
  Column<A, C::P> sums;
  bool gated, scaled, first, last;  // there is a lam, a u; the first, the last direction
  bool in;                          // the lane's positions are of the line
  unsigned left, right;             // masks: there are positions to their left, right
  int end;                          // of the lines

  __device__ __forceinline__ Columns(const Params& p, const StripLaunch& l, const Job<C>& job, const Scan& scan)
      : gated(p.lam.data != nullptr), scaled(p.u.data != nullptr), first(l.first), last(l.last), end(job.end) {
    const int place = job.strips.first_position() + int(threadIdx.x & 31) * C::P, c = job.channels.first;
    in = place >= 0 && place < int(scan.length);
    left = place > 0 ? ~0u : 0u, right = place + C::P < int(scan.length) ? ~0u : 0u;
    const int j = in ? place : 0;
    const auto plane = [&](const Field& f, int64_t d, int64_t k) {
      return column<C::P>(scan_plane<const T>(f, scan, job.n, d, shared_channel(p, f, c), k), j);
    };
    weights = plane(p.weights, l.d, 0);
    weight = p.weights.k;
    x = plane(p.x, 0, 0);
    if (gated) lam = plane(p.lam, l.d, 0);
    if (scaled) u = plane(p.u, l.d, 0);
    y = column<C::P>(scan_plane<T>(p.y, scan, job.n, 0, c), j);
    Field f = p.y;
    if (l.sums != nullptr) f = Field{l.sums, p.C, p.C * p.H * p.W, 0, p.H * p.W, 0, p.W, 1};
    sums = column<C::P>(scan_plane<A>(f, scan, job.n, 0, c), j);
  }
  __device__ __forceinline__ bool has_lam() const { return gated; }
  __device__ __forceinline__ Pack<T, C::P> load_weight(int k, int i) const { return weights.load(i, k * weight); }
  __device__ __forceinline__ Pack<T, C::P> load_x(int i) const { return x.load(i); }
  __device__ __forceinline__ Pack<T, C::P> load_lam(int i) const { return lam.load(i); }
};

// A few rows of a lane's weights and input, half a tile by default.
template <class C, int kRows_ = C::K / 2>
struct Rows {
  static constexpr int kRows = kRows_;
  using T = typename C::T;
  using A = typename C::A;
  Vector<T, C::P> weights[3][kRows] = {}, x[kRows] = {}, lam[kRows];

  __device__ __forceinline__ Rows() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) lam[r] = Vector<T, C::P>::of(A(1));  // if there is no gate
  }

  // Rows from i0 on, those before `end`.
  template <class Source>
  __device__ __forceinline__ void load(const Source& from, int i0, int end) {
    if (!from.in) return;
    if (i0 + kRows <= end) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) load_row(from, r, i0 + r);
    } else {
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        if (i0 + r < end) load_row(from, r, i0 + r);
    }
  }
  template <class Source>
  __device__ __forceinline__ void load_row(const Source& from, int r, int i) {
#pragma unroll
    for (int k = 0; k < 3; ++k) weights[k][r] = from.load_weight(k, i);
    x[r] = from.load_x(i);
    if (from.has_lam()) lam[r] = from.load_lam(i);
  }

  // The weights of a line and its gated input. What lanes outside the line compute never leaves them.
  template <bool kStochastic>
  __device__ __forceinline__ void prepare(const Columns<C>& from, int r, LineOf<C>& line) const {
#pragma unroll
    for (int q = 0; q < C::P; ++q) {
      const unsigned has_left = q > 0 ? ~0u : from.left, has_right = q < C::P - 1 ? ~0u : from.right;
      const A value = x[r][q];
      line.f[q] = lam[r][q] * value;
      prepare_weights<T, kStochastic>(weights[0][r][q], weights[1][r][q], weights[2][r][q], has_left, has_right,
                                      line.a[q], line.b[q], line.c[q]);
    }
  }
};

// Half a tile of the sums over directions and of the gates of the output. line_scan has neither: one direction, no
// gate.
template <class C, bool kStochastic>
struct OutputRows {
  static constexpr int kRows = Rows<C>::kRows;
  using A = typename C::A;
  Vector<typename C::T, C::P> u[kRows] = {};
  Pack<A, C::P> before[kRows] = {};

  // Only what this strip writes: a neighbouring strip may be writing the rest.
  __device__ __forceinline__ void load(const Columns<C>& from, int i0, bool owns) {
    if constexpr (kStochastic) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (!owns || i0 + r >= from.end) break;
        if (from.scaled) u[r] = from.u.load(i0 + r);
        if (!from.first) before[r] = from.sums.load(i0 + r);
      }
    }
  }
  // Adds u h to the sum.
  __device__ __forceinline__ void store(const Columns<C>& to, int r, int i, const A (&h)[C::P]) const {
    Pack<A, C::P> sum;
#pragma unroll
    for (int q = 0; q < C::P; ++q) {
      sum.v[q] = h[q];
      if (kStochastic && to.scaled) sum.v[q] *= u[r][q];
      if (kStochastic && !to.first) sum.v[q] += before[r].v[q];
    }
    if (!kStochastic || to.last)
      to.y.store(i, narrowed<typename C::T>(sum));
    else
      to.sums.store(i, sum);
  }
};

// Blocks and warps as of strip_forward.
template <class C, bool kStochastic>
__global__ void __launch_bounds__(32 * kColumnWarps<C, kStochastic>)
    column_forward(const __grid_constant__ Params p, const __grid_constant__ StripLaunch l) {
  using A = typename C::A;
  constexpr int kRows = Rows<C>::kRows;
  const Scan scan = make_scan(p, l.d);
  const Job<C> job(p, l, scan);
  const Columns<C> columns(p, l, job, scan);
  const Checkpoints<C> checkpoints(p, job.channels, scan, job.n, l.d);
  const bool owns = columns.in && job.strips.owns(int(threadIdx.x & 31) * C::P);
  A* const halos = reinterpret_cast<A*>(shared_memory());

  A h[C::P] = {};
  Rows<C> rows[2];
  rows[0].load(columns, job.begin, job.end);
  if (l.cluster > 1) cluster_barrier();  // no block stores to the memory of a neighbour that has not started
  int parity = 0, due = checkpoints.after(job.begin - 1);
#pragma unroll 1
  for (int i0 = job.begin; i0 < job.end; i0 += C::K) {
    if (i0 > job.begin && l.strips > 1) job.strips.exchange(halos, parity ^= 1, h, l.cluster);
    const Window w = window(job, scan, i0, job.end);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = i0 + half * kRows;
      OutputRows<C, kStochastic> output;
      output.load(columns, first, owns);
      rows[1 - half].load(columns, first + kRows, job.end);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int i = first + r;
        if (i >= job.end) break;
        const bool starts = i == job.begin;
        if (i == due) {
          checkpoints.save(i, w, job.channels, job.strips, h, starts);
          due = checkpoints.after(i);
        }
        LineOf<C> line;
        rows[half].template prepare<kStochastic>(columns, r, line);
        advance<C>(h, line, kStochastic, starts, columns.left, columns.right);
        if (owns) output.store(columns, r, i, h);
      }
    }
  }
  if (l.cluster > 1) cluster_barrier();  // no block exits while a neighbour may still write to its memory
}

}  // namespace gspn::cuda
