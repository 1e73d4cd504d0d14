// The plain C edge of the fused forward. Handles are pointers; whoever makes one frees it.
#include "chain.h"
#include "forward.h"

#define FT_API extern "C" __attribute__((visibility("default")))

using namespace ft;

FT_API Model* ft_model_new(int64_t layers, const int64_t* sizes, const double* reals) {
  Model* m = new Model();
  m->hidden = sizes[0], m->heads = sizes[1], m->kv_heads = sizes[2], m->size = sizes[3];
  m->ffn = sizes[4], m->vocab = sizes[5], m->norm_kind = sizes[6], m->activation = sizes[7];
  m->parallel = sizes[8], m->qk_norm = sizes[9], m->half_cache = sizes[10];
  m->eps = (float)reals[0], m->attn_scale = (float)reals[1], m->attn_cap = (float)reals[2];
  m->logit_cap = (float)reals[3], m->logit_scale = (float)reals[4];
  m->residual_scale = (float)reals[5], m->embed_scale = (float)reals[6];
  m->layers.resize((size_t)layers);
  return m;
}

FT_API void ft_model_free(Model* m) { delete m; }

FT_API void ft_model_layer(Model* m, int64_t layer, int64_t rope, int64_t rope_dim,
                           int64_t window) {
  size_t kind = 0;
  while (kind < m->windows.size() && m->windows[kind] != window) ++kind;
  if (kind == m->windows.size()) m->windows.push_back(window);
  Layer& w = m->layers[(size_t)layer];
  w.rope = rope, w.rope_dim = rope_dim, w.window = (int64_t)kind;
}

// role: MatrixRole; layer -1: the head.
FT_API void ft_model_matrix(Model* m, int64_t layer, int64_t role, int64_t format, int64_t n,
                            int64_t k, int64_t group, const void* data, const float* bias) {
  const Matrix w = make_matrix((int)format, n, k, (int)group, data, bias);
  (layer < 0 ? m->head : m->layers[(size_t)layer].matrix[role]) = w;
}

// role: NormRole, then 4 = norm of q, 5 = norm of k; layer -1: the final norm.
FT_API void ft_model_norm(Model* m, int64_t layer, int64_t role, const float* weight,
                          const float* bias) {
  if (layer < 0) {
    m->final_norm = NormWeights{weight, bias};
    return;
  }
  Layer& w = m->layers[(size_t)layer];
  if (role < NORM_ROLES)
    w.norm[role] = NormWeights{weight, bias};
  else
    (role == NORM_ROLES ? w.q_norm : w.k_norm) = weight;
}

// What tokens and positions look up. which: 0 embedding, 1 learned positions.
FT_API void ft_model_table(Model* m, int64_t which, const void* data, int64_t type, int64_t rows) {
  if (which == 0)
    m->embedding = data, m->embedding_type = type;
  else
    m->places = data, m->places_type = type, m->place_rows = rows;
}

FT_API int ft_forward(const Model* m, const Call* c) { return forward(*m, *c); }

FT_API int ft_chain(const Model* m, const Call* first, const Chain* out) {
  return chain(*m, *first, *out);
}
