// Products of two float32 matrices of which neither is repacked before: what training multiplies.
//
// Both factors are cut into blocks of at most `block_inputs` inputs and copied into the order in which a tile reads them:
// the left one into panels of `tile_rows` rows, the right one into panels of `tile_columns` columns. A sum over the
// inputs goes block by block, in ascending order, so the bits of a result do not depend on how rows and columns are
// shared out.
#pragma once

#include <cstdint>

namespace tenfold {

// A matrix, or its transpose: element (i, j) is at i · row + j · column, of which one is 1.
struct Matrix {
  const float* data;
  int64_t row;
  int64_t column;
};

struct ProductKernels {
  int64_t tile_rows;
  int64_t tile_columns;
  int64_t block_inputs;
  // Rows [0, M) of K inputs as panels [K][tile_rows], the last padded with zeros.
  void (*pack_rows)(Matrix from, int64_t M, int64_t K, float* panels);
  // Columns [0, N) of K inputs as panels [K][tile_columns], the last padded with zeros.
  void (*pack_columns)(Matrix from, int64_t K, int64_t N, float* panels);
  // out[M][N] = rows · columns, or that added to it; rows of out are ldo elements apart.
  void (*multiply)(const float* rows, const float* columns, int64_t M, int64_t N, int64_t K, bool add, float* out,
                   int64_t ldo);
};

extern const ProductKernels baseline_products, avx2_products, avx512_vnni_products, avx512_bf16_products;

}  // namespace tenfold
