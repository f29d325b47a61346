// Functions of vectors of floats.
#pragma once

#include "vector.h"

namespace tenfold {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr float kLog2eRest = 1.92596299e-8f;  // log2(e) less kLog2e
constexpr float kLowest = -3.40282347e38f;
constexpr float kRounder = 12582912.0f;  // 1.5 · 2^23: added, it leaves the nearest integer in the low bits
const float kInfinity = __builtin_inff();

// Coefficients in descending order.
template <int N>
inline F32x16 polynomial(F32x16 x, const float (&coefficients)[N]) {
  F32x16 p = splat(coefficients[0]);
  for (int i = 1; i < N; ++i) p = fma(p, x, splat(coefficients[i]));
  return p;
}

// 2^(n + r), for |r| <= 1/2, with n in the low bits of `shifted`. The polynomial is a minimax fit of (2^r - 1) / r.
inline F32x16 power_of_two(F32x16 shifted, F32x16 r) {
  const F32x16 p = polynomial(
      r, {1.53533620e-4f, 1.33988750e-3f, 9.61843692e-3f, 5.55033237e-2f, 2.40226477e-1f, 6.93147182e-1f, 1.0f});
  return p * bit_cast<F32x16>((bit_cast<U32x16>(shifted) << 23) + (127u << 23));  // may wrap where callers select 0
}

// 2^x for x <= 0, within one unit in the last place; NaN stays NaN.
inline F32x16 exp2(F32x16 x) {
  const F32x16 shifted = x + kRounder;
  return select(x < -126.0f, F32x16{}, power_of_two(shifted, x - (shifted - kRounder)));
}

// e^x for x <= 0, likewise where multiply-adds are fused: what rounding log2(e) leaves out is added to x · log2(e) once that is near 0.
inline F32x16 exp(F32x16 x) {
  const F32x16 shifted = x * kLog2e + kRounder, n = shifted - kRounder;
  const F32x16 r = fma(x, splat(kLog2eRest), fma(x, splat(kLog2e), -1.0f * n));
  return select(x < -87.0f, F32x16{}, power_of_two(shifted, r));
}

inline float exp2(float x) {
  float s[kLanes];
  store(s, exp2(splat(x)));
  return s[0];
}

// Small arguments by an odd minimax polynomial, where (1 - e) / (1 + e) would cancel.
inline F32x16 tanh(F32x16 y) {
  const I32x16 sign = bit_cast<I32x16>(y) & static_cast<int32_t>(0x80000000u);
  const F32x16 magnitude = bit_cast<F32x16>(bit_cast<I32x16>(y) ^ sign), z = y * y;
  const F32x16 p =
      polynomial(z, {-5.89508796e-3f, 2.07959171e-2f, -5.37838154e-2f, 1.33319244e-1f, -3.33332986e-1f});
  const F32x16 small = fma(magnitude, z * p, magnitude);
  const F32x16 e = exp2(magnitude * (-2.0f * kLog2e));
  const F32x16 result = select(magnitude < 0.6f, small, (1.0f - e) / (1.0f + e));
  return bit_cast<F32x16>(bit_cast<I32x16>(result) | sign);
}

// x / (1 + e^-x)
inline F32x16 silu(F32x16 x) {
  const F32x16 e = exp(bit_cast<F32x16>(bit_cast<I32x16>(x) | static_cast<int32_t>(0x80000000u)));
  return x * select(x < 0.0f, e, splat(1.0f)) / (1.0f + e);
}

// x times the normal distribution's integral up to it, by tanh.
inline F32x16 gelu(F32x16 x) {
  return 0.5f * x * (1.0f + tanh(0.797884561f * fma(x * x * x, splat(0.044715f), x)));
}

// Lanes joined in halves, two and two, down to one.
template <typename T, class V, typename Join>
inline T join_lanes(V v, const Join& join) {
  if constexpr (kHalved<V>) {
    return join_lanes<T>(join(v.lo, v.hi), join);
  } else {
    T s[kNative];
    store(s, v);
#pragma GCC unroll 4
    for (int n = kNative / 2; n > 0; n /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) s[i] = join(s[i], s[i + n]);
    return s[0];
  }
}

inline float sum(F32x16 v) {
  return join_lanes<float>(v, [](auto a, auto b) { return a + b; });
}

inline int32_t sum(I32x16 v) {
  return join_lanes<int32_t>(v, [](auto a, auto b) { return a + b; });
}

inline float largest(F32x16 v) {
  return join_lanes<float>(v, [](auto a, auto b) { return select(b > a, b, a); });
}

}  // namespace
}  // namespace tenfold
