// Paged attention of one block of queries; compiled once per instruction set.
#include "attention.h"

#include "attention_state.h"
#include "attention_tiles.h"
#include "cache_write.h"
#include "functions.h"
#include "vector.h"

#ifndef TENFOLD_INSTRUCTION_SET
#error "TENFOLD_INSTRUCTION_SET names what this is compiled for: baseline, avx2 or avx512"
#endif

namespace tenfold {
namespace {

constexpr int64_t kGroups = kChunk / kGroup;


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
    s_.lay_out(a, rows_, reinterpret_cast<uintptr_t>(scratch));
  }

  void run(int64_t split) {
    const int64_t last = block_.position + block_.count;  // keys that the last query sees
    const int64_t begin = max(split * kSplit, a_.first_key(block_.position)), end = min((split + 1) * kSplit, last);
    begin_ = begin;
    prepare_queries();
    prepare_tiles();
    for (int64_t m = 0; m < rows_; ++m) {
      s_.peaks[m] = -kInfinity;
      std::memset(state_ + m * ld_, 0, static_cast<size_t>(ld_) * sizeof(float));
    }
    int64_t chunk = begin / kChunk * kChunk;
    here_ = places_[0];
    next_ = places_[1];
    locate(chunk, begin, end, here_);
    for (bool cold = true; chunk < end; chunk += kChunk, cold = false) {
      next_groups_ = locate(chunk + kChunk, begin, end, next_);
      const int64_t first = max(begin - chunk, 0) / kGroup;
      const int64_t groups = (min(end - chunk, kChunk) + kGroup - 1) / kGroup;
      if constexpr (C::kTogether == 4) prepare_scales(chunk, first, groups);
      score(chunk, first, groups, cold);
      for (const Tile* t = s_.tiles; t < s_.tiles + tiles_; ++t) {
        for (int64_t m = t->row; m < t->row + t->rows; ++m) weigh(m, chunk, *t);
      }
      add_values(chunk, first, groups);
      Place* const before = here_;
      here_ = next_;
      next_ = before;
    }
    for (int64_t m = 0; m < rows_; ++m) {
      float* softmax = state_ + m * ld_ + ld_ - kLanes;
      softmax[1] = sum(load<F32x16>(softmax));
      softmax[0] = s_.peaks[m];
    }
  }

 private:
  static constexpr int kTileRows = kMaxRows / A::kLimbs;
  // 32-bit operands that the weights of a group are.
  static constexpr int64_t kOperands = A::kFixed ? kGroup / 4 : A::kNarrow ? kGroup / 2 : kGroup;

  // --- queries

  void prepare_queries() {
    for (int64_t m = 0; m < rows_; ++m) {
      const int64_t at = ((block_.token + m / G_) * a_.H + block_.head * G_ + m % G_) * a_.K;
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

  // A row as signed bytes, the highest first; each limb is a row of words. What is not finite makes all scores NaN.
  template <class Q>
  void fix_query(const typename Q::Type* from, Q, int64_t m) {
    if constexpr (A::kFixed) {
      constexpr float kLargest = 127.0f * A::kUnit;
      float peak = 0, nan = 0;
      for (int64_t d = 0; d < a_.K; ++d) {
        const float magnitude = __builtin_fabsf(Q::widen(from[d]));
        peak = magnitude > peak ? magnitude : peak;
        nan += magnitude * 0.0f;
      }
      const float inverse = peak > 1e-30f && nan == 0 ? kLargest / peak : 0;
      int8_t* to = reinterpret_cast<int8_t*>(s_.queries + m * ldq_);
      int32_t* biases = s_.biases + m * A::kLimbs;
      for (int l = 0; l < A::kLimbs; ++l) biases[l] = 0;
      for (int64_t d = 0; d < a_.K; ++d) {
        const float scaled = inverse > 0 ? Q::widen(from[d]) * inverse : 0.0f;
        int32_t code = static_cast<int32_t>(scaled + __builtin_copysignf(0.5f, scaled));
        for (int l = A::kLimbs - 1; l >= 0; --l) {
          const int8_t limb = static_cast<int8_t>(code);
          to[l * a_.K + d] = limb;
          biases[l] += 128 * limb;
          code = (code - limb) >> 8;
        }
      }
      s_.query_scales[m] = peak / kLargest + nan;
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
    int64_t block;  // page · J + head
    int64_t slot;
  };

  // The block table is data: a page that does not exist must not be read.
  Place place_of(int64_t key) const {
    const uint32_t at = static_cast<uint32_t>(key), B = static_cast<uint32_t>(a_.B);
    const int64_t page = a_.tables[block_.row * a_.N + at / B];
    return {(page >= 0 && page < a_.P ? page : 0) * a_.J + block_.head, at % B};
  }

  // The places of a chunk's groups between the keys `begin` and `end`; returns the end of the groups.
  int64_t locate(int64_t chunk, int64_t begin, int64_t end, Place* places) const {
    int64_t g = max(begin - chunk, 0) / kGroup;
    for (; g < kGroups && chunk + g * kGroup < end; ++g) places[g] = place_of(chunk + g * kGroup);
    return g;
  }

  const Type* keys_of(Place at) const { return static_cast<const Type*>(a_.keys) + at.block * a_.B * a_.K; }
  const Type* values_of(Place at) const { return static_cast<const Type*>(a_.values) + at.block * a_.B * a_.K; }
  const uint32_t* key_words(Place at) const { return reinterpret_cast<const uint32_t*>(keys_of(at)) + at.slot; }
  const uint32_t* value_words(Place at) const {
    return reinterpret_cast<const uint32_t*>(values_of(at)) + at.slot / C::kTogether * a_.K;
  }

  Ahead ahead_keys(Place at) const {
    return {reinterpret_cast<const char*>(key_words(at)), in_place_ ? a_.B * 4 : 0};
  }
  Ahead ahead_values(Place at) const {
    return {reinterpret_cast<const char*>(value_words(at)), in_place_ ? 64 : 0};
  }
  // While values are read, the keys of the next chunk are fetched.
  Ahead ahead_of_values(int64_t g) const { return g < next_groups_ ? ahead_keys(next_[g]) : ahead_values(here_[g]); }

  // Whether a key is one that the block may read: the pages of earlier ones may hold anything by now.
  bool held(int64_t key) const { return key >= begin_ && key < block_.kv_len; }

  // A group of keys, as if one page held it.
  void gather_keys(int64_t key, uint32_t* to) const {
    std::memset(to, 0, static_cast<size_t>(words_ * kGroup) * 4);
    for (int64_t i = 0, count = 1; i < kGroup; i += count, count = 1) {
      if (!held(key + i)) continue;
      const Place at = place_of(key + i);
      const uint32_t* from = key_words(at);
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
        std::memcpy(to, value_words(place_of(key + i)), static_cast<size_t>(a_.K) * 4);
        continue;
      }
      for (int64_t k = 0; k < u; ++k) {
        if (!held(key + i + k)) continue;
        const Type* from = reinterpret_cast<const Type*>(value_words(place_of(key + i + k))) + k;
        for (int64_t d = 0; d < a_.K; ++d) reinterpret_cast<Type*>(to)[d * u + k] = from[d * u];
      }
    }
  }

  // Pages are read in place where they hold whole groups.
  const uint32_t* keys(int64_t key, int64_t g, uint32_t* copy) const {
    if (in_place_) return key_words(here_[g]);
    gather_keys(key, copy);
    return copy;
  }

  const uint32_t* values(int64_t key, int64_t g, uint32_t* copy) const {
    // What lies past the sequence may be NaN, which a weight of 0 does not remove; codes are never NaN.
    const bool whole = C::kTogether == 4 || key + kGroup <= block_.kv_len;
    if (in_place_ && a_.K >= kLanes && whole) return value_words(here_[g]);
    gather_values(key, copy);
    return copy;
  }

  void prepare_scales(int64_t chunk, int64_t first, int64_t groups) {
    for (int64_t g = first; g < groups; ++g) {
      const int64_t key = chunk + g * kGroup, i = g * kGroup;
      if (in_place_ && key + kGroup <= block_.kv_len) {
        const int64_t at = here_[g].block * a_.B + here_[g].slot;
        store(s_.key_scales + i, load<F32x16>(a_.key_scales + at));
        store(s_.value_scales + i, load<F32x16>(a_.value_scales + at));
        continue;
      }
      for (int64_t at = i; at < i + kGroup; ++at) {
        const bool known = held(chunk + at);
        const Place place = place_of(known ? chunk + at : key);
        s_.key_scales[at] = known ? a_.key_scales[place.block * a_.B + place.slot] : 0;
        s_.value_scales[at] = known ? a_.value_scales[place.block * a_.B + place.slot] : 0;
      }
    }
  }

  // --- scores, weights, values

  // While keys are read, the values that belong to them are fetched; the keys themselves if no chunk came before.
  void score(int64_t chunk, int64_t first, int64_t groups, bool cold) {
    constexpr int64_t kNear = 4;
    const int64_t ldk = in_place_ ? a_.B : kGroup;
    for (int64_t g = first; g < groups; g += kPair) {
      const int64_t count = min(kPair, groups - g), key = chunk + g * kGroup;
      const uint32_t* from[kPair];
      Ahead ahead_next[kPair], ahead_value[kPair];
      for (int64_t i = 0; i < count; ++i) {
        from[i] = keys(key + i * kGroup, g + i, s_.keys + i * kGroup * words_);
        const Ahead at{reinterpret_cast<const char*>(from[i]), ldk * 4};
        ahead_next[i] = cold && g + i + kNear < groups ? ahead_keys(here_[g + i + kNear]) : at;
        ahead_value[i] = ahead_values(here_[g + i]);
      }
      for (const Tile* t = s_.tiles; t < s_.tiles + tiles_; ++t) {
        if (t->end <= key || t->begin >= key + count * kGroup) continue;
        const uint32_t* q = s_.queries + t->row * ldq_;
        uint32_t* to = s_.scores + t->row * A::kLimbs * kChunk + g * kGroup;
        with_rows<kTileRows>(t->rows, [&]<int R>() {
          constexpr int MR = R * A::kLimbs;
          if (count < kPair)
            score_tile<A, MR, 1>(q, words_, from, ldk, ahead_next, ahead_value, to);
          else
            score_tile<A, MR, kPair>(q, words_, from, ldk, ahead_next, ahead_value, to);
        });
        for (int64_t i = 0; i < count; ++i)
          ahead_next[i] = ahead_value[i] = {reinterpret_cast<const char*>(from[i]), ldk * 4};
      }
    }
  }

  // One row's scores of 16 keys, in units of log 2.
  F32x16 score_of(int64_t m, int64_t g) const {
    const uint32_t* at = s_.scores + m * A::kLimbs * kChunk + g * kGroup;
    F32x16 score;
    if constexpr (A::kFixed) {
      I32x16 limbs[A::kLimbs];
      for (int l = 0; l < A::kLimbs; ++l) limbs[l] = load<I32x16>(at + l * kChunk) - s_.biases[m * A::kLimbs + l];
      score = A::join(limbs) * s_.query_scales[m];
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
    float* state = state_ + m * ld_;
    F32x16 total = load<F32x16>(state + ld_ - kLanes);
    const float before = s_.peaks[m], peak = largest(peaks);
    if (peak > before) {
      const float factor = exp2(before - peak);
      s_.peaks[m] = peak;
      total *= factor;
      for (int64_t i = 0; i < ld_ - kLanes; i += kLanes) store(state + i, load<F32x16>(state + i) * factor);
    }
    // A row without a finite score yet must not subtract one infinity from another.
    const float origin = s_.peaks[m] > kLowest ? s_.peaks[m] : kLowest;
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
      std::memset(row + l * kChunk + first * kOperands, 0, static_cast<size_t>((end - first) * kOperands) * 4);
  }

  // A row's weights as unsigned bytes relative to the heaviest, the highest byte first.
  void fix_weights(int64_t m, uint32_t* row, int64_t first, int64_t groups, float heaviest) {
    if constexpr (A::kFixed) {
      constexpr float kLargest = 255.0f * A::kUnit;
      const float inverse = heaviest > 1e-30f ? kLargest / heaviest : 0;
      s_.weight_scales[m] = heaviest / kLargest;
      for (int64_t g = first; g < groups; ++g) {
        const F32x16 scaled = load<F32x16>(row + g * kGroup) * inverse + 0.5f;
        const U32x16 code = bit_cast<U32x16>(convert<I32x16>(scaled));
        for (int l = 0; l < A::kLimbs; ++l) {
          store_narrow(reinterpret_cast<uint8_t*>(row + l * kChunk + g * kGroup / 4),
                       (code >> (8 * (A::kLimbs - 1 - l))) & 0xffu);
        }
      }
    }
  }

  void add_values(int64_t chunk, int64_t first, int64_t groups) {
    const uint32_t* from[kGroups];
    Ahead ahead[kGroups];
    Weighted tile{nullptr, nullptr, nullptr, nullptr, 0, width_, (a_.K + kLanes - 1) / kLanes};
    for (int64_t g = first; g < groups; ++g) {
      from[g] = values(chunk + g * kGroup, g, s_.values + g * kGroup / C::kTogether * width_);
      ahead[g] = ahead_of_values(g);
    }
    for (const Tile* t = s_.tiles; t < s_.tiles + tiles_; ++t) {
      const int64_t g = max(first, (t->begin - chunk) / kGroup);
      tile.groups = min(groups, (t->end - chunk + kGroup - 1) / kGroup) - g;
      if (t->end <= chunk || tile.groups <= 0) continue;
      tile.weights = s_.scores + t->row * A::kLimbs * kChunk + g * kOperands;
      tile.scales = s_.weight_scales + t->row;
      tile.values = from + g;
      tile.next = ahead + g;
      with_rows<kTileRows>(t->rows, [&]<int R>() {
        value_columns<A, R, vectors_for(R * A::kLimbs)>(tile, 0, state_ + t->row * ld_, ld_);
      });
    }
  }

  const Attention& a_;
  const QueryBlock& block_;
  float* const state_;
  const int64_t G_ = a_.group();
  const int64_t rows_ = block_.count * G_;
  const bool in_place_ = a_.B % kGroup == 0;   // pages hold whole groups
  const int64_t words_ = a_.K / C::kTogether;  // of a key
  const int64_t ldq_ = words_ * A::kParts * A::kLimbs;
  const int64_t width_ = max(a_.K, kLanes);  // words of a row of values
  const int64_t ld_ = a_.state_floats();
  int64_t begin_ = 0;  // the first key that any row sees
  int64_t tiles_ = 0;
  Place places_[2][kGroups];
  Place* here_ = places_[0];  // of this chunk's groups
  Place* next_ = places_[1];  // of the next one's
  int64_t next_groups_ = 0;
  Scratch s_;
};

// --- the table -------------------------------------------------------------------------------------------------------

int64_t scratch_bytes(const Attention& a, int64_t rows) {
  return Scratch().lay_out(a, rows, 0);
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
               : narrow                         ? attend_as<Narrow>
                                                : attend_as<Wide<BF16>>;
#else
  auto* pass = a.cache_type == Element::kF32    ? attend_as<Wide<F32>>
               : a.cache_type == Element::kFp8  ? attend_as<Wide<Fp8>>
               : a.cache_type == Element::kInt8 ? attend_as<Wide<Int8>>
                                                : attend_as<Wide<BF16>>;
#endif
  pass(a, block, split, scratch, partial);
}

}  // namespace

#define TENFOLD_JOIN_(a, b) a##b
#define TENFOLD_JOIN(a, b) TENFOLD_JOIN_(a, b)

const AttentionKernels TENFOLD_JOIN(TENFOLD_INSTRUCTION_SET, _attention) = {
    scratch_bytes, attend, clear, merge, finish, write,
};

}  // namespace tenfold
