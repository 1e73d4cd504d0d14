// Shared by the four product files; not for others.
#pragma once
#include "matrix.h"
#include "simd.h"

namespace ft {

// Bytes ahead of the stream that are asked for. The processor's own prefetcher stops at every page
// of 4 KB and starts again slowly; asking for lines of the next page hides that.
#ifndef FT_AHEAD
#define FT_AHEAD 2048
#endif

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

// Calls f.run<R>(first_row, stream) for tiles of at most MAX rows that cover `rows` as evenly as
// they can (9 = 5 + 4: two half-full tiles keep more accumulators in flight than 8 + 1). `stream`
// is true for the first tile, which is the one that brings the panel in from memory.
template <int R, class F>
FT_INLINE void run_tile(int height, int64_t row, bool stream, const F& f) {
  if constexpr (R > 0) {
    if (height == R) return f.template run<R>(row, stream);
    run_tile<R - 1>(height, row, stream, f);
  }
}

template <int MAX, class F>
FT_INLINE void each_tile(int64_t rows, const F& f) {
  int64_t tiles = (rows + MAX - 1) / MAX;
  for (int64_t row = 0; row < rows; --tiles) {
    const int height = (int)((rows - row + tiles - 1) / tiles);
    run_tile<MAX>(height, row, row == 0, f);
    row += height;
  }
}

}  // namespace ft
