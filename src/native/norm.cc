// The inner loop of normalisations; compiled once per instruction set.
#include "kernels.h"
#include "lanes.h"
#include "vector.h"

#ifndef TENFOLD_INSTRUCTION_SET
#error "TENFOLD_INSTRUCTION_SET names what this is compiled for, such as avx2"
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

inline float number(float x) { return x; }
inline float number(uint16_t x) { return bf16_to_float(x); }

// The sum of all lanes, in order.
inline float total(F32x16 v) {
  float lanes[kLanes], sum = 0;
  store(lanes, v);
  for (const float each : lanes) sum += each;
  return sum;
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
    const F32x16 v = widen_part(x + d, D - d);
    squares = fma(v, v, squares);
  }
  const F32x16 scale = splat(1.0f / __builtin_sqrtf(total(squares) / static_cast<float>(D) + eps));
  const auto scaled = [&](T* to, F32x16 v, F32x16 w) {
    narrow(to, weight_last ? rounded(v * scale, unused) * w : v * scale * (w + offset));
  };
  for_lanes(D, out, scaled, x, weight);
}

// Calls body(deviations from the mean) for every 16 neighbours; those past the last value are 0.
template <typename T, typename Body>
inline void for_deviations(const T* x, int64_t D, float mean, const Body& body) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) body(widen(x + d) - mean);
  if (d < D) {
    float rest[kLanes] = {};
    for (int64_t i = 0; i < D - d; ++i) rest[i] = number(x[d + i]) - mean;
    body(load<F32x16>(rest));
  }
}

template <typename T>
void layer_norm(const T* x, const T* weight, const T* bias, int64_t D, float eps, T* out) {
  F32x16 sums{}, squares{};
  for_deviations(x, D, 0.0f, [&](F32x16 v) { sums += v; });
  const float mean = total(sums) / static_cast<float>(D);
  for_deviations(x, D, mean, [&](F32x16 v) { squares = fma(v, v, squares); });
  const F32x16 scale = splat(1.0f / __builtin_sqrtf(total(squares) / static_cast<float>(D) + eps));
  const auto scaled = [&](T* to, F32x16 v, F32x16 w, F32x16 b) { narrow(to, fma((v - mean) * scale, w, b)); };
  for_lanes(D, out, scaled, x, weight, bias);
}

}  // namespace

#define TENFOLD_JOIN_(a, b) a##b
#define TENFOLD_JOIN(a, b) TENFOLD_JOIN_(a, b)

const NormKernels TENFOLD_JOIN(TENFOLD_INSTRUCTION_SET, _norms) = {rms_norm<float>, rms_norm<uint16_t>, layer_norm<float>,
                                                                 layer_norm<uint16_t>};

}  // namespace tenfold
