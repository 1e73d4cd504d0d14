// Transcendental functions and activations on vectors of 16 floats. The polynomials are our own
// minimax fits; every lane is a function of its own value alone. Sums are explicit `fma`s, so
// that no compiler decides which of them are fused.
#pragma once
#include "simd.h"

namespace ft {

// e^x within 1.2 ulp for -87 <= x <= 88; 0 below (and for -infinity), e^88 above; NaN stays NaN.
FT_INLINE v16 exp(v16 x) {
  const v16i low = x < splat(-87.0f);
  const v16 y = select(x > splat(88.0f), splat(88.0f), x);
  const v16 n = round_even(y * splat(1.44269504088896341f));
  v16 r = fma(n, splat(-0.693145751953125f), y);  // ln 2 in two parts, the first with 15 bits
  r = fma(n, splat(-1.428606765330187e-6f), r);
  v16 p = fma(splat(0.0013950597494840622f), r, splat(0.008368954062461853f));
  p = fma(p, r, splat(0.04166620597243309f));
  p = fma(p, r, splat(0.166665181517601f));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r * r, r) + splat(1.0f);
  // n is -126..127: 2^n is a normal number (lanes that are dropped may hold anything)
  const v16 power = as_float((to_int(select(low, splat(0.0f), n)) + 127) << 23);
  return select(low, splat(0.0f), p * power);
}

FT_INLINE v16 sigmoid(v16 x) { return splat(1.0f) / (splat(1.0f) + exp(-max(x, splat(-87.0f)))); }

FT_INLINE v16 tanh(v16 x) {
  const v16 a = abs(x), s = x * x;
  v16 p = fma(splat(-0.006282450631260872f), s, splat(0.02107774093747139f));
  p = fma(p, s, splat(-0.05385385453701019f));
  p = fma(p, s, splat(0.13332602381706238f));
  p = fma(p, s, splat(-0.33333319425582886f));
  const v16 near = fma(x * s, p, x);
  const v16 e = exp(splat(-2.0f) * a);
  const v16 far = (splat(1.0f) - e) / (splat(1.0f) + e);
  const v16i sign = as_int(x) & (int32_t)0x80000000;
  return select(a < splat(0.55f), near, as_float(as_int(far) | sign));
}

FT_INLINE v16 erf(v16 x) {
  const v16 a = abs(x), s = x * x;
  v16 p = fma(splat(7.889113476267084e-05f), s, splat(-0.000802083988673985f));
  p = fma(p, s, splat(0.005189535208046436f));
  p = fma(p, s, splat(-0.026854444295167923f));
  p = fma(p, s, splat(0.11283600330352783f));
  p = fma(p, s, splat(-0.3761262595653534f));
  p = fma(p, s, splat(1.1283791065216064f));
  const v16 near = x * p;
  const v16 t = min(a, splat(4.2f));  // from there on 1 - erf is below half an ulp
  v16 q = fma(splat(2.513655772418133e-07f), t, splat(-2.531535028538201e-05f));
  q = fma(q, t, splat(0.0004637912497855723f));
  q = fma(q, t, splat(-0.004282393492758274f));
  q = fma(q, t, splat(0.02537357807159424f));
  q = fma(q, t, splat(-0.10863902419805527f));
  q = fma(q, t, splat(-0.6330395936965942f));
  q = fma(q, t, splat(-1.129661202430725f));
  q = fma(q, t, splat(0.00020436161139514297f));
  const v16 far = splat(1.0f) - exp(q);
  const v16i sign = as_int(x) & (int32_t)0x80000000;
  return select(a < splat(1.0f), near, as_float(as_int(far) | sign));
}

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2, GELU_QUICK = 3, RELU = 4 };

template <int KIND>
FT_INLINE v16 activate(v16 x) {
  if (KIND == SILU) return x * sigmoid(x);
  if (KIND == GELU)
    return x * splat(0.5f) * (splat(1.0f) + erf(x * splat(0.70710678118654752f)));
  if (KIND == GELU_TANH) {
    const v16 inner = x * fma(x * x, splat(0.044715f * 0.79788456080286536f),
                              splat(0.79788456080286536f));
    return x * splat(0.5f) * (splat(1.0f) + tanh(inner));
  }
  if (KIND == GELU_QUICK) return x * sigmoid(x * splat(1.702f));
  return max(x, splat(0.0f));
}

}  // namespace ft
