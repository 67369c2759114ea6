// One block of query rows against its columns, on tensor cores, after FlashAttention-2 (Dao 2023): tiles of logits go
// through an online softmax and stay in registers as the weights of the values. There are two buffers of keys and values:
// while one tile is computed the next is on its way, and warps meet once per tile.
//
// A number that is not finite and of which a row knows nothing must not reach it by 0 * NaN. Masked tiles are not searched
// for such: a logit or an output that is not finite tells of them, and the block starts again with care.
#pragma once

#include "forward_rows.cuh"

template <class T, class S, bool EXTRAS>
struct ForwardBlock : ForwardRows<T, S, EXTRAS> {
    typedef ForwardRows<T, S, EXTRAS> Rows;
    typedef typename Rows::Columns Columns;
    using Rows::p, Rows::x, Rows::q, Rows::keys, Rows::values, Rows::output, Rows::THREADS;
    using Rows::D, Rows::MT, Rows::NB, Rows::NT, Rows::R, Rows::LISTED;

    Fragments<D> query_rows, key_rows, value_rows;

    SFA_DEVICE ForwardBlock(const AttentionParams& p, const ForwardTensors& x)
        : Rows(p, x), query_rows(false, Rows::warp_row()), key_rows(true, 0), value_rows(false, 0) {}

    // Starts the tokens of a step's columns on their way.
    template <bool FULL>
    SFA_DEVICE void load_tokens(uint32_t left) {
        Columns c = this->template columns<FULL>(left);
        bool there = int(hw::thread()) < c.count;
        int64_t index = there ? this->listed_at(c, hw::thread()) : 0;
        if (hw::thread() < NB) hw::copy_async_word(this->words(left), hw::thread() * 4, x.far_index, index, there);
    }

    // Starts on its way what a step reads; steps go by how many are left after them.
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

    // One tile, which is under way; `left` are left after it. MASKED: some rows do not see some of its columns, or it is
    // searched for numbers that are not finite; `met` is NaN once a logit was none.
    template <bool MASKED>
    SFA_DEVICE void step(uint32_t& left, float& met) {
        hw::copy_wait<0>();
        __syncthreads();
        if (left > 0) load<!MASKED>(left - 1);
        // Or the next step's number would be held from here on.
        hw::keep_in_place(left);
        Columns c = this->template columns<!MASKED>(left);
        if (MASKED && this->careful()) this->search(c, keys(left), values(left));
        Span wanted = MASKED ? this->reach(c) : Span{0, NB};
        if (MASKED && wanted.begin >= wanted.end) return;
        float s[MT][NT][4];
#pragma unroll
        for (int i = 0; i < MT * NT * 4; i++) s[i / (NT * 4)][i / 4 % NT][i % 4] = 0;
        multiply_rows<T, D, MT, NT, MASKED>(s, query_rows, q, key_rows, keys(left), wanted);
        if (MASKED) this->meet(met, s, wanted);
        float scale = this->to_logits(s, c, left);
        if (MASKED) this->mask(s, c, wanted);
        float rescale[R];
        if (this->template raise<MASKED>(rescale, s, scale, wanted)) this->multiply_output(rescale);
        this->template weigh<MASKED>(s, scale, wanted);
        if (EXTRAS && p.dropout_cut != 0) this->drop(s, c);
        // Or the values' place would be held from the keys' on.
        hw::keep_in_place(left);
        multiply_weights<T, D, MT, NT, MASKED>(output, value_rows, s, values(left), wanted);
    }

    // Attends, and notes the first bad token.
    SFA_DEVICE void run() {
        this->hold();
        this->template load_queries<THREADS>(hw::thread());
        hw::copy_commit();
        this->clear_marks();
        this->clear_first_bad();
        if (LISTED) {
            // A row sees its own token: there is a step.
            load_tokens<false>(this->bounds().steps() - 1);
            hw::copy_commit();
            hw::copy_wait<0>();
            __syncthreads();
        }
        int steps = this->bounds().steps();
        if (steps > 0) load<false>(steps - 1);
        if (steps > 0) hw::copy_wait<1>();
        else hw::copy_wait<0>();
        __syncthreads();
        this->start();
        int full = this->full_tiles();
        float met = 0;
#pragma unroll 1
        for (uint32_t i = steps; int(i) > full;) step<true>(--i, met);
        suspect(met != 0.f);
        this->write_first_bad();
#pragma unroll 1
        for (uint32_t i = full; i > 0;) step<false>(--i, met);
        suspect(this->divide());
    }

    // The word after the marks of bad columns, 0 at first: whether a number that is not finite was met.
    static constexpr uint32_t SUSPECT = (NB + 1) * 4;
    SFA_DEVICE void suspect(bool holds) const {
        if (holds) hw::store(this->bad, SUSPECT, 1u);
    }

    // Whether such were met without care; from now on there is. A meeting point.
    SFA_DEVICE bool starts_again() {
        __syncthreads();
        if (hw::load<uint32_t>(this->bad, SUSPECT) == 0 || this->careful()) return false;
        this->be_careful();
        return true;
    }
};

// Attends and writes, and starts again with care where it has to.
template <class T, class S, bool EXTRAS>
SFA_DEVICE void attend_rows(const ForwardTensors& x, const AttentionParams& p) {
    typedef ForwardBlock<T, S, EXTRAS> Block;
    uint2 place = RowBlocks<S>(p).place(blockIdx.x);
    hw::let_next_start();
    hw::wait_for_previous();
    // Without causality no tile is masked by itself: every one is searched.
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
    FORWARD_KERNEL(name, 128, BLOCKS, attend_rows, T, WarpShape<D, MT, NB, LISTED>, EXTRAS)
