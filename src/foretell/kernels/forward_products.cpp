// The products of a layer, shared out by panels.
#include "forward_run.h"

#include <algorithm>

#include "maths.h"

namespace ft {
namespace {

template <int KIND>
void activate_rows(float* gate, const float* up, int64_t ld, int64_t rows, float* out,
                   int64_t ldo) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < PANEL; c += LANES) {
      v16 y = activate<KIND>(load(gate + r * ld + c));
      if (up) y = y * load(up + r * ld + c);
      store(out + r * ldo + c, y);
    }
}

void activate_rows(int64_t kind, float* gate, const float* up, int64_t ld, int64_t rows, float* out,
                   int64_t ldo) {
  switch (kind) {
    case SILU: return activate_rows<SILU>(gate, up, ld, rows, out, ldo);
    case GELU: return activate_rows<GELU>(gate, up, ld, rows, out, ldo);
    case GELU_TANH: return activate_rows<GELU_TANH>(gate, up, ld, rows, out, ldo);
    case GELU_QUICK: return activate_rows<GELU_QUICK>(gate, up, ld, rows, out, ldo);
    default: return activate_rows<RELU>(gate, up, ld, rows, out, ldo);
  }
}

}  // namespace

void Run::project(Team& team, const Piece* pieces, int count, const Rows& in) {
  int64_t total = 0;
  for (int i = 0; i < count; ++i) total += pieces[i].m->panels;
  each_panel(team, total,
             [&](int64_t b, int64_t e) { run_pieces(pieces, count, in, b, e); });
}

void Run::run_pieces(const Piece* pieces, int count, const Rows& in, int64_t b, int64_t e) {
  int64_t first = 0;
  for (int i = 0; i < count; ++i) {
    const Matrix& w = *pieces[i].m;
    const int64_t from = std::max(b, first) - first, to = std::min(e, first + w.panels) - first;
    if (from < to) product(w, in, from, to, pieces[i].out + from * PANEL, pieces[i].ld);
    first += w.panels;
  }
}

void Run::expand(const Layer& w, const Rows& in, int64_t b, int64_t e, float* buffer) {
  const Matrix &gate = w.matrix[ROLE_GATE], &up = w.matrix[ROLE_UP];
  const int64_t step = std::min<int64_t>(std::max<int64_t>(rows, 1), TILE);
  for (int64_t p = b; p < e; ++p)
    for (int64_t r = 0; r < rows; r += step) {
      Rows part = in;
      part.rows = std::min(step, rows - r);
      if (part.x) part.x += r * part.ld;
      if (part.q) part.q += r * part.ldq, part.scale += r, part.sums += r * part.lds;
      float* other = buffer + step * PANEL;
      float* out = h + r * ldh + p * PANEL;
      product(up, part, p, p + 1, other, PANEL);
      if (gate.data) {
        product(gate, part, p, p + 1, buffer, PANEL);
        activate_rows(m.activation, buffer, other, PANEL, part.rows, out, ldh);
      } else {
        activate_rows(m.activation, other, nullptr, PANEL, part.rows, out, ldh);
      }
    }
}

void Run::contract(Team& team, const Matrix& w, const Rows& in, bool post) {
  const float alpha = m.parallel ? 1.0f : m.residual_scale;
  each_panel(team, w.panels, [&](int64_t b, int64_t e) {
    if (post)
      product(w, in, b, e, y + b * PANEL, ldx);
    else
      product_add(w, in, b, e, x + b * PANEL, ldx, alpha);
  });
}

}  // namespace ft
