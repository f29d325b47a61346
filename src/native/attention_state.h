// What attention knows of a row so far: the sum of its values by weight, the largest score, and the total of the weights
// relative to it.
#pragma once

#include "attention.h"
#include "attention_tiles.h"
#include "functions.h"

namespace tenfold {
namespace {

// A row's state ends in a vector of the largest score and the total.
void clear(const Attention& a, int64_t rows, float* state) {
  const int64_t ld = a.state_floats();
  std::memset(state, 0, static_cast<size_t>(rows * ld) * sizeof(float));
  for (int64_t m = 0; m < rows; ++m) state[m * ld + ld - kLanes] = -kInfinity;
}

__attribute__((noinline)) void merge(const Attention& a, int64_t rows, const float* partial, float* state) {
  const int64_t ld = a.state_floats(), values = ld - kLanes;
  for (int64_t m = 0; m < rows; ++m, partial += ld, state += ld) {
    const float ours = state[values], theirs = partial[values];
    const float peak = theirs > ours ? theirs : ours;
    const float keep = ours == peak ? 1 : exp2(ours - peak), add = theirs == peak ? 1 : exp2(theirs - peak);
    state[values] = peak;
    state[values + 1] = state[values + 1] * keep + partial[values + 1] * add;
    for (int64_t i = 0; i < values; i += kLanes)
      store(state + i, fma(load<F32x16>(state + i), splat(keep), load<F32x16>(partial + i) * add));
  }
}

// The first `lanes` of a vector.
template <typename T>
void put(T* to, F32x16 v, int64_t lanes) {
  T all[kLanes];
  narrow(all, v);
  std::memcpy(to, all, static_cast<size_t>(lanes) * sizeof(T));
}

void finish(const Attention& a, const QueryBlock& block, const float* state) {
  const int64_t ld = a.state_floats(), values = ld - kLanes;
  for (int64_t m = 0; m < block.rows(a); ++m, state += ld) {
    const int64_t query = block.query(a, m), at = query * a.K;
    float total = state[values + 1], factor = 1;
    if (a.sinks) {
      const float sink = a.sinks[query % a.H] * kLog2e, peak = sink > state[values] ? sink : state[values];
      factor = exp2(state[values] - peak);
      total = total * factor + exp2(sink - peak);
    }
    for (int64_t v = 0; v * kLanes < values; ++v) {
      // Adding 0 leaves no negative one, whose sign would tell of additions of 0.
      const F32x16 out = load<F32x16>(state + v * kLanes) * factor / total + 0.0f;
      const int64_t column = a.K < kLanes ? 0 : column_of(v, a.K), lanes = min(kLanes, a.K);
      if (a.query_type == Element::kF32) {
        put(static_cast<float*>(a.out) + at + column, out, lanes);
      } else {
        put(static_cast<uint16_t*>(a.out) + at + column, out, lanes);
      }
    }
  }
}

}  // namespace
}  // namespace tenfold
