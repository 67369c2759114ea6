// Shared by the kernels that walk columns in one pass (backward_fused.cuh, backward_wgmma.cuh): which columns a block
// owns, which rows see them, and where their gradients go.
#pragma once

#include "backward/backward_block.cuh"

// Where the gradients of columns go. `sums`: f32 sums that the fold's kernels map back to raw tokens. `done`: final
// gradients in T, if columns are tokens. If LISTED, both are indexed by token.
struct ColumnTarget {
    Global<float> sums;
    Global<uint16_t> done;
};

// A block's columns, at most COUNT. BY_LISTS (see params.cuh): columns are tokens that stay or, as `near`, hidden ones.
template <int COUNT, bool BY_LISTS>
struct OwnedColumns {
    static constexpr int COLUMNS = COUNT;
    static constexpr bool LISTED = BY_LISTS;
    // Four words a column: its token, the rows that see it (begin, end), and its ln n.
    static constexpr uint32_t WORDS = COLUMNS * 16;

    const AttentionParams& p;
    const BackwardTensors& x;
    bool near;
    uint32_t batch, kv_head;
    int64_t list;
    int first, count;
    hw::Tile words;

    // `unit`: batch * lists + list; `block`: which of its blocks of columns; `words_at`: byte offset of the columns'
    // words.
    SFA_DEVICE OwnedColumns(const AttentionParams& p, const BackwardTensors& x, uint32_t unit, uint32_t block,
                            bool is_near, uint32_t words_at)
        : p(p), x(x), near(is_near), list(unit), first(int(block) * COLUMNS) {
        int64_t tokens = p.sizes.tokens;
        int columns = near || p.dense ? int(tokens) : int(x.far_before[list * (tokens + 1) + tokens]);
        if (LISTED) {
            // Blocks of tokens that stay come first: they have the most rows.
            int stay_end = (columns + COLUMNS - 1) / COLUMNS * COLUMNS;
            near = first >= stay_end;
            if (near) first -= stay_end, columns = int(tokens) - columns;
        }
        count = min(COLUMNS, columns - first);
        batch = unit / p.sizes.lists;
        kv_head = unit % p.sizes.lists / (p.sizes.lists / p.sizes.kv_heads);
        words = hw::tile(words_at, WORDS);
    }

    SFA_DEVICE ColumnRows rows_of(int column) const {
        if constexpr (!LISTED) return ColumnRows(p, x.far_before, x.far_index, x.far_ln, list, column, near);
        int tokens = int(p.sizes.tokens);
        if (column >= first + count) return ColumnRows{tokens, tokens, tokens, 0};
        int token = int(x.far_index[list * p.capacity + (near ? tokens - 1 - column : column)]);
        int reach = int(near ? p.window + 1 : p.slide);
        return ColumnRows{token, max(token, int(p.first_row)), min(tokens, token + reach), 0};
    }

    // Writes the columns' words and starts the copies of their keys and values, in layout L. For THREADS threads, which
    // meet at `meet`.
    template <class L, int THREADS, class Meet>
    SFA_DEVICE void load_columns(const hw::Tile& k, const hw::Tile& v, const Meet& meet) const {
        uint32_t dim = p.sizes.head_dim;
        if (threadIdx.x < COLUMNS) {
            ColumnRows mine = rows_of(first + threadIdx.x);
            uint4 word{uint32_t(mine.token), uint32_t(mine.begin), uint32_t(mine.end), __float_as_uint(mine.addend)};
            hw::store(words, threadIdx.x * 16, word);
        }
        if constexpr (LISTED) {
            meet();
            int64_t key = p.k.at(batch, kv_head, 0), value = p.v.at(batch, kv_head, 0);
            TokensInMemory tokens{words, 16};
            load_listed_rows<L, COLUMNS, THREADS, false>(k, x.k, key, uint32_t(p.k.token_stride), tokens, count, dim);
            load_listed_rows<L, COLUMNS, THREADS, false>(v, x.v, value, uint32_t(p.v.token_stride), tokens, count, dim);
            return;
        }
        bool raw = near || p.dense;
        int64_t index = (list * p.capacity + first) * dim;
        int64_t key = raw ? p.k.at(batch, kv_head, first) : index, value = raw ? p.v.at(batch, kv_head, first) : index;
        int64_t key_stride = raw ? p.k.token_stride : dim, value_stride = raw ? p.v.token_stride : dim;
        load_rows<L, COLUMNS, THREADS, false>(k, raw ? x.k : x.far_k, key, key_stride, count, dim);
        load_rows<L, COLUMNS, THREADS, false>(v, raw ? x.v : x.far_v, value, value_stride, count, dim);
    }

    // Where the gradients of the block's column `column` start.
    SFA_DEVICE int64_t target_of(int column) const {
        int index = LISTED ? hw::load<int>(words, column * 16) : first + column;
        return (list * p.sizes.tokens + index) * p.sizes.head_dim;
    }
};

template <class Gradients>
__device__ __forceinline__ void fused(const BackwardTensors& x, const Global<float>& dq, const ColumnTarget& dk,
                                      const ColumnTarget& dv, const AttentionParams& p, bool near) {
    hw::let_next_start();
    hw::wait_for_previous();
    // Listed columns have two kinds, each with a last block of its own.
    uint32_t blocks = (p.sizes.tokens + Gradients::COLUMNS - 1) / Gradients::COLUMNS + Gradients::LISTED;
    // TOGETHER is twice the blocks that a device runs at a time: L2 also has to hold a unit's rows and their gradients.
    Place place(blockIdx.x, blocks, p.sizes.batch * p.sizes.lists, Gradients::TOGETHER);
    Gradients(p, x, place.unit, place.block, near).run(dq, dk, dv);
}

// Far columns with a column bias: their sums of gradients of logits go to `fades`, (B * lists, N).
template <class Gradients>
__device__ __forceinline__ void faded(const BackwardTensors& x, const Global<float>& dq, const ColumnTarget& dk,
                                      const ColumnTarget& dv, const AttentionParams& p, const Global<float>& fades) {
    hw::let_next_start();
    hw::wait_for_previous();
    uint32_t blocks = (p.sizes.tokens + Gradients::COLUMNS - 1) / Gradients::COLUMNS;
    Place place(blockIdx.x, blocks, p.sizes.batch * p.sizes.lists, Gradients::TOGETHER);
    Gradients(p, x, place.unit, place.block, false).run(dq, dk, dv, fades);
}

#define TARGETS                                                                                                       \
    Global<float> dq, Global<float> dk, Global<float> dv, Global<uint16_t> done_k, Global<uint16_t> done_v,           \
        AttentionParams p
