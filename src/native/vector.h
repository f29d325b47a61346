// Sixteen lanes on every machine. Where registers are narrower, a vector is a pair of halves, each a vector by itself:
// compilers keep those in registers, and what they themselves would split they send through memory.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace tenfold {
namespace {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kNative = 16;  // lanes of a register
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif

// N elements in one register.
template <typename T, int N>
struct Register {
  typedef T Type __attribute__((vector_size(sizeof(T) * N)));
};

template <class V>
struct Halves {
  V lo, hi;
};

template <typename T, int N>
struct Vector {
  typedef Halves<typename Vector<T, N / 2>::Type> Type;
};
template <typename T>
struct Vector<T, kNative> {
  typedef typename Register<T, kNative>::Type Type;
};

typedef Vector<float, kLanes>::Type F32x16;
typedef Vector<int32_t, kLanes>::Type I32x16;
typedef Vector<uint32_t, kLanes>::Type U32x16;

// --- operators of halves ---------------------------------------------------------------------------------------------

template <class V>
constexpr bool kHalved = false;
template <class V>
constexpr bool kHalved<Halves<V>> = true;

template <typename S>
constexpr bool kScalar = std::is_arithmetic_v<S>;

#define TENFOLD_BINARY(op)                                                         \
  template <class V>                                                               \
  inline auto operator op(Halves<V> a, Halves<V> b) {                              \
    return Halves<decltype(a.lo op b.lo)>{a.lo op b.lo, a.hi op b.hi};             \
  }                                                                                \
  template <class V, typename S, std::enable_if_t<kScalar<S>, int> = 0>            \
  inline auto operator op(Halves<V> a, S b) {                                      \
    return Halves<decltype(a.lo op b)>{a.lo op b, a.hi op b};                      \
  }                                                                                \
  template <class V, typename S, std::enable_if_t<kScalar<S>, int> = 0>            \
  inline auto operator op(S a, Halves<V> b) {                                      \
    return Halves<decltype(a op b.lo)>{a op b.lo, a op b.hi};                      \
  }
TENFOLD_BINARY(+)
TENFOLD_BINARY(-)
TENFOLD_BINARY(*)
TENFOLD_BINARY(/)
TENFOLD_BINARY(&)
TENFOLD_BINARY(|)
TENFOLD_BINARY(^)
TENFOLD_BINARY(<<)
TENFOLD_BINARY(>>)
TENFOLD_BINARY(<)
TENFOLD_BINARY(>)
TENFOLD_BINARY(>=)
#undef TENFOLD_BINARY

template <class V, typename B>
inline Halves<V>& operator+=(Halves<V>& a, const B& b) { return a = a + b; }
template <class V, typename B>
inline Halves<V>& operator*=(Halves<V>& a, const B& b) { return a = a * b; }

// Lane by lane, a where the mask is set and b elsewhere.
template <class M, class V>
inline V select(M mask, V a, V b) {
  if constexpr (kHalved<V>)
    return {select(mask.lo, a.lo, b.lo), select(mask.hi, a.hi, b.hi)};
  else
    return mask ? a : b;
}

// --- memory and conversions ------------------------------------------------------------------------------------------

template <class V, typename T>
inline V load(const T* p) {
  if constexpr (kHalved<V>) {
    typedef decltype(V::lo) Half;
    const char* at = reinterpret_cast<const char*>(p);
    return {load<Half>(at), load<Half>(at + sizeof(Half))};
  } else {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
  }
}

template <class V, typename T>
inline void store(T* p, V v) {
  if constexpr (kHalved<V>) {
    char* at = reinterpret_cast<char*>(p);
    store(at, v.lo);
    store(at + sizeof(v.lo), v.hi);
  } else {
    std::memcpy(p, &v, sizeof(V));
  }
}

template <class To, class From>
inline To bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From), "only bits are copied");
  if constexpr (kHalved<From>) {
    typedef decltype(To::lo) Half;
    return {bit_cast<Half>(v.lo), bit_cast<Half>(v.hi)};
  } else {
    To to;
    std::memcpy(&to, &v, sizeof(To));
    return to;
  }
}

// Each lane as another type of number; floats are cut off to integers.
template <class To, class From>
inline To convert(From v) {
  if constexpr (kHalved<From>) {
    typedef decltype(To::lo) Half;
    return {convert<Half>(v.lo), convert<Half>(v.hi)};
  } else {
    return __builtin_convertvector(v, To);
  }
}

inline F32x16 to_float(I32x16 v) { return convert<F32x16>(v); }

// Lanes from neighbours of a narrower type T, and the low bits of lanes to such.
template <class V, typename T>
inline V load_narrow(const T* p) {
  if constexpr (kHalved<V>) {
    typedef decltype(V::lo) Half;
    return {load_narrow<Half>(p), load_narrow<Half>(p + sizeof(Half) / 4)};
  } else {
    return __builtin_convertvector(load<typename Register<T, kNative>::Type>(p), V);
  }
}

template <class V, typename T>
inline void store_narrow(T* p, V v) {
  if constexpr (kHalved<V>) {
    store_narrow(p, v.lo);
    store_narrow(p + sizeof(v.lo) / 4, v.hi);
  } else {
#if defined(__AVX2__) && !defined(__AVX512F__)
    // Compilers would move these lane by lane.
    if constexpr (sizeof(T) == 1) {
      const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                             0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
      const __m256i bytes = _mm256_shuffle_epi8((__m256i)v, first);
      const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(p), both);
    } else {
      const __m256i first = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                             0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
      const __m256i pairs = _mm256_permute4x64_epi64(_mm256_shuffle_epi8((__m256i)v, first), 0x08);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(pairs));
    }
#else
    store(p, __builtin_convertvector(v, typename Register<T, kNative>::Type));
#endif
  }
}

template <class V = F32x16>
inline V splat(float v) {
  if constexpr (kHalved<V>)
    return {splat<decltype(V::lo)>(v), splat<decltype(V::lo)>(v)};
  else
    return v - V{};  // unlike 0 + v, that is v for every v
}

// --- arithmetic ------------------------------------------------------------------------------------------------------

// a · b + c, rounded once where the machine can. Compiled without contraction (-ffp-contract=off): which products a
// compiler fuses would otherwise depend on the shape of a tile, and with it the last bits of a result.
template <class V>
inline V fma(V a, V b, V c) {
  if constexpr (kHalved<V>)
    return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
  else
#if defined(__AVX512F__)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// bfloat16 is the upper half of a float32.
inline float bf16_to_float(uint16_t v) { return bit_cast<float>(static_cast<uint32_t>(v) << 16); }

// Rounds to the nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  const uint32_t bits = bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Sixteen numbers, widened to float32.
inline F32x16 widen(const float* x) { return load<F32x16>(x); }
inline F32x16 widen(const uint16_t* x) { return bit_cast<F32x16>(load_narrow<U32x16>(x) << 16); }

// Sixteen numbers, rounded as `float_to_bf16` does where they are narrower.
inline void narrow(float* to, F32x16 v) { store(to, v); }
inline void narrow(uint16_t* to, F32x16 v) {
  const U32x16 bits = bit_cast<U32x16>(v);
  const U32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  store_narrow(to, select((bits & 0x7fffffffu) > 0x7f800000u, quiet, rounded));
}

}  // namespace
}  // namespace tenfold
