// A dense decoder as data, and one forward of it.
#pragma once
#include <stdint.h>

#include <vector>

#include "attention.h"
#include "matrix.h"
#include "norms.h"

namespace ft {

enum MatrixRole { ROLE_Q, ROLE_K, ROLE_V, ROLE_O, ROLE_GATE, ROLE_UP, ROLE_DOWN, MATRIX_ROLES };
enum NormRole { ATTN_NORM, MLP_NORM, ATTN_POST, MLP_POST, NORM_ROLES };
enum QkNorm { QK_NONE = 0, QK_HEAD = 1, QK_FULL = 2 };
enum TableType { TABLE_F32 = 0, TABLE_BF16 = 1, TABLE_F16 = 2 };

struct Layer {
  Matrix matrix[MATRIX_ROLES] = {};  // no data: there is none (gate)
  NormWeights norm[NORM_ROLES] = {};
  const float* q_norm = nullptr;  // [D] per head, [Hq D] over the row
  const float* k_norm = nullptr;
  int64_t rope = -1;      // which table of turns; -1: positions are not turned
  int64_t rope_dim = 0;   // coordinates that turn
  int64_t window = 0;     // index into Model::windows
};

struct Model {
  int64_t hidden, heads, kv_heads, size, ffn, vocab;
  int64_t norm_kind, activation, parallel, qk_norm, half_cache;
  float eps, attn_scale, attn_cap, logit_cap, logit_scale, residual_scale, embed_scale;
  std::vector<Layer> layers;
  std::vector<int64_t> windows;  // distinct ones; 0: all keys
  Matrix head = {};
  NormWeights final_norm = {};
  const void* embedding = nullptr;  // [vocab, hidden], as it is stored
  int64_t embedding_type = 0;
  const void* places = nullptr;  // [place_rows, hidden] learned positions
  int64_t places_type = 0, place_rows = 0;
  int64_t group() const { return heads / kv_heads; }
};

// Plain numbers and addresses of eight bytes each: Python fills arrays of int64.
struct Segment {
  int64_t begin, rows;  // packed rows begin .. begin + rows
  void* cache;          // [L, capacity, 2, Hkv, D]
  int64_t capacity, committed, used;  // rows committed .. used belong to the open transaction
  int64_t* positions;                 // of the cache's rows; those of the new ones are written
  const uint8_t* ancestors;           // [rows, used - committed + rows] or null: a chain
  int64_t ancestor_stride;
};

struct Turns {
  const float* table;    // [rows, 2, dim / 2] cosines and sines
  const int64_t* index;  // [T] row of the table
  int64_t rows;
};

struct Copy {  // a row or a layer and a float buffer
  int64_t which;
  float* data;
};

struct Call {
  int64_t threads, rows, segment_count;
  const Segment* segments;
  const int64_t* tokens;     // [T], or null: x_in is read
  const int64_t* positions;  // [T]
  const float* x_in;         // [T, H]
  float* x_out;              // [T, H] after the last layer, or null
  const Turns* turns;
  int64_t turn_count;
  const int64_t* layers;  // which, in order
  int64_t layer_count;
  const int64_t* logit_rows;  // [logit_count], or null: the first logit_count
  int64_t logit_count;
  float* logits;  // [logit_count, V], or null
  const Copy* taps;  // inputs of layers (the number of layers: the output of the last)
  int64_t tap_count;
  float* last;  // [T, H] after the final norm, or null
  const Copy* embeds;  // rows that do not come from the table
  int64_t embed_count;
  double* seconds;  // [STAGES] time spent in each stage is added, or null
  int64_t* best;    // [logit_count] column of each row's largest logit (forward_best.cpp), or null
};

enum Stage {
  STAGE_EMBED, STAGE_NORM, STAGE_QKV, STAGE_ATTENTION, STAGE_O, STAGE_UP, STAGE_QUANTISE,
  STAGE_DOWN, STAGE_HEAD, STAGES
};

// Which keys every row reads, by window.
struct KeyPlan {
  std::vector<Keys> keys;  // [windows][T]
  std::vector<int64_t> lists;
  int64_t most = 0;  // keys of one row
  void make(const Model& m, const Call& c);
};

enum Outcome { DONE = 0, BAD_TOKEN = 1, BAD_POSITION = 2, NO_MEMORY = 3, BAD_ROW = 4, SHORT_TABLE = 5 };

int forward(const Model& m, const Call& c);

}  // namespace ft
