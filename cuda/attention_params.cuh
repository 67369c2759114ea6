// What the attention kernels are given; src/cuda/attention.rs mirrors these structs and both sides assert their sizes.
//
// A list is what shares far columns: a KV head where decisions are per KV head, else a query head.
#pragma once

#include <stdint.h>

// Sizes, strides (in elements; the last axis is contiguous) and options of one call.
struct AttentionParams {
    int64_t q_strides[3];  // batch, head, token
    int64_t k_strides[3];
    int64_t v_strides[3];
    int64_t bias_strides[4];  // batch, head, row, column; 0 where it broadcasts
    uint64_t dropout_cut;     // a Philox word below this is dropped; 0 without dropout
    uint32_t batch;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t lists;     // per batch row: kv_heads or heads
    uint32_t tokens;    // N
    uint32_t capacity;  // far columns that a list has room for
    uint32_t dim;       // D
    uint32_t window;
    uint32_t causal;  // 0 or 1
    uint32_t dense;   // 1: nothing is hidden anywhere, so raw keys and values are the columns
    uint32_t dropout_key[2];
    float scale;         // |scale| * log2(e): logits are in base 2
    float scale_sign;    // 1 or -1
    float dropout_scale;  // 1 / (1 - p)
    uint32_t reserved;
};

static_assert(sizeof(AttentionParams) == 176, "mirrored by src/cuda/attention.rs");
