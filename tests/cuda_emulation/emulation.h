// A GPU's blocks on the host: the threads of a block are fibers that one host thread runs in turn, each until it waits
// for others. Blocks run one after the other. Both orders can be shuffled, which shows where a wait is missing.
//
// Copies that a GPU makes on the side are made when they are waited for, no sooner. Shared memory is as long as the
// launch says and full of NaN, so that a sanitizer and a wrong result show what reaches too far or comes too soon.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

// What the language calls so: of the thread that runs now.
inline uint3 threadIdx{}, blockIdx{}, blockDim{}, gridDim{};

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

// Threads that wait for each other, and what each of them lays open for the others while they do.
struct Meeting {
  int arrived = 0;
  uint64_t held = 0;                                // how many such meetings have ended
  std::vector<std::vector<unsigned char>> open[2];  // by parity: nobody is two meetings ahead
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// A barrier in shared memory, cuda::barrier_init and what follows it.
struct Barrier {
  uint32_t arrivals = 0, missing = 0, phase = 0;
  int64_t expected = 0;  // bytes
  std::vector<Copy> copies;
};

// A thread's part in products of its warpgroup, made when they are waited for.
struct Products {
  std::vector<std::function<void()>> uncommitted, committed;
  std::map<float*, std::vector<float>> sums;  // by where they go
  bool fenced = false;                        // registers are theirs
  bool copies_fenced = true;                  // what was copied to shared memory is visible to them
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  int index = 0;
  bool done = false;
  std::function<bool()> ready;  // empty, or when it may go on
  std::vector<Copy> uncommitted;
  std::vector<std::vector<Copy>> groups;
  Products products;
};

struct Block {
  int threads = 0, alive = 0;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  std::map<std::tuple<int, uint64_t>, Meeting> meetings;  // by kind and which threads
  std::map<const void*, Barrier> barriers;
};

struct State {
  Block block;
  std::vector<Fiber> fibers;
  Fiber* now = nullptr;
  ucontext_t scheduler;
  std::function<void()> body;
  std::string failure;
  unsigned shuffle = 0;
  uint32_t coin = 0;
  std::set<const void*> launched;  // kernels
  int capability = 90;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
  void* scheduler_fake_stack = nullptr;
#endif
};

inline State& state() {
  static State the_state;
  return the_state;
}

[[noreturn]] inline void leave() {
  State& s = state();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, s.scheduler_stack, s.scheduler_stack_size);
#endif
  setcontext(&s.scheduler);
  std::abort();
}

inline void to_scheduler() {
  State& s = state();
  Fiber* self = s.now;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, s.scheduler_stack, s.scheduler_stack_size);
#endif
  swapcontext(&self->context, &s.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, &s.scheduler_stack, &s.scheduler_stack_size);
#endif
}

inline void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  state().now->ready = std::move(ready);
  to_scheduler();
}

// Ends the kernel with an error; the fibers are left where they stand.
[[noreturn]] inline void fail(const std::string& message) {
  State& s = state();
  if (s.failure.empty()) {
    s.failure = message + " (thread " + std::to_string(s.now->index) + " of block " + std::to_string(blockIdx.x) + ")";
  }
  leave();
}

inline void fiber_main() {
  State& s = state();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &s.scheduler_stack, &s.scheduler_stack_size);
#endif
  s.body();
  s.now->done = true;
  --s.block.alive;
  leave();
}

inline void run_fiber(Fiber& fiber) {
  State& s = state();
  s.now = &fiber;
  threadIdx.x = static_cast<unsigned>(fiber.index);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&s.scheduler_fake_stack, fiber.stack.get(), kStack);
#endif
  swapcontext(&s.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(s.scheduler_fake_stack, nullptr, nullptr);
#endif
  s.now = nullptr;
}

inline void run_block(const std::vector<int>& order) {
  State& s = state();
  s.block.meetings.clear();
  s.block.barriers.clear();
  s.block.alive = s.block.threads;
  for (Fiber& fiber : s.fibers) {
    fiber.done = false;
    fiber.ready = nullptr;
    fiber.uncommitted.clear();
    fiber.groups.clear();
    fiber.products = {};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  while (s.block.alive > 0) {
    bool progress = false;
    for (const int index : order) {
      Fiber& fiber = s.fibers[static_cast<size_t>(index)];
      if (fiber.done || (fiber.ready && !fiber.ready())) continue;
      fiber.ready = nullptr;
      progress = true;
      run_fiber(fiber);
      if (!s.failure.empty()) return;
    }
    if (!progress) {
      s.failure = "threads wait for threads that never come (block " + std::to_string(blockIdx.x) + ")";
      return;
    }
  }
}

// Runs body() as every thread of every block. Throws what the kernel was found to do wrong.
inline void run(unsigned blocks, unsigned threads, size_t shared_bytes, std::function<void()> body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  State& s = state();
  // Exactly so long, so that a sanitizer sees the end.
  const std::unique_ptr<unsigned char[]> memory(new unsigned char[shared_bytes + 128]);
  s.block.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(memory.get()) + 127) / 128 * 128);
  s.block.shared_bytes = shared_bytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory.get(), shared_bytes + 128);
  __asan_unpoison_memory_region(s.block.shared, shared_bytes);
#endif
  s.block.threads = static_cast<int>(threads);
  gridDim = {blocks, 1, 1};
  blockDim = {threads, 1, 1};
  s.body = std::move(body);
  s.failure.clear();
  while (s.fibers.size() < threads) {
    s.fibers.emplace_back();
    s.fibers.back().stack.reset(new char[kStack]);
  }
  s.fibers.resize(threads);
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::vector<unsigned> turns(blocks);
  std::iota(turns.begin(), turns.end(), 0u);
  std::mt19937 random(s.shuffle);
  if (s.shuffle) std::shuffle(turns.begin(), turns.end(), random);
  for (unsigned i = 0; i < threads; ++i) s.fibers[i].index = static_cast<int>(i);
  for (const unsigned turn : turns) {
    if (s.shuffle) std::shuffle(order.begin(), order.end(), random);
    std::memset(s.block.shared, 0xFF, shared_bytes);
    blockIdx.x = turn;
    run_block(order);
    if (!s.failure.empty()) break;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory.get(), shared_bytes + 128);
#endif
  s.body = nullptr;
  if (!s.failure.empty()) {
    s.fibers.clear();
    throw std::runtime_error(s.failure);
  }
}

// Waits for `members` threads that come to the same meeting; gives each what all of them laid open, by member.
template <class T>
std::vector<T> meet(int kind, uint64_t which, int members, int member, const T& mine) {
  Meeting& meeting = state().block.meetings[{kind, which}];
  const uint64_t number = meeting.held;
  auto& open = meeting.open[number % 2];
  open.resize(static_cast<size_t>(members));
  auto& place = open[static_cast<size_t>(member)];
  place.resize(sizeof(T));
  std::memcpy(place.data(), &mine, sizeof(T));
  if (++meeting.arrived == members) {
    meeting.arrived = 0;
    ++meeting.held;
  } else {
    wait_until([&meeting, number] { return meeting.held != number; });
  }
  std::vector<T> all(static_cast<size_t>(members));
  for (size_t i = 0; i < all.size(); ++i) {
    if (open[i].size() != sizeof(T)) fail("threads of a warp do different things together");
    std::memcpy(&all[i], open[i].data(), sizeof(T));
  }
  return all;
}

enum Kind : int { kBlockMeeting, kWarpMeeting, kNamedMeeting, kWarpgroupMeeting };

inline int lane() { return state().now->index % kWarp; }

// What the lanes of this thread's warp laid open, by lane; those outside the mask read as mine.
template <class T>
std::vector<T> meet_lanes(unsigned mask, const T& mine) {
  const int warp = state().now->index / kWarp, lane_index = lane();
  if (!(mask >> lane_index & 1)) fail("a lane calls with a mask that leaves it out");
  const int members = __builtin_popcount(mask);
  const int member = __builtin_popcount(mask & ((1u << lane_index) - 1));
  const uint64_t which = static_cast<uint64_t>(warp) << 32 | mask;
  const std::vector<T> met = meet(kWarpMeeting, which, members, member, mine);
  std::vector<T> lanes(kWarp, mine);
  for (int i = 0, at = 0; i < kWarp; ++i)
    if (mask >> i & 1) lanes[static_cast<size_t>(i)] = met[static_cast<size_t>(at++)];
  return lanes;
}

inline void copy(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

// Notes a copy that arrives when it is waited for. In shuffled orders half of them also arrive at once, and show who
// still reads what was there.
inline void issue(std::vector<Copy>& copies, const Copy& one) {
  auto& s = state();
  copies.push_back(one);
  if (s.shuffle == 0) return;
  s.coin = s.coin * 1664525u + 1013904223u + s.shuffle;
  if (s.coin >> 31) copy(one);
}

inline void must_be_aligned(const void* pointer, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) fail(std::string(what) + " is not aligned");
}

}  // namespace emulation
