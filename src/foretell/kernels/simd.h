// Vectors of 16 floats / 32-bit integers that mean the same on every instruction set: one register, or
// pairs of them (wide.h). Intrinsics only for what the compiler cannot say.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "wide.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && \
    defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#define FT_AVX512 1
#define FT_ISA_NAME "avx512"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FT_AVX2 1
#define FT_ISA_NAME "avx2"
#else
#define FT_PORTABLE 1
#define FT_ISA_NAME "portable"
#endif

namespace ft {

constexpr int LANES = 16;
#if defined(FT_AVX512)
constexpr int REGISTER = 64;  // bytes
#elif defined(FT_AVX2)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
typedef float reg __attribute__((vector_size(REGISTER)));
typedef int32_t reg_i __attribute__((vector_size(REGISTER)));
typedef uint32_t reg_u __attribute__((vector_size(REGISTER)));
template <class R>
using sixteen = std::conditional_t<REGISTER == 64, R,
                                   std::conditional_t<REGISTER == 32, Pair<R>, Pair<Pair<R>>>>;
typedef sixteen<reg> v16;
typedef sixteen<reg_i> v16i;
typedef sixteen<reg_u> v16u;

// Unaligned loads and stores
FT_INLINE v16 load(const float* p) { return Memory<v16>::load(p); }
FT_INLINE void store(float* p, v16 v) { Memory<v16>::store(p, v); }
FT_INLINE v16i load_i(const int32_t* p) { return Memory<v16i>::load(p); }
FT_INLINE void store_i(int32_t* p, v16i v) { Memory<v16i>::store(p, v); }
FT_INLINE v16u load_u(const void* p) { return Memory<v16u>::load(p); }
FT_INLINE v16 splat(float x) { return Splat<v16>::of(x); }
FT_INLINE v16i splat_i(int32_t x) { return Splat<v16i>::of(x); }
// The first `n` lanes, then `rest`
FT_INLINE v16 keep(v16 v, int64_t n, float rest) {
  float part[LANES];
  store(part, v);
  for (int64_t i = n; i < LANES; ++i) part[i] = rest;
  return load(part);
}
FT_INLINE v16 as_float(v16i v) { return (v16)v; }
FT_INLINE v16 as_float(v16u v) { return (v16)v; }
FT_INLINE v16i as_int(v16 v) { return (v16i)v; }

// Of one register; those of sixteen numbers follow.
FT_INLINE reg to_float(reg_i v) { return __builtin_convertvector(v, reg); }
FT_INLINE reg_i to_int(reg v) { return __builtin_convertvector(v, reg_i); }  // towards zero

// a * b + c. One rounding with AVX512, AVX2 and NEON, two in the portable x86 build.
FT_INLINE reg fma(reg a, reg b, reg c) {
#if defined(FT_AVX512)
  return (reg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FT_AVX2)
  return (reg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (reg)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// a * b + c with one rounding everywhere (slow in the portable x86 build: a call per element)
FT_INLINE reg fma_exact(reg a, reg b, reg c) {
#if defined(FT_PORTABLE) && !defined(__aarch64__)
  for (int i = 0; i < REGISTER / 4; ++i) c[i] = fmaf(a[i], b[i], c[i]);
  return c;
#else
  return fma(a, b, c);
#endif
}

template <class H>
FT_INLINE auto to_float(const Pair<H>& v) {
  return pair(to_float(v.a), to_float(v.b));
}
template <class H>
FT_INLINE auto to_int(const Pair<H>& v) {
  return pair(to_int(v.a), to_int(v.b));
}
template <class H>
FT_INLINE Pair<H> fma(const Pair<H>& a, const Pair<H>& b, const Pair<H>& c) {
  return {fma(a.a, b.a, c.a), fma(a.b, b.b, c.b)};
}
template <class H>
FT_INLINE Pair<H> fma_exact(const Pair<H>& a, const Pair<H>& b, const Pair<H>& c) {
  return {fma_exact(a.a, b.a, c.a), fma_exact(a.b, b.b, c.b)};
}

FT_INLINE v16 select(v16i mask, v16 yes, v16 no) {  // mask: 0 or -1 per lane, as comparisons give
  return (v16)((mask & (v16i)yes) | (~mask & (v16i)no));
}
FT_INLINE v16 max(v16 a, v16 b) { return select(a > b, a, b); }
FT_INLINE v16 min(v16 a, v16 b) { return select(a < b, a, b); }
FT_INLINE v16 abs(v16 a) { return (v16)((v16i)a & splat_i(0x7fffffff)); }
// Nearest integer, halves to even, for |x| < 2^22 (needs -fno-fast-math, which is the default)
FT_INLINE v16 round_even(v16 x) {
  const v16 magic = splat(12582912.0f);
  return (x + magic) - magic;
}

// Horizontal sums and maxima, always as a tree over lanes: (0,8), (0,4), (0,2), (0,1).
FT_INLINE float sum(v16 v) {
  float a[LANES];
  store(a, v);
  for (int w = 8; w; w >>= 1)
    for (int i = 0; i < w; ++i) a[i] += a[i + w];
  return a[0];
}
FT_INLINE float maximum(v16 v) {
  float a[LANES];
  store(a, v);
  for (int w = 8; w; w >>= 1)
    for (int i = 0; i < w; ++i) a[i] = a[i] > a[i + w] ? a[i] : a[i + w];
  return a[0];
}

// 16 bfloat16 <-> 16 float (to bfloat16: nearest, halves to even; NaN stays NaN)
FT_INLINE v16 load_bf16(const uint16_t* p) {
#if defined(FT_AVX512)
  return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(FT_AVX2)
  const __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  const __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1));
  return {(reg)_mm256_slli_epi32(a, 16), (reg)_mm256_slli_epi32(b, 16)};
#else
  uint32_t wide[LANES];
  for (int i = 0; i < LANES; ++i) wide[i] = (uint32_t)p[i] << 16;
  return as_float(load_u(wide));
#endif
}
FT_INLINE void store_bf16(uint16_t* p, v16 v) {
  const v16u b = (v16u)v, nan = (v16u)(v != v);
  const v16u r = (b + (((b >> 16) & 1) + 0x7fff)) >> 16;
  uint32_t wide[LANES];
  Memory<v16u>::store(wide, (nan & ((b >> 16) | 64)) | (~nan & r));
  for (int i = 0; i < LANES; ++i) p[i] = (uint16_t)wide[i];
}
FT_INLINE uint16_t bf16_of(float x) {
  uint32_t b;
  memcpy(&b, &x, 4);
  if (x != x) return (uint16_t)((b >> 16) | 64);
  return (uint16_t)((b + (((b >> 16) & 1) + 0x7fff)) >> 16);
}
FT_INLINE float float_of_bf16(uint16_t h) {
  uint32_t b = (uint32_t)h << 16;
  float x;
  memcpy(&x, &b, 4);
  return x;
}

// float16 (IEEE half) by integer arithmetic: used while packing and in the portable kernels
FT_INLINE float float_of_half(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  uint32_t b;
  float x;
  if (exponent == 31) {
    b = sign | 0x7f800000 | (fraction << 13);
  } else if (exponent) {
    b = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else {
    x = (float)fraction * 5.9604644775390625e-8f;  // 2^-24
    return sign ? -x : x;
  }
  memcpy(&x, &b, 4);
  return x;
}
FT_INLINE v16 load_half(const uint16_t* p) {
#if defined(FT_AVX512)
  return (v16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(FT_AVX2)
  return {(reg)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
          (reg)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
#else
  float wide[LANES];
  for (int i = 0; i < LANES; ++i) wide[i] = float_of_half(p[i]);
  return load(wide);
#endif
}

// Integers within -127..127 as bytes
FT_INLINE void store_bytes(int8_t* p, v16i v) {
#if defined(FT_AVX512)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(FT_AVX2)
  const __m256i words = _mm256_packs_epi32((__m256i)v.a, (__m256i)v.b);  // in halves of each
  const __m256i sorted = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i low = _mm256_castsi256_si128(sorted), high = _mm256_extracti128_si256(sorted, 1);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(low, high));
#else
  int32_t wide[LANES];
  store_i(wide, v);
  for (int i = 0; i < LANES; ++i) p[i] = (int8_t)wide[i];
#endif
}

FT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into L2
FT_INLINE void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace ft
