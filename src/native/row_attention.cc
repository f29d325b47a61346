// The weights of attention in training, and their gradients; compiled once per instruction set.
#include "row_attention.h"

#include <cmath>

#include "functions.h"

#ifndef TENFOLD_INSTRUCTION_SET
#error "TENFOLD_INSTRUCTION_SET names what this is compiled for, such as avx2"
#endif

namespace tenfold {
namespace {

// Whether lanes k, k + 1, ... are seen.
inline I32x16 visible(const Seen& seen, int64_t k) {
  static constexpr int32_t kSteps[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const I32x16 at = load<I32x16>(kSteps) + static_cast<int32_t>(k);
  const I32x16 other = load<I32x16>(seen.segments + k) - seen.segment;
  return ((other > -1) & (other < 1)) & ((at >= static_cast<int32_t>(seen.begin)) & (at < static_cast<int32_t>(seen.end)));
}

float weigh(const Seen& seen, float scale, int64_t n, float* scores, float* sum_of) {
  F32x16 most = splat(kLowest);
  for (int64_t k = 0; k < n; k += kLanes) {
    const F32x16 s = select(visible(seen, k), load<F32x16>(scores + k) * scale, splat(kLowest));
    most = select(s > most, s, most);
    store(scores + k, s);
  }
  const float top = largest(most);
  F32x16 sums{};
  for (int64_t k = 0; k < n; k += kLanes) {
    const F32x16 weight = exp2((load<F32x16>(scores + k) - top) * kLog2e);  // 0 where not seen
    sums += weight;
    store(scores + k, weight);
  }
  *sum_of = sum(sums);
  return top + std::log(*sum_of);
}

void weigh_back(const Seen& seen, float scale, float log_sum, float mean, int64_t n, float* scores, float* moved) {
  for (int64_t k = 0; k < n; k += kLanes) {
    const I32x16 mask = visible(seen, k);
    const F32x16 score = select(mask, load<F32x16>(scores + k) * scale - log_sum, splat(kLowest));
    const F32x16 weight = exp2(score * kLog2e);
    store(scores + k, weight);
    store(moved + k, select(mask, weight * (load<F32x16>(moved + k) - mean) * scale, F32x16{}));
  }
}

void scale_all(float factor, int64_t n, float* x) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

float dot(const float* a, const float* b, int64_t n) {
  F32x16 sums{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sums = fma(load<F32x16>(a + i), load<F32x16>(b + i), sums);
  float total = sum(sums);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

}  // namespace

#define TENFOLD_JOIN_(a, b) a##b
#define TENFOLD_JOIN(a, b) TENFOLD_JOIN_(a, b)

const RowAttentionKernels TENFOLD_JOIN(TENFOLD_INSTRUCTION_SET, _row_attention) = {weigh, weigh_back, scale_all, dot};

}  // namespace tenfold
