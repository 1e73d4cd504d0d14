// Drafting by feeding back what the rows say: forward after forward without a word to Python but for
// the question whether to go on.
//
// Between two forwards of a small model Python takes longer than they do.
#include "chain.h"

#include <cmath>
#include <vector>

#include "maths.h"
#include "noise.h"

namespace ft {
namespace {

// softmax(x / t)[token] of n finite numbers, the largest of which is `top`.
double share(const float* x, int64_t n, int64_t token, float top, double t) {
  const float rate = (float)(1.0 / t);
  v16 total = splat(0.0f);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) total = total + exp((load(x + i) - splat(top)) * splat(rate));
  alignas(64) float rest[LANES];
  for (int64_t j = 0; j < LANES; ++j) rest[j] = i + j < n ? x[i + j] - top : -__builtin_inff();
  total = total + exp(load(rest) * splat(rate));
  return std::exp((double)(x[token] - top) / t) / (double)sum(total);
}

// chance: of the path so far, and then with this token
bool falls(const Chain& out, int64_t b, int64_t level, double score, double& chance) {
  int64_t range = 0;
  while (range < out.edge_count && score >= out.edges[range]) ++range;
  chance *= out.rates[b * (out.edge_count + 1) + range];
  return chance < out.least[b * out.levels + level];
}

}  // namespace

int chain(const Model& m, const Call& first, const Chain& out) {
  const int64_t count = first.segment_count;
  Call c = first;
  std::vector<Segment> segments((size_t)count);
  std::vector<int64_t> live((size_t)count), tokens((size_t)count), positions((size_t)count);
  std::vector<Turns> turns(first.turns, first.turns + first.turn_count);
  std::vector<double> chances((size_t)count, 1.0);
  for (int64_t b = 0; b < count; ++b) live[(size_t)b] = b;
  for (int64_t level = 0;; ++level) {
    const int code = forward(m, c);
    if (code != DONE) return code;
    int64_t n = 0;
    for (size_t i = 0; i < live.size(); ++i) {
      const int64_t b = live[i], best = c.best[i], at = b * out.levels + level;
      const float* row = c.logits + (int64_t)i * m.vocab;
      const double t = out.temperatures ? out.temperatures[b] : 0.0;
      int64_t token = t > 0 ? ft_race(row, m.vocab, t, out.keys[at]) : best;
      if (token < 0) token = best;  // too close to call: a draft need not be right
      out.tokens[at] = token;
      out.made[b] = level + 1;
      if (out.scores) out.scores[at] = share(row, m.vocab, token, row[best], t > 0 ? t : 1.0);
      if (level + 1 >= out.most[b] || (out.ask && out.ask(b, out.scores[at]))) continue;
      if (out.edges && falls(out, b, level, out.scores[at], chances[(size_t)b])) continue;
      const Segment& s = first.segments[b];
      segments[(size_t)n] = Segment{n, 1, s.cache, s.capacity, s.committed,
                                    s.used + s.rows + level, s.positions, nullptr, 0};
      tokens[(size_t)n] = token;
      positions[(size_t)n] = first.positions[s.begin + s.rows - 1] + level + 1;
      live[(size_t)n++] = b;
    }
    if (!n) return DONE;
    live.resize((size_t)n);
    for (Turns& t : turns) t.index = positions.data();
    c.rows = c.segment_count = c.logit_count = n;
    c.segments = segments.data(), c.turns = turns.data();
    c.tokens = tokens.data(), c.positions = positions.data();
    c.logit_rows = nullptr;
  }
}

}  // namespace ft
