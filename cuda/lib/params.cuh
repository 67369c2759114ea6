// The structs that kernels take by value: the same fields in the same order as in src/cuda/params.rs, which asserts the
// same sizes. Only 4-byte and 8-byte fields, the 8-byte ones first: no padding.
#pragma once

#include "lib/kernel.cuh"

// Where row (batch, head, token) of q, k or v starts: offset + batch * batch_stride + head * head_stride +
// token * token_stride, in elements. The last axis is contiguous.
struct Rows {
  uint64_t offset, batch_stride, head_stride, token_stride;

  __device__ __forceinline__ size_t at(unsigned batch, unsigned head, unsigned token) const {
    return offset + batch * batch_stride + head * head_stride + token * token_stride;
  }
};

// The sizes of one call.
struct Sizes {
  unsigned batch, heads, kv_heads, tokens, head_dim;
  // Lists of columns per batch row: heads or kv_heads.
  unsigned lists;
};

// Where the bias of (batch, query head, row, token) is, in elements; a stride is 0 where the bias broadcasts.
struct BiasEntries {
  uint64_t offset, strides[4];

  __device__ __forceinline__ size_t at(unsigned batch, unsigned head, unsigned row, unsigned token) const {
    return offset + batch * strides[0] + head * strides[1] + row * strides[2] + token * strides[3];
  }
};

static_assert(sizeof(Rows) == 32 && sizeof(BiasEntries) == 40 && sizeof(Sizes) == 24, "as in src/cuda/params.rs");

// --- Decisions ---

// For decide.cu and loss.cu: one decision per list, on which all query heads of the list agree.
struct DecideParams {
  Rows q, k;
  // (B, H, N, N); only the causal rule reads it.
  BiasEntries bias;
  Sizes sizes;
  // 1: cos(k[t+1], k[t]); 0: cos(q[t+1], k[t]).
  unsigned key_key;
  unsigned max_merge_level, sinks;
  // The reference rule: how far its candidates reach.
  unsigned levels;
  // The bias starts with this row; earlier rows have none.
  unsigned first_row;
  unsigned reserved;
};

static_assert(sizeof(DecideParams) == 152, "as in src/cuda/params.rs");

// Strategy and threshold of every query head, (batch, heads, 2), if they are few; otherwise a buffer has them.
struct FewTests {
  float numbers[256];
};

static_assert(sizeof(FewTests) == 1024, "as in src/cuda/params.rs");

// One sweep of the reference rule; `heads` over all batch rows.
struct SweepParams {
  unsigned heads, pairs, levels, sweep;
};

static_assert(sizeof(SweepParams) == 16, "as in src/cuda/params.rs");

// Scores that the caller gives. `group`: query heads of a KV head; `decided`: tokens that have left the last row's
// window.
struct ScoreParams {
  unsigned group, tokens, sinks, decided;
};

static_assert(sizeof(ScoreParams) == 16, "as in src/cuda/params.rs");

struct ObservedParams {
  Rows q, k, v;
  Sizes sizes;
  unsigned window, sinks;
  float scale;
  // Query heads of a KV head.
  unsigned group;
};

static_assert(sizeof(ObservedParams) == 136, "as in src/cuda/params.rs");

// --- Fold ---

enum FoldKind : unsigned { PAIR_SUM = 0, MEAN = 1, DROP = 2 };

struct FoldParams {
  Rows q, k, v;
  Sizes sizes;
  // A FoldKind.
  unsigned fold;
  unsigned reserved;
};

static_assert(sizeof(FoldParams) == 128, "as in src/cuda/params.rs");

// --- Loss ---

// The loss's other kernels take DecideParams.
struct TotalParams {
  unsigned blocks;
};

static_assert(sizeof(TotalParams) == 4, "as in src/cuda/params.rs");

// --- Attention ---

// A list has far columns of its own: it is a KV head where decisions are per KV head, else a query head. Kernels read
// these buffers of a list, besides q (already folded if the fold folds queries), k and v:
//
//   far_k, far_v        (batch * lists, capacity, D)  folded columns that are not hidden, in token order
//   far_ln              (batch * lists, capacity)     f32 ln n and a column bias; absent if all are 0
//   far_index           (batch * lists, N)            the token of each far column, then the hidden tokens from the
//                                                     last to the first
//   far_before          (batch * lists, N + 1)        how many far columns hold tokens before t
//   folded_k, folded_v  (batch * lists, N, D)         every token folded, hidden or not: the edge columns; absent if
//                                                     folding changes no token, and then raw tokens serve
//   folded_ln           (batch * lists, N)            f32 ln n; absent if all are 0
//
// If tokens are dropped and rows are causal, folding changes no token, and an edge is a raw token like a near one. A
// row then sees every token up to its own, except the hidden ones before its edge. So nothing has to be folded
// ("listed"): the columns are the tokens that stay, and a few of the hidden ones.
//
// A token whose key or value is not finite has a NaN key and a zero value in far_* and folded_*.
struct AttentionParams {
  Rows q, k, v;
  // (B, H, N, N)
  BiasEntries bias;
  // A Philox word below this is dropped; 0 without dropout.
  uint64_t dropout_cut;
  Sizes sizes;
  // Room for far columns in a list.
  unsigned capacity;
  unsigned window, causal;
  // 1: nothing is hidden anywhere. Raw keys and values are the columns, and no other buffer is read.
  unsigned dense;
  unsigned dropout_key[2];
  // scale * log2(e), split into magnitude and sign: logits are in base 2.
  float scale, scale_sign;
  // 1 / (1 - p)
  float dropout_scale;
  // 1: columns are raw tokens by token lists; of the buffers above only far_index and far_before exist.
  unsigned listed;
  // c * log2(e) of a softcap; 0 without one.
  float softcap;
  // L of a sliding window: row i sees columns of tokens above i - L. The number of tokens if there is none. Below the
  // number of tokens it is above `window`, so it cuts far columns alone.
  unsigned slide;
  // Rows before it have queries of zeros, and their results are not read: blocks of them are left out. The bias starts
  // with this row.
  unsigned first_row;
  // Dropout counts heads over all batch rows, rows and tokens from these on.
  unsigned drawn_from[3];
};

static_assert(sizeof(AttentionParams) == 232, "as in src/cuda/params.rs");

// For forward_spread_nan; `heads` over all batch rows.
struct SpreadParams {
  unsigned tokens, head_dim, block_rows, heads;
};

static_assert(sizeof(SpreadParams) == 16, "as in src/cuda/params.rs");

// For decode_step.cuh, besides CacheParams. `rows`: query heads over all batch rows; `parts`: splits of the far
// columns, and one more for local ones.
struct DecodeParams {
  unsigned rows, parts, splits;
  // 1: a new token is appended first.
  unsigned appends;
  // scale * log2(e)
  float scale;
};

static_assert(sizeof(DecodeParams) == 20, "as in src/cuda/params.rs");

// --- Cache ---

// The first token that the row of token `row` sees under a sliding window of `slide` tokens, NO_SLIDE for none.
constexpr unsigned NO_SLIDE = 0xffffffffu;
__device__ __forceinline__ unsigned first_seen(unsigned slide, unsigned row) {
  return row + 1 > slide ? row + 1 - slide : 0;
}

// How closed chains are stored: as T, or in 8 bits by one of two codes (cache/codes.cuh).
enum PageCode : unsigned { AS_T = 0, CODE_I8 = 1, CODE_F8E4M3 = 2 };

// For cache_append: sizes.tokens new tokens after `first` earlier ones.
struct CacheParams {
  Rows q, k, v;
  // (B, H, new tokens, tokens seen with them); decisions by the causal rule read it.
  BiasEntries bias;
  Sizes sizes;
  unsigned key_key, max_merge_level, sinks;
  unsigned window;
  // A FoldKind.
  unsigned fold;
  // Pages that a list has room for in its row of the table: cache/pages.cuh.
  unsigned pages;
  unsigned first;
  // 1: observed mass decides, with this softmax scale.
  unsigned observes;
  float scale;
  // L of the sliding window, or NO_SLIDE.
  unsigned slide;
  // The score of number i of the new tokens in list l: `scores_first` + l * `scores_stride` + i.
  unsigned scores_first, scores_stride;
  // The size of a value, and of the rows of a first chunk's columns.
  unsigned value_dim, column_dim;
  // A PageCode.
  unsigned code;
  unsigned unused;
};

static_assert(sizeof(CacheParams) == 224, "as in src/cuda/params.rs");

// For chunk.cu, besides CacheParams: attention over a later chunk numbers `tokens` tokens and rows, and the chunk's are
// those from `lead` on. Nothing before the tail is read as a raw token. A list has room for `capacity` far columns.
struct ChunkParams {
  unsigned lead, tokens, capacity;
};

static_assert(sizeof(ChunkParams) == 12, "as in src/cuda/params.rs");

// For cache_attend: the row of token `last` over all that the cache holds.
struct CacheAttendParams {
  // (B, H, rows, tokens); this row is number 0.
  BiasEntries bias;
  // A Philox word below this is dropped; 0 without dropout.
  uint64_t dropout_cut;
  unsigned heads, lists, head_dim;
  // `pages` as in CacheParams.
  unsigned pages, window, last;
  unsigned dropout_key[2];
  // scale * log2(e)
  float scale;
  // 1 / (1 - p)
  float dropout_scale;
  // c * log2(e) of a softcap; 0 without one.
  float softcap;
  // L of the sliding window, or NO_SLIDE.
  unsigned slide;
  // The size of a value.
  unsigned value_dim;
  // Dropout counts heads over all batch rows, rows and tokens from these on.
  unsigned drawn_from[3];
  // 1: closed chains have sizes.
  unsigned sized;
  // A PageCode.
  unsigned code;
};

static_assert(sizeof(CacheAttendParams) == 120, "as in src/cuda/params.rs");

// For cache_pad: `rows` have `dim` numbers and become rows of `padded` numbers, (batch, heads, tokens, padded).
struct PadParams {
  Rows rows;
  unsigned heads, tokens, dim, padded;
};

static_assert(sizeof(PadParams) == 48, "as in src/cuda/params.rs");

// For cache_copy, in elements.
struct CopyParams {
  uint64_t to_offset, from_offset;
  unsigned from_stride, to_stride;
  unsigned count, unused;
};

static_assert(sizeof(CopyParams) == 32, "as in src/cuda/params.rs");
