// line_scan along the rows of large planes whose channels have weights of their own. A tile of whole columns is larger
// than the first-level cache, and would be written to the second level and read back. Here 32 columns are scanned in
// bands of 16 rows, which stay in the first-level cache. Each line (column) is one row behind the line before it, so
// that all of the previous line that a band needs, one row beyond either end, is in this band and the last one.
#pragma once

#include <utility>

#include "scan.hpp"

namespace {

// One channel of one image, in float32 or a type that accumulates in float32.
template <class S, bool kReversed>
class BandedScan {
 public:
  BandedScan(const Params& p, int64_t n, int64_t c)
      : p_(p), memory_(kRings * kRing + p.H + 2 * kMargin), state_(memory_.get() + kRings * kRing + kMargin) {
    fill_zero(memory_.get(), kRings * kRing + p.H + 2 * kMargin);
    for (int k = 0; k < kX; ++k) in_[k] = {plane(p.weights, n, c) + k * p.weights.k, p.weights.row};
    in_[kX] = {plane(p.x, n, c), p.x.row};
    out_ = {plane(p.y, n, c), p.y.row};
    if (p.checkpoints != nullptr)
      checkpoints_ = static_cast<float*>(p.checkpoints) + (n * p.C + c) * gspn::checkpoint_offset(p, 1);
  }

  void run() {
    for (int64_t begin = 0; begin < p_.W; begin += kLines) {
      const int64_t column = kReversed ? p_.W - kLines - begin : begin;
      for (auto& rows : last_) rows = Float8{};
      last_[0] = load8(state_ + 1 - kLanes);
      for (int64_t row = 0; row < p_.H + kLines; row += kRows) {
        for (int k = 0; k < kRings && row < p_.H; ++k) load(k, row, column);
        row < kLines || row + kRows >= p_.H ? update<true>(begin, row) : update<false>(begin, row);
        if (row >= kLines) store(row - kLines, column);
      }
    }
    end_of_stream();
  }

 private:
  static constexpr int64_t kLines = kBandLines, kRows = kBandRows;
  static constexpr int kVectors = kRows / kLanes;
  // A ring buffer per plane holds the transposed rows that a band reaches back to: row r of a line is at index
  // r % kPlaces. The first eight entries are repeated at the end, so that any eight consecutive rows are contiguous.
  enum { kA, kB, kC, kX, kRings };  // the state overwrites x
  static constexpr int64_t kPlaces = kLines + kRows, kPitch = kPlaces + kLanes, kRing = kLines * kPitch;
  // In a ring, the offset of the leftmost column, and the distance from a column to the one on its right.
  static constexpr int64_t kLeft = kReversed ? (kLines - 1) * kPitch : 0, kColumn = kReversed ? -kPitch : kPitch;
  static constexpr int64_t kMargin = 64;  // zero rows before and after those of the state

  template <class T>
  struct Rows {
    T* data;
    int64_t stride;
  };

  static S* plane(const Field& f, int64_t n, int64_t c) { return static_cast<S*>(f.data) + n * f.n + c * f.c; }
  float* ring(int k) const { return memory_.get() + k * kRing; }

  // Loads a band's rows of a plane, and prefetches the rows of the band after the next, or, after the last row, of the
  // next columns. Prefetches are spread over the blocks, so that the loads of blocks do not queue behind them.
  void load(int k, int64_t row, int64_t column) const {
    const int64_t stride = in_[k].stride;
    const S* const from = in_[k].data + row * stride + column;
    const S* prefetched =
        from + (row + kBandRowsAhead < p_.H ? kBandRowsAhead * stride
                                            : (kBandRowsAhead - p_.H) * stride + (kReversed ? -kLines : kLines));
    float* const to = ring(k) + kLeft + row % kPlaces;
    for (int64_t r = 0; r < kRows; r += kLanes) {
      for (int64_t t = 0; t < kLines; t += kLanes) {
        for (int64_t i = 0; i < kLanes * kLanes / kLines; ++i, prefetched += stride)
          for (int64_t u = 0; u < kLines; u += kCacheLine / int64_t(sizeof(S)))
            __builtin_prefetch(prefetched + u, 0, 2);
        load_block(from + r * stride + t, stride, to + t * kColumn + r);
      }
    }
    if (row % kPlaces == 0)
      for (float* line = ring(k); line < ring(k) + kRing; line += kPitch) store8(line + kPlaces, load8(line));
  }

  // Transposes eight rows of eight columns. The fifth row has its own base address: with a single one GCC computes
  // seven addresses, and spills vectors to have registers for them.
  static void load_block(const S* from, int64_t stride, float* to) {
    const S* const fifth = from + 4 * stride;
    Float8 block[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) block[r] = load8(r < 4 ? from + r * stride : fifth + (r - 4) * stride);
    transpose8(block);
    for (int64_t t = 0; t < kLanes; ++t) store8(to + t * kColumn, block[t]);
  }

  // Scans the band whose first line begins at `row`. kEdge: the band reaches beyond the plane, where the state is zero.
  template <bool kEdge>
  void update(int64_t begin, int64_t row) {
    const int64_t last_row = p_.H - 1, turn = row % kPlaces;
    const Float8 lane = {0, 1, 2, 3, 4, 5, 6, 7}, zero{};
    float* const state = state_ + row;
    Float8 before[kVectors + 1];  // the previous line: the last eight rows of the last band, and the rows of this one
    for (int v = 0; v < kVectors; ++v) before[v + 1] = load8(state + 1 + v * kLanes);
    float* line[kRings];
    for (int k = 0; k < kRings; ++k) line[k] = ring(k);
    for (int64_t t = 0; t < kLines; ++t) {
      before[0] = std::exchange(last_[t], before[kVectors]);
      Float8 next[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        const int64_t first = row - t + v * kLanes, behind = turn - t + v * kLanes;
        const int64_t place = behind < 0 ? behind + kPlaces : behind;
        Float8 a = load8(line[kA] + place), b = load8(line[kB] + place), c = load8(line[kC] + place);
        if (kEdge) {
          a = lane == float(-first) ? zero : a;
          c = lane == float(last_row - first) ? zero : c;
        }
        const Float8 left = __builtin_shufflevector(before[v], before[v + 1], 6, 7, 8, 9, 10, 11, 12, 13);
        const Float8 here = left_of(before[v], before[v + 1]), x = load8(line[kX] + place);
        next[v] = begin + t == 0 ? x : updated<false, true>(a, b, c, left, here, before[v + 1], x, zero);
        if (kEdge) next[v] = (lane >= float(-first)) & (lane <= float(last_row - first)) ? next[v] : zero;
        // A vector that crosses the end of the ring is stored at both ends. At the start that overwrites the repeated
        // entries of the previous line, which has been scanned.
        store8(line[kX] + place, next[v]);
        if (place > kPlaces - kLanes) store8(line[kX] + place - kPlaces, next[v]);
      }
      if (checkpoints_ != nullptr) keep(begin + t, next, row - t);
      for (int v = 0; v < kVectors; ++v) before[v + 1] = next[v];
      for (auto& at : line) at += kPitch;
    }
    for (int v = 0; v < kVectors; ++v) store8(state + v * kLanes - (kLines - 1), before[v + 1]);
  }

  // Saves a band's rows of the state after line i if that is a checkpoint.
  void keep(int64_t i, const Float8 (&h)[kVectors], int64_t first) const {
    if ((i + 1) % p_.interval != 0 || i + 1 == p_.W) return;
    float* const kept = checkpoints_ + i / p_.interval * p_.H;
    for (int64_t j = max64(0, -first); j < min64(kRows, p_.H - first); ++j) kept[first + j] = h[j / kLanes][j % kLanes];
  }

  // Stores rows that all lines have completed.
  void store(int64_t row, int64_t column) const {
    const float* const from = ring(kX) + kLeft + row % kPlaces;
    S* const to = out_.data + row * out_.stride + column;
    for (int64_t r = 0; r < kRows; r += kLanes)
      for (int64_t t = 0; t < kLines; t += 2 * kLanes)
        store_blocks<Write::kStream, 2>(from + t * kColumn + r, kColumn, to + r * out_.stride + t, out_.stride);
  }

  const Params& p_;
  Scratch<float> memory_;
  float* const state_;  // of the previous line, by rows
  Rows<const S> in_[kRings];
  Rows<S> out_;
  float* checkpoints_ = nullptr;
  Float8 last_[kLines];  // for each line, the last eight rows of its previous line in the last band
};

template <class S>
void forward_bands(const Params& p) {
  const bool reversed = gspn::make_scan(p, 0).reversed;
  run_tasks(p.N * p.C, p.threads, [&](int64_t task) {
    const int64_t n = task / p.C, c = task % p.C;
    reversed ? BandedScan<S, true>(p, n, c).run() : BandedScan<S, false>(p, n, c).run();
  });
}

}  // namespace
