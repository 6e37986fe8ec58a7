// The host's side of device.cuh: what the kernels need beyond plain C++, under the emulation in tests/emulation.
// Included by device.cuh alone.
#pragma once

namespace gspn::cuda {

__device__ __forceinline__ float widen(BFloat16 v) {
  const uint32_t bits = uint32_t(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}
__device__ __forceinline__ float widen(Float16 v) {
  _Float16 half;
  std::memcpy(&half, &v, sizeof(half));
  return float(half);
}
__device__ __forceinline__ void narrow(float v, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  out.bits = v != v ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
__device__ __forceinline__ void narrow(float v, Float16& out) {
  const _Float16 half = _Float16(v);
  std::memcpy(&out, &half, sizeof(half));
}
template <class T>
float widen(Halves<T> v, int element) {
  return widen(T{uint16_t(v.bits >> (16 * element))});
}
template <class T>
void narrow(float first, float second, Halves<T>& out) {
  T low, high;
  narrow(first, low), narrow(second, high);
  out.bits = uint32_t(low.bits) | uint32_t(high.bits) << 16;
}
inline bool any_lane(bool value) {
  for (int mask = 16; mask > 0; mask /= 2) value = __shfl_xor_sync(~0u, int(value), mask) != 0 || value;
  return value;
}
template <class T, class A>
A exponential(A x) {
  return std::exp(x);
}
template <class T, class A>
A reciprocal(A x) {
  return A(1) / x;
}
template <int kLanes, class A>
A from_lower_lane(A v) {
  const A other = __shfl_up_sync(~0u, v, 1, kLanes);
  return threadIdx.x % kLanes == 0 ? A(0) : other;
}
template <int kLanes, class A>
A from_upper_lane(A v) {
  const A other = __shfl_down_sync(~0u, v, 1, kLanes);
  return threadIdx.x % kLanes == kLanes - 1 ? A(0) : other;
}
inline int opaque(int v) { return v; }
template <class V>
__forceinline__ V load_vector(const V* p) {
  emulator::note(emulator::Memory::kGlobalLoad, p, sizeof(V));
  return *p;
}
template <class V>
__forceinline__ void store_vector(V* p, const V& value) {
  emulator::note(emulator::Memory::kGlobalStore, p, sizeof(V));
  *p = value;
}
template <class V>
__forceinline__ V load_shared(const V* p) {
  emulator::note(emulator::Memory::kShared, p, sizeof(V));
  return *p;
}
template <class V>
__forceinline__ void store_shared(V* p, const V& value) {
  emulator::note(emulator::Memory::kShared, p, sizeof(V));
  *p = value;
}
__forceinline__ void copy_async(void* shared, const void* global) {
  emulator::note(emulator::Memory::kGlobalLoad, global, 16);
  emulator::note(emulator::Memory::kShared, shared, 16);
  emulator::copy_async(shared, global, 16);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int kGroups>
void wait_for_copies() {
  emulator::wait_for_copies(kGroups);
}
inline void prefetch(const void*) {}
inline unsigned char* shared_memory() { return emulator::dynamic_shared_memory(); }
inline int cluster_rank() { return emulator::cluster_rank(); }
template <class A>
A* cluster_map(A* p, int rank) {
  return static_cast<A*>(emulator::cluster_map(p, rank));
}
#define cluster_barrier() emulator::cluster_sync()

inline int exchange_device(int) { return 0; }
inline void restore_device(int) {}

inline Limits emulated_limits{9, 132, 227 * 1024};  // an H100; tests set other devices
inline Limits device_limits() { return emulated_limits; }
inline int compiled_capability() { return emulated_limits.major >= 8 ? 10 * emulated_limits.major : 0; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, int cluster, cudaStream_t,
            const Arguments&... arguments) {
  emulator::launch(dim3(unsigned(blocks)), dim3(unsigned(threads)), shared_bytes, cluster,
                   [&] { kernel(arguments...); });
}

}  // namespace gspn::cuda
