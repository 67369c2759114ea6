// A KV cache's lists on the device: appending tokens, adopting a first chunk, restoring, truncating and copying lists.
// Closed chains lie in pages (pages.cuh).
// One warp per list appends tokens one after another (cache_list.cuh) and decides as decide.cu does, up to the rounding
// of a cosine.
#include "cache/cache_list.cuh"

template <class T>
__device__ void append(Global<const T> q, Global<const T> k, Global<const T> v, Global<const float> tests,
                       Global<const float> bias, Global<const float> scores, Global<T> queries,
                       const CacheState<T>& state, const CacheParams& p) {
  CacheList<T> list(p, state);
  if (list.first == SITS_OUT) return;
  bool merged = false;
  for (unsigned i = 0; i < p.sizes.tokens; i++) merged = list.take(q, k, v, tests, bias, scores, i);
  list.finish(state.lengths);
  list.slide(list.first + p.sizes.tokens);
  list.write_starts(state.starts);
  // With several tokens the query before the last is not at hand, and the caller asks for no folded queries.
  list.queries(q, queries, merged && p.sizes.tokens == 1);
}

// One warp per list: grid (batch * lists).
#define CACHE_APPEND(suffix, T)                                                                                   \
  KERNEL cache_append_##suffix(Global<const T> q, Global<const T> k, Global<const T> v, Global<const float> tests, \
                               Global<const float> bias, Global<const float> scores, Global<T> queries,           \
                               CACHE_STATE(T), CacheParams p) {                                                   \
    append(q, k, v, tests, bias, scores, queries, STATE(T), p);                                                   \
  }
FOR_EACH_DTYPE(CACHE_APPEND)

// Puts lists of `first` tokens under a sliding window. One warp per list.
#define CACHE_SLIDE(suffix, T)                                       \
  KERNEL cache_slide_##suffix(CACHE_STATE(T), CacheParams p) {       \
    CacheState<T> state = STATE(T);                                  \
    CacheList<T> list(p, state);                                     \
    list.slide(list.first);                                           \
    list.write_starts(state.starts);                                 \
  }
FOR_EACH_DTYPE(CACHE_SLIDE)

// --- A first chunk, whose decisions and folds are known --------------------------------------------------------------

// The columns that attention over a whole first chunk had: see "Attention" in params.cuh; merge bits are (batch, heads,
// N - 1).
template <class T> struct Chunk {
  Global<const T> k, v;
  Global<const uint8_t> all_bits;
  Global<const uint32_t> far_before;
  Global<const T> far_k, far_v;
  Global<const float> far_ln;

  // The first far token that a row after the chunk sees; an edge that is not full yet has none.
  __device__ unsigned first(const CacheParams& p) const {
    unsigned edge = p.sizes.tokens - 1 - p.window, seen = first_seen(p.slide, p.sizes.tokens);
    return p.slide == NO_SLIDE ? 0 : seen < edge ? seen : edge;
  }

  __device__ bool hidden(const CacheParams& p, const List& list, unsigned t) const {
    unsigned pairs = p.sizes.tokens - 1;
    return t < pairs && all_bits[((size_t)list.batch * p.sizes.heads + list.first_head) * pairs + t];
  }
};

// Folds the chain that token `t` ends, as if its tokens had come one after another.
template <class T> __device__ void fold_chain(const Chunk<T>& chunk, CacheList<T>& to, unsigned t) {
  const CacheParams& p = to.p;
  unsigned start = t;
  while (p.fold != DROP && start > 0 && chunk.hidden(p, to.list, start - 1)) {
    start--;
    // A pair sum reads one left neighbour only.
    if (p.fold == PAIR_SUM) break;
  }
  for (unsigned i = start; i <= t; i++) {
    WarpRow key, value;
    key.load(chunk.k, p.k.at(to.list.batch, to.list.kv_head, i), to.dim);
    value.load(chunk.v, p.v.at(to.list.batch, to.list.kv_head, i), to.value_dim());
    WarpRow::quarantine<T>(key, value);
    to.step(i > start, key, value);
  }
}

// The state that does not grow with the list: the open chain, the current run, and the list's length. One warp per
// list.
template <class T>
__device__ void adopt_state(Global<const T> q, const Chunk<T>& chunk, const CacheState<T>& state,
                            const CacheParams& p) {
  CacheList<T> to(p, state);
  const List& list = to.list;
  unsigned tokens = p.sizes.tokens, last = tokens - 1;
  auto row = [&](Global<const T> x, const Rows& rows, unsigned t, unsigned dim) {
    WarpRow found;
    found.load(x, rows.at(list.batch, list.kv_head, t), dim);
    return found;
  };
  if (tokens > p.window) {
    unsigned edge = last - p.window, first = chunk.first(p);
    size_t before = to.index * (tokens + 1);
    to.length = chunk.far_before[before + edge] - chunk.far_before[before + first];
    // The chains that a sliding window leaves start with the one that token `first` is in.
    to.kept_from = first;
    while (to.kept_from > 0 && chunk.hidden(p, list, to.kept_from - 1)) to.kept_from--;
    fold_chain(chunk, to, edge);
  }
  to.run_start = NO_RUN;
  for (unsigned t = last; t > 0 && chunk.hidden(p, list, t - 1); t--) to.run_start = t - 1;
  if (to.run_start != NO_RUN) row(chunk.k, p.k, to.run_start, to.dim).store(state.run_keys, to.row, to.dim);
  row(chunk.k, p.k, last, to.dim).store(state.last_keys, to.row, to.dim);
  to.finish(state.lengths);
  to.write_starts(state.starts);
  to.queries(q, Global<T>{}, false);
}

// Closed chains and the window's tokens. One warp per token.
template <class T>
__device__ void adopt_rows(const Chunk<T>& chunk, const CacheState<T>& state, const CacheParams& p) {
  unsigned t = blockIdx.x * 4 + threadIdx.x / 32, tokens = p.sizes.tokens, lane = threadIdx.x % 32,
           dim = p.sizes.head_dim, value_dim = p.value_dim;
  if (t >= tokens) return;
  List list(p.sizes, blockIdx.y);
  size_t index = blockIdx.y, ring = index * (p.window + 1);
  WarpRow key, value;
  if (t + p.window < tokens - 1 && !chunk.hidden(p, list, t) && t >= chunk.first(p)) {
    size_t before = index * (tokens + 1);
    unsigned column = chunk.far_before[before + t], skipped = chunk.far_before[before + chunk.first(p)];
    size_t from = index * tokens + column;
    if (p.code == AS_T) {
      key.load(chunk.far_k, from * p.column_dim, dim), value.load(chunk.far_v, from * p.column_dim, value_dim);
    } else {
      // Folded columns in T are rounded already.
      CacheList<T> to(p, state, index);
      fold_chain(chunk, to, t);
      key = to.chain_key, value = to.chain_value;
      WarpRow::quarantine<T>(key, value);
    }
    Pages<T> pages{state.table + index * p.pages, dim, value_dim, p.fold == MEAN, p.code};
    pages.put(column - skipped, key, value, t, p.fold == MEAN ? chunk.far_ln[from] : 0.0f);
  }
  if (t + p.window >= tokens) {
    size_t slot = ring + t % p.window;
    key.load(chunk.k, p.k.at(list.batch, list.kv_head, t), dim);
    value.load(chunk.v, p.v.at(list.batch, list.kv_head, t), value_dim);
    WarpRow::quarantine<T>(key, value);
    key.store(state.local_k, slot * dim, dim), value.store(state.local_v, slot * value_dim, value_dim);
    if (p.fold == MEAN && lane == 0) state.local_ln.set(slot, 0.0f);
  }
  if (lane == 0 && t + p.window + 2 >= tokens && t + 1 < tokens)
    state.bits.set(ring + t % (p.window + 1), chunk.hidden(p, list, t));
}

// Rounds the chunk's far columns to the codes of 8 bits, as its rows see them. One warp per token.
template <class T>
__device__ void round_columns(const Chunk<T>& chunk, Global<T> far_k, Global<T> far_v, const CacheState<T>& state,
                              const CacheParams& p) {
  unsigned t = blockIdx.x * 4 + threadIdx.x / 32, tokens = p.sizes.tokens;
  if (t >= tokens) return;
  CacheList<T> to(p, state, blockIdx.y);
  if (chunk.hidden(p, to.list, t)) return;
  fold_chain(chunk, to, t);
  WarpRow key = to.chain_key, value = to.chain_value;
  WarpRow::quarantine<T>(key, value);
  round_to_code<T>(p.code, key), round_to_code<T>(p.code, value);
  size_t at = (to.index * tokens + chunk.far_before[to.index * (tokens + 1) + t]) * p.column_dim;
  key.store(far_k, at, p.column_dim), value.store(far_v, at, p.column_dim);
}

// The masses that the chunk's last rows gave to the tokens of their windows, and the bits that the chunk's own
// decisions could not know yet. One warp per list; after adopt_rows.
template <class T>
__device__ void adopt_observed(Global<const T> q, const Chunk<T>& chunk, Global<const float> tests,
                               const CacheState<T>& state, const CacheParams& p) {
  CacheList<T> to(p, state);
  const List& list = to.list;
  Observed<T> mine = to.observed();
  unsigned tokens = p.sizes.tokens, window = p.window, dim = to.dim;
  auto key_of = [&](unsigned t) { return p.k.at(list.batch, list.kv_head, t); };
  auto value_of = [&](unsigned t) { return p.v.at(list.batch, list.kv_head, t); };
  for (unsigned t = 0; t < tokens; t++) {
    if (t >= p.sinks && t + window < tokens) t = tokens - window;
    WarpRow key, value;
    key.load(chunk.k, key_of(t), dim), value.load(chunk.v, value_of(t), to.value_dim());
    to.remember(mine, t, key, value);
  }
  // The oldest token to be decided has just left the last row's window.
  unsigned since = tokens - 1 + window / 2, first = since > window ? since - window : 0;
  for (unsigned row = first; row < tokens; row++) {
    __syncwarp();
    if (threadIdx.x == 0) mine.masses.set(row % window, 0.0f);
    __syncwarp();
    for (unsigned head = list.first_head; head < list.first_head + list.group; head++) {
      size_t query = p.q.at(list.batch, head, row);
      observe_row(row, p, mine.logits, mine.masses,
                  [&](unsigned t) { return lane_dot(q, query, chunk.k, key_of(t), dim); });
    }
    __syncwarp();
    if (row + 2 < tokens || row + 1 < window) continue;
    unsigned t = row + 1 - window;
    WarpRow value;
    value.load(chunk.v, value_of(t), to.value_dim());
    to.settle(mine, tests, t, value.norm());
  }
}

// The bits of the chunk's last tokens by given scores, which the chunk's own decisions could not know yet. One warp per
// list; after adopt_rows.
template <class T>
__device__ void adopt_given(Global<const float> tests, Global<const float> scores, const CacheState<T>& state,
                            const CacheParams& p) {
  CacheList<T> to(p, state);
  unsigned tokens = p.sizes.tokens, first = tokens > p.window + 1 ? tokens - p.window - 1 : 0;
  for (unsigned t = first + threadIdx.x; t < tokens; t += 32) to.hide(tests, t, to.score(scores, t));
}

#define CACHE_CHUNK(T)                                                                                            \
  Global<const T> k, Global<const T> v, Global<const uint8_t> all_bits, Global<const uint32_t> far_before,        \
      Global<const T> from_k, Global<const T> from_v, Global<const float> from_ln
#define CACHE_ADOPT(suffix, T)                                                                                    \
  KERNEL cache_adopt_state_##suffix(Global<const T> q, CACHE_CHUNK(T), CACHE_STATE(T), CacheParams p) {           \
    adopt_state(q, Chunk<T>{k, v, all_bits, far_before, from_k, from_v, from_ln}, STATE(T), p);                   \
  }                                                                                                               \
  KERNEL cache_adopt_rows_##suffix(CACHE_CHUNK(T), CACHE_STATE(T), CacheParams p) {                               \
    adopt_rows(Chunk<T>{k, v, all_bits, far_before, from_k, from_v, from_ln}, STATE(T), p);                       \
  }                                                                                                               \
  KERNEL cache_round_columns_##suffix(Global<const T> k, Global<const T> v, Global<const uint8_t> all_bits,        \
                                      Global<const uint32_t> far_before, Global<T> far_k, Global<T> far_v,        \
                                      CACHE_STATE(T), CacheParams p) {                                            \
    round_columns(Chunk<T>{k, v, all_bits, far_before, Global<const T>{}, Global<const T>{}, Global<const float>{}}, \
                  far_k, far_v, STATE(T), p);                                                                     \
  }                                                                                                               \
  KERNEL cache_adopt_observed_##suffix(Global<const T> q, CACHE_CHUNK(T), Global<const float> tests,              \
                                       CACHE_STATE(T), CacheParams p) {                                           \
    adopt_observed(q, Chunk<T>{k, v, all_bits, far_before, from_k, from_v, from_ln}, tests, STATE(T), p);         \
  }                                                                                                               \
  KERNEL cache_adopt_given_##suffix(Global<const float> tests, Global<const float> scores, CACHE_STATE(T),        \
                                    CacheParams p) {                                                              \
    adopt_given(tests, scores, STATE(T), p);                                                                      \
  }
FOR_EACH_DTYPE(CACHE_ADOPT)

// --- A cache that comes from the host, and one that goes back --------------------------------------------------------

// Closed chains of all lists, list after list: keys (entries, D), values (entries, Dv) and tokens. Those of list l
// start with entry firsts[l].
template <class T, class U> struct Entries {
  Global<T> keys, values;
  Global<U> tokens;
  Global<const uint32_t> firsts;
};

// Writes the closed chains that a list's rows see to `to`. A warp per entry in turn: grid (lists, any), 128 threads.
template <class T>
__device__ void gather(const Entries<T, uint32_t>& to, Global<const uint64_t> table, Global<const uint32_t> lengths,
                       Global<const uint32_t> starts, const CacheParams& p) {
  size_t list = blockIdx.x;
  unsigned warp = blockIdx.y * 4 + threadIdx.x / 32, dim = p.sizes.head_dim, value_dim = p.value_dim,
           start = p.slide != NO_SLIDE ? starts[list] : 0, length = lengths[list];
  Pages<T, false> pages{table + list * p.pages, dim, value_dim, p.fold == MEAN, AS_T};
  for (unsigned entry = start + warp; entry < length; entry += gridDim.y * 4) {
    size_t at = to.firsts[list] + entry - start;
    WarpRow key, value;
    pages.load(entry, key, value);
    key.store(to.keys, at * dim, dim), value.store(to.values, at * value_dim, value_dim);
    if (threadIdx.x % 32 == 0) to.tokens.set(at, pages.token(entry));
  }
}

// Copies the first `used[i]` entries of the page at address from[i] to the page at to[i]. A warp per entry: grid
// (pages, PAGE / 4), 128 threads.
template <class T>
__device__ void copy_page(Global<const uint64_t> from, Global<const uint64_t> to, Global<const uint32_t> used,
                          const CacheParams& p) {
  unsigned entry = blockIdx.y * 4 + threadIdx.x / 32, dim = p.sizes.head_dim;
  if (entry >= used[blockIdx.x]) return;
  bool sized = p.fold == MEAN;
  Pages<T, false> old{from + blockIdx.x, dim, p.value_dim, sized, AS_T},
      pages{to + blockIdx.x, dim, p.value_dim, sized, AS_T};
  WarpRow key, value;
  old.load(entry, key, value);
  pages.put(entry, key, value, old.token(entry), sized ? old.ln(entry) : 0.0f);
}

#define CACHE_PAGES(suffix, T)                                                                                    \
  KERNEL cache_gather_##suffix(Global<T> keys, Global<T> values, Global<uint32_t> tokens,                         \
                               Global<const uint32_t> firsts, Global<const uint64_t> table,                       \
                               Global<const uint32_t> lengths, Global<const uint32_t> starts, CacheParams p) {    \
    gather(Entries<T, uint32_t>{keys, values, tokens, firsts}, table, lengths, starts, p);                        \
  }                                                                                                               \
  KERNEL cache_copy_page_##suffix(Global<const uint64_t> from, Global<const uint64_t> to,                         \
                                  Global<const uint32_t> used, CacheParams p) {                                   \
    copy_page<T>(from, to, used, p);                                                                              \
  }
FOR_EACH_DTYPE(CACHE_PAGES)

// Writes closed chains into the lists' pages, and recomputes what a saved cache leaves out: local columns and their
// norms from raw rows, (lists, window, D) by slot, and the logarithms of chain sizes. A warp per local slot: grid
// (lists, (window + 1) / 4).
template <class T>
__device__ void restore(Global<const T> recent_k, Global<const T> recent_v,
                        const Entries<const T, const uint32_t>& closed, const CacheState<T>& state,
                        const CacheParams& p) {
  CacheList<T> to(p, state);
  unsigned slot = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, dim = to.dim;
  if (slot > p.window) return;
  size_t local = to.index * (p.window + 1) + slot, first = closed.firsts[to.index];
  // In 8 bits cache_restore_coded (coded.cu) writes closed chains.
  for (unsigned entry = slot; p.code == AS_T && entry < to.length; entry += p.window + 1) {
    WarpRow key, value;
    key.load(closed.keys, (first + entry) * dim, dim);
    value.load(closed.values, (first + entry) * to.value_dim(), to.value_dim());
    unsigned token = closed.tokens[first + entry], before = state.starts[to.lists() + to.index];
    if (entry > 0) before = closed.tokens[first + entry - 1] + 1;
    to.pages().put(entry, key, value, token, logf((float)(token + 1 - before)));
  }
  if (slot < p.window && slot < p.first) {
    size_t from = to.index * p.window + slot;
    WarpRow key, value;
    key.load(recent_k, from * dim, dim), value.load(recent_v, from * to.value_dim(), to.value_dim());
    float norm = value.norm();
    if (p.observes && lane == 0) to.observed().norms.set(slot, norm);
    WarpRow::quarantine<T>(key, value);
    key.store(state.local_k, local * dim, dim), value.store(state.local_v, local * to.value_dim(), to.value_dim());
    if (p.fold == MEAN && lane == 0) state.local_ln.set(local, 0.0f);
  }
  if (slot == p.window && p.first > p.window) to.write();
}

// Truncates a list from `first` tokens to `sizes.tokens`; its chains are single tokens. Tokens that have left the
// sliding window are gone, and no row sees them. One warp per list.
template <class T>
__device__ void truncate(const CacheState<T>& state, const CacheParams& p) {
  CacheList<T> list(p, state);
  unsigned seen = p.first, kept = p.sizes.tokens, window = p.window, dim = list.dim, value_dim = list.value_dim(),
           local = seen < window ? seen : window;
  size_t ring = list.index * (window + 1);
  // Token t: a closed chain, or the open one, which follows them.
  auto read = [&](WarpRow& key, WarpRow& value, unsigned t) {
    key = list.chain_key, value = list.chain_value;
    unsigned at = t - list.kept_from + list.start;
    if (t < list.kept_from || at >= list.length) return;
    list.pages().load(at, key, value);
  };
  WarpRow key, value;
  // Tokens that come back into the window. Their slots hold tokens that are cut off.
  for (unsigned t = kept > window ? kept - window : 0; t < kept && t + local < seen; t++) {
    size_t slot = ring + t % window;
    read(key, value, t);
    key.store(state.local_k, slot * dim, dim), value.store(state.local_v, slot * value_dim, value_dim);
  }
  unsigned length = list.start;
  if (kept > window) {
    unsigned edge = kept - 1 - window;
    if (edge > list.kept_from) length += edge - list.kept_from;
    read(key, value, edge);
    list.chain_key = key, list.chain_value = value, list.size = 1;
    list.write();
    key.store(state.chain_k, list.row, dim), value.store(state.chain_v, list.value_row(), value_dim);
    if (p.fold == PAIR_SUM) {
      key.store(state.previous_k, list.row, dim);
      value.store(state.previous_v, list.value_row(), value_dim);
    }
  }
  __syncwarp();
  if (threadIdx.x != 0) return;
  state.lengths.set(list.index, length);
  state.chain_sizes.set(list.index, 1);
  state.local_lengths.set(list.index, (kept < window ? kept : window) + (kept > window));
}

#define CACHE_MOVE(suffix, T)                                                                                     \
  KERNEL cache_restore_##suffix(Global<const T> recent_k, Global<const T> recent_v, Global<const T> closed_k,     \
                                Global<const T> closed_v, Global<const uint32_t> tokens,                          \
                                Global<const uint32_t> firsts, CACHE_STATE(T), CacheParams p) {                   \
    Entries<const T, const uint32_t> closed{closed_k, closed_v, tokens, firsts};                                  \
    restore(recent_k, recent_v, closed, STATE(T), p);                                                             \
  }                                                                                                               \
  KERNEL cache_truncate_##suffix(CACHE_STATE(T), CacheParams p) { truncate(STATE(T), p); }
FOR_EACH_DTYPE(CACHE_MOVE)

// Rows of other strides and sizes: numbers past `dim` become 0, or are left out. A warp per row: grid (tokens / 4,
// batch * heads).
template <class T> __device__ void pad(Global<const T> from, Global<T> to, const PadParams& p) {
  unsigned t = blockIdx.x * 4 + threadIdx.x / 32, head = blockIdx.y;
  if (t >= p.tokens) return;
  WarpRow row;
  row.load(from, p.rows.at(head / p.heads, head % p.heads, t), p.dim < p.padded ? p.dim : p.padded);
  row.store(to, ((size_t)head * p.tokens + t) * p.padded, p.padded);
}

#define CACHE_PAD(suffix, T) \
  KERNEL cache_pad_##suffix(Global<const T> from, Global<T> to, PadParams p) { pad(from, to, p); }
FOR_EACH_DTYPE(CACHE_PAD)

// Copies `count` numbers of each list, from list sources[i] (or i) to list i. The strides of the buffers may differ.
// Grid (lists, count / 256), 256 threads.
template <class T>
__device__ void copy(Global<const T> from, Global<const uint32_t> sources, Global<T> to, const CopyParams& p) {
  unsigned i = blockIdx.y * 256 + threadIdx.x, source = sources ? sources[blockIdx.x] : blockIdx.x;
  if (i >= p.count) return;
  size_t first = p.from_offset + (size_t)source * p.from_stride;
  to.set((size_t)blockIdx.x * p.to_stride + p.to_offset + i, from[first + i]);
}

#define CACHE_COPY(suffix, T)                                                                                         \
  KERNEL cache_copy_##suffix(Global<const T> from, Global<const uint32_t> sources, Global<T> to, CopyParams p) {      \
    copy(from, sources, to, p);                                                                                       \
  }
FOR_EACH_DTYPE(CACHE_COPY)
CACHE_COPY(u32, uint32_t)

MODULE(cache, ENTRIES(cache_append) ENTRIES(cache_slide) ENTRIES(cache_adopt_state) ENTRIES(cache_adopt_rows)
                  ENTRIES(cache_adopt_observed) ENTRIES(cache_adopt_given) ENTRIES(cache_restore)
                  ENTRIES(cache_round_columns) ENTRIES(cache_gather) ENTRIES(cache_copy_page)
                  ENTRIES(cache_truncate) ENTRIES(cache_pad) ENTRIES(cache_copy)
                  ENTRY(cache_copy_u32))
