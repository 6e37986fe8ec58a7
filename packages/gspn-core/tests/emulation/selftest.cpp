// Tiny correct and incorrect kernels that show what the emulator detects. test_emulator.py builds this file with and
// without sanitizers, runs one case per process and compares the outcome with what must be detected.
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <thread>

#include "emulator.hpp"

namespace {

constexpr unsigned kFull = ~0u;

float* shared_floats() { return reinterpret_cast<float*>(emulator::dynamic_shared_memory()); }

int linear_thread() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }

__device__ __forceinline__ float warp_sum(float value) {
  for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) value += __shfl_xor_sync(kFull, value, lane_mask);
  return value;
}

// out[block] = sum of the block's part of in
__global__ void __launch_bounds__(1024) reduce(const float* in, float* out) {
  float* s = shared_floats();
  const int threads = blockDim.x * blockDim.y * blockDim.z, t = linear_thread(), warp = t / 32;
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const float sum = warp_sum(in[block * threads + t]);
  if (t % 32 == 0) s[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    const float total = warp_sum(t < threads / 32 ? s[t] : 0.f);
    if (t == 0) out[block] = total;
  }
}

bool reduces(dim3 grid, dim3 block) {
  const int blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
  std::vector<float> in(blocks * threads), out(blocks, NAN);
  for (size_t i = 0; i < in.size(); ++i) in[i] = float(i % 7);
  emulator::launch(grid, block, threads / 32 * sizeof(float), 1, [&] { reduce(in.data(), out.data()); });
  bool right = true;
  for (int b = 0; b < blocks; ++b) {
    float sum = 0;
    for (int t = 0; t < threads; ++t) sum += in[b * threads + t];
    right = right && out[b] == sum;
  }
  return right;
}

void say(bool right) { std::puts(right ? "right" : "wrong"); }

template <class F>
void try_launch(dim3 grid, dim3 block, size_t shared_bytes, int cluster_size, F body) {
  try {
    emulator::launch(grid, block, shared_bytes, cluster_size, body);
    std::puts("no error");
  } catch (const emulator::Error& error) {
    std::puts(error.what());
  }
}

// Runs the test under every schedule and several seeds.
void for_schedules(const std::function<void()>& test) {
  for (int schedule = 0; schedule < 4; ++schedule)
    for (uint64_t seed = 0; seed < (schedule < 2 ? 1 : 4); ++seed) {
      emulator::set_schedule(schedule, seed);
      test();
    }
}

void reduction() {
  bool right = true;
  for_schedules([&] { right = right && reduces({2, 2, 2}, {8, 4, 2}) && reduces({1}, {256}); });
  say(right);
}

struct Pair {
  int16_t a, b;
};

void shuffles() {
  bool right = true;
  const auto expect = [&](bool good) {
    if (!good) right = false;
  };
  for_schedules([&] {
    emulator::launch(1, 64, 0, 1, [&] {
      const int lane = threadIdx.x % 32, first = lane & ~7;
      expect(__shfl_sync(kFull, lane, 5) == 5 && __shfl_sync(kFull, double(lane), 33) == 1);
      expect(__shfl_sync(kFull, lane, 10, 8) == first + 2);
      expect(__shfl_up_sync(kFull, lane, 3) == (lane < 3 ? lane : lane - 3));
      expect(__shfl_up_sync(kFull, uint8_t(lane), 3u, 8) == (lane - first < 3 ? lane : lane - 3));
      expect(__shfl_down_sync(kFull, int64_t{lane}, 3) == (lane > 28 ? lane : lane + 3));
      expect(__shfl_down_sync(kFull, float(lane), 3, 8) == (lane - first > 4 ? lane : lane + 3));
      expect(__shfl_xor_sync(kFull, Pair{int16_t(lane), 7}, 16).a == (lane ^ 16));
      expect(__shfl_xor_sync(kFull, lane, 8, 8) == ((lane & 8) ? lane - 8 : lane));
      if (lane % 2) expect(__shfl_xor_sync(0xAAAAAAAAu, lane, 2) == (lane ^ 2));  // half of the lanes
      if (lane == 0) expect(std::isnan(__shfl_sync(1u, 1.f, 1)));                 // from one that takes no part
    });
  });
  say(right);
}

// Threads that return early, and a last warp of eight.
void partial() {
  bool right = true;
  for_schedules([&] {
    std::vector<int> out(40, -1);
    emulator::launch(1, 40, 40 * sizeof(int), 1, [&] {
      int* s = reinterpret_cast<int*>(emulator::dynamic_shared_memory());
      const int t = threadIdx.x;
      s[t] = t;
      if (t % 4 == 3) return;
      __syncthreads();
      out[t] = s[(t + 4) % 40];
      __syncwarp();
    });
    for (int t = 0; t < 40; ++t) right = right && out[t] == (t % 4 == 3 ? -1 : (t + 4) % 40);
  });
  say(right);
}

// Each thread writes to the next block of its ring and reads what the previous one wrote.
template <bool kStay, bool kWait = true>
void ring(float* out) {
  float* s = shared_floats();
  const int rank = emulator::cluster_rank(), size = emulator::cluster_size(), t = threadIdx.x;
  if (kWait) emulator::cluster_sync();
  static_cast<float*>(emulator::cluster_map(s, (rank + 1) % size))[t] = float(100 * rank + t);  // of the next block
  emulator::cluster_sync();
  out[blockIdx.x * blockDim.x + t] = s[t];
  if (!kStay && rank == 1) return;
  __syncthreads();
  const float own = *static_cast<float*>(emulator::cluster_map(s + t, 1 % size));  // of a block that may be gone
  if (kStay) emulator::cluster_sync();
  out[blockIdx.x * blockDim.x + t] += 0.001f * own;
}

template <bool kStay>
void cluster() {
  bool right = true;
  for_schedules([&] {
    std::vector<float> out(8 * 64);
    emulator::launch(8, 64, 64 * sizeof(float), 4, [&] { ring<kStay>(out.data()); });
    for (int i = 0; i < 8 * 64; ++i)
      right = right && out[i] == float(100 * ((i / 64 + 3) % 4) + i % 64) + 0.001f * float(i % 64);
  });
  say(right);
}

// One of three barriers is missing.
void missing_syncthreads() {
  std::vector<float> out(64);
  emulator::launch(1, 64, 64 * sizeof(float), 1, [&] {
    float* s = shared_floats();
    const int t = threadIdx.x;
    __syncthreads();
    s[t] = float(t);
    out[t] = s[63 - t];
    __syncthreads();
  });
  bool right = true;
  for (int t = 0; t < 64; ++t) right = right && out[t] == float(63 - t);
  say(right);
}

// The shuffle makes the result right in every schedule, although nothing orders the accesses.
void missing_syncwarp() {
  bool right = true;
  for_schedules([&] {
    emulator::launch(1, 32, 32 * sizeof(float), 1, [&] {
      float* s = shared_floats();
      const int lane = threadIdx.x;
      __syncwarp();
      s[lane] = float(lane);
      const float next = __shfl_xor_sync(kFull, float(lane), 1);
      if (s[lane ^ 1] != next) right = false;
    });
  });
  say(right);
}

void shared_out_of_bounds() {
  float beyond = 0;
  emulator::launch(1, 32, 32 * sizeof(float), 1, [&] {
    const volatile float* s = shared_floats();
    if (threadIdx.x == 31) beyond = s[threadIdx.x + 1];  // one beyond
  });
  std::puts(std::isnan(beyond) ? "nan" : "a number");
}

void shared_uninitialised() {
  float value = 0;
  emulator::launch(1, 32, 32 * sizeof(float), 1, [&] {
    if (threadIdx.x == 31) value = shared_floats()[31];
  });
  std::puts(std::isnan(value) ? "nan" : "a number");
}

// A lane copies four floats to shared memory, and all read what the others have copied.
template <bool kWait, bool kBarrier>
void copying(const float* in, float* out) {
  float* s = shared_floats();
  const int t = threadIdx.x;
  emulator::copy_async(s + 4 * t, in + 4 * t, 16);
  emulator::commit_copies();
  if (t == 0) emulator::copy_async(s + 128, in, 16);  // of the next group
  emulator::commit_copies();
  if (kWait) emulator::wait_for_copies(1);
  if (kBarrier) __syncwarp();
  out[t] = s[4 * (31 - t)];
  if (t == 0) out[32] = s[128];  // still under way
  __syncwarp();
  emulator::wait_for_copies(0);
  if (t == 0) out[33] = s[128];
}

template <bool kWait, bool kBarrier>
void copies() {
  alignas(16) float in[128];
  float out[34];
  for (int i = 0; i < 128; ++i) in[i] = float(i);
  bool right = true, undefined = true;
  for_schedules([&] {
    emulator::launch(1, 32, 132 * sizeof(float), 1, [&] { copying<kWait, kBarrier>(in, out); });
    for (int t = 0; t < 32; ++t)
      right = right && out[t] == in[4 * (31 - t)], undefined = undefined && std::isnan(out[t]);
    right = right && std::isnan(out[32]) && out[33] == in[0];
  });
  std::puts(right ? "right" : undefined ? "nan" : "wrong");
}

void bad_copies() {
  alignas(16) static float in[8];
  const auto copy = [](int to, int from) { return [=] { emulator::copy_async(shared_floats() + to, in + from, 16); }; };
  try_launch(1, 1, 16, 1, copy(0, 0));
  try_launch(1, 1, 16, 1, copy(1, 0));
  try_launch(1, 1, 32, 1, copy(1, 0));
  try_launch(1, 1, 16, 1, copy(0, 2));
}

void race_between_blocks() {
  float value = 0;
  emulator::launch(2, 32, 0, 1, [&] {
    __syncthreads();  // of either block: it orders nothing between the two
    if (threadIdx.x == 0) value += 1;
    __syncthreads();
  });
  say(value == 2);
}

void launches_in_order() {
  float value = 0;
  for (int i = 0; i < 3; ++i)
    emulator::launch(1, 32, 0, 1, [&] {
      if (int(threadIdx.x) == i) value += 1;
    });
  value += 1;
  say(value == 4);
}

void divergent_shuffle() {
  try_launch({2, 3}, 32, 0, 1, [] {
    if (blockIdx.x == 0 || blockIdx.y < 2) return;
    if (threadIdx.x < 16)
      __shfl_sync(kFull, 1, 0);  // first half
    else
      __shfl_sync(kFull, 1, 0);  // second half
  });
}

void barrier_in_branch() {
  try_launch(1, 64, 0, 1, [] {
    if (threadIdx.x < 8) __syncthreads();  // in the branch
    __syncthreads();                       // behind the branch
  });
}

void deadlock() {
  try_launch(1, 64, 0, 1, [] {
    if (threadIdx.x < 8) __syncthreads();  // some
    __syncwarp();                          // others
  });
}

void deadlock_at_return() {
  try_launch(2, 32, 0, 2, [] {
    if (emulator::cluster_rank() == 1) return;
    if (threadIdx.x < 8)
      emulator::cluster_sync();  // cluster
    else if (threadIdx.x < 31)
      __syncthreads();  // block
  });
}

void masks() {
  try_launch(1, 32, 0, 1, [] { __syncwarp(1u); });
  try_launch(1, 32, 0, 1, [] { __syncwarp(0u); });
  try_launch(1, 32, 0, 1, [] { __syncwarp(threadIdx.x < 16 ? 0x1FFFFu : 0xFFFF0000u); });
}

// The result would be right if all blocks started at once.
void early_store() {
  for_schedules([] {
    std::vector<float> out(4 * 64);
    try_launch(4, 64, 64 * sizeof(float), 4, [&] { ring<true, false>(out.data()); });
  });
}

void maps() {
  try_launch(2, 1, 16, 2, [] {
    emulator::cluster_sync();
    emulator::cluster_map(emulator::dynamic_shared_memory() + 15, 1);
  });
  try_launch(2, 1, 16, 2, [] { emulator::cluster_map(emulator::dynamic_shared_memory() + 16, 1); });
  try_launch(2, 1, 16, 2, [] { emulator::cluster_map(emulator::dynamic_shared_memory(), 2); });
}

void bad_launch() {
  const auto nothing = [] {};
  try_launch(1, {1024, 2}, 0, 1, nothing);
  try_launch(1, {1, 0}, 0, 1, nothing);
  try_launch({1, 0}, 1, 0, 1, nothing);
  try_launch({1, 65536}, 1, 0, 1, nothing);
  try_launch(1, 1, 227 * 1024 + 1, 1, nothing);
  try_launch(16, 1, 0, 16, nothing);
  try_launch(6, 1, 0, 4, nothing);
  try_launch(2, {16, 1, 64}, 227 * 1024, 2, nothing);
}

void reuse() {
  for (int i = 0; i < 3; ++i) {
    divergent_shuffle();
    say(reduces({3}, {64}));
    deadlock();
    barrier_in_branch();
    say(reduces({2}, {128}));
    masks();
    deadlock_at_return();
  }
  cluster<true>();
}

void operating_system_threads() {
  bool right[2];
  const auto work = [&](int i) { right[i] = reduces({4}, {unsigned(64 << i)}); };
  std::thread other(work, 1);
  work(0);
  other.join();
  say(right[0] && right[1]);
}

}  // namespace

int main(int, char** argv) {
  const std::map<std::string, void (*)()> cases = {
      {"reduction", reduction},
      {"shuffles", shuffles},
      {"partial", partial},
      {"cluster", cluster<true>},
      {"left_cluster", cluster<false>},
      {"missing_syncthreads", missing_syncthreads},
      {"missing_syncwarp", missing_syncwarp},
      {"shared_out_of_bounds", shared_out_of_bounds},
      {"shared_uninitialised", shared_uninitialised},
      {"copies", copies<true, true>},
      {"copies_without_wait", copies<false, true>},
      {"copies_without_barrier", copies<true, false>},
      {"bad_copies", bad_copies},
      {"race_between_blocks", race_between_blocks},
      {"launches_in_order", launches_in_order},
      {"divergent_shuffle", divergent_shuffle},
      {"barrier_in_branch", barrier_in_branch},
      {"deadlock", deadlock},
      {"deadlock_at_return", deadlock_at_return},
      {"masks", masks},
      {"maps", maps},
      {"early_store", early_store},
      {"bad_launch", bad_launch},
      {"reuse", reuse},
      {"operating_system_threads", operating_system_threads},
  };
  cases.at(argv[1])();
}
