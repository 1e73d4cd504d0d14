// INT8: exact integer sums over k; weights are unsigned bytes (w + 128), activations signed.
#include "integers_avx2.h"
#include "product.h"

namespace ft {
namespace {

#if !defined(FT_AVX2)
#if defined(FT_AVX512)
typedef v16u Weights;  // 16 outputs x 4 inputs
FT_INLINE Weights weights(const uint8_t* p) { return load_u(p); }
// acc[c] += sum over 4 inputs of w[c][i] * a[i]; vpdpbusd does not saturate
FT_INLINE v16i dot(v16i acc, const Weights& w, int32_t a) {
  return (v16i)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(a));
}
#else
struct Weights {
  v16i w[4];  // input i of 16 outputs
};
FT_INLINE Weights weights(const uint8_t* p) {
  const v16u v = load_u(p);
  Weights r;
  for (int i = 0; i < 4; ++i) r.w[i] = (v16i)((v >> (8 * i)) & 255);
  return r;
}
FT_INLINE v16i dot(v16i acc, const Weights& w, int32_t a) {
  for (int i = 0; i < 4; ++i) acc += w.w[i] * (int32_t)(int8_t)((uint32_t)a >> (8 * i));
  return acc;
}
#endif

// acc[r] += w * q over kp inputs from `p` and `q` on
template <int R, class A>
FT_INLINE void chain_int8(v16i (&acc)[R][2], const uint8_t* p, const int8_t* q, int64_t ldq,
                          int64_t kp, const A& ahead) {
  for (int64_t i = 0; i < kp; i += 4, p += 4 * PANEL) {
    ahead.ask(i / 4);
    const Weights w0 = weights(p), w1 = weights(p + 64);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const int32_t a = four(q + r * ldq + i);
      acc[r][0] = dot(acc[r][0], w0, a);
      acc[r][1] = dot(acc[r][1], w1, a);
    }
  }
}
#endif

// What unsigned weights add to every output of a row
FT_INLINE v16i offset(int32_t row_sum) { return splat_i(-128 * row_sum); }

// Of one row, again for every panel: as vectors it costs next to nothing
FT_INLINE int32_t total(const int32_t* sums, int64_t blocks) {
  v16i all = splat_i(0);
  int64_t b = 0;
  for (; b + LANES <= blocks; b += LANES) all += (v16i)load_u(sums + b);
  int32_t parts[LANES];
  store_i(parts, all);
  int32_t s = 0;
  for (int i = 0; i < LANES; ++i) s += parts[i];
  for (; b < blocks; ++b) s += sums[b];
  return s;
}

struct Tile {
  const Matrix& m;
  const uint8_t* panel;
  const Rows& rows;
  const Out& out;

  __attribute__((noinline)) void finish(int64_t row, int count, const int32_t* dots) const {
    const float* scale = (const float*)(panel + m.kp * PANEL);
    alignas(64) float y[INTEGER_HEIGHT * PANEL];
    for (int r = 0; r < count; ++r)
      for (int at = 0; at < PANEL; at += LANES) {
        const v16 s = splat(rows.scale[row + r]) * load(scale + at);
        store(y + r * PANEL + at, to_float((v16i)load_u(dots + r * PANEL + at)) * s);
      }
    deliver(out, row, count, y);
  }

  template <int R>
  FT_INLINE void run(int64_t row, int64_t tile, int64_t tiles) const {
    v16i acc[R][2];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      acc[r][0] = acc[r][1] = offset(total(rows.sums + (row + r) * rows.lds, m.kp / BLOCK));
    }
    with_ahead(panel, m.panel_bytes, tile, tiles, [&](const auto& ahead) FT_LAMBDA {
      chain_int8<R>(acc, panel, rows.q + row * rows.ldq, rows.ldq, m.kp, ahead);
    });
    alignas(64) int32_t dots[R * PANEL];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      store_i(dots + r * PANEL, acc[r][0]);
      store_i(dots + r * PANEL + LANES, acc[r][1]);
    }
    finish(row, R, dots);
  }
};

}  // namespace

void panel_int8(const Matrix& m, const uint8_t* panel, const Rows& rows, const Out& out) {
  each_tile<INTEGER_HEIGHT>(rows.rows, Tile{m, panel, rows, out});
}

}  // namespace ft
