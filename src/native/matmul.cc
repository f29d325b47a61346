// The inner loops of matrix products; compiled once per instruction set.
#include "functions.h"
#include "kernels.h"
#include "vector.h"

#ifndef TENFOLD_INSTRUCTION_SET
#error "TENFOLD_INSTRUCTION_SET names what this is compiled for, such as avx2"
#endif

namespace tenfold {
namespace {

// A tile of MR rows by kVectors<MR> vectors of columns stays in registers, beside as many of weights and one broadcast.
// Few rows take all columns of a panel at once, so that the memory never waits for a second pass over what came from it.
#if defined(__AVX512F__)
constexpr int kMaxRows = 12;
template <int MR>
constexpr int kVectors = 2;
#else
constexpr int kMaxRows = 6;
template <int MR>
constexpr int kVectors = MR <= 3 ? 2 : 1;
#endif

constexpr int64_t kInputs = 2048;   // inputs per pass: a panel's part of this length stays in the second-level cache
constexpr int64_t kAhead = 2048;  // bytes; the hardware's own prefetching alone leaves a tenth of the bandwidth unused

inline void prefetch(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kAhead, 0, 3); }

// --- multiply and add ------------------------------------------------------------------------------------------------

inline F32x16 dot_bf16(F32x16 acc, U32x16 w, uint32_t x) {
#if defined(__AVX512BF16__)
  return (F32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)), (__m512bh)w);
#else
  const U32x16 pair = U32x16{} + x;  // taken apart in the vector: shorter than two broadcasts of parts
  acc = fma(bit_cast<F32x16>(pair << 16), bit_cast<F32x16>(w << 16), acc);
  return fma(bit_cast<F32x16>(pair & 0xffff0000u), bit_cast<F32x16>(w & 0xffff0000u), acc);
#endif
}

// acc += Σ over four neighbours of code (unsigned) times x (signed).
inline I32x16 dot_int8(I32x16 acc, U32x16 w, int32_t x) {
#if defined(__AVX512VNNI__)
  return (I32x16)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(x));
#else
  for (int i = 0; i < 4; ++i) {
    acc += bit_cast<I32x16>((w >> (8 * i)) & 0xffu) * static_cast<int32_t>(static_cast<int8_t>(x >> (8 * i)));
  }
  return acc;
#endif
}

// --- tiles -----------------------------------------------------------------------------------------------------------

template <int MR, int NV>
void tile_f32(const float* x, int64_t ldx, int64_t K, const float* w, float* acc) {
  F32x16 c[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) c[m][v] = load<F32x16>(acc + m * kPanel + v * kLanes);
  for (int64_t k = 0; k < K; ++k) {
    F32x16 b[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      b[v] = load<F32x16>(w + k * kPanel + v * kLanes);
      prefetch(w + k * kPanel + v * kLanes);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const F32x16 a = splat(x[m * ldx + k]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) c[m][v] = fma(a, b[v], c[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(acc + m * kPanel + v * kLanes, c[m][v]);
}

template <int MR, int NV>
void tile_bf16(const uint16_t* x, int64_t ldx, int64_t K, const uint16_t* w, float* acc) {
  F32x16 c[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) c[m][v] = load<F32x16>(acc + m * kPanel + v * kLanes);
  for (int64_t k = 0; k + 1 < K; k += 2) {
    U32x16 b[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      b[v] = load<U32x16>(w + k * kPanel + 2 * v * kLanes);
      prefetch(w + k * kPanel + 2 * v * kLanes);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      uint32_t a;
      std::memcpy(&a, x + m * ldx + k, sizeof(a));
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) c[m][v] = dot_bf16(c[m][v], b[v], a);
    }
  }
  if (K % 2) {
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v)
        c[m][v] = dot_bf16(c[m][v], load<U32x16>(w + (K - 1) * kPanel + 2 * v * kLanes), x[m * ldx + K - 1]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(acc + m * kPanel + v * kLanes, c[m][v]);
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// Codes are taken in halves of 4 bits, whose products with x, two and two, can be added up eight times in 16 bits:
// 8 · 2 · 15 · 127 < 2^15. So there are two instructions for 32 products of 4 bits, and four for those of 8.
constexpr int64_t kSummed = 32;  // inputs that are added up in 16 bits

inline __m256i load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

inline __m256i broadcast_four(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, sizeof(four));
  return _mm256_set1_epi32(four);
}

// sum += product, of 16 bits. Compilers would begin all products at once, for which there are too few registers; in the
// order of what is volatile there are enough.
inline void add_in_turn(__m256i& sum, __m256i product) {
  __m256i next = sum;  // an operand of asm must not be an element of an array, which would then stay in memory
  asm volatile("vpaddw %1, %0, %0" : "+x"(next) : "x"(product));
  sum = next;
}

// The quarter q of the 32 columns of a row, or of 16 columns the half.
template <int NV>
inline void add_quarter(I32x16 (&row)[NV], int q, __m256i v) {
  auto& sum = q % 2 ? row[q / 2].hi : row[q / 2].lo;
  sum += (decltype(row[0].lo))v;
}

// c[m] += Σ over a group of codes times x.
template <int MR, int kBits, int NV>
void sum_codes(const int8_t* x, int64_t ldx, int64_t group, const uint8_t* w, I32x16 (&c)[MR][NV]) {
  constexpr int kParts = 8 / kBits, kInputs = 4 * kParts;        // inputs of one 32-bit lane
  constexpr int kTogether = MR == 1 ? 2 * NV : MR <= (kBits == 4 ? 4 : 2) ? 2 : 1;  // quarters of the columns at a time
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
  for (int64_t begin = 0; begin < group; begin += kSummed) {
    const int64_t end = begin + kSummed < group ? begin + kSummed : group;
#pragma GCC unroll 4
    for (int first = 0; first < 2 * NV; first += kTogether) {
      __m256i lows[MR][kTogether], highs[MR][kTogether];
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
        for (int q = 0; q < kTogether; ++q) lows[m][q] = highs[m][q] = _mm256_setzero_si256();
      for (int64_t k = begin; k < end; k += kInputs) {
        __m256i a[kTogether], b[kTogether];
#pragma GCC unroll 4
        for (int q = 0; q < kTogether; ++q) {
          const uint8_t* at = w + k / kParts * kPanel + 32 * (first + q);
          const __m256i both = load_bytes(at);
          prefetch(at);
          a[q] = _mm256_and_si256(both, low);
          b[q] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        }
#pragma GCC unroll 16
        for (int m = 0; m < MR; ++m) {
          const int8_t* from = x + m * ldx + k;
          const __m256i of_a = broadcast_four(from), of_b = broadcast_four(from + 4 * (kParts - 1));
#pragma GCC unroll 4
          for (int q = 0; q < kTogether; ++q) {
            add_in_turn(lows[m][q], _mm256_maddubs_epi16(a[q], of_a));
            add_in_turn(kBits == 4 ? lows[m][q] : highs[m][q], _mm256_maddubs_epi16(b[q], of_b));
          }
        }
      }
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 4
        for (int q = 0; q < kTogether; ++q) {
          add_quarter(c[m], first + q, _mm256_madd_epi16(lows[m][q], ones));
          if (kBits == 8) add_quarter(c[m], first + q, _mm256_madd_epi16(highs[m][q], sixteen));
        }
      }
    }
  }
}

// As `sum_codes`, of codes below 16 that have a byte each, in the order of the 8-bit layout.
template <int MR, int NV>
void sum_widened(const int8_t* x, int64_t ldx, int64_t group, const uint8_t* w, I32x16 (&c)[MR][NV]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t begin = 0; begin < group; begin += kSummed) {
    const int64_t end = begin + kSummed < group ? begin + kSummed : group;
    __m256i sums[MR][2 * NV];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int q = 0; q < 2 * NV; ++q) sums[m][q] = _mm256_setzero_si256();
    for (int64_t k = begin; k < end; k += 4) {
      __m256i b[2 * NV];
#pragma GCC unroll 4
      for (int q = 0; q < 2 * NV; ++q) b[q] = load_bytes(w + k * kPanel + 32 * q);
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        const __m256i a = broadcast_four(x + m * ldx + k);
#pragma GCC unroll 4
        for (int q = 0; q < 2 * NV; ++q) add_in_turn(sums[m][q], _mm256_maddubs_epi16(b[q], a));
      }
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int q = 0; q < 2 * NV; ++q) add_quarter(c[m], q, _mm256_madd_epi16(sums[m][q], ones));
  }
}
#else
// c[m][v] += Σ over a group of codes times x.
template <int MR, int kBits, int NV>
void sum_codes(const int8_t* x, int64_t ldx, int64_t group, const uint8_t* w, I32x16 (&c)[MR][NV]) {
  constexpr int kParts = 8 / kBits;  // codes of a byte
  for (int64_t k = 0; k < group; k += 4 * kParts) {
    U32x16 b[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      b[v] = load<U32x16>(w + k / kParts * kPanel + 4 * v * kLanes);
      prefetch(w + k / kParts * kPanel + 4 * v * kLanes);
    }
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      U32x16 codes[NV];
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) codes[v] = kParts == 1 ? b[v] : (b[v] >> (4 * part)) & 0x0f0f0f0fu;
#pragma GCC unroll 16
      for (int m = 0; m < MR; ++m) {
        int32_t a;
        std::memcpy(&a, x + m * ldx + k + 4 * part, sizeof(a));
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) c[m][v] = dot_int8(c[m][v], codes[v], a);
      }
    }
  }
}

// As `sum_codes`, of codes below 16 that have a byte each, in the order of the 8-bit layout.
template <int MR, int NV>
void sum_widened(const int8_t* x, int64_t ldx, int64_t group, const uint8_t* w, I32x16 (&c)[MR][NV]) {
  sum_codes<MR, 8>(x, ldx, group, w, c);
}
#endif

// One group of `group` inputs: acc += x's scale · (weights' scale · Σ codes − min · Σ x). The codes have 8 bits, or 4.
template <int MR, int NV, int kBits, bool kWidened>
void tile_codes(const int8_t* x, int64_t ldx, const float* x_scales, const int32_t* x_sums, int64_t ld_groups,
                int64_t group, const uint8_t* w, const float* scales, const float* mins, int32_t zero, float* acc) {
  I32x16 c[MR][NV];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
    const int32_t start = mins ? 0 : -zero * x_sums[m * ld_groups];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) c[m][v] = I32x16{} + start;
  }
  if constexpr (kWidened)
    sum_widened(x, ldx, group, w, c);
  else
    sum_codes<MR, kBits>(x, ldx, group, w, c);
#pragma GCC unroll 2
  for (int v = 0; v < NV; ++v) {
    const F32x16 scale = load<F32x16>(scales + v * kLanes);
    const F32x16 min = mins ? load<F32x16>(mins + v * kLanes) : F32x16{};
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      float* out = acc + m * kPanel + v * kLanes;
      F32x16 part = to_float(c[m][v]) * scale;
      if (mins) part = fma(min, splat(static_cast<float>(-x_sums[m * ld_groups])), part);
      store(out, fma(part, splat(x_scales[m * ld_groups]), load<F32x16>(out)));
    }
  }
}

// --- rows of tiles ---------------------------------------------------------------------------------------------------

// Calls body with the compile-time number of rows that `rows` is.
template <int MR, typename Body>
inline void with_rows(int64_t rows, const Body& body) {
  if constexpr (MR > 0) {
    if (rows == MR) return body.template operator()<MR>();
    with_rows<MR - 1>(rows, body);
  }
}

// Splits M rows into tiles of nearly equal height: 13 rows are 7 and 6, not 12 and 1.
template <typename Body>
inline void for_tiles(int64_t M, const Body& body) {
  const int64_t tiles = (M + kMaxRows - 1) / kMaxRows;
  for (int64_t t = 0, m = 0; t < tiles; ++t) {
    const int64_t rows = (M - m + tiles - t - 1) / (tiles - t);
    with_rows<kMaxRows>(rows, [&]<int MR>() { body.template operator()<MR>(m); });
    m += rows;
  }
}

template <int NV, typename Body>
inline void for_columns(const Body& body) {
  for (int64_t column = 0; column < kPanel; column += NV * kLanes) body(column);
}

void clear(float* acc, int64_t M) { std::memset(acc, 0, static_cast<size_t>(M * kPanel) * sizeof(float)); }

void product_f32(const float* x, int64_t ldx, int64_t M, int64_t K, const float* panel, float* acc) {
  clear(acc, M);
  for (int64_t k = 0; k < K; k += kInputs) {
    const int64_t part = K - k < kInputs ? K - k : kInputs;
    for_tiles(M, [&]<int MR>(int64_t m) {
      for_columns<kVectors<MR>>([&](int64_t column) {
        tile_f32<MR, kVectors<MR>>(x + m * ldx + k, ldx, part, panel + k * kPanel + column, acc + m * kPanel + column);
      });
    });
  }
}

// Weights in bfloat16 by arithmetic in float32: both are widened, some at a time, into the first-level cache.
template <typename T>
void product_widened(const T* x, int64_t ldx, int64_t M, int64_t K, const uint16_t* panel, float* acc) {
  constexpr bool kNarrowRows = sizeof(T) == 2;
  constexpr int64_t kPart = 128, kRows = 2 * kMaxRows;  // inputs and rows at a time
  alignas(64) float wide[kPart * kPanel];
  alignas(64) float rows[kNarrowRows ? kRows * kPart : 1];
  clear(acc, M);
  for (int64_t k = 0; k < K; k += kPart) {
    const int64_t part = K - k < kPart ? K - k : kPart;
    for (int64_t i = 0; i < part; i += 2) {
      for (int64_t column = 0; column < kPanel; column += kLanes) {
        const uint16_t* at = panel + (k + i) * kPanel + 2 * column;
        prefetch(at);
        const U32x16 pair = load<U32x16>(at);
        store(wide + i * kPanel + column, pair << 16);
        store(wide + (i + 1) * kPanel + column, pair & 0xffff0000u);
      }
    }
    const auto add = [&](const float* from, int64_t ld, int64_t count, float* to) {
      for_tiles(count, [&]<int MR>(int64_t m) {
        for_columns<kVectors<MR>>([&](int64_t column) {
          tile_f32<MR, kVectors<MR>>(from + m * ld, ld, part, wide + column, to + m * kPanel + column);
        });
      });
    };
    if constexpr (kNarrowRows) {
      for (int64_t m = 0; m < M; m += kRows) {
        const int64_t count = M - m < kRows ? M - m : kRows;
        for (int64_t r = 0; r < count; ++r)
          for (int64_t i = 0; i < part; ++i) rows[r * kPart + i] = bf16_to_float(x[(m + r) * ldx + k + i]);
        add(rows, kPart, count, acc + m * kPanel);
      }
    } else {
      add(x + k, ldx, M, acc);
    }
  }
}

void product_bf16(const uint16_t* x, int64_t ldx, int64_t M, int64_t K, const uint16_t* panel, float* acc) {
#if !defined(__AVX512BF16__)
  if (M > 2) return product_widened(x, ldx, M, K, panel, acc);  // few enough would widen each operand but once
#endif
  clear(acc, M);
  for (int64_t k = 0; k < K; k += kInputs) {
    const int64_t part = K - k < kInputs ? K - k : kInputs;
    for_tiles(M, [&]<int MR>(int64_t m) {
      for_columns<kVectors<MR>>([&](int64_t column) {
        tile_bf16<MR, kVectors<MR>>(x + m * ldx + k, ldx, part, panel + k * kPanel + 2 * column,
                                acc + m * kPanel + column);
      });
    });
  }
}

// Nibbles to bytes, in the order of the 8-bit layout.
void widen_int4(const uint8_t* codes, int64_t inputs, uint8_t* wide) {
  for (int64_t k = 0; k < inputs; k += 8) {
    for (int64_t column = 0; column < kPanel; column += kLanes) {
      const uint8_t* at = codes + k / 2 * kPanel + 4 * column;
      prefetch(at);
      const U32x16 both = load<U32x16>(at);
      store(wide + k * kPanel + 4 * column, both & 0x0f0f0f0fu);
      store(wide + (k + 4) * kPanel + 4 * column, (both >> 4) & 0x0f0f0f0fu);
    }
  }
}

void product_quantized(const QuantizedRows& x, int64_t M, int64_t K, const QuantizedPanel& panel, float* acc) {
  alignas(64) uint8_t wide[128 * kPanel];
  const int64_t groups = K / x.group;
  clear(acc, M);
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t k = g * x.group;
    const int64_t of = k / panel.group * kPanel;  // the weights' group
    const auto add = [&]<int kBits, bool kWidened>(const uint8_t* codes) {
      for_tiles(M, [&]<int MR>(int64_t m) {
        constexpr int NV = kVectors<MR>;
        for_columns<NV>([&](int64_t column) {
          tile_codes<MR, NV, kBits, kWidened>(x.codes + m * K + k, K, x.scales + m * groups + g, x.sums + m * groups + g,
                                              groups, x.group, codes + 4 * column, panel.scales + of + column,
                                              panel.mins ? panel.mins + of + column : nullptr, panel.zero,
                                              acc + m * kPanel + column);
        });
      });
    };
    if (panel.bits == 8) {
      add.template operator()<8, false>(panel.codes + k * kPanel);
    } else if (M <= kMaxRows) {  // one tile: each code is used once after it is taken apart
      add.template operator()<4, false>(panel.codes + k / 2 * kPanel);
    } else {
      widen_int4(panel.codes + k / 2 * kPanel, x.group, wide);
      add.template operator()<4, true>(wide);
    }
  }
}

// --- activations and outputs -----------------------------------------------------------------------------------------

template <typename T>
void quantize(const T* x, int64_t K, int64_t group, int8_t* codes, float* scales, int32_t* sums) {
  F32x16 values[128 / kLanes];  // of one group; 0 where there are no inputs
  const int64_t padded = (K + group - 1) / group * group, vectors = (group + kLanes - 1) / kLanes;
  for (int64_t start = 0; start < padded; start += group) {
    const int64_t count = start + group < K ? group : K - start;
    F32x16 peaks{}, finite{};
    for (int64_t i = 0; i < vectors; ++i) {
      const int64_t left = count - i * kLanes;
      if (left >= kLanes) {
        values[i] = widen(x + start + i * kLanes);
      } else {
        T part[kLanes] = {};
        if (left > 0) std::memcpy(part, x + start + i * kLanes, static_cast<size_t>(left) * sizeof(T));
        values[i] = widen(part);
      }
      const F32x16 magnitudes = bit_cast<F32x16>(bit_cast<U32x16>(values[i]) & 0x7fffffffu);
      peaks = select(magnitudes > peaks, magnitudes, peaks);
      finite += values[i] * 0.0f;
    }
    // What is not finite must not become a harmless number: a scale of NaN makes the outputs NaN.
    const float peak = largest(peaks), broken = sum(finite);
    const float inverse = peak > 0 && broken == 0 ? 127.0f / peak : 0;
    I32x16 total{};
    for (int64_t i = 0; i < vectors; ++i) {
      const F32x16 scaled = values[i] * inverse;
      const F32x16 half = bit_cast<F32x16>((bit_cast<U32x16>(scaled) & 0x80000000u) | 0x3f000000u);
      const I32x16 rounded = inverse > 0 ? convert<I32x16>(scaled + half) : I32x16{};
      const int64_t left = group - i * kLanes;
      if (left >= kLanes) {
        store_narrow(codes + start + i * kLanes, rounded);
      } else {
        int8_t narrow[kLanes];
        store_narrow(narrow, rounded);
        std::memcpy(codes + start + i * kLanes, narrow, static_cast<size_t>(left));
      }
      total += rounded;
    }
    scales[start / group] = peak / 127.0f + broken;
    sums[start / group] = sum(total);
  }
}

void store_f32(const float* acc, int64_t M, int64_t columns, float* out, int64_t ldo) {
  for (int64_t m = 0; m < M; ++m)
    std::memcpy(out + m * ldo, acc + m * kPanel, static_cast<size_t>(columns) * sizeof(float));
}

void store_bf16(const float* acc, int64_t M, int64_t columns, uint16_t* out, int64_t ldo) {
  for (int64_t m = 0; m < M; ++m) {
    int64_t n = 0;
    for (; n + kLanes <= columns; n += kLanes) narrow(out + m * ldo + n, load<F32x16>(acc + m * kPanel + n));
    for (; n < columns; ++n) out[m * ldo + n] = float_to_bf16(acc[m * kPanel + n]);
  }
}

}  // namespace

#define TENFOLD_STRING_(x) #x
#define TENFOLD_STRING(x) TENFOLD_STRING_(x)
#define TENFOLD_JOIN_(a, b) a##b
#define TENFOLD_JOIN(a, b) TENFOLD_JOIN_(a, b)

const Kernels TENFOLD_JOIN(TENFOLD_INSTRUCTION_SET, _kernels) = {
    TENFOLD_STRING(TENFOLD_INSTRUCTION_SET),
    product_f32,
    product_bf16,
    product_widened<float>,
    product_quantized,
    quantize<float>,
    quantize<uint16_t>,
    store_f32,
    store_bf16,
};

}  // namespace tenfold
