// Vectors of 16 floats / 32-bit integers that mean the same on every instruction set: GCC and clang
// split them where registers are shorter. Intrinsics only for what the compiler cannot say.
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

#define FT_INLINE inline __attribute__((always_inline))

namespace ft {

constexpr int LANES = 16;
typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));
typedef int8_t b64 __attribute__((vector_size(64)));
typedef uint8_t ub64 __attribute__((vector_size(64)));

// Unaligned loads and stores
FT_INLINE v16 load(const float* p) {
  v16 v;
  memcpy(&v, p, 64);
  return v;
}
FT_INLINE void store(float* p, v16 v) { memcpy(p, &v, 64); }
FT_INLINE v16u load_u(const void* p) {
  v16u v;
  memcpy(&v, p, 64);
  return v;
}
FT_INLINE v16 splat(float x) {
  return v16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}
FT_INLINE v16i splat_i(int32_t x) {
  return v16i{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}
FT_INLINE v16 as_float(v16i v) { return (v16)v; }
FT_INLINE v16 as_float(v16u v) { return (v16)v; }
FT_INLINE v16i as_int(v16 v) { return (v16i)v; }
FT_INLINE v16 to_float(v16i v) { return __builtin_convertvector(v, v16); }
FT_INLINE v16i to_int(v16 v) { return __builtin_convertvector(v, v16i); }  // towards zero

// a * b + c. One rounding with AVX512, AVX2 and NEON, two in the portable x86 build.
FT_INLINE v16 fma(v16 a, v16 b, v16 c) {
#if defined(FT_AVX512)
  return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(FT_AVX2)
  union U {
    v16 v;
    __m256 h[2];
  } x{a}, y{b}, z{c};
  z.h[0] = _mm256_fmadd_ps(x.h[0], y.h[0], z.h[0]);
  z.h[1] = _mm256_fmadd_ps(x.h[1], y.h[1], z.h[1]);
  return z.v;
#elif defined(__aarch64__)
  union U {
    v16 v;
    float32x4_t h[4];
  } x{a}, y{b}, z{c};
  for (int i = 0; i < 4; ++i) z.h[i] = vfmaq_f32(z.h[i], x.h[i], y.h[i]);
  return z.v;
#else
  return a * b + c;
#endif
}

// a * b + c with one rounding everywhere (slow in the portable x86 build: a call per element)
FT_INLINE v16 fma_exact(v16 a, v16 b, v16 c) {
#if defined(FT_PORTABLE) && !defined(__aarch64__)
  for (int i = 0; i < LANES; ++i) c[i] = fmaf(a[i], b[i], c[i]);
  return c;
#else
  return fma(a, b, c);
#endif
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
  float a[16];
  memcpy(a, &v, 64);
  for (int w = 8; w; w >>= 1)
    for (int i = 0; i < w; ++i) a[i] += a[i + w];
  return a[0];
}
FT_INLINE float maximum(v16 v) {
  float a[16];
  memcpy(a, &v, 64);
  for (int w = 8; w; w >>= 1)
    for (int i = 0; i < w; ++i) a[i] = a[i] > a[i + w] ? a[i] : a[i + w];
  return a[0];
}

// 16 bfloat16 <-> 16 float (to bfloat16: nearest, halves to even; NaN stays NaN)
FT_INLINE v16 load_bf16(const uint16_t* p) {
#if defined(FT_AVX512)  // the compiler widens in halves
  return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  typedef uint16_t h16 __attribute__((vector_size(32)));
  h16 h;
  memcpy(&h, p, 32);
  return (v16)(__builtin_convertvector(h, v16u) << 16);
#endif
}
FT_INLINE void store_bf16(uint16_t* p, v16 v) {
  typedef uint16_t h16 __attribute__((vector_size(32)));
  v16u b = (v16u)v;
  v16u r = (b + (((b >> 16) & 1) + 0x7fff)) >> 16;
  v16u nan = (v16u)(v != v);
  r = (nan & ((b >> 16) | 64)) | (~nan & r);
  h16 h = __builtin_convertvector(r, h16);
  memcpy(p, &h, 32);
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
  union U {
    v16 v;
    __m256 h[2];
  } z;
  z.h[0] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  z.h[1] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
  return z.v;
#else
  v16 v;
  for (int i = 0; i < LANES; ++i) v[i] = float_of_half(p[i]);
  return v;
#endif
}

FT_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }  // into L2
FT_INLINE void prefetch_l1(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace ft
