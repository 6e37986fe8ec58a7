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

// The gradients of a line's inputs, the gradient g of its states, and its weights. v is the part of g that comes from
// the next line; lower and upper are the states before the line beside the lane's positions. has_left(q) and
// has_right(q) tell whether there are positions beside position q.
template <class C, bool kStochastic, class HasLeft, class HasRight>
__device__ __forceinline__ void adjoint_gradients(const AdjointLine<C>& line, const typename C::A (&v)[C::P],
                                                  typename C::A lower, typename C::A upper, const HasLeft& left,
                                                  const HasRight& right, bool starts_chunk, LineGradients<C>& out,
                                                  typename C::A (&g)[C::P], LineOf<C>& weights) {
  using A = typename C::A;
  using T = typename C::T;
  constexpr int P = C::P;
#pragma unroll
  for (int q = 0; q < P; ++q) {
    A &a = weights.a[q], &b = weights.b[q], &c = weights.c[q];
    g[q] = line.u[q] * line.dy[q] + v[q];
    out.dx[q] = line.lam[q] * g[q];
    out.dlam[q] = g[q] * line.x[q];
    out.du[q] = line.dy[q] * line.after[q];
    const auto has_left = left(q);
    const auto has_right = right(q);
    const A own = line.before[q], below = q > 0 ? line.before[q > 0 ? q - 1 : 0] : lower;
    const A above = q < P - 1 ? line.before[q < P - 1 ? q + 1 : 0] : upper;
    const A la = line.weights[0][q], lb = line.weights[1][q], lc = line.weights[2][q];
    prepare_weights<T, kStochastic>(la, lb, lc, has_left, has_right, a, b, c);
    A dw[3] = {};
    if (!starts_chunk && kStochastic) {  // on the first line of a chunk zero, whatever the weights
      b = (A(1) - a) - c;
      const A to_left = existing(has_left, g[q] * (below - own)), to_right = existing(has_right, g[q] * (above - own));
      if (C::kSumsWeights) {
        dw[0] = to_left, dw[2] = to_right;
      } else {
        const A t = a * to_left + c * to_right;
        dw[0] = existing(has_left, a * slope<T>(la) * (to_left - t));
        dw[1] = -(b * slope<T>(lb) * t);
        dw[2] = existing(has_right, c * slope<T>(lc) * (to_right - t));
      }
    } else if (!starts_chunk) {
      dw[0] = existing(has_left, g[q] * below), dw[1] = g[q] * own, dw[2] = existing(has_right, g[q] * above);
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) out.dweights[k][q] = dw[k];
  }
}

// v of the line before; from_left and from_right come from the positions beside the lane's.
template <class C>
__device__ __forceinline__ void step_back(typename C::A (&v)[C::P], const LineOf<C>& weights,
                                          const typename C::A (&g)[C::P], typename C::A from_left,
                                          typename C::A from_right) {
  constexpr int P = C::P;
#pragma unroll
  for (int q = 0; q < P; ++q)
    v[q] = weights.b[q] * g[q] +
           (q < P - 1 ? weights.a[q < P - 1 ? q + 1 : 0] * g[q < P - 1 ? q + 1 : 0] : from_right) +
           (q > 0 ? weights.c[q > 0 ? q - 1 : 0] * g[q > 0 ? q - 1 : 0] : from_left);
}

// v is the gradient that comes from the next line, and then the one that goes to the line before.
template <class C, bool kStochastic>
__device__ __forceinline__ void adjoint_line(const AdjointLine<C>& line, typename C::A (&v)[C::P], unsigned left,
                                             unsigned right, bool starts_chunk, LineGradients<C>& out) {
  using A = typename C::A;
  constexpr int P = C::P;
  A g[P];
  LineOf<C> weights;
  const A lower = existing(left, from_lower_lane<C::kLanes>(line.before[P - 1]));
  const A upper = existing(right, from_upper_lane<C::kLanes>(line.before[0]));
  adjoint_gradients<C, kStochastic>(
      line, v, lower, upper, [&](int q) { return q > 0 ? ~0u : left; },
      [&](int q) { return q < P - 1 ? ~0u : right; }, starts_chunk, out, g, weights);
  const A from_left = existing(left, from_lower_lane<C::kLanes>(weights.c[P - 1] * g[P - 1]));
  const A from_right = existing(right, from_upper_lane<C::kLanes>(weights.a[0] * g[0]));
  step_back<C>(v, weights, g, from_left, from_right);
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
