// A team of threads that run one function together.
//
//   pool_run(threads, fn, arg)   the caller is rank 0; workers sleep between calls (not at once)
//                                and are shared by everybody in the process.
// Rules: one team at a time (a second caller waits for the first, so two requests never put more
// threads on the machine than there are processors), and a smaller one where others keep the
// processors busy (crew.h); `threads` <= 1, or a call from inside a running team, runs on the calling
// thread alone and waits for nobody; a child of fork() starts a team of its own. No thread is
// pinned: with one NUMA node pinning only stops the kernel from moving us away from a busy processor,
// and with several the panels would have to be placed first.
#pragma once
#include <stdint.h>

namespace ft {

struct TeamShared;

struct Team {  // team.cpp; handed to the function on every thread
  int rank, size;
  TeamShared* shared;
  int64_t waited = 0;  // ns at meetings
  // All threads meet. Everything written before is seen by everybody after.
  void barrier();
  // Dynamic work sharing: [0, total) is handed out in pieces of `grain` that begin at multiples of
  // it (the last one may be shorter); false when exhausted. Every thread has an equal share of its
  // own, which it takes from the front, piece after piece: what it reads is one stream that can be
  // fetched ahead. When that is used up it takes the last piece of whoever has most left.
  // One such loop (any number of calls, same total and grain) between two barriers.
  bool next(int64_t total, int64_t grain, int64_t* begin, int64_t* end);
};

constexpr int MAX_THREADS = 255;

// The number of threads that take part is at most min(threads, max_threads(), MAX_THREADS).
void pool_run(int threads, void (*fn)(Team&, void*), void* arg);

// -- processors.cpp
int max_threads();      // processors this process may run on
int default_threads();  // one per allowed core (not per hyper-thread), within the cgroup's quota
int threads();          // what `threads = 0` stands for in the C ABI: ft_set_threads, else default
void set_threads(int n);

}  // namespace ft
