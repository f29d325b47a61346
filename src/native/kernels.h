// What every instruction set implements: the inner loops, one thread each, no allocation.
//
// Weights come in panels of 32 output columns. A panel holds its columns' weights for all K inputs, so that a product
// streams through memory once, and what one lane needs at a time stands together:
//   float32   [K][32]
//   bfloat16  [K / 2][32][2]
//   int8      [K / 4][32][4] codes 0..255
//   int4      [K / 8][32][4] bytes: inputs k..k+3 in the low nibbles, k+4..k+7 in the high ones
// K is padded with zeros to a multiple of what stands together, and quantised weights to a multiple of their group.
//
// Every output is one chain of additions over K in ascending order, whatever the number of rows beside it, so its bits
// depend on its own row and column alone.
#pragma once

#include <cstdint>

namespace tenfold {

constexpr int64_t kPanel = 32;

// A row of activations in 8 bits: x ≈ scale · code, per group of inputs.
struct QuantizedRows {
  const int8_t* codes;   // [M][K]
  const float* scales;   // [M][K / group]
  const int32_t* sums;   // [M][K / group], of the codes
  int64_t group;         // inputs that share a scale; divides the weights' group
};

// weight = scale · (code − zero), or scale · code − min where there are mins.
struct QuantizedPanel {
  const uint8_t* codes;
  const float* scales;  // [K / group][32]
  const float* mins;    // the same, or null
  int64_t group;
  int32_t zero;
  int bits;  // 8 or 4
};

struct Kernels {
  const char* name;
  // acc[M][32] = x[M][K] · panel; rows of x are ldx elements apart.
  void (*product_f32)(const float* x, int64_t ldx, int64_t M, int64_t K, const float* panel, float* acc);
  void (*product_bf16)(const uint16_t* x, int64_t ldx, int64_t M, int64_t K, const uint16_t* panel, float* acc);
  void (*product_f32_bf16)(const float* x, int64_t ldx, int64_t M, int64_t K, const uint16_t* panel, float* acc);
  void (*product_quantized)(const QuantizedRows& x, int64_t M, int64_t K, const QuantizedPanel& panel, float* acc);
  // One row of K inputs to K codes, padded with zeros up to a multiple of the group.
  void (*quantize_f32)(const float* x, int64_t K, int64_t group, int8_t* codes, float* scales, int32_t* sums);
  void (*quantize_bf16)(const uint16_t* x, int64_t K, int64_t group, int8_t* codes, float* scales, int32_t* sums);
  // out[M][columns] from acc[M][32]; rows of out are ldo elements apart.
  void (*store_f32)(const float* acc, int64_t M, int64_t columns, float* out, int64_t ldo);
  void (*store_bf16)(const float* acc, int64_t M, int64_t columns, uint16_t* out, int64_t ldo);
};

// Normalisation of a row of D values, added up in one order whatever stands beside it.
struct NormKernels {
  // By the root mean square. weight_last: round x / rms(x) to T, then multiply by the weight; else multiply by
  // weight + offset, then round.
  void (*rms_norm_f32)(const float* x, const float* weight, int64_t D, float eps, float offset, bool weight_last,
                       float* out);
  void (*rms_norm_bf16)(const uint16_t* x, const uint16_t* weight, int64_t D, float eps, float offset,
                        bool weight_last, uint16_t* out);
  // By mean and deviation: (x - mean) / deviation · weight + bias.
  void (*layer_norm_f32)(const float* x, const float* weight, const float* bias, int64_t D, float eps, float* out);
  void (*layer_norm_bf16)(const uint16_t* x, const uint16_t* weight, const uint16_t* bias, int64_t D, float eps,
                          uint16_t* out);
};

// The gates of n values: f(gate) · up, computed in float32 and rounded once.
struct GateKernels {
  void (*silu_f32)(const float* gate, const float* up, int64_t n, float* out);
  void (*silu_bf16)(const uint16_t* gate, const uint16_t* up, int64_t n, uint16_t* out);
  void (*gelu_f32)(const float* gate, const float* up, int64_t n, float* out);
  void (*gelu_bf16)(const uint16_t* gate, const uint16_t* up, int64_t n, uint16_t* out);
};

extern const GateKernels baseline_gates, avx2_gates, avx512_vnni_gates, avx512_bf16_gates;
extern const NormKernels baseline_norms, avx2_norms, avx512_vnni_norms, avx512_bf16_norms;
extern const Kernels baseline_kernels, avx2_kernels, avx512_vnni_kernels, avx512_bf16_kernels;

}  // namespace tenfold
