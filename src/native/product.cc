// The inner loops of products of float32 matrices; compiled once per instruction set.
#include "product.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "vector.h"

#ifndef TENFOLD_INSTRUCTION_SET
#error "TENFOLD_INSTRUCTION_SET names what this is compiled for, such as avx2"
#endif

namespace tenfold {
namespace {

// The sums of a tile stay in registers, beside its vectors of columns and one broadcast. A thread that shares its core is
// bound by instructions, of which tiles of these shapes have the fewest. Blocks are so long that a panel of the right
// factor stays in the first-level cache; registers of 64 bytes are fed as fast by the second level, and sums then go to
// memory and back less often.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVectors = 3, kBlockInputs = 384;
#elif defined(__SSE__)
constexpr int kTileRows = 4, kTileVectors = 3, kBlockInputs = 256;
#else
constexpr int kTileRows = 6, kTileVectors = 4, kBlockInputs = 256;
#endif
constexpr int kTileColumns = kTileVectors * kNative;
constexpr int64_t kLine = 64 / sizeof(float), kStep = 16;
typedef Register<float, kNative>::Type V;

// --- packing ---------------------------------------------------------------------------------------------------------

// Four neighbours of each of four lines, as four of each of four neighbours.
inline void transpose(const float* from, int64_t line, float* to, int64_t ld) {
#if defined(__SSE__)
  __m128 a = _mm_loadu_ps(from), b = _mm_loadu_ps(from + line);
  __m128 c = _mm_loadu_ps(from + 2 * line), d = _mm_loadu_ps(from + 3 * line);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(to, a);
  _mm_storeu_ps(to + ld, b);
  _mm_storeu_ps(to + 2 * ld, c);
  _mm_storeu_ps(to + 3 * ld, d);
#else
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[j * ld + i] = from[i * line + j];
#endif
}

// A panel [K][W] of `width` lines, each of K inputs: `line` apart, and their inputs `input` apart. What lies `ahead` is
// packed later, and is fetched, unless that is 0.
template <int W>
void pack_panel(const float* from, int64_t line, int64_t input, int64_t width, int64_t K, int64_t ahead, float* panel) {
  if (width < W) {
    for (int64_t k = 0; k < K; ++k)
      for (int64_t i = 0; i < W; ++i) panel[k * W + i] = i < width ? from[i * line + k * input] : 0.0f;
  } else if (line == 1) {
    for (int64_t k = 0; k < K; ++k) {
      if (ahead) __builtin_prefetch(from + k * input + ahead);
      std::memcpy(panel + k * W, from + k * input, W * sizeof(float));
    }
  } else {
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) {
      for (int i = 0; i < W && ahead && k % kLine == 0; ++i) __builtin_prefetch(from + i * line + k + ahead);
      for (int i = 0; i + 4 <= W; i += 4) transpose(from + i * line + k, line, panel + k * W + i, W);
      for (int i = W / 4 * 4; i < W; ++i)
        for (int j = 0; j < 4; ++j) panel[(k + j) * W + i] = from[i * line + k + j];
    }
    for (; k < K; ++k)
      for (int64_t i = 0; i < W; ++i) panel[k * W + i] = from[i * line + k];
  }
}

template <int W>
void pack(const float* from, int64_t line, int64_t input, int64_t lines, int64_t K, float* panels) {
  // Where lines are neighbours, a few inputs of all of them before the next ones: each is read in one go.
  const int64_t step = line == 1 ? 16 : K;
  // What comes next is seldom where the processor guesses it, but for the many columns of a panel.
  const int64_t ahead = W > kLine ? 0 : line == 1 ? step * input : W * line;
  for (int64_t k = 0; k < K; k += step) {
    for (int64_t first = 0; first < lines; first += W) {
      const int64_t width = lines - first < W ? lines - first : W, inputs = K - k < step ? K - k : step;
      pack_panel<W>(from + first * line + k * input, line, input, width, inputs, ahead, panels + first * K + k * W);
    }
  }
}

void pack_rows(Matrix from, int64_t M, int64_t K, float* panels) {
  pack<kTileRows>(from.data, from.row, from.column, M, K, panels);
}

void pack_columns(Matrix from, int64_t K, int64_t N, float* panels) {
  pack<kTileColumns>(from.data, from.column, from.row, N, K, panels);
}

// --- tiles -----------------------------------------------------------------------------------------------------------

// `fma` whose number a the instruction itself reads from memory. Without a broadcast before it there is one less to issue,
// but every vector loads anew what one broadcast serves for all. A core that two threads share is bound by what it issues,
// one that a thread has alone by loads, so the rows of a tile take turns.
#if defined(__AVX512F__)
constexpr bool kReadsInFma = true;
inline V fma_read(const float* a, V b, V c) {
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*a));
  return c;
}
#else
constexpr bool kReadsInFma = false;
inline V fma_read(const float* a, V b, V c) { return fma(splat<V>(*a), b, c); }
#endif

// Lines that are read after a tile: it fetches some of them, `at_once` for every kStep inputs.
struct Ahead {
  const float* at;
  const float* end;
  int64_t at_once;

  void fetch() {
    for (const float* last = at + at_once * kLine; at < last && at < end; at += kLine) __builtin_prefetch(at, 0, 2);
  }
};

// out[kTileRows][NV vectors] = a panel of rows · the first columns of one of columns, or that added to it. A function of
// its own, as compilers run out of registers where it is part of another.
template <int NV>
__attribute__((noinline)) void tile(const float* rows, const float* columns, int64_t K, bool add, float* out,
                                    int64_t ldo, Ahead ahead) {
  V sums[kTileRows][NV] = {};
  // Sums come from far away, once for many operations: a row of them is fetched with every step.
  float* later = out;
  for (int64_t begin = 0; begin < K; begin += kStep, later += ldo) {
    if (begin < kTileRows * kStep) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) __builtin_prefetch(later + v * kNative, 1);
    }
    ahead.fetch();
    const int64_t end = begin + kStep < K ? begin + kStep : K;
#pragma GCC unroll 4
    for (int64_t k = begin; k < end; ++k) {
      V b[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) b[v] = load<V>(columns + k * kTileColumns + v * kNative);
#pragma GCC unroll 16
      for (int m = 0; m < kTileRows; ++m) {
        const float* at = rows + k * kTileRows + m;
        const V a = splat<V>(*at);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
          sums[m][v] = kReadsInFma && m % 2 ? fma_read(at, b[v], sums[m][v]) : fma(a, b[v], sums[m][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kTileRows; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* to = out + m * ldo + v * kNative;
      store(to, add ? load<V>(to) + sums[m][v] : sums[m][v]);
    }
}

// The tile of as few vectors as hold `width` columns.
template <int NV = kTileVectors>
inline void tile_of(int64_t width, const float* rows, const float* columns, int64_t K, bool add, float* out,
                    int64_t ldo, Ahead ahead) {
  if constexpr (NV > 1) {
    if (width <= (NV - 1) * kNative) return tile_of<NV - 1>(width, rows, columns, K, add, out, ldo, ahead);
  }
  tile<NV>(rows, columns, K, add, out, ldo, ahead);
}

void multiply(const float* rows, const float* columns, int64_t M, int64_t N, int64_t K, bool add, float* out,
              int64_t ldo) {
  // The tiles of a panel of columns share fetching the next panel.
  const int64_t steps = (K + kStep - 1) / kStep * ((M + kTileRows - 1) / kTileRows);
  const int64_t at_once = (kTileColumns * K / kLine + steps - 1) / steps;
  for (int64_t n = 0; n < N; n += kTileColumns) {
    const int64_t width = N - n < kTileColumns ? N - n : kTileColumns;
    const float* next = columns + (n + kTileColumns) * K;
    Ahead ahead{next, n + kTileColumns < N ? next + kTileColumns * K : next, at_once};
    for (int64_t m = 0; m < M; m += kTileRows, ahead.at += at_once * kLine * ((K + kStep - 1) / kStep)) {
      const int64_t height = M - m < kTileRows ? M - m : kTileRows;
      float* to = out + m * ldo + n;
      if (width % kNative == 0 && height == kTileRows) {
        tile_of(width, rows + m * K, columns + n * K, K, add, to, ldo, ahead);
        continue;
      }
      float whole[kTileRows * kTileColumns];
      tile_of(width, rows + m * K, columns + n * K, K, false, whole, kTileColumns, ahead);
      for (int64_t i = 0; i < height; ++i)
        for (int64_t j = 0; j < width; ++j) to[i * ldo + j] = (add ? to[i * ldo + j] : 0.0f) + whole[i * kTileColumns + j];
    }
  }
}

}  // namespace

#define TENFOLD_JOIN_(a, b) a##b
#define TENFOLD_JOIN(a, b) TENFOLD_JOIN_(a, b)

const ProductKernels TENFOLD_JOIN(TENFOLD_INSTRUCTION_SET, _products) = {
    kTileRows, kTileColumns, kBlockInputs, pack_rows, pack_columns, multiply,
};

}  // namespace tenfold
