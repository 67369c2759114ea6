// One block of query rows against its columns, on tensor cores, after FlashAttention-2 (Dao 2023): tiles of logits go
// through an online softmax and stay in registers as the weights of the values. There are two buffers of keys and values:
// while one tile is computed the next is on its way, and warps meet once per tile.
//
// A number that is not finite and of which a row knows nothing must not reach it by 0 * NaN. Masked tiles are not searched
// for such: a logit or an output that is not finite tells of them, and the block starts again with care.
#pragma once

#include "forward_tiles.cuh"
#include "softmax.cuh"

// Four warps of 16 * MT rows, tiles of NB columns; EXTRAS: bias and dropout are possible.
template <class T, int D, int MT, int NB, bool EXTRAS, bool LISTED>
struct ForwardBlock : ForwardTiles<D, MT, NB, LISTED> {
    typedef ForwardTiles<D, MT, NB, LISTED> Tiles;
    typedef typename Tiles::Columns Columns;
    using Tiles::p, Tiles::x, Tiles::at, Tiles::q, Tiles::keys, Tiles::values, Tiles::words, Tiles::bad;
    using Tiles::lane, Tiles::warp_row, Tiles::block_row, Tiles::row_end;
    using Tiles::THREADS, Tiles::ROWS, Tiles::has_sizes, Tiles::span, Tiles::token;
    static constexpr int R = 2 * MT, NT = NB / 8;

    Fragments<D> query_rows, key_rows, value_rows;
    OnlineSoftmax<R> softmax;
    float output[MT][D / 8][4];

    SFA_DEVICE ForwardBlock(const AttentionParams& p, const ForwardTensors& x)
        : Tiles(p, x), query_rows(false, Tiles::warp_row()), key_rows(true, 0), value_rows(false, 0) {}

    // The token index of this lane's row r; kept in place, or addresses made from it would be held throughout.
    SFA_DEVICE int row_of(int r) const {
        uint32_t first = block_row() + warp_row() + lane() / 4;
        hw::keep_in_place(first);
        return int(first) + r / 2 * 16 + r % 2 * 8;
    }

    // Rows start from nothing.
    SFA_DEVICE void clear() {
#pragma unroll
        for (int r = 0; r < R; r++) softmax.maximum[r] = -hw::infinity(), softmax.sum[r] = 0;
#pragma unroll
        for (int i = 0; i < MT * D / 2; i++) output[i / (D / 2)][i / 4 % (D / 8)][i % 4] = 0;
    }

    // Rows start at their edge columns.
    SFA_DEVICE void edges() {
#pragma unroll
        for (int r = 0; r < R; r++) {
            HeadIndex at = this->at();
            uint32_t quad_lane = lane() % 4;
            int row = row_of(r), token = edge_token(p, x.far_before, at.list, row);
            float logit = 0;
            Halves key = edge_row(p, x.folded_k, x.k, p.k, at, max(token, 0));
            Halves value = edge_row(p, x.folded_v, x.v, p.v, at, max(token, 0));
            if (token >= 0) {
                for (uint32_t chunk = quad_lane; chunk * 8 < p.sizes.head_dim; chunk += 4) {
                    uint4 a = hw::load<uint4>(q, Layout<D>::chunk(row - block_row(), chunk));
                    uint4 b = load_vector<uint4>(key, chunk * 8);
                    logit = hw::dot<T>(a, b, logit);
                    // Such a value makes the row NaN by itself; a key might only hide the column.
                    if (any_not_finite<T>(b)) logit = hw::nan();
                }
            }
            logit += hw::shuffle_xor(logit, 1);
            logit += hw::shuffle_xor(logit, 2);
            float weight = 0;
            if (token >= 0) {
                logit *= p.scale;
                if (x.folded_ln) logit += LOG2_E * x.folded_ln[at.list * p.sizes.tokens + token];
                if (EXTRAS && x.bias) logit += bias_at(p, x.bias, at, row, token);
                weight = softmax.start(r, logit, quad_lane == 0);
                if (EXTRAS && p.dropout_cut != 0) weight *= dropout_factor(p, at, row, token);
            } else {
                softmax.maximum[r] = -hw::infinity(), softmax.sum[r] = 0;
            }
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                uint32_t column = d * 8 + quad_lane * 2, pair = 0;
                if (token >= 0 && column < p.sizes.head_dim) pair = load_vector<uint32_t>(value, column);
                output[r / 2][d][r % 2 * 2] = weight * hw::low<T>(pair);
                output[r / 2][d][r % 2 * 2 + 1] = weight * hw::high<T>(pair);
            }
        }
    }

    // Adds ln n and the bias; the logits are in base 2 then.
    SFA_DEVICE void add_terms(float (&s)[MT][NT][4], const Columns& c, uint32_t left) {
        bool sizes = has_sizes(c);
        int first = lane() % 4 * 2;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float2 size = sizes ? hw::load<float2>(words(left), (n * 8 + first) * 4) : float2{0, 0};
#pragma unroll
            for (int i = 0; i < 4 * MT; i++) {
                float& logit = s[i / 4][n][i % 4];
                logit = logit * p.scale + (i % 2 ? size.y : size.x) * LOG2_E;
                if (EXTRAS && x.bias) {
                    int row = row_of(i / 2), column = n * 8 + first + i % 2;
                    if (row < row_end() && column < c.count) logit += bias_at(p, x.bias, at(), row, token(c, column));
                }
            }
        }
    }

    // Hides columns from the rows that do not see them; those out of `wanted` stay out of everything.
    SFA_DEVICE void mask(float (&s)[MT][NT][4], const Columns& c, const Span& wanted) {
        int block = block_row(), last = min(int(p.sizes.tokens), block + ROWS) - 1, thread = hw::thread();
        int row = block + thread / 32 * 16 * MT + thread % 32 / 4, first = c.first + thread % 4 * 2;
#pragma unroll
        for (int r = 0; r < R; r++) {
            Span visible = span(c.near, min(row + r / 2 * 16 + r % 2 * 8, last), block);
            int begin = visible.begin - first, end = visible.end - first;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                if (!wanted.touches(n / 2 * 16)) continue;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int column = n * 8 + i;
                    if (column < begin || column >= end) s[r / 2][n][r % 2 * 2 + i] = -hw::infinity();
                }
            }
        }
    }

    // Logits to weights, in place; scales what was summed before.
    template <bool MASKED>
    SFA_DEVICE void weigh(float (&s)[MT][NT][4], float scale, const Span& wanted) {
        float rescale[R];
        bool any = false;
#pragma unroll
        for (int r = 0; r < R; r++) {
            float largest = -hw::infinity();
#pragma unroll
            for (int n = 0; n < NT; n++) {
                if (MASKED && !wanted.touches(n / 2 * 16)) continue;
                largest = hw::max(largest, s[r / 2][n][r % 2 * 2]);
                largest = hw::max(largest, s[r / 2][n][r % 2 * 2 + 1]);
            }
            rescale[r] = softmax.raise(r, largest * scale);
            any |= rescale[r] != 1.f;
        }
        if (hw::warp_any(any)) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                softmax.sum[r] *= rescale[r];
#pragma unroll
                for (int i = 0; i < D / 4; i++) output[r / 2][i / 2][r % 2 * 2 + i % 2] *= rescale[r];
            }
        }
        // 16 columns of all rows at a time: their products with values can start while the next are made.
        float base[R];
#pragma unroll
        for (int r = 0; r < R; r++) base[r] = softmax.base(r);
#pragma unroll
        for (int k = 0; k < NT / 2; k++) {
            if (MASKED && !wanted.touches(k * 16)) continue;
#pragma unroll
            for (int r = 0; r < R; r++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float& weight = s[r / 2][2 * k + i / 2][r % 2 * 2 + i % 2];
                    weight = hw::exp2(weight * scale - base[r]);
                    softmax.sum[r] += weight;
                }
            }
        }
    }

    SFA_DEVICE void drop(float (&s)[MT][NT][4], const Columns& c) {
        int first = lane() % 4 * 2;
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4 * MT; i++) {
                int column = n * 8 + first + i % 2;
                if (column < c.count) s[i / 4][n][i % 4] *= dropout_factor(p, at(), row_of(i / 2), token(c, column));
            }
        }
    }

    // One tile, which is under way; `left` are left after it. MASKED: some rows do not see some of its columns, or it is
    // searched for numbers that are not finite; `met` is NaN once a logit was none.
    template <bool MASKED>
    SFA_DEVICE void step(uint32_t& left, float& met) {
        hw::copy_wait<0>();
        __syncthreads();
        if (left > 0) this->template load<!MASKED>(left - 1);
        // Or the next step's number would be held from here on.
        hw::keep_in_place(left);
        Columns c = this->template columns<!MASKED>(left);
        if (MASKED && this->careful() && (LISTED || c.near || p.dense)) {
            int row = quarantine<T, D, NB, THREADS>(keys(left), values(left), bad);
            // Who sees a hidden token is in a block that finds it by itself.
            if (row < NB && !(LISTED && c.near)) this->note_bad(token(c, row));
        }
        Span wanted = MASKED ? this->reach(c) : Span{0, NB};
        if (MASKED && wanted.begin >= wanted.end) return;
        float s[MT][NT][4];
#pragma unroll
        for (int i = 0; i < MT * NT * 4; i++) s[i / (NT * 4)][i / 4 % NT][i % 4] = 0;
        multiply_rows<T, D, MT, NT, MASKED>(s, query_rows, q, key_rows, keys(left), wanted);
        if (MASKED) {
#pragma unroll
            for (int i = 0; i < MT * NT * 4; i++)
                if (wanted.touches(i / 8 % (NT / 2) * 16)) met += s[i / (NT * 4)][i / 4 % NT][i % 4] * 0.f;
        }
        float scale = p.scale;
        if (has_sizes(c) || (EXTRAS && x.bias) || scale == 0.f) {
            add_terms(s, c, left);
            scale = 1;
        }
        if (MASKED) mask(s, c, wanted);
        weigh<MASKED>(s, scale, wanted);
        if (EXTRAS && p.dropout_cut != 0) drop(s, c);
        // Or the values' place would be held from the keys' on.
        hw::keep_in_place(left);
        multiply_weights<T, D, MT, NT, MASKED>(output, value_rows, s, values(left), wanted);
    }

    // Divides by the sums. Of a row that holds anything not finite, or saw nothing, the first number becomes NaN.
    SFA_DEVICE void divide() {
#pragma unroll
        for (int r = 0; r < R; r++) {
            float inverse = 1.f / softmax.finish(r), check = inverse * 0.f;
#pragma unroll
            for (int i = 0; i < D / 4; i++) {
                float& x = output[r / 2][i / 2][r % 2 * 2 + i % 2];
                x *= inverse;
                check += x * 0.f;
            }
            check += hw::shuffle_xor(check, 1);
            check += hw::shuffle_xor(check, 2);
            output[r / 2][0][r % 2 * 2] += check;
            suspect(check != 0.f);
        }
    }

    // The word after the marks of bad columns, 0 at first: whether a number that is not finite was met.
    static constexpr uint32_t SUSPECT = (NB + 1) * 4;
    SFA_DEVICE void suspect(bool holds) const {
        if (holds) hw::store(bad, SUSPECT, 1u);
    }

    // Writes; a row that holds anything not finite is NaN throughout.
    SFA_DEVICE void finish() {
#pragma unroll
        for (int r = 0; r < R; r++) {
            int row = row_of(r);
            if (x.log_sum_exp && row < row_end() && lane() % 4 == 0)
                x.log_sum_exp.set(at().batch_head * p.sizes.tokens + row, softmax.log_sum_exp(r));
        }
        write<false>(x.output);
        if (x.rest) write<true>(x.rest);
    }

    // The rounded output, or what rounding left of it.
    template <bool REST>
    SFA_DEVICE void write(const Global<uint16_t>& target) {
        // The warp's rows of the query tile, which its lanes have read for one another, are about to hold this.
        __syncwarp();
#pragma unroll
        for (int r = 0; r < R; r++) {
            bool sound = hw::finite(output[r / 2][0][r % 2 * 2]);
            int row = row_of(r);
            uint32_t quad_lane = lane() % 4;
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                float a = output[r / 2][d][r % 2 * 2], b = output[r / 2][d][r % 2 * 2 + 1];
                uint32_t pair = sound ? T::pack(a, b) : 0x7fff7fffu;
                if (REST) pair = sound ? T::pack(a - hw::low<T>(pair), b - hw::high<T>(pair)) : 0u;
                hw::store(q, Layout<D>::chunk(row - block_row(), d) + quad_lane * 4, pair);
            }
        }
        // A warp's rows of the query tile were read by itself alone.
        __syncwarp();
        int first = block_row(), end = row_end();
        uint32_t first_of_warp = warp_row();
        int64_t head_rows = at().batch_head * p.sizes.tokens;
        for (uint32_t i = lane(); i < 16 * MT * Layout<D>::CHUNKS; i += 32) {
            uint32_t row = first_of_warp + i / Layout<D>::CHUNKS, chunk = i % Layout<D>::CHUNKS;
            if (first + int(row) >= end || chunk * 8 >= p.sizes.head_dim) continue;
            int64_t index = (head_rows + first + row) * p.sizes.head_dim + chunk * 8;
            store_vector(target, index, hw::load<uint4>(q, Layout<D>::chunk(row, chunk)));
        }
    }

    // Attends and writes, and notes the first bad token; or, where numbers that are not finite were met without care, does
    // not write and returns false.
    SFA_DEVICE bool run() {
        this->hold();
        this->load_queries();
        if (LISTED) {
            // A row sees its own token: there is a step.
            this->template load_tokens<false>(this->bounds().steps() - 1);
            hw::copy_commit();
            hw::copy_wait<0>();
            __syncthreads();
        }
        int steps = this->bounds().steps();
        if (steps > 0) this->template load<false>(steps - 1);
        if (steps > 0) hw::copy_wait<1>();
        else hw::copy_wait<0>();
        __syncthreads();
        if (p.scale_sign < 0) this->negate_queries();
        if constexpr (LISTED) clear();
        else edges();
        // Every row sees these far columns.
        int full = p.dense && !p.causal ? 0 : span(false, block_row(), block_row()).end / NB;
        float met = 0;
#pragma unroll 1
        for (uint32_t i = steps; int(i) > full;) step<true>(--i, met);
        suspect(met != 0.f);
        if (x.first_bad && hw::thread() == 0) {
            uint32_t blocks = (p.sizes.tokens + ROWS - 1) / ROWS;
            x.first_bad.set(at().batch_head * blocks + block_row() / ROWS, this->first_bad());
        }
#pragma unroll 1
        for (uint32_t i = full; i > 0;) step<false>(--i, met);
        divide();
        __syncthreads();
        if (hw::load<uint32_t>(bad, SUSPECT) != 0 && !this->careful()) return false;
        finish();
        return true;
    }
};

template <class T, int D, int MT, int NB, bool EXTRAS, bool LISTED>
__device__ __forceinline__ void forward(const ForwardTensors& x, const AttentionParams& p) {
    typedef ForwardBlock<T, D, MT, NB, EXTRAS, LISTED> Block;
    uint32_t blocks = (p.sizes.tokens + Block::ROWS - 1) / Block::ROWS;
    // Several blocks for each that a device runs at a time.
    Place place(blockIdx.x, blocks, p.sizes.batch * p.sizes.heads, 1024);
    hw::let_next_start();
    hw::wait_for_previous();
    // Without causality no tile is masked by itself: every one is searched.
    Block(p, x).note_facts(place.unit, (blocks - 1 - place.block) * Block::ROWS, p.dense && !p.causal);
    for (;;) {
        Block rows(p, x);
        if (rows.run()) return;
        rows.be_careful();
    }
}

#define FORWARD(name, T, D, MT, NB, BLOCKS, EXTRAS, LISTED)                                                                  \
    KERNEL __launch_bounds__(128, BLOCKS)                                                                            \
        name(Halves q, Halves k, Halves v, Halves far_k, Halves far_v, Floats far_ln, Words far_index,               \
             Words far_before, Halves folded_k, Halves folded_v, Floats folded_ln, Floats bias,                      \
             Global<uint16_t> output, Global<uint16_t> rest, Global<float> log_sum_exp, Global<uint32_t> first_bad,  \
             AttentionParams p) {                                                                                    \
        forward<T, D, MT, NB, EXTRAS, LISTED>(                                                                               \
            ForwardTensors{q, k, v, far_k, far_v, far_ln, far_index, far_before, folded_k, folded_v, folded_ln, bias, \
                           output, rest, log_sum_exp, first_bad},                                                          \
            p);                                                                                                      \
    }
