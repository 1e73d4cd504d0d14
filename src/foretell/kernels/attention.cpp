#include "attention.h"

#include "attention_tiles.h"

namespace ft {

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

}  // namespace ft
