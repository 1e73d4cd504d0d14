// One forward: every thread runs all stages of all layers, meeting the others between them.
//
// Stages of a layer: norm (and quantise) | q, k, v | rotate, write, attend | o | norm | gate, up,
// activation | quantise | down. Between two `|` all threads meet. Two shortcuts save meetings
// without changing a bit: with few rows every thread norms and quantises all of them into memory of
// its own, and rotation and attention are one stage where a head's keys are written and read by the
// same thread.
#include "forward_run.h"

#include <stdlib.h>

#include <algorithm>

namespace ft {
namespace {

// Memory of the calling thread that forwards use one after another; grows, never shrinks below use.
struct Arena {
  uint8_t* base = nullptr;
  size_t size = 0;
  KeyPlan plan;
  ~Arena() { free(base); }
  bool reserve(size_t bytes) {
    if (bytes <= size && (size < ((size_t)64 << 20) || bytes * 4 > size)) return true;
    free(base);
    base = (uint8_t*)aligned_alloc(4096, (bytes + 4095) & ~(size_t)4095);
    size = base ? (bytes + 4095) & ~(size_t)4095 : 0;
    return base != nullptr;
  }
};

thread_local Arena arena;

}  // namespace

void Run::run(Team& team) {
  Clock clock(c.seconds, team.rank);
  each_row(team, [&](int64_t r) { embed(r); });
  team.barrier();
  clock.at(STAGE_EMBED);
  const NormWeights* post = nullptr;  // of the MLP before
  for (int64_t i = 0; i < c.layer_count; ++i) {
    const int64_t layer = c.layers[i];
    const Layer& w = m.layers[(size_t)layer];
    const Matrix* p = w.matrix;
    const bool ints = integer(p[ROLE_Q]) || integer(p[ROLE_K]) || integer(p[ROLE_V]);
    const bool mlp_ints = integer(p[ROLE_UP]) || integer(p[ROLE_GATE]);
    if (c.tap_count && post) flush(team, &post);
    if (c.tap_count && team.rank == 0) tap(layer);
    Rows in_mlp{};
    const Rows in = norm_stage(team, post, w.norm[ATTN_NORM], ints,
                               m.parallel ? &w.norm[MLP_NORM] : nullptr, mlp_ints, &in_mlp);
    post = nullptr;
    clock.at(STAGE_NORM);
    const Piece pieces[3] = {
        {&p[ROLE_Q], q, ldq}, {&p[ROLE_K], k, ldk}, {&p[ROLE_V], v, ldk}};
    if (m.parallel)
      layer_parallel(team, w, layer, pieces, in, in_mlp, clock);
    else
      layer_serial(team, w, layer, pieces, in, clock, &post);
  }
  if (post) flush(team, &post);
  finish(team, clock);
}

void Run::layer_serial(Team& team, const Layer& w, int64_t layer, const Piece* pieces,
                       const Rows& in, Clock& clock, const NormWeights** post) {
  const Matrix* p = w.matrix;
  const bool sandwich = w.norm[ATTN_POST].weight || w.norm[MLP_POST].weight;
  project(team, pieces, 3, in);
  team.barrier();
  clock.at(STAGE_QKV);
  attention(team, w, layer);
  team.barrier();
  clock.at(STAGE_ATTENTION);
  const Rows out = ready_rows(team, p[ROLE_O], q, ldq, own_out, shared_out);
  contract(team, p[ROLE_O], out, sandwich);
  team.barrier();
  clock.at(STAGE_O);
  const bool ints = integer(p[ROLE_UP]) || integer(p[ROLE_GATE]);
  const Rows mlp = norm_stage(team, sandwich ? &w.norm[ATTN_POST] : nullptr, w.norm[MLP_NORM],
                              ints, nullptr, false, nullptr);
  clock.at(STAGE_NORM);
  each_panel(team, p[ROLE_UP].panels,
             [&](int64_t b, int64_t e) { expand(w, mlp, b, e, tile[team.rank]); });
  team.barrier();
  clock.at(STAGE_UP);
  const Rows down = ready_rows(team, p[ROLE_DOWN], h, ldh, own_h, shared_h);
  clock.at(STAGE_QUANTISE);
  contract(team, p[ROLE_DOWN], down, sandwich);
  team.barrier();
  clock.at(STAGE_DOWN);
  if (sandwich) *post = &w.norm[MLP_POST];
}

// x + o(attention(norm x)) + down(mlp(norm' x)): o and down are added by the same thread, in
// this order.
void Run::layer_parallel(Team& team, const Layer& w, int64_t layer, const Piece* pieces,
                         const Rows& in, const Rows& in_mlp, Clock& clock) {
  const Matrix* p = w.matrix;
  int64_t first = 0;
  for (int i = 0; i < 3; ++i) first += pieces[i].m->panels;
  each_panel(team, first + p[ROLE_UP].panels, [&](int64_t b, int64_t e) {
    if (b < first) run_pieces(pieces, 3, in, b, std::min(e, first));
    if (e > first) expand(w, in_mlp, std::max(b, first) - first, e - first, tile[team.rank]);
  });
  team.barrier();
  clock.at(STAGE_QKV);
  attention(team, w, layer);
  team.barrier();
  clock.at(STAGE_ATTENTION);
  const Rows out = ready_rows(team, p[ROLE_O], q, ldq, own_out, shared_out);
  const Rows down = ready_rows(team, p[ROLE_DOWN], h, ldh, own_h, shared_h);
  each_panel(team, p[ROLE_O].panels, [&](int64_t b, int64_t e) {
    product_add(p[ROLE_O], out, b, e, x + b * PANEL, ldx, 1.0f);
    product_add(p[ROLE_DOWN], down, b, e, x + b * PANEL, ldx, 1.0f);
  });
  team.barrier();
  clock.at(STAGE_DOWN);
}

int forward(const Model& m, const Call& c) {
  if (c.tokens)
    for (int64_t r = 0; r < c.rows; ++r) {
      if (c.tokens[r] < 0 || c.tokens[r] >= m.vocab) return BAD_TOKEN;
      if (m.places && (c.positions[r] < 0 || c.positions[r] >= m.place_rows)) return BAD_POSITION;
    }
  for (int64_t i = 0; i < c.logit_count; ++i) {
    const int64_t r = c.logit_rows ? c.logit_rows[i] : i;
    if (r < 0 || r >= c.rows) return BAD_ROW;
  }
  for (int64_t i = 0; i < c.turn_count; ++i)
    for (int64_t r = 0; r < c.rows; ++r) {
      const int64_t row = c.turns[i].index[r];
      if (row < 0 || row >= c.turns[i].rows) return SHORT_TABLE;
    }
  KeyPlan& plan = arena.plan;
  if (c.layer_count) plan.make(m, c);
  const int threads = (int)std::max<int64_t>(1, std::min<int64_t>(c.threads, max_threads()));
  Run run(m, c, plan, threads);
  Layout count{nullptr};
  run.lay_out(count);
  if (!arena.reserve(count.used)) return NO_MEMORY;
  Layout place{arena.base};
  run.lay_out(place);
  pool_run(threads, [](Team& team, void* p) { ((Run*)p)->run(team); }, &run);
  return DONE;
}

}  // namespace ft
