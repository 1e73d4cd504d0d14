// A suffix automaton that counts, and the drafts read off it. What it is and what it promises is
// said in Python, in drafters/tables/automaton.py and speculate.py; this gives the same states and,
// to the last bit, the same drafts.
//
// A token that memory does not suffice for changes nothing: what reading it takes is found out, and
// got, before anything is written. One thread at a time; nothing is shared between automata.
//
// A state's first successor lies in it; further ones in a block of words, in the order in which
// they came: [count][token, state]... A block has room for a power of two of them, the smallest
// that suffices, and, from INDEXED on, an open-addressing table of their places + 1 behind them.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#define FT_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t INDEXED = 32;          // fewer successors are quicker found by looking at all
constexpr int CLASSES = 31, SMALL = 5;   // of blocks; those below SMALL may be cut off larger ones
constexpr int64_t MOST = INT32_MAX - 8;  // of states, and of words
enum : int64_t { NO_MEMORY = -1, NO_STATE = -2 };

struct State {
  int32_t length, link, count;
  int32_t token, to;  // the first successor; to = -1: there is none
  int32_t more;       // where the block of the others is; 0 = there is none
};

// An array that grows by an eighth: what is not used is little.
template <class T>
struct Array {
  T* at = nullptr;
  int64_t size = 0, room = 0;

  bool grow(int64_t more, int64_t& bytes, int64_t limit) {
    const int64_t need = size + more;
    if (need <= room) return true;
    if (need > MOST) return false;
    for (int64_t want : {std::min(MOST, need + need / 8 + 16), need}) {
      const int64_t now = bytes + (want - room) * (int64_t)sizeof(T);
      if (limit && now > limit) continue;
      T* got = (T*)realloc(at, want * sizeof(T));
      if (!got) continue;
      at = got;
      room = want;
      bytes = now;
      return true;
    }
    return false;
  }
};

inline int width_class(int64_t n) {  // of the block for n successors
  int c = 0;
  while ((int64_t)1 << c < n) ++c;
  return c;
}
inline int64_t words_of(int c) {
  const int64_t n = (int64_t)1 << c;
  return 1 + 2 * n + (n >= INDEXED ? 2 * n : 0);
}
inline uint32_t slot(int32_t token, int c) {  // of 2^(c + 1)
  return ((uint32_t)token * 0x9E3779B1u) >> (31 - c);
}

struct Automaton {
  Array<State> states;
  Array<int32_t> words;    // the blocks
  Array<int32_t> tail;     // the document's tokens since its end was last entered
  int32_t last = 0;        // the state of the document so far
  int64_t depth, reach;
  int64_t limit, bytes = sizeof(Automaton);
  int32_t freed[CLASSES] = {};       // blocks that grew and moved, in lists
  int32_t spare = 0, spare_end = 0;  // a large one that small ones are cut off

  // successors --------------------------------------------------------------------------------
  int32_t* find(int32_t state, int32_t token) const {  // where it says what comes after
    State& s = states.at[state];
    if (s.token == token && s.to >= 0) return &s.to;
    if (!s.more) return nullptr;
    int32_t* block = words.at + s.more;
    const int64_t n = block[0];
    if (n > INDEXED / 2) {
      const int c = width_class(n);
      const int32_t* table = block + 1 + ((int64_t)2 << c);
      const uint32_t mask = ((uint32_t)2 << c) - 1;
      for (uint32_t i = slot(token, c);; i = (i + 1) & mask) {
        if (!table[i]) return nullptr;
        int32_t* pair = block + 2 * (int64_t)table[i] - 1;
        if (pair[0] == token) return pair + 1;
      }
    }
    for (int64_t i = 0; i < n; ++i)
      if (block[1 + 2 * i] == token) return block + 2 + 2 * i;
    return nullptr;
  }
  int32_t step(int32_t state, int32_t token) const {
    const int32_t* to = find(state, token);
    return to ? *to : -1;
  }
  int64_t others(int32_t state) const {  // how many beyond the first
    const int32_t more = states.at[state].more;
    return more ? words.at[more] : 0;
  }

  // blocks ------------------------------------------------------------------------------------
  int32_t take(int c) {  // `reserve` has seen to it that there are words
    if (const int32_t block = freed[c]) {
      freed[c] = words.at[block];
      return block;
    }
    const int32_t need = (int32_t)words_of(c);
    if (c < SMALL) {
      for (int large = SMALL; spare_end - spare < need && large < CLASSES; ++large) {
        if (const int32_t block = freed[large]) {
          freed[large] = words.at[block];
          spare = block;
          spare_end = block + (int32_t)words_of(large);
        }
      }
      if (spare_end - spare >= need) {
        spare += need;
        return spare - need;
      }
    }
    words.size += need;
    return (int32_t)(words.size - need);
  }
  void give(int32_t block, int c) {
    words.at[block] = freed[c];
    freed[c] = block;
  }
  static void enter(int32_t* table, int c, int32_t token, int64_t place) {
    const uint32_t mask = ((uint32_t)2 << c) - 1;
    uint32_t i = slot(token, c);
    while (table[i]) i = (i + 1) & mask;
    table[i] = (int32_t)place + 1;
  }
  // Words that a further successor of a state may take.
  int64_t growth(int32_t state) const {
    if (states.at[state].to < 0) return 0;
    const int64_t n = others(state);
    return (n & (n - 1)) == 0 ? words_of(width_class(n + 1)) : 0;  // full, or none yet
  }
  void add(int32_t state, int32_t token, int32_t to) {
    State& s = states.at[state];
    if (s.to < 0) {
      s.token = token;
      s.to = to;
      return;
    }
    const int64_t n = others(state);
    const int c = width_class(n + 1);
    if ((n & (n - 1)) == 0) {
      const int32_t block = take(c);
      int32_t* made = words.at + block;
      if (n) memcpy(made, words.at + s.more, (1 + 2 * n) * sizeof(int32_t));
      if ((int64_t)1 << c >= INDEXED) {
        int32_t* table = made + 1 + ((int64_t)2 << c);
        memset(table, 0, ((size_t)2 << c) * sizeof(int32_t));
        for (int64_t i = 0; i < n; ++i) enter(table, c, made[1 + 2 * i], i);
      }
      if (n) give(s.more, width_class(n));
      s.more = block;
    }
    int32_t* block = words.at + s.more;
    block[0] = (int32_t)(n + 1);
    block[1 + 2 * n] = token;
    block[2 + 2 * n] = to;
    if ((int64_t)1 << c >= INDEXED) enter(block + 1 + ((int64_t)2 << c), c, token, n);
  }

  // building ----------------------------------------------------------------------------------
  bool reserve(int64_t new_states, int64_t new_words) {
    return states.grow(new_states, bytes, limit) && words.grow(new_words, bytes, limit);
  }
  int32_t state(int32_t length, int32_t link) {
    states.at[states.size] = {length, link, 0, 0, -1, 0};
    return (int32_t)states.size++;
  }
  int32_t split(int32_t p, int32_t token, int32_t q) {
    const int32_t twin = state(states.at[p].length + 1, states.at[q].link);
    State &a = states.at[q], &b = states.at[twin];
    b.count = a.count;
    b.token = a.token;
    b.to = a.to;
    if (a.more) {
      const int c = width_class(others(q));
      b.more = take(c);
      memcpy(words.at + b.more, words.at + a.more, words_of(c) * sizeof(int32_t));
    }
    a.link = twin;
    for (; p >= 0; p = states.at[p].link) {
      int32_t* to = find(p, token);
      if (!to || *to != q) break;
      *to = twin;
    }
    return twin;
  }
  bool append(int32_t token) {
    int64_t need = 0;
    int32_t p = last, q = -1;
    for (; p >= 0 && (q = step(p, token)) < 0; p = states.at[p].link) need += growth(p);
    const bool splits = p >= 0 && states.at[q].length != states.at[p].length + 1;
    // Before it is copied q may get a successor itself.
    if (splits) need += words_of(width_class(others(q) + 1));
    if (!reserve(2, need)) return false;
    int32_t next = -1;
    if (p != last) {
      next = state(states.at[last].length + 1, 0);
      for (int32_t s = last; s != p; s = states.at[s].link) add(s, token, next);
    }
    if (p >= 0) {
      if (splits) q = split(p, token, q);
      if (next >= 0) states.at[next].link = q;
    }
    last = next >= 0 ? next : q;
    return true;
  }
  bool read(int32_t token) {
    const int32_t before = last;
    if (!tail.grow(1, bytes, limit)) return false;
    bool done = true;
    if (states.at[last].length >= reach) {
      const int64_t from = std::max<int64_t>(0, tail.size - depth);
      last = 0;
      for (int64_t i = from; done && i < tail.size; ++i) done = append(tail.at[i]);
      // All of it is known, so no more than states that are split stays of an attempt.
      if (done && (done = append(token))) {
        tail.size -= from;
        memmove(tail.at, tail.at + from, tail.size * sizeof(int32_t));
      }
    } else {
      done = append(token);
    }
    if (!done) {
      last = before;
      return false;
    }
    tail.at[tail.size++] = token;
    for (int32_t s = last; s > 0; s = states.at[s].link)
      states.at[s].count += states.at[s].count < INT32_MAX;
    return true;
  }

  // drafting ----------------------------------------------------------------------------------
  int32_t onwards(int32_t s) const {
    while (s > 0 && states.at[s].to < 0) s = states.at[s].link;
    return s;
  }
};

struct Limits {
  int64_t nodes, depth, branching;
  double factor, offset, min_prob;
};

struct Draft {  // where one is written to; tokens = nullptr: it is not
  int64_t *tokens, *parents, *levels;
  double* probs;

  void put(int64_t i, int32_t token, int64_t parent, int64_t level, double prob) const {
    if (!tokens) return;
    tokens[i] = token;
    parents[i] = parent;
    levels[i] = level;
    probs[i] = prob;
  }
};

struct Result {
  int64_t count;  // of nodes, or NO_MEMORY
  double score;
};

// The likeliest chain, given up as soon as it cannot score more than `floor`.
Result chain(const Automaton& text, int32_t state, int64_t most, const Limits& limits,
             double floor, const Draft& out) {
  double prob = 1, score = 0;
  int64_t n = 0;
  while (n < most) {
    state = text.onwards(state);
    if (state <= 0) break;
    const State& s = text.states.at[state];
    int32_t token = s.token, after = s.to;
    if (s.more) {
      const int32_t* block = text.words.at + s.more;
      int32_t heaviest = text.states.at[after].count;
      int64_t total = heaviest;
      for (int64_t i = 0; i < block[0]; ++i) {
        const int32_t other = block[2 + 2 * i], c = text.states.at[other].count;
        total += c;
        if (c > heaviest) {
          heaviest = c;
          token = block[1 + 2 * i];
          after = other;
        }
      }
      prob *= (double)heaviest / (double)total;
      if (prob < limits.min_prob) break;
      if (score + prob * (double)(most - n) <= floor) return {0, 0};
    }
    out.put(n, token, n - 1, n + 1, prob);
    ++n;
    score += prob;
    state = after;
  }
  return {n, score};
}

struct Node {  // that may be drafted; the likeliest first, of equally likely ones the elder
  double prob;
  int64_t born, below, level;
  int32_t token, after;

  bool operator<(const Node& other) const {
    return prob < other.prob || (prob == other.prob && born > other.born);
  }
};

struct Next {
  int32_t count, token, after;
  int64_t place;

  bool operator<(const Next& other) const {  // the heaviest first
    return count > other.count || (count == other.count && place < other.place);
  }
};

struct Search {  // what a search for trees takes
  Array<Node> heap;
  Array<Next> nexts;
  int64_t bytes = 0, born = 0;

  ~Search() {
    free(heap.at);
    free(nexts.at);
  }

  bool push(const Automaton& text, int64_t below, int64_t level, int32_t state, double prob,
            const Limits& limits) {
    state = text.onwards(state);
    if (state <= 0 || level > limits.depth) return true;
    const State* states = text.states.at;
    const State& s = states[state];
    const int64_t n = 1 + text.others(state);
    nexts.size = 0;
    if (!nexts.grow(n, bytes, 0)) return false;
    nexts.at[0] = {states[s.to].count, s.token, s.to, 0};
    int64_t total = nexts.at[0].count;
    for (int64_t i = 1; i < n; ++i) {
      const int32_t* pair = text.words.at + s.more + 2 * i - 1;
      nexts.at[i] = {states[pair[1]].count, pair[0], pair[1], i};
      total += nexts.at[i].count;
    }
    const int64_t kept = n > 1 ? std::max<int64_t>(0, std::min(limits.branching, n)) : n;
    std::partial_sort(nexts.at, nexts.at + kept, nexts.at + n);
    if (!heap.grow(kept, bytes, 0)) return false;
    for (int64_t i = 0; i < kept; ++i) {
      const Next& next = nexts.at[i];
      const double p = prob * (double)next.count / (double)total;
      if (p < limits.min_prob) break;
      heap.at[heap.size++] = {p, ++born, below, level, next.token, next.after};
      std::push_heap(heap.at, heap.at + heap.size);
    }
    return true;
  }

  // Best first: the likeliest node whose parent is drafted comes next.
  Result tree(const Automaton& text, int32_t state, int64_t most, const Limits& limits,
              const Draft& out) {
    heap.size = born = 0;
    double score = 0;
    int64_t n = 0;
    if (!push(text, -1, 1, state, 1, limits)) return {NO_MEMORY, 0};
    while (heap.size && n < most) {
      std::pop_heap(heap.at, heap.at + heap.size);
      const Node best = heap.at[--heap.size];
      out.put(n, best.token, best.below, best.level, best.prob);
      score += best.prob;
      if (!push(text, n++, best.level + 1, best.after, best.prob, limits)) return {NO_MEMORY, 0};
    }
    return {n, score};
  }
};

int64_t most_of(const Limits& limits, int64_t matched) {
  const double most = limits.factor * (double)matched + limits.offset;
  if (!(most < (double)limits.nodes)) return limits.nodes;
  return most < 0 ? 0 : (int64_t)most;
}

int64_t packed(int32_t state, int64_t matched) { return (int64_t)state << 32 | matched; }

}  // namespace

// An empty automaton, or null without memory. limit: bytes it may hold; 0 = as many as there are.
FT_API void* ft_automaton_create(int64_t depth, int64_t reach, int64_t limit) {
  Automaton* a = (Automaton*)malloc(sizeof(Automaton));
  if (!a) return nullptr;
  *a = Automaton();
  a->depth = std::max<int64_t>(0, depth);
  a->reach = std::max<int64_t>(1, reach);
  a->limit = limit;
  if (!a->reserve(1, 1)) {
    free(a->states.at);
    free(a);
    return nullptr;
  }
  a->words.size = 1;  // 0 is no block
  a->state(0, -1);
  return a;
}

FT_API void ft_automaton_destroy(void* automaton) {
  Automaton* a = (Automaton*)automaton;
  if (!a) return;
  free(a->states.at);
  free(a->words.at);
  free(a->tail.at);
  free(a);
}

FT_API int64_t ft_automaton_bytes(const void* automaton) {
  return ((const Automaton*)automaton)->bytes;
}

FT_API void ft_automaton_begin(void* automaton) {
  Automaton* a = (Automaton*)automaton;
  a->last = 0;
  a->tail.size = 0;
}

// How many of the tokens [n] it has read: fewer when memory did not suffice.
FT_API int64_t ft_automaton_extend(void* automaton, const int32_t* tokens, int64_t n) {
  Automaton* a = (Automaton*)automaton;
  for (int64_t i = 0; i < n; ++i)
    if (!a->read(tokens[i])) return i;
  return n;
}

// The numbers of a state: length, link, count. NO_STATE where there is none.
FT_API int64_t ft_automaton_state(const void* automaton, int64_t state, int32_t* out) {
  const Automaton* a = (const Automaton*)automaton;
  if (state < 0 || state >= a->states.size) return NO_STATE;
  memcpy(out, a->states.at + state, 3 * sizeof(int32_t));
  return a->states.size;
}

// Places are (state << 32 | matched tokens).
FT_API int64_t ft_automaton_repeated(const void* automaton) {
  const Automaton* a = (const Automaton*)automaton;
  int32_t s = a->last;
  while (s > 0 && a->states.at[s].count < 2) s = a->states.at[s].link;
  return packed(s, a->states.at[s].length);
}

FT_API int64_t ft_automaton_follow(const void* automaton, int64_t from, int64_t matched,
                                   const int32_t* tokens, int64_t n) {
  const Automaton* a = (const Automaton*)automaton;
  if (from < 0 || from >= a->states.size) return NO_STATE;
  const State* states = a->states.at;
  int32_t state = (int32_t)from;
  while (state > 0 && states[states[state].link].length >= matched) state = states[state].link;
  for (int64_t i = 0; i < n; ++i) {
    int32_t after = a->step(state, tokens[i]);
    while (after < 0 && state > 0) {
      state = states[state].link;
      matched = states[state].length;
      after = a->step(state, tokens[i]);
    }
    state = std::max(after, 0);
    matched = after >= 0 ? matched + 1 : 0;
  }
  return packed(state, matched);
}

// The best draft behind a place: how many nodes it has, NO_STATE or NO_MEMORY.
// out: [3, nodes] tokens, parents, levels; probs: [nodes + 2], the last ones the draft's score and
// how many tokens matched.
FT_API int64_t ft_automaton_draft(const void* automaton, int64_t place, int64_t matched,
                                  int64_t nodes, int64_t depth, int64_t branching, double factor,
                                  double offset, double min_prob, double floor, int64_t* out,
                                  double* probs) {
  const Automaton& a = *(const Automaton*)automaton;
  if (place < 0 || place >= a.states.size) return NO_STATE;
  const Limits limits{nodes, depth, branching, factor, offset, min_prob};
  const bool chains = branching == 1;
  Search search;
  const auto drafted = [&](int32_t state, int64_t most, double least, const Draft& to) {
    return chains ? chain(a, state, most, limits, least, to)
                  : search.tree(a, state, most, limits, to);
  };
  int32_t best = -1;
  int64_t best_most = 0, best_matched = 0;
  double best_score = floor;
  for (int32_t s = (int32_t)place; s > 0;) {
    int64_t most = most_of(limits, matched);
    if (chains) most = std::min(most, depth);
    if ((double)most <= best_score) break;
    const Result r = drafted(s, most, best_score, Draft{});
    if (r.count < 0) return r.count;
    if (r.score > best_score) {
      best = s;
      best_most = most;
      best_matched = matched;
      best_score = r.score;
    }
    s = a.states.at[s].link;
    matched = a.states.at[s].length;
  }
  if (best < 0) return 0;
  // Once more, and written: that costs less than room for all that are not the best.
  probs[nodes] = best_score;
  probs[nodes + 1] = (double)best_matched;
  return drafted(best, best_most, -1, Draft{out, out + nodes, out + 2 * nodes, probs}).count;
}
