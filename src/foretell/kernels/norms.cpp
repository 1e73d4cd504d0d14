#include "norms.h"

#include <math.h>

#include "simd.h"

namespace ft {
namespace {

FT_INLINE v16 tail(const float* x, int64_t n) {  // fewer than 16 numbers, then zeros
  float rest[LANES] = {0};
  memcpy(rest, x, (size_t)n * 4);
  return load(rest);
}

}  // namespace

float inverse_rms(const float* x, int64_t n, float eps) {
  v16 a = splat(0.0f), b = a;  // two chains hide the latency of the additions
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    const v16 p = load(x + i), q = load(x + i + LANES);
    a = fma(p, p, a);
    b = fma(q, q, b);
  }
  if (i + LANES <= n) {
    const v16 p = load(x + i);
    a = fma(p, p, a);
    i += LANES;
  }
  if (i < n) {
    const v16 p = tail(x + i, n - i);
    b = fma(p, p, b);
  }
  return 1.0f / sqrtf(sum(a + b) / (float)n + eps);
}

void norm_row(int kind, const NormWeights& w, const float* x, int64_t n, float eps, float* out) {
  const int64_t padded = padded16(n);
  if (kind == RMS) {
    const v16 scale = splat(inverse_rms(x, n, eps));
    for (int64_t i = 0; i < padded; i += LANES) {
      v16 y = load(x + i) * scale * load(w.weight + i);
      if (w.bias) y = y + load(w.bias + i);
      store(out + i, y);
    }
    return;
  }
  v16 total = splat(0.0f);
  for (int64_t i = 0; i < padded; i += LANES) total = total + load(x + i);  // the padding is zero
  const v16 mean = splat(sum(total) / (float)n);
  v16 squares = splat(0.0f);
  for (int64_t i = 0; i < padded; i += LANES) {
    v16 d = load(x + i) - mean;
    if (i + LANES > n) d = keep(d, n - i, 0.0f);
    squares = fma(d, d, squares);
  }
  const v16 scale = splat(1.0f / sqrtf(sum(squares) / (float)n + eps));
  for (int64_t i = 0; i < padded; i += LANES) {
    v16 y = (load(x + i) - mean) * scale * load(w.weight + i);
    if (w.bias) y = y + load(w.bias + i);
    store(out + i, y);
  }
}

}  // namespace ft
