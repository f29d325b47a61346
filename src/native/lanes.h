// Arrays of any length, sixteen values at a time.
#pragma once

#include <cstring>

#include "vector.h"

namespace tenfold {
namespace {

// The first n < 16 values and zeros.
template <typename T>
inline F32x16 widen_part(const T* x, int64_t n) {
  T part[kLanes] = {};
  std::memcpy(part, x, static_cast<size_t>(n) * sizeof(T));
  return widen(part);
}

// Calls body(where they go, a vector of each input...) for every 16 neighbours; the last are padded with zeros.
template <typename T, typename Body, typename... Inputs>
inline void for_lanes(int64_t D, T* out, const Body& body, const Inputs*... inputs) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) body(out + d, widen(inputs + d)...);
  if (d < D) {
    T result[kLanes];
    body(result, widen_part(inputs + d, D - d)...);
    std::memcpy(out + d, result, static_cast<size_t>(D - d) * sizeof(T));
  }
}

}  // namespace
}  // namespace tenfold
