// Runs CUDA kernel source, compiled by plain g++ without any CUDA header, on the host.
//
// Each CUDA thread is a fiber. Fibers switch only at synchronisation points (shuffle, __syncwarp, __syncthreads,
// cluster_sync) or when they return, and only within one OS thread, so a run is determined by its schedule and seed.
// Blocks run one after another, the blocks of a cluster together, but each starts only when those before it wait. A
// failing launch throws emulator::Error in the caller, with the place where every waiting thread waits, and the
// emulator remains usable for the next launch.
//
// What is detected
//   always    lanes of one mask at different calls, a lane outside its own mask, overlapping masks; a barrier reached
//             at different lines; deadlock; a launch that no device accepts; cluster_map outside the cluster or block,
//             or to a block that has not started, whose shared memory is not its own yet: a cluster barrier has to come
//             first. Threads that have returned count as arrived, as on sm_70 and later.
//   as NaN    undefined values are all ones, NaN in every floating-point format: shared memory before its first write
//             and, in a cluster, after its block has returned; a shuffle from a lane outside the mask.
//   schedule  a missing barrier, if the order of the threads makes the result wrong: set_schedule, or the environment
//             variables GSPN_EMULATOR_SCHEDULE and GSPN_EMULATOR_SEED. Try all schedules, and several seeds.
//   ASan      shared memory out of bounds, even by one byte: the block's allocation has exactly the size of the launch;
//             access to shared memory of a block of the cluster that has returned.
//   TSan      data races, including missing barriers, in any schedule: each CUDA thread is a thread for TSan, ordered
//             only by barriers and by the start and end of a launch. A shuffle orders no memory accesses, and the
//             blocks of one grid are never ordered. Races between blocks are detected only if the blocks run soon after
//             one another, because about 512 threads are remembered: keep blocks small, at most 256 threads.
// What is not detected: bank conflicts, coalescing, occupancy, registers; errors in device-only code (PTX, intrinsics);
// memory orders weaker than those of barriers. A loop that polls for another thread hangs.
//
// To add a primitive: if it does not wait, a plain function on current() suffices. If it does, add a Primitive and its
// name, record the arrival inside park(), which runs other threads until settle() has made this one ready, and report
// misuse with fail(), not by an exception, which could not leave the fiber. Arithmetic instructions (fma, exp2) are not
// emulated: kernels have a host branch for them under GSPN_EMULATED.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "emulator/launch.hpp"

namespace emulator {

inline unsigned char* dynamic_shared_memory() { return detail::current().block->shared.get(); }

inline int cluster_rank() { return detail::current().block->rank; }

inline int cluster_size() { return static_cast<int>(detail::state().cluster->blocks.size()); }

// Maps an address in the caller's shared memory to the block of the given rank.
inline void* cluster_map(void* p, int rank, detail::Site site = detail::Site::here()) {
  const size_t offset = static_cast<unsigned char*>(p) - dynamic_shared_memory();
  if (rank < 0 || rank >= cluster_size()) detail::stop("cluster_map to a rank outside the cluster", site);
  if (offset >= detail::state().launch.shared_bytes)
    detail::stop("cluster_map of an address outside shared memory", site);
  if (!detail::state().cluster->blocks[rank].started) detail::stop("cluster_map to a block that has not started", site);
  return detail::state().cluster->blocks[rank].shared.get() + offset;
}

// What kernels note of their accesses to memory. With a recorder set, each access of a thread is kept, with the place
// in the code that makes it, so that the accesses which a warp makes at once can be put together.
enum class Memory { kGlobalLoad, kGlobalStore, kShared };
struct Access {
  unsigned block;
  int thread, meetings;
  const void* site;
  Memory memory;
  uintptr_t address;
  size_t bytes;
};
inline std::vector<Access>*& recorder() {
  static std::vector<Access>* accesses = nullptr;
  return accesses;
}
__attribute__((noinline)) inline void note(Memory memory, const void* p, size_t bytes) {
  if (recorder() == nullptr) return;
  const detail::Thread& me = detail::current();
  recorder()->push_back(
      {me.block->index.x, me.number, me.meetings, __builtin_return_address(0), memory, uintptr_t(p), bytes});
}

// Asynchronous copies from global to shared memory. The data appears at the wait of the thread that copies; until then
// the destination is undefined, whatever it held before.
inline void copy_async(void* shared, const void* global, size_t bytes, detail::Site site = detail::Site::here()) {
  const size_t offset = static_cast<unsigned char*>(shared) - dynamic_shared_memory();
  if (offset + bytes > detail::state().launch.shared_bytes) detail::stop("copy_async beyond shared memory", site);
  for (const void* p : {const_cast<const void*>(shared), global})
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) detail::stop("copy_async of an address that is not aligned", site);
  std::memset(shared, detail::kPoison, bytes);
  detail::Hidden hidden;
  detail::Thread& me = detail::current();
  me.copies.push_back({shared, global, bytes, me.groups});
}

inline void commit_copies() {
  detail::Hidden hidden;
  ++detail::current().groups;
}

// Waits for all groups of copies of the thread but the last `groups`, committed ones.
inline void wait_for_copies(size_t groups) {
  std::vector<detail::Copy> done;
  {
    detail::Hidden hidden;
    detail::Thread& me = detail::current();
    const auto waits = [&](const detail::Copy& copy) { return copy.group + groups < me.groups; };
    std::copy_if(me.copies.begin(), me.copies.end(), std::back_inserter(done), waits);
    me.copies.erase(std::remove_if(me.copies.begin(), me.copies.end(), waits), me.copies.end());
  }
  for (const detail::Copy& copy : done) std::memcpy(copy.to, copy.from, copy.bytes);
}

inline void cluster_sync(detail::Site site = detail::Site::here()) {
  detail::meet_barrier(detail::Primitive::kClusterSync, detail::state().cluster->barrier, site);
}

// For all following launches. 0: first in, first out. 1: last in, first out, blocks backwards. 2: a random ready
// thread. 3: random priorities of warps, so that one runs far ahead of the others.
inline void set_schedule(int schedule, uint64_t seed) {
  if (schedule < 0 || schedule >= detail::kSchedules)
    throw Error("schedules are 0 to 3, got " + std::to_string(schedule));
  detail::settings().schedule = schedule;
  detail::settings().seed = seed;
}

// Calls body() once for every CUDA thread and returns when all have returned. Throws Error.
template <class F>
void launch(dim3 grid, dim3 block, size_t shared_bytes, int cluster_size_x, F body) {
  const auto call = [](void* closure) { (*static_cast<F*>(closure))(); };
  detail::run({grid, block, shared_bytes, cluster_size_x, call, &body});
}

}  // namespace emulator

#define threadIdx (::emulator::detail::current().index)
#define blockIdx (::emulator::detail::current().block->index)
#define blockDim (::emulator::detail::state().launch.block)
#define gridDim (::emulator::detail::state().launch.grid)

using emulator::detail::__shfl_down_sync;
using emulator::detail::__shfl_sync;
using emulator::detail::__shfl_up_sync;
using emulator::detail::__shfl_xor_sync;
using emulator::detail::__syncthreads;
using emulator::detail::__syncwarp;
