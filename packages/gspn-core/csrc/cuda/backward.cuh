// Backward, one direction per launch. In scan order, g is the gradient of the state, and v the part of it that
// comes from the next line, 0 across the border of a chunk:
//
// clang-format off
//   g_i[j]     = u_i[j] dy_i[j] + v_i[j]
//   v_{i-1}[j] = b_i[j] g_i[j] + a_i[j+1] g_i[j+1] + c_i[j-1] g_i[j-1]
//   dx += lam g      dlam = g x      du = dy h
//   p = g (h_{i-1}[j-1] - h_{i-1}[j])      q = g (h_{i-1}[j+1] - h_{i-1}[j])
// clang-format on
//
// dlam, du, p and q are summed over the channels that share a gate or weights, see partials.cuh; p and q give the
// gradients of logits.
//
// Runs through the intervals of lines from the last to the first. The states of an interval are recomputed from the
// checkpoint before it, into shared memory; then the adjoint scan runs backwards. The scan computes g alone. All
// gradients are computed from g, the states and the inputs element by element afterwards, in the order of memory.
#pragma once

#include "partials.cuh"

namespace gspn::cuda {

// Destination of one gate's gradient: the tensor, or per channel, to be summed over the channels that share the gate.
template <class C>
struct GateGradient {
  using T = typename C::T;
  using A = typename C::A;
  Planes<C, T> direct;
  Planes<C, A> partial;

  __device__ __forceinline__ GateGradient(const Params& p, const Field& gate, const Field& gradient, A* partials,
                                          const Channels<C>& channels, const Scan& scan, int64_t n, int d) {
    if (gradient.data == nullptr) return;
    if (gate.channels == p.C) {
      direct = channels.template planes<T>(p, gradient, scan, n, d);
    } else {
      const Field f{partials, p.C, p.C * p.H * p.W, 0, p.H * p.W, 0, p.W, 1};
      partial = channels.template planes<A>(p, f, scan, n, 0);
    }
  }
  __device__ __forceinline__ explicit operator bool() const { return bool(direct) || bool(partial); }
  __device__ __forceinline__ void store(A value, int col, int i, int j) const {
    if (direct)
      narrow(value, *direct.at(col, i, j));
    else
      *partial.at(col, i, j) = value;
  }
};

template <class C>
size_t strip_backward_bytes(const Params& p, int per_block, bool halos) {
  const size_t states = p.dweights.data != nullptr || p.du.data != nullptr ? size_t(p.interval + 1) * C::kPitch : 0;
  const size_t buffers = halos ? size_t(per_block) * C::CW * Strips<C>::kBuffer : 0;
  return sizeof(typename C::A) *
         (per_block * (WeightTile<C>::size(p.stochastic) + C::CW * (C::K * C::kPitch + states)) + buffers);
}

// One line of the adjoint scan: g = s + v overwrites s, then v of the previous line. Each chunk is a separate job, so
// nothing flows across its border.
template <class C>
__device__ __forceinline__ void adjoint_step(typename C::A (&v)[C::P], const WeightTile<C>& weights,
                                             typename C::A* tile, int m) {
  using A = typename C::A;
  constexpr int P = C::P;
  const Pack<A, P> a = row_of_lane<C>(weights.a, m), c = row_of_lane<C>(weights.c, m), s = row_of_lane<C>(tile, m);
  A g[P], b[P];
  if (weights.b == nullptr) {
#pragma unroll
    for (int q = 0; q < P; ++q) b[q] = (A(1) - a.v[q]) - c.v[q];
  } else {
    const Pack<A, P> middle = row_of_lane<C>(weights.b, m);
#pragma unroll
    for (int q = 0; q < P; ++q) b[q] = middle.v[q];
  }
#pragma unroll
  for (int q = 0; q < P; ++q) g[q] = s.v[q] + v[q];
  put_row<C>(tile, m, g);
  const A from_left = from_lower_lane<C::kLanes>(c.v[P - 1] * g[P - 1]);
  const A from_right = from_upper_lane<C::kLanes>(a.v[0] * g[0]);
#pragma unroll
  for (int q = 0; q < P; ++q) {
    const A left = q > 0 ? c.v[q > 0 ? q - 1 : 0] * g[q > 0 ? q - 1 : 0] : from_left;
    const A right = q < P - 1 ? a.v[q < P - 1 ? q + 1 : 0] * g[q < P - 1 ? q + 1 : 0] : from_right;
    v[q] = b[q] * g[q] + right + left;
  }
}

// Where the gradients of the weights go: the tensor, or, as sums p and q (a, b and c of weights that are not
// normalised), the warp's part of each group.
template <class C>
struct WeightGradients {
  using T = typename C::T;
  using A = typename C::A;
  Planes<C, T> direct[3];
  Planes<C, A> sums[3];
  bool summed;  // by finish_weights
  int planes;   // of the sums

  __device__ __forceinline__ WeightGradients(const Params& p, const Job<C>& job, const Scan& scan, int d, A* partials)
      : planes(p.stochastic ? 2 : 3) {
    const Partials sizes = partials_of<C>(p);
    summed = sizes.weights > 0;
    if (p.dweights.data == nullptr) return;
    const Channels<C>& channels = job.channels;
    const int64_t plane = p.H * p.W, groups = p.weights.channels;
    const int group = channels.first / int(p.C / groups);
    const int64_t part = C::CW > 1 ? job.block % sizes.parts : 0;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if (!summed) {
        direct[k] = channels.template planes<T>(p, p.dweights, scan, job.n, d, k);
      } else if (k < planes) {
        const Field f{partials, groups, groups * planes * plane, 0, planes * plane, plane, p.W, 1};
#pragma unroll
        for (int s = 0; s < C::SEG; ++s) {
          // If warps do not share weights, every channel of a group is a separate part.
          const int c = channels.of_segment(s);
          const int64_t in_group = C::CW > 1 ? part : c % int(p.C / groups);
          const int own = C::CW > 1 ? group : c / int(p.C / groups);
          sums[k].set(s, scan_plane<A>(f, scan, in_group * p.N + job.n, 0, own, k));
        }
      }
    }
  }
};

// A warp's part of the backward pass of a direction.
template <class C, bool kHorizontal>
struct StripBackward {
  using T = typename C::T;
  using A = typename C::A;
  const Params& p;
  const StripLaunch& l;
  const Scan scan;
  const Job<C> job;
  const int cw, strip, interval;
  const bool need_states;
  const size_t weights_size, states_size;
  A *const tiles, *const all_states, *const halos;
  const WeightTile<C> weights;
  WeightLoader<C> weight_loader;
  GatedLoader<C> input, source;
  const Checkpoints<C> checkpoints;
  A* const gate_partials;
  const GateGradient<C> dlam, du;
  const WeightGradients<C> dweights;
  Planes<C, T> dx;
  Planes<C, A> dx_sums;
  int exchanges = 0;

  __device__ __forceinline__ StripBackward(const Params& p, const StripLaunch& l)
      : p(p),
        l(l),
        scan(make_scan(p, l.d)),
        job(p, l, scan),
        cw(job.strips.channel_warp),
        strip(int(threadIdx.x) / 32 / C::CW),
        interval(int(p.interval)),
        need_states(p.dweights.data != nullptr || p.du.data != nullptr),
        weights_size(WeightTile<C>::size(p.stochastic)),
        states_size(need_states ? (interval + 1) * C::kPitch : 0),
        tiles(reinterpret_cast<A*>(shared_memory()) + l.per_block * weights_size),
        all_states(tiles + l.per_block * C::CW * (C::K * C::kPitch)),
        halos(all_states + l.per_block * C::CW * states_size),
        weights(reinterpret_cast<A*>(shared_memory()) + strip * weights_size, p.stochastic),
        weight_loader(p, job.channels, scan, job.n, l.d),
        input(job.channels.template planes<const T>(p, p.x, scan, job.n, 0),
              job.channels.template planes<const T>(p, p.lam, scan, job.n, l.d)),
        source(job.channels.template planes<const T>(p, p.dy, scan, job.n, 0),
               job.channels.template planes<const T>(p, p.u, scan, job.n, l.d)),
        checkpoints(p, job.channels, scan, job.n, l.d),
        gate_partials(static_cast<A*>(l.partials) + partials_of<C>(p).weights),
        dlam(p, p.lam, p.dlam, gate_partials, job.channels, scan, job.n, l.d),
        du(p, p.u, p.du, gate_partials + partials_of<C>(p).lam, job.channels, scan, job.n, l.d),
        dweights(p, job, scan, l.d, static_cast<A*>(l.partials)) {
    if (p.dx.data == nullptr) return;
    dx = job.channels.template planes<T>(p, p.dx, scan, job.n, 0);
    Field f = p.dx;
    if (l.sums != nullptr) f = Field{l.sums, p.C, p.C * p.H * p.W, 0, p.H * p.W, 0, p.W, 1};
    dx_sums = job.channels.template planes<A>(p, f, scan, job.n, 0);
  }

  // Of one of the warps that share the strip's weights: s, then g, of a tile.
  __device__ __forceinline__ A* tile_of(int warp) const { return tiles + (strip * C::CW + warp) * (C::K * C::kPitch); }
  // Row 0 is the state before the interval, row r + 1 the state after its line r.
  __device__ __forceinline__ A* states_of(int warp) const { return all_states + (strip * C::CW + warp) * states_size; }

  __device__ __forceinline__ void load(const Window& w, GatedLoader<C>& gated) {
    weight_loader.load(w, kHorizontal, cw);
    gated.load(w, kHorizontal);
    weight_loader.put(weights, w, kHorizontal, cw);
    gated.put(tile_of(cw), w, kHorizontal);
    share_barrier<C>();
  }

  // The states of the lines [begin, end).
  __device__ __forceinline__ void recompute(int begin, int end) {
    A* const tile = tile_of(cw);
    A* const states = states_of(cw);
    A h[C::P] = {};
    Window w = window(job, scan, begin, end);
    if (begin > job.begin) checkpoints.restore(begin, w, h);
    put_row<C>(states, 0, h);
    for (; w.i0 < end; w = window(job, scan, w.i0 + C::K, end)) {
      load(w, input);
      if (w.i0 > begin && l.strips > 1) {
        job.strips.exchange(halos, exchanges++ & 1, h, l.cluster);
        put_row<C>(states, w.i0 - begin, h);  // now correct at the edges of the strip too
      }
#pragma unroll 1
      for (int m = 0; m < w.count; ++m) {
        step<C>(h, weights, tile, m, starts_chunk(p, w.i0 + m));
        put_row<C>(states, w.i0 - begin + m + 1, h);
      }
      share_barrier<C>();
    }
  }

  // Gradients of the input and the gates, of a tile of the interval from `begin`.
  __device__ __forceinline__ void store_inputs(const Window& w, int begin) const {
    const A *const tile = tile_of(cw), *const states = states_of(cw);
    const int start = opaque(threadIdx.x & 31);
#pragma unroll
    for (int e = 0; e < C::kElements; ++e) {
      const Place at = place<C>(kHorizontal, e * 32 + start);
      if (!inside<C>(w, at) || !job.strips.owns(at.col) || !job.channels.owns(at.col)) continue;
      const int i = w.i0 + at.m, j = position_of<C>(w, at.col);
      const A g = tile[at.m * C::kPitch + at.col];
      if (dx) {
        A value = input.gate ? widen(*input.gate.at(at.col, i, j)) * g : g;
        if (!l.first) value += *dx_sums.at(at.col, i, j);
        if (l.last)
          narrow(value, *dx.at(at.col, i, j));
        else
          *dx_sums.at(at.col, i, j) = value;
      }
      if (dlam) dlam.store(g * widen(*input.value.at(at.col, i, j)), at.col, i, j);
      if (du)
        du.store(widen(*source.value.at(at.col, i, j)) * states[(i - begin + 1) * C::kPitch + at.col], at.col, i, j);
    }
  }

  // Sums of a position over the warps that share its weights: p and q, or of weights that are not normalised all three.
  __device__ __forceinline__ void sum_weights(int place, int state, bool has_left, bool has_right, A (&sums)[3]) const {
    for (int c = 0; c < job.warps; ++c) {
      const A g = tile_of(c)[place];
      const A* const h = states_of(c) + state;
      const A own = h[0], left = has_left ? h[-1] : A(0), right = has_right ? h[1] : A(0);
      if (p.stochastic) {
        sums[0] += has_left ? g * (left - own) : A(0);
        sums[1] += has_right ? g * (right - own) : A(0);
      } else {
        sums[0] += g * left, sums[1] += g * own, sums[2] += g * right;
      }
    }
  }

  // Gradients of the weights, of a tile of the interval from `begin`; the warps that share weights share the work.
  __device__ __forceinline__ void store_weights(const Window& w, int begin) const {
    const int start = opaque(cw * 32 + int(threadIdx.x & 31));
#pragma unroll
    for (int e = 0; e < C::kShare; ++e) {
      const Place at = place<C>(kHorizontal, e * C::CW * 32 + start);
      if (!inside<C>(w, at) || !job.strips.owns(at.col) || !job.channels.owns(at.col)) continue;
      const int i = w.i0 + at.m, j = position_of<C>(w, at.col);
      const bool has_left = j > 0, has_right = j + 1 < w.length, starts = starts_chunk(p, i);
      A sums[3] = {};
      if (!starts) sum_weights(at.m * C::kPitch + at.col, (i - begin) * C::kPitch + at.col, has_left, has_right, sums);
      if (dweights.summed) {
#pragma unroll
        for (int k = 0; k < 3; ++k)
          if (k < dweights.planes) *dweights.sums[k].at(at.col, i, j) = sums[k];
        continue;
      }
      A out[3] = {sums[0], sums[1], sums[2]};
      const auto logit = [&](int k) { return widen(*weight_loader.planes[k].at(at.col, i, j)); };
      if (p.stochastic && !starts)  // on the first line zero, whatever the logits
        logit_gradients<T>(logit(0), logit(1), logit(2), has_left, has_right, sums[0], sums[1], out);
#pragma unroll
      for (int k = 0; k < 3; ++k) narrow(out[k], *dweights.direct[k].at(at.col, i, j));
    }
  }
};

template <class C, bool kHorizontal>
__global__ void __launch_bounds__(32 * kBackwardWarps)
    strip_backward(const __grid_constant__ Params p, const __grid_constant__ StripLaunch l) {
  StripBackward<C, kHorizontal> part(p, l);
  const Job<C>& job = part.job;
  typename C::A* const tile = part.tile_of(part.cw);
  if (l.cluster > 1) cluster_barrier();  // no block stores to the memory of a neighbour that has not started
  typename C::A v[C::P] = {};
  bool last_tile = true;  // of the chunk: no gradient flows into it
  for (int end = job.end; end > job.begin;) {
    int begin = (end - 1) / part.interval * part.interval;
    begin = begin > job.begin ? begin : job.begin;
    if (part.need_states) part.recompute(begin, end);
    for (int i0 = begin + (end - 1 - begin) / C::K * C::K; i0 >= begin; i0 -= C::K) {
      const Window w = window(job, part.scan, i0, end);
      part.load(w, part.source);
      if (i0 > job.begin) {  // prefetch the next tile while this one is computed
        const Window before = window(job, part.scan, i0 - C::K > job.begin ? i0 - C::K : job.begin, i0);
        prefetch_tile<C>(part.source.value, before, kHorizontal);
        if (part.source.gate) prefetch_tile<C>(part.source.gate, before, kHorizontal);
      }
      if (!last_tile && l.strips > 1) job.strips.exchange(part.halos, part.exchanges++ & 1, v, l.cluster);
      last_tile = false;
#pragma unroll 1
      for (int m = w.count - 1; m >= 0; --m) adjoint_step<C>(v, part.weights, tile, m);
      share_barrier<C>();
      if (job.active) part.store_inputs(w, begin);
      if (p.dweights.data != nullptr) part.store_weights(w, begin);
      share_barrier<C>();
    }
    end = begin;
  }
  if (l.cluster > 1) cluster_barrier();
}

}  // namespace gspn::cuda
