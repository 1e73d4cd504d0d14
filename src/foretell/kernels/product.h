// Shared by the four product files; not for others.
#pragma once
#include "matrix.h"
#include "simd.h"

namespace ft {

// Bytes ahead of the stream that are asked for, into L2 and into L1. The processor's own prefetcher
// stops at every page of 4 KB and starts again slowly; asking for lines of the next pages hides
// that. Far lines go to L2 only: there are few buffers for lines on their way to L1. In the products
// of a 336M model (benchmarks/products.py): asking for nothing, or for every other line, is 1.1 to
// 1.4 times slower with 8 rows; 2 KB or 8 KB ahead, or L2 alone, a few percent.
constexpr int64_t AHEAD = 6144;
constexpr int64_t AHEAD_L1 = 2048;

// Where one panel's outputs go.
struct Out {
  float* p;  // row 0, first output of the panel
  int64_t ld;
  int columns;        // outputs of this panel that exist
  const float* bias;  // of this panel, or null
  bool add;           // p += alpha * y instead of p = y
  float alpha;
};

// Hands over the outputs of `count` rows from `row` on, y[count][32]. Not inlined: there are many
// tiles, and this has no part in their speed.
void deliver(const Out& out, int64_t row, int count, const float* y);

void panel_f32(const Matrix& m, const uint8_t* panel, const Rows& rows, const Out& out);
void panel_bf16(const Matrix& m, const uint8_t* panel, const Rows& rows, const Out& out);
void panel_int8(const Matrix& m, const uint8_t* panel, const Rows& rows, const Out& out);
void panel_int4(const Matrix& m, const uint8_t* panel, const Rows& rows, const Out& out);

// Of the panel after this one every pass asks for a share, so that memory works all the time: for
// every 128 bytes of the panel it reads, for the line `stride` bytes further on.
struct Next {
  const uint8_t* far;
  int64_t stride;
  FT_INLINE void ask(int64_t step) const { prefetch(far + step * stride); }
  FT_INLINE void skip(int64_t bytes) { far += bytes * stride / 128; }
};

// The first pass brings the panel in, and asks as well for two lines of what comes next in the stream.
struct Ahead {
  Next next;
  const uint8_t* stream;
  FT_INLINE void ask(int64_t step) const {
    prefetch(stream + AHEAD + step * 128);
    prefetch(stream + AHEAD + step * 128 + 64);
    prefetch_l1(stream + AHEAD_L1 + step * 128);
    prefetch_l1(stream + AHEAD_L1 + step * 128 + 64);
    next.ask(step);
  }
  FT_INLINE void skip(int64_t bytes) {
    next.skip(bytes);
    stream += bytes;
  }
};

// f(ahead) for pass `tile` of `tiles` over a panel.
template <class F>
FT_INLINE void with_ahead(const uint8_t* panel, int64_t bytes, int64_t tile, int64_t tiles,
                          const F& f) {
  Next next{panel, 64};
  if (tiles > 1) next = Next{panel + bytes + bytes * tile / tiles, 128 / tiles};
  if (tile < 2) return f(Ahead{next, panel});
  f(next);
}

// Rows of a tile of the integer products, and four activations as one word
#if defined(FT_AVX512)
constexpr int INTEGER_HEIGHT = 8;
#elif defined(FT_AVX2)
constexpr int INTEGER_HEIGHT = 2;
#else
constexpr int INTEGER_HEIGHT = 1;
#endif
FT_INLINE int32_t four(const int8_t* q) {
  int32_t v;
  memcpy(&v, q, 4);
  return v;
}

// Calls f.run<R>(first row, tile, tiles) for tiles of at most MAX rows that cover `rows` as evenly
// as they can (9 = 5 + 4: two half-full tiles keep more accumulators in flight than 8 + 1).
template <int R, class F>
FT_INLINE void run_tile(int height, int64_t row, int64_t tile, int64_t tiles, const F& f) {
  if constexpr (R > 0) {
    if (height == R) return f.template run<R>(row, tile, tiles);
    run_tile<R - 1>(height, row, tile, tiles, f);
  }
}

template <int MAX, class F>
FT_INLINE void each_tile(int64_t rows, const F& f) {
  const int64_t tiles = (rows + MAX - 1) / MAX;
  int64_t row = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int height = (int)((rows - row + (tiles - tile) - 1) / (tiles - tile));
    run_tile<MAX>(height, row, tile, tiles, f);
    row += height;
  }
}

}  // namespace ft
