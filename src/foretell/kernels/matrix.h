// Packed matrices and the products with them.
//
// A matrix [n outputs, k inputs] is cut into panels of 32 outputs; one panel is one contiguous,
// 64-byte aligned block that is read once, front to back, whatever the number of rows:
//   F32   [k][32] float
//   BF16  [k/2][32][2] bfloat16          (two inputs of one output share 32 bits; odd k: zero)
//   INT8  [kp/4][32][4] bytes, w + 128;  then 32 float scales
//   INT4  per group: [group/8][2][16][4] bytes (low nibble input 4*(2j)+b, high 4*(2j+1)+b of
//         output 16*h+c, both w + 8); then 32 float16 scales
// The bytes are the same for every instruction set, so packed weights can be kept on disk.
//
// Bit-exactness: an output is one accumulator over k in ascending order (F32, BF16: a chain of
// fused multiply-adds; INT8, INT4: integers), so it depends neither on the number of rows nor on
// the place of its row nor on who computes it.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace ft {

enum Format { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
constexpr int PANEL = 32;  // output channels of one panel
constexpr int BLOCK = 32;  // inputs per entry of Rows::sums

struct Matrix {
  int format;
  int64_t n, k;        // outputs, inputs
  int64_t panels, kp;  // ceil(n / PANEL); inputs padded: INT8 and INT4 to a multiple of 32
  int group;           // INT4: inputs per scale (32, 64 or 128)
  const uint8_t* data;
  int64_t panel_bytes;
  const float* bias;  // [n] or null, added after scaling
};

// data: packed_bytes(...) bytes as written by the packer, 64-byte aligned (may be read-only).
Matrix make_matrix(int format, int64_t n, int64_t k, int group, const void* data,
                   const float* bias);
int64_t packed_bytes(int format, int64_t n, int64_t k, int group);  // -1: no such format
int64_t padded_inputs(int format, int64_t k);

struct Rows {
  int64_t rows;
  // F32 and BF16 weights: float activations
  const float* x;
  int64_t ld;
  // INT8 and INT4 weights: signed activations, each row zero from k up to kp, with the sum of
  // every block of 32 beside them (the weights are stored unsigned; the sums take that back)
  const int8_t* q;
  int64_t ldq;
  const float* scale;  // [rows]
  const int32_t* sums;
  int64_t lds;  // sums[r * lds + b], b < kp / 32
};

// scale = absmax / 127; q = round_half_even(x * (127 / absmax)). A row of zeros (or of magnitudes
// below 2^-100) has scale 0; a row with a NaN or an infinity has that as its scale.
void quantise_row(const float* x, int64_t k, int64_t kp, int8_t* q, float* scale, int32_t* sums);

// out[r * ld + (c - PANEL * panel_begin)] = dot + bias, for the outputs c < n of the panels
// [panel_begin, panel_end); nothing is written beyond n.
void product(const Matrix& m, const Rows& rows, int64_t panel_begin, int64_t panel_end, float* out,
             int64_t ld);
// As above, but acc[...] += alpha * (dot + bias)
void product_add(const Matrix& m, const Rows& rows, int64_t panel_begin, int64_t panel_end,
                 float* acc, int64_t ld, float alpha);

}  // namespace ft
