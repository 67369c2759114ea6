// Attends one row per query head over a cache's columns, with a bias, dropout, a softcap or sink logits. decode.cu is
// faster and has none of them.
#include "cache/pages.cuh"
#include "lib/bias.cuh"
#include "lib/cosine.cuh"
#include "lib/philox.cuh"
#include "lib/softcap.cuh"
#include "lib/warp_row.cuh"

constexpr unsigned WARPS = 8;

// An unfinished softmax, in base 2. A NaN never becomes the maximum; it makes the sum NaN.
struct Softmax {
  float maximum = -INFINITY, sum = 0.0f;
  WarpRow output;

  __device__ Softmax() { output.fill(0.0f); }

  // Merges other columns, whose largest logit is `other`.
  __device__ void merge(float other, float other_sum, const WarpRow& other_output) {
    float larger = other > maximum ? other : maximum, base = larger == -INFINITY ? 0.0f : larger;
    float mine = exp2f(maximum - base), theirs = exp2f(other - base);
    maximum = larger;
    sum = sum * mine + other_sum * theirs;
#pragma unroll
    for (unsigned i = 0; i < PER_LANE; i++) output.x[i] = output.x[i] * mine + other_output.x[i] * theirs;
  }
};

// As in cache.cu.
template <class T> struct Columns {
  Global<const uint64_t> table;
  Global<const uint32_t> lengths, starts;
  Global<const T> local_k, local_v;
  Global<const float> local_ln;
  Global<const uint32_t> local_lengths;
};

template <class T> struct Attend {
  const CacheAttendParams& p;
  unsigned row, batch, head;
  // The row's own token.
  unsigned last;
  WarpRow query;
  Softmax softmax;

  __device__ Attend(const CacheAttendParams& p, Global<const T> q, Global<const uint32_t> seen)
      : p(p), row(blockIdx.x), batch(row / p.heads), head(row % p.heads), last(seen ? seen[batch] - 1 : p.last) {
    query.load(q, (size_t)row * p.head_dim, p.head_dim);
  }

  // The token of a raw row, or of the open chain.
  __device__ unsigned local_token(unsigned slot) const {
    return slot == p.window ? last - p.window : last - (last - slot) % p.window;
  }

  // One column, and ln n.
  __device__ void column(const WarpRow& key, WarpRow value, float ln, unsigned token, Global<const float> bias) {
    float dot = 0.0f, factor = 1.0f, added = LOG2_E * ln;
#pragma unroll
    for (unsigned i = 0; i < PER_LANE; i++) dot += query.x[i] * key.x[i];
    if (bias) added += bias_in_base_2(bias[p.bias.at(batch, head, 0, token)]);
    if (p.dropout_cut != 0)
      factor = philox_word(p.dropout_key, p.drawn_from[0] + row, p.drawn_from[1] + last, p.drawn_from[2] + token) >=
                       p.dropout_cut
                   ? p.dropout_scale
                   : 0.0f;
    value.scale(factor);
    softmax.merge(capped(p.softcap, p.scale * warp_sum(dot)) + added, 1.0f, value);
  }

  // This warp's share of the list's columns.
  __device__ void columns(const Columns<T>& from, Global<const float> bias) {
    size_t list = batch * p.lists + head / (p.heads / p.lists), local = list * (p.window + 1);
    Pages<T> pages{from.table + list * p.pages, p.head_dim, p.value_dim, p.sized != 0, p.code};
    unsigned length = from.lengths[list], locals = from.local_lengths[list], warp = threadIdx.x / 32;
    unsigned start = 0, seen = 0;
    if (p.slide != NO_SLIDE) {
      // The row was appended: `starts` are those of the next one.
      start = from.starts[list], seen = first_seen(p.slide, last);
      if (start > 0 && pages.token(start - 1) >= seen) start--;
    }
    for (unsigned i = start + warp; i < length; i += WARPS) {
      unsigned token = pages.token(i);
      if (token < seen) continue;
      WarpRow key, value;
      pages.load(i, key, value);
      column(key, value, p.sized ? pages.ln(i) : 0.0f, token, bias);
    }
    for (unsigned slot = warp; slot < locals; slot += WARPS) {
      size_t at = local + slot;
      if (local_token(slot) < seen) continue;
      WarpRow key, value;
      key.load(from.local_k, at * p.head_dim, p.head_dim), value.load(from.local_v, at * p.value_dim, p.value_dim);
      column(key, value, p.sized ? from.local_ln[at] : 0.0f, local_token(slot), bias);
    }
  }

  // Joins the warps' parts in their order.
  __device__ void finish(Global<T> out, Global<const float> sinks) {
    unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, dim = p.value_dim, first = lane * PER_LANE;
    Shared<float> sums = shared_memory<float>(0, 2 * WARPS);
    Shared<float> outputs = shared_memory<float>(2 * WARPS * sizeof(float), WARPS * dim);
    if (lane == 0) sums.set(2 * warp, softmax.maximum), sums.set(2 * warp + 1, softmax.sum);
    if (first < dim)
      for (unsigned i = 0; i < PER_LANE; i++) outputs.set(warp * dim + first + i, softmax.output.x[i]);
    __syncthreads();
    if (warp != 0) return;
    Softmax all;
    for (unsigned other = 0; other < WARPS; other++) {
      WarpRow part;
      part.fill(0.0f);
      if (first < dim)
        for (unsigned i = 0; i < PER_LANE; i++) part.x[i] = outputs[other * dim + first + i];
      all.merge(sums[2 * other], sums[2 * other + 1], part);
    }
    // A row whose every column is hidden gives zeros, unless its query is not finite, which no logit would show.
    bool bad_query = __any_sync(0xffffffffu, !query.finite<float>());
    bool empty = all.sum == 0.0f;
    WarpRow nothing;
    float sink = sinks ? bias_in_base_2(sinks[head]) : -INFINITY;
    if (sink != -INFINITY) all.merge(sink, 1.0f, nothing);
    all.output.scale(!empty ? 1.0f / all.sum : bad_query ? NAN : 0.0f);
    // As in the other kernels, a row that holds a number that is not finite is NaN throughout.
    if (__any_sync(0xffffffffu, !all.output.finite<float>())) all.output.fill(NAN);
    all.output.store(out, (size_t)row * dim, dim);
  }
};

// Grid (batch * heads), 256 threads.
#define CACHE_ATTEND(suffix, T)                                                                                        \
  KERNEL cache_attend_##suffix(Global<const T> q, Global<const uint64_t> table,                                        \
                               Global<const uint32_t> lengths, Global<const uint32_t> seen,                            \
                               Global<const uint32_t> starts,                                                          \
                               Global<const T> local_k, Global<const T> local_v, Global<const float> local_ln,         \
                               Global<const uint32_t> local_lengths,                                                   \
                               Global<const float> bias, Global<const float> sinks, Global<T> out,                     \
                               CacheAttendParams p) {                                                                  \
    if (seen && seen[blockIdx.x / p.heads] == SITS_OUT) return;                                                        \
    Attend<T> attend(p, q, seen);                                                                                      \
    attend.columns(Columns<T>{table, lengths, starts, local_k, local_v, local_ln, local_lengths},                      \
                   bias);                                                                                              \
    attend.finish(out, sinks);                                                                                         \
  }
FOR_EACH_DTYPE(CACHE_ATTEND)

MODULE(cache_attend, ENTRIES(cache_attend))
