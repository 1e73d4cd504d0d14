// The C ABI of products, packing and the pool. `threads` = 0 means ft_set_threads or the default.
#include <stdlib.h>

#include <atomic>

#include "matrix.h"
#include "pack.h"
#include "pool.h"
#include "simd.h"

#define FT_API extern "C" __attribute__((visibility("default")))

using namespace ft;

namespace {

int team_size(int wanted) { return wanted > 0 ? wanted : threads(); }

// pool_run with a lambda
template <class F>
void together(int count, const F& body) {
  pool_run(
      count, [](Team& team, void* arg) { (*(const F*)arg)(team); }, (void*)&body);
}

struct Chain {  // one product of ft_run_products
  int32_t format, group;
  int64_t n, k;
  const void* data;
};

}  // namespace

FT_API const char* ft_isa() { return FT_ISA_NAME; }
FT_API int ft_threads() { return threads(); }
FT_API int ft_max_threads() { return max_threads(); }
FT_API void ft_set_threads(int n) { set_threads(n); }

FT_API int64_t ft_packed_bytes(int format, int64_t n, int64_t k, int group) {
  return packed_bytes(format, n, k, group);
}
FT_API int64_t ft_padded_inputs(int format, int64_t k) { return padded_inputs(format, k); }

// Packs panels [begin, end) of a matrix; `out` is where the whole matrix starts.
FT_API int ft_pack_panels(int format, int64_t n, int64_t k, int group, int dtype, const void* data,
                          const float* scale, const int64_t* index, int64_t first, int64_t begin,
                          int64_t end, void* out, int threads) {
  if (packed_bytes(format, n, k, group) < 0) return PACK_FORMAT;
  const Matrix m = make_matrix(format, n, k, group, out, nullptr);
  const Source source{dtype, data, scale, index, first};
  std::atomic<int> result{PACK_OK};
  together(team_size(threads), [&](Team& team) {
    int64_t from, to;
    while (team.next(end - begin, 1, &from, &to)) {
      const int64_t panel = begin + from;
      const int r = pack_panel(m, source, panel, (uint8_t*)out + panel * m.panel_bytes);
      if (r != PACK_OK) result.store(r);
    }
  });
  return result.load();
}

// x [n, k] for float formats; q [n, k] and scale ([n] or [n, k / group]) for the others
FT_API int ft_unpack(int format, int64_t n, int64_t k, int group, const void* data, float* x,
                     int8_t* q, float* scale, int threads) {
  if (packed_bytes(format, n, k, group) < 0) return PACK_FORMAT;
  const Matrix m = make_matrix(format, n, k, group, data, nullptr);
  const int64_t groups = format == INT4 ? k / group : 1;
  together(team_size(threads), [&](Team& team) {
    int64_t from, to;
    while (team.next(n, PANEL, &from, &to))
      for (int64_t r = from; r < to; ++r)
        unpack_row(m, r, x ? x + r * k : nullptr, q ? q + r * k : nullptr,
                   scale ? scale + r * groups : nullptr);
  });
  return PACK_OK;
}

// x [rows, ldx] -> q [rows, kp], scale [rows], sums [rows, kp / 32]
FT_API void ft_quantise_rows(const float* x, int64_t ldx, int64_t rows, int64_t k, int64_t kp,
                             int8_t* q, float* scale, int32_t* sums, int threads) {
  together(rows > 16 ? team_size(threads) : 1, [&](Team& team) {
    int64_t from, to;
    while (team.next(rows, 8, &from, &to))
      for (int64_t r = from; r < to; ++r)
        quantise_row(x + r * ldx, k, kp, q + r * kp, scale + r, sums + r * (kp / BLOCK));
  });
}

// out = y, or out += alpha * y with add; y = x W^T + bias over panels [begin, end). Float formats
// read x [rows, ldx]; the others q [rows, kp], scale and sums as ft_quantise_rows writes them.
FT_API void ft_product(int format, int64_t n, int64_t k, int group, const void* data,
                       const float* bias, int64_t rows, const float* x, int64_t ldx,
                       const int8_t* q, const float* scale, const int32_t* sums, int64_t begin,
                       int64_t end, float* out, int64_t ldo, int add, float alpha, int threads) {
  const Matrix m = make_matrix(format, n, k, group, data, bias);
  const Rows in{rows, x, ldx, q, m.kp, scale, sums, m.kp / BLOCK};
  together(team_size(threads), [&](Team& team) {
    int64_t from, to;
    while (team.next(end - begin, 1, &from, &to)) {
      if (add)
        product_add(m, in, begin + from, begin + to, out + from * PANEL, ldo, alpha);
      else
        product(m, in, begin + from, begin + to, out + from * PANEL, ldo);
    }
  });
}

// `count` products one behind the other in one team, all on the same rows (long enough for the
// widest matrix): what a forward spends in products. grain 0: every thread takes one half.
FT_API void ft_run_products(const void* chain, int64_t count, int64_t rows, const float* x,
                            int64_t ldx, const int8_t* q, int64_t ldq, const float* scale,
                            const int32_t* sums, float* out, int64_t grain, int threads) {
  const Chain* all = (const Chain*)chain;
  const Rows in{rows, x, ldx, q, ldq, scale, sums, ldq / BLOCK};
  together(team_size(threads), [&](Team& team) {
    for (int64_t i = 0; i < count; ++i) {
      const Chain& c = all[i];
      const Matrix m = make_matrix(c.format, c.n, c.k, c.group, c.data, nullptr);
      const int64_t ldo = m.panels * PANEL;
      int64_t from, to;
      if (grain > 0) {
        while (team.next(m.panels, grain, &from, &to))
          product(m, in, from, to, out + from * PANEL, ldo);
      } else {
        from = m.panels * team.rank / team.size;
        to = m.panels * (team.rank + 1) / team.size;
        product(m, in, from, to, out + from * PANEL, ldo);
      }
      team.barrier();
    }
  });
}

// Reads `bytes` bytes front to back in every thread's share; returns their sum as 32-bit words.
FT_API int64_t ft_stream(const void* data, int64_t bytes, int threads) {
  const uint8_t* p = (const uint8_t*)data;
  std::atomic<int64_t> total{0};
  together(team_size(threads), [&](Team& team) {
    const int64_t blocks = bytes / 256;
    const int64_t to = blocks * (team.rank + 1) / team.size;
    v16i sums[4] = {};
    for (int64_t b = blocks * team.rank / team.size; b < to; ++b)
      for (int j = 0; j < 4; ++j) {
        prefetch(p + b * 256 + j * 64 + 4096);
        sums[j] += (v16i)load_u(p + b * 256 + j * 64);
      }
    const v16i all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    int32_t lanes[LANES];
    store_i(lanes, all);
    int64_t mine = 0;
    for (int i = 0; i < LANES; ++i) mine += lanes[i];
    total += mine;
  });
  return total.load();
}
