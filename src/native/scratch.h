// Memory of one thread that calls keep between them; XLA's threads live as long as the process.
#pragma once

#include <cstdint>
#include <memory>

namespace tenfold {

// What a call, each of its tasks, and the sums of a task need lie apart: a caller takes part in its tasks.
enum Purpose { kCall, kTask, kState };

// At least so many floats, with what they were left with; valid until the thread asks for the same purpose again.
template <Purpose>
float* scratch(int64_t floats) {
  struct alignas(64) Line {
    float floats[16];
  };
  thread_local std::unique_ptr<Line[]> memory;
  thread_local int64_t lines = 0;
  if (lines * 16 <= floats) {
    memory.reset();
    lines = floats / 16 + 1;
    memory.reset(new Line[static_cast<size_t>(lines)]);
  }
  return memory[0].floats;
}

}  // namespace tenfold
