// Gradients of queries, keys and values in one pass over columns: five products a tile, where separate passes over rows
// and columns need seven. After FlashAttention-2's backward pass (Dao 2023). A block owns dK and dV of its columns; the
// dQ that rows get from them is added to memory tile by tile, so the last bits of dQ differ from run to run.
#pragma once

#include "backward/backward_columns.cuh"

// WARPS warps; SPLIT (1 or 2) of them share 16 * MT columns. If two share them, each takes half of a tile's rows for
// the logits and half of D for dK and dV, and reads the other's weights and gradients of logits from shared memory.
// FADED: also the columns' sums of gradients of logits, for the gradient of a column bias.
template <class T, int D, int MT, int WARPS, int SPLIT, int NB, bool BY_LISTS, bool FADED = false>
struct FusedGradients : OwnedColumns<16 * MT * WARPS / SPLIT, BY_LISTS> {
    typedef OwnedColumns<16 * MT * WARPS / SPLIT, BY_LISTS> Owned;
    using Owned::p, Owned::x, Owned::batch, Owned::list, Owned::first, Owned::count, Owned::words;
    using Owned::COLUMNS, Owned::LISTED;
    static constexpr int THREADS = 32 * WARPS, R = 2 * MT, TOGETHER = 512;
    // A warp's rows of a tile, and its share of D.
    static constexpr int OWN_ROWS = NB / SPLIT, NT = OWN_ROWS / 8, WIDTH = D / SPLIT;
    // If a warp has its columns alone, dQ of a tile is added while the next tile is computed, and the block meets once
    // a tile.
    static constexpr bool LATE = SPLIT == 1;
    // Shared memory: keys, values; two stages of queries, output gradients, log-sum-exps and deltas; gradients of
    // logits of two tiles if LATE, else gradients of logits and weights; four words a column.
    static constexpr uint32_t OWN = COLUMNS * D * 2, TILE = NB * D * 2, STAGE = 2 * TILE + 2 * NB * 4;
    static constexpr uint32_t LOGITS = COLUMNS * NB * 2, LOGITS_AT = 2 * OWN + 2 * STAGE;
    static constexpr uint32_t WEIGHTS_AT = LOGITS_AT + LOGITS, WORDS_AT = LOGITS_AT + 2 * LOGITS;
    static constexpr uint32_t BYTES = WORDS_AT + Owned::WORDS;
    // A warp's part of a tile's dQ: half of the rows, PART elements of D.
    static constexpr int PART = D * 2 / WARPS, MQ = NB / 32;
    static_assert(NB % 32 == 0 && PART % 16 == 0, "half of the warps per half of the rows");

    hw::Tile k, v;
    Fragments<D> own_columns, row_rows, right_rows;
    Fragments<NB> logit_rows;
    float dk[MT][WIDTH / 8][4], dv[MT][WIDTH / 8][4];
    // This thread's share of its columns' sums.
    float fades[R] = {};
    int lane, warp;

    SFA_DEVICE FusedGradients(const AttentionParams& p, const BackwardTensors& x, uint32_t unit, uint32_t block,
                              bool is_near)
        : Owned(p, x, unit, block, is_near, WORDS_AT), own_columns(false, threadIdx.x / 32 / SPLIT * 16 * MT),
          row_rows(true, threadIdx.x / 32 % SPLIT * OWN_ROWS), right_rows(false, 0), logit_rows(true, 0),
          lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
        k = hw::tile(0, OWN), v = hw::tile(OWN, OWN);
#pragma unroll
        for (int i = 0; i < MT * WIDTH / 2; i++)
            dk[i / (WIDTH / 2)][i / 4 % (WIDTH / 8)][i % 4] = 0, dv[i / (WIDTH / 2)][i / 4 % (WIDTH / 8)][i % 4] = 0;
    }

    // The warp's first column in the block and its first row in a tile.
    SFA_DEVICE int own_column() const { return warp / SPLIT * 16 * MT; }
    SFA_DEVICE int own_row() const { return warp % SPLIT * OWN_ROWS; }

    // Whether a row of the tile may see one of `columns` columns from `own` on: from column to column, `begin` and
    // `end` never decrease.
    SFA_DEVICE bool seen(int own, int columns, int row) const {
        int begin = hw::load<int>(words, own * 16 + 4), end = hw::load<int>(words, (own + columns - 1) * 16 + 8);
        return begin < row + NB && end > row;
    }

    // Gradients of logits of a stage.
    SFA_DEVICE hw::Tile logits(int stage) const { return hw::tile(LOGITS_AT + (LATE ? stage * LOGITS : 0), LOGITS); }

    // Buffer `index` of a stage: queries, output gradients, log-sum-exps, deltas.
    SFA_DEVICE hw::Tile part(int stage, int index) const {
        uint32_t at = 2 * OWN + stage * STAGE;
        return index < 2 ? hw::tile(at + index * TILE, TILE) : hw::tile(at + 2 * TILE + (index - 2) * NB * 4, NB * 4);
    }

    SFA_DEVICE void load_tile(const HeadIndex& at, int row, int stage) {
        uint32_t dim = p.sizes.head_dim;
        int count = min(NB, int(p.sizes.tokens) - row);
        int64_t index = at.batch_head * p.sizes.tokens + row;
        load_rows<Layout<D>, NB, THREADS, false>(part(stage, 0), x.q, p.q.at(at.batch, at.head, row), p.q.token_stride,
                                                 count, dim);
        load_rows<Layout<D>, NB, THREADS, false>(part(stage, 1), x.grad_output, index * dim, dim, count, dim);
        load_words<NB>(part(stage, 2), x.log_sum_exp, index, count);
        load_words<NB>(part(stage, 3), x.delta, index, count);
        hw::copy_commit();
    }

    // Whether the tile that has arrived has odd rows; NaN rows are contained here.
    SFA_DEVICE bool has_odd_rows(int stage) const {
        OddRows odd = OddRows::of<NB>(part(stage, 2), part(stage, 3));
        if (!odd.bad) return odd.any;
        __syncthreads();
        OddRows::contain<T, Layout<D>, NB, THREADS>(part(stage, 0), part(stage, 1), part(stage, 2), part(stage, 3));
        __syncthreads();
        return true;
    }

    // Turns products of queries and keys into weights, and products of gradients into gradients of logits, in place.
    // FULL: every row sees every column, there is neither bias nor dropout, and no row is odd.
    template <bool FULL>
    SFA_DEVICE void weigh(float (&s)[MT][NT][4], float (&grads)[MT][NT][4], const HeadIndex& at, int row, int stage) {
        hw::Tile log_sum_exp = part(stage, 2), delta = part(stage, 3);
        int rows = min(row + NB, int(p.sizes.tokens));
        float scale = p.scale * p.scale_sign;
        uint32_t own = (own_column() + lane / 4) * 16;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float2 sums = hw::load<float2>(log_sum_exp, (own_row() + n * 8 + lane % 4 * 2) * 4);
            float2 means = hw::load<float2>(delta, (own_row() + n * 8 + lane % 4 * 2) * 4);
#pragma unroll
            for (int i = 0; i < 2 * R; i++) {
                int r = i / 2, token = row + own_row() + n * 8 + lane % 4 * 2 + i % 2;
                float sum = i % 2 ? sums.y : sums.x, mean = i % 2 ? means.y : means.x;
                float &logit = s[r / 2][n][i % 4], &grad = grads[r / 2][n][i % 4];
                float addend = hw::load<float>(words, own + r * 128 + 12);
                if (FULL) {
                    logit = hw::exp2(logit * scale + (addend - sum));
                    grad = logit * (grad - mean);
                    if (FADED) fades[r] += grad;
                    continue;
                }
                uint4 word = hw::load<uint4>(words, own + r * 128);
                float weight = 0, kept = 1, slope = 1;
                bool visible = token >= int(word.y) && token < int(word.z) && token < rows;
                if (visible) {
                    logit = capped(p.softcap, logit * scale, slope) + addend;
                    if (x.bias) logit += bias_at(p, x.bias, at, token, int(word.x));
                    if (p.dropout_cut != 0) kept = dropout_factor(p, at, token, int(word.x));
                    float rest = fabsf(sum) < LARGE_LOGIT ? 0.f : rest_of_sum(p, x.log_sum_exp, at, token);
                    weight = hw::exp2(exponent_of(logit, sum, rest));
                }
                logit = weight * kept;
                if (FADED && visible) fades[r] += weight * (grad * kept - mean);
                grad = visible ? weight * (grad * kept - mean) * slope : 0.f;
            }
        }
    }

    // The same for a tile with masked columns, but without a bias, dropout and odd rows.
    SFA_DEVICE void weigh_seen(float (&s)[MT][NT][4], float (&grads)[MT][NT][4], int row, int stage) {
        hw::Tile log_sum_exp = part(stage, 2), delta = part(stage, 3);
        float scale = p.scale * p.scale_sign;
        int first = own_row() + lane % 4 * 2;
#pragma unroll
        for (int r = 0; r < R; r++) {
            uint4 word = hw::load<uint4>(words, (own_column() + lane / 4 + r * 8) * 16);
            int begin = int(word.y) - row - first, end = int(word.z) - row - first;
            float addend = __uint_as_float(word.w);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                float2 sums = hw::load<float2>(log_sum_exp, (first + n * 8) * 4);
                float2 means = hw::load<float2>(delta, (first + n * 8) * 4);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float &logit = s[r / 2][n][r % 2 * 2 + i], &grad = grads[r / 2][n][r % 2 * 2 + i];
                    bool visible = n * 8 + i >= begin && n * 8 + i < end;
                    float weight = hw::exp2(logit * scale + (addend - (i ? sums.y : sums.x)));
                    logit = visible ? weight : 0.f;
                    grad = visible ? weight * (grad - (i ? means.y : means.x)) : 0.f;
                    if (FADED) fades[r] += grad;
                }
            }
        }
    }

    // Stores numbers for other warps in shared memory, rounded to T: a row of the tile per column.
    SFA_DEVICE void share(const hw::Tile& tile, const float (&numbers)[MT][NT][4]) const {
#pragma unroll
        for (int r = 0; r < R; r++) {
            uint32_t column = own_column() + r * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const float* pair = &numbers[r / 2][n][r % 2 * 2];
                hw::store(tile, Layout<NB>::chunk(column, own_row() / 8 + n) + lane % 4 * 4, T::pack(pair[0], pair[1]));
            }
        }
    }

    // Adds the products of the numbers that the other warp of these columns stored, over its rows.
    SFA_DEVICE void multiply_shared(float (&c)[MT][WIDTH / 8][4], const hw::Tile& shared, const hw::Tile& right) const {
        int row = OWN_ROWS - own_row();
        Fragments<NB> left = Fragments<NB>(false, own_column()).from(row).here();
        Fragments<D> at = right_rows.from(warp % SPLIT * WIDTH).here();
        at.first += row * Layout<D>::ROW;
#pragma unroll
        for (int k = 0; k < OWN_ROWS / 16; k++) {
            uint32_t a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) hw::load_matrices(a[m], shared, left.at(m * 16, k));
#pragma unroll
            for (int d = 0; d < WIDTH / 16; d++) {
                uint32_t b[4];
                hw::load_matrices_transposed(b, right, at.at(k * 16, d));
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    hw::multiply_add(T(), c[m][2 * d], a[m], b[0], b[1]);
                    hw::multiply_add(T(), c[m][2 * d + 1], a[m], b[2], b[3]);
                }
            }
        }
    }

    // `full`: every row sees every column.
    SFA_DEVICE void add_queries_of(const Global<float>& dq, uint32_t head, int row, int stage, bool full) const {
        if (!LISTED || full) add_queries<true>(dq, head, row, stage);
        else add_queries<false>(dq, head, row, stage);
    }

    // Adds this warp's part of a tile's dQ to memory. Unless FULL, it skips 16 columns at a time if no row sees them.
    template <bool FULL>
    SFA_DEVICE void add_queries(const Global<float>& dq, uint32_t head, int row, int stage) const {
        hw::Tile shared = logits(stage);
        float sums[MQ][PART / 8][4];
#pragma unroll
        for (int i = 0; i < MQ * PART / 2; i++) sums[i / (PART / 2)][i / 4 % (PART / 8)][i % 4] = 0;
        int half = warp % 2, part = warp / 2 * PART;
        Fragments<NB> left = logit_rows.here();
        left.first ^= half * MQ * 32;
        Fragments<D> right = right_rows.from(part).here();
#pragma unroll
        for (int c = 0; c < COLUMNS / 16; c++) {
            if (!FULL && !seen(c * 16, 16, row)) continue;
            uint32_t a[MQ][4];
#pragma unroll
            for (int m = 0; m < MQ; m++) hw::load_matrices_transposed(a[m], shared, left.at(c * 16, m));
#pragma unroll
            for (int d = 0; d < PART / 16; d++) {
                uint32_t b[4];
                hw::load_matrices_transposed(b, k, right.at(c * 16, d));
#pragma unroll
                for (int m = 0; m < MQ; m++) {
                    hw::multiply_add(T(), sums[m][2 * d], a[m], b[0], b[1]);
                    hw::multiply_add(T(), sums[m][2 * d + 1], a[m], b[2], b[3]);
                }
            }
        }
        float factor = p.scale * p.scale_sign * LN_2;
#pragma unroll
        for (int r = 0; r < 2 * MQ; r++) {
            int token = row + half * MQ * 16 + r * 8 + lane / 4;
            if (token >= int(p.sizes.tokens)) continue;
            int64_t target = ((int64_t(batch) * p.sizes.heads + head) * p.sizes.tokens + token) * p.sizes.head_dim;
#pragma unroll
            for (int d = 0; d < PART / 8; d++) {
                uint32_t element = part + d * 8 + lane % 4 * 2;
                const float* pair = &sums[r / 2][d][r % 2 * 2];
                if (element < p.sizes.head_dim) hw::add_pair(dq, target + element, pair[0] * factor, pair[1] * factor);
            }
        }
    }

    template <bool FULL>
    SFA_DEVICE void tile(const HeadIndex& at, int row, int stage, bool odd) {
        hw::Tile q = part(stage, 0), grad = part(stage, 1), weights = hw::tile(WEIGHTS_AT, LOGITS);
        float s[MT][NT][4], grads[MT][NT][4];
#pragma unroll
        for (int i = 0; i < MT * NT * 4; i++)
            s[i / (NT * 4)][i / 4 % NT][i % 4] = 0, grads[i / (NT * 4)][i / 4 % NT][i % 4] = 0;
        bool any = !LISTED || FULL || seen(own_column(), 16 * MT, row);
        if (any) {
            multiply_rows<T, D, MT, NT>(s, own_columns, k, row_rows, q);
            multiply_rows<T, D, MT, NT>(grads, own_columns, v, row_rows, grad);
            if (!FULL && !odd && !has_extras(p, x)) weigh_seen(s, grads, row, stage);
            else weigh<FULL>(s, grads, at, row, stage);
            share(logits(stage), grads);
            if (!LATE) share(weights, s);
            Fragments<D> right = right_rows.from(warp % SPLIT * WIDTH);
            right.first += own_row() * Layout<D>::ROW;
            multiply_weights<T, D, MT, NT, false, WIDTH>(dv, right, s, grad);
            multiply_weights<T, D, MT, NT, false, WIDTH>(dk, right, grads, q);
        }
        if (LATE) return;
        __syncthreads();
        if (any) {
            multiply_shared(dv, weights, grad);
            multiply_shared(dk, logits(stage), q);
        }
    }

    SFA_DEVICE void store(const ColumnTarget& target, const float (&sums)[MT][WIDTH / 8][4], float factor) const {
#pragma unroll
        for (int r = 0; r < R; r++) {
            int column = own_column() + r * 8 + lane / 4;
            if (column >= count) continue;
            int64_t at = this->target_of(column);
#pragma unroll
            for (int d = 0; d < WIDTH / 8; d++) {
                uint32_t element = warp % SPLIT * WIDTH + d * 8 + lane % 4 * 2;
                float2 pair{sums[r / 2][d][r % 2 * 2] * factor, sums[r / 2][d][r % 2 * 2 + 1] * factor};
                if (element >= p.sizes.head_dim) continue;
                if (target.sums) store_vector(target.sums, at + element, pair);
                else store_vector(target.done, at + element, T::pack(pair.x, pair.y));
            }
        }
    }

    // `column_sums`: where those of FADED go.
    SFA_DEVICE void run(const Global<float>& dq, const ColumnTarget& keys, const ColumnTarget& values,
                        const Global<float>& column_sums = {}) {
        if (count <= 0) return;
        this->template load_columns<Layout<D>, THREADS>(k, v, [] { __syncthreads(); });
        hw::copy_commit();
        ColumnRows head_column = this->rows_of(first), last = this->rows_of(first + count - 1);
        int begin = head_column.begin / NB * NB, end = last.end, full_end = head_column.end - NB;
        bool plain = count == COLUMNS && !has_extras(p, x);
        uint32_t heads = p.sizes.heads / p.sizes.lists, head = uint32_t(list) % p.sizes.lists * heads,
                 last_head = head + heads;
        // The previous tile.
        uint32_t head_before = head;
        int row = begin, row_before = -1, stage = 0;
        bool full_before = false;
        if (begin < end) load_tile(HeadIndex(p, batch, head), begin, 0);
        else hw::copy_commit();
        // A key that is not finite must not reach queries that do not see it, by 0 * NaN.
        hw::copy_wait<1>();
        cleanse<T, Layout<D>, COLUMNS, THREADS>(k);
#pragma unroll 1
        while (begin < end && head < last_head) {
            uint32_t next_head = head;
            int next_row = row + NB;
            if (next_row >= end) next_row = begin, next_head++;
            hw::copy_wait<0>();
            __syncthreads();
            if (next_head < last_head) load_tile(HeadIndex(p, batch, next_head), next_row, stage ^ 1);
            if (LATE && row_before >= 0) add_queries_of(dq, head_before, row_before, stage ^ 1, full_before);
            HeadIndex at(p, batch, head);
            bool odd = has_odd_rows(stage), full = plain && !odd && row >= last.begin && row <= full_end;
            if (full) tile<true>(at, row, stage, false);
            else tile<false>(at, row, stage, odd);
            if (!LATE) add_queries_of(dq, head, row, stage, full);
            head_before = head, row_before = row, full_before = full;
            head = next_head, row = next_row, stage ^= 1;
        }
        // If no row sees these columns, their copies are still in flight.
        hw::copy_wait<0>();
        __syncthreads();
        if (LATE && row_before >= 0) add_queries_of(dq, head_before, row_before, stage ^ 1, full_before);
        store(keys, dk, p.scale * p.scale_sign * LN_2);
        store(values, dv, 1.f);
        if constexpr (FADED) store_fades(column_sums);
    }

    // Two warps that share columns add their sums up in shared memory that no product reads any more.
    SFA_DEVICE void store_fades(const Global<float>& target) const {
        hw::Tile of_others = hw::tile(WEIGHTS_AT, COLUMNS * 4);
        float sums[R];
#pragma unroll
        for (int r = 0; r < R; r++) sums[r] = quad_sum(fades[r]);
        bool first_warp = warp % SPLIT == 0, writes = lane % 4 == 0;
        if (SPLIT == 2) {
#pragma unroll
            for (int r = 0; r < R; r++)
                if (!first_warp && writes) hw::store(of_others, (own_column() + r * 8 + lane / 4) * 4, sums[r]);
            __syncthreads();
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
            int column = own_column() + r * 8 + lane / 4;
            if (!first_warp || !writes || column >= count) continue;
            float sum = sums[r] + (SPLIT == 2 ? hw::load<float>(of_others, column * 4) : 0.f);
            target.set(list * p.sizes.tokens + first + column, sum);
        }
    }
};
