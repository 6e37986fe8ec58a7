// Forward of all directions of small images in one launch, where every channel has weights of its own and rows are
// dense and aligned. A warp holds the images of a few channels side by side and the sums over directions in shared
// memory. Vertical scans load rows straight into registers, as column_forward does; horizontal ones take sectors of
// rows through shared memory, as row_forward does. The copies for the next horizontal direction are under way while a
// vertical one is computed.
#pragma once

#include "rows.cuh"

namespace gspn::cuda {

struct FusedLaunch {
  int64_t blocks = 1;                   // warps of an image
  int order[kMaxDirections] = {};       // in which the directions run: horizontal and vertical ones in turns
  int horizontal[kMaxDirections] = {};  // the horizontal ones of them, then -1
};

template <class C>
constexpr bool kHasFused = C::P == 4 && C::K == 4 && C::CW == 1 && sizeof(typename C::T) < 8;

// Inputs of a stage: three weights, x, the input gate and the output gate.
constexpr int kFusedInputs = 6;

template <class C>
struct FusedMemory {
  using A = typename C::A;
  // Units of 16 bytes in the sums of a channel. A unit follows every four rows, so that lanes, which have four rows
  // each in a horizontal scan, are in different banks.
  static GSPN_HOST_DEVICE int offset(const Params& p, int row) { return row * int(p.W / 4) + row / 4; }
  static GSPN_HOST_DEVICE int channel(const Params& p) { return offset(p, int(p.H)); }
  static size_t bytes(const Params& p, bool horizontal) {
    return size_t(horizontal ? kFusedInputs * RowStage<C>::kInput : 0) + 16 * size_t(C::SEG) * channel(p);
  }
};

// Whether each channel reads its own plane of a field, or all read one.
inline bool is_linear(const Params& p, const Field& f) {
  return f.data == nullptr || f.channels == p.C || f.channels == 1;
}

template <class C>
bool fused_fits(const Params& p) {
  constexpr int kUnit = RowStage<C>::kUnit;
  bool fit = p.stochastic && p.interval % 4 == 0 && p.weights.channels == p.C && is_linear(p, p.lam) &&
             is_linear(p, p.u) && p.H % 4 == 0 && p.W % kUnit == 0;
  for (const Field* f : {&p.x, &p.weights, &p.lam, &p.u, &p.y})
    fit = fit && rows_of_vectors<typename C::T, kUnit>(*f) &&
          (f->data == nullptr || (f->row == p.W && f->c >= 0 && f->c <= INT32_MAX / 8));
  return fit;
}

// What a warp has: the channels first, first + 1, ... of image n; a lane's part of one of them.
template <class C>
struct FusedWarp {
  using T = typename C::T;
  using A = typename C::A;
  const Params& p;
  int64_t n;
  int first, channel, place;  // place: the lane's first position on a line
  bool active;                // the lane has a channel
  unsigned char* stage;
  Pack<A, 4>* sums;  // of the lane's channel

  __device__ __forceinline__ FusedWarp(const Params& p, const FusedLaunch& l, bool horizontal) : p(p) {
    const int lane = threadIdx.x & 31, segment = lane / C::kLanes;
    n = blockIdx.x / l.blocks;
    first = int(blockIdx.x % l.blocks) * C::SEG;
    active = first + segment < int(p.C);
    channel = active ? first + segment : int(p.C) - 1;
    place = lane % C::kLanes * C::P;
    stage = shared_memory();
    sums = reinterpret_cast<Pack<A, 4>*>(stage + (horizontal ? kFusedInputs * RowStage<C>::kInput : 0)) +
           segment * FusedMemory<C>::channel(p);
  }
  __device__ __forceinline__ int64_t plane(const Field& f, int c, int64_t d, int64_t k = 0) const {
    return n * f.n + d * f.d + (f.channels == 1 ? 0 : c) * f.c + k * f.k;
  }
  __device__ __forceinline__ Pack<A, 4>& sum(int row, int unit) const {
    return sums[FusedMemory<C>::offset(p, row) + unit];
  }
  // Adds u h on four pixels of a row; the first direction finds nothing there.
  __device__ __forceinline__ static void add(Pack<A, 4>& sum, const A (&h)[4], const Vector<T, 4>& u, bool is_first) {
    Pack<A, 4> values = {};
    if (!is_first) values = load_shared(&sum);
#pragma unroll
    for (int m = 0; m < 4; ++m) values.v[m] += u[m] * h[m];
    store_shared(&sum, values);
  }
};

// The lines on which a scan starts anew, and those before which a state is saved.
template <class C>
struct Marks {
  using A = typename C::A;
  int start = 0, chunk, due, interval, count, length;
  A* states;  // of the lane's positions

  __device__ __forceinline__ Marks(const FusedWarp<C>& warp, const Scan& scan, int d)
      : chunk(int(warp.p.chunk)), interval(int(warp.p.interval)), count(0), length(int(scan.length)) {
    const Params& p = warp.p;
    if (p.chunk <= 0 || p.chunk > scan.lines) chunk = int(scan.lines);
    if (p.checkpoints != nullptr && warp.active && warp.place < length) count = int(checkpoint_lines(p, scan));
    due = count > 0 ? interval : -1;
    states = static_cast<A*>(p.checkpoints) + (warp.n * p.C + warp.channel) * checkpoint_offset(p, p.D) +
             checkpoint_offset(p, d) + warp.place;
  }
  // Returns a bit for each of the four lines from i on that starts a chunk; saves the state before line i where that is
  // due. Intervals are multiples of four.
  __device__ __forceinline__ unsigned pass(int i, const A (&h)[4]) {
    if (i == due) {
      Pack<A, 4> state;
#pragma unroll
      for (int q = 0; q < 4; ++q) state.v[q] = i == start ? A(0) : h[q];
      store_vector(reinterpret_cast<Pack<A, 4>*>(states), state);
      states += length, --count;
      due = count > 0 ? i + interval : -1;
    }
    unsigned starts = 0;
    for (; start < i + 4; start += chunk) starts |= 1u << (start - i);
    return starts;
  }
};

// Rows of all inputs, which have one stride.
template <class C>
struct FusedColumns {
  using T = typename C::T;
  const T *weight[3], *x, *lam, *u;
  int line, end;
  bool in, gated, scaled;
  unsigned left, right;

  __device__ __forceinline__ FusedColumns(const FusedWarp<C>& warp, const Scan& scan, int d)
      : end(int(scan.lines)), gated(warp.p.lam.data != nullptr), scaled(warp.p.u.data != nullptr) {
    const Params& p = warp.p;
    in = warp.place < int(p.W);
    left = warp.place > 0 ? ~0u : 0u, right = warp.place + C::P < int(p.W) ? ~0u : 0u;
    line = scan.reversed ? -int(p.W) : int(p.W);
    const int64_t from = (scan.reversed ? (p.H - 1) * p.W : 0) + (in ? warp.place : 0);
    const auto pointer = [&](const Field& f, int64_t k) {
      return static_cast<const T*>(f.data) + warp.plane(f, warp.channel, d, k) + from;
    };
#pragma unroll
    for (int k = 0; k < 3; ++k) weight[k] = pointer(p.weights, k);
    x = static_cast<const T*>(p.x.data) + warp.plane(p.x, warp.channel, 0) + from;
    lam = pointer(p.lam, 0), u = pointer(p.u, 0);
  }
  __device__ __forceinline__ Pack<T, C::P> load(const T* plane, int i) const {
    return load_vector(reinterpret_cast<const Pack<T, C::P>*>(plane + i * line));
  }
  // Lanes outside the line load others' positions.
  template <int kRows>
  __device__ __forceinline__ void load(Rows<C, kRows>& rows, int i0) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) rows.load_row(*this, r, i0 + r);
  }
  __device__ __forceinline__ bool has_lam() const { return gated; }
  __device__ __forceinline__ Pack<T, C::P> load_weight(int k, int i) const { return load(weight[k], i); }
  __device__ __forceinline__ Pack<T, C::P> load_x(int i) const { return load(x, i); }
  __device__ __forceinline__ Pack<T, C::P> load_lam(int i) const { return load(lam, i); }
};

template <class C>
__device__ __forceinline__ void scan_columns(const FusedWarp<C>& warp, int d, bool is_first) {
  using A = typename C::A;
  using T = typename C::T;
  constexpr int kRows = sizeof(T) == 2 ? 4 : 2;  // of a load, while those before it are computed: registers bound it
  const Scan scan = make_scan(warp.p, d);
  const FusedColumns<C> columns(warp, scan, d);
  Marks<C> marks(warp, scan, d);
  const int next_row = scan.reversed ? -int(warp.p.W / 4) : int(warp.p.W / 4);  // of the sums, within four rows
  A h[C::P] = {};
  unsigned starts = 0;
  Rows<C, kRows> rows[2];
  columns.load(rows[0], 0);
#pragma unroll 1
  for (int i0 = 0; i0 < columns.end; i0 += 2 * kRows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int first = i0 + half * kRows;
      if (first >= columns.end) break;
      Vector<T, C::P> u[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        u[r] = columns.scaled ? columns.load(columns.u, first + r) : Vector<T, C::P>::of(A(1));
      if (first + kRows < columns.end) columns.load(rows[1 - half], first + kRows);
      A states[kRows][C::P];
      const Rows<C, kRows>& now = rows[half];
      const auto read = [&](int m, int q) {
        return point_of<T, C::P>(now.weights[0][m][q], now.weights[1][m][q], now.weights[2][m][q], now.x[m][q],
                                 now.lam[m][q], q, columns.left, columns.right);
      };
      starts = first % 4 == 0 ? marks.pass(first, h) : starts >> kRows;
      scan_lines<C, kRows>(h, read, columns.left, columns.right, columns.in, starts & ((1u << kRows) - 1), states);
      if (!columns.in) continue;
      const int row = scan.reversed ? columns.end - 1 - first : first;
      Pack<A, 4>* const sums = &warp.sum(row, warp.place / 4);
#pragma unroll
      for (int r = 0; r < kRows; ++r) warp.add(sums[r * next_row], states[r], u[r], is_first);
    }
  }
}

// Copies a stage of a direction: rows of every channel of the warp, which follow one another as rows of a strip do.
template <class C>
__device__ __forceinline__ void copy_stage(const FusedWarp<C>& warp, int d, int number) {
  using T = typename C::T;
  using Stage = RowStage<C>;
  constexpr int kTurns = C::kSegment / 16;  // copies of a lane in a channel
  const Params& p = warp.p;
  const int lane = threadIdx.x & 31, column = number * Stage::kLines + lane % 2 * Stage::kUnit;
  unsigned char* const to = warp.stage + Stage::offset(lane / 2, lane % 2);
  const auto copy = [&](int input, int64_t from, const Field& f, auto whole) {
    const T* const plane = static_cast<const T*>(f.data) + from + (lane / 2 * int(p.W) + column);
    const int channel_step = f.channels == 1 ? 0 : int(f.c), row_step = 16 * int(p.W);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int row = e % kTurns * 16 + lane / 2, segment = e / kTurns;
      if (decltype(whole)::value || (row < int(p.H) && column < int(p.W) && warp.first + segment < int(p.C)))
        copy_async(to + input * Stage::kInput + Stage::offset(e * 16, 0),
                   plane + (segment * channel_step + e % kTurns * row_step));
    }
  };
  const auto copy_all = [&](auto whole) {
    const int64_t weights = warp.plane(p.weights, warp.first, d);
#pragma unroll
    for (int k = 0; k < 3; ++k) copy(k, weights + k * p.weights.k, p.weights, whole);
    copy(3, warp.plane(p.x, warp.first, 0), p.x, whole);
    if (p.lam.data != nullptr) copy(4, warp.plane(p.lam, warp.first, d), p.lam, whole);
    if (p.u.data != nullptr) copy(5, warp.plane(p.u, warp.first, d), p.u, whole);
  };
  if (p.H == C::kSegment && warp.first + C::SEG <= int(p.C) && (number + 1) * Stage::kLines <= int(p.W))
    copy_all(Bool<true>());
  else
    copy_all(Bool<false>());
  commit_copies();
}

// The stage that holds a line, in the order of memory.
template <class C>
__device__ __forceinline__ int stage_of(const Params& p, bool reversed, int i) {
  return (reversed ? int(p.W) - 1 - i : i) / RowStage<C>::kLines;
}

// A lane's inputs of a unit's lines, as they stand in the stage: [position][line].
template <class C>
struct FusedUnit {
  using T = typename C::T;
  using A = typename C::A;
  static constexpr int kUnit = RowStage<C>::kUnit;
  Vector<T, kUnit> inputs[kFusedInputs][C::P];

  __device__ __forceinline__ FusedUnit(const FusedWarp<C>& warp, int unit) {
    const unsigned char* const lane = warp.stage + RowStage<C>::offset(int(threadIdx.x & 31) * C::P, unit);
#pragma unroll
    for (int input = 0; input < kFusedInputs; ++input) {
      const bool exists = input < 4 || (input == 4 ? warp.p.lam : warp.p.u).data != nullptr;
#pragma unroll
      for (int q = 0; q < C::P; ++q) {
        const unsigned char* const at = lane + input * RowStage<C>::kInput + RowStage<C>::offset(q, 0);
        inputs[input][q] = exists ? Vector<T, kUnit>::at(at) : Vector<T, kUnit>::of(A(1));
      }
    }
  }
};

// `after` is the horizontal direction that follows, or -1.
template <class C, bool kReversed>
__device__ __forceinline__ void scan_rows(const FusedWarp<C>& warp, int d, int after, bool is_first) {
  using A = typename C::A;
  using T = typename C::T;
  using Stage = RowStage<C>;
  constexpr int kUnit = Stage::kUnit, kGroups = kUnit / 4;
  const Params& p = warp.p;
  const int width = int(p.W), last = stage_of<C>(p, kReversed, width - 1);
  const bool in = warp.place < int(p.H);
  const unsigned left = warp.place > 0 ? ~0u : 0u, right = warp.place + C::P < int(p.H) ? ~0u : 0u;
  const int next_row = int(p.W / 4);  // from a row of sums to the next, but for rows of other lanes
  Marks<C> marks(warp, make_scan(p, d), d);
  A h[C::P] = {};
#pragma unroll 1
  for (int number = stage_of<C>(p, kReversed, 0);; number += kReversed ? -1 : 1) {
    wait_for_copies<0>();
    __syncwarp();
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
      const int unit = kReversed ? 1 - turn : turn, column = number * Stage::kLines + unit * kUnit;
      if (column >= width) continue;
      const FusedUnit<C> inputs(warp, unit);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int group = kReversed ? kGroups - 1 - g : g, at = column + 4 * group;
        const auto& in_unit = inputs.inputs;
        const auto read = [&](int m, int q) {
          const int k = 4 * group + (kReversed ? 3 - m : m);
          return point_of<T, C::P>(in_unit[0][q][k], in_unit[1][q][k], in_unit[2][q][k], in_unit[3][q][k],
                                   in_unit[4][q][k], q, left, right);
        };
        A states[4][C::P];
        const unsigned starts = marks.pass(kReversed ? width - 4 - at : at, h);
        scan_lines<C, 4>(h, read, left, right, in, starts, states);
        if (!in) continue;
        Pack<A, 4>* const sums = &warp.sum(warp.place, at / 4);
#pragma unroll
        for (int q = 0; q < C::P; ++q) {
          A row[4];
#pragma unroll
          for (int m = 0; m < 4; ++m) row[kReversed ? 3 - m : m] = states[m][q];
          warp.add(sums[q * next_row], row, inputs.inputs[5][q].part(group), is_first);
        }
      }
    }
    __syncwarp();  // the stage is free for new copies; other lanes have the pixels in a vertical scan
    // One place for both copies: the code is longer than the instruction cache.
    const bool ends = number == last;
    const int next = ends ? after : d;
    if (next >= 0)
      copy_stage<C>(warp, next, ends ? stage_of<C>(p, make_scan(p, next).reversed, 0) : number + (kReversed ? -1 : 1));
    if (ends) break;
  }
}

// Eight blocks of a multiprocessor leave 255 registers per thread: without that bound ptxas spills to fit twelve.
template <class C>
__global__ void __launch_bounds__(32, 8)
    fused_forward(const __grid_constant__ Params p, const __grid_constant__ FusedLaunch l) {
  using T = typename C::T;
  const FusedWarp<C> warp(p, l, l.horizontal[0] >= 0);
  if (l.horizontal[0] >= 0)
    copy_stage<C>(warp, l.horizontal[0], stage_of<C>(p, make_scan(p, l.horizontal[0]).reversed, 0));
  int rows = 0;  // horizontal directions so far
#pragma unroll 1
  for (int k = 0; k < p.D; ++k) {
    const int d = l.order[k];
    const Scan scan = make_scan(p, d);
    if (!scan.horizontal) {
      scan_columns<C>(warp, d, k == 0);
    } else {
      ++rows;
      const int after = rows < kMaxDirections ? l.horizontal[rows] : -1;
      if (scan.reversed)
        scan_rows<C, true>(warp, d, after, k == 0);
      else
        scan_rows<C, false>(warp, d, after, k == 0);
    }
  }
  if (!warp.active || warp.place >= int(p.W)) return;
  T* const y = static_cast<T*>(p.y.data) + warp.plane(p.y, warp.channel, 0) + warp.place;
#pragma unroll 4
  for (int row = 0; row < int(p.H); ++row)
    store_vector(reinterpret_cast<Pack<T, 4>*>(y + row * int(p.W)),
                 narrowed<T>(load_shared(&warp.sum(row, warp.place / 4))));
}

}  // namespace gspn::cuda
