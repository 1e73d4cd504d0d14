// Barriers and the sharing out of loops: see Team in pool.h.
#include "team.h"

#include "pool.h"

namespace ft {
namespace {

// How long a thread waits awake: the others are on their way. It must be longer than waking a
// sleeper takes, by far. On a virtual machine with busy neighbours that is 0.1 ms and more, and with
// less patience than that one late thread begins a convoy: while it wakes the other runs ahead, falls
// asleep at the next meeting, and has to be woken in turn, at every meeting of every forward. (Seen:
// forwards of 0.5 ms that took 7 for minutes.) Others lose nothing: who waits offers its processor.
constexpr int64_t BARRIER_PATIENCE_NS = 2000000;

}  // namespace

void Team::barrier() {
  TeamShared* s = shared;
  if (size == 1) {
    s->shares[0].word.store(Share::FRESH, std::memory_order_relaxed);
    return;
  }
  const uint32_t phase = s->phase.value.load(std::memory_order_relaxed);
  if (s->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
    s->arrived.store(0, std::memory_order_relaxed);
    for (int i = 0; i < size; ++i) s->shares[i].word.store(Share::FRESH, std::memory_order_relaxed);
    s->phase.publish(phase + 1);
  } else {
    s->phase.wait_while(phase, BARRIER_PATIENCE_NS, &waited);
  }
}

bool Team::next(int64_t total, int64_t grain, int64_t* begin, int64_t* end) {
  const int64_t pieces = (total + grain - 1) / grain;
  auto left = [&](int who, uint64_t word) -> uint64_t {
    if (word != Share::FRESH) return word;
    return (uint64_t)(pieces * who / size) << 32 | (uint64_t)(pieces * (who + 1) / size);
  };
  int victim = rank;
  for (;;) {
    std::atomic<uint64_t>& share = shared->shares[victim].word;
    uint64_t word = share.load(std::memory_order_relaxed);
    for (;;) {
      const uint64_t now = left(victim, word);
      const int64_t first = (int64_t)(now >> 32), last = (int64_t)(now & 0xffffffff);
      if (first >= last) break;
      const int64_t piece = victim == rank ? first : last - 1;
      const uint64_t then = victim == rank ? now + (1ull << 32) : now - 1;
      if (!share.compare_exchange_weak(word, then, std::memory_order_relaxed)) continue;
      *begin = piece * grain;
      *end = *begin + grain < total ? *begin + grain : total;
      return true;
    }
    int64_t most = 0;
    for (int who = 0; who < size; ++who) {
      const uint64_t now = left(who, shared->shares[who].word.load(std::memory_order_relaxed));
      const int64_t here = (int64_t)(now & 0xffffffff) - (int64_t)(now >> 32);
      if (here > most) most = here, victim = who;
    }
    if (most == 0) return false;
  }
}

}  // namespace ft
