// The k largest entries of rows, in falling order: the lower column first among equals, a NaN below
// anything (core/rows.py says the same in numpy).
//
// A row is read once, in chunks of DEEP lines of WIDE columns: entries under one another in a chunk
// are a lane, of which only the maximum is kept. The k-th largest maximum is a bound that at least k
// entries reach and, but for ties, few more, all of them in lanes whose maximum reaches it.
//
// Vectors are as long as registers: longer ones are compared element by element.
#include "simd.h"

#define FT_API extern "C" __attribute__((visibility("default")))

namespace {

#if defined(FT_AVX512)
constexpr int64_t LONG = 16;
#elif defined(FT_AVX2)
constexpr int64_t LONG = 8;
#else
constexpr int64_t LONG = 4;
#endif
typedef float vec __attribute__((vector_size(4 * LONG)));

constexpr int64_t WIDE = 16, DEEP = 16, CHUNK = WIDE * DEEP;
constexpr int64_t MOST = 128;    // of k: entries move up one by one
constexpr int64_t CHUNKS = 256;  // whose maxima are kept at once

// The best entries so far, in falling order.
struct Best {
  float* values;
  int64_t* columns;
  int64_t k, count = 0;

  bool takes(float x, int64_t column) const {
    if (count < k) return x == x;
    const float last = values[k - 1];
    return x > last || (x == last && column < columns[k - 1]);
  }
  void put(float x, int64_t column) {
    int64_t at = count < k ? count++ : k - 1;
    for (; at > 0; --at) {
      if (values[at - 1] > x || (values[at - 1] == x && columns[at - 1] < column)) break;
      values[at] = values[at - 1];
      columns[at] = columns[at - 1];
    }
    values[at] = x;
    columns[at] = column;
  }
};

inline vec at(const float* x) {
  vec v;
  memcpy(&v, x, sizeof v);
  return v;
}

// Of WIDE columns of DEEP lines; a NaN is no maximum.
inline void maxima(const float* x, float* out) {
  for (int64_t i = 0; i < WIDE; i += LONG) {
    vec top = vec{} - __builtin_inff();
    for (int64_t line = 0; line < DEEP; ++line) {
      const vec y = at(x + line * WIDE + i);
      top = y > top ? y : top;
    }
    memcpy(out + i, &top, sizeof top);
  }
}

// Which of WIDE numbers reach a bound, as bits.
inline uint32_t reaching(const float* x, float bound) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < WIDE; i += LONG) {
    const auto mask = at(x + i) >= vec{} + bound;
#if defined(FT_AVX512)
    bits |= (uint32_t)_mm512_movepi32_mask((__m512i)mask) << i;
#elif defined(FT_AVX2)
    bits |= (uint32_t)_mm256_movemask_ps((__m256)mask) << i;
#elif defined(__SSE2__)
    bits |= (uint32_t)_mm_movemask_ps((__m128)mask) << i;
#else
    for (int64_t j = 0; j < LONG; ++j) bits |= (uint32_t)(mask[j] & 1) << (i + j);
#endif
  }
  return bits;
}

void rank(const float* row, int64_t width, int64_t k, float* values, int64_t* columns) {
  float tops[CHUNKS * WIDE];  // of each lane
  float top_values[MOST];
  int64_t top_lanes[MOST];
  Best best{values, columns, k};
  for (int64_t from = 0; from < width; from += CHUNKS * CHUNK) {
    const int64_t size = width - from < CHUNKS * CHUNK ? width - from : CHUNKS * CHUNK;
    const int64_t chunks = size / CHUNK;
    const float* x = row + from;
    for (int64_t c = 0; c < chunks; ++c) maxima(x + c * CHUNK, tops + c * WIDE);

    Best lanes{top_values, top_lanes, k};
    float bound = best.count == k ? values[k - 1] : -__builtin_inff();
    for (int64_t c = 0; c < chunks; ++c) {
      for (uint32_t bits = reaching(tops + c * WIDE, bound); bits; bits &= bits - 1) {
        const int64_t lane = c * WIDE + __builtin_ctz(bits);
        if (lanes.takes(tops[lane], lane)) lanes.put(tops[lane], lane);
      }
      if (lanes.count == k) bound = top_values[k - 1];
    }
    for (int64_t c = 0; c < chunks; ++c) {
      for (uint32_t bits = reaching(tops + c * WIDE, bound); bits; bits &= bits - 1) {
        const int64_t lane = __builtin_ctz(bits), first = c * CHUNK + lane;
        if (!best.takes(tops[c * WIDE + lane], from + first)) continue;
        for (int64_t i = first; i < (c + 1) * CHUNK; i += WIDE)
          if (x[i] >= bound && best.takes(x[i], from + i)) best.put(x[i], from + i);
      }
      if (best.count == k && values[k - 1] > bound) bound = values[k - 1];
    }
    for (int64_t i = chunks * CHUNK; i < size; ++i)  // in no lane
      if (best.takes(x[i], from + i)) best.put(x[i], from + i);
  }
  for (int64_t i = 0; best.count < k; ++i)  // only NaN are left
    if (row[i] != row[i]) {
      values[best.count] = row[i];
      columns[best.count++] = i;
    }
}

}  // namespace

// values, columns [n, k] of rows `at` [n] (null: the first n) of x: `count` rows that begin `stride`
// entries apart, `width` wide. 0, or -1 where k is not within 1..min(width, 128) or a row is not
// there.
FT_API int64_t ft_topk(const float* x, int64_t count, int64_t stride, int64_t width,
                       const int64_t* at, int64_t n, int64_t k, float* values, int64_t* columns) {
  if (k < 1 || k > MOST || k > width || (!at && n > count)) return -1;
  for (int64_t i = 0; at && i < n; ++i)
    if (at[i] < 0 || at[i] >= count) return -1;
  for (int64_t i = 0; i < n; ++i)
    rank(x + (at ? at[i] : i) * stride, width, k, values + i * k, columns + i * k);
  return 0;
}
