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
// dlam, du, p and q are summed over the channels that share a gate or weights; p and q give the gradients of logits.
//
// Runs through the intervals of lines from the last to the first. The states of an interval are recomputed from the
// checkpoint before it, into shared memory; then the adjoint scan runs backwards. The scan computes g alone. All
// gradients are computed from g, the states and the inputs element by element afterwards, in the order of memory.
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

template <class C, bool kHorizontal>
__global__ void __launch_bounds__(32 * kBackwardWarps)
    strip_backward(const __grid_constant__ Params p, const __grid_constant__ StripLaunch l) {
  using T = typename C::T;
  using A = typename C::A;
  const Scan scan = make_scan(p, l.d);
  const Job<C> job(p, l, scan);
  const bool need_states = p.dweights.data != nullptr || p.du.data != nullptr;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) & 31;
  const int strip = warp / C::CW, cw = job.strips.channel_warp;
  const int interval = int(p.interval);
  const Channels<C>& channels = job.channels;

  A* memory = reinterpret_cast<A*>(shared_memory());
  const size_t weights_size = WeightTile<C>::size(p.stochastic),
               states_size = need_states ? (interval + 1) * C::kPitch : 0;
  const WeightTile<C> weights(memory + strip * weights_size, p.stochastic);
  A* const tiles = memory + l.per_block * weights_size;  // s, then g, of every warp
  A* const all_states = tiles + l.per_block * C::CW * (C::K * C::kPitch);
  A* const halos = all_states + l.per_block * C::CW * states_size;
  const auto tile_of = [&](int channel_warp) { return tiles + (strip * C::CW + channel_warp) * (C::K * C::kPitch); };
  // Row 0 is the state before the interval, row r + 1 the state after its line r.
  const auto states_of = [&](int channel_warp) { return all_states + (strip * C::CW + channel_warp) * states_size; };
  A* const tile = tile_of(cw);
  A* const states = states_of(cw);

  WeightLoader<C> weight_loader(p, channels, scan, job.n, l.d);
  GatedLoader<C> input(channels.template planes<const T>(p, p.x, scan, job.n, 0),
                       channels.template planes<const T>(p, p.lam, scan, job.n, l.d));
  GatedLoader<C> source(channels.template planes<const T>(p, p.dy, scan, job.n, 0),
                        channels.template planes<const T>(p, p.u, scan, job.n, l.d));
  const Checkpoints<C> checkpoints(p, channels, scan, job.n, l.d);
  const Partials sizes = partials_of<C>(p);
  A* const weight_partials = static_cast<A*>(l.partials);
  A* const lam_partials = weight_partials + sizes.weights;
  const GateGradient<C> dlam(p, p.lam, p.dlam, lam_partials, channels, scan, job.n, l.d);
  const GateGradient<C> du(p, p.u, p.du, lam_partials + sizes.lam, channels, scan, job.n, l.d);

  Planes<C, T> dx;
  Planes<C, A> dx_sums;
  if (p.dx.data != nullptr) {
    dx = channels.template planes<T>(p, p.dx, scan, job.n, 0);
    Field f = p.dx;
    if (l.sums != nullptr) f = Field{l.sums, p.C, p.C * p.H * p.W, 0, p.H * p.W, 0, p.W, 1};
    dx_sums = channels.template planes<A>(p, f, scan, job.n, 0);
  }
  Planes<C, T> dweights[3];
  Planes<C, A> weight_sums[3];
  const int summed_planes = p.stochastic ? 2 : 3;
  if (p.dweights.data != nullptr) {
    const int64_t plane = p.H * p.W, groups = p.weights.channels;
    const int group = channels.first / int(p.C / groups);
    const int64_t part = C::CW > 1 ? job.block % sizes.parts : 0;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      if (sizes.weights == 0) {
        dweights[k] = channels.template planes<T>(p, p.dweights, scan, job.n, l.d, k);
      } else if (k < summed_planes) {
        const Field f{weight_partials, groups, groups * summed_planes * plane, 0, summed_planes * plane, plane, p.W, 1};
#pragma unroll
        for (int s = 0; s < C::SEG; ++s) {
          // If warps do not share weights, every channel of a group is a separate part.
          const int c = channels.of_segment(s);
          const int64_t in_group = C::CW > 1 ? part : c % int(p.C / groups);
          weight_sums[k].plane[s] =
              scan_plane<A>(f, scan, in_group * p.N + job.n, 0, C::CW > 1 ? group : c / int(p.C / groups), k);
        }
      }
    }
  }

  if (l.cluster > 1) cluster_barrier();  // no block stores to the memory of a neighbour that has not started
  A v[C::P] = {};
  int exchanges = 0;
  bool last_tile = true;  // of the chunk: no gradient flows into it
  for (int end = job.end; end > job.begin;) {
    int begin = (end - 1) / interval * interval;
    begin = begin > job.begin ? begin : job.begin;

    if (need_states) {
      A h[C::P] = {};
      Window w = window(job, scan, begin, end);
      if (begin > job.begin) checkpoints.restore(begin, w, h);
      put_row<C>(states, 0, h);
      for (; w.i0 < end; w = window(job, scan, w.i0 + C::K, end)) {
        weight_loader.load(w, kHorizontal, cw);
        input.load(w, kHorizontal);
        weight_loader.put(weights, w, kHorizontal, cw);
        input.put(tile, w, kHorizontal);
        share_barrier<C>();
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

    for (int i0 = begin + (end - 1 - begin) / C::K * C::K; i0 >= begin; i0 -= C::K) {
      const Window w = window(job, scan, i0, end);
      weight_loader.load(w, kHorizontal, cw);
      source.load(w, kHorizontal);
      weight_loader.put(weights, w, kHorizontal, cw);
      source.put(tile, w, kHorizontal);
      share_barrier<C>();
      if (i0 > job.begin) {  // prefetch the next tile while this one is computed
        const Window before = window(job, scan, i0 - C::K > job.begin ? i0 - C::K : job.begin, i0);
        prefetch_tile<C>(source.value, before, kHorizontal);
        if (source.gate) prefetch_tile<C>(source.gate, before, kHorizontal);
      }
      if (!last_tile && l.strips > 1) job.strips.exchange(halos, exchanges++ & 1, v, l.cluster);
      last_tile = false;
#pragma unroll 1
      for (int m = w.count - 1; m >= 0; --m) adjoint_step<C>(v, weights, tile, m);
      share_barrier<C>();

      if (job.active) {
        const int start = opaque(lane);
#pragma unroll
        for (int e = 0; e < C::kElements; ++e) {
          const Place at = place<C>(kHorizontal, e * 32 + start);
          if (!inside<C>(w, at) || !job.strips.owns(at.col) || !channels.owns(at.col)) continue;
          const int i = i0 + at.m, j = position_of<C>(w, at.col);
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
            du.store(widen(*source.value.at(at.col, i, j)) * states[(i - begin + 1) * C::kPitch + at.col], at.col, i,
                     j);
        }
      }
      if (p.dweights.data != nullptr) {
        const int start = opaque(cw * 32 + lane);
#pragma unroll
        for (int e = 0; e < C::kShare; ++e) {
          const Place at = place<C>(kHorizontal, e * C::CW * 32 + start);
          if (!inside<C>(w, at) || !job.strips.owns(at.col) || !channels.owns(at.col)) continue;
          const int i = i0 + at.m, j = position_of<C>(w, at.col);
          const bool has_left = j > 0, has_right = j + 1 < w.length;
          A sums[3] = {};
          for (int c = 0; c < job.warps && !starts_chunk(p, i); ++c) {
            const A g = tile_of(c)[at.m * C::kPitch + at.col];
            const A* const h = states_of(c) + (i - begin) * C::kPitch + at.col;
            const A own = h[0], left = has_left ? h[-1] : A(0), right = has_right ? h[1] : A(0);
            if (p.stochastic) {
              sums[0] += has_left ? g * (left - own) : A(0);
              sums[1] += has_right ? g * (right - own) : A(0);
            } else {
              sums[0] += g * left, sums[1] += g * own, sums[2] += g * right;
            }
          }
          if (sizes.weights > 0) {
#pragma unroll
            for (int k = 0; k < 3; ++k)
              if (k < summed_planes) *weight_sums[k].at(at.col, i, j) = sums[k];
          } else {
            A out[3] = {sums[0], sums[1], sums[2]};
            if (p.stochastic && !starts_chunk(p, i))  // on the first line zero, whatever the logits
              logit_gradients<T>(
                  widen(*weight_loader.planes[0].at(at.col, i, j)), widen(*weight_loader.planes[1].at(at.col, i, j)),
                  widen(*weight_loader.planes[2].at(at.col, i, j)), has_left, has_right, sums[0], sums[1], out);
#pragma unroll
            for (int k = 0; k < 3; ++k) narrow(out[k], *dweights[k].at(at.col, i, j));
          }
        }
      }
      share_barrier<C>();
    }
    end = begin;
  }
  if (l.cluster > 1) cluster_barrier();
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
