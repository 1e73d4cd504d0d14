// See pool.h. Plain pthreads and futexes: no C++ runtime state, nothing to destroy at exit.
#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>

#include "crew.h"
#include "team.h"

namespace ft {
namespace {

// How long a thread waits awake: the next call may be a sampled token away; whoever has the team
// needs the processors.
constexpr int64_t IDLE_PATIENCE_NS = 1000000;
constexpr int64_t TURN_PATIENCE_NS = 5000;

struct Pool {
  // One team at a time, in order of arrival: a mutex would let a caller in a tight loop take it
  // again and again while the one it has just woken is still on its way.
  std::atomic<uint32_t> tickets{0};
  alignas(64) Gate turn;
  int workers = 0;
  Crew crew;
  Share shares[MAX_THREADS];
  TeamShared team{{}, {0}, shares};
  // The number of the call in the upper 24 bits, the size of its team in the lower 8, in one
  // word: a worker that wakes late can never pair one call's number with another call's size.
  alignas(64) Gate call;
  void (*fn)(Team&, void*) = nullptr;
  void* arg = nullptr;
};

struct Worker {
  Pool* pool;
  int rank;
  uint32_t seen;
};

std::atomic<Pool*> the_pool{nullptr};
thread_local bool in_team = false;

// A child of fork() has none of the workers: it leaves the old pool
// where it is (a few hundred bytes) and starts another when it needs one.
void forget_pool() {
  the_pool.store(nullptr);
  in_team = false;
}

Pool* get_pool() {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, [] { pthread_atfork(nullptr, nullptr, forget_pool); });
  Pool* pool = the_pool.load(std::memory_order_acquire);
  if (pool) return pool;
  Pool* fresh = new Pool;
  if (the_pool.compare_exchange_strong(pool, fresh)) return fresh;
  delete fresh;
  return pool;
}

void* work(void* raw) {
  Worker self = *(Worker*)raw;
  delete (Worker*)raw;
  in_team = true;
  Pool* pool = self.pool;
  uint32_t seen = self.seen;
  for (;;) {
    seen = pool->call.wait_while(seen, IDLE_PATIENCE_NS);
    const int size = (int)(seen & 255);
    if (self.rank >= size) continue;
    Team team{self.rank, size, &pool->team};
    pool->fn(team, pool->arg);
    team.barrier();  // the caller leaves when everybody is here
  }
  return nullptr;
}

// Starts workers until there are `count`; returns how many there are (fewer if the system refuses).
int grow(Pool* pool, int count) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals go to the threads that expect them
  while (pool->workers < count) {
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    Worker* worker = new Worker{pool, pool->workers + 1, pool->call.value.load()};
    pthread_t thread;
    const int failed = pthread_create(&thread, &attr, work, worker);
    pthread_attr_destroy(&attr);
    if (failed) {
      delete worker;
      break;
    }
    ++pool->workers;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return pool->workers;
}

void take_turn(Pool* pool) {
  const uint32_t mine = pool->tickets.fetch_add(1, std::memory_order_relaxed);
  uint32_t now = pool->turn.value.load(std::memory_order_acquire);
  while (now != mine) now = pool->turn.wait_while(now, TURN_PATIENCE_NS);
}

void give_turn(Pool* pool) {
  pool->turn.publish(pool->turn.value.load(std::memory_order_relaxed) + 1);
}

void alone(void (*fn)(Team&, void*), void* arg) {
  Share share;
  TeamShared shared{{}, {0}, &share};
  Team team{0, 1, &shared};
  fn(team, arg);
}

}  // namespace

void pool_run(int threads, void (*fn)(Team&, void*), void* arg) {
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  if (threads > 1) {
    const int allowed = max_threads();
    if (threads > allowed) threads = allowed;
  }
  if (threads <= 1 || in_team) return alone(fn, arg);
  Pool* pool = get_pool();
  take_turn(pool);
  const int64_t start = now_ns();
  threads = pool->crew.size(threads, start);
  if (pool->workers < threads - 1) threads = grow(pool, threads - 1) + 1;
  if (threads <= 1) {
    give_turn(pool);
    return alone(fn, arg);
  }
  in_team = true;
  for (int i = 0; i < threads; ++i) pool->shares[i].word.store(Share::FRESH);
  pool->fn = fn;
  pool->arg = arg;
  const uint32_t call = pool->call.value.load(std::memory_order_relaxed) >> 8;
  pool->call.publish(((call + 1) << 8) | (uint32_t)threads);
  Team team{0, threads, &pool->team};
  fn(team, arg);
  team.barrier();
  const int64_t end = now_ns();
  pool->crew.observe(end - start, team.waited, end);
  in_team = false;
  give_turn(pool);
}

}  // namespace ft
