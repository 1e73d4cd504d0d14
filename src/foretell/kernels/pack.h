// Weights into panels and back.
#pragma once
#include "matrix.h"

namespace ft {

enum SourceType { SOURCE_F32 = 0, SOURCE_BF16 = 1, SOURCE_F16 = 2, SOURCE_INT8 = 3 };
enum PackResult {
  PACK_OK = 0,
  PACK_RANGE = 1,   // an integer that the format does not hold, or integers for a float format
  PACK_SCALE = 2,   // an INT4 scale that is no float16
  PACK_MEMORY = 3,
  PACK_FORMAT = 4,  // no such format, or a group that does not divide the inputs
  PACK_FINITE = 5,  // a weight to be quantised that is infinite or no number
};

// Rows of weights, [.., k] contiguous. Row r of the matrix is row (index ? index[r] : r) - first
// of `data`: `index` permutes outputs, `first` lets a caller pass a slice of the rows.
// SOURCE_INT8 brings integers with their scales ([rows] or [rows, k / group]); floats for INT8 and
// INT4 are quantised here: scale = absmax / 127, or for INT4 the one of a few candidates that
// leaves the least squared error, rounded to float16.
struct Source {
  int dtype;
  const void* data;
  const float* scale;
  const int64_t* index;
  int64_t first;
};

int pack_panel(const Matrix& m, const Source& source, int64_t panel, uint8_t* out);
// x for float formats; q [k] and scale ([1] or [k / group]) for the others
void unpack_row(const Matrix& m, int64_t row, float* x, int8_t* q, float* scale);

}  // namespace ft
