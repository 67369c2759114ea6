// The inputs of attention over a later chunk: far columns out of the lists' pages, how many of them each row sees, and
// queries. chunk.cu says how these fit together.
#include "cache/pages.cuh"
#include "lib/cosine.cuh"

// Copies the closed chains that the chunk's first row sees to (batch * lists, capacity, column_dim), their tokens and
// ln n to (batch * lists, capacity). A warp per entry in turn: grid (any, lists).
template <class T>
__device__ void far(Global<const uint64_t> table, Global<const uint32_t> lengths, Global<const uint32_t> starts,
                    Global<T> keys, Global<T> values, Global<float> ln, Global<uint32_t> tokens, const CacheParams& p,
                    const ChunkParams& c) {
  size_t list = blockIdx.y;
  unsigned dim = p.sizes.head_dim, start = p.slide != NO_SLIDE ? starts[list] : 0, length = lengths[list];
  Pages<T> pages{table + list * p.pages, dim, p.value_dim, p.fold == MEAN, p.code};
  for (unsigned entry = start + warp_pair(); entry < length; entry += gridDim.x * 4) {
    size_t to = list * c.capacity + entry - start;
    WarpRow key, value;
    pages.load(entry, key, value);
    key.store(keys, to * p.column_dim, p.column_dim), value.store(values, to * p.column_dim, p.column_dim);
    if (threadIdx.x % 32 != 0) continue;
    tokens.set(to, pages.token(entry));
    if (p.fold == MEAN) ln.set(to, pages.ln(entry));
  }
}

// far_before of attention, (batch * lists, tokens + 1): how many of these far columns end before each token. A thread
// per token: grid (tokens / 128 + 1, lists).
KERNEL chunk_before(Global<const uint32_t> tokens, Global<const uint32_t> lengths, Global<const uint32_t> starts,
                    Global<uint32_t> before, CacheParams p, ChunkParams c) {
  unsigned t = blockIdx.x * 128 + threadIdx.x;
  if (t > c.tokens) return;
  size_t list = blockIdx.y;
  unsigned first = p.first - c.lead + t, from = 0, to = lengths[list] - (p.slide != NO_SLIDE ? starts[list] : 0);
  while (from < to) {
    unsigned middle = (from + to) / 2;
    if (tokens[list * c.capacity + middle] < first) from = middle + 1;
    else to = middle;
  }
  before.set(list * (c.tokens + 1) + t, from);
}

// The chunk's queries, as attention reads them, to (batch * heads, tokens, column_dim). `bits`: those of the tail under
// pair sums, which add the query before to a row that its token is folded into. A warp per row: grid (new tokens / 4,
// batch * heads).
template <class T>
__device__ void queries(Global<const T> q, Global<const T> last_queries, Global<const uint8_t> bits, Global<T> to,
                        const CacheParams& p, const ChunkParams& c) {
  unsigned i = warp_pair(), batch = blockIdx.y / p.sizes.heads, head = blockIdx.y % p.sizes.heads,
           dim = p.sizes.head_dim;
  if (i >= p.sizes.tokens) return;
  WarpRow row, before;
  row.load(q, p.q.at(batch, head, i), dim);
  unsigned held = p.first < p.window + 1 ? p.first : p.window + 1;
  if (bits && bits[(size_t)blockIdx.y * (held + p.sizes.tokens - 1) + held + i - 1]) {
    if (i > 0) before.load(q, p.q.at(batch, head, i - 1), dim);
    else before.load(last_queries, (size_t)blockIdx.y * dim, dim);
    row.add(before);
  }
  row.store(to, ((size_t)blockIdx.y * c.tokens + c.lead + i) * p.column_dim, p.column_dim);
}

#define CHUNK_ATTEND(suffix, T)                                                                                       \
  KERNEL chunk_far_##suffix(Global<const uint64_t> table, Global<const uint32_t> lengths,                             \
                            Global<const uint32_t> starts, Global<T> keys, Global<T> values, Global<float> ln,        \
                            Global<uint32_t> tokens, CacheParams p, ChunkParams c) {                                  \
    far(table, lengths, starts, keys, values, ln, tokens, p, c);                                                      \
  }                                                                                                                   \
  KERNEL chunk_queries_##suffix(Global<const T> q, Global<const T> last_queries, Global<const uint8_t> bits,          \
                                Global<T> to, CacheParams p, ChunkParams c) {                                         \
    queries(q, last_queries, bits, to, p, c);                                                                         \
  }
FOR_EACH_DTYPE(CHUNK_ATTEND)

MODULE(chunk_attend, ENTRIES(chunk_far) ENTRIES(chunk_queries) ENTRY(chunk_before))
