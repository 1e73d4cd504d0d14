// One row of activations to int8: a function of that row alone, the same on every instruction set.
#include <algorithm>

#include "matrix.h"
#include "simd.h"

namespace ft {

void quantise_row(const float* x, int64_t k, int64_t kp, int8_t* q, float* scale, int32_t* sums) {
  const float tiny = 7.888609052210118e-31f;  // 2^-100: below it 127 / absmax overflows
  // The magnitude of a float orders like its bits do, and NaN lies above infinity.
  v16i top = splat_i(0);
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) {
    const v16i bits = as_int(abs(load(x + i)));
    const v16i more = bits > top;
    top = (more & bits) | (~more & top);
  }
  int32_t lanes[LANES], highest = 0;
  store_i(lanes, top);
  for (int lane = 0; lane < LANES; ++lane) highest = std::max(highest, lanes[lane]);
  for (int64_t j = i; j < k; ++j) {
    int32_t bits;
    memcpy(&bits, x + j, 4);
    bits &= 0x7fffffff;
    highest = bits > highest ? bits : highest;
  }
  float absmax;
  memcpy(&absmax, &highest, 4);
  const bool finite = highest < 0x7f800000;
  const bool zero = absmax < tiny;
  *scale = zero ? 0.0f : absmax / 127.0f;
  if (zero || !finite) {  // infinity or NaN as the scale makes the outputs NaN, as they would be
    memset(q, 0, (size_t)kp);
    memset(sums, 0, (size_t)(kp / BLOCK) * 4);
    return;
  }
  const v16 inv = splat(127.0f / absmax);
  for (int64_t b = 0; b < kp; b += BLOCK) {
    v16i total = splat_i(0);
    for (int64_t at = b; at < b + BLOCK; at += LANES) {
      v16 v;
      if (at + LANES <= k) {
        v = load(x + at);
      } else {
        float rest[LANES] = {0};
        if (at < k) memcpy(rest, x + at, (size_t)(k - at) * 4);
        v = load(rest);
      }
      const v16i r = to_int(round_even(v * inv));
      store_bytes(q + at, r);
      total += r;
    }
    int32_t s = 0;
    store_i(lanes, total);
    for (int lane = 0; lane < LANES; ++lane) s += lanes[lane];
    sums[b / BLOCK] = s;
  }
}

}  // namespace ft
