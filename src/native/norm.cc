// The inner loop of normalisations; compiled once per instruction set.
#include "kernels.h"
#include "vector.h"

#ifndef TENFOLD_INSTRUCTION_SET
#error "TENFOLD_INSTRUCTION_SET names what this is compiled for: baseline, avx2 or avx512"
#endif

namespace tenfold {
namespace {

// To T's precision and back.
inline F32x16 rounded(F32x16 v, const float*) { return v; }
inline F32x16 rounded(F32x16 v, const uint16_t*) {
  uint16_t half[kLanes];
  narrow(half, v);
  return widen(half);
}

// Calls body(vector of x, vector of weights, where they go) for every 16 neighbours; the last are padded with zeros.
template <typename T, typename Body>
inline void for_lanes(const T* x, const T* w, T* out, int64_t D, const Body& body) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) body(widen(x + d), widen(w + d), out + d);
  if (d < D) {
    T part[kLanes] = {}, weights[kLanes] = {}, result[kLanes];
    const size_t bytes = static_cast<size_t>(D - d) * sizeof(T);
    std::memcpy(part, x + d, bytes);
    std::memcpy(weights, w + d, bytes);
    body(widen(part), widen(weights), result);
    std::memcpy(out + d, result, bytes);
  }
}

template <typename T>
void rms_norm(const T* x, const T* weight, int64_t D, float eps, float offset, bool weight_last, T* out) {
  F32x16 squares{};
  T unused[kLanes];
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    const F32x16 v = widen(x + d);
    squares = fma(v, v, squares);
  }
  if (d < D) {
    T part[kLanes] = {};
    std::memcpy(part, x + d, static_cast<size_t>(D - d) * sizeof(T));
    const F32x16 v = widen(part);
    squares = fma(v, v, squares);
  }
  float lanes[kLanes], sum = 0;
  store(lanes, squares);
  for (const float each : lanes) sum += each;
  const F32x16 scale = splat(1.0f / __builtin_sqrtf(sum / static_cast<float>(D) + eps));
  for_lanes(x, weight, out, D, [&](F32x16 v, F32x16 w, T* to) {
    narrow(to, weight_last ? rounded(v * scale, unused) * w : v * scale * (w + offset));
  });
}

}  // namespace

#define TENFOLD_JOIN_(a, b) a##b
#define TENFOLD_JOIN(a, b) TENFOLD_JOIN_(a, b)

const NormKernels TENFOLD_JOIN(TENFOLD_INSTRUCTION_SET, _norms) = {rms_norm<float>, rms_norm<uint16_t>};

}  // namespace tenfold
