// Ragged paged attention: what every instruction set implements, one thread each, no allocation.
//
// Dims: T packed tokens, H query heads, J key-value heads, G = H / J, K head dim, P pages, B tokens of a page, N pages
// of the longest sequence, M rows of a block: G · queries, which share their keys, for each of its key-value heads.
//
// The cache stands as the inner loops read it, in 32-bit words of u = 4 / (bytes of an element) neighbours along the
// dim that is added over:
//   keys    [P][J][K / u][B][u]
//   values  [P][J][B / u][K][u]
//   scales  float32 [P][J][B], of keys and of values, where elements are of 8 bits: int8, or fp8 as e4m3fn
//
// The bits of a result depend on one token's query and its sequence's keys and values alone. Every score is one chain
// of additions over K. Keys are taken in chunks of 256 and splits of 4096 that are counted from the start of the
// sequence; what a token may not see weighs 0 and adds nothing, exactly; splits are merged in order. Whatever shares a
// pass over the keys has chains of its own.
#pragma once

#include <cstdint>

namespace tenfold {

constexpr int64_t kGroup = 16;    // keys of one vector
constexpr int64_t kChunk = 256;   // keys of one pass of the softmax
constexpr int64_t kGroups = kChunk / kGroup;
constexpr int64_t kSplit = 4096;  // keys that may be a task of their own

enum class Element { kF32, kBF16, kInt8, kFp8 };

// One call.
struct Attention {
  int64_t H, J, K, P, B, N;
  float scale;
  float softcap;   // 0: none
  int64_t window;  // 0: none
  int64_t chunk;   // of a sequence; 0: none
  Element query_type;  // of queries and outputs, and of new keys and values
  Element cache_type;
  const void* queries;  // [T][H][K]
  void* out;            // [T][H][K]
  void* keys;
  void* values;
  float* key_scales;
  float* value_scales;
  const float* sinks;     // [H], or null
  const int32_t* tables;  // [S][N]

  int64_t group() const { return H / J; }
  bool scaled() const { return cache_type == Element::kInt8 || cache_type == Element::kFp8; }
  // The first key that the query at a position sees.
  int64_t first_key(int64_t position) const {
    const int64_t begin = window && position >= window ? position - window + 1 : 0;
    const int64_t chunk_begin = chunk ? position / chunk * chunk : 0;
    return begin > chunk_begin ? begin : chunk_begin;
  }
  // Floats of one row's state: the sum of its values in vectors, then a vector of what its softmax needs.
  int64_t state_floats() const { return (K + kGroup - 1) / kGroup * kGroup + kGroup; }
};

// Neighbouring queries of one sequence, with the heads of neighbouring key-value heads. Its rows stand in the order
// [heads][queries][G].
struct QueryBlock {
  int64_t row;       // of the tables
  int64_t token;     // the first query among the packed tokens
  int64_t count;     // queries
  int64_t position;  // of the first query in its sequence
  int64_t kv_len;    // keys that the sequence has
  int64_t head;      // the first key-value head
  int64_t heads;     // key-value heads

  int64_t rows(const Attention& a) const { return heads * count * a.group(); }
  // Which of the queries [T][H] a row is.
  int64_t query(const Attention& a, int64_t row) const {
    const int64_t G = a.group();
    return (token + row / G % count) * a.H + (head + row / (G * count)) * G + row % G;
  }
};

// New keys and values of neighbouring tokens of one sequence.
struct NewTokens {
  const void* keys;    // [T][J][K]
  const void* values;  // [T][J][K]
  int64_t row;
  int64_t token;
  int64_t count;
  int64_t position;
};

struct AttentionKernels {
  // Floats of scratch that `attend` wants, 64-byte aligned, for blocks of up to `rows` rows.
  int64_t (*scratch_floats)(const Attention&, int64_t rows);
  // partial[M]: the block's attention to the keys of one split.
  void (*attend)(const Attention&, const QueryBlock&, int64_t split, void* scratch, float* partial);
  // state[M]: empty; and one more split added, the next one in order.
  void (*clear)(const Attention&, int64_t rows, float* state);
  void (*merge)(const Attention&, int64_t rows, const float* partial, float* state);
  // Writes the outputs of a block whose splits are all merged.
  void (*finish)(const Attention&, const QueryBlock&, const float* state);
  // Stores new keys and values into their pages. Values are made finite, so that weighing 0 removes them.
  void (*write)(const Attention&, const NewTokens&);
};

extern const AttentionKernels baseline_attention, avx2_attention, avx512_vnni_attention, avx512_bf16_attention;

}  // namespace tenfold
