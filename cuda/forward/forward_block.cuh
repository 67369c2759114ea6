// Forward attention on tensor cores (mma.m16n8k16, sm_80 and up), after FlashAttention-2 (Dao 2023).
//
// A block owns 64 * MT query rows of one head: their output rows and log-sum-exps. Four warps of 16 * MT rows each keep
// their rows' output and softmax state in registers and share the tiles of columns.
//
// The idea: columns come in tiles of NB, through two buffers of keys and values. A tile's logits go through an online
// softmax and stay in registers as the weights of its values.
//
// 1. One meeting a tile (`step`). A thread waits for its copies of this tile, all warps meet, the copies of the next
//    tile start into the other buffer, and the tile is multiplied.
// 2. Weights need no shuffle: the fragments of a product of queries and keys are, once rounded to T, the left fragments
//    of the product with values.
// 3. Masked tiles come first, full tiles after them (see forward_tiles.cuh), so the longer loop has no mask. In a
//    masked tile a warp multiplies only those 16 columns at a time that one of its rows sees (`reach`).
// 4. Facts that are the same for a block lie in shared memory, and some values are recomputed in place
//    (hw::keep_in_place): registers are for products.
// 5. A number that is not finite must not reach a row that does not see it, by 0 * NaN. Masked tiles are not searched
//    for such numbers. A logit or an output that is not finite reveals them, and then the block starts again with care:
//    every masked tile is searched before its product.
//
// Shared memory, in this order; bytes of forward_64 and forward_128:
//
//   queries, then output    ROWS * D * 2                     16 384   32 768
//   keys and values         2 * 2 * NB * D * 2               32 768   65 536
//   words of two tiles      2 * NB * 4                          512      512
//   marks of bad rows       (NB + 4) * 4                        272      272
//   facts                   48, and 8 * ROWS if LISTED           48       48
#pragma once

#include "forward/forward_rows.cuh"

template <class T, class S, bool EXTRAS>
struct ForwardBlock : ForwardRows<T, S, EXTRAS> {
    typedef ForwardRows<T, S, EXTRAS> Rows;
    typedef typename Rows::Columns Columns;
    using Rows::p, Rows::x, Rows::q, Rows::keys, Rows::values, Rows::output, Rows::THREADS;
    using Rows::D, Rows::MT, Rows::NB, Rows::NT, Rows::R, Rows::LISTED, Rows::SLIDING;
    typedef typename Rows::Walk Walk;

    Fragments<D> query_rows, key_rows, value_rows;

    SFA_DEVICE ForwardBlock(const AttentionParams& p, const ForwardTensors& x)
        : Rows(p, x), query_rows(false, Rows::warp_row()), key_rows(true, 0), value_rows(false, 0) {}

    // Starts the copies of the tokens of a step's columns. `left`: how many steps follow it.
    template <bool FULL>
    SFA_DEVICE void load_tokens(uint32_t left) {
        Columns c = this->template columns<FULL>(left);
        bool there = int(hw::thread()) < c.count;
        int64_t index = there ? this->listed_at(c, hw::thread()) : 0;
        if (hw::thread() < NB) hw::copy_async_word(this->words(left), hw::thread() * 4, x.far_index, index, there);
    }

    // Starts the copies of a step's tile, and of the next one's tokens. Steps are numbered by how many follow them.
    template <bool FULL>
    SFA_DEVICE void load(uint32_t left) {
        Columns c = this->template columns<FULL>(left);
        TokensInMemory tokens{this->words(left), 4};
        this->template load_keys<FULL, THREADS>(c, keys(left), tokens, hw::thread());
        this->template load_values<FULL, THREADS>(c, values(left), tokens, hw::thread());
        if (LISTED && left > 0) load_tokens<FULL>(left - 1);
        this->template load_sizes<THREADS>(c, this->words(left), hw::thread());
        hw::copy_commit();
    }

    // One tile, whose copies are in flight; `left` is its number, and `first` that of the last tile to be visited.
    // MASKED: some rows do not see some of its columns, or it is searched for numbers that are not finite. `met`
    // becomes NaN once a logit is not finite.
    template <bool MASKED>
    SFA_DEVICE void step(uint32_t& left, uint32_t first, float& met) {
        hw::copy_wait<0>();
        __syncthreads();
        if (left > first) load<!MASKED>(left - 1);
        // Otherwise the number of the next step would stay in a register from here on.
        hw::keep_in_place(left);
        Columns c = this->template columns<!MASKED>(left);
        if (MASKED && this->careful()) this->search(c, keys(left), values(left));
        Span wanted = MASKED ? this->reach(c) : Span{0, NB};
        if (MASKED && wanted.begin >= wanted.end) return;
        float s[MT][NT][4];
#pragma unroll
        for (int i = 0; i < MT * NT * 4; i++) s[i / (NT * 4)][i / 4 % NT][i % 4] = 0;
        multiply_rows<T, D, MT, NT, MASKED>(s, query_rows, q, key_rows, keys(left), wanted);
        if (MASKED || (SLIDING && this->watches())) this->meet(met, s, wanted);
        float scale = this->to_logits(s, c, left);
        if (MASKED) this->mask(s, c, wanted);
        float rescale[R];
        if (this->template raise<MASKED>(rescale, s, scale, wanted)) this->multiply_output(rescale);
        this->template weigh<MASKED>(s, scale, wanted);
        if (EXTRAS && p.dropout_cut != 0) this->drop(s, c);
        // Otherwise the address of the values would stay in a register while keys are multiplied.
        hw::keep_in_place(left);
        multiply_weights<T, D, MT, NT, MASKED>(output, value_rows, s, values(left), wanted);
    }

    // Attends, and notes the first token that is not finite.
    SFA_DEVICE void run() {
        this->hold();
        this->template load_queries<THREADS>(hw::thread());
        hw::copy_commit();
        this->clear_marks();
        this->clear_first_bad();
        if (LISTED) {
            // Every row sees its own token, so there is at least one step.
            load_tokens<false>(this->bounds().steps() - 1);
            hw::copy_commit();
            hw::copy_wait<0>();
            __syncthreads();
        }
        int steps = this->bounds().steps();
        Walk walk{0, 0, 0};
        // Otherwise it is found after the rows have started.
        if (SLIDING) walk = this->walk();
        if (steps > walk.first) load<false>(steps - 1);
        if (steps > walk.first) hw::copy_wait<1>();
        else hw::copy_wait<0>();
        __syncthreads();
        this->start();
        if (!SLIDING) walk = this->walk();
        float met = 0;
#pragma unroll 1
        for (uint32_t i = steps; int(i) > walk.end;) step<true>(--i, walk.first, met);
        suspect(met != 0.f);
        this->write_first_bad();
#pragma unroll 1
        for (uint32_t i = walk.end; int(i) > walk.begin;) step<false>(--i, walk.first, met);
        if constexpr (SLIDING) {
#pragma unroll 1
            for (uint32_t i = walk.begin; int(i) > walk.first;) step<true>(--i, walk.first, met);
            suspect(met != 0.f);
        }
        suspect(this->divide());
    }

    // The word after the marks of bad columns, 0 at first: whether the block met a number that is not finite.
    static constexpr uint32_t SUSPECT = (NB + 1) * 4;
    SFA_DEVICE void suspect(bool holds) const {
        if (holds) hw::store(this->bad, SUSPECT, 1u);
    }

    // Whether the block met such a number without care; care is switched on then. A meeting point.
    SFA_DEVICE bool starts_again() {
        __syncthreads();
        if (hw::load<uint32_t>(this->bad, SUSPECT) == 0 || this->careful()) return false;
        this->be_careful();
        return true;
    }
};

// Attends and writes; starts again with care if it must.
template <class T, class S, bool EXTRAS>
SFA_DEVICE void attend_rows(const ForwardTensors& x, const AttentionParams& p) {
    typedef ForwardBlock<T, S, EXTRAS> Block;
    uint2 place = RowBlocks<S>(p).place(blockIdx.x);
    hw::let_next_start();
    hw::wait_for_previous();
    // Dense and without causality, no tile needs a mask, and an infinite key may show only as a logit of minus
    // infinity: every tile is searched.
    Block(p, x).template note_facts<S::THREADS>(place.x, place.y, p.dense && !p.causal, hw::thread());
    __syncthreads();
    for (;;) {
        Block rows(p, x);
        rows.run();
        if (rows.starts_again()) continue;
        return rows.finish();
    }
}

#define FORWARD(name, T, D, MT, NB, BLOCKS, EXTRAS, LISTED) \
    FORWARD_KERNEL(name, 128, BLOCKS, (ForwardTiles<WarpShape<D, MT, NB, LISTED, EXTRAS>>::NOTES_AT), attend_rows, T, \
                   WarpShape<D, MT, NB, LISTED, EXTRAS>, EXTRAS)
