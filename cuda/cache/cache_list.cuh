// One list of a KV cache on the device. One warp owns a list while tokens are appended: it alone reads and writes the
// list's buffers, so no token needs a barrier wider than the warp.
//
// The idea: read as a stream, a list has three ages. A new token enters the window as a raw key and value. The token
// that leaves the window is folded into the open chain, or closes it and starts a new one. A closed chain is a far
// column, for every later row. So a list holds: far columns, one open chain (the edge of the newest row), and a window
// of raw tokens.
//
// 1. Rings. Raw token t lies at slot t % window; its merge bit at t % (window + 1), since the bit of the token that
//    leaves is read after the newest is written.
// 2. A decision needs two rows that may have left the window: the newest key and the first key of the current run. Both
//    are stored apart (`last_keys`, `run_keys`), raw, with the run's start.
// 3. A row is spread over the warp, eight numbers a lane (warp_row.cuh), and the open chain is kept in f32. Rows that
//    attention reads are stored in T, or closed in 8 bits (codes.cuh), and quarantined: a row that is not finite has a
//    NaN key and a zero value.
// 4. A running mean needs the chain and its size; a pair sum needs the raw token before (`previous_k`, `previous_v`).
// 5. Under observed mass a token's bit is written later, when the last row of its window has added its mass
//    (`observe`). A given score decides a token as it comes; the bit of the newest token takes the slot of the bit that
//    has just been read.
// 6. Under a sliding window the closed chains that no later row sees are left behind: `starts` counts them, rows read
//    from there on, and the host takes whole pages of them back when a list is full. Raw tokens of a window that is
//    longer than the sliding one stay in their ring, and rows pass over them.
//
// No shared memory. The buffers of a list are those of `CacheState`.
#pragma once

#include "cache/pages.cuh"
#include "lib/cosine.cuh"
#include "decide/observe_row.cuh"
#include "lib/warp_row.cuh"

constexpr unsigned NO_RUN = 0xffffffffu;

// The buffers of all lists; (lists, D) where no shape is given. Rows of values, in buffers `*_v`, have Dv numbers.
template <class T> struct CacheState {
  // The pages of closed chains (pages.cuh); how many chains there are, (lists).
  Global<const uint64_t> table;
  Global<uint32_t> lengths;
  // Tokens of each batch row before this launch, or SITS_OUT, (batch); absent where all rows have p.first.
  Global<const uint32_t> seen;
  // (2, lists): how many closed chains, from the front, the next row does not see; the first token of the others.
  Global<uint32_t> starts;
  // (lists, window + 1, D): raw token t at t % window, the open chain at `window`. `local_lengths`: how many of these
  // slots exist, from the front.
  Global<T> local_k, local_v;
  Global<float> local_ln;
  Global<uint32_t> local_lengths;
  // The open chain in f32, its tokens, and its last raw token (pair sums).
  Global<float> chain_k, chain_v;
  Global<uint32_t> chain_sizes;
  Global<T> previous_k, previous_v;
  // (lists, window + 1): whether token t joins t + 1, at t % (window + 1).
  Global<uint32_t> bits;
  // Where the run that ends at the last token started, or NO_RUN; the first key of that run; the last token's key.
  Global<uint32_t> run_starts;
  Global<T> run_keys, last_keys;
  // (batch * heads, D), pair sums only.
  Global<T> last_queries;
  // Observed mass only.
  Observed<T> observed;
};

// A list, as its warp holds it during an append. OWN_VALUES: whether values may have another size than keys; CODED:
// whether closed chains may be in 8 bits.
template <class T, bool OWN_VALUES = true, bool CODED = true> struct CacheList {
  const CacheParams& p;
  const CacheState<T>& state;
  List list;
  size_t index, row;
  // Tokens before this launch.
  unsigned first;
  unsigned dim, length, size, run_start, start, kept_from;
  WarpRow chain_key, chain_value, previous_key, previous_value;

  __device__ CacheList(const CacheParams& p, const CacheState<T>& state, unsigned index = blockIdx.x)
      : p(p), state(state), list(p.sizes, index), index(index), row((size_t)index * p.sizes.head_dim),
        first(state.seen ? state.seen[list.batch] : p.first), dim(p.sizes.head_dim), length(state.lengths[index]),
        size(state.chain_sizes[index]),
        run_start(state.run_starts[index]), start(0), kept_from(0) {
    if (p.slide != NO_SLIDE) start = state.starts[index], kept_from = state.starts[lists() + index];
    chain_key.fill(0.0f), chain_value.fill(0.0f), previous_key.fill(0.0f), previous_value.fill(0.0f);
    if (first > p.window) {
      chain_key.load(state.chain_k, row, dim), chain_value.load(state.chain_v, value_row(), value_dim());
      if (p.fold == PAIR_SUM) {
        previous_key.load(state.previous_k, row, dim);
        previous_value.load(state.previous_v, value_row(), value_dim());
      }
    }
  }

  __device__ unsigned value_dim() const { return OWN_VALUES ? p.value_dim : dim; }
  __device__ size_t value_row() const { return OWN_VALUES ? index * p.value_dim : row; }

  __device__ Pages<T, CODED> pages() const {
    return {state.table + index * p.pages, dim, value_dim(), p.fold == MEAN, p.code};
  }

  // The number of lists.
  __device__ unsigned lists() const { return p.sizes.batch * p.sizes.lists; }

  // Leaves closed chains behind that row `row` does not see. Each lane looks at another one.
  __device__ void slide(unsigned row) {
    if (p.slide == NO_SLIDE) return;
    unsigned oldest = first_seen(p.slide, row), lane = threadIdx.x % 32, left = 32;
    while (left == 32) {
      unsigned token = start + lane < length ? pages().token(start + lane) : oldest;
      left = __popc(__ballot_sync(0xffffffffu, token < oldest));
      if (left == 0) break;
      kept_from = __shfl_sync(0xffffffffu, token, left - 1) + 1, start += left;
    }
  }

  __device__ void write_starts(Global<uint32_t> starts) const {
    if (p.slide == NO_SLIDE || threadIdx.x != 0) return;
    starts.set(index, start), starts.set(lists() + index, kept_from);
  }

  // Whether row i of the chunk, which is the row of `token`, sees that token and the one before by every head's bias.
  __device__ bool sees_pair(Global<const float> bias, unsigned token, unsigned i) const {
    for (unsigned head = list.first_head; head < list.first_head + list.group; head++) {
      float left = bias[p.bias.at(list.batch, head, i, token - 1)], right = bias[p.bias.at(list.batch, head, i, token)];
      if (left == -INFINITY || right == -INFINITY) return false;
    }
    return true;
  }

  // Whether the token before `token` is folded into it; `token` is number i of the chunk.
  __device__ bool decide(Global<const T> q, Global<const T> k, Global<const float> tests, Global<const float> bias,
                         unsigned token, unsigned i) {
    unsigned t = token - 1;
    bool running = run_start != NO_RUN;
    if (t < p.sinks || (running && t - run_start >= p.max_merge_level)) return false;
    if (bias && !sees_pair(bias, token, i)) return false;
    float beside = 0.0f, across = 0.0f;
    for (unsigned head = list.first_head; head < list.first_head + list.group; head++) {
      if (!p.key_key || head == list.first_head) {
        Global<const T> x = p.key_key ? k : q;
        size_t at = p.key_key ? p.k.at(list.batch, list.kv_head, i) : p.q.at(list.batch, head, i);
        beside = products(x, at, state.last_keys, row, dim).cosine();
        if (running) across = products(x, at, state.run_keys, row, dim).cosine();
      }
      HeadTest test(tests, (size_t)list.batch * p.sizes.heads + head);
      if (!test.passes(beside) || (running && !test.passes(across))) return false;
    }
    return true;
  }

  __device__ void follow_run(bool merges, unsigned token, const WarpRow& key) {
    if (!merges) run_start = NO_RUN;
    if (merges && run_start == NO_RUN) {
      run_start = token - 1;
      WarpRow first;
      first.load(state.last_keys, row, dim);
      first.store(state.run_keys, row, dim);
    }
    key.store(state.last_keys, row, dim);
  }

  // Folds token `t`, whose raw rows these are, into the open chain, or closes that one and opens another.
  __device__ void fold_in(unsigned t, const WarpRow& key, const WarpRow& value) {
    bool merged = t > 0 && state.bits[index * (p.window + 1) + (t - 1) % (p.window + 1)];
    if (t > 0 && !merged) {
      WarpRow closed_key = chain_key, closed_value = chain_value;
      WarpRow::quarantine<T>(closed_key, closed_value);
      pages().put(length++, closed_key, closed_value, t - 1, logf((float)size));
    }
    step(merged, key, value);
  }

  // Adds a token to the open chain if `merged`, else starts a new chain with it.
  __device__ void step(bool merged, const WarpRow& key, const WarpRow& value) {
    if (merged && p.fold == MEAN) {
      chain_key.running_mean(key, (float)size), chain_value.running_mean(value, (float)size);
      size++;
      return;
    }
    chain_key = key, chain_value = value, size = 1;
    if (p.fold != PAIR_SUM) return;
    if (merged) chain_key.add(previous_key), chain_value.add(previous_value);
    previous_key = key, previous_value = value;
  }

  // Writes the open chain to its local slot.
  __device__ void write() const {
    size_t slot = index * (p.window + 1) + p.window;
    WarpRow key = chain_key, value = chain_value;
    WarpRow::quarantine<T>(key, value);
    key.store(state.local_k, slot * dim, dim);
    value.store(state.local_v, slot * value_dim(), value_dim());
    if (p.fold == MEAN && threadIdx.x % 32 == 0) state.local_ln.set(slot, logf((float)size));
  }

  // Appends number i of the chunk; returns whether the token before is folded into it.
  __device__ bool take(Global<const T> q, Global<const T> k, Global<const T> v, Global<const float> tests,
                       Global<const float> bias, Global<const float> scores, unsigned i) {
    unsigned token = first + i, window = p.window;
    WarpRow key, value;
    key.load(k, p.k.at(list.batch, list.kv_head, i), dim);
    value.load(v, p.v.at(list.batch, list.kv_head, i), value_dim());
    bool given = bool(scores), merges = token > 0 && !p.observes && !given && decide(q, k, tests, bias, token, i);
    // Every lane reads this word after the next __syncwarp, or with the next token.
    size_t slot_before = index * (window + 1) + (token + window) % (window + 1);
    if (token > 0 && !given && threadIdx.x == 0) state.bits.set(slot_before, merges);
    follow_run(merges, token, key);
    WarpRow raw_key = key, raw_value = value;
    WarpRow::quarantine<T>(key, value);
    __syncwarp();
    if (window == 0) {
      fold_in(token, key, value);
    } else {
      size_t slot = index * (window + 1) + token % window;
      if (token >= window) {
        WarpRow leaving_key, leaving_value;
        leaving_key.load(state.local_k, slot * dim, dim);
        leaving_value.load(state.local_v, slot * value_dim(), value_dim());
        fold_in(token - window, leaving_key, leaving_value);
      }
      key.store(state.local_k, slot * dim, dim);
      value.store(state.local_v, slot * value_dim(), value_dim());
      if (p.fold == MEAN && threadIdx.x == 0) state.local_ln.set(slot, 0.0f);
    }
    __syncwarp();
    if (p.observes) observe(q, tests, i, raw_key, raw_value);
    if (given && threadIdx.x == 0) hide(tests, token, score(scores, i));
    return merges;
  }

  // The given score of number i of the chunk.
  __device__ float score(Global<const float> scores, unsigned i) const {
    return scores[p.scores_first + index * p.scores_stride + i];
  }

  // Whether a score hides token t. Strict, and false for NaN.
  __device__ bool hides(Global<const float> tests, unsigned t, float score) const {
    size_t first = (size_t)list.batch * p.sizes.heads + list.first_head;
    return t >= p.sinks && score < observed_threshold(tests, first, list.group);
  }

  // Writes token t's bit by its score: one thread does.
  __device__ void hide(Global<const float> tests, unsigned t, float score) const {
    state.bits.set(index * (p.window + 1) + t % (p.window + 1), hides(tests, t, score));
  }

  // This list's part of `observed`.
  __device__ Observed<T> observed() const {
    size_t ring = index * p.window, all = index * (p.sinks + p.window);
    return {state.observed.keys + all * dim, state.observed.masses + ring, state.observed.norms + ring,
            state.observed.logits + all};
  }

  // Adds the mass that the row of number i of the chunk gives to its window's tokens, then decides the token whose
  // window it completes.
  __device__ void observe(Global<const T> q, Global<const float> tests, unsigned i, const WarpRow& key,
                          const WarpRow& value) {
    unsigned token = first + i, window = p.window;
    Observed<T> mine = observed();
    remember(mine, token, key, value);
    __syncwarp();
    for (unsigned head = list.first_head; head < list.first_head + list.group; head++) {
      size_t query = p.q.at(list.batch, head, i);
      observe_row(token, p, mine.logits, mine.masses, [&](unsigned t) {
        size_t at = t + window <= token ? t : p.sinks + t % window;
        return lane_dot(q, query, mine.keys, at * dim, dim);
      });
    }
    __syncwarp();
    if (token + 1 >= window) settle(mine, tests, token + 1 - window, mine.norms[(token + 1) % window]);
    __syncwarp();
  }

  __device__ void remember(const Observed<T>& mine, unsigned token, const WarpRow& key, const WarpRow& value) const {
    if (token < p.sinks) key.store(mine.keys, (size_t)token * dim, dim);
    key.store(mine.keys, (size_t)(p.sinks + token % p.window) * dim, dim);
    float norm = value.norm();
    if (threadIdx.x != 0) return;
    mine.masses.set(token % p.window, 0.0f);
    mine.norms.set(token % p.window, norm);
  }

  __device__ void settle(const Observed<T>& mine, Global<const float> tests, unsigned t, float norm) const {
    if (threadIdx.x == 0) hide(tests, t, mine.masses[t % p.window] * norm);
  }

  // Writes the list's state; its new length goes to `lengths`.
  __device__ void finish(Global<uint32_t> lengths) const {
    unsigned seen = first + p.sizes.tokens, near = seen < p.window ? seen : p.window;
    if (seen > p.window) {
      write();
      chain_key.store(state.chain_k, row, dim), chain_value.store(state.chain_v, value_row(), value_dim());
      if (p.fold == PAIR_SUM) {
        previous_key.store(state.previous_k, row, dim);
        previous_value.store(state.previous_v, value_row(), value_dim());
      }
    }
    if (threadIdx.x != 0) return;
    lengths.set(index, length);
    state.chain_sizes.set(index, size);
    state.run_starts.set(index, run_start);
    state.local_lengths.set(index, near + (seen > p.window));
  }

  // The query rows of the chunk's last token: folded, for attention, into `out`; raw, for the next token's fold, into
  // the list.
  __device__ void queries(Global<const T> q, Global<T> out, bool merged) const {
    for (unsigned h = 0; h < list.group; h++) {
      size_t to = (index * list.group + h) * dim;
      WarpRow query, folded, before;
      query.load(q, p.q.at(list.batch, list.first_head + h, p.sizes.tokens - 1), dim);
      folded = query;
      if (p.fold == PAIR_SUM) {
        if (merged) {
          before.load(state.last_queries, to, dim);
          folded.add(before);
        }
        query.store(state.last_queries, to, dim);
      }
      if (out) folded.store(out, to, dim);
    }
  }
};

#define CACHE_STATE(T)                                                                                            \
  Global<const uint64_t> table, Global<uint32_t> lengths, Global<const uint32_t> seen, Global<uint32_t> starts,   \
      Global<T> local_k,                                                                                          \
      Global<T> local_v, Global<float> local_ln, Global<uint32_t> local_lengths, Global<float> chain_k,           \
      Global<float> chain_v, Global<uint32_t> chain_sizes, Global<T> previous_k, Global<T> previous_v,            \
      Global<uint32_t> bits, Global<uint32_t> run_starts, Global<T> run_keys, Global<T> last_keys,                \
      Global<T> last_queries, Global<T> seen_keys, Global<float> masses, Global<float> norms, Global<float> logits
#define STATE(T)                                                                                                  \
  CacheState<T> {                                                                                                 \
    table, lengths, seen, starts, local_k, local_v, local_ln, local_lengths, chain_k,                             \
        chain_v, chain_sizes, previous_k, previous_v, bits, run_starts, run_keys, last_keys, last_queries,        \
        {seen_keys, masses, norms, logits}                                                                        \
  }
