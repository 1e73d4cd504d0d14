// One forward on its way: what its threads share, and the stages they walk through. Each stage is a
// file: forward_rows, forward_products, forward_attention, forward_output; forward.cpp has their
// order, forward_memory the buffers.
#pragma once
#include <time.h>

#include "forward.h"
#include "pool.h"

namespace ft {

constexpr int64_t ALONE = 4;      // rows up to which every thread prepares all of them itself
constexpr int64_t TOGETHER = 16;  // rows up to which rotation and attention are one stage
constexpr int64_t TILE = 128;     // rows of a gate/up tile

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

struct Layout {  // hands out pieces of a block; with a null base it only counts
  uint8_t* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = (T*)(base + used);
    used += ((size_t)count * sizeof(T) + 63) & ~(size_t)63;
    return p;
  }
  Ready ready(int64_t rows, int64_t width, bool floats);
};

inline bool integer(const Matrix& m) { return m.data && (m.format == INT8 || m.format == INT4); }

struct Piece {  // a matrix whose outputs go to a buffer
  const Matrix* m;
  float* out;
  int64_t ld;
};

struct Clock {  // adds up the seconds of each stage, on the first thread
  double* seconds;
  double last = 0.0;
  static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
  }
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

struct Best {  // the largest logit of a row among those that one thread has made
  float value;
  int64_t column;
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
  Best** best;     // [logit_count]

  Run(const Model& model, const Call& call, const KeyPlan& keys, int count)
      : m(model), c(call), plan(keys), threads(count), rows(call.rows) {}

  bool alone() const { return rows <= ALONE || threads == 1; }
  Rows as_rows(const Ready& r) const {
    return Rows{rows, r.x, r.ld, r.q, r.ldq, r.scale, r.sums, r.lds};
  }

  void lay_out(Layout& l);
  void run(Team& team);

  // -- sharing out

  template <class F>
  void each_row(Team& team, F f) {  // shared out; the caller puts a barrier behind it
    const int64_t grain = rows >= 64 ? 4 : 1;
    int64_t b, e;
    while (team.next(rows, grain, &b, &e))
      for (int64_t r = b; r < e; ++r) f(r);
  }

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

  // -- forward.cpp
  void layer_serial(Team& team, const Layer& w, int64_t layer, const Piece* pieces, const Rows& in,
                    Clock& clock, const NormWeights** post);
  void layer_parallel(Team& team, const Layer& w, int64_t layer, const Piece* pieces,
                      const Rows& in, const Rows& in_mlp, Clock& clock);

  // -- forward_rows.cpp
  void embed(int64_t r);
  void quantise(const float* from, int64_t width, const Ready& to, int64_t r);
  void prepare(const NormWeights& norm, const float* from, const Ready& to, int64_t r, bool ints);
  void add_post(const NormWeights& norm, int64_t r);
  Rows ready_rows(Team& team, const Matrix& w, const float* from, int64_t ld, const Ready* mine,
                  const Ready& ours);
  Rows norm_stage(Team& team, const NormWeights* post, const NormWeights& norm, bool ints,
                  const NormWeights* second, bool second_ints, Rows* second_rows);
  void flush(Team& team, const NormWeights** post);

  // -- forward_products.cpp
  void project(Team& team, const Piece* pieces, int count, const Rows& in);
  void run_pieces(const Piece* pieces, int count, const Rows& in, int64_t b, int64_t e);
  void expand(const Layer& w, const Rows& in, int64_t b, int64_t e, float* buffer);
  void contract(Team& team, const Matrix& w, const Rows& in, bool post);

  // -- forward_attention.cpp
  KvView view(const Segment& s, int64_t layer) const;
  void turn(const Layer& w, const Segment& s, int64_t layer, int64_t head, int64_t i,
            const float* full);
  void attention(Team& team, const Layer& w, int64_t layer);

  // -- forward_output.cpp
  void tap(int64_t layer);
  void copy_out(float* to) const;
  void finish(Team& team, Clock& clock);
  void shape_logits(int64_t panel);

  // -- forward_best.cpp
  void clear_best(Best* mine) const;
  void note_best(Best* mine, int64_t panel) const;
  void tell_best(const Team& team) const;
};

}  // namespace ft
