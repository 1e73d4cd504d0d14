// Attention of one key/value head and the rotation that goes before it.
//
// A row's keys are a list in path order: cache rows [low, mid), then `list` (the rest of its
// branch). Scores, their maximum, the sum of their exponentials and the weighted sum of the values
// are functions of that list alone: a score is a chain of fused multiply-adds over 16 lanes of the
// head and one fixed tree; lane i of the sum takes the keys whose index in the list is i mod 16;
// values are added in the order of the list. Rows of other branches are never touched.
#pragma once
#include <stdint.h>

namespace ft {

struct Keys {  // of one row in the layers of one window
  int64_t low, mid;
  const int64_t* list;
  int64_t count;
  int64_t total() const { return mid - low + count; }
};

struct KvView {  // one layer of one sequence's cache: [capacity, 2, Hkv, D]
  void* base;
  bool half;  // bfloat16, else float32
  int64_t heads, size;
  int64_t row() const { return 2 * heads * size; }
};

// Numbers of scratch for `queries` rows x heads of at most `keys` keys each.
int64_t attention_scratch(int64_t queries, int64_t keys, int64_t size);

// q: [rows][group * D] with row stride ld, overwritten with the outputs. keys: one a row.
// scale multiplies q; cap > 0: scores pass through cap * tanh(score / cap).
void attend(const KvView& kv, int64_t head, const Keys* keys, int64_t rows, float* q, int64_t ld,
            int64_t group, float scale, float cap, float* scratch);

// k and v of one head and row -> the cache.
void write_kv(const KvView& kv, int64_t head, int64_t row, const float* k, const float* v);

// Turns coordinate d with d + dim / 2 of a head. turn: dim / 2 cosines, then dim / 2 sines.
void rotate(float* head, int64_t dim, const float* turn);

}  // namespace ft
