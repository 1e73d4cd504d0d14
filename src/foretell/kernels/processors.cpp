// How many threads are worth having here.
#include <stdio.h>
#include <unistd.h>

#include <atomic>

#include "pool.h"

#if defined(__linux__)
#include <sched.h>
#endif

namespace ft {
namespace {

std::atomic<int> wanted_threads{0};

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
