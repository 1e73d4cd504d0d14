// What leaves a forward: hidden states on the way, the last ones, logits.
#include "forward_run.h"

#include <string.h>

#include <algorithm>

#include "maths.h"

namespace ft {

void Run::tap(int64_t layer) {
  for (int64_t i = 0; i < c.tap_count; ++i)
    if (c.taps[i].which == layer) copy_out(c.taps[i].data);
}

void Run::copy_out(float* to) const {
  for (int64_t r = 0; r < rows; ++r)
    memcpy(to + r * m.hidden, x + r * ldx, (size_t)m.hidden * 4);
}

void Run::finish(Team& team, Clock& clock) {
  if (team.rank == 0) {
    if (c.tap_count) tap((int64_t)m.layers.size());
    if (c.x_out) copy_out(c.x_out);
  }
  if (c.last) {
    each_row(team, [&](int64_t r) {
      prepare(m.final_norm, x + r * ldx, shared, r, false);
      memcpy(c.last + r * m.hidden, shared.x + r * shared.ld, (size_t)m.hidden * 4);
    });
    team.barrier();
  }
  if (!c.logits || !c.logit_count) return;
  const Matrix& w = m.head;
  const bool mine = c.logit_count <= ALONE;
  const Ready& to = mine ? own[team.rank] : shared;
  auto one = [&](int64_t i) {
    const int64_t r = c.logit_rows ? c.logit_rows[i] : i;
    prepare(m.final_norm, x + r * ldx, to, i, integer(w));
  };
  int64_t b, e;
  if (mine) {
    for (int64_t i = 0; i < c.logit_count; ++i) one(i);
  } else {
    while (team.next(c.logit_count, 1, &b, &e))
      for (int64_t i = b; i < e; ++i) one(i);
    team.barrier();
  }
  Rows in = as_rows(to);
  in.rows = c.logit_count;
  clock.at(STAGE_NORM);
  const bool shaped = m.logit_scale != 1.0f || m.logit_cap > 0.0f;
  Best* best_here = c.best ? best[team.rank] : nullptr;
  if (best_here) clear_best(best_here);
  each_panel(team, w.panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {  // what a panel gave is looked at while it is in L1
      product(w, in, p, p + 1, c.logits + p * PANEL, m.vocab);
      if (shaped) shape_logits(p);
      if (best_here) note_best(best_here, p);
    }
  });
  team.barrier();
  if (c.best && team.rank == 0) tell_best(team);
  clock.at(STAGE_HEAD);
}

void Run::shape_logits(int64_t panel) {
  const int64_t end = std::min((panel + 1) * PANEL, m.vocab);
  for (int64_t i = 0; i < c.logit_count; ++i)
    for (int64_t j = panel * PANEL; j < end; j += LANES) {
      float* p = c.logits + i * m.vocab + j;
      const int64_t left = std::min<int64_t>(LANES, end - j);
      float part[LANES] = {0};
      memcpy(part, p, (size_t)left * 4);
      v16 a = load(part) * splat(m.logit_scale);
      if (m.logit_cap > 0.0f) a = tanh(a / splat(m.logit_cap)) * splat(m.logit_cap);
      store(part, a);
      memcpy(p, part, (size_t)left * 4);
    }
}

}  // namespace ft
