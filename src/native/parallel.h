// Splitting work over XLA's own thread pool, so that a process never has more busy threads than cores.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "float_mode.h"
#include "xla/ffi/api/ffi.h"

namespace tenfold {

// Runs body(i) for i in [0, tasks), each once, on this thread and on idle ones of the pool; returns when all are done.
//
// The caller takes part, so that it never waits for a thread that is not already working: a pool whose threads are all
// in such calls makes progress. A thread that comes late finds nothing left and touches nothing of the caller's.
template <typename Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t tasks, const Body& body) {
  struct Work {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), tasks) - 1;
  if (helpers <= 0) {
    const FlushSubnormals flush;
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  auto work = std::make_shared<Work>();
  const auto run = [work, tasks, &body] {
    const FlushSubnormals flush;
    for (int64_t i; (i = work->next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      body(i);
      work->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t h = 0; h < helpers; ++h) pool.Schedule([run] { run(); });
  run();
  for (int spins = 0; work->done.load(std::memory_order_acquire) < tasks; ++spins) {
    if (spins > 4096) std::this_thread::yield();
  }
}

}  // namespace tenfold
