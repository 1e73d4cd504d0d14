// The integer products with AVX2, for product_int8.cpp and product_int4.cpp alone. No instruction adds
// up products of bytes in 32 bits, so they are added up in pairs, as words, which must not saturate.
#pragma once
#include "product.h"

#if defined(FT_AVX2)
namespace ft {

typedef __m256i Quarter;  // of a panel's 32 outputs: 8 sums of 32 bits or 16 words

// acc += x, and in this place: left to itself the compiler adds the terms up first, which takes more
// registers than there are.
FT_INLINE void add_32(Quarter& acc, Quarter x) {
  acc = _mm256_add_epi32(acc, x);
  asm("" : "+x"(acc));
}
FT_INLINE void add_16(Quarter& acc, Quarter x) {
  acc = _mm256_add_epi16(acc, x);
  asm("" : "+x"(acc));
}
FT_INLINE Quarter quarter(const uint8_t* p, int c) {
  return _mm256_loadu_si256((const Quarter*)p + c);
}

// add(sums[r][c], weights(c), the word inputs(r) everywhere) for all rows r and quarters c
template <int R, class W, class I, class A>
FT_INLINE void multiply(Quarter (&sums)[R][4], const W& weights, const I& inputs, const A& add) {
  Quarter x[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) x[r] = _mm256_set1_epi32(inputs(r));
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const Quarter w = weights(c);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) add(sums[r][c], w, x[r]);
  }
}

// Activations as words: of every four inputs the even two (0, 2) and the odd two (1, 3), as the bytes
// of a word of weights are split.
template <int R>
struct Words {
  static constexpr int64_t DEPTH = 512;  // inputs that are held
  alignas(32) int32_t even[R][DEPTH / 4], odd[R][DEPTH / 4];

  FT_INLINE void take(const int8_t* q, int64_t ldq, int64_t depth) {
    for (int r = 0; r < R; ++r)
      for (int64_t i = 0; i < depth; i += 32) {
        const Quarter bytes = _mm256_loadu_si256((const Quarter*)(q + r * ldq + i));
        const Quarter up = _mm256_slli_epi16(bytes, 8);
        _mm256_store_si256((Quarter*)(even[r] + i / 4), _mm256_srai_epi16(up, 8));
        _mm256_store_si256((Quarter*)(odd[r] + i / 4), _mm256_srai_epi16(bytes, 8));
      }
  }
};

// INT8: a weight does not fit beside others in a word with its product, so weights go on as words,
// too. acc[r] += w * q over kp inputs from `p` and `q` on; weights are unsigned.
template <int R, class A>
FT_INLINE void chain_int8(v16i (&acc)[R][2], const uint8_t* p, const int8_t* q, int64_t ldq,
                          int64_t kp, const A& ahead) {
  const Quarter low = _mm256_set1_epi16(255);
  const auto add = [](Quarter& sum, Quarter w, Quarter x) FT_LAMBDA {
    add_32(sum, _mm256_madd_epi16(w, x));
  };
  Quarter sums[R][4];
  Words<R> a;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    sums[r][0] = (Quarter)acc[r][0].a, sums[r][1] = (Quarter)acc[r][0].b;
    sums[r][2] = (Quarter)acc[r][1].a, sums[r][3] = (Quarter)acc[r][1].b;
  }
  for (int64_t from = 0; from < kp; from += a.DEPTH) {
    const int64_t depth = kp - from < a.DEPTH ? kp - from : a.DEPTH;
    a.take(q + from, ldq, depth);
    for (int64_t i = 0; i < depth / 4; ++i, p += 4 * PANEL) {
      ahead.ask(from / 4 + i);
      multiply<R>(
          sums, [&](int c) FT_LAMBDA { return _mm256_and_si256(quarter(p, c), low); },
          [&](int r) FT_LAMBDA { return a.even[r][i]; }, add);
      multiply<R>(
          sums, [&](int c) FT_LAMBDA { return _mm256_srli_epi16(quarter(p, c), 8); },
          [&](int r) FT_LAMBDA { return a.odd[r][i]; }, add);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    acc[r][0] = {(reg_i)sums[r][0], (reg_i)sums[r][1]};
    acc[r][1] = {(reg_i)sums[r][2], (reg_i)sums[r][3]};
  }
}

// INT4: a pair of products is at most 2 * 15 * 127 in size, and eight of those still fit a word: words
// are summed over 32 inputs before they are widened. acc[r] += w * q over `steps` times 8 inputs, a
// multiple of 32; weights are unsigned.
template <int R, class A>
FT_INLINE void chain_int4(v16i (&acc)[R][2], const uint8_t* p, const int8_t* q, int64_t ldq,
                          int steps, const A& ahead) {
  const Quarter low = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1);
  const auto add = [](Quarter& sum, Quarter w, Quarter x) FT_LAMBDA {
    add_16(sum, _mm256_maddubs_epi16(w, x));
  };
  for (int from = 0; from < steps; from += 4) {
    Quarter words[R][4];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < 4; ++c) words[r][c] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int i = 0; i < 4; ++i, p += 128, q += 8) {
      ahead.ask(from + i);
      multiply<R>(
          words, [&](int c) FT_LAMBDA { return _mm256_and_si256(quarter(p, c), low); },
          [&](int r) FT_LAMBDA { return four(q + r * ldq); }, add);
      multiply<R>(
          words,
          [&](int c) FT_LAMBDA {
            return _mm256_and_si256(_mm256_srli_epi16(quarter(p, c), 4), low);
          },
          [&](int r) FT_LAMBDA { return four(q + r * ldq + 4); }, add);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Quarter sums[4];
#pragma GCC unroll 16
      for (int c = 0; c < 4; ++c) sums[c] = _mm256_madd_epi16(words[r][c], one);
      acc[r][0] += v16i{(reg_i)sums[0], (reg_i)sums[1]};
      acc[r][1] += v16i{(reg_i)sums[2], (reg_i)sums[3]};
    }
  }
}

}  // namespace ft
#endif
