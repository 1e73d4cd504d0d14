// One forward: every thread runs all stages of all layers, meeting the others between them.
//
// Stages of a layer: norm (and quantise) | q, k, v | rotate, write, attend | o | norm | gate, up,
// activation | quantise | down. Between two `|` all threads meet. Two shortcuts save meetings
// without changing a bit: with few rows every thread norms and quantises all of them into memory of
// its own, and rotation and attention are one stage where a head's keys are written and read by the
// same thread.
#include "forward.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <algorithm>

#include "maths.h"
#include "pool.h"

namespace ft {
namespace {

constexpr int64_t ALONE = 4;     // rows up to which every thread prepares all of them itself
constexpr int64_t TOGETHER = 16;  // rows up to which rotation and attention are one stage
constexpr int64_t TILE = 128;    // rows of a gate/up tile
constexpr int64_t SCORES = 65536;  // numbers of scores an attention task aims for

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

// Rows ready to be multiplied: floats, and integers where a matrix wants them.
struct Ready {
  float* x;
  int64_t ld;
  int8_t* q;
  int64_t ldq;
  float* scale;
  int32_t* sums;
  int64_t lds;
};

struct Layout {  // hands out pieces of the arena; with a null base it only counts
  uint8_t* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = (T*)(base + used);
    used += ((size_t)count * sizeof(T) + 63) & ~(size_t)63;
    return p;
  }
  Ready ready(int64_t rows, int64_t width, bool floats) {
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
};

bool integer(const Matrix& m) { return m.data && (m.format == INT8 || m.format == INT4); }

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

v16 table_row(const void* table, int64_t type, int64_t at, int64_t left) {
  v16 v = splat(0.0f);
  if (left >= LANES) {
    if (type == TABLE_F32) return load((const float*)table + at);
    if (type == TABLE_BF16) return load_bf16((const uint16_t*)table + at);
    return load_half((const uint16_t*)table + at);
  }
  for (int64_t i = 0; i < left; ++i) {
    if (type == TABLE_F32)
      v[i] = ((const float*)table)[at + i];
    else if (type == TABLE_BF16)
      v[i] = float_of_bf16(((const uint16_t*)table)[at + i]);
    else
      v[i] = float_of_half(((const uint16_t*)table)[at + i]);
  }
  return v;
}

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

struct Piece {  // a matrix whose outputs go to a buffer
  const Matrix* m;
  float* out;
  int64_t ld;
};

struct Run {
  const Model& m;
  const Call& c;
  const KeyPlan& plan;
  int threads;
  int64_t rows, attention_rows = 1;
  // shared by all threads
  float *x, *y, *q, *k, *v, *h;  // [T, ..]; y only where there are norms behind attention and MLP
  int64_t ldx, ldq, ldk, ldh;
  Ready shared, shared_mlp, shared_out, shared_h;
  // of each thread
  Ready* own;      // [threads] prepared input of width H
  Ready* own_out;  // of width Hq D
  Ready* own_h;    // of width F
  float** tile;    // [2][TILE][PANEL]
  float** scratch;

  Run(const Model& model, const Call& call, const KeyPlan& keys, int count)
      : m(model), c(call), plan(keys), threads(count), rows(call.rows) {}

  bool alone() const { return rows <= ALONE || threads == 1; }

  void lay_out(Layout& l) {
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
    const int64_t tile_rows = std::min(t, TILE);
    const int64_t together = std::max(attention_rows, std::min(t, TOGETHER));
    for (int i = 0; i < threads; ++i) {
      const Ready a = l.ready(few, m.hidden, true), b = l.ready(few, wide, false),
                  d = l.ready(few, m.ffn, false);
      float* e = l.take<float>(2 * tile_rows * PANEL);
      float* f = l.take<float>(attention_scratch(together * m.group(), plan.most, m.size));
      if (!l.base) continue;
      own[i] = a, own_out[i] = b, own_h[i] = d, tile[i] = e, scratch[i] = f;
    }
  }

  // -- rows

  template <class F>
  void each_row(Team& team, F f) {  // shared out; the caller puts a barrier behind it
    const int64_t grain = rows >= 64 ? 4 : 1;
    int64_t b, e;
    while (team.next(rows, grain, &b, &e))
      for (int64_t r = b; r < e; ++r) f(r);
  }

  void embed(int64_t r) {
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

  void quantise(const float* from, int64_t width, const Ready& to, int64_t r) {
    quantise_row(from, width, to.ldq, to.q + r * to.ldq, to.scale + r, to.sums + r * to.lds);
  }

  void prepare(const NormWeights& norm, const float* from, const Ready& to, int64_t r, bool ints) {
    float* out = to.x + r * to.ld;
    if (norm.weight)
      norm_row((int)m.norm_kind, norm, from, m.hidden, m.eps, out);
    else
      memcpy(out, from, (size_t)to.ld * 4);
    if (ints) quantise(out, m.hidden, to, r);
  }

  void add_post(const NormWeights& norm, int64_t r) {  // x += alpha * norm(y)
    float *a = x + r * ldx, *b = y + r * ldx;
    for (int64_t i = m.hidden; i < ldx; ++i) b[i] = 0.0f;  // products write no padding
    if (norm.weight) norm_row((int)m.norm_kind, norm, b, m.hidden, m.eps, b);
    const v16 alpha = splat(m.residual_scale);
    for (int64_t i = 0; i < ldx; i += LANES) store(a + i, fma(alpha, load(b + i), load(a + i)));
  }

  // Quantised rows of a float buffer for matrix `w`, by whoever does it here; a barrier follows
  // where the work was shared out.
  Rows ready_rows(Team& team, const Matrix& w, const float* from, int64_t ld, const Ready* mine,
                  const Ready& ours) {
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

  Rows as_rows(const Ready& r) const {
    return Rows{rows, r.x, r.ld, r.q, r.ldq, r.scale, r.sums, r.lds};
  }

  // -- products

  // Panels shared out: every thread first takes most of its equal share in one piece, which is one
  // stream to the processor; the rest goes panel by panel to whoever is there.
  template <class F>
  static void each_panel(Team& team, int64_t total, F f) {
    const int64_t share = total * 3 / (4 * team.size);
    if (share) f(share * team.rank, share * (team.rank + 1));
    const int64_t taken = share * team.size;
    int64_t b, e;
    while (team.next(total - taken, 1, &b, &e)) f(taken + b, taken + e);
  }

  void project(Team& team, const Piece* pieces, int count, const Rows& in) {
    int64_t total = 0;
    for (int i = 0; i < count; ++i) total += pieces[i].m->panels;
    each_panel(team, total,
               [&](int64_t b, int64_t e) { run_pieces(pieces, count, in, b, e); });
  }

  void run_pieces(const Piece* pieces, int count, const Rows& in, int64_t b, int64_t e) {
    int64_t first = 0;
    for (int i = 0; i < count; ++i) {
      const Matrix& w = *pieces[i].m;
      const int64_t from = std::max(b, first) - first, to = std::min(e, first + w.panels) - first;
      if (from < to) product(w, in, from, to, pieces[i].out + from * PANEL, pieces[i].ld);
      first += w.panels;
    }
  }

  void expand(const Layer& w, const Rows& in, int64_t b, int64_t e, float* buffer) {
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

  void contract(Team& team, const Matrix& w, const Rows& in, bool post) {
    const float alpha = m.parallel ? 1.0f : m.residual_scale;
    each_panel(team, w.panels, [&](int64_t b, int64_t e) {
      if (post)
        product(w, in, b, e, y + b * PANEL, ldx);
      else
        product_add(w, in, b, e, x + b * PANEL, ldx, alpha);
    });
  }

  // -- attention

  KvView view(const Segment& s, int64_t layer) const {
    const int64_t row = 2 * m.kv_heads * m.size;
    uint8_t* base = (uint8_t*)s.cache + layer * s.capacity * row * (m.half_cache ? 2 : 4);
    return KvView{base, m.half_cache != 0, m.kv_heads, m.size};
  }

  void norm_head(float* head, const float* weight, float scale) {
    for (int64_t d = 0; d < m.size; ++d) head[d] = head[d] * scale * weight[d];
  }

  // Norms, rotation and the cache's rows for one key/value head and the queries of its group.
  void turn(const Layer& w, const Segment& s, int64_t layer, int64_t head, int64_t i,
            const float* full) {
    const int64_t r = s.begin + i, d = m.size, group = m.group();
    float *qs = q + r * ldq + head * group * d, *ks = k + r * ldk + head * d;
    for (int64_t g = 0; g < group; ++g)
      if (w.q_norm) {
        const bool whole = m.qk_norm == QK_FULL;
        const float scale = whole ? full[0] : inverse_rms(qs + g * d, d, m.eps);
        norm_head(qs + g * d, w.q_norm + (whole ? (head * group + g) * d : 0), scale);
      }
    if (w.k_norm) {
      const bool whole = m.qk_norm == QK_FULL;
      const float scale = whole ? full[1] : inverse_rms(ks, d, m.eps);
      norm_head(ks, w.k_norm + (whole ? head * d : 0), scale);
    }
    if (w.rope >= 0) {
      const Turns& t = c.turns[w.rope];
      const float* turns = t.table + t.index[r] * w.rope_dim;
      for (int64_t g = 0; g < group; ++g) rotate(qs + g * d, w.rope_dim, turns);
      rotate(ks, w.rope_dim, turns);
    }
    write_kv(view(s, layer), head, s.used + i, ks, v + r * ldk + head * d);
  }

  void attention(Team& team, const Layer& w, int64_t layer) {
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

  // -- the whole

  struct Clock {
    double* seconds;
    double last = 0.0;
    Clock(double* s, int rank) : seconds(rank ? nullptr : s) {
      if (seconds) last = now();
    }
    void at(int stage) {
      if (!seconds) return;
      const double t = now();
      seconds[stage] += t - last;
      last = t;
    }
  };

  void tap(int64_t layer) {
    for (int64_t i = 0; i < c.tap_count; ++i)
      if (c.taps[i].which == layer) copy_out(c.taps[i].data);
  }

  void copy_out(float* to) const {
    for (int64_t r = 0; r < rows; ++r)
      memcpy(to + r * m.hidden, x + r * ldx, (size_t)m.hidden * 4);
  }

  // x += what is still in y; then the norms of the next stage
  Rows norm_stage(Team& team, const NormWeights* post, const NormWeights& norm, bool ints,
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

  void run(Team& team) {
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

  void flush(Team& team, const NormWeights** post) {
    each_row(team, [&](int64_t r) { add_post(**post, r); });
    team.barrier();
    *post = nullptr;
  }

  void layer_serial(Team& team, const Layer& w, int64_t layer, const Piece* pieces, const Rows& in,
                    Clock& clock, const NormWeights** post) {
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
  void layer_parallel(Team& team, const Layer& w, int64_t layer, const Piece* pieces,
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

  void finish(Team& team, Clock& clock) {
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
    each_panel(team, w.panels, [&](int64_t begin, int64_t end) {
      product(w, in, begin, end, c.logits + begin * PANEL, m.vocab);
      if (m.logit_scale != 1.0f || m.logit_cap > 0.0f) shape_logits(begin, end);
    });
    team.barrier();
    clock.at(STAGE_HEAD);
  }

  void shape_logits(int64_t b, int64_t e) {
    const int64_t end = std::min(e * PANEL, m.vocab);
    for (int64_t i = 0; i < c.logit_count; ++i)
      for (int64_t j = b * PANEL; j < end; j += LANES) {
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
};

}  // namespace

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
