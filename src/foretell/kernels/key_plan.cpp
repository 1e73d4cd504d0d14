// Which keys each row of a forward reads: a range of cache rows, then the rest of its branch.
#include <algorithm>

#include "forward.h"

namespace ft {
namespace {

// A row that sees everything it may see in its transaction: for chains without work per key.
bool whole_chain(const Segment& s, int64_t row, int64_t position, int64_t window) {
  if (s.ancestors) return false;
  if (!window) return true;
  const int64_t* p = s.positions + s.committed;
  for (int64_t j = 0; j <= s.used - s.committed + row; ++j)
    if (position - p[j] >= window) return false;
  return true;
}

}  // namespace

void KeyPlan::make(const Model& m, const Call& c) {
  keys.assign(m.windows.size() * (size_t)c.rows, Keys{});
  lists.clear();
  most = 0;
  for (int64_t b = 0; b < c.segment_count; ++b) {
    const Segment& s = c.segments[b];
    std::copy(c.positions + s.begin, c.positions + s.begin + s.rows, s.positions + s.used);
  }
  for (size_t w = 0; w < m.windows.size(); ++w) {
    const int64_t window = m.windows[w];
    for (int64_t b = 0; b < c.segment_count; ++b) {
      const Segment& s = c.segments[b];
      const int64_t earlier = s.used - s.committed;
      for (int64_t i = 0; i < s.rows; ++i) {
        const int64_t position = c.positions[s.begin + i];
        Keys& k = keys[w * (size_t)c.rows + (size_t)(s.begin + i)];
        if (window) {  // committed positions increase
          const int64_t* begin = s.positions;
          k.low = std::upper_bound(begin, begin + s.committed, position - window) - begin;
        }
        k.mid = s.committed;
        const size_t before = lists.size();
        if (whole_chain(s, i, position, window)) {
          k.mid = s.used + i + 1;
        } else {
          const uint8_t* mine = s.ancestors ? s.ancestors + i * s.ancestor_stride : nullptr;
          const int64_t end = mine ? earlier + s.rows : earlier + i + 1;
          for (int64_t j = 0; j < end; ++j) {
            const int64_t row = s.committed + j;
            if ((mine && !mine[j]) || (window && position - s.positions[row] >= window)) continue;
            if (k.low == k.mid) k.low = k.mid = row;
            if (k.mid == row && lists.size() == before)
              ++k.mid;
            else
              lists.push_back(row);
          }
        }
        k.count = (int64_t)(lists.size() - before);
        k.list = (const int64_t*)before;  // an index until the vector has its final place
        most = std::max(most, k.total());
      }
    }
  }
  for (Keys& k : keys) k.list = lists.data() + (size_t)k.list;
}

}  // namespace ft
