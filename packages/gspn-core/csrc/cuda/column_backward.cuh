// Backward of vertical scans whose rows are dense and aligned, with weights and gates of every channel: the counterpart
// of column_forward.
#pragma once

#include "gradients.cuh"

namespace gspn::cuda {

template <class C>
struct ColumnBackwardMemory {
  using T = typename C::T;
  using A = typename C::A;
  // Of a warp: the states before an interval and after each of its lines, then the weights of each line.
  static GSPN_HOST_DEVICE size_t bytes(const Params& p) {
    return 32 * (size_t(p.interval + 1) * sizeof(Pack<A, C::P>) + 3 * size_t(p.interval) * sizeof(Pack<T, C::P>));
  }
};

// Warps of a block at most.
template <class C>
constexpr int kColumnBackwardWarps = C::P == kNarrow.P ? kNarrowBackwardWarps : kBackwardWarps;

template <class C>
size_t column_backward_bytes(const Params& p, int per_block, bool halos) {
  return per_block * (ColumnBackwardMemory<C>::bytes(p) + (halos ? sizeof(typename C::A) * Strips<C>::kBuffer : 0));
}

template <class C>
bool column_gradients_fit(const Params& p, const Scan& scan) {
  return !scan.horizontal && p.W % C::P == 0 && owns_all(p) && gradients_of_vectors<typename C::T, C::P>(p);
}

// A lane's columns of all tensors.
template <class C>
struct GradientColumns {
  using T = typename C::T;
  using A = typename C::A;
  Column<const T, C::P> weights, x, lam, dy, u;
  Column<T, C::P> dx, dweights, dlam, du;
  Column<A, C::P> sums;
  int64_t weight, dweight;  // elements from a weight's plane to the next
  bool first, last, in, owns;
  unsigned left, right;  // masks: there are positions to the lane's left, right

  __device__ __forceinline__ GradientColumns(const Params& p, const StripLaunch& l, const Job<C>& job, const Scan& scan)
      : weight(p.weights.k), dweight(p.dweights.k), first(l.first), last(l.last) {
    const int place = job.strips.first_position() + int(threadIdx.x & 31) * C::P, c = job.channels.first;
    in = place >= 0 && place < int(scan.length);
    owns = in && job.strips.owns(int(threadIdx.x & 31) * C::P);
    left = place > 0 ? ~0u : 0u, right = place + C::P < int(scan.length) ? ~0u : 0u;
    const int j = in ? place : 0;
    const auto read = [&](const Field& f, int64_t d) {
      Column<const T, C::P> none;
      return f.data == nullptr ? none : column<C::P>(scan_plane<const T>(f, scan, job.n, d, c), j);
    };
    const auto write = [&](const Field& f, int64_t d) {
      Column<T, C::P> none;
      return f.data == nullptr ? none : column<C::P>(scan_plane<T>(f, scan, job.n, d, c), j);
    };
    weights = read(p.weights, l.d), x = read(p.x, 0), lam = read(p.lam, l.d), dy = read(p.dy, 0), u = read(p.u, l.d);
    dx = write(p.dx, 0), dweights = write(p.dweights, l.d), dlam = write(p.dlam, l.d), du = write(p.du, l.d);
    Field f = p.dx;
    if (l.sums != nullptr) f = Field{l.sums, p.C, p.C * p.H * p.W, 0, p.H * p.W, 0, p.W, 1};
    if (f.data != nullptr) sums = column<C::P>(scan_plane<A>(f, scan, job.n, 0, c), j);
  }
  __device__ __forceinline__ bool has_lam() const { return lam.first != nullptr; }
  __device__ __forceinline__ Pack<T, C::P> load_weight(int k, int i) const { return weights.load(i, k * weight); }
  __device__ __forceinline__ Pack<T, C::P> load_x(int i) const { return x.load(i); }
  __device__ __forceinline__ Pack<T, C::P> load_lam(int i) const { return lam.load(i); }
};

// Two lines of what the adjoint reads beside weights and states.
template <class C>
struct AdjointRows {
  static constexpr int kRows = 2;
  using T = typename C::T;
  using A = typename C::A;
  Vector<T, C::P> dy[kRows], u[kRows], x[kRows], lam[kRows];
  Pack<A, C::P> before[kRows];  // sums over the directions before

  __device__ __forceinline__ void load(const GradientColumns<C>& from, int i0, int begin, int end) {
    if (!from.in) return;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = i0 + r;
      if (i < begin || i >= end) continue;
      dy[r] = from.dy.load(i);
      u[r] = from.u.first != nullptr ? from.u.load(i) : Vector<T, C::P>::of(A(1));
      lam[r] = from.lam.first != nullptr ? from.lam.load(i) : Vector<T, C::P>::of(A(1));
      if (from.dlam.first != nullptr) x[r] = from.x.load(i);
      if (!from.first && from.owns && from.dx.first != nullptr) before[r] = from.sums.load(i);
    }
  }
};

// One warp's strip of columns.
template <class C, bool kStochastic>
struct ColumnAdjoint {
  using T = typename C::T;
  using A = typename C::A;
  const Params& p;
  const StripLaunch& l;
  const Job<C>& job;
  const GradientColumns<C>& columns;
  Pack<A, C::P>* states;   // of the lane, 32 apart
  Pack<T, C::P>* weights;  // of the lane: [line][k], 32 apart
  A* halos;
  int exchanges = 0;
  bool adjoint_began = false;
  A v[C::P] = {};

  __device__ __forceinline__ ColumnAdjoint(const Params& p, const StripLaunch& l, const Job<C>& job,
                                           const GradientColumns<C>& columns)
      : p(p), l(l), job(job), columns(columns) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) & 31, interval = int(p.interval);
    unsigned char* const memory = shared_memory() + warp * ColumnBackwardMemory<C>::bytes(p);
    states = reinterpret_cast<Pack<A, C::P>*>(memory) + lane;
    weights = reinterpret_cast<Pack<T, C::P>*>(memory + (interval + 1) * 32 * sizeof(Pack<A, C::P>)) + lane;
    halos = reinterpret_cast<A*>(shared_memory() + l.per_block * ColumnBackwardMemory<C>::bytes(p));
  }
  __device__ __forceinline__ void keep(int number, const A (&h)[C::P]) {
    Pack<A, C::P> state;
#pragma unroll
    for (int q = 0; q < C::P; ++q) state.v[q] = h[q];
    store_shared(states + number * 32, state);
  }

  // States and weights of the lines [begin, end), into shared memory.
  __device__ __forceinline__ void recompute(const Checkpoints<C>& checkpoints, const Scan& scan, int begin, int end) {
    A h[C::P] = {};
    if (begin > job.begin) checkpoints.restore(begin, window(job, scan, begin, end), h);
    keep(0, h);
    Rows<C> rows[2];
    rows[0].load(columns, begin, end);
#pragma unroll 1
    for (int i0 = begin; i0 < end; i0 += C::K) {
      if (i0 > begin && l.strips > 1) {
        job.strips.exchange(halos, exchanges++ & 1, h, l.cluster);
        keep(i0 - begin, h);  // now correct at the edges of the strip too
      }
#pragma unroll
      for (int half = 0; half < C::K / 2; ++half) {
        rows[1 - half].load(columns, i0 + 2 * half + 2, end);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int i = i0 + 2 * half + r;
          if (i >= end) break;
          A raw[3][C::P], x[C::P], lam[C::P];
#pragma unroll
          for (int k = 0; k < 3; ++k)
            store_shared(weights + ((i - begin) * 3 + k) * 32, rows[half].weights[k][r].pack());
#pragma unroll
          for (int q = 0; q < C::P; ++q) {
            x[q] = rows[half].x[r][q], lam[q] = rows[half].lam[r][q];
#pragma unroll
            for (int k = 0; k < 3; ++k) raw[k][q] = rows[half].weights[k][r][q];
          }
          recompute_line<C, kStochastic>(h, raw, x, lam, columns.left, columns.right, i == job.begin);
          keep(i - begin + 1, h);
        }
      }
    }
  }

  __device__ __forceinline__ void line(int i, int begin, const AdjointRows<C>& rows, int r) {
    AdjointLine<C> in;
    const auto before = load_shared(states + (i - begin) * 32), after = load_shared(states + (i - begin + 1) * 32);
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const auto raw = Vector<T, C::P>::at(weights + ((i - begin) * 3 + k) * 32);
#pragma unroll
      for (int q = 0; q < C::P; ++q) in.weights[k][q] = raw[q];
    }
#pragma unroll
    for (int q = 0; q < C::P; ++q) {
      in.before[q] = before.v[q], in.after[q] = after.v[q];
      in.x[q] = rows.x[r][q], in.lam[q] = rows.lam[r][q], in.u[q] = rows.u[r][q], in.dy[q] = rows.dy[r][q];
    }
    LineGradients<C> out;
    adjoint_line<C, kStochastic>(in, v, columns.left, columns.right, i == job.begin, out);
    if (columns.owns) store(i, out, rows.before[r]);
  }
  __device__ __forceinline__ void store(int i, const LineGradients<C>& out, const Pack<A, C::P>& before) {
    const auto put = [&](const Column<T, C::P>& to, const A(&values)[C::P], int64_t plane) {
      Pack<A, C::P> wide;
#pragma unroll
      for (int q = 0; q < C::P; ++q) wide.v[q] = values[q];
      to.store(i, narrowed<T>(wide), plane);
    };
    if (columns.dx.first != nullptr) {
      Pack<A, C::P> sum;
#pragma unroll
      for (int q = 0; q < C::P; ++q) sum.v[q] = columns.first ? out.dx[q] : out.dx[q] + before.v[q];
      if (columns.last)
        columns.dx.store(i, narrowed<T>(sum));
      else
        columns.sums.store(i, sum);
    }
    if (columns.dweights.first != nullptr)
#pragma unroll
      for (int k = 0; k < 3; ++k) put(columns.dweights, out.dweights[k], k * columns.dweight);
    if (columns.dlam.first != nullptr) put(columns.dlam, out.dlam, 0);
    if (columns.du.first != nullptr) put(columns.du, out.du, 0);
  }

  // The adjoint of the lines [begin, end), from the last to the first.
  __device__ __forceinline__ void run(int begin, int end) {
    const int last = begin + (end - 1 - begin) / C::K * C::K;
    AdjointRows<C> rows[2];
    rows[1].load(columns, last + 2, begin, end);
#pragma unroll 1
    for (int i0 = last; i0 >= begin; i0 -= C::K) {
      if (adjoint_began && l.strips > 1) job.strips.exchange(halos, exchanges++ & 1, v, l.cluster);
      adjoint_began = true;
#pragma unroll
      for (int half = 1; half >= 0; --half) {
        rows[1 - half].load(columns, i0 + 2 * half - 2, begin, end);
#pragma unroll
        for (int r = 1; r >= 0; --r)
          if (i0 + 2 * half + r < end) line(i0 + 2 * half + r, begin, rows[half], r);
      }
    }
  }
};

template <class C, bool kStochastic>
__global__ void __launch_bounds__(32 * kColumnBackwardWarps<C>)
    column_backward(const __grid_constant__ Params p, const __grid_constant__ StripLaunch l) {
  const Scan scan = make_scan(p, l.d);
  const Job<C> job(p, l, scan);
  const GradientColumns<C> columns(p, l, job, scan);
  const Checkpoints<C> checkpoints(p, job.channels, scan, job.n, l.d);
  ColumnAdjoint<C, kStochastic> adjoint(p, l, job, columns);
  const int interval = int(p.interval);
  if (l.cluster > 1) cluster_barrier();  // no block stores to the memory of a neighbour that has not started
#pragma unroll 1
  for (int end = job.end, begin; end > job.begin; end = begin) {
    begin = (end - 1) / interval * interval;
    begin = begin > job.begin ? begin : job.begin;
    adjoint.recompute(checkpoints, scan, begin, end);
    adjoint.run(begin, end);
  }
  if (l.cluster > 1) cluster_barrier();  // no block exits while a neighbour may still write to its memory
}

}  // namespace gspn::cuda
