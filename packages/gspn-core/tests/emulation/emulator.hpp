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

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

// -DGSPN_EMULATOR_UCONTEXT selects the portable context switch instead of the fast one, for tests.
#if !defined(__x86_64__) && !defined(GSPN_EMULATOR_UCONTEXT)
#define GSPN_EMULATOR_UCONTEXT 1
#endif
#ifdef GSPN_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {  // TSan runtime functions that no header declares
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#define GSPN_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace detail {

constexpr int kWarpSize = 32, kMaxThreads = 1024, kMaxCluster = 8, kMaxGridYZ = 65535, kMaxBlockZ = 64;
constexpr size_t kMaxSharedBytes = 227 * 1024, kSharedAlignment = 128;
constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 4096;  // address space: only the touched pages cost memory
constexpr size_t kFibers = 512;                                 // as many fibers as TSan can distinguish
constexpr int kPoison = 0xFF;

enum Schedule { kFirstIn, kLastIn, kRandomThread, kWarpsApart, kSchedules };
enum class Primitive { kNone, kSyncWarp, kShuffle, kSyncThreads, kClusterSync };

inline const char* name(Primitive primitive) {
  constexpr const char* kNames[] = {"nothing", "__syncwarp", "__shfl_*sync", "__syncthreads", "cluster_sync"};
  return kNames[static_cast<int>(primitive)];
}

// The place where a primitive is called: here(), as a default argument, is evaluated at the call.
struct Site {
  const char* file = "";
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return line == other.line && !std::strcmp(file, other.file); }
};

// Tell ASan about each switch of stacks, and TSan about each switch of fibers; empty without sanitizers.
#ifdef __SANITIZE_ADDRESS__
inline void poison_memory(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison_memory(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
inline void poison_memory(const void*, size_t) {}
inline void unpoison_memory(const void*, size_t) {}
#endif
#ifdef __SANITIZE_THREAD__
inline void release(void* fence) { __tsan_release(fence); }
inline void acquire(void* fence) { __tsan_acquire(fence); }
struct Hidden {  // scope that TSan ignores: bookkeeping that all fibers share
  Hidden() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Hidden() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
#else
inline void release(void*) {}
inline void acquire(void*) {}
struct Hidden {
  Hidden() {}
};
#endif

// The synchronisation object that TSan sees for a barrier. A thread may arrive at the next barrier before a slower one
// has left this one. With a single variable the slower one would then appear to be ordered after it, and races between
// them would be missed. So two variables alternate: no thread can be two barriers ahead.
struct Fence {
  char sides[2] = {};
  int phase = 0;
  void* side() { return &sides[phase & 1]; }
};

inline char* map_stack(void* address, int flags) {
  void* p =
      mmap(address, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | flags, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(p);
}

struct Stack {
  char* base;
  Stack() : base(map_stack(nullptr, 0)) { mprotect(base, kGuardBytes, PROT_NONE); }
  ~Stack() {
    unpoison_memory(base, kStackBytes);
    munmap(base, kStackBytes);
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
};

struct Warp;
struct Block;

struct Copy {
  void* to;
  const void* from;
  size_t bytes, group;
};

struct Thread {
#ifdef GSPN_EMULATOR_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // ASan's
  void* fiber = nullptr;       // TSan's
  uint3 index{};
  int number = 0, lane = 0;
  Warp* warp = nullptr;
  Block* block = nullptr;
  uint64_t received = 0;     // by the last shuffle
  int meetings = 0;          // synchronisation points so far: equal in the lanes of a warp
  std::vector<Copy> copies;  // asynchronous, under way
  size_t groups = 0;         // of copies, that have been committed
  Primitive waits_at = Primitive::kNone;
  Site site;
};

struct Rendezvous {  // synchronisation of the lanes of one mask
  unsigned mask, arrived;
  Primitive primitive;
  Site site;
  uint64_t values[kWarpSize];
  int sources[kWarpSize];
};

struct Warp {
  Thread* threads[kWarpSize] = {};
  unsigned live = 0;  // lanes that exist and have not returned
  uint64_t priority = 0;
  std::vector<Rendezvous> open;
  Fence fences[kWarpSize];  // a mask uses that of its lowest lane
};

struct Barrier {
  size_t live = 0;
  std::vector<Thread*> waiting;
  Fence fence;
};

struct Block {
  uint3 index{};
  int rank = 0;
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, std::free};
  std::vector<Warp> warps;
  Barrier barrier;
  bool started = false;
  char exit_fence = 0;
};

struct Cluster {  // new for every cluster: reused fences would order blocks that are not ordered
  std::vector<Block> blocks;
  Barrier barrier;
  explicit Cluster(int size) : blocks(size) {}
};

struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  int cluster_size;
  void (*body)(void*);
  void* closure;
};

struct Failure {
  const char* what = nullptr;
  Thread* thread = nullptr;
  Site site;
};

inline int from_environment(const char* variable) {
  const char* value = std::getenv(variable);
  return value ? std::atoi(value) : 0;
}

struct Settings {
  std::atomic<int> schedule{from_environment("GSPN_EMULATOR_SCHEDULE")};
  std::atomic<uint64_t> seed{static_cast<uint64_t>(from_environment("GSPN_EMULATOR_SEED"))};
};

inline Settings& settings() {
  static Settings settings;
  return settings;
}

struct State {  // of one OS thread
  Thread main;
  Thread* current = &main;
  std::deque<Thread*> ready;
  std::unique_ptr<Cluster> cluster;
  Launch launch{};
  int schedule = 0;
  uint64_t random = 0;
  Failure failure;
  char start_fence = 0, end_fence = 0;
  std::deque<void*> idle_fibers;  // TSan's, as is their number
  size_t fibers_made = 0;
  std::vector<std::unique_ptr<Stack>> stacks;
  std::deque<Thread> pool;  // as many as there are stacks; their addresses are stable
};

inline State& state() {
  static thread_local State state;
  return state;
}

inline Thread& current() { return *state().current; }

inline uint64_t draw(State& s) {  // splitmix64
  uint64_t z = s.random += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

#ifndef GSPN_EMULATOR_UCONTEXT
// Pushes callee-saved registers, stores the stack pointer, loads the other one and pops.
__attribute__((naked, noinline, no_sanitize("thread"))) inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

enum class Leaving { kForNow, kForGood };

__attribute__((noinline, no_sanitize("thread"))) inline void switch_to(Thread* to, [[maybe_unused]] Leaving leaving) {
  State& s = state();
  Thread* from = s.current;
  if (from == to) return;
  s.current = to;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(leaving == Leaving::kForGood ? nullptr : &from->fake_stack, to->stack,
                                 to->stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to->fiber, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef GSPN_EMULATOR_UCONTEXT
  swapcontext(&from->context, &to->context);
#else
  switch_stack(&from->stack_pointer, to->stack_pointer);
#endif
#ifdef __SANITIZE_ADDRESS__  // resumed, possibly much later
  __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

// Records the first error; next_thread() then returns to the launch, which throws.
inline void fail(const char* what, Site site) {
  State& s = state();
  if (!s.failure.what) s.failure = {what, s.current, site};
}

inline size_t choose(State& s) {
  const size_t count = s.ready.size();
  if (s.schedule == kFirstIn) return 0;
  if (s.schedule == kLastIn) return count - 1;
  if (s.schedule == kRandomThread) return draw(s) % count;
  // One warp runs as far ahead of the others as barriers allow, until the priorities change.
  if (draw(s) % 64 == 0) s.ready[draw(s) % count]->warp->priority = draw(s);
  size_t best = 0;
  for (size_t i = 1; i < count; ++i)
    if (s.ready[i]->warp->priority > s.ready[best]->warp->priority) best = i;
  return best;
}

inline void make_ready(Thread* thread) {
  thread->waits_at = Primitive::kNone;
  state().ready.push_back(thread);
}

// Starts a block of the cluster that has not started, if there is one.
inline void start_block(State& s) {
  std::vector<Block*> left;
  for (Block& block : s.cluster->blocks)
    if (!block.started) left.push_back(&block);
  if (left.empty()) return;
  Block& block = *left[s.schedule == kFirstIn ? 0 : s.schedule == kLastIn ? left.size() - 1 : draw(s) % left.size()];
  block.started = true;
  for (Warp& warp : block.warps)
    for (Thread* thread : warp.threads)
      if (thread) make_ready(thread);
}

// The next thread to run; the main fiber if all have returned or one has failed.
inline Thread* next_thread() {
  State& s = state();
  if (!s.failure.what && s.ready.empty()) start_block(s);
  if (!s.failure.what && s.ready.empty() && s.cluster->barrier.live)
    s.failure.what = "deadlock: every thread that has not returned waits";
  if (s.failure.what || s.ready.empty()) return &s.main;
  const size_t index = choose(s);
  Thread* thread = s.ready[index];
  if (index == 0) {
    s.ready.pop_front();
  } else {
    std::swap(s.ready[index], s.ready.back());
    s.ready.pop_back();
  }
  return thread;
}

// Calls arrive(), which records that the current thread waits and makes threads ready whose wait it completes, then
// runs other threads until this one is ready. A primitive that orders memory passes its fence.
template <class Arrive>
void park(Primitive primitive, Site site, Fence* fence, Arrive arrive) {
  void* side = fence ? fence->side() : nullptr;
  if (side) release(side);
  Thread* next;
  {
    Hidden hidden;
    Thread& me = current();
    me.waits_at = primitive;
    ++me.meetings;
    me.site = site;
    arrive(me);
    next = next_thread();
  }
  switch_to(next, Leaving::kForNow);
  if (side) acquire(side);
}

// Aborts the launch from within a thread, outside a synchronisation point.
inline void stop(const char* what, Site site) {
  park(Primitive::kNone, site, nullptr, [&](Thread&) { fail(what, site); });
}

// Completes the barrier if all threads that have not returned have arrived.
inline void settle(Barrier& barrier) {
  if (barrier.waiting.size() < barrier.live) return;
  ++barrier.fence.phase;
  for (Thread* thread : barrier.waiting) make_ready(thread);
  barrier.waiting.clear();
}

inline void meet_barrier(Primitive primitive, Barrier& barrier, Site site) {
  park(primitive, site, &barrier.fence, [&](Thread& me) {
    if (!barrier.waiting.empty() && !(barrier.waiting[0]->site == site))
      return fail("threads meet at different barriers", site);
    barrier.waiting.push_back(&me);
    settle(barrier);
  });
}

inline void complete(Warp& warp, const Rendezvous& meeting) {
  const auto arrived = [&](int lane) { return lane >= 0 && lane < kWarpSize && (meeting.arrived >> lane & 1); };
  if (meeting.primitive == Primitive::kSyncWarp) ++warp.fences[__builtin_ctz(meeting.mask)].phase;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!arrived(lane)) continue;
    const int source = meeting.sources[lane];
    std::memset(&warp.threads[lane]->received, kPoison, sizeof(uint64_t));
    if (arrived(source)) warp.threads[lane]->received = meeting.values[source];
    make_ready(warp.threads[lane]);
  }
}

// Completes each rendezvous of the warp at which all lanes that have not returned have arrived.
inline void settle(Warp& warp) {
  for (size_t i = warp.open.size(); i-- > 0;) {
    if (warp.open[i].arrived != (warp.open[i].mask & warp.live)) continue;
    complete(warp, warp.open[i]);
    warp.open.erase(warp.open.begin() + i);
  }
}

// Adds the lane to the rendezvous of its mask, which the first lane creates.
inline void arrive_at_warp(Thread& me, unsigned mask, uint64_t value, int source) {
  Warp& warp = *me.warp;
  size_t i = 0;
  while (i < warp.open.size() && !(warp.open[i].mask & mask)) ++i;
  if (i == warp.open.size()) warp.open.push_back({mask, 0, me.waits_at, me.site, {}, {}});
  Rendezvous& meeting = warp.open[i];
  if (meeting.mask != mask) return fail("warp masks overlap", me.site);
  if (meeting.primitive != me.waits_at || !(meeting.site == me.site))
    return fail("divergence: lanes of one mask meet at different calls", me.site);
  meeting.arrived |= 1u << me.lane;
  meeting.values[me.lane] = value;
  meeting.sources[me.lane] = source;
  settle(warp);
}

inline uint64_t meet_warp(Primitive primitive, unsigned mask, uint64_t value, int source, Site site) {
  Thread& me = current();
  if (!(mask >> me.lane & 1)) stop("a lane is not in its own mask", site);
  Fence* fence = primitive == Primitive::kSyncWarp ? &me.warp->fences[__builtin_ctz(mask)] : nullptr;
  park(primitive, site, fence, [&](Thread& thread) { arrive_at_warp(thread, mask, value, source); });
  return me.received;
}

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable<T>::value, "a shuffle of up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(Primitive::kShuffle, mask, bits, source, site);
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

inline void __syncthreads(Site site = Site::here()) {
  meet_barrier(Primitive::kSyncThreads, current().block->barrier, site);
}

inline void __syncwarp(unsigned mask = ~0u, Site site = Site::here()) {
  meet_warp(Primitive::kSyncWarp, mask, 0, current().lane, site);
}

// The warp is cut into segments of `width` lanes, a power of two. A lane that would read outside its segment gets its
// own value, but __shfl_sync wraps around and __shfl_xor_sync may read from an earlier segment.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = kWarpSize, Site site = Site::here()) {
  return shuffle(mask, value, (current().lane & ~(width - 1)) | (source & (width - 1)), site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = kWarpSize, Site site = Site::here()) {
  const int lane = current().lane, source = lane - static_cast<int>(delta);
  return shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = kWarpSize, Site site = Site::here()) {
  const int lane = current().lane, source = lane + static_cast<int>(delta);
  return shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = kWarpSize, Site site = Site::here()) {
  const int lane = current().lane, source = lane ^ lane_mask;
  return shuffle(mask, value, source > (lane | (width - 1)) ? lane : source, site);
}

// Removes a thread that returns from everything that others wait for.
inline void retire(Thread& me) {
  me.warp->live &= ~(1u << me.lane);
  settle(*me.warp);
  for (Barrier* barrier : {&me.block->barrier, &state().cluster->barrier}) {
    --barrier->live;
    settle(*barrier);
  }
}

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
