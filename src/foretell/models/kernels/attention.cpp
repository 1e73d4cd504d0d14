#include "attention.h"

#include "maths.h"
#include "norms.h"

namespace ft {
namespace {

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

// Sixteen vectors -> their sums, each by the tree of simd.h: lanes (0,8), (0,4), (0,2), (0,1).
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
  v16 out;
  for (int i = 0; i < LANES; ++i) out[i] = sum(a[i]);
  return out;
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
    alignas(64) float s[LANES];
    store(s, sums(acc));
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
  for (; d + 4 * LANES <= padded; d += 4 * LANES)
    weigh_tile<NQ, 4>(p, ldp, v + d, stride, count, acc + d, padded);
  if (d + 2 * LANES <= padded) {
    weigh_tile<NQ, 2>(p, ldp, v + d, stride, count, acc + d, padded);
    d += 2 * LANES;
  }
  if (d < padded) weigh_tile<NQ, 1>(p, ldp, v + d, stride, count, acc + d, padded);
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
      for (int64_t lane = n - i; lane < LANES; ++lane) s[lane] = -INFINITY;
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

int64_t attention_scratch(int64_t queries, int64_t keys, int64_t size) {
  const int64_t padded = padded16(size);
  return SPAN * padded + queries * (2 * padded + padded16(keys));
}

void attend(const KvView& kv, int64_t head, const Keys* keys, int64_t rows, float* q, int64_t ld,
            int64_t group, float scale, float cap, float* scratch) {
  const int64_t size = kv.size, padded = padded16(size), queries = rows * group;
  int64_t most = 0, first = INT64_MAX, last = 0;
  for (int64_t r = 0; r < rows; ++r) {
    most = keys[r].total() > most ? keys[r].total() : most;
    if (keys[r].low >= keys[r].mid) continue;
    first = keys[r].low < first ? keys[r].low : first;
    last = keys[r].mid > last ? keys[r].mid : last;
  }
  const int64_t lds = padded16(most);
  float* buffer = scratch;
  float* scaled = buffer + SPAN * padded;  // [queries][padded]
  float* acc = scaled + queries * padded;  // [queries][padded]
  float* scores = acc + queries * padded;  // [queries][lds]
  if (padded > size)
    for (int64_t j = 0; j < SPAN; ++j)
      for (int64_t d = size; d < padded; ++d) buffer[j * padded + d] = 0.0f;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t a = 0; a < group; ++a) {
      const float* from = q + r * ld + a * size;
      float* to = scaled + (r * group + a) * padded;
      for (int64_t d = 0; d < size; ++d) to[d] = from[d] * scale;
      for (int64_t d = size; d < padded; ++d) to[d] = 0.0f;
    }
  memset(acc, 0, (size_t)(queries * padded) * 4);

  int64_t stride;
  const Loader k{kv, head * size, padded, buffer};
  const Loader v{kv, (kv.heads + head) * size, padded, buffer};
  k.ahead(first, first + SPAN < last ? first + SPAN : last);
  for (int64_t b = first; b < last; b += SPAN) {
    const int64_t e = b + SPAN < last ? b + SPAN : last;
    const float* block = k.range(b, e, &stride);
    if (e < last)
      k.ahead(e, e + SPAN < last ? e + SPAN : last);
    else
      v.ahead(first, first + SPAN < last ? first + SPAN : last);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = keys[r].low > b ? keys[r].low : b;
      const int64_t to = keys[r].mid < e ? keys[r].mid : e;
      if (from >= to) continue;
      score(scaled + r * group * padded, group, padded, block + (from - b) * stride, stride,
            to - from, scores + r * group * lds + (from - keys[r].low), lds);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t range = keys[r].mid - keys[r].low;
    for (int64_t i = 0; i < keys[r].count; i += SPAN) {
      const int64_t n = keys[r].count - i < SPAN ? keys[r].count - i : SPAN;
      const float* block = k.listed(keys[r].list + i, n, &stride);
      score(scaled + r * group * padded, group, padded, block, stride, n,
            scores + r * group * lds + range + i, lds);
    }
    for (int64_t a = 0; a < group; ++a)  // the place of the first score takes no part any more
      scaled[(r * group + a) * padded] =
          soften(scores + (r * group + a) * lds, keys[r].total(), cap);
  }
  for (int64_t b = first; b < last; b += SPAN) {
    const int64_t e = b + SPAN < last ? b + SPAN : last;
    const float* block = v.range(b, e, &stride);
    v.ahead(e, e + SPAN < last ? e + SPAN : last);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t from = keys[r].low > b ? keys[r].low : b;
      const int64_t to = keys[r].mid < e ? keys[r].mid : e;
      if (from >= to) continue;
      weigh(scores + r * group * lds + (from - keys[r].low), lds, group,
            block + (from - b) * stride, stride, to - from, acc + r * group * padded, padded);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t range = keys[r].mid - keys[r].low;
    for (int64_t i = 0; i < keys[r].count; i += SPAN) {
      const int64_t n = keys[r].count - i < SPAN ? keys[r].count - i : SPAN;
      const float* block = v.listed(keys[r].list + i, n, &stride);
      weigh(scores + r * group * lds + range + i, lds, group, block, stride, n,
            acc + r * group * padded, padded);
    }
    for (int64_t a = 0; a < group; ++a) {
      const float* from = acc + (r * group + a) * padded;
      const float share = scaled[(r * group + a) * padded];
      float* to = q + r * ld + a * size;
      for (int64_t d = 0; d < size; ++d) to[d] = from[d] * share;
    }
  }
}

void write_kv(const KvView& kv, int64_t head, int64_t row, const float* k, const float* v) {
  const int64_t n = kv.size, at = row * kv.row() + head * n, other = at + kv.heads * n;
  if (!kv.half) {
    memcpy((float*)kv.base + at, k, (size_t)n * 4);
    memcpy((float*)kv.base + other, v, (size_t)n * 4);
    return;
  }
  uint16_t* p = (uint16_t*)kv.base + at;
  uint16_t* o = (uint16_t*)kv.base + other;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    store_bf16(p + i, load(k + i));
    store_bf16(o + i, load(v + i));
  }
  for (; i < n; ++i) {
    p[i] = bf16_of(k[i]);
    o[i] = bf16_of(v[i]);
  }
}

void rotate(float* head, int64_t dim, const float* turn) {
  const int64_t half = dim / 2;
  float* low = head;
  float* high = head + half;
  const float *c = turn, *s = turn + half;
  for (int64_t i = 0; i < half; ++i) {
    const float a = low[i], b = high[i];
    low[i] = a * c[i] - b * s[i];
    high[i] = b * c[i] + a * s[i];
  }
}

}  // namespace ft
