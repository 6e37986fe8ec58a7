// What the kernels need beyond plain C++: 16-bit floating point, fast functions, clusters, launches. Under nvcc these
// are CUDA's; otherwise the emulation in tests/emulation provides them, and runs the same kernels on the host.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#include "plan.hpp"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#else
#include <cmath>
#include <cstring>

#include "emulator.hpp"
using cudaStream_t = void*;
#endif

namespace gspn::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
// Two elements of 16 bits in a word.
template <class T>
struct Halves {
  uint32_t bits;
};

// The state and all sums are kept in float32, and in float64 for float64.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ void narrow(float v, float& out) { out = v; }
__device__ __forceinline__ void narrow(double v, double& out) { out = v; }

#ifdef __CUDACC__
__device__ __forceinline__ float widen(BFloat16 v) { return __bfloat162float(__ushort_as_bfloat16(v.bits)); }
__device__ __forceinline__ float widen(Float16 v) { return __half2float(__ushort_as_half(v.bits)); }
__device__ __forceinline__ float widen(Halves<BFloat16> v, int element) {
  return __uint_as_float(element == 0 ? v.bits << 16 : v.bits & 0xffff0000u);
}
__device__ __forceinline__ float widen(Halves<Float16> v, int element) {
  __half2 pair;
  memcpy(&pair, &v, sizeof(pair));
  return element == 0 ? __low2float(pair) : __high2float(pair);
}
__device__ __forceinline__ void narrow(float v, BFloat16& out) {
  out.bits = __bfloat16_as_ushort(__float2bfloat16_rn(v));
}
__device__ __forceinline__ void narrow(float v, Float16& out) { out.bits = __half_as_ushort(__float2half_rn(v)); }
__device__ __forceinline__ void narrow(float first, float second, Halves<BFloat16>& out) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  memcpy(&out, &pair, sizeof(out));
}
__device__ __forceinline__ void narrow(float first, float second, Halves<Float16>& out) {
  const __half2 pair = __floats2half2_rn(first, second);
  memcpy(&out, &pair, sizeof(out));
}

// The instructions that round denormal numbers to 0, which saves the steps that scale them.
__device__ __forceinline__ float fast_exponential(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x * 1.4426950408889634f));
  return out;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// exp(x). The fast version is accurate enough for results of 16 bits.
template <class T>
__device__ __forceinline__ float exponential(float x) {
  return sizeof(T) == 2 ? fast_exponential(x) : expf(x);
}
template <class T>
__device__ __forceinline__ double exponential(double x) {
  return exp(x);
}
template <class T>
__device__ __forceinline__ float reciprocal(float x) {
  return sizeof(T) == 2 ? fast_reciprocal(x) : __frcp_rn(x);
}
template <class T>
__device__ __forceinline__ double reciprocal(double x) {
  return 1.0 / x;
}

// The value of the next lane below or above, among segments of kLanes lanes of a whole warp; 0 at the end of a segment.
// The instruction itself tells whether there is such a lane, which takes no register.
#define GSPN_SHUFFLE(NAME, MODE, CLAMP)                                              \
  template <int kLanes>                                                              \
  __device__ __forceinline__ float NAME(float v) {                                   \
    float out;                                                                       \
    asm volatile("{\n.reg .pred p;\nshfl.sync." MODE                                 \
                 ".b32 %0|p, %1, 1, %2, 0xffffffff;\n@!p mov.f32 %0, 0f00000000;\n}" \
                 : "=f"(out)                                                         \
                 : "f"(v), "n"(((32 - kLanes) << 8) | CLAMP));                       \
    return out;                                                                      \
  }                                                                                  \
  template <int kLanes>                                                              \
  __device__ __forceinline__ double NAME(double v) {                                 \
    double out;                                                                      \
    asm volatile(                                                                    \
        "{\n.reg .pred p;\n.reg .b32 low, high;\nmov.b64 {low, high}, %1;\n"         \
        "shfl.sync." MODE                                                            \
        ".b32 low|p, low, 1, %2, 0xffffffff;\n"                                      \
        "shfl.sync." MODE                                                            \
        ".b32 high|p, high, 1, %2, 0xffffffff;\n"                                    \
        "mov.b64 %0, {low, high};\n@!p mov.f64 %0, 0d0000000000000000;\n}"           \
        : "=d"(out)                                                                  \
        : "d"(v), "n"(((32 - kLanes) << 8) | CLAMP));                                \
    return out;                                                                      \
  }
GSPN_SHUFFLE(from_lower_lane, "up", 0)
GSPN_SHUFFLE(from_upper_lane, "down", 0x1f)
#undef GSPN_SHUFFLE

// Whether a value is true in any lane of the warp.
__device__ __forceinline__ bool any_lane(bool value) { return __any_sync(~0u, value); }

// Hides a value from the optimiser, which would otherwise compute the addresses of whole tiles before the loop over
// tiles, and spill them.
__device__ __forceinline__ int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Reads 2 to 16 aligned bytes of global memory that the kernel does not write, in one load.
template <class V>
__device__ __forceinline__ V load_vector(const V* p) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "one load");
  V out;
  const auto copy = [&](const auto raw) { memcpy(&out, &raw, sizeof(V)); };
  if constexpr (sizeof(V) == 16)
    copy(__ldg(reinterpret_cast<const uint4*>(p)));
  else if constexpr (sizeof(V) == 8)
    copy(__ldg(reinterpret_cast<const uint2*>(p)));
  else if constexpr (sizeof(V) == 4)
    copy(__ldg(reinterpret_cast<const unsigned*>(p)));
  else
    copy(__ldg(reinterpret_cast<const unsigned short*>(p)));
  return out;
}

// Writes 2 to 16 aligned bytes of global memory in one store.
template <class V>
__device__ __forceinline__ void store_vector(V* p, V value) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "one store");
  const auto as = [&](auto raw) {
    memcpy(&raw, &value, sizeof(V));
    return raw;
  };
  if constexpr (sizeof(V) == 16)
    __stwb(reinterpret_cast<uint4*>(p), as(uint4()));
  else if constexpr (sizeof(V) == 8)
    __stwb(reinterpret_cast<uint2*>(p), as(uint2()));
  else if constexpr (sizeof(V) == 4)
    __stwb(reinterpret_cast<unsigned*>(p), as(0u));
  else
    __stwb(reinterpret_cast<unsigned short*>(p), as((unsigned short)0));
}

// Vectors, and elements that a lane has of its own, in shared memory: the emulation counts how banks are used there.
template <class V>
__device__ __forceinline__ V load_shared(const V* p) {
  return *p;
}
template <class V>
__device__ __forceinline__ void store_shared(V* p, const V& value) {
  *p = value;
}

// Copies 16 aligned bytes of global memory to shared memory asynchronously. The copies that a thread has started since
// its last commit_copies() are a group; wait_for_copies<n>() waits for all its groups but the last n. Other threads of
// the warp or block need a barrier after that.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Prefetches the memory at p into the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

extern __shared__ __align__(128) unsigned char gspn_shared_memory[];
__device__ __forceinline__ unsigned char* shared_memory() { return gspn_shared_memory; }

// Clusters of blocks can access each other's shared memory from sm_90 on; before, every block is a cluster of one.
__device__ __forceinline__ int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
#else
  return 0;
#endif
}
// The address of p in the shared memory of another block of the cluster.
template <class A>
__device__ __forceinline__ A* cluster_map(A* p, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return reinterpret_cast<A*>(mapped);
#else
  return rank == 0 ? p : nullptr;
#endif
}
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear the error, so that a later call of other code does not report it
  throw std::runtime_error(std::string("gspn_core: ") + what + ": " + cudaGetErrorString(error));
}

// Makes a device current and returns the previous one.
inline int exchange_device(int device) {
  int before = 0;
  check(cudaGetDevice(&before), "asking for the device");
  if (device != before) check(cudaSetDevice(device), "changing the device");
  return before;
}

inline void restore_device(int device) {
  int now = device;
  if (cudaGetDevice(&now) == cudaSuccess && now != device) cudaSetDevice(device);
}

// Compiled as all kernels are, to ask what they were compiled for.
static __global__ void probe() {}

// The capability, such as 90, that the kernels of the current device were compiled for; an older one if the device has
// compiled them from PTX. 0 if there are none for this device.
inline int compiled_capability() {
  cudaFuncAttributes attributes = {};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    cudaGetLastError();
    return 0;
  }
  check(error, "asking for the kernels of the device");
  return attributes.ptxVersion;
}

inline Limits device_limits() {
  int device = 0, multiprocessors = 0, shared_bytes = 0;
  check(cudaGetDevice(&device), "asking for the device");
  thread_local std::map<int, Limits> known;
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "asking for the SMs");
  check(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "asking for memory");
  return known[device] = {compiled_capability() / 10, multiprocessors, size_t(shared_bytes)};
}

// Runs kernel<<<blocks, threads, shared_bytes, stream>>>(args...) with clusters of the given size.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, int cluster,
            cudaStream_t stream, const Arguments&... arguments) {
  if (blocks > INT32_MAX) throw std::invalid_argument("gspn_core: the tensors need more than 2^31 - 1 thread blocks");
  // The most that the device has, not what this launch needs: another thread may be about to launch the kernel with
  // more.
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(device_limits().shared_bytes)),
          "asking for shared memory");
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), "launching a kernel");
}

#endif

}  // namespace gspn::cuda

#ifndef __CUDACC__
#include "emulated.cuh"
#endif
