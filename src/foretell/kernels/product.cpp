// Panels and formats; the arithmetic is in product_*.cpp.
#include "product.h"

namespace ft {

int64_t padded_inputs(int format, int64_t k) {
  if (format == F32) return k;
  if (format == BF16) return (k + 1) / 2 * 2;
  return (k + BLOCK - 1) / BLOCK * BLOCK;
}

static int64_t panel_size(int format, int64_t k, int group) {
  const int64_t kp = padded_inputs(format, k);
  switch (format) {
    case F32: return kp * PANEL * 4;
    case BF16: return kp * PANEL * 2;
    case INT8: return kp * PANEL + PANEL * 4;
    case INT4:
      if ((group != 32 && group != 64 && group != 128) || k % group) return -1;
      return kp / group * (group * PANEL / 2 + PANEL * 2);
  }
  return -1;
}

int64_t packed_bytes(int format, int64_t n, int64_t k, int group) {
  const int64_t one = n > 0 && k > 0 ? panel_size(format, k, group) : -1;
  return one < 0 ? -1 : one * ((n + PANEL - 1) / PANEL);
}

Matrix make_matrix(int format, int64_t n, int64_t k, int group, const void* data,
                   const float* bias) {
  return Matrix{format, n, k, (n + PANEL - 1) / PANEL, padded_inputs(format, k), group,
                (const uint8_t*)data, panel_size(format, k, group), bias};
}

void deliver(const Out& out, int64_t row, int count, const float* y) {
  for (int r = 0; r < count; ++r, y += PANEL) {
    float* p = out.p + (row + r) * out.ld;
    if (out.columns == PANEL) {
      for (int at = 0; at < PANEL; at += LANES) {
        v16 v = load(y + at);
        if (out.bias) v = v + load(out.bias + at);
        if (out.add) v = load(p + at) + splat(out.alpha) * v;
        store(p + at, v);
      }
      continue;
    }
    for (int c = 0; c < out.columns; ++c) {
      float v = y[c];
      if (out.bias) v = v + out.bias[c];
      if (out.add) v = p[c] + out.alpha * v;
      p[c] = v;
    }
  }
}

// The outputs of the last call were written by whichever thread had this panel then, so their lines
// are likely to sit in another core's cache. Asking for them while the weights stream in costs
// nothing; waiting for them afterwards, one store after the other, costs more than the arithmetic.
// (Inlined, because a compiler drops a call to a function that does nothing but prefetch.)
FT_INLINE void own(const Out& out, int64_t rows) {
  for (int64_t r = 0; r < rows && r < 64; ++r) {
    const float* p = out.p + r * out.ld;
    __builtin_prefetch(p, 1, 3);
    __builtin_prefetch(p + LANES, 1, 3);
    __builtin_prefetch(p + out.columns - 1, 1, 3);
  }
}

static void run(const Matrix& m, const Rows& rows, int64_t begin, int64_t end, float* out,
                int64_t ld, bool add, float alpha) {
  if (rows.rows <= 0) return;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t left = m.n - p * PANEL;
    const Out to{out + (p - begin) * PANEL, ld, (int)(left < PANEL ? left : PANEL),
                 m.bias ? m.bias + p * PANEL : nullptr, add, alpha};
    const uint8_t* panel = m.data + p * m.panel_bytes;
    own(to, rows.rows);
    switch (m.format) {
      case F32: panel_f32(m, panel, rows, to); break;
      case BF16: panel_bf16(m, panel, rows, to); break;
      case INT8: panel_int8(m, panel, rows, to); break;
      case INT4: panel_int4(m, panel, rows, to); break;
    }
  }
}

void product(const Matrix& m, const Rows& rows, int64_t panel_begin, int64_t panel_end, float* out,
             int64_t ld) {
  run(m, rows, panel_begin, panel_end, out, ld, false, 1.0f);
}

void product_add(const Matrix& m, const Rows& rows, int64_t panel_begin, int64_t panel_end,
                 float* acc, int64_t ld, float alpha) {
  run(m, rows, panel_begin, panel_end, acc, ld, true, alpha);
}

}  // namespace ft
