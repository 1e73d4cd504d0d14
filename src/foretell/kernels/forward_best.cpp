// The column of the largest logit of each row, as numpy's argmax has it: the lowest among equals,
// and the first NaN where there is one.
//
// Every thread keeps the best of what it has made, panel by panel while that lies in L1; panels come
// in any order. A panel rarely holds anything better than all before it, which is one comparison
// for all of it.
#include <algorithm>

#include "forward_run.h"
#include "simd.h"

namespace ft {
namespace {

bool beats(float x, int64_t column, const Best& b) {
  const bool nan = x != x, held = b.value != b.value;
  if (nan || held) return nan && (!held || column < b.column);
  return x > b.value || (x == b.value && column < b.column);
}

// Whether any of PANEL numbers is not below `bound`.
FT_INLINE bool reaches(const float* x, float bound) {
#if defined(FT_AVX512)
  const __m512 b = _mm512_set1_ps(bound);
  return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), b, _CMP_NLT_UQ) |
         _mm512_cmp_ps_mask(_mm512_loadu_ps(x + 16), b, _CMP_NLT_UQ);
#elif defined(FT_AVX2)
  const __m256 b = _mm256_set1_ps(bound);
  __m256 hit = _mm256_cmp_ps(_mm256_loadu_ps(x), b, _CMP_NLT_UQ);
  for (int i = 8; i < PANEL; i += 8)
    hit = _mm256_or_ps(hit, _mm256_cmp_ps(_mm256_loadu_ps(x + i), b, _CMP_NLT_UQ));
  return _mm256_movemask_ps(hit);
#else
  int hit = 0;
  for (int i = 0; i < PANEL; ++i) hit |= !(x[i] < bound);
  return hit;
#endif
}

}  // namespace

void Run::clear_best(Best* mine) const {
  std::fill(mine, mine + c.logit_count, Best{-__builtin_inff(), INT64_MAX});
}

void Run::note_best(Best* mine, int64_t panel) const {
  const int64_t first = panel * PANEL, columns = std::min<int64_t>(PANEL, m.vocab - first);
  for (int64_t i = 0; i < c.logit_count; ++i) {
    const float* x = c.logits + i * m.vocab + first;
    if (columns == PANEL && !reaches(x, mine[i].value)) continue;
    for (int64_t j = 0; j < columns; ++j)
      if (beats(x[j], first + j, mine[i])) mine[i] = Best{x[j], first + j};
  }
}

void Run::tell_best(const Team& team) const {
  for (int64_t i = 0; i < c.logit_count; ++i) {
    Best found = best[0][i];
    for (int t = 1; t < team.size; ++t)
      if (beats(best[t][i].value, best[t][i].column, found)) found = best[t][i];
    c.best[i] = found.column;
  }
}

}  // namespace ft
