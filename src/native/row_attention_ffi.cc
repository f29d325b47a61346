// Causal attention of rows of packed sequences, and its gradient, as XLA calls them.
//
// A block of queries meets all keys that it may see at once: their scores, some hundred kilobytes for rows of thousands
// of tokens, stay in a cache. The gradient computes them again.
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <numeric>
#include <utility>

#include "instruction_set.h"
#include "parallel.h"
#include "product.h"
#include "row_attention.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace tenfold {
namespace {

using Vectors = ffi::Buffer<ffi::F32, 4>;   // [R][L][heads][K]
using LogSums = ffi::Buffer<ffi::F32, 3>;   // [R][H][L]
using Segments = ffi::Buffer<ffi::S32, 2>;  // [R][L]

constexpr int64_t kQueries = 48;  // of a block
constexpr int64_t kKeys = 96;     // that values, or keys, are packed by: a multiple of the columns of every tile

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Attention {
  int64_t R, L, H, J, K;
  float scale;
  int64_t window;  // 0 sees all
  const float *q, *k, *v;
  const int32_t* segments;

  int64_t query(int64_t r, int64_t i, int64_t h) const { return ((r * L + i) * H + h) * K; }
  int64_t key(int64_t r, int64_t i, int64_t j) const { return ((r * L + i) * J + j) * K; }
  int64_t padded() const { return round_up(L, kKeys); }
};

// The queries [first, last) of a row, and the keys [begin, end) that some of them may see; begin is a multiple of kKeys.
struct Block {
  int64_t first, last, begin, end;

  int64_t queries() const { return last - first; }
  int64_t keys() const { return end - begin; }
  int64_t width() const { return round_up(keys(), kKeys); }
};

// What one thread works with, for a head at a time.
class Head {
 public:
  // The keys and values of a row's head; `back`: in the order in which gradients read them, too.
  Head(const Attention& a, const ProductKernels& p, int64_t r, int64_t j, bool back) : a_(a), p_(p) {
    const int64_t matrix = a.padded() * round_up(a.K, p.tile_columns), block = round_up(kQueries, p.tile_rows);
    const int64_t sizes[] = {matrix,
                             matrix,
                             back ? matrix : 0,
                             block * a.padded(),
                             back ? block * a.padded() : 0,
                             std::max(round_up(kKeys, p.tile_rows), block) * std::max(kKeys, a.K),
                             round_up(a.K, p.tile_columns) * kQueries,
                             a.padded()};
    float* at = scratch<kTask>(std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0}));
    float** parts[] = {&across_, &along_, &values_across_, &scores, &moved, &left_, &right_, &ids_};
    for (size_t i = 0; i < std::size(parts); ++i) *parts[i] = std::exchange(at, at + sizes[i]);
    pack_across(a.k + a.key(r, 0, j), across_);
    pack_along((back ? a.k : a.v) + a.key(r, 0, j), along_);
    if (back) pack_across(a.v + a.key(r, 0, j), values_across_);
    int32_t* ids = reinterpret_cast<int32_t*>(ids_);
    std::copy_n(a.segments + r * a.L, a.L, ids);
    std::fill(ids + a.L, ids + a.padded(), 0);
  }

  // Calls body(block) for all blocks of queries.
  template <typename Body>
  void for_blocks(const Body& body) const {
    const int32_t* ids = segments();
    for (int64_t first = 0; first < a_.L; first += kQueries) {
      const int64_t last = std::min(first + kQueries, a_.L);
      const auto [low, high] = std::minmax_element(ids + first, ids + last);
      int64_t begin = a_.window ? std::max<int64_t>(0, first - a_.window + 1) : 0;
      while (ids[begin] < *low || ids[begin] > *high) ++begin;  // the first query's own is among them
      body(Block{first, last, begin / kKeys * kKeys, last});
    }
  }

  // to[queries][width] = from · keys, or values.
  void scores_of(const Block& b, const float* from, bool of_values, float* to) {
    p_.pack_rows({from, a_.H * a_.K, 1}, b.queries(), a_.K, left_);
    p_.multiply(left_, (of_values ? values_across_ : across_) + b.begin * a_.K, b.queries(), b.keys(), a_.K, false, to,
                b.width());
  }

  // out[queries][K] = weights[queries][width] · values, or in a gradient keys.
  void mix(const Block& b, const float* weights, float* out) {
    const int64_t columns = round_up(a_.K, p_.tile_columns);
    for (int64_t key = b.begin; key < b.end; key += kKeys) {
      const int64_t count = std::min(kKeys, a_.L - key);
      p_.pack_rows({weights + key - b.begin, b.width(), 1}, b.queries(), count, left_);
      p_.multiply(left_, along_ + key * columns, b.queries(), a_.K, count, key > b.begin, out, a_.H * a_.K);
    }
  }

  // out[keys][K] += weightsᵀ · from[queries][K].
  void add_back(const Block& b, const float* weights, const float* from, float* out) {
    p_.pack_columns({from, a_.H * a_.K, 1}, b.queries(), a_.K, right_);
    for (int64_t key = b.begin; key < b.end; key += kKeys) {
      const int64_t count = std::min(kKeys, b.end - key);
      p_.pack_rows({weights + key - b.begin, 1, b.width()}, count, b.queries(), left_);
      p_.multiply(left_, right_, count, a_.K, b.queries(), true, out + key * a_.J * a_.K, a_.J * a_.K);
    }
  }

  // What query i of the row sees, counted from the block's first key.
  Seen seen(const Block& b, int64_t i) const {
    const int64_t begin = a_.window ? std::max<int64_t>(b.begin, i - a_.window + 1) : b.begin;
    return {segments() + b.begin, segments()[i], begin - b.begin, i + 1 - b.begin};
  }

  float* scores;  // [queries][width]
  float* moved;   // likewise

 private:
  const int32_t* segments() const { return reinterpret_cast<const int32_t*>(ids_); }

  // Tokens as columns.
  void pack_across(const float* from, float* to) const { p_.pack_columns({from, 1, a_.J * a_.K}, a_.K, a_.L, to); }

  // Tokens as inputs, some at a time.
  void pack_along(const float* from, float* to) const {
    const int64_t columns = round_up(a_.K, p_.tile_columns);
    for (int64_t key = 0; key < a_.L; key += kKeys) {
      p_.pack_columns({from + key * a_.J * a_.K, a_.J * a_.K, 1}, std::min(kKeys, a_.L - key), a_.K, to + key * columns);
    }
  }

  const Attention& a_;
  const ProductKernels& p_;
  float *across_, *along_, *values_across_, *left_, *right_, *ids_;
};

void attend(const Attention& a, int64_t r, int64_t h, float* out, float* log_sums) {
  const RowAttentionKernels& k = TENFOLD_CHOOSE(row_attention);
  Head head(a, TENFOLD_CHOOSE(products), r, h / (a.H / a.J), false);
  head.for_blocks([&](const Block& b) {
    float sums[kQueries];
    head.scores_of(b, a.q + a.query(r, b.first, h), false, head.scores);
    for (int64_t i = 0; i < b.queries(); ++i) {
      log_sums[(r * a.H + h) * a.L + b.first + i] =
          k.weigh(head.seen(b, b.first + i), a.scale, b.width(), head.scores + i * b.width(), &sums[i]);
    }
    float* to = out + a.query(r, b.first, h);
    head.mix(b, head.scores, to);
    for (int64_t i = 0; i < b.queries(); ++i) k.scale(1.0f / sums[i], a.K, to + i * a.H * a.K);
  });
}

// Gradients of the queries, keys and values of a head of keys.
void attend_back(const Attention& a, int64_t r, int64_t j, const float* out, const float* log_sums, const float* ct,
                 float* dq, float* dk, float* dv) {
  const RowAttentionKernels& k = TENFOLD_CHOOSE(row_attention);
  Head head(a, TENFOLD_CHOOSE(products), r, j, true);
  for (int64_t i = 0; i < a.L; ++i) {
    std::fill_n(dk + a.key(r, i, j), a.K, 0.0f);
    std::fill_n(dv + a.key(r, i, j), a.K, 0.0f);
  }
  for (int64_t h = j * (a.H / a.J); h < (j + 1) * (a.H / a.J); ++h) {
    head.for_blocks([&](const Block& b) {
      const int64_t at = a.query(r, b.first, h), next = a.H * a.K;
      head.scores_of(b, a.q + at, false, head.scores);
      head.scores_of(b, ct + at, true, head.moved);
      for (int64_t i = 0; i < b.queries(); ++i) {
        k.weigh_back(head.seen(b, b.first + i), a.scale, log_sums[(r * a.H + h) * a.L + b.first + i],
                     k.dot(out + at + i * next, ct + at + i * next, a.K), b.width(), head.scores + i * b.width(),
                     head.moved + i * b.width());
      }
      head.mix(b, head.moved, dq + at);
      head.add_back(b, head.moved, a.q + at, dk + a.key(r, 0, j));
      head.add_back(b, head.scores, ct + at, dv + a.key(r, 0, j));
    });
  }
}

ffi::Error read(const Vectors& q, const Vectors& k, const Vectors& v, const Segments& segments, float scale,
                int64_t window, Attention& a) {
  const auto of_q = q.dimensions(), of_k = k.dimensions(), of_ids = segments.dimensions();
  a = {of_q[0], of_q[1], of_q[2], of_k[2], of_q[3], scale, window, q.typed_data(), k.typed_data(), v.typed_data(),
       segments.typed_data()};
  const bool match = of_k[0] == a.R && of_k[1] == a.L && of_k[3] == a.K && a.J > 0 && a.H % a.J == 0 &&
                     v.element_count() == k.element_count() && of_ids[0] == a.R && of_ids[1] == a.L;
  return match ? ffi::Error::Success() : ffi::Error(ffi::ErrorCode::kInvalidArgument, "queries, keys and values do not match");
}

ffi::Error row_attention(ffi::ThreadPool pool, float scale, int64_t window, Vectors q, Vectors k, Vectors v,
                         Segments segments, ffi::Result<Vectors> out, ffi::Result<LogSums> log_sums) {
  Attention a;
  if (auto error = read(q, k, v, segments, scale, window, a); error.failure()) return error;
  parallel_for(pool, a.R * a.H, [&](int64_t task) {
    attend(a, task / a.H, task % a.H, out->typed_data(), log_sums->typed_data());
  });
  return ffi::Error::Success();
}

ffi::Error row_attention_gradient(ffi::ThreadPool pool, float scale, int64_t window, Vectors q, Vectors k, Vectors v,
                                  Segments segments, Vectors out, LogSums log_sums, Vectors ct, ffi::Result<Vectors> dq,
                                  ffi::Result<Vectors> dk, ffi::Result<Vectors> dv) {
  Attention a;
  if (auto error = read(q, k, v, segments, scale, window, a); error.failure()) return error;
  parallel_for(pool, a.R * a.J, [&](int64_t task) {
    attend_back(a, task / a.J, task % a.J, out.typed_data(), log_sums.typed_data(), ct.typed_data(), dq->typed_data(),
                dk->typed_data(), dv->typed_data());
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace tenfold

#define TENFOLD_PUBLIC extern "C" __attribute__((visibility("default")))

TENFOLD_PUBLIC XLA_FFI_Error* tenfold_row_attention(XLA_FFI_CallFrame*);
TENFOLD_PUBLIC XLA_FFI_Error* tenfold_row_attention_gradient(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(tenfold_row_attention, tenfold::row_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Arg<tenfold::Vectors>()
                                  .Arg<tenfold::Vectors>()
                                  .Arg<tenfold::Vectors>()
                                  .Arg<tenfold::Segments>()
                                  .Ret<tenfold::Vectors>()
                                  .Ret<tenfold::LogSums>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(tenfold_row_attention_gradient, tenfold::row_attention_gradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Arg<tenfold::Vectors>()
                                  .Arg<tenfold::Vectors>()
                                  .Arg<tenfold::Vectors>()
                                  .Arg<tenfold::Segments>()
                                  .Arg<tenfold::Vectors>()
                                  .Arg<tenfold::LogSums>()
                                  .Arg<tenfold::Vectors>()
                                  .Ret<tenfold::Vectors>()
                                  .Ret<tenfold::Vectors>()
                                  .Ret<tenfold::Vectors>());
