// Products of two float32 matrices, as XLA calls them.
#include <algorithm>
#include <cstdint>

#include "instruction_set.h"
#include "parallel.h"
#include "product.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tenfold {
namespace {

using Floats = ffi::Buffer<ffi::F32, 2>;

constexpr int64_t kMostRows = 96;       // of one task: there are many, so that no thread is long alone at the end
constexpr int64_t kMostColumns = 1024;  // and of inputs, that are packed at once: the last-level cache holds them
constexpr int64_t kMostInputs = 2048;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The parts of [0, size), at most `most` long each, nearly equal, and all but the last a multiple of `multiple`.
struct Parts {
  int64_t size, each;

  Parts(int64_t size, int64_t most, int64_t multiple, int64_t at_least = 1) : size(size) {
    const int64_t parts = std::max(ceil_div(size, most), at_least);
    each = std::max(multiple, ceil_div(ceil_div(size, parts), multiple) * multiple);
  }
  int64_t count() const { return ceil_div(size, each); }
  int64_t begin(int64_t part) const { return part * each; }
  int64_t length(int64_t part) const { return std::min(each, size - part * each); }
};

Matrix part(const Matrix& of, int64_t i, int64_t j) { return {of.data + i * of.row + j * of.column, of.row, of.column}; }

// out[M][N] = a · b; of K inputs.
void run_product(ffi::ThreadPool& pool, const Matrix& a, const Matrix& b, int64_t M, int64_t N, int64_t K, float* out) {
  const ProductKernels& k = TENFOLD_CHOOSE(products);
  const int64_t threads = pool.num_threads();
  if (K == 0) std::fill_n(out, M * N, 0.0f);
  const Parts columns(N, kMostColumns, k.tile_columns), inputs(K, kMostInputs, k.block_inputs);
  // As many tasks for each thread, of rows and, where these are few, of columns.
  const Parts rows(M, kMostRows, k.tile_rows, ceil_div(ceil_div(M, kMostRows), threads) * threads);
  const int64_t split = std::max<int64_t>(1, ceil_div(2 * threads, rows.count()));
  for (int64_t column = 0; column < columns.count(); ++column) {
    const int64_t n = columns.begin(column);
    const Parts shares(columns.length(column), kMostColumns, k.tile_columns, split);
    const int64_t width = shares.count() * shares.each;
    for (int64_t input = 0; input < inputs.count(); ++input) {
      const int64_t begin = inputs.begin(input), length = inputs.length(input);
      const Parts blocks(length, k.block_inputs, 1);
      float* packed = scratch<kCall>(width * length);
      // The columns of a share, for all inputs of a block, stand together.
      parallel_for(pool, blocks.count() * shares.count(), [&](int64_t task) {
        const int64_t block = task / shares.count(), share = task % shares.count();
        k.pack_columns(part(b, begin + blocks.begin(block), n + shares.begin(share)), blocks.length(block),
                       shares.length(share),
                       packed + blocks.begin(block) * width + shares.begin(share) * blocks.length(block));
      });
      parallel_for(pool, rows.count() * shares.count(), [&](int64_t task) {
        const int64_t row = task / shares.count(), share = task % shares.count(), m = rows.begin(row);
        float* left = scratch<kTask>(rows.each * blocks.each);
        for (int64_t block = 0; block < blocks.count(); ++block) {
          const int64_t at = blocks.begin(block), depth = blocks.length(block);
          k.pack_rows(part(a, m, begin + at), rows.length(row), depth, left);
          k.multiply(left, packed + at * width + shares.begin(share) * depth, rows.length(row), shares.length(share),
                     depth, begin + at > 0, out + m * N + n + shares.begin(share), N);
        }
      });
    }
  }
}

ffi::Error product(ffi::ThreadPool pool, bool a_transposed, bool b_transposed, Floats a,
                   Floats b, ffi::Result<Floats> out) {
  const int64_t M = out->dimensions()[0], N = out->dimensions()[1], K = a.dimensions()[a_transposed ? 0 : 1];
  if (a.dimensions()[a_transposed ? 1 : 0] != M || b.dimensions()[b_transposed ? 1 : 0] != K ||
      b.dimensions()[b_transposed ? 0 : 1] != N) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, "the factors of a product do not match");
  }
  const Matrix left{a.typed_data(), a_transposed ? 1 : K, a_transposed ? M : 1};
  const Matrix right{b.typed_data(), b_transposed ? 1 : N, b_transposed ? K : 1};
  run_product(pool, left, right, M, N, K, out->typed_data());
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tenfold

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* tenfold_product(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(tenfold_product, tenfold::product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("a_transposed")
                                  .Attr<bool>("b_transposed")
                                  .Arg<tenfold::Floats>()
                                  .Arg<tenfold::Floats>()
                                  .Ret<tenfold::Floats>());
