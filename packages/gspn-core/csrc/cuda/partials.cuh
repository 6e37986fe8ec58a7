// Backward: sums over the channels that share weights or gates, where several warps contribute to them. Each warp
// writes its part; kernels that follow add the parts up, in their order, and make the gradients of logits from the
// sums.
#pragma once

#include "forward.cuh"

namespace gspn::cuda {

// Sums of one launch to which several warps contribute, reduced by separate kernels: (parts, N, G, planes, H, W) for
// weights, (N, C, H, W) for each gate, in the accumulation type.
struct Partials {
  int64_t parts;            // channel blocks of a group
  int64_t weights, lam, u;  // elements; 0 if the gradient is stored directly
};

template <class C>
GSPN_HOST_DEVICE inline Partials partials_of(const Params& p) {
  const int64_t plane = p.H * p.W, group = p.C / p.weights.channels;
  const int64_t parts = C::CW > 1 ? (group + C::CW - 1) / C::CW : group;
  const bool whole = C::CW > 1 ? parts == 1 : group == 1;  // one block sums a group
  Partials s;
  s.parts = parts;
  s.weights =
      p.dweights.data == nullptr || whole ? 0 : parts * p.N * p.weights.channels * (p.stochastic ? 2 : 3) * plane;
  s.lam = p.dlam.data == nullptr || p.lam.channels == p.C ? 0 : p.N * p.C * plane;
  s.u = p.du.data == nullptr || p.u.channels == p.C ? 0 : p.N * p.C * plane;
  return s;
}

// The gradients of a pixel's logits from p and q: t = a p + c q; da = a (1 - sigma_a)(p - t), db = -b (1 - sigma_b) t,
// dc = c (1 - sigma_c)(q - t).
template <class T, class A>
__device__ __forceinline__ void logit_gradients(A la, A lb, A lc, bool has_left, bool has_right, A p, A q,
                                                A (&out)[3]) {
  A a, c;
  normalise<T>(la, lb, lc, has_left, has_right, a, c);
  const A t = a * p + c * q;
  out[0] = has_left ? a * slope<T>(la) * (p - t) : A(0);
  out[1] = -((A(1) - a) - c) * slope<T>(lb) * t;
  out[2] = has_right ? c * slope<T>(lc) * (q - t) : A(0);
}

constexpr int kFinishThreads = 256;

// Sums over the parts of a group, in their order, and the gradients of its weights.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_weights(const __grid_constant__ Params p, int d, int64_t parts, const Accumulator<T>* partials) {
  using A = Accumulator<T>;
  const int64_t plane = p.H * p.W, groups = p.weights.channels, e = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (e >= p.N * groups * plane) return;
  const int64_t pixel = e % plane, g = e / plane % groups, n = e / (plane * groups);
  const int row = int(pixel / p.W), col = int(pixel % p.W), planes = p.stochastic ? 2 : 3;
  A sums[3] = {};
  for (int64_t part = 0; part < parts; ++part)
    for (int k = 0; k < planes; ++k)
      sums[k] += partials[(((part * p.N + n) * groups + g) * planes + k) * plane + pixel];
  const int64_t at = n * p.weights.n + d * p.weights.d + g * p.weights.c + row * p.weights.row + col * p.weights.col;
  A out[3] = {sums[0], sums[1], sums[2]};
  const Scan scan = make_scan(p, d);
  const int j = scan.horizontal ? row : col, line = scan.horizontal ? col : row;
  if (p.stochastic && !starts_chunk(p, scan.reversed ? int(scan.lines) - 1 - line : line)) {
    const T* const logits = static_cast<const T*>(p.weights.data) + at;
    logit_gradients<T>(widen(logits[0]), widen(logits[p.weights.k]), widen(logits[2 * p.weights.k]), j > 0,
                       j + 1 < int(scan.length), sums[0], sums[1], out);
  }
  const Field& f = p.dweights;
  T* const gradient = static_cast<T*>(f.data) + (n * f.n + d * f.d + g * f.c + row * f.row + col * f.col);
  for (int k = 0; k < 3; ++k) narrow(out[k], gradient[k * f.k]);
}

// Sums over the channels that share a gate, in their order.
template <class T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_gate(const __grid_constant__ Params p, const __grid_constant__ Field gradient, int d,
                const Accumulator<T>* partials) {
  using A = Accumulator<T>;
  const int64_t plane = p.H * p.W, e = int64_t(blockIdx.x) * kFinishThreads + threadIdx.x;
  if (e >= p.N * gradient.channels * plane) return;
  const int64_t pixel = e % plane, c = e / plane % gradient.channels, n = e / (plane * gradient.channels);
  const int64_t sharing = p.C / gradient.channels;
  A sum = 0;
  for (int64_t k = 0; k < sharing; ++k) sum += partials[(n * p.C + c * sharing + k) * plane + pixel];
  const int64_t row = pixel / p.W, col = pixel % p.W;
  narrow(
      sum,
      static_cast<T*>(
          gradient.data)[n * gradient.n + d * gradient.d + c * gradient.c + row * gradient.row + col * gradient.col]);
}

}  // namespace gspn::cuda
