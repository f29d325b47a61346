// Storing new keys and values in the pages of a cache.
#pragma once

#include <cstring>
#include <type_traits>

#include "attention.h"
#include "attention_tiles.h"
#include "functions.h"

namespace tenfold {
namespace {

template <class C>
float finite(float x) {
  const float largest = C::kTogether == 2 ? 3.38953139e38f : -kLowest;
  if (x != x) return 0;
  return x > largest ? largest : x < -largest ? -largest : x;
}

// A number of type Q as one of the cache.
template <class Q, class C>
typename C::Type narrowed(float x) {
  if constexpr (C::kTogether == 1)
    return x;
  else if constexpr (Q::kTogether == 2)
    return static_cast<uint16_t>(bit_cast<uint32_t>(x) >> 16);  // it was one before
  else
    return float_to_bf16(x);
}

// `count` keys or values of one head, `ld_from` apart, to neighbouring slots; element d of slot i goes to place(d, i).
template <class Q, class C, bool kValues, typename Place>
void put_slots(const typename Q::Type* from, int64_t ld_from, int64_t count, int64_t K, typename C::Type* to,
               float* scales, const Place& place) {
  const auto read = [&](int64_t i, int64_t d) {
    const float x = Q::widen(from[i * ld_from + d]);
    return kValues ? finite<C>(x) : x;
  };
  if constexpr (C::kTogether == 4) {
    for (int64_t i = 0; i < count; ++i) {
      float peak = 0, nan = 0;
      for (int64_t d = 0; d < K; ++d) {
        const float magnitude = __builtin_fabsf(read(i, d));
        peak = magnitude > peak ? magnitude : peak;
        nan += magnitude * 0.0f;
      }
      const float inverse = peak > 1e-30f && nan == 0 ? C::kLargest / peak : 0;
      for (int64_t d = 0; d < K; ++d) to[place(d, i)] = C::code(inverse > 0 ? read(i, d) * inverse : 0.0f);
      scales[i] = peak / C::kLargest + nan;
    }
  } else if constexpr (!kValues && std::is_same_v<Q, C>) {
    for (int64_t d = 0; d < K; d += C::kTogether)  // a word at a time
      for (int64_t i = 0; i < count; ++i) std::memcpy(to + place(d, i), from + i * ld_from + d, 4);
  } else {
    for (int64_t d = 0; d < K; ++d)
      for (int64_t i = 0; i < count; ++i) to[place(d, i)] = narrowed<Q, C>(read(i, d));
  }
}

// Fetches what the keys and values of a head, `count` from a slot on, are stored in: each word of a key in a line of its
// own, which storing them one after another would wait for.
template <class C>
void fetch_slots(const Attention& a, int64_t block, int64_t slot, int64_t count) {
  constexpr int64_t u = C::kTogether, kLine = 64 / sizeof(typename C::Type);
  const auto* keys = static_cast<const typename C::Type*>(a.keys) + block * a.B * a.K;
  const auto* values = static_cast<const typename C::Type*>(a.values) + block * a.B * a.K;
  for (int64_t word = 0; word < a.K / u; ++word)
    for (int64_t i = 0; i < count * u; i += kLine) __builtin_prefetch(keys + (word * a.B + slot) * u + i, 1);
  for (int64_t i = slot / u * a.K * u; i < (slot + count + u - 1) / u * a.K * u; i += kLine)
    __builtin_prefetch(values + i, 1);
}

template <class Q, class C>
void write_as(const Attention& a, const NewTokens& n) {
  constexpr int64_t u = C::kTogether;
  const int64_t ld = a.J * a.K, B = a.B, K = a.K;
  for (int64_t done = 0; done < n.count;) {
    const int64_t position = n.position + done, slot = position % B, count = min(n.count - done, B - slot);
    const int64_t page = a.tables[n.row * a.N + position / B];
    for (int64_t j = 0; j < a.J && page >= 0 && page < a.P; ++j) fetch_slots<C>(a, page * a.J + j, slot, count);
    for (int64_t j = 0; j < a.J && page >= 0 && page < a.P; ++j) {
      const int64_t block = page * a.J + j, from = (n.token + done) * ld + j * K;
      float* key_scales = u == 4 ? a.key_scales + block * B + slot : nullptr;
      float* value_scales = u == 4 ? a.value_scales + block * B + slot : nullptr;
      put_slots<Q, C, false>(static_cast<const typename Q::Type*>(n.keys) + from, ld, count, K,
                             static_cast<typename C::Type*>(a.keys) + block * B * K, key_scales,
                             [&](int64_t d, int64_t i) { return (d / u * B + slot + i) * u + d % u; });
      put_slots<Q, C, true>(static_cast<const typename Q::Type*>(n.values) + from, ld, count, K,
                            static_cast<typename C::Type*>(a.values) + block * B * K, value_scales,
                            [&](int64_t d, int64_t i) { return ((slot + i) / u * K + d) * u + (slot + i) % u; });
    }
    done += count;
  }
}

template <class Q>
void write_from(const Attention& a, const NewTokens& n) {
  if (a.cache_type == Element::kInt8) return write_as<Q, Int8>(a, n);
  if (a.cache_type == Element::kFp8) return write_as<Q, Fp8>(a, n);
  if (a.cache_type == Element::kBF16) return write_as<Q, BF16>(a, n);
  write_as<Q, F32>(a, n);
}

void write(const Attention& a, const NewTokens& n) {
  a.query_type == Element::kF32 ? write_from<F32>(a, n) : write_from<BF16>(a, n);
}

}  // namespace
}  // namespace tenfold
