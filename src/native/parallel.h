// Splitting work over XLA's own thread pool, so that a process never has more busy threads than cores.
//
// A step of decoding is hundreds of products of some tens of microseconds each, about as long as the system takes to
// wake a thread. So a thread of the pool that has helped waits a moment for the next call before it goes back to sleep,
// and calls give their work to waiting threads first.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <thread>
#include <utility>

#include "float_mode.h"
#include "xla/ffi/api/ffi.h"

namespace tenfold {

inline void pause() {
#if defined(__SSE__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Tasks that are handed out one by one, in order, to whoever asks.
class Work {
 public:
  Work(int64_t tasks, void (*run)(const void*, int64_t), const void* body) : tasks_(tasks), run_(run), body_(body) {}

  // Runs tasks until none is left to begin. One who comes late finds nothing and touches nothing of the caller's.
  void take_part() {
    const FlushSubnormals flush;
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) {
      run_(body_, i);
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < tasks_; ++spins) {
      pause();
      if (spins > 4096) std::this_thread::yield();
    }
  }

 private:
  const int64_t tasks_;
  void (*const run_)(const void*, int64_t);
  const void* const body_;
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

// A place where a thread of the pool waits for work. Whoever moves it from kWaiting to kClaimed owns `work` until kGiven.
class Seat {
 public:
  // Leaves work for the thread that waits here; false if none does.
  bool give(const std::shared_ptr<Work>& work) {
    State waiting = kWaiting;
    if (state_.load(std::memory_order_relaxed) != kWaiting ||
        !state_.compare_exchange_strong(waiting, kClaimed, std::memory_order_acquire)) {
      return false;
    }
    work_ = work;
    state_.store(kGiven, std::memory_order_release);
    return true;
  }

  // Makes the seat the calling thread's; false if another has it.
  bool sit() {
    State empty = kEmpty;
    return state_.compare_exchange_strong(empty, kTaken, std::memory_order_acquire);
  }

  // Waits in an own seat for a while; null if nothing came, and then the seat is empty.
  std::shared_ptr<Work> wait() {
    state_.store(kWaiting, std::memory_order_release);
    const auto end = std::chrono::steady_clock::now() + kPatience;
    while (state_.load(std::memory_order_acquire) != kGiven) {
      for (int i = 0; i < 32; ++i) pause();
      std::this_thread::yield();  // to another process that wants the core, such as the server
      if (std::chrono::steady_clock::now() < end) continue;
      State waiting = kWaiting;
      if (state_.compare_exchange_strong(waiting, kEmpty, std::memory_order_release)) return nullptr;
      while (state_.load(std::memory_order_acquire) != kGiven) pause();  // just being given
    }
    state_.store(kTaken, std::memory_order_relaxed);
    return std::move(work_);
  }

 private:
  enum State { kEmpty, kTaken, kWaiting, kClaimed, kGiven };
  static constexpr std::chrono::microseconds kPatience{100};  // several times what lies between two products

  alignas(64) std::atomic<State> state_{kEmpty};
  std::shared_ptr<Work> work_;
};

// The seats of a process, one for every thread of a pool; threads beyond them go back to sleep at once.
inline std::span<Seat> seats(int64_t threads) {
  static std::array<Seat, 128> all;
  return std::span<Seat>(all).first(static_cast<size_t>(std::min<int64_t>(threads, all.size())));
}

// What a helping thread does: the work that it came for, and then what it is given while it waits.
inline void help(std::shared_ptr<Work> work, int64_t threads) {
  work->take_part();
  for (Seat& seat : seats(threads)) {
    if (!seat.sit()) continue;
    while ((work = seat.wait())) work->take_part();
    return;
  }
}

// Runs body(i) for i in [0, tasks), each once, on this thread and on idle ones of the pool; returns when all are done.
//
// The caller takes part, so that it never waits for a thread that is not already working: a pool whose threads are all
// in such calls makes progress.
template <typename Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t tasks, const Body& body) {
  const int64_t threads = pool.num_threads();
  int64_t helpers = std::min(threads, tasks) - 1;
  if (helpers <= 0) {
    const FlushSubnormals flush;
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  const auto run = [](const void* of, int64_t i) { (*static_cast<const Body*>(of))(i); };
  const auto work = std::make_shared<Work>(tasks, run, &body);
  for (Seat& seat : seats(threads)) {
    if (helpers == 0) break;
    helpers -= seat.give(work);
  }
  for (; helpers > 0; --helpers) pool.Schedule([work, threads] { help(work, threads); });
  work->take_part();
  work->wait();
}

}  // namespace tenfold
