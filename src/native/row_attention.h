// Causal attention of rows of packed sequences, and its gradient: what training mixes tokens with. Its products are those
// of `product.h`; these are the functions of their results.
#pragma once

#include <cstdint>

namespace tenfold {

// What one query of a row sees: the keys [begin, end) of its own segment.
struct Seen {
  const int32_t* segments;  // of the keys that the scores are of
  int32_t segment;          // of the query
  int64_t begin;
  int64_t end;
};

struct RowAttentionKernels {
  // scores[n] become exp(scale · score - largest), and 0 where a key is not seen; n is a multiple of 16. Returns the
  // logarithm of the sum of exp(scale · score).
  float (*weigh)(const Seen& seen, float scale, int64_t n, float* scores, float* sum);
  // scores[n] become exp(scale · score - log_sum), likewise, and moved[n], gradients of those weights, become gradients
  // of the scores; `mean` is what the weights' gradients are on average.
  void (*weigh_back)(const Seen& seen, float scale, float log_sum, float mean, int64_t n, float* scores, float* moved);
  // x[n] times a factor.
  void (*scale)(float factor, int64_t n, float* x);
  float (*dot)(const float* a, const float* b, int64_t n);
};

extern const RowAttentionKernels baseline_row_attention, avx2_row_attention, avx512_vnni_row_attention,
    avx512_bf16_row_attention;

}  // namespace tenfold
