// INT4: exact integer sums inside a group, then t = fma(float(sum), scale, t) in group order.
#include "integers_avx2.h"
#include "product.h"

namespace ft {
namespace {

#if !defined(FT_AVX2)
#if defined(FT_AVX512)
FT_INLINE v16i dot(v16i acc, v16u w, int32_t a) {
  return (v16i)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(a));
}
#else
FT_INLINE v16i dot(v16i acc, v16u w, int32_t a) {
  for (int i = 0; i < 4; ++i)
    acc += (v16i)((w >> (8 * i)) & 255) * (int32_t)(int8_t)((uint32_t)a >> (8 * i));
  return acc;
}
#endif

// acc[r] += w * q over `steps` times 8 inputs from `p` and `q` on
template <int R, class A>
FT_INLINE void chain_int4(v16i (&acc)[R][2], const uint8_t* p, const int8_t* q, int64_t ldq,
                          int steps, const A& ahead) {
  const v16u low = (v16u)splat_i(0x0f0f0f0f);
  for (int step = 0; step < steps; ++step, p += 128, q += 8) {
    ahead.ask(step);
    const v16u a = load_u(p), b = load_u(p + 64);
    const v16u a0 = a & low, a1 = (a >> 4) & low, b0 = b & low, b1 = (b >> 4) & low;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const int32_t x = four(q + r * ldq), y = four(q + r * ldq + 4);
      acc[r][0] = dot(acc[r][0], a0, x);
      acc[r][1] = dot(acc[r][1], b0, x);
      acc[r][0] = dot(acc[r][0], a1, y);
      acc[r][1] = dot(acc[r][1], b1, y);
    }
  }
}
#endif

struct Tile {
  const Matrix& m;
  const uint8_t* panel;
  const Rows& rows;
  const Out& out;

  template <int R, class A>
  FT_INLINE void sum(v16 (&total)[R][2], int64_t row, A ahead) const {
    const uint8_t* p = panel;
    const int8_t* q = rows.q + row * rows.ldq;
    const int32_t* sums = rows.sums + row * rows.lds;
    const int64_t ldq = rows.ldq, lds = rows.lds;
    const int steps = m.group / 8, blocks = m.group / BLOCK;
    for (int64_t i = 0; i < m.kp; i += m.group) {
      v16i acc[R][2];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        int32_t s = sums[r * lds];
        for (int b = 1; b < blocks; ++b) s += sums[r * lds + b];
        acc[r][0] = acc[r][1] = splat_i(-8 * s);
      }
      sums += blocks;
      chain_int4<R>(acc, p, q, ldq, steps, ahead);
      p += steps * 128;
      q += m.group;
      const v16 s0 = load_half((const uint16_t*)p), s1 = load_half((const uint16_t*)p + LANES);
      p += PANEL * 2;
      ahead.skip(steps * 128 + PANEL * 2);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        total[r][0] = fma_exact(to_float(acc[r][0]), s0, total[r][0]);
        total[r][1] = fma_exact(to_float(acc[r][1]), s1, total[r][1]);
      }
    }
  }

  template <int R>
  FT_INLINE void run(int64_t row, int64_t tile, int64_t tiles) const {
    v16 total[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) total[r][0] = total[r][1] = splat(0);
    with_ahead(panel, m.panel_bytes, tile, tiles,
               [&](const auto& ahead) FT_LAMBDA { sum<R>(total, row, ahead); });
    alignas(64) float y[R * PANEL];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const v16 s = splat(rows.scale[row + r]);
      store(y + r * PANEL, total[r][0] * s);
      store(y + r * PANEL + LANES, total[r][1] * s);
    }
    deliver(out, row, R, y);
  }
};

}  // namespace

void panel_int4(const Matrix& m, const uint8_t* panel, const Rows& rows, const Out& out) {
  each_tile<INTEGER_HEIGHT>(rows.rows, Tile{m, panel, rows, out});
}

}  // namespace ft
