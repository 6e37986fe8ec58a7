// Backward of scans over dense aligned rows, where every channel has weights and gates of its own: what scans along
// columns and along rows have in common. backward.cuh has the equations. A warp recomputes the states of an interval of
// lines from the checkpoint before it, then runs back through it. States and weights stay with the lane that owns the
// positions, in shared memory, so that the weights are read from global memory once.
#pragma once

#include "backward.cuh"
#include "columns.cuh"

namespace gspn::cuda {

// Whether every channel has weights and gates of its own, so that no gradient is a sum over channels, and a gradient is
// wanted that takes the states. Without one there need not be checkpoints.
inline bool owns_all(const Params& p) {
  return (p.dweights.data != nullptr || p.du.data != nullptr) && p.weights.channels == p.C &&
         (p.lam.data == nullptr || p.lam.channels == p.C) && (p.u.data == nullptr || p.u.channels == p.C);
}

template <class T, int P>
bool gradients_of_vectors(const Params& p) {
  bool fit = true;
  for (const Field* f : {&p.x, &p.weights, &p.lam, &p.u, &p.dy, &p.dx, &p.dweights, &p.dlam, &p.du})
    fit = fit && rows_of_vectors<T, P>(*f);
  return fit;
}

// What the adjoint of a line takes at the positions of a lane. The gates are 1 where there are none.
template <class C>
struct AdjointLine {
  using A = typename C::A;
  A weights[3][C::P], x[C::P], lam[C::P], u[C::P], dy[C::P];
  A before[C::P], after[C::P];  // the states
};

// And what it gives.
template <class C>
struct LineGradients {
  using A = typename C::A;
  A dx[C::P], dweights[3][C::P], dlam[C::P], du[C::P];
};

// v is the gradient that comes from the next line, and then the one that goes to the line before.
template <class C, bool kStochastic>
__device__ __forceinline__ void adjoint_line(const AdjointLine<C>& line, typename C::A (&v)[C::P], unsigned left,
                                             unsigned right, bool starts_chunk, LineGradients<C>& out) {
  using A = typename C::A;
  using T = typename C::T;
  constexpr int P = C::P;
  A g[P], a[P], b[P], c[P];
  const A lower = existing(left, from_lower_lane<C::kLanes>(line.before[P - 1]));
  const A upper = existing(right, from_upper_lane<C::kLanes>(line.before[0]));
#pragma unroll
  for (int q = 0; q < P; ++q) {
    g[q] = line.u[q] * line.dy[q] + v[q];
    out.dx[q] = line.lam[q] * g[q];
    out.dlam[q] = g[q] * line.x[q];
    out.du[q] = line.dy[q] * line.after[q];
    const unsigned has_left = q > 0 ? ~0u : left, has_right = q < P - 1 ? ~0u : right;
    const A own = line.before[q], below = q > 0 ? line.before[q > 0 ? q - 1 : 0] : lower;
    const A above = q < P - 1 ? line.before[q < P - 1 ? q + 1 : 0] : upper;
    const A la = line.weights[0][q], lb = line.weights[1][q], lc = line.weights[2][q];
    prepare_weights<T, kStochastic>(la, lb, lc, has_left, has_right, a[q], b[q], c[q]);
    A dw[3] = {};
    if (!starts_chunk && kStochastic) {  // on the first line of a chunk zero, whatever the weights
      b[q] = (A(1) - a[q]) - c[q];
      const A to_left = existing(has_left, g[q] * (below - own)), to_right = existing(has_right, g[q] * (above - own));
      const A t = a[q] * to_left + c[q] * to_right;
      dw[0] = existing(has_left, a[q] * slope<T>(la) * (to_left - t));
      dw[1] = -(b[q] * slope<T>(lb) * t);
      dw[2] = existing(has_right, c[q] * slope<T>(lc) * (to_right - t));
    } else if (!starts_chunk) {
      dw[0] = existing(has_left, g[q] * below), dw[1] = g[q] * own, dw[2] = existing(has_right, g[q] * above);
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) out.dweights[k][q] = dw[k];
  }
  const A from_left = existing(left, from_lower_lane<C::kLanes>(c[P - 1] * g[P - 1]));
  const A from_right = existing(right, from_upper_lane<C::kLanes>(a[0] * g[0]));
#pragma unroll
  for (int q = 0; q < P; ++q)
    v[q] = b[q] * g[q] + (q < P - 1 ? a[q < P - 1 ? q + 1 : 0] * g[q < P - 1 ? q + 1 : 0] : from_right) +
           (q > 0 ? c[q > 0 ? q - 1 : 0] * g[q > 0 ? q - 1 : 0] : from_left);
}

// One line of the recomputation.
template <class C, bool kStochastic>
__device__ __forceinline__ void recompute_line(typename C::A (&h)[C::P], const typename C::A (&weights)[3][C::P],
                                               const typename C::A (&x)[C::P], const typename C::A (&lam)[C::P],
                                               unsigned left, unsigned right, bool starts_chunk) {
  using T = typename C::T;
  LineOf<C> line;
#pragma unroll
  for (int q = 0; q < C::P; ++q) {
    line.f[q] = lam[q] * x[q];
    prepare_weights<T, kStochastic>(weights[0][q], weights[1][q], weights[2][q], q > 0 ? ~0u : left,
                                    q < C::P - 1 ? ~0u : right, line.a[q], line.b[q], line.c[q]);
  }
  advance<C>(h, line, kStochastic, starts_chunk, left, right);
}

}  // namespace gspn::cuda
