// Sampling with keyed noise: which token has the largest p / E, for p = softmax(logits / T) and the
// exponential noise E of core/rng.py, without a softmax and without most of the noise.
//
// E = -log u >= 1 - u, so a token beats a score s only if exp((l - m) / T) >= s (1 - u), m being the
// largest logit. That is tested in binary logarithms, of which the bits of a float are a bound; the
// few tokens that pass are scored in double precision. The caller's arithmetic rounds p and E to
// float32: where the best two are so close that this could decide, the answer is left to the caller.
//
// Plain loops over blocks: every compiler vectorises them for every instruction set.
#include "noise.h"

#include <math.h>
#include <string.h>

namespace {

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;
constexpr uint64_t M1 = 0xBF58476D1CE4E5B9u, M2 = 0x94D049BB133111EBu;
constexpr int64_t BLOCK = 64;
constexpr double SLACK = 0.01;  // in log2 s; more than rounding, here and at the caller's, amounts to

inline uint64_t scrambled(uint64_t z) {  // splitmix64's finaliser; its last step changes the lower
  z = (z ^ (z >> 30)) * M1;              // half only
  return (z ^ (z >> 27)) * M2;
}

inline double noise(uint64_t key, int64_t token) {  // E
  uint64_t z = scrambled(key + GOLDEN * (uint64_t)(token + 1));
  z ^= z >> 31;
  return -log(((double)(z >> 12) + 0.5) * 0x1p-52);
}

inline int32_t bits_of(float x) {
  int32_t b;
  memcpy(&b, &x, 4);
  return b;
}
inline int32_t ordered(int32_t b) { return b ^ ((b >> 31) & 0x7fffffff); }  // as the floats are

struct Best {
  const float* logits;
  double top, rate;
  uint64_t key;
  double score = 0, second = 0, size = 0;  // size: of the quotients, which are rounded
  int64_t token = -1;

  void see(int64_t at) {
    const double mine = exp((logits[at] - top) * rate) / noise(key, at);
    size = fmax(size, fabs(logits[at] * rate));
    if (mine > score) {
      second = score;
      score = mine;
      token = at;
    } else if (mine > second) {
      second = mine;
    }
  }
  float base() const { return (float)(log2(score) - 31 - 127 - SLACK); }
};

}  // namespace

int64_t ft_race(const float* logits, int64_t vocab, double temperature, uint64_t key) {
  const float infinity = __builtin_inff();
  int32_t high = ordered(bits_of(-infinity)), low = high;
  for (int64_t i = 0; i < vocab; ++i) {
    const int32_t k = ordered(bits_of(logits[i]));
    high = k > high ? k : high;
    low = k < low ? k : low;
  }
  const int32_t b = ordered(high);
  float top;
  memcpy(&top, &b, 4);
  if (low < ordered(bits_of(-infinity)) || !(fabsf(top) < 1e30f)) return -1;

  Best best{logits, top, 1 / temperature, key};
  int64_t first = 0;
  while (logits[first] != top) ++first;
  best.see(first);

  // (l - top) / T * log2 e >= log2 s + log2(1 - u), where log2(1 - u) is at least its float's bits
  // / 2^23 - 127, and at most 0.09 more.
  const float slope = (float)(1.4426950408889634 / temperature);
  float base = best.base();
  uint64_t z = key + GOLDEN;
  for (int64_t from = 0; from < vocab; from += BLOCK, z += GOLDEN * BLOCK) {
    const float* l = logits + from;
    float part[BLOCK];
    if (vocab - from < BLOCK) {
      for (int64_t i = 0; i < BLOCK; ++i) part[i] = from + i < vocab ? l[i] : -infinity;
      l = part;
    }
    uint32_t upper[BLOCK];
    for (int64_t i = 0; i < BLOCK; ++i) upper[i] = (uint32_t)(scrambled(z + GOLDEN * i) >> 32);
    int32_t passed[BLOCK], any = 0;
    for (int64_t i = 0; i < BLOCK; ++i) {
      // 31 bits of 1 - u, and less than what the lower ones are at least
      const float rest = (float)(int32_t)(~upper[i] >> 1) + 0x1p-23f;
      passed[i] = (l[i] - top) * slope >= (float)bits_of(rest) * 0x1p-23f + base;
      any |= passed[i];
    }
    if (!any) continue;
    for (int64_t i = 0; i < BLOCK; ++i)
      if (passed[i] && from + i != first) best.see(from + i);
    base = best.base();
  }
  const double blur = 1e-4 + 2e-6 * best.size;
  return blur < SLACK / 4 && best.second * (1 + blur) < best.score ? best.token : -1;
}
