// Folds keys and values (see "Attention" in params.cuh for the buffers), and maps gradients back to raw tokens. By
// default a group of lanes per token: 4 warps a block, grid (tokens / (128 / lanes), batch * lists). Under `Mean` a
// warp walks along a chain; otherwise rows are independent, and a warp takes several if they fit.
#include "lib/cosine.cuh"
#include "lib/hw.cuh"
#include "lib/warp_row.cuh"

// The token of this thread, and the lanes that share it.
struct TokenLanes {
  Lanes lanes;
  unsigned token;

  __device__ __forceinline__ TokenLanes(const FoldParams& p, bool chains)
      : lanes(chains && p.fold == MEAN ? Lanes() : Lanes(p.sizes.head_dim)),
        token((blockIdx.x * blockDim.x + threadIdx.x) / lanes.count) {}
};

// The merge bits of a list, which are those of its first query head.
struct ListBits {
  Global<const uint8_t> bits;
  unsigned pairs;

  __device__ __forceinline__ ListBits(Global<const uint8_t> all, const Sizes& sizes, const List& list)
      : bits(all + ((size_t)list.batch * sizes.heads + list.first_head) * (sizes.tokens - 1)),
        pairs(sizes.tokens - 1) {}
  __device__ __forceinline__ bool hidden(unsigned t) const { return t < pairs && bits[t]; }
  // Whether the token before is folded into t.
  __device__ __forceinline__ bool joined(unsigned t) const { return t > 0 && bits[t - 1]; }
};

// Writes far_index (tokens that stay, then the hidden ones from the last to the first) and far_before (how many tokens
// before each one stay). One block of SCAN_WARPS warps per list. A warp takes SCAN_EACH * 32 neighbouring tokens, and a
// lane one of each 32, so that reads and writes are contiguous.
constexpr unsigned SCAN_WARPS = 32, SCAN_EACH = 4;

SHARED_BYTES(fold_scan, SCAN_WARPS * 4)
KERNEL fold_scan(Global<const uint8_t> all_bits, Global<uint32_t> far_index, Global<uint32_t> far_before,
                 FoldParams p) {
  hw::let_next_start();
  hw::wait_for_previous();
  Shared<uint32_t> kept_in = shared_memory<uint32_t>(0, SCAN_WARPS);
  List list(p.sizes, blockIdx.x);
  ListBits bits(all_bits, p.sizes, list);
  unsigned tokens = p.sizes.tokens, lane = threadIdx.x % 32, warp = threadIdx.x / 32, before = 0;
  size_t index = (size_t)blockIdx.x * tokens;
  for (unsigned base = 0; base < tokens; base += SCAN_WARPS * 32 * SCAN_EACH) {
    unsigned first = base + warp * 32 * SCAN_EACH + lane, kept[SCAN_EACH], sum = 0;
    bool hidden[SCAN_EACH];
#pragma unroll
    for (unsigned i = 0; i < SCAN_EACH; i++) hidden[i] = bits.hidden(first + i * 32);
#pragma unroll
    for (unsigned i = 0; i < SCAN_EACH; i++) {
      kept[i] = __ballot_sync(0xffffffffu, first + i * 32 < tokens && !hidden[i]);
      sum += __popc(kept[i]);
    }
    if (lane == 0) kept_in.set(warp, sum);
    __syncthreads();
    unsigned column = before;
#pragma unroll
    for (unsigned w = 0; w < SCAN_WARPS; w++) {
      unsigned count = kept_in[w];
      if (w < warp) column += count;
      before += count;
    }
#pragma unroll
    for (unsigned i = 0; i < SCAN_EACH; i++) {
      unsigned t = first + i * 32, mine = column + __popc(kept[i] & ((1u << lane) - 1));
      column += __popc(kept[i]);
      if (t >= tokens) continue;
      far_before.set(index + blockIdx.x + t, mine);
      far_index.set(index + (hidden[i] ? tokens - 1 - (t - mine) : mine), t);
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) far_before.set(index + blockIdx.x + tokens, before);
}

template <class T> struct FoldOutputs {
  Global<T> far_k, far_v, folded_k, folded_v;
  Global<float> far_ln, folded_ln;
};

// Writes one folded token.
template <class T>
__device__ void write_folded(WarpRow key, WarpRow value, unsigned t, unsigned size, bool hidden, Lanes lanes,
                             Global<const uint32_t> far_before, const FoldOutputs<T>& out, const FoldParams& p) {
  WarpRow::quarantine<T>(key, value, lanes);
  if (t >= p.sizes.tokens) return;
  unsigned tokens = p.sizes.tokens, dim = p.sizes.head_dim;
  size_t list = (size_t)blockIdx.y * tokens;
  if (p.fold != DROP) {
    key.store(out.folded_k, (list + t) * dim, dim, lanes);
    value.store(out.folded_v, (list + t) * dim, dim, lanes);
  }
  size_t column = list + far_before[list + blockIdx.y + t];
  if (!hidden) {
    key.store(out.far_k, column * dim, dim, lanes);
    value.store(out.far_v, column * dim, dim, lanes);
  }
  if (p.fold == MEAN && lanes.lane == 0) {
    float ln = logf((float)size);
    out.folded_ln.set(list + t, ln);
    if (!hidden) out.far_ln.set(column, ln);
  }
}

// Folds, and gathers far columns. Under `Mean` the warp of a chain's first token walks along the chain. Otherwise each
// token is independent, and lanes past the last token come along to the warp's meeting point.
template <class T>
__device__ void gather(Global<const T> k, Global<const T> v, Global<const uint8_t> all_bits,
                       Global<const uint32_t> far_before, const FoldOutputs<T>& out, const FoldParams& p) {
  TokenLanes own(p, true);
  Lanes lanes = own.lanes;
  unsigned t = own.token, dim = p.sizes.head_dim, tokens = p.sizes.tokens;
  List list(p.sizes, blockIdx.y);
  ListBits bits(all_bits, p.sizes, list);
  if (p.fold == MEAN && (t >= tokens || bits.joined(t))) return;
  WarpRow key, value, other;
  auto read = [&](WarpRow& row, Global<const T> from, const Rows& rows, unsigned t) {
    row.load(from, rows.at(list.batch, list.kv_head, t), dim, lanes);
  };
  unsigned there = t < tokens ? t : tokens - 1;
  if (p.fold != DROP || !bits.hidden(there)) {
    read(key, k, p.k, there);
    read(value, v, p.v, there);
  }
  if (p.fold == PAIR_SUM && bits.joined(there)) {
    read(other, k, p.k, there - 1);
    key.add(other);
    read(other, v, p.v, there - 1);
    value.add(other);
  }
  for (unsigned size = 1;; size++, t++) {
    bool hidden = bits.hidden(t);
    write_folded(key, value, t, size, hidden, lanes, far_before, out, p);
    if (p.fold != MEAN || !hidden) return;
    read(other, k, p.k, t + 1);
    key.running_mean(other, (float)size);
    read(other, v, p.v, t + 1);
    value.running_mean(other, (float)size);
  }
}

// Queries (batch, heads, N, D), each plus the one before if that is hidden. Lists are query heads.
template <class T>
__device__ void fold_queries(Global<const T> q, Global<const uint8_t> all_bits, Global<T> out, const FoldParams& p) {
  TokenLanes own(p, false);
  unsigned t = own.token, dim = p.sizes.head_dim;
  if (t >= p.sizes.tokens) return;
  List list(p.sizes, blockIdx.y);
  ListBits bits(all_bits, p.sizes, list);
  WarpRow row, left;
  row.load(q, p.q.at(list.batch, list.first_head, t), dim, own.lanes);
  if (bits.joined(t)) {
    left.load(q, p.q.at(list.batch, list.first_head, t - 1), dim, own.lanes);
    row.add(left);
  }
  row.store(out, ((size_t)blockIdx.y * p.sizes.tokens + t) * dim, dim, own.lanes);
}

// --- Gradients ------------------------------------------------------------------------------------------------------

// Gradients of far columns and of folded tokens, (batch * lists, N, D), with the bits and counts that locate a token's.
struct FoldedGradients {
  Global<const float> far, folded;
  Global<const uint8_t> bits;
  Global<const uint32_t> far_before;

  // The gradient of a folded token: of its edge column, plus that of its far column if it is not hidden. `list`: batch
  // * lists + list.
  __device__ __forceinline__ void load(WarpRow& row, size_t list, unsigned t, bool hidden, Lanes lanes,
                                       const FoldParams& p) const {
    unsigned tokens = p.sizes.tokens, dim = p.sizes.head_dim;
    row.load(folded, (list * tokens + t) * dim, dim, lanes);
    if (hidden) return;
    WarpRow column;
    column.load(far, (list * tokens + far_before[list * (tokens + 1) + t]) * dim, dim, lanes);
    row.add(column);
  }

  // The gradient of a raw token unless the fold is `Mean`: its own folded token's, plus the next one's if it is added
  // to that.
  __device__ __forceinline__ void load_raw(WarpRow& sum, size_t list, unsigned t, Lanes lanes,
                                           const FoldParams& p) const {
    ListBits own(bits, p.sizes, List(p.sizes, list));
    load(sum, list, t, own.hidden(t), lanes, p);
    if (p.fold != PAIR_SUM || !own.hidden(t)) return;
    WarpRow next;
    load(next, list, t + 1, own.hidden(t + 1), lanes, p);
    sum.add(next);
  }
};

// The transpose of `Mean`: gradients of far and folded columns to gradients of raw tokens, (batch * lists, N, D). The
// warp of a chain's first token walks along it from its end.
KERNEL fold_unfold(Global<const float> far, Global<const float> folded, Global<const uint8_t> all_bits,
                   Global<const uint32_t> far_before, Global<float> out, FoldParams p) {
  TokenLanes own(p, true);
  Lanes lanes = own.lanes;
  unsigned first = own.token, tokens = p.sizes.tokens, dim = p.sizes.head_dim;
  if (first >= tokens) return;
  List list(p.sizes, blockIdx.y);
  ListBits bits(all_bits, p.sizes, list);
  FoldedGradients gradients{far, folded, all_bits, far_before};
  size_t start = (size_t)blockIdx.y * tokens;
  WarpRow sum, row;
  if (bits.joined(first)) return;
  unsigned last = first;
  while (bits.hidden(last)) last++;
  // F[t] is the mean of the chain up to t: each token has a share of 1/n[t] in it, and so in every later F[t].
  sum.fill(0.0f);
  for (unsigned t = last + 1; t-- > first;) {
    gradients.load(row, blockIdx.y, t, bits.hidden(t), lanes, p);
    row.scale(1.0f / (float)(t - first + 1));
    sum.add(row);
    sum.store(out, (start + t) * dim, dim, lanes);
  }
}

// Adds up the gradients of a KV head's lists into (batch, kv_heads, N, D). Gradients of columns come as `unfolded` (raw
// tokens, (batch * lists, N, D), for `Mean`) or from `gradients`; those of near tokens are (batch * lists, N, D). Each
// may be absent. The grid has batch * kv_heads in place of the lists.
template <class T>
__device__ void reduce(Global<const float> unfolded, const FoldedGradients& gradients, Global<const float> near,
                       Global<T> out, const FoldParams& p) {
  TokenLanes own(p, false);
  unsigned t = own.token, tokens = p.sizes.tokens, dim = p.sizes.head_dim;
  if (t >= tokens) return;
  unsigned lists = p.sizes.lists / p.sizes.kv_heads;
  WarpRow sum, row;
  sum.fill(0.0f);
  for (unsigned i = 0; i < lists; i++) {
    size_t list = (size_t)blockIdx.y * lists + i, at = (list * tokens + t) * dim;
    if (unfolded) {
      row.load(unfolded, at, dim, own.lanes);
      sum.add(row);
    } else if (gradients.far) {
      gradients.load_raw(row, list, t, own.lanes, p);
      sum.add(row);
    }
    if (near) {
      row.load(near, at, dim, own.lanes);
      sum.add(row);
    }
  }
  sum.store(out, ((size_t)blockIdx.y * tokens + t) * dim, dim, own.lanes);
}

// Gradients of folded queries, f32 (batch, heads, N, D), to those of raw queries. Lists are query heads; `all_bits` is
// absent if queries are not folded.
template <class T>
__device__ void unfold_queries(Global<const float> folded, Global<const uint8_t> all_bits, Global<T> out,
                               const FoldParams& p) {
  hw::let_next_start();
  hw::wait_for_previous();
  TokenLanes own(p, false);
  unsigned t = own.token, dim = p.sizes.head_dim;
  if (t >= p.sizes.tokens) return;
  List list(p.sizes, blockIdx.y);
  size_t at = ((size_t)blockIdx.y * p.sizes.tokens + t) * dim;
  WarpRow sum, right;
  sum.load(folded, at, dim, own.lanes);
  if (all_bits && ListBits(all_bits, p.sizes, list).hidden(t)) {
    right.load(folded, at + dim, dim, own.lanes);
    sum.add(right);
  }
  sum.store(out, at, dim, own.lanes);
}

#define FOLD(suffix, T)                                                                                              \
  KERNEL fold_gather_##suffix(Global<const T> k, Global<const T> v, Global<const uint8_t> bits,                      \
                              Global<const uint32_t> far_before, Global<T> far_k, Global<T> far_v,                   \
                              Global<float> far_ln, Global<T> folded_k, Global<T> folded_v, Global<float> folded_ln, \
                              FoldParams p) {                                                                        \
    gather(k, v, bits, far_before, FoldOutputs<T>{far_k, far_v, folded_k, folded_v, far_ln, folded_ln}, p);          \
  }                                                                                                                  \
  KERNEL fold_queries_##suffix(Global<const T> q, Global<const uint8_t> bits, Global<T> out, FoldParams p) {         \
    fold_queries(q, bits, out, p);                                                                                   \
  }                                                                                                                  \
  KERNEL fold_reduce_##suffix(Global<const float> unfolded, Global<const float> far, Global<const float> folded,     \
                              Global<const uint8_t> bits, Global<const uint32_t> far_before, Global<const float> near, \
                              Global<T> out, FoldParams p) {                                                         \
    reduce(unfolded, FoldedGradients{far, folded, bits, far_before}, near, out, p);                                  \
  }                                                                                                                  \
  KERNEL fold_unfold_queries_##suffix(Global<const float> folded, Global<const uint8_t> bits, Global<T> out,         \
                                      FoldParams p) {                                                                \
    unfold_queries(folded, bits, out, p);                                                                            \
  }
FOR_EACH_DTYPE(FOLD)

MODULE(fold, ENTRY(fold_scan) ENTRIES(fold_gather) ENTRIES(fold_queries) ENTRY(fold_unfold) ENTRIES(fold_reduce)
                 ENTRIES(fold_unfold_queries))
