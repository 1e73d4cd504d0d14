// A number that threads wait on until it changes: they spin, then offer their processor to whoever
// else wants it again and again, then sleep. Plain futexes on Linux, a condition variable elsewhere.
#pragma once
#include <sched.h>
#include <stdint.h>
#include <time.h>

#include <atomic>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <pthread.h>
#endif

namespace ft {

inline void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

// How long a waiting thread keeps its processor to itself.
constexpr int64_t SELFISH_NS = 30000;

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

  // Returns the value as soon as it is not `old`; sleeps after `patience_ns`. What it took, unless
  // that was next to nothing, is added to `waited`.
  uint32_t wait_while(uint32_t old, int64_t patience_ns, int64_t* waited = nullptr) {
    uint32_t seen;
    for (int i = 0; i < 64; ++i) {
      if ((seen = value.load(std::memory_order_acquire)) != old) return seen;
      pause_cpu();
    }
    const int64_t begun = now_ns();
    seen = wait_long(old, begun, patience_ns);
    if (waited) *waited += now_ns() - begun;
    return seen;
  }

 private:
  uint32_t wait_long(uint32_t old, int64_t begun, int64_t patience_ns) {
    uint32_t seen;
    for (int64_t gone = 0; gone < patience_ns; gone = now_ns() - begun) {
      if (gone > SELFISH_NS) sched_yield();
      for (int i = 0; i < 16; ++i) {
        if ((seen = value.load(std::memory_order_acquire)) != old) return seen;
        pause_cpu();
      }
    }
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

}  // namespace ft
