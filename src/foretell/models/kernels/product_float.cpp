// F32 and BF16: one fused multiply-add chain per output, k ascending.
#include "product.h"

namespace ft {
namespace {

#if defined(FT_AVX512)
constexpr int HEIGHT = 8;  // 16 accumulators, 2 weights, 1 activation of 32 registers
#elif defined(__aarch64__)
constexpr int HEIGHT = 2;
#elif defined(FT_AVX2)
constexpr int HEIGHT = 3;
#else
constexpr int HEIGHT = 1;
#endif
// Inputs per block when there are more rows than one tile: a block of a panel as floats is 32 KB,
// which stays in L1 while the tiles pass over it. Accumulators wait in `sums` between blocks; the
// chain of each output is the same as without blocks.
#ifndef FT_DEPTH
#define FT_DEPTH 128
#endif
constexpr int DEPTH = FT_DEPTH;
constexpr int ROWS = 128;  // rows whose accumulators are kept: 16 KB

template <int R>
FT_INLINE void load_sums(v16 (&acc)[R][2], const float* sums) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    acc[r][0] = sums ? load(sums + r * PANEL) : splat(0);
    acc[r][1] = sums ? load(sums + r * PANEL + LANES) : splat(0);
  }
}

template <int R>
FT_INLINE void save_sums(const v16 (&acc)[R][2], float* sums) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(sums + r * PANEL, acc[r][0]);
    store(sums + r * PANEL + LANES, acc[r][1]);
  }
}

// acc[r] += x[r][i] * w[i] for i in [0, depth); w is [depth][32]
template <int R, bool STREAM>
FT_INLINE void chain_f32(v16 (&acc)[R][2], const float* w, const float* x, int64_t ld,
                         int64_t depth) {
  for (int64_t i = 0; i < depth; ++i, w += PANEL) {
    if (STREAM) {
      prefetch((const char*)w + FT_AHEAD);
      prefetch((const char*)w + FT_AHEAD + 64);
    }
    const v16 w0 = load(w), w1 = load(w + LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const v16 a = splat(x[r * ld + i]);
      acc[r][0] = fma(a, w0, acc[r][0]);
      acc[r][1] = fma(a, w1, acc[r][1]);
    }
  }
}

// The same over pairs of bfloat16: the low half of a word is the even input, the high half the odd
template <int R, bool STREAM>
FT_INLINE void chain_bf16(v16 (&acc)[R][2], const uint8_t* w, const float* x, int64_t ld,
                          int64_t depth) {
  const v16u high = (v16u)splat_i((int32_t)0xffff0000);
  for (int64_t i = 0; i + 1 < depth; i += 2, w += 128) {
    if (STREAM) {
      prefetch(w + FT_AHEAD);
      prefetch(w + FT_AHEAD + 64);
    }
    const v16u a = load_u(w), b = load_u(w + 64);
    const v16 a0 = as_float(a << 16), b0 = as_float(b << 16);
    const v16 a1 = as_float(a & high), b1 = as_float(b & high);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const v16 even = splat(x[r * ld + i]);
      acc[r][0] = fma(even, a0, acc[r][0]);
      acc[r][1] = fma(even, b0, acc[r][1]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const v16 odd = splat(x[r * ld + i + 1]);
      acc[r][0] = fma(odd, a1, acc[r][0]);
      acc[r][1] = fma(odd, b1, acc[r][1]);
    }
  }
  if (depth & 1) {
    const v16 a0 = as_float(load_u(w) << 16), b0 = as_float(load_u(w + 64) << 16);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const v16 even = splat(x[r * ld + depth - 1]);
      acc[r][0] = fma(even, a0, acc[r][0]);
      acc[r][1] = fma(even, b0, acc[r][1]);
    }
  }
}

struct WholeF32 {
  const uint8_t* panel;
  const Rows& rows;
  const Out& out;
  int64_t k;
  template <int R>
  FT_INLINE void run(int64_t row, bool) const {
    v16 acc[R][2];
    load_sums<R>(acc, nullptr);
    chain_f32<R, true>(acc, (const float*)panel, rows.x + row * rows.ld, rows.ld, k);
    alignas(64) float y[R * PANEL];
    save_sums<R>(acc, y);
    deliver(out, row, R, y);
  }
};

struct WholeBF16 {
  const uint8_t* panel;
  const Rows& rows;
  const Out& out;
  int64_t k;
  template <int R>
  FT_INLINE void run(int64_t row, bool) const {
    v16 acc[R][2];
    load_sums<R>(acc, nullptr);
    chain_bf16<R, true>(acc, panel, rows.x + row * rows.ld, rows.ld, k);
    alignas(64) float y[R * PANEL];
    save_sums<R>(acc, y);
    deliver(out, row, R, y);
  }
};

template <bool MEMORY>
struct BlockF32 {
  const float* w;
  const float* x;
  int64_t ld, depth;
  float* sums;     // [rows][32]
  bool first;   // start at zero instead of at `sums`
  template <int R>
  FT_INLINE void run(int64_t row, bool stream) const {
    v16 acc[R][2];
    load_sums<R>(acc, first ? nullptr : sums + row * PANEL);
    if (MEMORY && stream)
      chain_f32<R, true>(acc, w, x + row * ld, ld, depth);
    else
      chain_f32<R, false>(acc, w, x + row * ld, ld, depth);
    save_sums<R>(acc, sums + row * PANEL);
  }
};

void widen(const uint8_t* w, float* wide, int64_t depth) {
  const v16u high = (v16u)splat_i((int32_t)0xffff0000);
  for (int64_t i = 0; i < depth; i += 2, w += 128, wide += 2 * PANEL) {
    prefetch(w + FT_AHEAD);
    prefetch(w + FT_AHEAD + 64);
    const v16u a = load_u(w), b = load_u(w + 64);
    store(wide, as_float(a << 16));
    store(wide + 16, as_float(b << 16));
    store(wide + 32, as_float(a & high));
    store(wide + 48, as_float(b & high));
  }
}

template <bool NARROW>
void blocked(const Matrix& m, const uint8_t* panel, const Rows& rows, const Out& out) {
  alignas(64) float sums[ROWS * PANEL];
  alignas(64) float wide[NARROW ? DEPTH * PANEL : 1];
  for (int64_t row = 0; row < rows.rows; row += ROWS) {
    const int64_t count = rows.rows - row < ROWS ? rows.rows - row : ROWS;
    for (int64_t at = 0; at < m.k; at += DEPTH) {
      const int64_t depth = m.k - at < DEPTH ? m.k - at : DEPTH;
      const float* w = (const float*)panel + at * PANEL;
      if (NARROW) {
        widen(panel + at * PANEL * 2, wide, depth);
        w = wide;
      }
      const BlockF32<!NARROW> block{w, rows.x + row * rows.ld + at, rows.ld, depth, sums, at == 0};
      each_tile<HEIGHT>(count, block);
    }
    deliver(out, row, (int)count, sums);
  }
}

}  // namespace

void panel_f32(const Matrix& m, const uint8_t* panel, const Rows& rows, const Out& out) {
  if (rows.rows > HEIGHT) return blocked<false>(m, panel, rows, out);
  each_tile<HEIGHT>(rows.rows, WholeF32{panel, rows, out, m.k});
}

void panel_bf16(const Matrix& m, const uint8_t* panel, const Rows& rows, const Out& out) {
  if (rows.rows > HEIGHT) return blocked<true>(m, panel, rows, out);
  each_tile<HEIGHT>(rows.rows, WholeBF16{panel, rows, out, m.k});
}

}  // namespace ft
