// Vectors longer than registers. GCC keeps one of its own in memory and goes through memory for
// every operation on it; two halves that are whole registers, or halves of halves, stay in them.
#pragma once
#include <string.h>

#include <type_traits>
#include <utility>

#define FT_INLINE inline __attribute__((always_inline))
#define FT_LAMBDA __attribute__((always_inline))

namespace ft {

template <class H>
struct Pair {
  H a, b;
  Pair() = default;
  FT_INLINE Pair(H x, H y) : a(x), b(y) {}
  template <class G>
  FT_INLINE explicit Pair(const Pair<G>& bits) : a((H)bits.a), b((H)bits.b) {}
};

template <class V>
struct Element {
  typedef std::decay_t<decltype(std::declval<V&>()[0])> type;
};
template <class H>
struct Element<Pair<H>> : Element<H> {};

// Vectors in memory, at any address
template <class V>
struct Memory {
  static FT_INLINE V load(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static FT_INLINE void store(void* p, V v) { memcpy(p, &v, sizeof v); }
};
template <class H>
struct Memory<Pair<H>> {
  static FT_INLINE Pair<H> load(const void* p) {
    return {Memory<H>::load(p), Memory<H>::load((const char*)p + sizeof(H))};
  }
  static FT_INLINE void store(void* p, Pair<H> v) {
    Memory<H>::store(p, v.a);
    Memory<H>::store((char*)p + sizeof(H), v.b);
  }
};

// The same number everywhere
template <class V>
struct Splat {
  // (V{} + x would lose the sign of -0)
  static FT_INLINE V of(typename Element<V>::type x) { return x - V{}; }
};
template <class H>
struct Splat<Pair<H>> {
  static FT_INLINE Pair<H> of(typename Element<H>::type x) {
    const H v = Splat<H>::of(x);
    return {v, v};
  }
};

template <class H>
FT_INLINE Pair<H> pair(H a, H b) {
  return {a, b};
}

#define FT_BINARY(op)                                             \
  template <class H>                                              \
  FT_INLINE Pair<H> operator op(const Pair<H>& x, const Pair<H>& y) { \
    return {x.a op y.a, x.b op y.b};                              \
  }
FT_BINARY(+)
FT_BINARY(-)
FT_BINARY(*)
FT_BINARY(/)
FT_BINARY(&)
FT_BINARY(|)
#undef FT_BINARY

#define FT_COMPARE(op)                                         \
  template <class H>                                           \
  FT_INLINE auto operator op(const Pair<H>& x, const Pair<H>& y) { \
    return pair(x.a op y.a, x.b op y.b);                       \
  }
FT_COMPARE(<)
FT_COMPARE(>)
FT_COMPARE(!=)
#undef FT_COMPARE

#define FT_SCALAR(op)                                                     \
  template <class H>                                                      \
  FT_INLINE Pair<H> operator op(const Pair<H>& x, typename Element<H>::type y) { \
    return {x.a op y, x.b op y};                                          \
  }
FT_SCALAR(+)
FT_SCALAR(*)
FT_SCALAR(&)
FT_SCALAR(|)
FT_SCALAR(<<)
FT_SCALAR(>>)
#undef FT_SCALAR

template <class H>
FT_INLINE Pair<H> operator-(const Pair<H>& x) {
  return {-x.a, -x.b};
}
template <class H>
FT_INLINE Pair<H> operator~(const Pair<H>& x) {
  return {~x.a, ~x.b};
}
template <class H>
FT_INLINE Pair<H>& operator+=(Pair<H>& x, const Pair<H>& y) {
  return x = x + y;
}

}  // namespace ft
