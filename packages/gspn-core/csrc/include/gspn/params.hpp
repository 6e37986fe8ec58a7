// The parameters of a call: sizes, strided fields, options. Independent of torch and Python.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GSPN_HOST_DEVICE __host__ __device__
#else
#define GSPN_HOST_DEVICE
#endif

namespace gspn {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Numbered as in gspn_core.DIRECTIONS.
enum class Direction { kLeftToRight, kRightToLeft, kTopToBottom, kBottomToTop };

// A strided tensor of image planes. Strides are in elements, not bytes; missing dimensions have stride 0.
struct Field {
  void* data = nullptr;
  int64_t channels = 0;  // x: C, weights: G, lam and u: C'; 0 when the field is absent
  int64_t n = 0, d = 0, c = 0, k = 0, row = 0, col = 0;

  explicit operator bool() const { return data != nullptr; }
};

constexpr int kMaxDirections = 4;

struct Params {
  Dtype dtype = Dtype::kFloat32;
  bool stochastic = false;  // weights are logits, normalised by the kernel (propagate); else used unchanged (line_scan)
  int64_t N = 0, C = 0, H = 0, W = 0;
  int D = 0;
  Direction directions[kMaxDirections] = {};
  int64_t chunk = 0;     // lines per independent chunk; 0: the whole image
  int64_t interval = 0;  // lines between two checkpoints of the state, and lines per tile
  int threads = 1;
  int64_t second_level_bytes = 512 * 1024;  // the cache of a core that its tasks may fill; no result depends on it

  Field x, weights, lam, u;     // inputs; lam and u may be absent
  Field y;                      // forward: output
  void* checkpoints = nullptr;  // (N, C, checkpoint_size) in the accumulation type; null: neither written nor read

  Field dy;                      // backward: input
  Field dx, dweights, dlam, du;  // backward: outputs; an absent one is not computed
};

// Weights and gates that are not in memory: for direction d, row g and channel c, projection[d, g, c] . r + bias[d, g,
// c] at every pixel; rows 0 to 2 are the logits, 3 is lam, 4 is u.
struct LowRank {
  int64_t R = 0;
  Field r;                       // (N, R, H, W)
  Field projection, bias;        // (D, 5, C, R), R being the columns, and (D, 5, C)
  Field dr, dprojection, dbias;  // backward: outputs; an absent one is not computed
};

// The functions below are static, so that the kernels of each instruction set have their own copy.

// A direction over an H x W plane: `lines` steps over lines of `length` positions.
struct Scan {
  bool horizontal, reversed;
  int64_t lines, length;
};

GSPN_HOST_DEVICE static inline Scan make_scan(const Params& p, int d) {
  const Direction direction = p.directions[d];
  const bool horizontal = direction == Direction::kLeftToRight || direction == Direction::kRightToLeft;
  const bool reversed = direction == Direction::kRightToLeft || direction == Direction::kBottomToTop;
  return {horizontal, reversed, horizontal ? p.W : p.H, horizontal ? p.H : p.W};
}

// Checkpoints are the states before lines interval, 2 * interval, ...; none is needed if each of these lines starts a
// chunk, before which the state is zero.
GSPN_HOST_DEVICE static inline int64_t checkpoint_lines(const Params& p, const Scan& scan) {
  if (scan.lines == 0 || (p.chunk > 0 && p.interval % p.chunk == 0)) return 0;
  return (scan.lines - 1) / p.interval;
}

// Elements before direction d in one (n, c) row of the checkpoints; d = D gives the whole row.
GSPN_HOST_DEVICE static inline int64_t checkpoint_offset(const Params& p, int d) {
  int64_t offset = 0;
  for (int e = 0; e < d; ++e) {
    const Scan scan = make_scan(p, e);
    offset += checkpoint_lines(p, scan) * scan.length;
  }
  return offset;
}

}  // namespace gspn
