// See pool.h. Plain pthreads and futexes: no C++ runtime state, nothing to destroy at exit.
#include "pool.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <atomic>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#endif

namespace ft {
namespace {

constexpr int MAX_THREADS = 255;
// How long a thread spins before it sleeps. In a barrier the others are on their way, and waking a
// sleeper costs about as much as this; between calls the next one may be a sampled token away.
// Longer spins do not help a machine that is ours and hurt one that is shared.
constexpr int64_t BARRIER_SPIN_NS = 50000;
constexpr int64_t IDLE_SPIN_NS = 100000;
constexpr int64_t TURN_SPIN_NS = 5000;  // whoever has the team needs the processors

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// A number that threads wait on until it changes.
struct Gate {
  std::atomic<uint32_t> value{0};
  std::atomic<uint32_t> sleepers{0};
#if !defined(__linux__)
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
#endif

  void publish(uint32_t next) {
    // Sequentially consistent on both sides: either we see the sleeper, or it sees the new value.
#if defined(__linux__)
    value.store(next, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst))
      syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#else
    pthread_mutex_lock(&mutex);
    value.store(next, std::memory_order_seq_cst);
    pthread_cond_broadcast(&cond);
    pthread_mutex_unlock(&mutex);
#endif
  }

  uint32_t wait_while(uint32_t old, int64_t spin_ns) {
    uint32_t seen;
    for (int i = 0; i < 64; ++i) {
      if ((seen = value.load(std::memory_order_acquire)) != old) return seen;
      pause_cpu();
    }
    const int64_t end = now_ns() + spin_ns;
    do {
      for (int i = 0; i < 16; ++i) {
        if ((seen = value.load(std::memory_order_acquire)) != old) return seen;
        pause_cpu();
      }
    } while (now_ns() < end);
#if defined(__linux__)
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    while ((seen = value.load(std::memory_order_seq_cst)) == old)
      syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
    sleepers.fetch_sub(1, std::memory_order_seq_cst);
#else
    pthread_mutex_lock(&mutex);
    while ((seen = value.load(std::memory_order_seq_cst)) == old) pthread_cond_wait(&cond, &mutex);
    pthread_mutex_unlock(&mutex);
#endif
    return seen;
  }
};

}  // namespace

// What is left of one thread's share of the running loop: first piece in the upper 32 bits, end in
// the lower; FRESH until somebody looks at it.
struct alignas(64) Share {
  std::atomic<uint64_t> word{FRESH};
  static constexpr uint64_t FRESH = ~0ull;
};

struct TeamShared {
  alignas(64) Gate phase;
  alignas(64) std::atomic<int> arrived{0};
  Share* shares;
};

namespace {

struct Pool {
  // One team at a time, in order of arrival: a mutex would let a caller in a tight loop take it
  // again and again while the one it has just woken is still on its way.
  std::atomic<uint32_t> tickets{0};
  alignas(64) Gate turn;
  int workers = 0;
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
std::atomic<int> wanted_threads{0};
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
    seen = pool->call.wait_while(seen, IDLE_SPIN_NS);
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
  while (now != mine) now = pool->turn.wait_while(now, TURN_SPIN_NS);
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

#if defined(__linux__)
// First number in a file such as ".../topology/core_id", or -1.
long read_number(const char* path) {
  FILE* f = fopen(path, "r");
  if (!f) return -1;
  long v = -1;
  if (fscanf(f, "%ld", &v) != 1) v = -1;
  fclose(f);
  return v;
}

// Processors the cgroup's quota pays for, rounded up; a large number without a quota.
int quota() {
  FILE* f = fopen("/sys/fs/cgroup/cpu.max", "r");
  long limit = -1, period = 0;
  if (f) {
    if (fscanf(f, "%ld %ld", &limit, &period) != 2) limit = -1;
    fclose(f);
  } else {
    limit = read_number("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
    period = read_number("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  }
  if (limit <= 0 || period <= 0) return 1 << 20;
  return (int)((limit + period - 1) / period);
}
#endif

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
    s->phase.wait_while(phase, BARRIER_SPIN_NS);
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

void pool_run(int threads, void (*fn)(Team&, void*), void* arg) {
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  if (threads > 1) {
    const int allowed = max_threads();
    if (threads > allowed) threads = allowed;
  }
  if (threads <= 1 || in_team) return alone(fn, arg);
  Pool* pool = get_pool();
  take_turn(pool);
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
  in_team = false;
  give_turn(pool);
}

int max_threads() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
  const long online = sysconf(_SC_NPROCESSORS_ONLN);
  return online > 0 ? (int)online : 1;
}

int default_threads() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set)) return 1;
  // A core counts once: its hyper-threads share the units that the products keep busy.
  int cores = 0;
  long seen[CPU_SETSIZE];
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &set)) continue;
    char path[128];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/core_id", cpu);
    const long core = read_number(path);
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/physical_package_id", cpu);
    const long package = read_number(path);
    const long key = core < 0 ? -1 - cpu : (package + 1) * 1000000 + core;
    bool known = false;
    for (int i = 0; i < cores; ++i) known |= seen[i] == key;
    if (!known) seen[cores++] = key;
  }
  const int paid = quota();
  if (cores > paid) cores = paid;
  if (cores > MAX_THREADS) cores = MAX_THREADS;
  return cores > 0 ? cores : 1;
#else
  return max_threads();
#endif
}

int threads() {
  const int wanted = wanted_threads.load();
  if (wanted > 0) return wanted;
  static const int automatic = default_threads();
  return automatic;
}

void set_threads(int n) { wanted_threads.store(n > 0 ? n : 0); }

}  // namespace ft
