// Norms of one row. Rows are padded to a multiple of 16 numbers with zeros, weights likewise.
#pragma once
#include <stdint.h>

namespace ft {

struct NormWeights {
  const float* weight;  // null: there is no such norm
  const float* bias;    // null: none
};

enum NormKind { RMS = 0, LAYER = 1 };

inline int64_t padded16(int64_t n) { return (n + 15) & ~(int64_t)15; }

// out[0 .. padded n) = norm of x; out may be x.
void norm_row(int kind, const NormWeights& w, const float* x, int64_t n, float eps, float* out);

// 1 / sqrt(mean of squares + eps) of n numbers that are followed by nothing in particular.
float inverse_rms(const float* x, int64_t n, float eps);

}  // namespace ft
