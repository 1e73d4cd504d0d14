// The attention stage: norms and rotation of heads, the cache's new rows, and who attends to what.
#include "forward_run.h"

#include <algorithm>

namespace ft {
namespace {

void norm_head(float* head, const float* weight, float scale, int64_t size) {
  for (int64_t d = 0; d < size; ++d) head[d] = head[d] * scale * weight[d];
}

}  // namespace

KvView Run::view(const Segment& s, int64_t layer) const {
  const int64_t row = 2 * m.kv_heads * m.size;
  uint8_t* base = (uint8_t*)s.cache + layer * s.capacity * row * (m.half_cache ? 2 : 4);
  return KvView{base, m.half_cache != 0, m.kv_heads, m.size};
}

// Norms, rotation and the cache's rows for one key/value head and the queries of its group.
void Run::turn(const Layer& w, const Segment& s, int64_t layer, int64_t head, int64_t i,
               const float* full) {
  const int64_t r = s.begin + i, d = m.size, group = m.group();
  float *qs = q + r * ldq + head * group * d, *ks = k + r * ldk + head * d;
  for (int64_t g = 0; g < group; ++g)
    if (w.q_norm) {
      const bool whole = m.qk_norm == QK_FULL;
      const float scale = whole ? full[0] : inverse_rms(qs + g * d, d, m.eps);
      norm_head(qs + g * d, w.q_norm + (whole ? (head * group + g) * d : 0), scale, d);
    }
  if (w.k_norm) {
    const bool whole = m.qk_norm == QK_FULL;
    const float scale = whole ? full[1] : inverse_rms(ks, d, m.eps);
    norm_head(ks, w.k_norm + (whole ? head * d : 0), scale, d);
  }
  if (w.rope >= 0) {
    const Turns& t = c.turns[w.rope];
    const float* turns = t.table + t.index[r] * w.rope_dim;
    for (int64_t g = 0; g < group; ++g) rotate(qs + g * d, w.rope_dim, turns);
    rotate(ks, w.rope_dim, turns);
  }
  write_kv(view(s, layer), head, s.used + i, ks, v + r * ldk + head * d);
}

void Run::attention(Team& team, const Layer& w, int64_t layer) {
  const int64_t group = m.group(), width = group * m.size;
  const bool once = m.qk_norm != QK_FULL && rows <= TOGETHER &&
                    c.segment_count * m.kv_heads >= team.size;
  if (!once) {
    each_row(team, [&](int64_t r) {
      const Segment* s = c.segments;
      while (r >= s->begin + s->rows) ++s;
      float full[2] = {0.0f, 0.0f};
      if (m.qk_norm == QK_FULL) {
        full[0] = inverse_rms(q + r * ldq, m.heads * m.size, m.eps);
        full[1] = inverse_rms(k + r * ldk, m.kv_heads * m.size, m.eps);
      }
      for (int64_t head = 0; head < m.kv_heads; ++head)
        turn(w, *s, layer, head, r - s->begin, full);
    });
    team.barrier();
  }
  const int64_t step = once ? TOGETHER : attention_rows;
  int64_t tasks = 0;
  for (int64_t b = 0; b < c.segment_count; ++b)
    tasks += (c.segments[b].rows + step - 1) / step * m.kv_heads;
  int64_t from, to;
  while (team.next(tasks, 1, &from, &to)) {
    int64_t at = from, b = 0;
    for (;; ++b) {
      const int64_t n = (c.segments[b].rows + step - 1) / step * m.kv_heads;
      if (at < n) break;
      at -= n;
    }
    const Segment& s = c.segments[b];
    const int64_t blocks = (s.rows + step - 1) / step;
    // the last rows have most keys: they come first, so that no thread is left with them
    const int64_t head = at % m.kv_heads, first = (blocks - 1 - at / m.kv_heads) * step;
    const int64_t count = std::min(step, s.rows - first);
    if (once)
      for (int64_t i = 0; i < s.rows; ++i) turn(w, s, layer, head, i, nullptr);
    attend(view(s, layer), head,
           plan.keys.data() + (size_t)(w.window * rows + s.begin + first), count,
           q + (s.begin + first) * ldq + head * width, ldq, group, m.attn_scale, m.attn_cap,
           scratch[team.rank]);
  }
}

}  // namespace ft
