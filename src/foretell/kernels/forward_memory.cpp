// The memory of a forward: one block of the calling thread's, in pieces.
#include "forward_run.h"

#include <algorithm>

#include "simd.h"

namespace ft {
namespace {

constexpr int64_t SCORES = 65536;  // numbers of scores an attention task aims for

}  // namespace

Ready Layout::ready(int64_t rows, int64_t width, bool floats) {
  const int64_t kp = padded_inputs(INT8, width);
  Ready r;
  r.ld = padded16(width);
  r.x = floats ? take<float>(rows * r.ld) : nullptr;
  r.ldq = kp;
  r.q = take<int8_t>(rows * kp);
  r.scale = take<float>(rows);
  r.lds = kp / BLOCK;
  r.sums = take<int32_t>(rows * r.lds);
  return r;
}

void Run::lay_out(Layout& l) {
  const int64_t t = std::max<int64_t>({rows, c.logit_count, 1}), wide = m.heads * m.size,
                narrow = m.kv_heads * m.size;
  bool post = false;
  for (const Layer& w : m.layers) post |= w.norm[ATTN_POST].weight || w.norm[MLP_POST].weight;
  ldx = padded16(m.hidden), ldq = padded16(wide), ldk = padded16(narrow);
  ldh = (m.ffn + PANEL - 1) / PANEL * PANEL;
  x = l.take<float>(t * ldx);
  y = post ? l.take<float>(t * ldx) : nullptr;
  q = l.take<float>(t * ldq + LANES);
  k = l.take<float>(t * ldk + LANES);
  v = l.take<float>(t * ldk + LANES);
  h = l.take<float>(t * ldh);
  shared = l.ready(t, m.hidden, true);
  shared_mlp = m.parallel ? l.ready(t, m.hidden, true) : shared;
  shared_out = l.ready(t, wide, false);
  shared_h = l.ready(t, m.ffn, false);
  attention_rows =
      std::clamp<int64_t>(SCORES / (m.group() * std::max<int64_t>(plan.most, 1)), 1, 32);
  const int64_t few = std::min(t, ALONE);
  own = l.take<Ready>(threads);
  own_out = l.take<Ready>(threads);
  own_h = l.take<Ready>(threads);
  tile = l.take<float*>(threads);
  scratch = l.take<float*>(threads);
  best = l.take<Best*>(threads);
  const int64_t tile_rows = std::min(t, TILE);
  const int64_t together = std::max(attention_rows, std::min(t, TOGETHER));
  for (int i = 0; i < threads; ++i) {
    const Ready a = l.ready(few, m.hidden, true), b = l.ready(few, wide, false),
                d = l.ready(few, m.ffn, false);
    float* e = l.take<float>(2 * tile_rows * PANEL);
    float* f = l.take<float>(attention_scratch(together * m.group(), plan.most, m.size));
    Best* g = l.take<Best>(c.best ? c.logit_count : 0);
    if (!l.base) continue;
    own[i] = a, own_out[i] = b, own_h[i] = d, tile[i] = e, scratch[i] = f, best[i] = g;
  }
}

}  // namespace ft
