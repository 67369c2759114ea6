// The structs that kernels take by value: the same fields in the same order as in src/cuda/params.rs, which asserts the
// same sizes. Only 4-byte and 8-byte fields, the 8-byte ones first: no padding.
#pragma once

#include "kernel.cuh"

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

static_assert(sizeof(Rows) == 32 && sizeof(Sizes) == 24, "as in src/cuda/params.rs");

// --- Decisions ---

// --- Fold ---

// --- Loss ---

// --- Attention ---
