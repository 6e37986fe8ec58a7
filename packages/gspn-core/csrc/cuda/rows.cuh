// Forward of horizontal scans whose rows are dense and aligned. Asynchronous copies bring a stage, a sector of 32 bytes
// of each row, to shared memory. A lane reads its four positions from there by vectors along the rows, so that nothing
// is transposed: element m of a vector is line m. A warp has room for one stage: more warps hide the time of copies
// better than a second stage does. Strips, their exchange and the arithmetic are those of strip_forward, which serves
// all other layouts.
#pragma once

#include "columns.cuh"

namespace gspn::cuda {

template <class C>
constexpr bool kHasRows = C::P == 4 && C::K == 4 && C::CW == 1 && C::SEG == 1 && sizeof(typename C::T) < 8;

// A stage in shared memory: for every input a row of two units, 16 bytes each, per position of the strip.
template <class C>
struct RowStage {
  using T = typename C::T;
  static constexpr int kUnit = 16 / int(sizeof(T));  // lines of a unit
  static constexpr int kLines = 2 * kUnit;
  static constexpr int kGroups = kLines / 4;  // of four lines
  // The four rows of a lane are followed by a unit of padding: lanes then read from different banks. Inputs are an odd
  // multiple of 64 bytes apart, see state_offset.
  static constexpr int kInput = 16 * (32 * 9 + 4);
  static constexpr int kX = 3 * kInput, kLam = 4 * kInput;         // behind the weights
  static constexpr int kExtra = sizeof(T) == 2 ? kInput + 64 : 0;  // room for states, behind the stage of a warp

  static GSPN_HOST_DEVICE int bytes(const Params& p) {
    return ((p.lam.data == nullptr ? 4 : 5) * kInput + 127) / 128 * 128;
  }
  static GSPN_HOST_DEVICE int bytes_of_warp(const Params& p) { return bytes(p) + kExtra; }
  static __device__ __forceinline__ int offset(int row, int unit) { return 16 * (row / 4 * 9 + row % 4 * 2 + unit); }

  // Where the state of a group's four lines goes, from the start of the stage: to the place of inputs that have been
  // read. A row of 16-bit inputs has two places of 16 bytes for four groups, so that the first group goes to the room
  // behind the stage, and the third to the place of a weight. Two rows of all four groups are then in different banks.
  template <bool kReversed>
  static __device__ __forceinline__ int state_offset(int row, int group, int extra) {
    if (sizeof(T) == 4) return kX + offset(row, group);
    constexpr int kFirst = kReversed ? 1 : 0;  // the unit that is read first
    const int turn = kReversed ? kGroups - 1 - group : group;
    if (turn == 0) return extra + offset(row, 1 - kFirst);
    if (turn == 2) return offset(row, kFirst);
    return kX + offset(row, turn == 1 ? kFirst : 1 - kFirst);
  }
};

template <class C>
size_t row_forward_bytes(const Params& p, int per_block, bool halos) {
  const size_t buffers = halos ? sizeof(typename C::A) * Strips<C>::kBuffer : 0;
  return per_block * (RowStage<C>::bytes_of_warp(p) + buffers);
}

template <class C>
bool rows_fit(const Params& p, const Scan& scan) {
  constexpr int kUnit = RowStage<C>::kUnit;
  bool fit = scan.horizontal && p.H % C::P == 0 && p.W % kUnit == 0;
  for (const Field* f : {&p.x, &p.weights, &p.lam, &p.u, &p.y}) fit = fit && rows_of_vectors<typename C::T, kUnit>(*f);
  return fit;
}

// The rows of a strip in one input, of which a lane copies one unit of every sixteenth row.
template <class C>
struct RowSource {
  using T = typename C::T;
  const unsigned char* first = nullptr;  // the lane's first unit of a stage at column 0
  int64_t step = 0;                      // bytes between sixteen rows

  RowSource() = default;
  __device__ __forceinline__ RowSource(const Field& f, int64_t plane, int j0) {
    if (f.data == nullptr) return;
    const int lane = threadIdx.x & 31;
    const int64_t row_bytes = f.row * int64_t(sizeof(T));
    first = static_cast<const unsigned char*>(f.data) + plane * int64_t(sizeof(T)) + (j0 + lane / 2) * row_bytes +
            16 * (lane % 2);
    step = 16 * row_bytes;
  }
  // kWhole: every row and column of the stage exists.
  template <bool kWhole>
  __device__ __forceinline__ void copy(unsigned char* to, int column, int j0, const Params& p) const {
    const int lane = threadIdx.x & 31;
    const unsigned char* from = first + column * int(sizeof(T));
    to += RowStage<C>::offset(lane / 2, lane % 2);
    const bool exists = column + lane % 2 * RowStage<C>::kUnit < int(p.W);
#pragma unroll
    for (int e = 0; e < 8; ++e, from += step) {
      const int j = j0 + e * 16 + lane / 2;
      if (kWhole || (exists && j >= 0 && j < int(p.H))) copy_async(to + RowStage<C>::offset(e * 16, 0), from);
    }
  }
};

// What a warp reads, where it writes, and what its lanes own.
template <class C>
struct RowStrip {
  using T = typename C::T;
  using A = typename C::A;
  static constexpr int kUnit = RowStage<C>::kUnit, kLines = RowStage<C>::kLines;
  static constexpr int kGroups = RowStage<C>::kGroups;
  RowSource<C> weights[3], x, lam;
  const T* u = nullptr;  // plane of the image, in the order of memory
  T* y;
  A* sums;
  int u_row, y_row, sums_row;
  bool gated, first, last;
  int j0, own_begin, own_end;  // the strip's first position; its own ones, counted from there
  unsigned left, right;        // masks: there are positions to the left, to the right of the lane's
  int begin, end;              // lines

  __device__ __forceinline__ RowStrip(const Params& p, const StripLaunch& l, const Job<C>& job)
      : gated(p.lam.data != nullptr), first(l.first), last(l.last), begin(job.begin), end(job.end) {
    const int c = job.channels.first, length = int(p.H);
    j0 = job.strips.first_position();
    const auto plane = [&](const Field& f, int64_t d, int64_t k) {
      return job.n * f.n + d * f.d + shared_channel(p, f, c) * f.c + k * f.k;
    };
    for (int k = 0; k < 3; ++k) weights[k] = RowSource<C>(p.weights, plane(p.weights, l.d, k), j0);
    x = RowSource<C>(p.x, plane(p.x, 0, 0), j0);
    if (gated) lam = RowSource<C>(p.lam, plane(p.lam, l.d, 0), j0);
    if (p.u.data != nullptr) u = static_cast<const T*>(p.u.data) + plane(p.u, l.d, 0);
    y = static_cast<T*>(p.y.data) + plane(p.y, 0, 0);
    sums = l.sums == nullptr ? reinterpret_cast<A*>(y) : static_cast<A*>(l.sums) + (job.n * p.C + c) * (p.H * p.W);
    u_row = int(p.u.row), y_row = int(p.y.row), sums_row = l.sums == nullptr ? y_row : int(p.W);
    const int halo = l.strips > 1 ? C::K : 0, place = j0 + int(threadIdx.x & 31) * C::P;
    own_begin = halo > -j0 ? halo : -j0;
    own_end = C::kWidth - halo < length - j0 ? C::kWidth - halo : length - j0;
    left = place > 0 ? ~0u : 0u, right = place + C::P < length ? ~0u : 0u;
  }

  __device__ __forceinline__ void copy(unsigned char* stage, int column, const Params& p) const {
    const auto copy_inputs = [&](auto whole) {
      constexpr bool kWhole = decltype(whole)::value;
#pragma unroll
      for (int k = 0; k < 3; ++k) weights[k].template copy<kWhole>(stage + k * RowStage<C>::kInput, column, j0, p);
      x.template copy<kWhole>(stage + RowStage<C>::kX, column, j0, p);
      if (gated) lam.template copy<kWhole>(stage + RowStage<C>::kLam, column, j0, p);
    };
    if (j0 >= 0 && j0 + C::kWidth <= int(p.H) && column + kLines <= int(p.W))
      copy_inputs(Bool<true>());
    else
      copy_inputs(Bool<false>());
  }

  // Adds u h to the sum over directions: a lane takes four lines of a row, so that whole sectors are written.
  template <bool kStochastic, bool kReversed>
  __device__ __forceinline__ void store(const unsigned char* stage, int extra, int column, int width) const {
    constexpr int kRows = 32 / kGroups, kTurns = C::kWidth / kRows, kBatch = 4;
    const int lane = threadIdx.x & 31, group = lane % kGroups, at = column + group * 4;
    const int line = kReversed ? width - 4 - at : at;  // the first of the four
    if (at >= width || line + 4 <= begin || line >= end) return;
    const bool whole = line >= begin && line + 4 <= end;
    stage += RowStage<C>::template state_offset<kReversed>(lane / kGroups, group, extra);
    const int row0 = lane / kGroups, j = j0 + row0;
    // `scaled` and `adds` are known to be false where there is one direction and no output gate.
    const bool scaled = kStochastic && u != nullptr, adds = kStochastic && !first, to_y = !kStochastic || last;
#pragma unroll
    for (int turn = 0; turn < kTurns; turn += kBatch) {
      Vector<T, 4> gate[kBatch] = {};
      Pack<A, 4> sum[kBatch] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int row = row0 + (turn + b) * kRows;
        if (row < own_begin || row >= own_end) continue;
        if (scaled)
          gate[b] = load_vector(reinterpret_cast<const Pack<T, 4>*>(u + (j + (turn + b) * kRows) * u_row + at));
        if (adds) sum[b] = *reinterpret_cast<const Pack<A, 4>*>(sums + (j + (turn + b) * kRows) * sums_row + at);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int row = row0 + (turn + b) * kRows;
        if (row < own_begin || row >= own_end) continue;
        const auto h =
            load_shared(reinterpret_cast<const Pack<A, 4>*>(stage + RowStage<C>::offset((turn + b) * kRows, 0)));
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          A value = h.v[m];
          if (scaled) value *= gate[b][m];
          if (adds) value += sum[b].v[m];
          sum[b].v[m] = value;
        }
        const Pack<T, 4> out = narrowed<T>(sum[b]);
        A* const to_sums = sums + (j + (turn + b) * kRows) * sums_row + at;
        T* const to = y + (j + (turn + b) * kRows) * y_row + at;
        if (whole && to_y) {
          store_vector(reinterpret_cast<Pack<T, 4>*>(to), out);
        } else if (whole) {
          store_vector(reinterpret_cast<Pack<A, 4>*>(to_sums), sum[b]);
        } else {
          for (int m = 0; m < 4; ++m) {
            const int i = kReversed ? width - 1 - at - m : at + m;
            if (i < begin || i >= end) continue;
            if (to_y)
              to[m] = out.v[m];
            else
              to_sums[m] = sum[b].v[m];
          }
        }
      }
    }
  }
};

// A lane's weights and gated input of a group of four lines, straight from the stage: [position].v[line].
template <class C, bool kStochastic>
struct RowGroup {
  using T = typename C::T;
  using A = typename C::A;
  Vector<T, 4> weights[3][C::P], x[C::P], lam[C::P];

  // Of a unit of 16-bit inputs, half is used: loads of half a unit would meet in the same banks.
  __device__ __forceinline__ void read(const unsigned char* stage, int group, bool gated) {
    constexpr int kUnit = RowStage<C>::kUnit;
    const unsigned char* const lane = stage + RowStage<C>::offset(int(threadIdx.x & 31) * C::P, group / (kUnit / 4));
    const bool upper = kUnit == 8 && group % 2 == 1;
    const auto vector = [&](int input, int q) {
      const unsigned char* const unit = lane + input * RowStage<C>::kInput + RowStage<C>::offset(q, 0);
      if constexpr (kUnit == 4) return Vector<T, 4>::at(unit);
      const auto words = load_shared(reinterpret_cast<const Pack<uint32_t, 4>*>(unit));
      Vector<T, 4> out;
      out.words[0] = upper ? words.v[2] : words.v[0];
      out.words[1] = upper ? words.v[3] : words.v[1];
      return out;
    };
#pragma unroll
    for (int q = 0; q < C::P; ++q) {
#pragma unroll
      for (int k = 0; k < 3; ++k) weights[k][q] = vector(k, q);
      x[q] = vector(3, q);
      if (gated) lam[q] = vector(4, q);
    }
  }
  // Of the m-th line in the order of memory.
  __device__ __forceinline__ void prepare(const RowStrip<C>& strip, int m, LineOf<C>& line) const {
#pragma unroll
    for (int q = 0; q < C::P; ++q) {
      const unsigned has_left = q > 0 ? ~0u : strip.left, has_right = q < C::P - 1 ? ~0u : strip.right;
      const A value = x[q][m];
      line.f[q] = strip.gated ? lam[q][m] * value : value;
      prepare_weights<T, kStochastic>(weights[0][q][m], weights[1][q][m], weights[2][q][m], has_left, has_right,
                                      line.a[q], line.b[q], line.c[q]);
    }
  }
};

// Blocks and warps as of strip_forward. A stage is scanned in groups of four lines, between
// which edges are exchanged.
template <class C, bool kStochastic, bool kReversed>
__global__ void __launch_bounds__(32 * kForwardWarps)
    row_forward(const __grid_constant__ Params p, const __grid_constant__ StripLaunch l) {
  using A = typename C::A;
  using Stage = RowStage<C>;
  const Scan scan = make_scan(p, l.d);
  const Job<C> job(p, l, scan);
  const RowStrip<C> strip(p, l, job);
  const Checkpoints<C> checkpoints(p, job.channels, scan, job.n, l.d);
  const int width = int(p.W), warp = int(threadIdx.x) / 32, extra = Stage::bytes(p);
  unsigned char* const stage = shared_memory() + warp * Stage::bytes_of_warp(p);
  A* const halos = reinterpret_cast<A*>(shared_memory() + l.per_block * Stage::bytes_of_warp(p));

  // Stages in scan order: the number of the one that holds a line, in the order of memory.
  const auto stage_of = [&](int i) { return (kReversed ? width - 1 - i : i) / Stage::kLines; };
  const int after = stage_of(job.end - 1) + (kReversed ? -1 : 1);
  int number = stage_of(job.begin), due = checkpoints.after(job.begin - 1), parity = 0;
  strip.copy(stage, number * Stage::kLines, p);
  commit_copies();
  if (l.cluster > 1) cluster_barrier();  // no block stores to the memory of a neighbour that has not started
  A h[C::P] = {};
#pragma unroll 1
  for (int next; number != after; number = next) {
    next = number + (kReversed ? -1 : 1);
    wait_for_copies<0>();
    __syncwarp();
#pragma unroll 1
    for (int turn = 0; turn < Stage::kGroups; ++turn) {
      const int group = kReversed ? Stage::kGroups - 1 - turn : turn, column = number * Stage::kLines + 4 * group;
      const int first = kReversed ? width - 4 - column : column;
      if (column >= width || first + 4 <= job.begin || first >= job.end) continue;
      if (l.strips > 1 && first > job.begin) job.strips.exchange(halos, parity ^= 1, h, l.cluster);
      RowGroup<C, kStochastic> inputs;
      inputs.read(stage, group, strip.gated);
      Pack<A, 4> states[C::P];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int i = first + m, at = kReversed ? 3 - m : m;
        if (i < job.begin || i >= job.end) continue;
        const bool starts = i == job.begin;
        if (i == due) {
          const Window w{i, 1, strip.j0, int(scan.length)};
          checkpoints.save(i, w, job.channels, job.strips, h, starts);
          due = checkpoints.after(i);
        }
        LineOf<C> line;
        inputs.prepare(strip, at, line);
        advance<C>(h, line, kStochastic, starts, strip.left, strip.right);
#pragma unroll
        for (int q = 0; q < C::P; ++q) states[q].v[at] = h[q];
      }
      const int state = Stage::template state_offset<kReversed>(int(threadIdx.x & 31) * C::P, group, extra);
#pragma unroll
      for (int q = 0; q < C::P; ++q)
        store_shared(reinterpret_cast<Pack<A, 4>*>(stage + state + Stage::offset(q, 0)), states[q]);
    }
    __syncwarp();
    strip.template store<kStochastic, kReversed>(stage, extra, number * Stage::kLines, width);
    __syncwarp();  // the stage is free for new copies
    if (next != after) strip.copy(stage, next * Stage::kLines, p);
    commit_copies();
  }
  if (l.cluster > 1) cluster_barrier();  // no block exits while a neighbour may still write to its memory
}

}  // namespace gspn::cuda
