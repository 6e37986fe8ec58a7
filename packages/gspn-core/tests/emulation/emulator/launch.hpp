// Runs a launch: checks it, gives every thread its stack, runs cluster after cluster, and describes what has failed.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "schedule.hpp"

namespace emulator {
namespace detail {

// The shared memory of a block ends when its last thread returns. This write makes TSan report an access by another
// block of the cluster that no cluster_sync orders before the return.
inline void close_shared_memory(Block& block) {
  acquire(&block.exit_fence);
  std::memset(block.shared.get(), kPoison, state().launch.shared_bytes);
  poison_memory(block.shared.get(), state().launch.shared_bytes);
}

// The bottom of a fiber's stack. An exception of the kernel ends the process here, because there is no caller.
__attribute__((no_sanitize("thread"))) inline void thread_main() noexcept {
  State& s = state();
#ifdef __SANITIZE_ADDRESS__
  const void* left;
  size_t left_bytes;
  __sanitizer_finish_switch_fiber(nullptr, &left, &left_bytes);
  if (!s.main.stack) {  // the first fiber of a launch is entered from the main one
    s.main.stack = left;
    s.main.stack_bytes = left_bytes;
  }
#endif
  Block& block = *s.current->block;
  acquire(&s.start_fence);
  s.launch.body(s.launch.closure);
  bool copies;
  {
    Hidden hidden;
    copies = !s.current->copies.empty();
  }
  if (copies) stop("a thread returned while its copies were under way", Site{});
  release(&block.exit_fence);
  Thread* next;
  bool last;
  {
    Hidden hidden;
    retire(*s.current);
    last = block.barrier.live == 0;
    next = next_thread();
  }
  if (last && s.cluster->blocks.size() > 1) close_shared_memory(block);
  switch_to(next, Leaving::kForGood);
  std::abort();
}

#ifdef __SANITIZE_THREAD__
// Creating a fiber is slow, and destroying one loses the history that reveals its races with later blocks. So fibers
// are reused, after as many others as the runtime can distinguish.
inline void* take_fiber(State& s) {
  if (s.fibers_made < kFibers || s.idle_fibers.empty()) {
    ++s.fibers_made;
    return __tsan_create_fiber(0);
  }
  void* fiber = s.idle_fibers.front();
  s.idle_fibers.pop_front();
  return fiber;
}
#endif

// Starts the thread at thread_main on a clean stack, whose previous user may have been abandoned.
inline void prepare_stack([[maybe_unused]] State& s, Thread& thread, const Stack& stack) {
  thread.stack = stack.base + kGuardBytes;
  thread.stack_bytes = kStackBytes - kGuardBytes;
  unpoison_memory(thread.stack, thread.stack_bytes);
#ifdef __SANITIZE_THREAD__
  thread.fiber = take_fiber(s);
  // Locals of two blocks would race on a reused stack; new pages have no history.
  map_stack(stack.base, MAP_FIXED);
  mprotect(stack.base, kGuardBytes, PROT_NONE);
#endif
#ifdef GSPN_EMULATOR_UCONTEXT
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stack.base + kGuardBytes;
  thread.context.uc_stack.ss_size = thread.stack_bytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, thread_main, 0);
#else
  // What switch_stack pops: six registers and thread_main as return address; then a return address for thread_main,
  // which aligns the stack as a call would and ends a debugger's backtrace.
  constexpr int kRegisters = 6;
  uint64_t* top = reinterpret_cast<uint64_t*>(stack.base + kStackBytes);
  std::memset(top - kRegisters - 2, 0, (kRegisters + 2) * sizeof(uint64_t));
  top[-2] = reinterpret_cast<uint64_t>(&thread_main);
  thread.stack_pointer = top - kRegisters - 2;
#endif
}

inline void prepare_thread(State& s, Block& block, int number) {
  const size_t slot = block.rank * block.barrier.live + number;
  while (s.pool.size() <= slot) {
    s.stacks.push_back(std::make_unique<Stack>());
    s.pool.emplace_back();
  }
  Thread& thread = s.pool[slot];
  thread = Thread();
  const unsigned n = number, plane = s.launch.block.x * s.launch.block.y;
  thread.index = {n % s.launch.block.x, n % plane / s.launch.block.x, n / plane};
  thread.number = number;
  thread.lane = number % kWarpSize;
  thread.block = &block;
  thread.warp = &block.warps[number / kWarpSize];
  thread.warp->threads[thread.lane] = &thread;
  thread.warp->live |= 1u << thread.lane;
  prepare_stack(s, thread, *s.stacks[slot]);
}

inline void prepare_block(State& s, Block& block, uint3 index, int rank) {
  const int threads = s.launch.block.x * s.launch.block.y * s.launch.block.z;
  block.index = index;
  block.rank = rank;
  block.barrier.live = threads;
  s.cluster->barrier.live += threads;
  void* shared = nullptr;
  if (posix_memalign(&shared, kSharedAlignment, std::max<size_t>(s.launch.shared_bytes, 1))) throw std::bad_alloc();
  block.shared.reset(static_cast<unsigned char*>(shared));
  std::memset(shared, kPoison, s.launch.shared_bytes);
  block.warps = std::vector<Warp>((threads + kWarpSize - 1) / kWarpSize);
  for (Warp& warp : block.warps) warp.priority = draw(s);
  for (int number = 0; number < threads; ++number) prepare_thread(s, block, number);
}

template <class V>  // uint3 or dim3
std::string to_string(const V& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}
inline std::string to_string(const Site& site) { return std::string(site.file) + ":" + std::to_string(site.line); }

// One line for each range of consecutive threads that wait at the same place.
inline std::string describe_waiting(const Block& block) {
  std::vector<const Thread*> threads;
  for (const Warp& warp : block.warps)
    for (const Thread* thread : warp.threads)
      if (thread && thread->waits_at != Primitive::kNone) threads.push_back(thread);
  std::string text;
  for (size_t first = 0, end; first < threads.size(); first = end) {
    const Thread& head = *threads[first];
    for (end = first + 1; end < threads.size(); ++end) {
      const Thread& next = *threads[end];
      if (next.number != threads[end - 1]->number + 1 || next.waits_at != head.waits_at || !(next.site == head.site))
        break;
    }
    text += "\n  block " + to_string(block.index) + " threads " + std::to_string(head.number) + " to " +
            std::to_string(threads[end - 1]->number) + " wait at " + name(head.waits_at) + ", " + to_string(head.site);
  }
  return text;
}

inline std::string describe_failure(const State& s) {
  std::string text = s.failure.what;
  if (const Thread* thread = s.failure.thread)
    text += "; found by block " + to_string(thread->block->index) + " thread " + std::to_string(thread->number) +
            " at " + to_string(s.failure.site);
  for (const Block& block : s.cluster->blocks) text += describe_waiting(block);
  return text;
}

#ifdef __SANITIZE_THREAD__
// Orders everything that the thread did before the end of the launch.
__attribute__((noinline, no_sanitize("thread"))) inline void retire_fiber(State& s, const Thread& thread) {
  __tsan_switch_to_fiber(thread.fiber, __tsan_switch_to_fiber_no_sync);
  __tsan_release(&s.end_fence);
  __tsan_switch_to_fiber(s.main.fiber, __tsan_switch_to_fiber_no_sync);
  if (s.failure.what) {  // abandoned inside its calls
    --s.fibers_made;
    __tsan_destroy_fiber(thread.fiber);
  } else {
    s.idle_fibers.push_back(thread.fiber);
  }
}
#endif

// Runs the cluster that starts at this block. Throws its first error.
inline void run_cluster(State& s, uint3 first) {
  const int size = s.launch.cluster_size;
  s.cluster = std::make_unique<Cluster>(size);
  s.ready.clear();
  s.failure = {};
  for (int rank = 0; rank < size; ++rank)
    prepare_block(s, s.cluster->blocks[rank], {first.x + rank, first.y, first.z}, rank);
  release(&s.start_fence);
  switch_to(next_thread(), Leaving::kForNow);
#ifdef __SANITIZE_THREAD__
  for (const Block& block : s.cluster->blocks)
    for (const Warp& warp : block.warps)
      for (const Thread* thread : warp.threads)
        if (thread) retire_fiber(s, *thread);
#endif
  for (const Block& block : s.cluster->blocks) unpoison_memory(block.shared.get(), s.launch.shared_bytes);
  const std::string failure = s.failure.what ? describe_failure(s) : "";
  s.cluster.reset();
  if (failure.empty()) return;
  acquire(&s.end_fence);
  throw Error(failure);
}

inline void check(const Launch& launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const size_t shared_bytes = launch.shared_bytes;
  const int cluster_size = launch.cluster_size;
  const auto require = [](bool good, const std::string& what) {
    if (!good) throw Error("bad launch: " + what);
  };
  const auto within = [](const dim3& v, unsigned x, unsigned y, unsigned z) {
    return v.x >= 1 && v.x <= x && v.y >= 1 && v.y <= y && v.z >= 1 && v.z <= z;
  };
  require(within(block, kMaxThreads, kMaxThreads, kMaxBlockZ) && block.x * block.y * block.z <= kMaxThreads,
          "a block has 1 to 1024 threads, at most 64 along z, got " + to_string(block));
  require(within(grid, INT32_MAX, kMaxGridYZ, kMaxGridYZ),
          "a grid has 1 to 65535 blocks along y and z, got " + to_string(grid));
  require(shared_bytes <= kMaxSharedBytes,
          "a block has at most 227 KiB of shared memory, got " + std::to_string(shared_bytes) + " bytes");
  require(cluster_size >= 1 && cluster_size <= kMaxCluster && grid.x % cluster_size == 0,
          "a cluster has 1 to 8 blocks and divides the grid along x, got " + std::to_string(cluster_size) + " for " +
              std::to_string(grid.x));
}

inline void run(const Launch& launch) {
  check(launch);
  Hidden hidden;
  State& s = state();
  s.launch = launch;
  s.schedule = settings().schedule;
  s.random = settings().seed;
  s.main.stack = nullptr;
#ifdef __SANITIZE_THREAD__
  s.main.fiber = __tsan_get_current_fiber();
#endif
  const uint64_t columns = launch.grid.x / launch.cluster_size, rows = launch.grid.y;
  const uint64_t clusters = columns * rows * launch.grid.z;
  for (uint64_t i = 0; i < clusters; ++i) {
    const uint64_t c = s.schedule == kLastIn ? clusters - 1 - i : i;  // a kernel must not rely on the order of blocks
    const uint64_t x = c % columns * launch.cluster_size, y = c / columns % rows, z = c / columns / rows;
    run_cluster(s, {unsigned(x), unsigned(y), unsigned(z)});
  }
  acquire(&s.end_fence);
}

}  // namespace detail
}  // namespace emulator
