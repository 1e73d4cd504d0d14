// What the threads of a team share: where they meet, and what is left of the running loop.
#pragma once
#include <stdint.h>

#include <atomic>

#include "gate.h"

namespace ft {

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

}  // namespace ft
