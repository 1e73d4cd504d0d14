// A chain of tokens for each sequence of a forward: the most probable ones, or those that noise
// picks.
#pragma once
#include "forward.h"

namespace ft {

// Plain numbers and addresses of eight bytes each.
struct Chain {
  int64_t levels;       // places of a sequence in what follows
  const int64_t* most;  // [B] tokens of each sequence, 1 .. levels
  int64_t* made;        // [B] tokens there are
  int64_t* tokens;      // [B, levels]
  double* scores;       // [B, levels] probability of each, or null: nobody asks
  int64_t (*ask)(int64_t sequence, double score);  // whether to end behind this token, or null
  const double* edges;  // [edge_count] between ranges of probability, rising; or null: no stops
  int64_t edge_count;
  const double* rates;  // [B, edge_count + 1] what a token of each range makes of its path's chance
  const double* least;  // [B, levels] the chance of a path below which it ends behind 1, 2, .. tokens
  const double* temperatures;  // [B] of softmax(logits / T) over noise, 0: the most probable; or null
  const uint64_t* keys;        // [B, levels] of the noise (noise.cpp)
};

// first: a forward of every sequence's last committed rows, with the logits of the last of them and
// nothing else; its caches have room for `levels` rows more. Positions count on from there.
int chain(const Model& m, const Call& first, const Chain& out);

}  // namespace ft
