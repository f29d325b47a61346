// Sixteen lanes on every machine: the compiler splits them where registers are narrower.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace tenfold {
namespace {

constexpr int kLanes = 16;

typedef float F32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));

template <typename V, typename T>
inline V load(const T* p) {
  V v;
  static_assert(sizeof(V) == 64, "vectors are 64 bytes");
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V, typename T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

// a · b + c, rounded once where the machine can. Compiled without contraction (-ffp-contract=off): which products a
// compiler fuses would otherwise depend on the shape of a tile, and with it the last bits of a result.
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
#if defined(__AVX512F__)
  return (F32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  union { F32x16 whole; __m256 half[2]; } x{a}, y{b}, z{c};
  for (int i = 0; i < 2; ++i) z.half[i] = _mm256_fmadd_ps(x.half[i], y.half[i], z.half[i]);
  return z.whole;
#elif defined(__aarch64__)
  union { F32x16 whole; float32x4_t quarter[4]; } x{a}, y{b}, z{c};
  for (int i = 0; i < 4; ++i) z.quarter[i] = vfmaq_f32(z.quarter[i], x.quarter[i], y.quarter[i]);
  return z.whole;
#else
  return a * b + c;
#endif
}

inline F32x16 splat(float v) { return v - F32x16{}; }  // unlike 0 + v, that is v for every v

inline F32x16 to_float(I32x16 v) { return __builtin_convertvector(v, F32x16); }

template <typename To, typename From>
inline To bit_cast(From v) {
  To to;
  static_assert(sizeof(To) == sizeof(From), "only bits are copied");
  std::memcpy(&to, &v, sizeof(To));
  return to;
}

// bfloat16 is the upper half of a float32.
inline float bf16_to_float(uint16_t v) { return bit_cast<float>(static_cast<uint32_t>(v) << 16); }

// Rounds to the nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  const uint32_t bits = bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace
}  // namespace tenfold
