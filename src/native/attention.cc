// Paged attention of one block of queries; compiled once per instruction set.
#include "attention.h"

#include "attention_state.h"
#include "attention_tiles.h"
#include "cache_write.h"
#include "functions.h"
#include "vector.h"

#include <utility>

#ifndef TENFOLD_INSTRUCTION_SET
#error "TENFOLD_INSTRUCTION_SET names what this is compiled for, such as avx2"
#endif

namespace tenfold {
namespace {

inline int64_t round_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

// Rows of a tile, and the keys that any of them sees.
struct Tile {
  int64_t row, rows, begin, end;
};

// What `attend` lays out in its scratch.
struct Scratch {
  uint32_t* scores;      // [M][limbs][kChunk]: scores, then weights in place
  uint32_t* queries;     // [M][limbs][operands of a query]
  uint32_t* keys;        // [kPair] groups that no page holds whole
  uint32_t* values;      // [kGroups] likewise
  float* key_scales;     // [kChunk]
  float* value_scales;   // [kChunk]
  float* peaks;          // [M] the largest score so far
  float* query_scales;   // [M] of fixed-point numbers
  float* weight_scales;  // [M] likewise
  int32_t* biases;       // [M][limbs]
  Tile* tiles;           // [M]

  // Carves up the memory at `start`, and returns the bytes that it takes.
  int64_t lay_out(const Attention& a, int64_t rows, uintptr_t start) {
    const int64_t limbs = a.cache_type == Element::kInt8 ? 3 : 1, wide = max(a.K, kLanes);
    uintptr_t at = start;
    const auto take = [&at]<typename T>(T*& part, int64_t count) {
      part = reinterpret_cast<T*>(at);
      at += static_cast<uintptr_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    };
    take(scores, rows * limbs * kChunk);
    take(queries, rows * limbs * a.K);
    take(keys, kPair * kGroup * a.K);
    take(values, kChunk * wide);
    take(key_scales, kChunk);
    take(value_scales, kChunk);
    take(peaks, rows);
    take(query_scales, rows);
    take(weight_scales, rows);
    take(biases, rows * limbs);
    take(tiles, rows);
    return static_cast<int64_t>(at - start);
  }
};

// Attention of a block of queries to one split of its keys, in arithmetic A.
template <class A>
class Pass {
  typedef typename A::Cache C;
  typedef typename C::Type Type;

 public:
  Pass(const Attention& a, const QueryBlock& block, void* scratch, float* state) : a_(a), block_(block), state_(state) {
    s_.lay_out(a, block.rows(a), reinterpret_cast<uintptr_t>(scratch));
  }

  void run(int64_t split) {
    const int64_t last = block_.position + block_.count;  // keys that the last query sees
    const int64_t begin = max(split * kSplit, a_.first_key(block_.position)), end = min((split + 1) * kSplit, last);
    begin_ = begin;
    prepare_queries();
    prepare_tiles();
    for (int64_t m = 0; m < block_.heads * rows_; ++m) {
      s_.peaks[m] = -kInfinity;
      std::memset(state_ + m * ld_, 0, static_cast<size_t>(ld_) * sizeof(float));
    }
    int64_t chunk = begin / kChunk * kChunk;
    // Heads take turns, as they lie beside each other in a page: memory is slow where reading jumps.
    Place *at = places_[0], *after = places_[1];
    int64_t groups = locate(chunk, begin, end, at);
    for (; chunk < end; chunk += kChunk) {
      const int64_t first = max(begin - chunk, 0) / kGroup, groups_after = locate(chunk + kChunk, begin, end, after);
      for (head_ = 0; head_ < block_.heads; ++head_) {
        const bool last_head = head_ + 1 == block_.heads;
        here_ = at;
        next_ = last_head ? after : at;
        next_first_ = last_head ? 0 : first;
        next_groups_ = last_head ? groups_after : groups;
        next_head_ = last_head ? 0 : head_ + 1;
        if constexpr (C::kTogether == 4) prepare_scales(chunk, first, groups);
        score(chunk, first, groups);
        for (const Tile* t = s_.tiles; t < s_.tiles + tiles_; ++t) {
          for (int64_t m = t->row; m < t->row + t->rows; ++m) weigh(m, chunk, *t);
        }
        add_values(chunk, first, groups);
      }
      std::swap(at, after);
      groups = groups_after;
    }
    for (int64_t m = 0; m < block_.heads * rows_; ++m) {
      float* softmax = state_ + m * ld_ + ld_ - kLanes;
      softmax[1] = sum(load<F32x16>(softmax));
      softmax[0] = s_.peaks[m];
    }
  }

 private:
  static constexpr int kTileRows = kMaxRows / A::kSums;

  // --- queries

  void prepare_queries() {
    for (int64_t m = 0; m < block_.heads * rows_; ++m) {
      const int64_t at = block_.query(a_, m) * a_.K;
      uint32_t* to = s_.queries + m * ldq_;
      if constexpr (A::kFixed) {
        if (a_.query_type == Element::kF32)
          fix_query(static_cast<const float*>(a_.queries) + at, F32(), m);
        else
          fix_query(static_cast<const uint16_t*>(a_.queries) + at, BF16(), m);
      } else if (!A::kNarrow && a_.query_type == Element::kBF16) {
        const uint16_t* from = static_cast<const uint16_t*>(a_.queries) + at;
        for (int64_t d = 0; d < a_.K; ++d) to[d] = static_cast<uint32_t>(from[d]) << 16;
      } else {
        constexpr int64_t kSize = A::kNarrow ? 2 : 4;
        std::memcpy(to, static_cast<const char*>(a_.queries) + at * kSize, static_cast<size_t>(a_.K * kSize));
      }
    }
  }

  // A row as fixed-point numbers. What is not finite makes all scores NaN.
  template <class Q>
  void fix_query(const typename Q::Type* from, Q, int64_t m) {
    if constexpr (A::kFixed) {
      const float most = A::largest_query(a_.K);
      float peak = 0, nan = 0;
      for (int64_t d = 0; d < a_.K; ++d) {
        const float magnitude = __builtin_fabsf(Q::widen(from[d]));
        peak = magnitude > peak ? magnitude : peak;
        nan += magnitude * 0.0f;
      }
      const float inverse = peak > 1e-30f && nan == 0 ? most / peak : 0;
      uint32_t* to = s_.queries + m * ldq_;
      int32_t* biases = s_.biases + m * A::kLimbs;
      for (int l = 0; l < A::kLimbs; ++l) biases[l] = 0;
      for (int64_t d = 0; d < a_.K; ++d) {
        const float scaled = inverse > 0 ? Q::widen(from[d]) * inverse : 0.0f;
        A::put_query(static_cast<int32_t>(scaled + __builtin_copysignf(0.5f, scaled)), d, a_.K, to, biases);
      }
      s_.query_scales[m] = peak / most + nan;
    }
  }

  void prepare_tiles() {
    tiles_ = (rows_ + kTileRows - 1) / kTileRows;
    for (int64_t t = 0, m = 0; t < tiles_; ++t) {
      const int64_t rows = (rows_ - m + tiles_ - t - 1) / (tiles_ - t);
      const int64_t first = block_.position + m / G_, last = block_.position + (m + rows - 1) / G_;
      s_.tiles[t] = {m, rows, a_.first_key(first), last + 1};
      m += rows;
    }
  }

  // --- pages

  // Where a key is: its page, and there.
  struct Place {
    int64_t page, slot;
  };

  // The block table is data: a page that does not exist must not be read.
  Place place_of(int64_t key) const {
    const uint32_t at = static_cast<uint32_t>(key), B = static_cast<uint32_t>(a_.B);
    const int64_t page = a_.tables[block_.row * a_.N + at / B];
    return {page >= 0 && page < a_.P ? page : 0, at % B};
  }

  // The places of a chunk's groups between the keys `begin` and `end`; returns the end of the groups.
  int64_t locate(int64_t chunk, int64_t begin, int64_t end, Place* places) const {
    int64_t g = max(begin - chunk, 0) / kGroup;
    for (; g < kGroups && chunk + g * kGroup < end; ++g) places[g] = place_of(chunk + g * kGroup);
    return g;
  }

  // The first slot of a page's head.
  int64_t slots_of(int64_t page, int64_t head) const { return (page * a_.J + block_.head + head) * a_.B; }

  const uint32_t* key_words(Place at, int64_t head) const {
    const Type* of_head = static_cast<const Type*>(a_.keys) + slots_of(at.page, head) * a_.K;
    return reinterpret_cast<const uint32_t*>(of_head) + at.slot;
  }
  const uint32_t* value_words(Place at, int64_t head) const {
    const Type* of_head = static_cast<const Type*>(a_.values) + slots_of(at.page, head) * a_.K;
    return reinterpret_cast<const uint32_t*>(of_head) + at.slot / C::kTogether * a_.K;
  }

  // The keys of a group lie across those of its page; a part of the page is fetched for each group, from first to last.
  Ahead ahead_keys(Place at, int64_t head) const {
    return {reinterpret_cast<const char*>(key_words({at.page, 0}, head) + at.slot * words_), in_place_ ? 64 : 0};
  }
  Ahead ahead_values(Place at) const {
    return {reinterpret_cast<const char*>(value_words(at, head_)), in_place_ ? 64 : 0};
  }
  // What is fetched while the keys of a group are read, and its values: what is read kStep groups later. The values of
  // a chunk follow its keys, and the keys of another head, or of the next chunk, follow them.
  Ahead ahead_of_keys(int64_t g, int64_t first, int64_t groups) const {
    const int64_t at = g + min(kStep, groups - first);
    return at < groups ? ahead_keys(here_[at], head_) : ahead_values(here_[at - groups + first]);
  }
  Ahead ahead_of_values(int64_t g, int64_t first, int64_t groups) const {
    const int64_t at = g + min(kStep, groups - first), next = at - groups + next_first_;
    if (at < groups) return ahead_values(here_[at]);
    return next < next_groups_ ? ahead_keys(next_[next], next_head_) : ahead_values(here_[g]);
  }

  // Whether a key is one that the block may read: the pages of earlier ones may hold anything by now.
  bool held(int64_t key) const { return key >= begin_ && key < block_.kv_len; }

  // A group of keys, as if one page held it.
  void gather_keys(int64_t key, uint32_t* to) const {
    std::memset(to, 0, static_cast<size_t>(words_ * kGroup) * 4);
    for (int64_t i = 0, count = 1; i < kGroup; i += count, count = 1) {
      if (!held(key + i)) continue;
      const Place at = place_of(key + i);
      const uint32_t* from = key_words(at, head_);
      count = min(kGroup - i, a_.B - at.slot);
      for (int64_t w = 0; w < words_; ++w)
        std::memcpy(to + w * kGroup + i, from + w * a_.B, static_cast<size_t>(count) * 4);
    }
  }

  // A group of values, likewise; 0 where the block may not read.
  void gather_values(int64_t key, uint32_t* to) const {
    constexpr int u = C::kTogether;
    std::memset(to, 0, static_cast<size_t>(kGroup / u * width_) * 4);
    for (int64_t i = 0; i < kGroup; i += u, to += width_) {
      if (held(key + i) && held(key + i + u - 1)) {
        std::memcpy(to, value_words(place_of(key + i), head_), static_cast<size_t>(a_.K) * 4);
        continue;
      }
      for (int64_t k = 0; k < u; ++k) {
        if (!held(key + i + k)) continue;
        const Type* from = reinterpret_cast<const Type*>(value_words(place_of(key + i + k), head_)) + k;
        for (int64_t d = 0; d < a_.K; ++d) reinterpret_cast<Type*>(to)[d * u + k] = from[d * u];
      }
    }
  }

  // Pages are read in place where they hold whole groups.
  const uint32_t* keys(int64_t key, int64_t g, uint32_t* copy) const {
    if (in_place_) return key_words(here_[g], head_);
    gather_keys(key, copy);
    return copy;
  }

  const uint32_t* values(int64_t key, int64_t g, uint32_t* copy) const {
    // What lies past the sequence may be NaN, which a weight of 0 does not remove; codes are never NaN.
    const bool whole = C::kTogether == 4 || key + kGroup <= block_.kv_len;
    if (in_place_ && a_.K >= kLanes && whole) return value_words(here_[g], head_);
    gather_values(key, copy);
    return copy;
  }

  void prepare_scales(int64_t chunk, int64_t first, int64_t groups) {
    for (int64_t g = next_first_; g < next_groups_; ++g) {
      const int64_t at = slots_of(next_[g].page, next_head_) + next_[g].slot;
      __builtin_prefetch(a_.key_scales + at);
      __builtin_prefetch(a_.value_scales + at);
    }
    for (int64_t g = first; g < groups; ++g) {
      const int64_t key = chunk + g * kGroup, i = g * kGroup;
      if (in_place_ && key + kGroup <= block_.kv_len) {
        const int64_t at = slots_of(here_[g].page, head_) + here_[g].slot;
        store(s_.key_scales + i, load<F32x16>(a_.key_scales + at));
        store(s_.value_scales + i, load<F32x16>(a_.value_scales + at));
        continue;
      }
      for (int64_t at = i; at < i + kGroup; ++at) {
        const bool known = held(chunk + at);
        const Place place = place_of(known ? chunk + at : key);
        const int64_t slot = slots_of(place.page, head_) + place.slot;
        s_.key_scales[at] = known ? a_.key_scales[slot] : 0;
        s_.value_scales[at] = known ? a_.value_scales[slot] : 0;
      }
    }
  }

  // --- scores, weights, values

  void score(int64_t chunk, int64_t first, int64_t groups) {
    const int64_t ldk = in_place_ ? a_.B : kGroup;
    for (int64_t g = first; g < groups; g += kPair) {
      const int64_t count = min(kPair, groups - g), key = chunk + g * kGroup;
      const uint32_t* from[kPair];
      Ahead ahead[kPair];
      for (int64_t i = 0; i < count; ++i) {
        from[i] = keys(key + i * kGroup, g + i, s_.keys + i * kGroup * words_);
        ahead[i] = ahead_of_keys(g + i, first, groups);
      }
      for (const Tile* t = s_.tiles; t < s_.tiles + tiles_; ++t) {
        if (t->end <= key || t->begin >= key + count * kGroup) continue;
        const uint32_t* q = s_.queries + (head_ * rows_ + t->row) * ldq_;
        uint32_t* to = s_.scores + t->row * A::kLimbs * kChunk + g * kGroup;
        with_rows<kTileRows>(t->rows, [&]<int R>() {
          constexpr int MR = R * A::kLimbs, NV = R * A::kSums * kPair <= kTile ? kPair : 1;
          if (count == NV) return score_tile<A, MR, NV>(q, words_, from, ldk, ahead, to);
          for (int64_t i = 0; i < count; ++i)
            score_tile<A, MR, 1>(q, words_, from + i, ldk, ahead + i, to + i * kLanes);
        });
        for (int64_t i = 0; i < count; ++i) ahead[i] = {reinterpret_cast<const char*>(from[i]), ldk * 4};
      }
    }
  }

  // One row's scores of 16 keys, in units of log 2.
  F32x16 score_of(int64_t m, int64_t g) const {
    const int64_t of = head_ * rows_ + m;
    const uint32_t* at = s_.scores + m * A::kLimbs * kChunk + g * kGroup;
    F32x16 score;
    if constexpr (A::kFixed) {
      I32x16 limbs[A::kLimbs];
      for (int l = 0; l < A::kLimbs; ++l) limbs[l] = load<I32x16>(at + l * kChunk) - s_.biases[of * A::kLimbs + l];
      score = A::join(limbs) * s_.query_scales[of];
    } else {
      score = load<F32x16>(at);
    }
    if constexpr (C::kTogether == 4) score = score * load<F32x16>(s_.key_scales + g * kGroup);
    if (a_.softcap > 0) return tanh(score * (a_.scale / a_.softcap)) * (a_.softcap * kLog2e);
    return score * (a_.scale * kLog2e);
  }

  // A row's scores of a chunk become weights, relative to the largest score so far.
  __attribute__((noinline)) void weigh(int64_t m, int64_t chunk, const Tile& tile) {
    const int64_t position = block_.position + m / G_;
    const int64_t begin = max(a_.first_key(position) - chunk, 0), end = min(position + 1 - chunk, kChunk);
    const int64_t tile_first = max(tile.begin - chunk, 0) / kGroup;
    const int64_t tile_groups = (min(tile.end - chunk, kChunk) + kGroup - 1) / kGroup;
    uint32_t* const row = s_.scores + m * A::kLimbs * kChunk;
    if (begin >= end) {
      fill(row, tile_first, tile_groups);
      s_.weight_scales[m] = 0;
      return;
    }
    const int64_t first = begin / kGroup, groups = (end + kGroup - 1) / kGroup;
    constexpr int32_t kOrder[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const I32x16 lane = load<I32x16>(kOrder);
    F32x16 peaks = splat(-kInfinity);
    for (int64_t g = first; g < groups; ++g) {
      F32x16 score = score_of(m, g);
      const I32x16 key = lane + static_cast<int32_t>(g * kGroup);
      const I32x16 seen = (key >= static_cast<int32_t>(begin)) & (key < static_cast<int32_t>(end));
      score = select(seen, score, splat(-kInfinity));
      peaks = select(score > peaks, score, peaks);
      store(row + g * kGroup, score);
    }
    float* state = state_ + (head_ * rows_ + m) * ld_;
    float& largest_so_far = s_.peaks[head_ * rows_ + m];
    F32x16 total = load<F32x16>(state + ld_ - kLanes);
    const float before = largest_so_far, peak = largest(peaks);
    if (peak > before) {
      const float factor = exp2(before - peak);
      largest_so_far = peak;
      total *= factor;
      for (int64_t i = 0; i < ld_ - kLanes; i += kLanes) store(state + i, load<F32x16>(state + i) * factor);
    }
    // A row without a finite score yet must not subtract one infinity from another.
    const float origin = largest_so_far > kLowest ? largest_so_far : kLowest;
    F32x16 heaviest{};
    fill(row, tile_first, first);
    for (int64_t g = first; g < groups; ++g) {
      F32x16 weight = exp2(load<F32x16>(row + g * kGroup) - origin);
      total += weight;
      if constexpr (C::kTogether == 4) {
        weight *= load<F32x16>(s_.value_scales + g * kGroup);
        heaviest = select(weight > heaviest, weight, heaviest);
      }
      put(row, g, weight);
    }
    if constexpr (A::kFixed) fix_weights(m, row, first, groups, largest(heaviest));
    fill(row, groups, tile_groups);
    store(state + ld_ - kLanes, total);
  }

  // Weights take the place of scores that were read already.
  static void put(uint32_t* row, int64_t g, F32x16 weight) {
    if constexpr (A::kNarrow) {
      narrow(reinterpret_cast<uint16_t*>(row + g * kGroup / 2), weight);
    } else {
      store(row + g * kGroup, weight);
    }
  }

  static void fill(uint32_t* row, int64_t first, int64_t end) {
    if (first >= end) return;
    for (int l = 0; l < A::kLimbs; ++l)
      std::memset(row + l * kChunk + first * A::kOperands, 0, static_cast<size_t>((end - first) * A::kOperands) * 4);
  }

  // A row's weights as fixed-point numbers relative to the heaviest.
  void fix_weights(int64_t m, uint32_t* row, int64_t first, int64_t groups, float heaviest) {
    if constexpr (A::kFixed) {
      const float inverse = heaviest > 1e-30f ? A::kLargestWeight / heaviest : 0;
      s_.weight_scales[m] = heaviest / A::kLargestWeight;
      for (int64_t g = first; g < groups; ++g) {
        const F32x16 scaled = load<F32x16>(row + g * kGroup) * inverse + 0.5f;
        A::put_weights(bit_cast<U32x16>(convert<I32x16>(scaled)), row + g * A::kOperands);
      }
    }
  }

  void add_values(int64_t chunk, int64_t first, int64_t groups) {
    const uint32_t* from[kGroups];
    Ahead ahead[kGroups];
    Weighted tile{nullptr, nullptr, nullptr, nullptr, words_, 0, width_, (a_.K + kLanes - 1) / kLanes};
    for (int64_t g = first; g < groups; ++g) {
      from[g] = values(chunk + g * kGroup, g, s_.values + g * kGroup / C::kTogether * width_);
      ahead[g] = ahead_of_values(g, first, groups);
    }
    // Steps are counted from the start of the chunk, as the sums of fixed-point numbers are rounded after each.
    for (int64_t step = first / kStep * kStep; step < groups; step += kStep) {
      for (const Tile* t = s_.tiles; t < s_.tiles + tiles_; ++t) {
        const int64_t g = max(max(first, step), (t->begin - chunk) / kGroup);
        tile.groups = min(min(groups, step + kStep), (t->end - chunk + kGroup - 1) / kGroup) - g;
        if (t->end <= chunk || tile.groups <= 0) continue;
        tile.weights = s_.scores + t->row * A::kLimbs * kChunk + g * A::kOperands;
        tile.scales = s_.weight_scales + t->row;
        tile.values = from + g;
        tile.next = ahead + g;
        with_rows<kTileRows>(t->rows, [&]<int R>() {
          value_columns<A, R, vectors_for(R * A::kSums)>(tile, 0, state_ + (head_ * rows_ + t->row) * ld_, ld_);
        });
      }
    }
  }

  const Attention& a_;
  const QueryBlock& block_;
  float* const state_;
  const int64_t G_ = a_.group();
  const int64_t rows_ = block_.count * G_;     // of a head
  const bool in_place_ = a_.B % kGroup == 0;   // pages hold whole groups
  const int64_t words_ = a_.K / C::kTogether;  // of a key
  const int64_t ldq_ = words_ * A::kParts * A::kLimbs * kOperandWords<A>;
  const int64_t width_ = max(a_.K, kLanes);  // words of a row of values
  const int64_t ld_ = a_.state_floats();
  int64_t begin_ = 0;  // the first key that any row sees
  int64_t tiles_ = 0;
  Place places_[2][kGroups];
  int64_t head_ = 0;            // of the block's
  const Place* here_ = nullptr;  // of the groups at hand
  const Place* next_ = nullptr;  // of those that are read next
  int64_t next_first_ = 0, next_groups_ = 0, next_head_ = 0;
  Scratch s_;
};

// --- the table -------------------------------------------------------------------------------------------------------

int64_t scratch_floats(const Attention& a, int64_t rows) {
  return Scratch().lay_out(a, rows, 0) / static_cast<int64_t>(sizeof(float));
}

template <class A>
void attend_as(const Attention& a, const QueryBlock& block, int64_t split, void* scratch, float* partial) {
  Pass<A>(a, block, scratch, partial).run(split);
}

void attend(const Attention& a, const QueryBlock& block, int64_t split, void* scratch, float* partial) {
#if defined(__AVX512F__)
  const bool narrow = a.query_type == Element::kBF16;
  auto* pass = a.cache_type == Element::kF32    ? attend_as<Wide<F32>>
               : a.cache_type == Element::kFp8  ? attend_as<Wide<Fp8>>
               : a.cache_type == Element::kInt8 ? (narrow ? attend_as<Fixed<2>> : attend_as<Fixed<3>>)
#if defined(__AVX512BF16__)
               : narrow                         ? attend_as<Narrow>
#endif
                                                : attend_as<Wide<BF16>>;
#else
  auto* pass = a.cache_type == Element::kF32    ? attend_as<Wide<F32>>
               : a.cache_type == Element::kFp8  ? attend_as<Wide<Fp8>>
               : a.cache_type == Element::kBF16 ? attend_as<Wide<BF16>>
#if defined(__AVX2__)
               : a.query_type == Element::kBF16 ? attend_as<Pairs>
#endif
                                                : attend_as<Wide<Int8>>;
#endif
  pass(a, block, split, scratch, partial);
}

}  // namespace

#define TENFOLD_JOIN_(a, b) a##b
#define TENFOLD_JOIN(a, b) TENFOLD_JOIN_(a, b)

const AttentionKernels TENFOLD_JOIN(TENFOLD_INSTRUCTION_SET, _attention) = {
    scratch_floats, attend, clear, merge, finish, write,
};

}  // namespace tenfold
