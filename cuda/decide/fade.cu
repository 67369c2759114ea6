// A column bias: a far column carries it beside its ln n, and edges and near tokens have none. Attention then treats it
// as any size. A thread takes a column, or a token; the grid's second axis has the lists, or the KV heads.
#include "lib/cosine.cuh"

// Writes the column bias (batch, kv_heads, N) into `far_ln`; under `Mean` it is added to the ln n there.
KERNEL fade_columns(Global<const float> bias, Global<const uint32_t> far_index, Global<const uint32_t> far_before,
                    Global<float> far_ln, FoldParams p) {
  unsigned column = blockIdx.x * blockDim.x + threadIdx.x, tokens = p.sizes.tokens;
  size_t at = (size_t)blockIdx.y * tokens + column;
  if (column >= tokens || column >= far_before[(size_t)blockIdx.y * (tokens + 1) + tokens]) return;
  List list(p.sizes, blockIdx.y);
  float fade = bias[((size_t)list.batch * p.sizes.kv_heads + list.kv_head) * tokens + far_index[at]];
  far_ln.set(at, p.fold == MEAN ? far_ln[at] + fade : fade);
}

// The gradient of the column bias from the sums of far columns, (batch * lists, N): those of a KV head's lists are
// added up in their order. A hidden token has no column, and its gradient is 0.
KERNEL fade_gradients(
    Global<const float> far, Global<const uint32_t> far_before, Global<float> out, FoldParams p) {
  unsigned token = blockIdx.x * blockDim.x + threadIdx.x, tokens = p.sizes.tokens;
  if (token >= tokens) return;
  unsigned lists = p.sizes.lists / p.sizes.kv_heads;
  float sum = 0.0f;
  for (unsigned i = 0; i < lists; i++) {
    size_t list = (size_t)blockIdx.y * lists + i, before = list * (tokens + 1) + token;
    unsigned column = far_before[before];
    if (far_before[before + 1] != column) sum += far[list * tokens + column];
  }
  out.set((size_t)blockIdx.y * tokens + token, sum);
}

MODULE(fade, ENTRY(fade_columns) ENTRY(fade_gradients))
