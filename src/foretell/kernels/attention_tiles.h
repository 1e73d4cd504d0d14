// The inner loops of attention, for attention.cpp alone: keys and values as floats, scores, their
// softmax, and the weighted sum of the values.
#pragma once
#include <string.h>

#include "attention.h"
#include "maths.h"
#include "norms.h"

namespace ft {
namespace {

#if defined(FT_AVX512)
constexpr int SUMS = 16;  // vectors of weighted values that are held in registers
#else
constexpr int SUMS = 4;
#endif
constexpr int64_t SPAN = 64;  // keys that are brought into the first-level cache at a time

// Brings rows of keys or values to [count][padded D] floats; returns where they are (the cache
// itself when they already look like that) and sets the stride.
struct Loader {
  const KvView& kv;
  int64_t offset;  // of this head inside a row
  int64_t padded;
  float* buffer;   // [SPAN][padded], its padding is zero

  FT_INLINE void one(int64_t row, float* out) const {
    const int64_t at = row * kv.row() + offset, n = kv.size;
    int64_t i = 0;
    if (kv.half) {
      const uint16_t* p = (const uint16_t*)kv.base + at;
      for (; i + LANES <= n; i += LANES) store(out + i, load_bf16(p + i));
      for (; i < n; ++i) out[i] = float_of_bf16(p[i]);
    } else {
      memcpy(out, (const float*)kv.base + at, (size_t)n * 4);
    }
  }
  // Asks for rows before they are needed: 1 KB apart, they are no stream to the processor.
  FT_INLINE void ahead(int64_t from, int64_t to) const {
    const int64_t width = kv.size * (kv.half ? 2 : 4);
    for (int64_t r = from; r < to; ++r) {
      const char* p = (const char*)kv.base + (r * kv.row() + offset) * (kv.half ? 2 : 4);
      for (int64_t i = 0; i < width; i += 64) prefetch(p + i);
    }
  }
  const float* range(int64_t from, int64_t to, int64_t* stride) const {
    if (!kv.half && kv.size == padded) {
      *stride = kv.row();
      return (const float*)kv.base + from * kv.row() + offset;
    }
    *stride = padded;
    for (int64_t r = from; r < to; ++r) one(r, buffer + (r - from) * padded);
    return buffer;
  }
  const float* listed(const int64_t* rows, int64_t count, int64_t* stride) const {
    *stride = padded;
    for (int64_t i = 0; i < count; ++i) one(rows[i], buffer + i * padded);
    return buffer;
  }
};

// Sixteen vectors -> their sums, each by the tree of simd.h: lanes (0,8), (0,4), (0,2), (0,1). (With
// AVX2 `pairs` does it, by the same tree.)
#if !defined(FT_AVX2)
FT_INLINE v16 sums(const v16* a) {
#if defined(FT_AVX512)
  __m512 s8[8], s4[4], s2[2];
  for (int i = 0; i < 8; ++i) {  // two vectors of eight partial sums side by side
    const __m512 x = (__m512)a[2 * i], y = (__m512)a[2 * i + 1];
    s8[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xEE));
  }
  for (int i = 0; i < 4; ++i) {  // 128-bit blocks: vectors 4i, 4i+1, 4i+2, 4i+3
    const __m512 x = s8[2 * i], y = s8[2 * i + 1];
    s4[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
  }
  for (int i = 0; i < 2; ++i) {  // block b: [4(2i) + b, same] [4(2i+1) + b, same]
    const __m512 x = s4[2 * i], y = s4[2 * i + 1];
    s2[i] = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xEE));
  }
  const __m512 s = _mm512_add_ps(_mm512_shuffle_ps(s2[0], s2[1], 0x88),
                                 _mm512_shuffle_ps(s2[0], s2[1], 0xDD));
  // lane 4b + j now holds vector 4j + b
  const __m512i order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return (v16)_mm512_permutexvar_ps(order, s);
#else
  float out[LANES];
  for (int i = 0; i < LANES; ++i) out[i] = sum(a[i]);
  return load(out);
#endif
}
#endif

// s[a * NK + i] = the product of query a and key i, of NQ * NK = 16 pairs
template <int NQ>
FT_INLINE void pairs(const float* q, int64_t padded, const float* const* key, float* s) {
  constexpr int NK = LANES / NQ;
#if defined(FT_AVX2)
  constexpr int ONCE = 4;  // sums fit the registers
  __m256 s8[LANES];
#pragma GCC unroll 16
  for (int at = 0; at < LANES; at += ONCE) {
    v16 acc[ONCE];
#pragma GCC unroll 16
    for (int i = 0; i < ONCE; ++i) acc[i] = splat(0.0f);
    for (int64_t d = 0; d < padded; d += LANES)
#pragma GCC unroll 16
      for (int i = 0; i < ONCE; ++i)
        acc[i] = fma(load(q + (at + i) / NK * padded + d), load(key[(at + i) % NK] + d), acc[i]);
#pragma GCC unroll 16
    for (int i = 0; i < ONCE; ++i) s8[at + i] = (__m256)(acc[i].a + acc[i].b);
  }
#pragma GCC unroll 16
  for (int at = 0; at < LANES; at += 8) {
    __m256 s4[4], s2[2];
    for (int i = 0; i < 4; ++i) {  // 128-bit blocks: pairs 2i and 2i + 1
      const __m256 x = s8[at + 2 * i], y = s8[at + 2 * i + 1];
      s4[i] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31));
    }
    for (int i = 0; i < 2; ++i) {  // block b: [4i + b, same, 4i + 2 + b, same]
      const __m256 x = s4[2 * i], y = s4[2 * i + 1];
      s2[i] = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xEE));
    }
    const __m256 one = _mm256_add_ps(_mm256_shuffle_ps(s2[0], s2[1], 0x88),
                                     _mm256_shuffle_ps(s2[0], s2[1], 0xDD));
    // lane 4b + j now holds pair 2j + b
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_ps(s + at, _mm256_permutevar8x32_ps(one, order));
  }
#else
  v16 acc[LANES];
  for (int i = 0; i < LANES; ++i) acc[i] = splat(0.0f);
  for (int64_t d = 0; d < padded; d += LANES) {
    v16 x[NQ];
    for (int a = 0; a < NQ; ++a) x[a] = load(q + a * padded + d);
    for (int i = 0; i < NK; ++i) {
      const v16 y = load(key[i] + d);
      for (int a = 0; a < NQ; ++a) acc[a * NK + i] = fma(x[a], y, acc[a * NK + i]);
    }
  }
  store(s, sums(acc));
#endif
}

// Scores of NQ queries against NK = 16 / NQ keys at a time; the last group repeats its last key.
template <int NQ>
FT_INLINE void dots(const float* q, int64_t padded, const float* k, int64_t stride, int64_t count,
                    float* scores, int64_t lds) {
  constexpr int NK = LANES / NQ;
  for (int64_t j = 0; j < count; j += NK) {
    const float* key[NK];
    for (int i = 0; i < NK; ++i) key[i] = k + (j + i < count ? j + i : count - 1) * stride;
    alignas(64) float s[LANES];
    pairs<NQ>(q, padded, key, s);
    if (j + NK <= count) {
      for (int a = 0; a < NQ; ++a) memcpy(scores + a * lds + j, s + a * NK, NK * 4);
    } else {
      for (int a = 0; a < NQ; ++a)
        for (int64_t i = 0; j + i < count; ++i) scores[a * lds + j + i] = s[a * NK + i];
    }
  }
}

FT_INLINE void score(const float* q, int64_t group, int64_t padded, const float* k, int64_t stride,
                     int64_t count, float* scores, int64_t lds) {
  int64_t a = 0;
  for (; a + 4 <= group; a += 4)
    dots<4>(q + a * padded, padded, k, stride, count, scores + a * lds, lds);
  if (a + 2 <= group) {
    dots<2>(q + a * padded, padded, k, stride, count, scores + a * lds, lds);
    a += 2;
  }
  if (a < group) dots<1>(q + a * padded, padded, k, stride, count, scores + a * lds, lds);
}

// acc[NQ][ND vectors] += p[NQ][count] * values, key by key.
template <int NQ, int ND>
FT_INLINE void weigh_tile(const float* p, int64_t ldp, const float* v, int64_t stride,
                          int64_t count, float* acc, int64_t padded) {
  v16 sum_[NQ][ND];
  for (int a = 0; a < NQ; ++a)
    for (int d = 0; d < ND; ++d) sum_[a][d] = load(acc + a * padded + d * LANES);
  for (int64_t j = 0; j < count; ++j) {
    v16 x[ND];
    for (int d = 0; d < ND; ++d) x[d] = load(v + j * stride + d * LANES);
    for (int a = 0; a < NQ; ++a) {
      const v16 w = splat(p[a * ldp + j]);
      for (int d = 0; d < ND; ++d) sum_[a][d] = fma(w, x[d], sum_[a][d]);
    }
  }
  for (int a = 0; a < NQ; ++a)
    for (int d = 0; d < ND; ++d) store(acc + a * padded + d * LANES, sum_[a][d]);
}

template <int NQ>
FT_INLINE void weigh_rows(const float* p, int64_t ldp, const float* v, int64_t stride,
                          int64_t count, float* acc, int64_t padded) {
  int64_t d = 0;
  if constexpr (NQ * 4 <= SUMS)
    for (; d + 4 * LANES <= padded; d += 4 * LANES)
      weigh_tile<NQ, 4>(p, ldp, v + d, stride, count, acc + d, padded);
  if constexpr (NQ * 2 <= SUMS)
    for (; d + 2 * LANES <= padded; d += 2 * LANES)
      weigh_tile<NQ, 2>(p, ldp, v + d, stride, count, acc + d, padded);
  for (; d < padded; d += LANES)
    weigh_tile<NQ, 1>(p, ldp, v + d, stride, count, acc + d, padded);
}

FT_INLINE void weigh(const float* p, int64_t ldp, int64_t group, const float* v, int64_t stride,
                     int64_t count, float* acc, int64_t padded) {
  int64_t a = 0;
  for (; a + 4 <= group; a += 4)
    weigh_rows<4>(p + a * ldp, ldp, v, stride, count, acc + a * padded, padded);
  if (a + 2 <= group) {
    weigh_rows<2>(p + a * ldp, ldp, v, stride, count, acc + a * padded, padded);
    a += 2;
  }
  if (a < group) weigh_rows<1>(p + a * ldp, ldp, v, stride, count, acc + a * padded, padded);
}

// scores[0 .. n) -> exp(score - largest); returns 1 / their sum.
FT_INLINE float soften(float* scores, int64_t n, float cap) {
  const v16 lowest = splat(-INFINITY);
  for (int64_t i = n; i < padded16(n); ++i) scores[i] = -INFINITY;
  v16 top = lowest;
  for (int64_t i = 0; i < n; i += LANES) {
    v16 s = load(scores + i);
    if (cap > 0.0f) {
      s = tanh(s / splat(cap)) * splat(cap);
      if (n - i < LANES) s = keep(s, n - i, -INFINITY);
      store(scores + i, s);
    }
    top = max(s, top);
  }
  const v16 largest = splat(maximum(top));
  v16 total = splat(0.0f);
  for (int64_t i = 0; i < n; i += LANES) {
    const v16 e = exp(load(scores + i) - largest);
    store(scores + i, e);
    total = total + e;
  }
  return 1.0f / sum(total);
}

}  // namespace
}  // namespace ft
