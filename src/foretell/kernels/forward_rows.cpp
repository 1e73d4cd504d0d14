// Rows between the products: embedding, norms, quantisation.
#include "forward_run.h"

#include <string.h>

#include "maths.h"

namespace ft {
namespace {

v16 table_row(const void* table, int64_t type, int64_t at, int64_t left) {
  if (left >= LANES) {
    if (type == TABLE_F32) return load((const float*)table + at);
    if (type == TABLE_BF16) return load_bf16((const uint16_t*)table + at);
    return load_half((const uint16_t*)table + at);
  }
  float v[LANES] = {0};
  for (int64_t i = 0; i < left; ++i) {
    if (type == TABLE_F32)
      v[i] = ((const float*)table)[at + i];
    else if (type == TABLE_BF16)
      v[i] = float_of_bf16(((const uint16_t*)table)[at + i]);
    else
      v[i] = float_of_half(((const uint16_t*)table)[at + i]);
  }
  return load(v);
}

}  // namespace

void Run::embed(int64_t r) {
  float* to = x + r * ldx;
  if (c.x_in) {
    memcpy(to, c.x_in + r * m.hidden, (size_t)m.hidden * 4);
    for (int64_t i = m.hidden; i < ldx; ++i) to[i] = 0.0f;
    return;
  }
  const float* given = nullptr;
  for (int64_t i = 0; i < c.embed_count; ++i)
    if (c.embeds[i].which == r) given = c.embeds[i].data;
  for (int64_t i = 0; i < ldx; i += LANES) {
    const int64_t left = m.hidden - i;
    v16 a = given ? table_row(given, TABLE_F32, i, left)
                  : table_row(m.embedding, m.embedding_type, c.tokens[r] * m.hidden + i, left) *
                        splat(m.embed_scale);
    if (m.places)
      a = a + table_row(m.places, m.places_type, c.positions[r] * m.hidden + i, left);
    store(to + i, a);
  }
}

void Run::quantise(const float* from, int64_t width, const Ready& to, int64_t r) {
  quantise_row(from, width, to.ldq, to.q + r * to.ldq, to.scale + r, to.sums + r * to.lds);
}

void Run::prepare(const NormWeights& norm, const float* from, const Ready& to, int64_t r,
                  bool ints) {
  float* out = to.x + r * to.ld;
  if (norm.weight)
    norm_row((int)m.norm_kind, norm, from, m.hidden, m.eps, out);
  else
    memcpy(out, from, (size_t)to.ld * 4);
  if (ints) quantise(out, m.hidden, to, r);
}

// x += alpha * norm(y)
void Run::add_post(const NormWeights& norm, int64_t r) {
  float *a = x + r * ldx, *b = y + r * ldx;
  for (int64_t i = m.hidden; i < ldx; ++i) b[i] = 0.0f;  // products write no padding
  if (norm.weight) norm_row((int)m.norm_kind, norm, b, m.hidden, m.eps, b);
  const v16 alpha = splat(m.residual_scale);
  for (int64_t i = 0; i < ldx; i += LANES) store(a + i, fma(alpha, load(b + i), load(a + i)));
}

// Quantised rows of a float buffer for matrix `w`, by whoever does it here; a barrier follows
// where the work was shared out.
Rows Run::ready_rows(Team& team, const Matrix& w, const float* from, int64_t ld,
                     const Ready* mine, const Ready& ours) {
  if (!integer(w)) return Rows{rows, from, ld, nullptr, 0, nullptr, nullptr, 0};
  const Ready& to = alone() && rows <= ALONE ? mine[team.rank] : ours;
  if (alone()) {
    for (int64_t r = 0; r < rows; ++r) quantise(from + r * ld, w.k, to, r);
  } else {
    each_row(team, [&](int64_t r) { quantise(from + r * ld, w.k, to, r); });
    team.barrier();
  }
  return as_rows(to);
}

// x += what is still in y; then the norms of the next stage
Rows Run::norm_stage(Team& team, const NormWeights* post, const NormWeights& norm, bool ints,
                     const NormWeights* second, bool second_ints, Rows* second_rows) {
  const bool mine = alone() && rows <= ALONE && !post && !second;
  const Ready& to = mine ? own[team.rank] : shared;
  auto one = [&](int64_t r) {
    if (post) add_post(*post, r);
    prepare(norm, x + r * ldx, to, r, ints);
    if (second) prepare(*second, x + r * ldx, shared_mlp, r, second_ints);
  };
  if (mine) {
    for (int64_t r = 0; r < rows; ++r) one(r);
  } else {
    each_row(team, one);
    team.barrier();
  }
  if (second) *second_rows = as_rows(shared_mlp);
  return as_rows(to);
}

void Run::flush(Team& team, const NormWeights** post) {
  each_row(team, [&](int64_t r) { add_post(**post, r); });
  team.barrier();
  *post = nullptr;
}

}  // namespace ft
