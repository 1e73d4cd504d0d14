// F32 and BF16: one fused multiply-add chain per output, k ascending.
#include "product.h"

namespace ft {
namespace {

#if defined(FT_AVX512)
constexpr int HEIGHT = 8;  // 16 accumulators, 2 weights, 1 activation of 32 registers
constexpr int HEIGHT_BF16 = 8;
#elif defined(__aarch64__)
constexpr int HEIGHT = 2;
constexpr int HEIGHT_BF16 = 2;
#elif defined(FT_AVX2)
constexpr int HEIGHT = 3;       // 12 accumulators of 16 registers
constexpr int HEIGHT_BF16 = 2;  // 8, and the halves of a pair
#else
constexpr int HEIGHT = 1;
constexpr int HEIGHT_BF16 = 1;
#endif
// Inputs per block when there are many rows: a block of a panel as floats is 16 KB, which stays in
// L1, beside the activations, while the tiles pass over it. Accumulators wait in `sums` between
// blocks; the chain of each output is the same as without blocks.
constexpr int DEPTH = 128;
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
template <int R, class A>
FT_INLINE void chain_f32(v16 (&acc)[R][2], const float* w, const float* x, int64_t ld,
                         int64_t depth, const A& ahead) {
  for (int64_t i = 0; i < depth; ++i, w += PANEL) {
    ahead.ask(i);
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
template <int R, class A>
FT_INLINE void chain_bf16(v16 (&acc)[R][2], const uint8_t* w, const float* x, int64_t ld,
                          int64_t depth, const A& ahead) {
  const v16u high = (v16u)splat_i((int32_t)0xffff0000);
  for (int64_t i = 0; i + 1 < depth; i += 2, w += 128) {
    ahead.ask(i / 2);
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
  FT_INLINE void run(int64_t row, int64_t tile, int64_t tiles) const {
    v16 acc[R][2];
    load_sums<R>(acc, nullptr);
    with_ahead(panel, k * PANEL * 4, tile, tiles, [&](const auto& ahead) FT_LAMBDA {
      chain_f32<R>(acc, (const float*)panel, rows.x + row * rows.ld, rows.ld, k, ahead);
    });
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
  FT_INLINE void run(int64_t row, int64_t tile, int64_t tiles) const {
    v16 acc[R][2];
    load_sums<R>(acc, nullptr);
    with_ahead(panel, (k + 1) / 2 * 128, tile, tiles, [&](const auto& ahead) FT_LAMBDA {
      chain_bf16<R>(acc, panel, rows.x + row * rows.ld, rows.ld, k, ahead);
    });
    alignas(64) float y[R * PANEL];
    save_sums<R>(acc, y);
    deliver(out, row, R, y);
  }
};

// A block that lies widened in L1: only the next one, as it is stored, is asked for.
struct NextBlock {
  const uint8_t* at;
  FT_INLINE void ask(int64_t step) const { prefetch(at + step * 64); }
};

template <bool NARROW>
struct Block {
  const float* w;
  const float* x;
  int64_t ld, depth;
  float* sums;            // [rows][32]
  bool first;             // start at zero instead of at `sums`
  const uint8_t* source;  // the block as it is stored, of `bytes` bytes
  int64_t bytes;
  template <int R>
  FT_INLINE void run(int64_t row, int64_t tile, int64_t tiles) const {
    v16 acc[R][2];
    load_sums<R>(acc, first ? nullptr : sums + row * PANEL);
    const float* from = x + row * ld;
    if constexpr (NARROW)
      chain_f32<R>(acc, w, from, ld, depth, NextBlock{tile ? source : source + bytes});
    else
      with_ahead(source, bytes, tile, tiles, [&](const auto& ahead) FT_LAMBDA {
        chain_f32<R>(acc, w, from, ld, depth, ahead);
      });
    save_sums<R>(acc, sums + row * PANEL);
  }
};

void widen(const uint8_t* w, float* wide, int64_t depth) {
  const v16u high = (v16u)splat_i((int32_t)0xffff0000);
  for (int64_t i = 0; i < depth; i += 2, w += 128, wide += 2 * PANEL) {
    prefetch(w + AHEAD_L1);
    prefetch(w + AHEAD_L1 + 64);
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
      const int64_t bytes = depth * PANEL * (NARROW ? 2 : 4);
      const uint8_t* source = panel + at * PANEL * (NARROW ? 2 : 4);
      const float* w = (const float*)source;
      if (NARROW) {
        widen(source, wide, depth);
        w = wide;
      }
      const float* x = rows.x + row * rows.ld + at;
      const Block<NARROW> block{w, x, rows.ld, depth, sums, at == 0, source, bytes};
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
  // Two passes unpack the words again, which costs less than a block of floats in between.
  if (rows.rows > 2 * HEIGHT_BF16) return blocked<true>(m, panel, rows, out);
  each_tile<HEIGHT_BF16>(rows.rows, WholeBF16{panel, rows, out, m.k});
}

}  // namespace ft
