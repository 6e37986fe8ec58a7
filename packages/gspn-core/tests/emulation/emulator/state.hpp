// What the emulator knows of a launch: threads as fibers, warps, blocks and clusters, and what waits for what.
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
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

}  // namespace detail
}  // namespace emulator
