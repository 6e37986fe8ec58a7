// What gpu.py compares with: the scan as GSPN's paper (arXiv 2501.12381) describes its kernel, one launch per line
// and one thread per position and channel, with the state read from and written to global memory. Written from that
// description, for comparison only. rivals.py builds it and calls it through ctypes.
//
//   h[i, j] = a h[i-1, j-1] + b h[i-1, j] + c h[i-1, j+1] + lam x[i, j]
//
// Every tensor is contiguous in image coordinates: x, lam and h (P, H, W), weights (P, 3, H, W), where P counts batch
// times channels and every channel has weights and gates of its own.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void narrow(float v, float& out) { out = v; }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// Where line i and position j of a direction are in an image. Directions: (0 left_to_right, 1 right_to_left,
// 2 top_to_bottom, 3 bottom_to_top).
struct Geometry {
  int64_t planes, pixels, lines, length, line_stride, position_stride, origin;
};

Geometry make_geometry(int direction, int64_t planes, int64_t height, int64_t width) {
  const bool horizontal = direction < 2, reversed = direction % 2 == 1;
  const int64_t lines = horizontal ? width : height, length = horizontal ? height : width;
  const int64_t step = horizontal ? 1 : width;
  return {planes,
          height * width,
          lines,
          length,
          reversed ? -step : step,
          horizontal ? width : 1,
          reversed ? (lines - 1) * step : 0};
}

template <class T>
__global__ void forward_line(Geometry g, int64_t line, const T* x, const T* weights, const T* lam, T* h) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= g.planes * g.length) return;
  const int64_t plane = thread / g.length, j = thread % g.length;
  const int64_t pixel = g.origin + line * g.line_stride + j * g.position_stride, at = plane * g.pixels + pixel;
  float state = widen(lam[at]) * widen(x[at]);
  if (line > 0) {
    const T* w = weights + 3 * plane * g.pixels + pixel;
    const T* before = h + at - g.line_stride;
    if (j > 0) state += widen(w[0]) * widen(before[-g.position_stride]);
    state += widen(w[g.pixels]) * widen(before[0]);
    if (j + 1 < g.length) state += widen(w[2 * g.pixels]) * widen(before[g.position_stride]);
  }
  narrow(state, h[at]);
}

// gradient holds two lines of (P, length), by the parity of the line: the gradient of h, dh included.
template <class T>
__global__ void backward_line(Geometry g, int64_t line, const T* x, const T* weights, const T* lam, const T* h,
                              const T* dh, T* dx, T* dweights, T* dlam, float* gradient) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= g.planes * g.length) return;
  const int64_t plane = thread / g.length, j = thread % g.length;
  const int64_t pixel = g.origin + line * g.line_stride + j * g.position_stride, at = plane * g.pixels + pixel;
  const int64_t buffered = g.planes * g.length;
  float flow = widen(dh[at]);
  if (line + 1 < g.lines) {
    const T* w = weights + 3 * plane * g.pixels + pixel + g.line_stride;
    const float* after = gradient + (line + 1) % 2 * buffered + thread;
    flow += widen(w[g.pixels]) * after[0];
    if (j + 1 < g.length) flow += widen(w[g.position_stride]) * after[1];
    if (j > 0) flow += widen(w[2 * g.pixels - g.position_stride]) * after[-1];
  }
  gradient[line % 2 * buffered + thread] = flow;
  narrow(flow * widen(lam[at]), dx[at]);
  narrow(flow * widen(x[at]), dlam[at]);
  T* dw = dweights + 3 * plane * g.pixels + pixel;
  const T* before = h + at - g.line_stride;
  narrow(line > 0 && j > 0 ? flow * widen(before[-g.position_stride]) : 0.0f, dw[0]);
  narrow(line > 0 ? flow * widen(before[0]) : 0.0f, dw[g.pixels]);
  narrow(line > 0 && j + 1 < g.length ? flow * widen(before[g.position_stride]) : 0.0f, dw[2 * g.pixels]);
}

unsigned blocks(const Geometry& g) { return unsigned((g.planes * g.length + kThreads - 1) / kThreads); }

template <class T>
int forward(const Geometry& g, const void* x, const void* weights, const void* lam, void* h, cudaStream_t stream) {
  for (int64_t line = 0; line < g.lines; ++line)
    forward_line<T><<<blocks(g), kThreads, 0, stream>>>(g, line, static_cast<const T*>(x),
                                                        static_cast<const T*>(weights), static_cast<const T*>(lam),
                                                        static_cast<T*>(h));
  return cudaGetLastError();
}

template <class T>
int backward(const Geometry& g, const void* x, const void* weights, const void* lam, const void* h, const void* dh,
             void* dx, void* dweights, void* dlam, float* gradient, cudaStream_t stream) {
  for (int64_t line = g.lines - 1; line >= 0; --line)
    backward_line<T><<<blocks(g), kThreads, 0, stream>>>(
        g, line, static_cast<const T*>(x), static_cast<const T*>(weights), static_cast<const T*>(lam),
        static_cast<const T*>(h), static_cast<const T*>(dh), static_cast<T*>(dx), static_cast<T*>(dweights),
        static_cast<T*>(dlam), gradient);
  return cudaGetLastError();
}

}  // namespace

// Both return a cudaError_t. bfloat16 is 0 for float32 and 1 for bfloat16.
extern "C" int line_launch_forward(int bfloat16, int direction, int64_t planes, int64_t height, int64_t width,
                                   const void* x, const void* weights, const void* lam, void* h, cudaStream_t stream) {
  const Geometry g = make_geometry(direction, planes, height, width);
  return bfloat16 ? forward<__nv_bfloat16>(g, x, weights, lam, h, stream)
                  : forward<float>(g, x, weights, lam, h, stream);
}

// gradient is scratch of 2 * planes * (positions of a line) floats.
extern "C" int line_launch_backward(int bfloat16, int direction, int64_t planes, int64_t height, int64_t width,
                                    const void* x, const void* weights, const void* lam, const void* h, const void* dh,
                                    void* dx, void* dweights, void* dlam, float* gradient, cudaStream_t stream) {
  const Geometry g = make_geometry(direction, planes, height, width);
  return bfloat16 ? backward<__nv_bfloat16>(g, x, weights, lam, h, dh, dx, dweights, dlam, gradient, stream)
                  : backward<float>(g, x, weights, lam, h, dh, dx, dweights, dlam, gradient, stream);
}
