// Switches between fibers, chooses the next one, and makes them wait for each other: barriers and shuffles.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "state.hpp"

namespace emulator {
namespace detail {

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

}  // namespace detail
}  // namespace emulator
