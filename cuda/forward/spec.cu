// The GPU's spec: attention in its plainest form, one thread per row and a loop over the row's columns. Tests hold the
// fast kernels against it, and it serves shapes and dtypes that they do not take.
#include "lib/bias.cuh"
#include "lib/params.cuh"
#include "lib/philox.cuh"
#include "lib/softcap.cuh"

constexpr unsigned MAX_DIM = 256;

template <class T> struct SpecTensors {
  Global<const T> q, k, v;
  Global<const T> far_k, far_v;
  Global<const float> far_ln;
  Global<const uint32_t> far_index, far_before;
  Global<const T> folded_k, folded_v;
  Global<const float> folded_ln, bias, sinks;
};

// One row and its running softmax.
template <class T> struct SpecRow {
  const SpecTensors<T>& x;
  const AttentionParams& p;
  unsigned batch, head, row;
  size_t query;
  float maximum, sum;
  float output[MAX_DIM];

  __device__ SpecRow(const SpecTensors<T>& x, const AttentionParams& p, unsigned batch, unsigned head, unsigned row)
      : x(x), p(p), batch(batch), head(head), row(row), query(p.q.at(batch, head, row)), maximum(-INFINITY), sum(0.0f) {
    for (unsigned d = 0; d < p.sizes.head_dim; d++) output[d] = 0.0f;
  }

  // One column: a key and a value, the token they stand for, and ln n.
  __device__ void see(Global<const T> keys, size_t key, Global<const T> values, size_t value, unsigned token,
                      float ln) {
    float dot = 0.0f, check = 0.0f;
    for (unsigned d = 0; d < p.sizes.head_dim; d++) {
      float q = widen(x.q[query + d]), k = widen(keys[key + d]);
      dot += q * k;
      // NaN as soon as one of them is not finite.
      check += q * 0.0f + k * 0.0f + widen(values[value + d]) * 0.0f;
    }
    float logit = (capped(p.softcap, dot * p.scale * p.scale_sign) + ln * LOG2_E) + check;
    unsigned from = row > p.first_row ? row - p.first_row : 0;
    if (x.bias) logit += bias_in_base_2(x.bias[p.bias.at(batch, head, from, token)]);
    push(logit, values, value, token);
  }

  __device__ void push(float logit, Global<const T> values, size_t value, unsigned token) {
    // Hidden by the bias.
    if (logit == -INFINITY) return;
    float larger = logit > maximum ? logit : maximum, rescale = exp2f(maximum - larger), weight = exp2f(logit - larger);
    // A NaN never becomes the maximum; its weight is NaN.
    maximum = larger;
    sum = sum * rescale + weight;
    if (p.dropout_cut > 0) {
      uint32_t word = philox_word(p.dropout_key, batch * p.sizes.heads + head + p.drawn_from[0], row + p.drawn_from[1],
                                  token + p.drawn_from[2]);
      weight = word >= p.dropout_cut ? weight * p.dropout_scale : 0.0f;
    }
    for (unsigned d = 0; d < p.sizes.head_dim; d++) {
      float v = widen(values[value + d]);
      output[d] = output[d] * rescale + (fabsf(v) <= 3.402823466e38f ? weight * v : 0.0f);
    }
  }

  // A term without a value.
  __device__ void add_sink(float sink) {
    if (sink == -INFINITY) return;
    float larger = sink > maximum ? sink : maximum, rescale = exp2f(maximum - larger);
    maximum = larger, sum = sum * rescale + exp2f(sink - larger);
    for (unsigned d = 0; d < p.sizes.head_dim; d++) output[d] *= rescale;
  }

  __device__ void finish(Global<T> out, Global<float> log_sum_exp) {
    if (x.sinks) add_sink(bias_in_base_2(x.sinks[head]));
    size_t at = ((size_t)batch * p.sizes.heads + head) * p.sizes.tokens + row;
    // NaN if a logit was. A row that sees nothing gives zeros.
    float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (unsigned d = 0; d < p.sizes.head_dim; d++) out.set(at * p.sizes.head_dim + d, narrow<T>(output[d] * inverse));
    // As `saved_sum` in softmax.cuh, without the rounding remainder: no gradients are computed from this.
    size_t rows = (size_t)p.sizes.batch * p.sizes.heads * p.sizes.tokens;
    if (log_sum_exp)
      log_sum_exp.set(at, sum == 0.0f ? INFINITY : maximum + log2f(sum)), log_sum_exp.set(rows + at, 0.0f);
  }
};

template <class T>
__device__ void spec_forward(const SpecTensors<T>& x, Global<T> out, Global<float> log_sum_exp,
                             const AttentionParams& p) {
  unsigned tokens = p.sizes.tokens, dim = p.sizes.head_dim;
  unsigned batch = blockIdx.y / p.sizes.heads, head = blockIdx.y % p.sizes.heads,
           kv_head = head / (p.sizes.heads / p.sizes.kv_heads);
  unsigned row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= tokens) return;
  SpecRow<T> state(x, p, batch, head, row);
  auto raw = [&](unsigned t) { state.see(x.k, p.k.at(batch, kv_head, t), x.v, p.v.at(batch, kv_head, t), t, 0.0f); };
  // The first token that the sliding window leaves.
  unsigned first = row + 1 > p.slide ? row + 1 - p.slide : 0;
  if (p.dense) {
    for (unsigned t = first; t < (p.causal ? row + 1 : tokens); t++) raw(t);
    return state.finish(out, log_sum_exp);
  }
  size_t list = (size_t)batch * p.sizes.lists + (p.sizes.lists == p.sizes.heads ? head : kv_head);
  size_t before = list * (tokens + 1);
  // Far: tokens before the edge that are not hidden.
  unsigned far = !p.causal         ? x.far_before[before + tokens]
                 : row >= p.window ? x.far_before[before + row - p.window]
                                   : 0;
  for (unsigned c = 0; c < far; c++) {
    size_t column = list * p.capacity + c;
    if (x.far_index[column] < first) continue;
    state.see(x.far_k, column * dim, x.far_v, column * dim, x.far_index[column], x.far_ln ? x.far_ln[column] : 0.0f);
  }
  // Edge: the token at the window's border, hidden or not. Without causality, tokens that are not hidden are far
  // already.
  bool hidden = !p.causal && x.far_before[before + row] == x.far_before[before + row + 1];
  if (p.causal ? row >= p.window : hidden) {
    unsigned t = row - p.window;
    size_t folded = list * tokens + t;
    if (!x.folded_k) raw(t);
    else state.see(x.folded_k, folded * dim, x.folded_v, folded * dim, t, x.folded_ln ? x.folded_ln[folded] : 0.0f);
  }
  // Near: raw tokens.
  if (p.window > 0)
    for (unsigned t = row + 1 > p.window ? row + 1 - p.window : 0; t <= row; t++) raw(t);
  state.finish(out, log_sum_exp);
}

#define SPEC(suffix, T)                                                                                               \
  KERNEL spec_forward_##suffix(Global<const T> q, Global<const T> k, Global<const T> v, Global<const T> far_k,        \
                               Global<const T> far_v, Global<const float> far_ln, Global<const uint32_t> far_index,   \
                               Global<const uint32_t> far_before, Global<const T> folded_k, Global<const T> folded_v, \
                               Global<const float> folded_ln, Global<const float> bias, Global<T> out,                \
                               Global<float> log_sum_exp, Global<const float> sinks, AttentionParams p) {             \
    spec_forward(SpecTensors<T>{q, k, v, far_k, far_v, far_ln, far_index, far_before, folded_k, folded_v, folded_ln,  \
                                bias, sinks},                                                                         \
                 out, log_sum_exp, p);                                                                                \
  }
FOR_EACH_DTYPE(SPEC)

MODULE(spec, ENTRIES(spec_forward))
