// Backward of horizontal scans whose rows are dense and aligned, with weights and gates of every channel: the
// counterpart of row_forward. A warp takes sixteen columns of its strip at a time, an interval between checkpoints.
// They come to shared memory by asynchronous copies, and gradients replace the inputs there, so that whole sectors are
// read and written.
#pragma once

#include "gradients.cuh"

namespace gspn::cuda {

constexpr int kPiece = 16;  // columns

// Rows of a piece in shared memory, one per position of the strip.
template <class T>
struct PieceRows {
  static constexpr int kUnits = kPiece * int(sizeof(T)) / 16;  // of 16 bytes, in a row
  // The four rows of a lane are followed by a unit of padding: lanes then read from different banks.
  static constexpr int kBytes = 16 * 32 * (4 * kUnits + 1);
  static __device__ __forceinline__ int offset(int row, int unit) {
    return 16 * (row / 4 * (4 * kUnits + 1) + row % 4 * kUnits + unit);
  }
};

// Where the inputs stand: weights, x, dy, then the gates that there are; then the gradient of x, in the place of dy if
// the types agree; then the states before and after each line.
template <class C>
struct PieceMemory {
  using T = typename C::T;
  using A = typename C::A;
  using Rows = PieceRows<T>;
  static constexpr int kX = 3 * Rows::kBytes, kDy = 4 * Rows::kBytes, kGates = 5 * Rows::kBytes;
  static GSPN_HOST_DEVICE int lam(const Params&) { return kGates; }
  static GSPN_HOST_DEVICE int u(const Params& p) { return kGates + (p.lam.data == nullptr ? 0 : Rows::kBytes); }
  static GSPN_HOST_DEVICE int end(const Params& p) { return u(p) + (p.u.data == nullptr ? 0 : Rows::kBytes); }
  static GSPN_HOST_DEVICE int dx(const Params& p) { return sizeof(T) == sizeof(A) ? kDy : end(p); }
  static GSPN_HOST_DEVICE int states(const Params& p) {
    return end(p) + (sizeof(T) == sizeof(A) ? 0 : PieceRows<A>::kBytes);
  }
  static GSPN_HOST_DEVICE int bytes(const Params& p) { return states(p) + (kPiece + 1) * 32 * 16; }
};

template <class C>
size_t row_backward_bytes(const Params& p, int per_block, bool halos) {
  return size_t(per_block) * (PieceMemory<C>::bytes(p) + (halos ? sizeof(typename C::A) * Strips<C>::kBuffer : 0));
}

template <class C>
bool row_gradients_fit(const Params& p, const Scan& scan) {
  return scan.horizontal && p.H % C::P == 0 && p.W % kPiece == 0 && p.interval == kPiece && p.chunk % kPiece == 0 &&
         owns_all(p) && gradients_of_vectors<typename C::T, 16 / int(sizeof(typename C::T))>(p);
}

// One warp's strip of rows.
template <class C, bool kStochastic, bool kReversed>
struct RowAdjoint {
  using T = typename C::T;
  using A = typename C::A;
  using Rows = PieceRows<T>;
  using Memory = PieceMemory<C>;
  const Params& p;
  const StripLaunch& l;
  const Job<C>& job;
  int c, d, j0, own_begin, own_end;  // the strip's first position; its own ones, counted from there
  unsigned left, right;              // masks: there are positions to the lane's left, right
  unsigned char* memory;
  Pack<A, 4>* states;  // of the lane, 32 apart
  A* halos;
  int exchanges = 0;
  bool adjoint_began = false;
  A v[C::P] = {};

  __device__ __forceinline__ RowAdjoint(const Params& p, const StripLaunch& l, const Job<C>& job)
      : p(p), l(l), job(job), c(job.channels.first), d(l.d), j0(job.strips.first_position()) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) & 31, length = int(p.H);
    const int halo = l.strips > 1 ? C::K : 0, place = j0 + lane * C::P;
    own_begin = halo > -j0 ? halo : -j0;
    own_end = C::kWidth - halo < length - j0 ? C::kWidth - halo : length - j0;
    left = place > 0 ? ~0u : 0u, right = place + C::P < length ? ~0u : 0u;
    memory = shared_memory() + warp * Memory::bytes(p);
    states = reinterpret_cast<Pack<A, 4>*>(memory + Memory::states(p)) + lane;
    halos = reinterpret_cast<A*>(shared_memory() + l.per_block * Memory::bytes(p));
  }
  __device__ __forceinline__ int64_t plane(const Field& f, int64_t direction, int64_t k = 0) const {
    return job.n * f.n + direction * f.d + c * f.c + k * f.k;
  }
  __device__ __forceinline__ int column_of(int line) const { return kReversed ? int(p.W) - kPiece - line : line; }
  // Calls use(place in memory, of the rows of a plane; place in shared memory) for the units of a piece that a lane
  // moves. Rows: those of the line, or those that the strip owns.
  template <class V, class Use>
  __device__ __forceinline__ void for_units(const Field& f, int64_t from, int column, bool own, const Use& use) const {
    constexpr int kUnits = PieceRows<V>::kUnits, kRows = 32 / kUnits;
    const int lane = threadIdx.x & 31, row0 = lane / kUnits, unit = lane % kUnits;
    const int begin = own ? own_begin : -j0, end = own ? own_end : int(p.H) - j0;
    V* at = static_cast<V*>(f.data) + from + (column + unit * (16 / int(sizeof(V)))) + (j0 + row0) * f.row;
#pragma unroll
    for (int e = 0; e < 4 * kUnits; ++e, at += kRows * f.row) {
      const int row = row0 + e * kRows;
      if (row >= begin && row < end) use(at, PieceRows<V>::offset(row0, unit) + PieceRows<V>::offset(e * kRows, 0));
    }
  }
  __device__ __forceinline__ void copy(int column) const {
    const auto copy_input = [&](const Field& f, int64_t from, int place) {
      for_units<T>(f, from, column, false, [&](const T* at, int offset) { copy_async(memory + place + offset, at); });
    };
#pragma unroll
    for (int k = 0; k < 3; ++k) copy_input(p.weights, plane(p.weights, d, k), k * Rows::kBytes);
    copy_input(p.x, plane(p.x, 0), Memory::kX);
    copy_input(p.dy, plane(p.dy, 0), Memory::kDy);
    if (p.lam.data != nullptr) copy_input(p.lam, plane(p.lam, d), Memory::lam(p));
    if (p.u.data != nullptr) copy_input(p.u, plane(p.u, d), Memory::u(p));
    commit_copies();
  }

  // Four lines, in the order of memory, of one of the lane's rows.
  __device__ __forceinline__ unsigned char* place_of(int input, int q, int group) const {
    constexpr int kPerUnit = 4 / Rows::kUnits;  // groups of a unit
    return memory + input + Rows::offset(int(threadIdx.x & 31) * C::P, group / kPerUnit) + Rows::offset(q, 0) +
           group % kPerUnit * 8;
  }
  __device__ __forceinline__ void read(int input, int group, Vector<T, 4> (&to)[C::P]) const {
#pragma unroll
    for (int q = 0; q < C::P; ++q) to[q] = Vector<T, 4>::at(place_of(input, q, group));
  }
  template <class V>
  static __device__ __forceinline__ void put(unsigned char* place, const V& values) {
    store_shared(reinterpret_cast<V*>(place), values);
  }
  __device__ __forceinline__ void read_gate(const Field& f, int input, int group, Vector<T, 4> (&to)[C::P]) const {
    if (f.data != nullptr)
      read(input, group, to);
    else
#pragma unroll
      for (int q = 0; q < C::P; ++q) to[q] = Vector<T, 4>::of(A(1));
  }
  __device__ __forceinline__ void keep(int number, const A (&h)[C::P]) {
    Pack<A, 4> state;
#pragma unroll
    for (int q = 0; q < C::P; ++q) state.v[q] = h[q];
    store_shared(states + number * 32, state);
  }

  // The states of the lines from `begin` on, into shared memory.
  __device__ __forceinline__ void recompute(const Checkpoints<C>& checkpoints, const Scan& scan, int begin) {
    A h[C::P] = {};
    if (begin > job.begin) checkpoints.restore(begin, Window{begin, 1, j0, int(scan.length)}, h);
    keep(0, h);
#pragma unroll 1
    for (int turn = 0; turn < kPiece / 4; ++turn) {
      const int group = kReversed ? kPiece / 4 - 1 - turn : turn;
      if (turn > 0 && l.strips > 1) {
        job.strips.exchange(halos, exchanges++ & 1, h, l.cluster);
        keep(4 * turn, h);  // now correct at the edges of the strip too
      }
      Vector<T, 4> weights[3][C::P], x[C::P], lam[C::P];
#pragma unroll
      for (int k = 0; k < 3; ++k) read(k * Rows::kBytes, group, weights[k]);
      read(Memory::kX, group, x);
      read_gate(p.lam, Memory::lam(p), group, lam);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int at = kReversed ? 3 - m : m;
        A raw[3][C::P], input[C::P], gate[C::P];
#pragma unroll
        for (int q = 0; q < C::P; ++q) {
          input[q] = x[q][at], gate[q] = lam[q][at];
#pragma unroll
          for (int k = 0; k < 3; ++k) raw[k][q] = weights[k][q][at];
        }
        recompute_line<C, kStochastic>(h, raw, input, gate, left, right, begin + 4 * turn + m == job.begin);
        keep(4 * turn + m + 1, h);
      }
    }
  }

  // The adjoint of the piece whose lines begin with `begin`. Gradients go to the places of the inputs.
  __device__ __forceinline__ void run(int begin) {
#pragma unroll 1
    for (int turn = kPiece / 4 - 1; turn >= 0; --turn) {
      const int group = kReversed ? kPiece / 4 - 1 - turn : turn;
      if (adjoint_began && l.strips > 1) job.strips.exchange(halos, exchanges++ & 1, v, l.cluster);
      adjoint_began = true;
      Vector<T, 4> weights[3][C::P], x[C::P], dy[C::P], lam[C::P], u[C::P];
#pragma unroll
      for (int k = 0; k < 3; ++k) read(k * Rows::kBytes, group, weights[k]);
      read(Memory::kX, group, x);
      read(Memory::kDy, group, dy);
      read_gate(p.lam, Memory::lam(p), group, lam);
      read_gate(p.u, Memory::u(p), group, u);
      Pack<A, 4> dx[C::P], dweights[3][C::P], dlam[C::P], du[C::P];
#pragma unroll
      for (int m = 3; m >= 0; --m) {
        const int at = kReversed ? 3 - m : m, number = 4 * turn + m;
        const auto before = load_shared(states + number * 32), after = load_shared(states + (number + 1) * 32);
        AdjointLine<C> in;
#pragma unroll
        for (int q = 0; q < C::P; ++q) {
          in.before[q] = before.v[q], in.after[q] = after.v[q];
          in.x[q] = x[q][at], in.dy[q] = dy[q][at], in.lam[q] = lam[q][at], in.u[q] = u[q][at];
#pragma unroll
          for (int k = 0; k < 3; ++k) in.weights[k][q] = weights[k][q][at];
        }
        LineGradients<C> out;
        adjoint_line<C, kStochastic>(in, v, left, right, begin + number == job.begin, out);
#pragma unroll
        for (int q = 0; q < C::P; ++q) {
          dx[q].v[at] = out.dx[q], dlam[q].v[at] = out.dlam[q], du[q].v[at] = out.du[q];
#pragma unroll
          for (int k = 0; k < 3; ++k) dweights[k][q].v[at] = out.dweights[k][q];
        }
      }
#pragma unroll
      for (int q = 0; q < C::P; ++q) {
#pragma unroll
        for (int k = 0; k < 3; ++k) put(place_of(k * Rows::kBytes, q, group), narrowed<T>(dweights[k][q]));
        if (p.lam.data != nullptr) put(place_of(Memory::lam(p), q, group), narrowed<T>(dlam[q]));
        if (p.u.data != nullptr) put(place_of(Memory::u(p), q, group), narrowed<T>(du[q]));
        put(memory + Memory::dx(p) + PieceRows<A>::offset(int(threadIdx.x & 31) * C::P, group) +
                PieceRows<A>::offset(q, 0),
            dx[q]);
      }
    }
  }

  __device__ __forceinline__ void store(int column) const {
    const auto store_output = [&](const Field& f, int64_t to, int place) {
      for_units<T>(f, to, column, true, [&](T* at, int offset) {
        constexpr int kUnit = 16 / int(sizeof(T));
        store_vector(reinterpret_cast<Pack<T, kUnit>*>(at),
                     load_shared(reinterpret_cast<const Pack<T, kUnit>*>(memory + place + offset)));
      });
    };
    if (p.dweights.data != nullptr)
#pragma unroll 1  // for the instruction cache: the loop over pieces is 100 KB long
      for (int k = 0; k < 3; ++k) store_output(p.dweights, plane(p.dweights, d, k), k * Rows::kBytes);
    if (p.dlam.data != nullptr) store_output(p.dlam, plane(p.dlam, d), Memory::lam(p));
    if (p.du.data != nullptr) store_output(p.du, plane(p.du, d), Memory::u(p));
    if (p.dx.data != nullptr) store_dx(column);
  }
  // Adds the gradient of x to the sum over directions: a lane takes four columns of every eighth row.
  __device__ __forceinline__ void store_dx(int column) const {
    const int lane = threadIdx.x & 31, unit = lane % 4, at = column + 4 * unit;
    const bool apart = l.sums != nullptr;  // sums are not in the tensor
    const int dx_row = int(p.dx.row), sums_row = apart ? int(p.W) : dx_row;
    T* const dx = static_cast<T*>(p.dx.data) + plane(p.dx, 0) + at;
    A* const sums = apart ? static_cast<A*>(l.sums) + (job.n * p.C + c) * (p.H * p.W) + at : reinterpret_cast<A*>(dx);
    const unsigned char* const from = memory + Memory::dx(p) + PieceRows<A>::offset(lane / 4, unit);
#pragma unroll 4
    for (int e = 0; e < 16; ++e) {
      const int row = lane / 4 + 8 * e, j = j0 + row;
      if (row < own_begin || row >= own_end) continue;
      auto value = load_shared(reinterpret_cast<const Pack<A, 4>*>(from + PieceRows<A>::offset(8 * e, 0)));
      auto* const sum = reinterpret_cast<Pack<A, 4>*>(sums + j * sums_row);
      if (!l.first) {
        const Pack<A, 4> before = *sum;
#pragma unroll
        for (int m = 0; m < 4; ++m) value.v[m] += before.v[m];
      }
      if (l.last)
        store_vector(reinterpret_cast<Pack<T, 4>*>(dx + j * dx_row), narrowed<T>(value));
      else
        store_vector(sum, value);
    }
  }
};

template <class C, bool kStochastic, bool kReversed>
__global__ void __launch_bounds__(32 * kBackwardWarps)
    row_backward(const __grid_constant__ Params p, const __grid_constant__ StripLaunch l) {
  const Scan scan = make_scan(p, l.d);
  const Job<C> job(p, l, scan);
  const Checkpoints<C> checkpoints(p, job.channels, scan, job.n, l.d);
  RowAdjoint<C, kStochastic, kReversed> adjoint(p, l, job);
  if (l.cluster > 1) cluster_barrier();  // no block stores to the memory of a neighbour that has not started
#pragma unroll 1
  for (int begin = job.end - kPiece; begin >= job.begin; begin -= kPiece) {
    const int column = adjoint.column_of(begin);
    adjoint.copy(column);
    wait_for_copies<0>();
    __syncwarp();
    adjoint.recompute(checkpoints, scan, begin);
    adjoint.run(begin);
    __syncwarp();
    adjoint.store(column);
    __syncwarp();  // the memory is free for new copies
  }
  if (l.cluster > 1) cluster_barrier();  // no block exits while a neighbour may still write to its memory
}

}  // namespace gspn::cuda
