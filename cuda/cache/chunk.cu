// A later chunk of a cache's tokens, appended and attended together. A first chunk is another matter: cache.cu.
//
// The idea: what a chunk's rows see besides the closed chains lies in the tail: the open chain, the window's raw
// tokens, and the new tokens, in this order. Number u of the tail is token `first` + u. So the launches are those of
// attention over the tail, and the closed chains come before its far columns:
//
// 1. chunk_rows       raw keys and values of the tail, in one contiguous piece
// 2. bits of the tail, (batch, heads, tail - 1): chunk_pairs by cosines, chunk_given by scores, or chunk_weigh and
//                     chunk_settle by observed mass
// 3. fold_scan        how many tokens of the tail stay before each one (decide/fold.cu)
// 4. chunk_chains     folds the tail: chains that close go to the lists' pages, and edges to attention
// 5. chunk_close      the state that does not grow with the list
// 6. chunk_far        far columns out of the pages, in one contiguous piece; chunk_before counts them
// 7. chunk_queries    queries, and the attention kernels of a whole sequence, which leave out the rows before the chunk
// 8. chunk_window     the window's new tokens, into the lists
//
// Attention numbers tokens and rows from `lead` tokens before the chunk on; see ChunkParams. Every list equals that of
// one append after another up to the rounding of a cosine.
#include "cache/cache_list.cuh"

struct Tail {
  const CacheParams& p;
  // Tokens that came before the chunk.
  unsigned held;

  __device__ explicit Tail(const CacheParams& p) : p(p), held(p.first < p.window + 1 ? p.first : p.window + 1) {}

  // Whether number 0 is the open chain, and not a raw token.
  __device__ bool open() const { return p.first > p.window; }
  __device__ unsigned count() const { return held + p.sizes.tokens; }
  __device__ unsigned first() const { return p.first - held; }
  // The number of the edge of the chunk's last row: the open chain after the chunk. Negative if its window reaches back
  // to the first token.
  __device__ int last_edge() const { return (int)count() - 1 - (int)p.window; }
  // Where the bits of a head start.
  __device__ size_t bits_of(unsigned batch, unsigned head) const {
    return ((size_t)batch * p.sizes.heads + head) * (count() - 1);
  }
};

// Row `u` of the tail in buffers of attention's tokens, (batch * lists or heads, tokens, column_dim).
__device__ size_t row_of(const Tail& tail, const ChunkParams& c, size_t list, unsigned u) {
  return (list * c.tokens + c.lead - tail.held + u) * tail.p.column_dim;
}

// A warp per token of the tail: grid (tail / 4, batch * kv_heads). The open chain is left out: no row sees its raw
// token.
template <class T>
__device__ void rows(Global<const T> k, Global<const T> v, Global<const T> local_k, Global<const T> local_v,
                     Global<T> keys, Global<T> values, const CacheParams& p, const ChunkParams& c) {
  Tail tail(p);
  unsigned u = warp_pair(), batch = blockIdx.y / p.sizes.kv_heads, kv_head = blockIdx.y % p.sizes.kv_heads;
  if (u >= tail.count() || (u == 0 && tail.open())) return;
  WarpRow key, value;
  if (u < tail.held) {
    size_t list = (size_t)batch * p.sizes.lists + kv_head * (p.sizes.lists / p.sizes.kv_heads);
    size_t slot = list * (p.window + 1) + (tail.first() + u) % p.window;
    key.load(local_k, slot * p.sizes.head_dim, p.sizes.head_dim);
    value.load(local_v, slot * p.value_dim, p.value_dim);
  } else {
    key.load(k, p.k.at(batch, kv_head, u - tail.held), p.sizes.head_dim);
    value.load(v, p.v.at(batch, kv_head, u - tail.held), p.value_dim);
    WarpRow::quarantine<T>(key, value);
  }
  size_t to = row_of(tail, c, blockIdx.y, u);
  key.store(keys, to, p.column_dim), value.store(values, to, p.column_dim);
}

// The bits that the list knows, into those of the tail; and writes of any others.
template <class T> struct TailBits {
  const CacheList<T>& list;
  const Tail& tail;
  Global<uint8_t> bits;

  // For one thread of a list.
  __device__ void set(unsigned u, bool bit) const {
    for (unsigned head = 0; head < list.list.group; head++)
      bits.set(tail.bits_of(list.list.batch, list.list.first_head + head) + u, bit);
  }

  // Numbers up to `end`: one warp does.
  __device__ void copy(unsigned end) const {
    unsigned slots = list.p.window + 1;
    for (unsigned u = threadIdx.x % 32; u < end; u += 32)
      set(u, list.state.bits[list.index * slots + (tail.first() + u) % slots]);
  }
};

// The bits by cosines. `own`, (batch, heads, tokens - 1): the decisions over the chunk alone. They do not know the run
// that the last token before the chunk may be in. So the list decides the first pairs again, until its run and that of
// `own` are the same. One warp per list.
template <class T>
__device__ void pairs(Global<const T> q, Global<const T> k, Global<const float> tests, Global<const float> bias,
                      Global<const uint8_t> own, Global<uint8_t> bits, const CacheState<T>& state,
                      const CacheParams& p) {
  CacheList<T> list(p, state);
  Tail tail(p);
  TailBits<T> to{list, tail, bits};
  unsigned tokens = p.sizes.tokens;
  size_t first = ((size_t)list.list.batch * p.sizes.heads + list.list.first_head) * (tokens - 1);
  to.copy(tail.held - 1);
  for (unsigned i = threadIdx.x; i + 1 < tokens; i += 32) to.set(tail.held + i, own[first + i]);
  __syncwarp();
  for (unsigned i = 0, run = NO_RUN; i < tokens; i++) {
    unsigned token = list.first + i;
    bool alone = i > 0 && own[first + i - 1];
    run = !alone ? NO_RUN : run == NO_RUN ? token - 1 : run;
    bool merges = list.decide(q, k, tests, bias, token, i);
    WarpRow key;
    key.load(k, p.k.at(list.list.batch, list.list.kv_head, i), list.dim);
    list.follow_run(merges, token, key);
    if (threadIdx.x == 0 && (i == 0 || merges != alone)) to.set(tail.held + i - 1, merges);
    __syncwarp();
    if (list.run_start == run) break;
  }
  if (threadIdx.x == 0) state.run_starts.set(list.index, list.run_start);
}

// The bits by given scores; that of the last token has a place in the list alone (chunk_close). One warp per list.
template <class T>
__device__ void given(Global<const float> tests, Global<const float> scores, Global<uint8_t> bits,
                      const CacheState<T>& state, const CacheParams& p) {
  CacheList<T> list(p, state);
  Tail tail(p);
  TailBits<T> to{list, tail, bits};
  to.copy(tail.held);
  for (unsigned i = threadIdx.x; i + 1 < p.sizes.tokens; i += 32)
    to.set(tail.held + i, list.hides(tests, list.first + i, list.score(scores, i)));
}

// Observed mass: the mass that each new row gives the tokens of its window, per query head; `weights`, (lists, tokens,
// group, window), are zeros before. `logits`: scratch, (lists, tokens, sinks + window). A warp per row: grid (tokens /
// 4, lists).
template <class T>
__device__ void weigh(Global<const T> q, Global<const T> k, Global<float> weights, Global<float> logits,
                      const CacheState<T>& state, const CacheParams& p) {
  CacheList<T> to(p, state, blockIdx.y);
  const List& list = to.list;
  unsigned i = warp_pair(), row = to.first + i, dim = to.dim, window = p.window;
  if (i >= p.sizes.tokens) return;
  size_t at = to.index * p.sizes.tokens + i;
  Observed<T> mine = to.observed();
  for (unsigned h = 0; h < list.group; h++) {
    size_t query = p.q.at(list.batch, list.first_head + h, i);
    observe_row(row, p, logits + at * (p.sinks + window), weights + (at * list.group + h) * window, [&](unsigned t) {
      if (t >= to.first) return lane_dot(q, query, k, p.k.at(list.batch, list.kv_head, t - to.first), dim);
      return lane_dot(q, query, mine.keys, (t + window <= row ? t : p.sinks + t % window) * (size_t)dim, dim);
    });
  }
}

// Adds these masses in the order of the rows, and decides the tokens whose windows are complete. `masses` and `norms`,
// (lists, window): those of the window's tokens after the chunk. A warp per token of the tail: grid (tail / 4, lists).
template <class T>
__device__ void settle(Global<const T> v, Global<const float> tests, Global<const float> weights, Global<float> masses,
                       Global<float> norms, Global<uint8_t> bits, const CacheState<T>& state, const CacheParams& p) {
  CacheList<T> to(p, state, blockIdx.y);
  const List& list = to.list;
  Tail tail(p);
  TailBits<T> target{to, tail, bits};
  unsigned u = warp_pair(), t = tail.first() + u, end = to.first + p.sizes.tokens, window = p.window, slot = t % window;
  if (u >= tail.count()) return;
  if (t + window <= to.first) {
    // It has been decided before.
    if (threadIdx.x % 32 == 0) target.set(u, state.bits[to.index * (window + 1) + t % (window + 1)]);
    return;
  }
  Observed<T> mine = to.observed();
  float mass = 0.0f, norm = 0.0f;
  if (t < to.first) {
    mass = mine.masses[slot], norm = mine.norms[slot];
  } else {
    WarpRow value;
    value.load(v, p.v.at(list.batch, list.kv_head, t - to.first), to.value_dim());
    norm = value.norm();
  }
  unsigned row = t + window / 2 > to.first ? t + window / 2 : to.first;
  for (; row < t + window && row < end; row++) {
    size_t at = (to.index * p.sizes.tokens + (row - to.first)) * list.group;
    for (unsigned h = 0; h < list.group; h++) mass += weights[(at + h) * window + slot];
  }
  if (threadIdx.x % 32 != 0) return;
  bool complete = t + window <= end;
  if (u + 1 < tail.count()) target.set(u, complete && to.hides(tests, t, mass * norm));
  if (t + window >= end) masses.set(to.index * window + slot, mass), norms.set(to.index * window + slot, norm);
}

// The open chain after the chunk. The one before it is still read.
template <class T> struct OpenChain {
  Global<float> key, value;
  Global<uint32_t> sizes;
  Global<T> previous_key, previous_value;
};

// Edges of attention, (batch * lists, tokens, column_dim) and (batch * lists, tokens).
template <class T> struct Edges {
  Global<T> keys, values;
  Global<float> ln;
};

// Folds the tail. The warp of a chain's first token walks along the chain; where tokens are dropped, each is a chain
// by itself. `before`, (lists, tail + 1): how many tokens stay before each one. Grid (tail / 4, lists).
template <class T>
__device__ void chains(Global<const T> keys, Global<const T> values, Global<const uint8_t> bits,
                       Global<const uint32_t> before, const Edges<T>& edges, const OpenChain<T>& open,
                       const CacheState<T>& state, const CacheParams& p, const ChunkParams& c) {
  CacheList<T> list(p, state, blockIdx.y);
  Tail tail(p);
  unsigned u = warp_pair(), lane = threadIdx.x % 32;
  size_t pair = tail.bits_of(list.list.batch, list.list.first_head);
  size_t kv_row = (size_t)list.list.batch * p.sizes.kv_heads + list.list.kv_head;
  int last = tail.last_edge();
  if ((int)u > last || (p.fold != DROP && u > 0 && bits[pair + u - 1])) return;
  if (p.fold == DROP && (int)u < last && bits[pair + u]) return;
  auto step = [&](bool merged) {
    WarpRow key, value;
    key.load(keys, row_of(tail, c, kv_row, u), list.dim);
    value.load(values, row_of(tail, c, kv_row, u), list.value_dim());
    list.step(merged, key, value);
  };
  if (u > 0 || !tail.open()) step(false);
  for (;; u++) {
    WarpRow key = list.chain_key, value = list.chain_value;
    WarpRow::quarantine<T>(key, value);
    float ln = logf((float)list.size);
    if (edges.keys && (u > 0 || !tail.open())) {
      size_t to = row_of(tail, c, list.index, u);
      key.store(edges.keys, to, p.column_dim), value.store(edges.values, to, p.column_dim);
      if (edges.ln && lane == 0) edges.ln.set(to / p.column_dim, ln);
    }
    if ((int)u == last) break;
    bool hidden = bits[pair + u];
    if (!hidden)
      list.pages().put(list.length + before[list.index * (tail.count() + 1) + u], key, value, tail.first() + u, ln);
    if (!hidden || p.fold == DROP) return;
    u++, step(true), u--;
  }
  list.write();
  list.chain_key.store(open.key, list.row, list.dim);
  list.chain_value.store(open.value, list.value_row(), list.value_dim());
  if (lane == 0) open.sizes.set(list.index, list.size);
  if (p.fold != PAIR_SUM) return;
  list.previous_key.store(open.previous_key, list.row, list.dim);
  list.previous_value.store(open.previous_value, list.value_row(), list.value_dim());
}

// The list's length, its run and its bits; under observed mass also the keys of sinks, and the window's masses. One
// warp per list.
template <class T>
__device__ void close(Global<const T> q, Global<const T> k, Global<const float> tests, Global<const float> scores,
                      Global<const uint8_t> bits, Global<const uint32_t> before, Global<const float> masses,
                      Global<const float> norms, const CacheState<T>& state, const CacheParams& p) {
  CacheList<T> list(p, state);
  Tail tail(p);
  constexpr unsigned ALL = 0xffffffffu;
  unsigned lane = threadIdx.x, tokens = p.sizes.tokens, end = list.first + tokens, last = tail.count() - 1,
           slots = p.window + 1;
  size_t pair = tail.bits_of(list.list.batch, list.list.first_head);
  auto key_of = [&](unsigned t) {
    WarpRow key;
    key.load(k, p.k.at(list.list.batch, list.list.kv_head, t - list.first), list.dim);
    return key;
  };
  if (scores || p.observes) {
    list.run_start = NO_RUN;
  } else {
    // The run that ends at the last token. One that began before the chunk is as chunk_pairs left it.
    unsigned start = last, joined = 32;
    while (joined == 32 && start > 0) {
      unsigned together = __ballot_sync(ALL, lane < start && bits[pair + (lane < start ? start - 1 - lane : 0)]);
      joined = together == ALL ? 32 : __ffs(~together) - 1;
      start -= joined;
    }
    if (start == last) list.run_start = NO_RUN;
    if (start < last && start >= tail.held) {
      list.run_start = tail.first() + start;
      key_of(list.run_start).store(state.run_keys, list.row, list.dim);
    }
  }
  key_of(end - 1).store(state.last_keys, list.row, list.dim);
  list.queries(q, Global<T>{}, false);
  for (unsigned u = last > p.window ? last - p.window : 0; u < last; u += 32)
    if (u + lane < last) state.bits.set(list.index * slots + (tail.first() + u + lane) % slots, bits[pair + u + lane]);
  if (p.observes) {
    Observed<T> mine = list.observed();
    for (unsigned t = list.first; t < end && t < p.sinks; t++)
      key_of(t).store(mine.keys, (size_t)t * list.dim, list.dim);
    size_t ring = list.index * p.window;
    for (unsigned t = (end > p.window ? end - p.window : 0) + lane; t < end; t += 32) {
      unsigned at = t % p.window;
      mine.masses.set(at, masses[ring + at]), mine.norms.set(at, norms[ring + at]);
    }
  }
  if (lane != 0) return;
  if (scores) list.hide(tests, end - 1, list.score(scores, tokens - 1));
  int edge = tail.last_edge();
  if (edge > 0) state.lengths.set(list.index, list.length + before[list.index * (tail.count() + 1) + edge]);
  state.run_starts.set(list.index, list.run_start);
  state.local_lengths.set(list.index, (end < p.window ? end : p.window) + (end > p.window));
}

// The chunk's last tokens, into the lists' windows. A warp per token: grid (the tokens / 4, lists).
template <class T>
__device__ void window(Global<const T> k, Global<const T> keys, Global<const T> values, const CacheState<T>& state,
                       const CacheParams& p, const ChunkParams& c) {
  CacheList<T> list(p, state, blockIdx.y);
  Tail tail(p);
  unsigned tokens = p.sizes.tokens, count = tokens < p.window ? tokens : p.window, i = warp_pair();
  if (i >= count) return;
  i += tokens - count;
  unsigned t = list.first + i;
  size_t kv_row = (size_t)list.list.batch * p.sizes.kv_heads + list.list.kv_head;
  size_t from = row_of(tail, c, kv_row, tail.held + i), slot = list.index * (p.window + 1) + t % p.window;
  WarpRow key, value;
  key.load(keys, from, list.dim), value.load(values, from, list.value_dim());
  key.store(state.local_k, slot * list.dim, list.dim);
  value.store(state.local_v, slot * list.value_dim(), list.value_dim());
  if (p.fold == MEAN && threadIdx.x % 32 == 0) state.local_ln.set(slot, 0.0f);
  if (!p.observes) return;
  key.load(k, p.k.at(list.list.batch, list.list.kv_head, i), list.dim);
  key.store(list.observed().keys, (size_t)(p.sinks + t % p.window) * list.dim, list.dim);
}

#define CHUNK_APPEND(suffix, T)                                                                                       \
  KERNEL chunk_rows_##suffix(Global<const T> k, Global<const T> v, Global<const T> local_k, Global<const T> local_v,  \
                             Global<T> keys, Global<T> values, CacheParams p, ChunkParams c) {                        \
    rows(k, v, local_k, local_v, keys, values, p, c);                                                                 \
  }                                                                                                                   \
  KERNEL chunk_pairs_##suffix(Global<const T> q, Global<const T> k, Global<const float> tests,                        \
                              Global<const float> bias, Global<const uint8_t> own, Global<uint8_t> out,               \
                              CACHE_STATE(T), CacheParams p) {                                                        \
    pairs(q, k, tests, bias, own, out, STATE(T), p);                                                                  \
  }                                                                                                                   \
  KERNEL chunk_given_##suffix(Global<const float> tests, Global<const float> scores, Global<uint8_t> out,             \
                              CACHE_STATE(T), CacheParams p) {                                                        \
    given(tests, scores, out, STATE(T), p);                                                                           \
  }                                                                                                                   \
  KERNEL chunk_weigh_##suffix(Global<const T> q, Global<const T> k, Global<float> weights, Global<float> scratch,     \
                              CACHE_STATE(T), CacheParams p) {                                                        \
    weigh(q, k, weights, scratch, STATE(T), p);                                                                       \
  }                                                                                                                   \
  KERNEL chunk_settle_##suffix(Global<const T> v, Global<const float> tests, Global<const float> weights,             \
                               Global<float> sums, Global<float> value_norms, Global<uint8_t> out, CACHE_STATE(T),    \
                               CacheParams p) {                                                                       \
    settle(v, tests, weights, sums, value_norms, out, STATE(T), p);                                                   \
  }                                                                                                                   \
  KERNEL chunk_chains_##suffix(Global<const T> keys, Global<const T> values, Global<const uint8_t> tail,              \
                               Global<const uint32_t> before, Global<T> edge_k, Global<T> edge_v,                     \
                               Global<float> edge_ln, Global<float> open_k, Global<float> open_v,                     \
                               Global<uint32_t> open_sizes, Global<T> open_previous_k, Global<T> open_previous_v,     \
                               CACHE_STATE(T), CacheParams p, ChunkParams c) {                                        \
    chains(keys, values, tail, before, Edges<T>{edge_k, edge_v, edge_ln},                                             \
           OpenChain<T>{open_k, open_v, open_sizes, open_previous_k, open_previous_v}, STATE(T), p, c);               \
  }                                                                                                                   \
  KERNEL chunk_close_##suffix(Global<const T> q, Global<const T> k, Global<const float> tests,                        \
                              Global<const float> scores, Global<const uint8_t> tail, Global<const uint32_t> before,  \
                              Global<const float> sums, Global<const float> value_norms, CACHE_STATE(T),              \
                              CacheParams p) {                                                                        \
    close(q, k, tests, scores, tail, before, sums, value_norms, STATE(T), p);                                         \
  }                                                                                                                   \
  KERNEL chunk_window_##suffix(Global<const T> k, Global<const T> keys, Global<const T> values, CACHE_STATE(T),       \
                               CacheParams p, ChunkParams c) {                                                        \
    window(k, keys, values, STATE(T), p, c);                                                                          \
  }
FOR_EACH_DTYPE(CHUNK_APPEND)

MODULE(chunk, ENTRIES(chunk_rows) ENTRIES(chunk_pairs) ENTRIES(chunk_given) ENTRIES(chunk_weigh)
                  ENTRIES(chunk_settle) ENTRIES(chunk_chains) ENTRIES(chunk_close) ENTRIES(chunk_window))
