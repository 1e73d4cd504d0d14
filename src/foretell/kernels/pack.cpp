// Weights into panels and back (layouts: matrix.h), 32 rows at a time: nothing is held but one row.
#include "pack.h"

#include <stdlib.h>

#include "simd.h"

namespace ft {
namespace {

// float16 of x, nearest, halves to even
uint16_t half_of(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  const uint16_t sign = (uint16_t)((b >> 16) & 0x8000);
  b &= 0x7fffffff;
  if (b > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (b >= 0x477ff000) return (uint16_t)(sign | 0x7c00);  // rounds to 65536 or above
  if (b < 0x38800000) {  // below 2^-14: units of 2^-24; adding 0.5 rounds at just that bit
    float y;
    memcpy(&y, &b, 4);
    y += 0.5f;
    memcpy(&b, &y, 4);
    return (uint16_t)(sign | (b - 0x3f000000));
  }
  b += 0xfff + ((b >> 13) & 1);
  return (uint16_t)(sign | ((b - 0x38000000) >> 13));
}

float element(const Source& s, int64_t at) {
  switch (s.dtype) {
    case SOURCE_F32: return ((const float*)s.data)[at];
    case SOURCE_BF16: return float_of_bf16(((const uint16_t*)s.data)[at]);
    default: return float_of_half(((const uint16_t*)s.data)[at]);
  }
}

void read_row(const Source& s, int64_t row, int64_t k, float* out) {
  const int64_t at = (s.index ? s.index[row] : row) - s.first;
  if (s.dtype == SOURCE_F32) {
    memcpy(out, (const float*)s.data + at * k, (size_t)k * 4);
  } else {
    for (int64_t i = 0; i < k; ++i) out[i] = element(s, at * k + i);
  }
}

float absmax(const float* x, int64_t k) {
  v16 most = splat(0.0f);
  int64_t i = 0;
  for (; i + LANES <= k; i += LANES) most = max(abs(load(x + i)), most);
  float top = maximum(most);
  for (; i < k; ++i) top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
  return top;
}

FT_INLINE v16 nearest(v16 x, float lowest, float highest) {  // integers, halves to even; NaN: lowest
  return min(max(round_even(x), splat(lowest)), splat(highest));
}

void quantise(const float* x, int64_t k, float scale, float lowest, float highest, int8_t* q) {
  if (scale == 0) {
    memset(q, 0, (size_t)k);
    return;
  }
  for (int64_t i = 0; i < k; i += LANES) {
    float part[LANES] = {0};
    const int64_t n = k - i < LANES ? k - i : LANES;
    memcpy(part, x + i, (size_t)n * 4);
    int32_t r[LANES];
    store_i(r, to_int(nearest(load(part) / splat(scale), lowest, highest)));
    for (int64_t lane = 0; lane < n; ++lane) q[i + lane] = (int8_t)r[lane];
  }
}

// The scale of one INT4 group: the weight of largest magnitude is laid on -c for each candidate c,
// signed, so that the longer end of [-8, 7] serves it; for the integers that follow the best scale
// is the least-squares one, <x, q> / <q, q>, and the candidate that leaves the least error wins.
float scale_of_group(const float* x, int64_t width) {  // width: 32, 64 or 128
  const float top = absmax(x, width);
  if (top == 0) return 0;
  int64_t at = 0;
  while (fabsf(x[at]) != top) ++at;
  // In units of the largest magnitude: squares of tiny or huge weights stay numbers.
  const v16 unit = splat(1.0f / top);
  float best = -1, scale = 0;
  for (float c = 7.0f; c <= 9.0f; c += 0.5f) {
    const v16 steps = splat(x[at] > 0 ? -c : c);
    v16 xq = splat(0.0f), qq = splat(0.0f);
    for (int64_t i = 0; i < width; i += LANES) {
      const v16 y = load(x + i) * unit, q = nearest(y * steps, -8.0f, 7.0f);
      xq = xq + y * q;
      qq = qq + q * q;
    }
    const float dot = sum(xq), norm = sum(qq), gain = dot * dot / norm;
    if (gain > best) {
      best = gain;
      scale = dot / norm * top;
    }
  }
  const float kept = float_of_half(half_of(scale));
  if (isinf(kept) && isfinite(scale)) return scale > 0 ? 65504.0f : -65504.0f;
  return kept;
}

// Integers and scales of one row: taken as they are, or made of floats by the default rules
int integer_row(const Matrix& m, const Source& s, int64_t row, float* x, int8_t* q, float* scale) {
  const int64_t groups = m.format == INT4 ? m.k / m.group : 1;
  const int64_t width = m.k / groups;
  const int low = m.format == INT4 ? -8 : -128, high = m.format == INT4 ? 7 : 127;
  if (s.dtype == SOURCE_INT8) {
    const int64_t at = (s.index ? s.index[row] : row) - s.first;
    memcpy(q, (const int8_t*)s.data + at * m.k, (size_t)m.k);
    memcpy(scale, s.scale + at * groups, (size_t)groups * 4);
    for (int64_t i = 0; i < m.k; ++i)
      if (q[i] < low || q[i] > high) return PACK_RANGE;
    return PACK_OK;
  }
  read_row(s, row, m.k, x);
  for (int64_t i = 0; i < m.k; ++i)
    if (!isfinite(x[i])) return PACK_FINITE;
  for (int64_t g = 0; g < groups; ++g) {
    if (m.format == INT4) {
      scale[g] = scale_of_group(x + g * width, width);
      quantise(x + g * width, width, scale[g], -8, 7, q + g * width);
    } else {
      scale[g] = absmax(x, width) / 127.0f;
      quantise(x, width, scale[g], -127, 127, q);
    }
  }
  return PACK_OK;
}

int pack_integers(const Matrix& m, const Source& s, int64_t panel, uint8_t* out) {
  const int64_t groups = m.format == INT4 ? m.k / m.group : 1;
  float* x = (float*)malloc((size_t)m.k * 4);
  int8_t* q = (int8_t*)malloc((size_t)m.k);
  float* scale = (float*)malloc((size_t)groups * 4);
  int result = x && q && scale ? PACK_OK : PACK_MEMORY;
  if (result == PACK_OK) {
    memset(out, m.format == INT4 ? 0x88 : 0x80, (size_t)m.panel_bytes);  // all weights 0
    if (m.format == INT8) memset(out + m.kp * PANEL, 0, PANEL * 4);
    const int64_t stride = m.group * PANEL / 2 + PANEL * 2;  // INT4: of one group
    if (m.format == INT4)
      for (int64_t g = 0; g < groups; ++g)
        memset(out + g * stride + m.group * PANEL / 2, 0, PANEL * 2);
    for (int c = 0; c < PANEL && panel * PANEL + c < m.n && result == PACK_OK; ++c) {
      result = integer_row(m, s, panel * PANEL + c, x, q, scale);
      if (result != PACK_OK) break;
      if (m.format == INT8) {
        for (int64_t i = 0; i < m.k; ++i)
          out[(i / 4) * (4 * PANEL) + c * 4 + i % 4] = (uint8_t)(q[i] + 128);
        memcpy(out + m.kp * PANEL + c * 4, scale, 4);
        continue;
      }
      for (int64_t g = 0; g < groups; ++g) {
        uint8_t* to = out + g * stride;
        const int8_t* from = q + g * m.group;
        for (int i = 0; i < m.group; i += 8)
          for (int b = 0; b < 4; ++b)
            to[i / 8 * 128 + c * 4 + b] =
                (uint8_t)((from[i + b] + 8) | ((from[i + 4 + b] + 8) << 4));
        const uint16_t h = half_of(scale[g]);
        if (float_of_half(h) != scale[g]) result = PACK_SCALE;
        memcpy(to + m.group * PANEL / 2 + c * 2, &h, 2);
      }
    }
  }
  free(x);
  free(q);
  free(scale);
  return result;
}

int pack_floats(const Matrix& m, const Source& s, int64_t panel, uint8_t* out) {
  float* x = (float*)malloc((size_t)m.k * 4);
  if (!x) return PACK_MEMORY;
  memset(out, 0, (size_t)m.panel_bytes);
  for (int c = 0; c < PANEL && panel * PANEL + c < m.n; ++c) {
    read_row(s, panel * PANEL + c, m.k, x);
    if (m.format == F32) {
      float* to = (float*)out + c;
      for (int64_t i = 0; i < m.k; ++i) to[i * PANEL] = x[i];
    } else {
      uint16_t* to = (uint16_t*)out + c * 2;
      for (int64_t i = 0; i < m.k; ++i) to[i / 2 * (2 * PANEL) + i % 2] = bf16_of(x[i]);
    }
  }
  free(x);
  return PACK_OK;
}

}  // namespace

int pack_panel(const Matrix& m, const Source& source, int64_t panel, uint8_t* out) {
  const bool integers = m.format == INT8 || m.format == INT4;
  if (!integers && source.dtype == SOURCE_INT8) return PACK_RANGE;
  return integers ? pack_integers(m, source, panel, out) : pack_floats(m, source, panel, out);
}

void unpack_row(const Matrix& m, int64_t row, float* x, int8_t* q, float* scale) {
  const uint8_t* from = m.data + row / PANEL * m.panel_bytes;
  const int64_t c = row % PANEL;
  if (m.format == F32) {
    for (int64_t i = 0; i < m.k; ++i) x[i] = ((const float*)from)[i * PANEL + c];
  } else if (m.format == BF16) {
    const uint16_t* w = (const uint16_t*)from + c * 2;
    for (int64_t i = 0; i < m.k; ++i) x[i] = float_of_bf16(w[i / 2 * (2 * PANEL) + i % 2]);
  } else if (m.format == INT8) {
    for (int64_t i = 0; i < m.k; ++i)
      q[i] = (int8_t)(from[(i / 4) * (4 * PANEL) + c * 4 + i % 4] - 128);
    memcpy(scale, from + m.kp * PANEL + c * 4, 4);
  } else {
    for (int64_t g = 0; g < m.k / m.group; ++g, from += m.group * PANEL / 2 + PANEL * 2) {
      for (int i = 0; i < m.group; ++i) {
        const uint8_t byte = from[i / 8 * 128 + c * 4 + i % 4];
        q[g * m.group + i] = (int8_t)((i % 8 < 4 ? byte & 15 : byte >> 4) - 8);
      }
      uint16_t h;
      memcpy(&h, from + m.group * PANEL / 2 + c * 2, 2);
      scale[g] = float_of_half(h);
    }
  }
}

}  // namespace ft
