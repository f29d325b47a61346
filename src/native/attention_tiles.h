// The products of attention: queries with keys, and weights with values. A tile of rows by vectors stays in registers,
// beside one operand of each.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "attention.h"
#include "functions.h"
#include "vector.h"

namespace tenfold {
namespace {

// Rows of a tile, vectors of sums that it holds, groups of keys that it takes at once, and groups of values, which is
// also how far ahead lines are fetched. That is short where the second-level cache is small: the pages of a head lie at
// distances that are powers of two, and compete for few of its sets.
#if defined(__AVX512F__)
constexpr int kMaxRows = 12, kTile = 24, kPair = 2, kStep = kGroups;
#else
constexpr int kMaxRows = 6, kTile = 6, kPair = 2, kStep = 4;
#endif

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// --- arithmetics -----------------------------------------------------------------------------------------------------
//
// What the cache holds comes in words of kTogether neighbours. An arithmetic takes a vector of them apart into kParts,
// multiplies each with an operand of a query, or of the weights, and adds to 32-bit sums, which take the registers of
// kSums vectors. A row of operands is kLimbs rows of them; kOperands 32-bit words of each belong to a group of keys.

template <typename T, int N>
struct Stored {
  typedef T Type;
  static constexpr int kTogether = N;
};

struct F32 : Stored<float, 1> {
  static float widen(float x) { return x; }
  static F32x16 widen(U32x16 words, int) { return bit_cast<F32x16>(words); }
};

struct BF16 : Stored<uint16_t, 2> {
  static float widen(uint16_t x) { return bf16_to_float(x); }
  static F32x16 widen(U32x16 words, int i) { return bit_cast<F32x16>(i ? words & 0xffff0000u : words << 16); }
};

// Elements of 8 bits are codes, which the scale of their token and head multiplies; its largest one is kLargest.
struct Int8 : Stored<int8_t, 4> {
  static constexpr float kLargest = 127;
  static int8_t code(float x) { return static_cast<int8_t>(static_cast<int32_t>(x + kRounder - kRounder)); }
  static F32x16 widen(U32x16 words, int i) { return to_float(bit_cast<I32x16>(words << (24 - 8 * i)) >> 24); }
};

// e4m3fn: 4 bits of exponent, 3 of mantissa, no infinity. What it calls NaN, which is never written, reads as ±480: a
// weight of 0 removes that.
struct Fp8 : Stored<uint8_t, 4> {
  static constexpr float kLargest = 448;
  static constexpr float kNormal = 0.015625f;  // the smallest that is not subnormal, 2^-6
  static constexpr uint32_t kBias = 127 - 7;   // of a float's exponent over a code's

  static uint8_t code(float x) {
    const float magnitude = __builtin_fabsf(x);
    const uint32_t sign = bit_cast<uint32_t>(x) >> 24 & 0x80;
    // Steps of 2^-9 below the smallest normal number, and above it 3 bits of mantissa, rounded to even.
    uint32_t code = static_cast<uint32_t>(magnitude * 512 + kRounder - kRounder);
    if (magnitude >= kNormal) {
      const uint32_t bits = bit_cast<uint32_t>(magnitude);
      code = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (kBias << 3);
    }
    return static_cast<uint8_t>(sign | code);
  }

  static F32x16 widen(U32x16 words, int i) {
    const U32x16 code = words << (24 - 8 * i), bits = (code & 0x7f000000u) >> 4;
    // Right for normal numbers, and for subnormal ones; for the others each is the larger.
    const F32x16 normal = bit_cast<F32x16>(bits + (kBias << 23));
    const F32x16 subnormal = bit_cast<F32x16>(bits + ((kBias + 1) << 23)) - kNormal;
    const F32x16 magnitude = select(normal < subnormal, normal, subnormal);
    return bit_cast<F32x16>(bit_cast<U32x16>(magnitude) | (code & 0x80000000u));
  }
};

// A vector of sums for a vector of words.
struct Plain {
  typedef U32x16 Words;
  typedef uint32_t Operand;
  static Words read(const uint32_t* words) { return load<U32x16>(words); }
  template <class S>
  static S total(S sum) { return sum; }
};

// float32, whatever the cache holds.
template <class C>
struct Wide : Plain {
  typedef C Cache;
  typedef F32x16 Sum;
  static constexpr int kParts = C::kTogether, kLimbs = 1, kSums = 1;
  static constexpr int64_t kOperands = kGroup;
  static constexpr bool kFixed = false, kNarrow = false;
  static F32x16 key(U32x16 words, int part) { return C::widen(words, part); }
  static F32x16 value(U32x16 words, int part) { return C::widen(words, part); }
  static Sum dot_key(Sum sum, F32x16 k, uint32_t q) { return fma(splat(bit_cast<float>(q)), k, sum); }
  static Sum dot_value(Sum sum, F32x16 v, uint32_t p) { return fma(splat(bit_cast<float>(p)), v, sum); }
};

#if defined(__AVX512BF16__)
// bfloat16 by bfloat16, added in float32.
struct Narrow : Plain {
  typedef BF16 Cache;
  typedef F32x16 Sum;
  static constexpr int kParts = 1, kLimbs = 1, kSums = 1;
  static constexpr int64_t kOperands = kGroup / 2;
  static constexpr bool kFixed = false, kNarrow = true;
  static U32x16 key(U32x16 words, int) { return words; }
  static U32x16 value(U32x16 words, int) { return words; }
  static Sum dot_key(Sum sum, U32x16 k, uint32_t q) {
    return (Sum)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(q)), (__m512bh)k);
  }
  static Sum dot_value(Sum sum, U32x16 v, uint32_t p) { return dot_key(sum, v, p); }
};
#endif

#if defined(__AVX512VNNI__)
// int8 by fixed-point numbers of L bytes: 16 bits lose less than bfloat16 does, 24 bits about what float32 does.
template <int L>
struct Fixed : Plain {
  typedef Int8 Cache;
  typedef I32x16 Sum;
  static constexpr int kParts = 1, kLimbs = L, kSums = L;
  static constexpr int64_t kOperands = kGroup / 4;
  static constexpr bool kFixed = true, kNarrow = false;
  static constexpr int32_t kUnit = 1 << (8 * (L - 1));  // of the highest byte
  static constexpr float kLargestWeight = 255.0f * kUnit;
  static float largest_query(int64_t) { return 127.0f * kUnit; }
  // A number of a query of K to its limbs, each a row of signed bytes, the highest first.
  static void put_query(int32_t code, int64_t d, int64_t K, uint32_t* row, int32_t* biases) {
    for (int l = L - 1; l >= 0; --l) {
      const int8_t limb = static_cast<int8_t>(code);
      reinterpret_cast<int8_t*>(row)[l * K + d] = limb;
      biases[l] += 128 * limb;
      code = (code - limb) >> 8;
    }
  }
  // The weights of a group to their limbs, unsigned bytes.
  static void put_weights(U32x16 codes, uint32_t* group) {
    for (int l = 0; l < L; ++l)
      store_narrow(reinterpret_cast<uint8_t*>(group + l * kChunk), (codes >> (8 * (L - 1 - l))) & 0xffu);
  }
  // One operand has to be unsigned. Weights are; to keys 128 is added, which the biases of a query take off again.
  static U32x16 key(U32x16 words, int) { return words ^ 0x80808080u; }
  static U32x16 value(U32x16 words, int) { return words; }
  static Sum dot_key(Sum sum, U32x16 k, uint32_t q) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)k, _mm512_set1_epi32(static_cast<int>(q)));
  }
  static Sum dot_value(Sum sum, U32x16 v, uint32_t p) {
    return (Sum)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(static_cast<int>(p)), (__m512i)v);
  }
  static F32x16 join(const I32x16* limbs) {  // the highest first
    F32x16 value = to_float(limbs[0]);
    for (int l = 1; l < L; ++l) value = fma(value, splat(256.0f), to_float(limbs[l]));
    return value;
  }
};
#elif defined(__AVX2__) && !defined(__AVX512F__)
// int8 by fixed-point numbers of 16 bits, which lose less than bfloat16 does. A word becomes two pairs of numbers of 16
// bits, whose products add up in two lanes of 32. Beside the sums of a row there has to be room for the widened words.
struct Pairs {
  typedef Int8 Cache;
  typedef Halves<I32x16> Words, Sum;
  typedef uint64_t Operand;
  static constexpr int kParts = 1, kLimbs = 1, kSums = 3;
  static constexpr int64_t kOperands = kGroup / 2;
  static constexpr bool kFixed = true, kNarrow = false;
  static constexpr float kLargestWeight = 32767;
  static float largest_query(int64_t K) { return K <= 512 ? 32767 : 16383; }  // so that 32 bits hold the sum over K
  static void put_query(int32_t code, int64_t d, int64_t, uint32_t* row, int32_t*) {
    reinterpret_cast<int16_t*>(row)[d] = static_cast<int16_t>(code);
  }
  static void put_weights(U32x16 codes, uint32_t* group) { store_narrow(reinterpret_cast<uint16_t*>(group), codes); }
  static Words read(const uint32_t* words) {
    return {{widen(words), widen(words + 4)}, {widen(words + 8), widen(words + 12)}};
  }
  static Words key(Words words, int) { return words; }
  static Words value(Words words, int) { return words; }
  static Sum dot_key(Sum sum, Words k, uint64_t q) {
    const __m256i x = _mm256_set1_epi64x(static_cast<int64_t>(q));
    return {{add(sum.lo.lo, k.lo.lo, x), add(sum.lo.hi, k.lo.hi, x)},
            {add(sum.hi.lo, k.hi.lo, x), add(sum.hi.hi, k.hi.hi, x)}};
  }
  static Sum dot_value(Sum sum, Words v, uint64_t p) { return dot_key(sum, v, p); }
  static I32x16 total(Sum sum) { return {add_pairs(sum.lo), add_pairs(sum.hi)}; }
  static F32x16 join(const I32x16* limbs) { return to_float(limbs[0]); }

 private:
  typedef decltype(I32x16::lo) Half;
  static Half widen(const uint32_t* words) {
    return (Half)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
  }
  static Half add(Half sum, Half numbers, __m256i x) {
    Half total = sum + (Half)_mm256_madd_epi16((__m256i)numbers, x);
    // Compilers begin all products at once, for which there are too few registers; sum by sum there are enough.
    asm volatile("" : "+x"(total));
    return total;
  }
  static Half add_pairs(I32x16 v) {
    return (Half)_mm256_permute4x64_epi64(_mm256_hadd_epi32((__m256i)v.lo, (__m256i)v.hi), 0xd8);
  }
};
#endif

// --- tiles -----------------------------------------------------------------------------------------------------------

// Lines that will be read after those at hand: one is fetched for every line that a tile reads. Into the second-level
// cache, as the first level cannot wait for enough of them at a time to use the memory's bandwidth.
struct Ahead {
  const char* at;
  int64_t step;  // bytes from line to line
  void fetch() {
    __builtin_prefetch(at, 0, 2);
    at += step;
  }
};

template <class A>
constexpr int64_t kOperandWords = sizeof(typename A::Operand) / 4;

template <class A>
inline typename A::Operand operand(const uint32_t* from, int64_t i) {
  return load<typename A::Operand>(from + i * kOperandWords<A>);
}

template <class A, int MR, int NV>
void score_tile(const uint32_t* q, int64_t words, const uint32_t* const* keys, int64_t ldk, const Ahead* ahead,
                uint32_t* scores) {
  typename A::Sum c[MR][NV] = {};
  Ahead next[NV];
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) next[v] = ahead[v];
  for (int64_t w = 0; w < words; ++w) {
    typename A::Words b[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      b[v] = A::read(keys[v] + w * ldk);
      next[v].fetch();
    }
#pragma GCC unroll 4
    for (int part = 0; part < A::kParts; ++part) {
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const auto x = operand<A>(q, (m * words + w) * A::kParts + part);
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) c[m][v] = A::dot_key(c[m][v], A::key(b[v], part), x);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(scores + m * kChunk + v * kLanes, A::total(c[m][v]));
}

// The columns of a vector of values; the last ones overlap those before, so that no lane is past the head.
inline int64_t column_of(int64_t vector, int64_t width) { return min(vector * kLanes, width - kLanes); }

// What a tile of values takes: rows of weights, the scale of each row if they are fixed-point, and groups of values.
struct Weighted {
  const uint32_t* weights;
  const float* scales;
  const uint32_t* const* values;
  const Ahead* next;  // what is fetched for each group
  int64_t lines;      // of a group
  int64_t groups;
  int64_t width;    // words of a row of values
  int64_t vectors;  // of a row of values
};

// acc[R][NV] += weights[R] · values, for the NV vectors of columns from `first` on.
template <class A, int R, int NV>
void value_tile(const Weighted& t, int64_t first, float* acc, int64_t ld_acc) {
  constexpr int MR = R * A::kLimbs, kWords = kGroup / A::Cache::kTogether;
  typename A::Sum c[MR][NV] = {};
  if constexpr (!A::kFixed) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) c[m][v] = load<F32x16>(acc + m * ld_acc + v * kLanes);
  }
  int64_t column[NV];
  for (int v = 0; v < NV; ++v) column[v] = column_of(first + v, t.width);
  const uint32_t* weights = t.weights;
  // Lines are fetched in the order of addresses, although values are read column by column.
  const int64_t fetched = first * t.groups * kWords;
  int64_t group = fetched / t.lines, line = fetched % t.lines;
  for (int64_t g = 0; g < t.groups; ++g) {
    const uint32_t* from = t.values[g];
    Ahead next = t.next[min(group, t.groups - 1)];
    next.at += line * next.step;
    line += kWords * NV;
    if (line >= t.lines) {
      ++group;
      line = 0;
    }
    for (int w = 0; w < kWords; ++w, from += t.width, weights += A::kParts * kOperandWords<A>) {
      typename A::Words b[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        b[v] = A::read(from + column[v]);
        next.fetch();
      }
#pragma GCC unroll 4
      for (int part = 0; part < A::kParts; ++part) {
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          const auto x = operand<A>(weights + m * kChunk, part);
#pragma GCC unroll 8
          for (int v = 0; v < NV; ++v) c[m][v] = A::dot_value(c[m][v], A::value(b[v], part), x);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < R; ++m) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      float* to = acc + m * ld_acc + v * kLanes;
      if constexpr (A::kFixed) {
        I32x16 limbs[A::kLimbs];
#pragma GCC unroll 3
        for (int l = 0; l < A::kLimbs; ++l) limbs[l] = A::total(c[m * A::kLimbs + l][v]);
        store(to, fma(A::join(limbs), splat(t.scales[m]), load<F32x16>(to)));
      } else {
        store(to, c[m][v]);
      }
    }
  }
}

// Vectors of columns beside `rows` rows: few rows take many, so that chains of additions overlap.
constexpr int vectors_for(int rows) {
  int n = 8;
  while (n > 1 && n * rows > kTile) n /= 2;
  return n;
}

template <class A, int R, int NV>
void value_columns(const Weighted& t, int64_t first, float* acc, int64_t ld_acc) {
  for (; first + NV <= t.vectors; first += NV) value_tile<A, R, NV>(t, first, acc + first * kLanes, ld_acc);
  if constexpr (NV > 1) {
    if (first < t.vectors) value_columns<A, R, NV / 2>(t, first, acc, ld_acc);
  }
}

// Calls body with the compile-time number of rows that `rows` is.
template <int R, typename Body>
inline void with_rows(int64_t rows, const Body& body) {
  if constexpr (R > 0) {
    if (rows == R) return body.template operator()<R>();
    with_rows<R - 1>(rows, body);
  }
}

}  // namespace
}  // namespace tenfold
