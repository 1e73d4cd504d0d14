// What becomes of a head before attention: rotation, and its rows of the cache.
#include <string.h>

#include "attention.h"
#include "simd.h"

namespace ft {

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
