// One block of query rows against its columns, on tensor cores, after FlashAttention-2 (Dao 2023): tiles of logits go
// through an online softmax and stay in registers as the weights of the values.
//
// A row's columns: the edge first, row by row; then near tiles of raw tokens, then far tiles, each from the last to the
// first, so that the tiles that need a mask come first and the rest runs without one. LISTED (see params.cuh): no edge;
// hidden tokens in place of the near ones, and tokens that stay, up to the row's own, in place of the far ones. There
// are two buffers of keys and values: while one tile is computed the next is on its way, and warps meet once per tile.
//
// A number that is not finite and of which a row knows nothing must not reach it by 0 * NaN. Masked tiles are not searched
// for such: a logit or an output that is not finite tells of them, and the block starts again with care.
#pragma once

#include "attention.cuh"
#include "softmax.cuh"

struct ForwardTensors {
    Halves q, k, v;
    Halves far_k, far_v;
    Floats far_ln;
    Words far_index, far_before;
    Halves folded_k, folded_v;
    Floats folded_ln, bias;
    Global<uint16_t> output;
    Global<float> log_sum_exp;
    Global<uint32_t> first_bad;
};

// Four warps of 16 * MT rows, tiles of NB columns; EXTRAS: bias and dropout are possible.
template <class T, int D, int MT, int NB, bool EXTRAS, bool LISTED>
struct ForwardBlock {
    static constexpr int THREADS = 128, ROWS = 64 * MT, R = 2 * MT, NT = NB / 8;
    static constexpr uint32_t Q_BYTES = ROWS * D * 2, K_BYTES = NB * D * 2, LN_BYTES = NB * 4;
    static constexpr uint32_t BAD_AT = Q_BYTES + 4 * K_BYTES + 2 * LN_BYTES, SEEN_AT = BAD_AT + (NB + 4) * 4;
    static_assert(NB <= THREADS && ROWS <= THREADS, "a thread per column and per row");

    // A tile's columns: far columns, or tokens (hidden ones where LISTED), from `first` on.
    struct Columns {
        bool near;
        int first, count;
    };

    const AttentionParams& p;
    const ForwardTensors& x;
    HeadIndex at;
    // `words`: ln n of far columns, or where LISTED the columns' tokens; `seen`: two words a row, see `note_rows`.
    hw::Tile q, k, v, words, bad, seen;
    Fragments<D> query_rows, key_rows, value_rows;
    OnlineSoftmax<R> softmax;
    float output[MT][D / 8][4];
    int lane, warp_row, block_row, row_end;
    int near_first, near_end, near_tiles, far_seen, far_tiles;

    SFA_DEVICE ForwardBlock(const AttentionParams& p, const ForwardTensors& x, uint32_t batch_head, int row)
        : p(p), x(x), at(p, batch_head), query_rows(false, threadIdx.x / 32 * 16 * MT), key_rows(true, 0),
          value_rows(false, 0), block_row(row) {
        q = hw::tile(0, Q_BYTES);
        bad = hw::tile(BAD_AT, (NB + 4) * 4);
        seen = hw::tile(SEEN_AT, LISTED ? ROWS * 8 : 0);
        lane = threadIdx.x % 32;
        warp_row = threadIdx.x / 32 * 16 * MT;
        row_end = min(int(p.sizes.tokens), row + ROWS);
        if (LISTED) {
            int border = max(0, row - int(p.window));
            near_first = border - stay_before(border), near_end = row_end - stay_before(row_end);
            far_seen = stay_before(row_end);
        } else {
            near_first = max(0, row - int(p.window) + 1);
            near_end = p.window > 0 && !p.dense ? row_end : near_first;
            far_seen = far_count(p, x.far_before, at.list, row_end - 1);
        }
        near_tiles = (near_end - near_first + NB - 1) / NB;
        far_tiles = (far_seen + NB - 1) / NB;
    }

    // How many tokens before one are not hidden.
    SFA_DEVICE int stay_before(int token) const { return int(x.far_before[at.list * (p.sizes.tokens + 1) + token]); }

    // Where LISTED: per row, how many of the tokens that stay it sees, and the first hidden one.
    SFA_DEVICE void note_rows() {
        if (threadIdx.x >= ROWS) return;
        int row = min(block_row + int(threadIdx.x), row_end - 1), border = max(0, row - int(p.window));
        hw::store(seen, threadIdx.x * 8, uint2{uint32_t(stay_before(row + 1)), uint32_t(border - stay_before(border))});
    }

    // The columns of one kind that a row sees.
    SFA_DEVICE Span span(bool near, int row) const {
        if (LISTED) {
            uint2 counts = hw::load<uint2>(seen, (row - block_row) * 8);
            return near ? Span{int(counts.y), row + 1 - int(counts.x)} : Span{0, int(counts.x)};
        }
        if (near) return {row - int(p.window) + 1, row + 1};
        return {0, far_count(p, x.far_before, at.list, row)};
    }

    // The buffers of a step.
    SFA_DEVICE void turn(int step) {
        uint32_t odd = step % 2;
        k = hw::tile(Q_BYTES + odd * 2 * K_BYTES, K_BYTES);
        v = hw::tile(Q_BYTES + odd * 2 * K_BYTES + K_BYTES, K_BYTES);
        words = words_of(step);
    }

    SFA_DEVICE hw::Tile words_of(int step) const { return hw::tile(Q_BYTES + 4 * K_BYTES + step % 2 * LN_BYTES, LN_BYTES); }

    // The token index of this lane's row r; kept in place, or addresses made from it would be held throughout.
    SFA_DEVICE int row_of(int r) const {
        uint32_t first = block_row + warp_row + lane / 4;
        hw::keep_in_place(first);
        return int(first) + r / 2 * 16 + r % 2 * 8;
    }

    // FULL: not one of the masked.
    template <bool FULL>
    SFA_DEVICE Columns columns(int step) const {
        if (!FULL && step < near_tiles) {
            int first = near_first + (near_tiles - 1 - step) * NB;
            return {true, first, min(NB, near_end - first)};
        }
        int first = (far_tiles - 1 - (step - near_tiles)) * NB;
        return {false, first, min(NB, far_seen - first)};
    }

    template <bool FULL>
    SFA_DEVICE void load_columns(const Columns& c, const hw::Tile& tile, Halves raw, const Rows& rows, Halves far) {
        bool from_raw = (!FULL && c.near) || p.dense;
        int64_t first = from_raw ? rows.at(at.batch, at.kv_head, c.first)
                                 : (at.list * p.capacity + c.first) * p.sizes.head_dim;
        int64_t stride = from_raw ? rows.token_stride : p.sizes.head_dim;
        load_rows<D, NB, THREADS, FULL>(tile, from_raw ? raw : far, first, stride, c.count, p.sizes.head_dim);
    }

    SFA_DEVICE bool has_sizes(const Columns& c) const { return !LISTED && !c.near && x.far_ln; }

    // Where the token of this thread's column is, if LISTED.
    SFA_DEVICE int64_t listed_at(const Columns& c, int column) const {
        int64_t list = at.list * p.capacity;
        return c.near ? list + p.sizes.tokens - 1 - (c.first + column) : list + c.first + column;
    }

    // Starts the tokens of a step's columns on their way.
    SFA_DEVICE void load_tokens(int step) {
        Columns c = columns<false>(step);
        bool there = int(threadIdx.x) < c.count;
        if (threadIdx.x < NB)
            hw::copy_async_word(words_of(step), threadIdx.x * 4, x.far_index, there ? listed_at(c, threadIdx.x) : 0, there);
    }

    template <bool FULL>
    SFA_DEVICE void load_listed(const Columns& c, const hw::Tile& tile, Halves raw, const Rows& rows) {
        int64_t first = rows.at(at.batch, at.kv_head, 0);
        load_listed_rows<D, NB, THREADS, FULL>(tile, raw, first, uint32_t(rows.token_stride), words, 4, c.count,
                                               p.sizes.head_dim);
    }

    // Starts on its way what a step reads.
    template <bool FULL>
    SFA_DEVICE void load(int step) {
        Columns c = columns<FULL>(step);
        turn(step);
        if constexpr (LISTED) {
            load_listed<FULL>(c, k, x.k, p.k);
            load_listed<FULL>(c, v, x.v, p.v);
            if (step + 1 < near_tiles + far_tiles) load_tokens(step + 1);
        } else {
            load_columns<FULL>(c, k, x.k, p.k, x.far_k);
            load_columns<FULL>(c, v, x.v, p.v, x.far_v);
            if (has_sizes(c)) load_words<NB>(words, x.far_ln, at.list * p.capacity + c.first, c.count);
        }
        hw::copy_commit();
    }

    SFA_DEVICE void load_queries() {
        int64_t first = p.q.at(at.batch, at.head, block_row);
        load_rows<D, ROWS, THREADS, false>(q, x.q, first, p.q.token_stride, row_end - block_row, p.sizes.head_dim);
        if (threadIdx.x < NB) hw::store(bad, threadIdx.x * 4, 0u);
        if (threadIdx.x < 4) hw::store(bad, (NB + threadIdx.x) * 4, 0u);
        hw::copy_commit();
    }

    // A negative scale turns the queries around, so that logits only ever meet a scale of at least 0.
    SFA_DEVICE void negate_queries() {
        for (uint32_t i = threadIdx.x; i < Q_BYTES / 4; i += THREADS)
            hw::store(q, i * 4, hw::load<uint32_t>(q, i * 4) ^ 0x80008000u);
        __syncthreads();
    }

    // Rows start at their edge columns, or from nothing.
    SFA_DEVICE void edges() {
        if (LISTED) {
#pragma unroll
            for (int r = 0; r < R; r++) softmax.maximum[r] = -hw::infinity(), softmax.sum[r] = 0;
#pragma unroll
            for (int i = 0; i < MT * D / 2; i++) output[i / (D / 2)][i / 4 % (D / 8)][i % 4] = 0;
            return;
        }
#pragma unroll
        for (int r = 0; r < R; r++) {
            int row = row_of(r), token = edge_token(p, x.far_before, at.list, row);
            float logit = 0;
            Halves key = edge_row(p, x.folded_k, x.k, p.k, at, max(token, 0));
            Halves value = edge_row(p, x.folded_v, x.v, p.v, at, max(token, 0));
            if (token >= 0) {
                for (uint32_t chunk = lane % 4; chunk * 8 < p.sizes.head_dim; chunk += 4) {
                    uint4 a = hw::load<uint4>(q, Layout<D>::chunk(row - block_row, chunk));
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
                weight = softmax.start(r, logit, lane % 4 == 0);
                if (EXTRAS && p.dropout_cut != 0) weight *= dropout_factor(p, at, row, token);
            } else {
                softmax.maximum[r] = -hw::infinity(), softmax.sum[r] = 0;
            }
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                uint32_t column = d * 8 + lane % 4 * 2, pair = 0;
                if (token >= 0 && column < p.sizes.head_dim) pair = load_vector<uint32_t>(value, column);
                output[r / 2][d][r % 2 * 2] = weight * hw::low<T>(pair);
                output[r / 2][d][r % 2 * 2 + 1] = weight * hw::high<T>(pair);
            }
        }
    }

    // The columns, counted from the tile's first, that rows of this warp see.
    SFA_DEVICE Span reach(const Columns& c) const {
        int first = block_row + warp_row, last = min(first + 16 * MT, row_end) - 1;
        if (last < first) return {0, 0};
        return {max(0, span(c.near, first).begin - c.first), min(c.count, span(c.near, last).end - c.first)};
    }

    // Adds ln n and the bias; the logits are in base 2 then.
    SFA_DEVICE void add_terms(float (&s)[MT][NT][4], const Columns& c) {
        bool sizes = has_sizes(c);
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float2 size = sizes ? hw::load<float2>(words, (n * 8 + lane % 4 * 2) * 4) : float2{0, 0};
#pragma unroll
            for (int i = 0; i < 4 * MT; i++) {
                float& logit = s[i / 4][n][i % 4];
                logit = logit * p.scale + (i % 2 ? size.y : size.x) * LOG2_E;
                if (EXTRAS && x.bias) {
                    int row = row_of(i / 2), column = n * 8 + lane % 4 * 2 + i % 2;
                    if (row < row_end && column < c.count) logit += bias_at(p, x.bias, at, row, token(c, column));
                }
            }
        }
    }

    SFA_DEVICE int token(const Columns& c, int column) const {
        if (LISTED) return int(x.far_index[listed_at(c, column)]);
        return c.near || p.dense ? c.first + column : int(x.far_index[at.list * p.capacity + c.first + column]);
    }

    // Hides columns from the rows that do not see them.
    SFA_DEVICE void mask(float (&s)[MT][NT][4], const Columns& c) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            Span visible = span(c.near, min(row_of(r), row_end - 1));
            int first = c.first + lane % 4 * 2, begin = visible.begin - first, end = visible.end - first;
#pragma unroll
            for (int n = 0; n < NT; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int column = n * 8 + i;
                    if (column < begin || column >= end) s[r / 2][n][r % 2 * 2 + i] = -hw::infinity();
                }
            }
        }
    }

    // Logits to weights, in place; scales what was summed before.
    SFA_DEVICE void weigh(float (&s)[MT][NT][4], float scale) {
        float rescale[R];
        bool any = false;
#pragma unroll
        for (int r = 0; r < R; r++) {
            float largest = -hw::infinity();
#pragma unroll
            for (int n = 0; n < NT; n++) {
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
#pragma unroll
        for (int r = 0; r < R; r++) {
            float base = softmax.base(r), sum = 0;
#pragma unroll
            for (int i = 0; i < 2 * NT; i++) {
                float& weight = s[r / 2][i / 2][r % 2 * 2 + i % 2];
                weight = hw::exp2(weight * scale - base);
                sum += weight;
            }
            softmax.sum[r] += sum;
        }
    }

    SFA_DEVICE void drop(float (&s)[MT][NT][4], const Columns& c) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4 * MT; i++) {
                int column = n * 8 + lane % 4 * 2 + i % 2;
                if (column < c.count) s[i / 4][n][i % 4] *= dropout_factor(p, at, row_of(i / 2), token(c, column));
            }
        }
    }

    // Of numbers that are not finite. `careful`: tiles are searched for them; where not, `suspect` is NaN once a logit was
    // one. `first_bad`: the first token found that all later rows see.
    struct Search {
        bool careful;
        float suspect;
        int first_bad;
    };

    // One tile, which is under way. MASKED: some rows do not see some of its columns, or it is searched for numbers that
    // are not finite.
    template <bool MASKED>
    SFA_DEVICE void step(int index, int steps, Search& state) {
        hw::copy_wait<0>();
        __syncthreads();
        if (index + 1 < steps) load<!MASKED>(index + 1);
        turn(index);
        Columns c = columns<!MASKED>(index);
        if (MASKED && state.careful && (LISTED || c.near || p.dense)) {
            int row = quarantine<T, D, NB, THREADS>(k, v, bad);
            // Who sees a hidden token is in a block that finds it by itself.
            if (row < NB && !(LISTED && c.near)) state.first_bad = min(state.first_bad, token(c, row));
        }
        Span wanted = MASKED ? reach(c) : Span{0, NB};
        if (MASKED && wanted.begin >= wanted.end) return;
        float s[MT][NT][4];
#pragma unroll
        for (int i = 0; i < MT * NT * 4; i++) s[i / (NT * 4)][i / 4 % NT][i % 4] = 0;
        multiply_rows<T, D, MT, NT, MASKED>(s, query_rows, q, key_rows, k, wanted);
        if (MASKED) {
#pragma unroll
            for (int i = 0; i < MT * NT * 4; i++) state.suspect += s[i / (NT * 4)][i / 4 % NT][i % 4] * 0.f;
        }
        float scale = p.scale;
        if (has_sizes(c) || (EXTRAS && x.bias) || scale == 0.f) {
            add_terms(s, c);
            scale = 1;
        }
        if (MASKED) mask(s, c);
        weigh(s, scale);
        if (EXTRAS && p.dropout_cut != 0) drop(s, c);
        multiply_weights<T, D, MT, NT, MASKED>(output, value_rows, s, v, wanted);
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
            note(SUSPECT, check != 0.f);
        }
    }

    // Words after the marks of bad columns, 0 at first: whether a number that is not finite was met, and whether the block
    // has started again for its sake.
    static constexpr uint32_t SUSPECT = (NB + 1) * 4, CAREFUL = (NB + 2) * 4;
    SFA_DEVICE void note(uint32_t what, bool holds) const {
        if (holds) hw::store(bad, what, 1u);
    }
    SFA_DEVICE bool noted(uint32_t what) const { return hw::load<uint32_t>(bad, what) != 0; }

    // Writes; a row that holds anything not finite is NaN throughout.
    SFA_DEVICE void finish() {
        // The warp's rows of the query tile, which its lanes have read for one another, are about to hold the output.
        __syncwarp();
#pragma unroll
        for (int r = 0; r < R; r++) {
            bool sound = hw::finite(output[r / 2][0][r % 2 * 2]);
            int row = row_of(r);
            if (x.log_sum_exp && row < row_end && lane % 4 == 0)
                x.log_sum_exp.set(at.batch_head * p.sizes.tokens + row, softmax.log_sum_exp(r));
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                float a = output[r / 2][d][r % 2 * 2], b = output[r / 2][d][r % 2 * 2 + 1];
                uint32_t pair = sound ? T::pack(a, b) : 0x7fff7fffu;
                hw::store(q, Layout<D>::chunk(row - block_row, d) + lane % 4 * 4, pair);
            }
        }
        // A warp's rows of the query tile were read by itself alone.
        __syncwarp();
        for (uint32_t i = lane; i < 16 * MT * Layout<D>::CHUNKS; i += 32) {
            uint32_t row = warp_row + i / Layout<D>::CHUNKS, chunk = i % Layout<D>::CHUNKS;
            if (block_row + int(row) >= row_end || chunk * 8 >= p.sizes.head_dim) continue;
            int64_t target = (at.batch_head * p.sizes.tokens + block_row + row) * p.sizes.head_dim + chunk * 8;
            store_vector(x.output, target, hw::load<uint4>(q, Layout<D>::chunk(row, chunk)));
        }
    }

    // From nothing to quotients, over all columns.
    SFA_DEVICE void attend(uint32_t first_bad_at) {
        int steps = near_tiles + far_tiles;
        if (LISTED) {
            // A row sees its own token: there is a step.
            load_tokens(0);
            hw::copy_commit();
            hw::copy_wait<0>();
            __syncthreads();
        }
        if (steps > 0) load<false>(0);
        if (steps > 0) hw::copy_wait<1>();
        else hw::copy_wait<0>();
        __syncthreads();
        edges();
        // Every row sees these far columns.
        int full = p.dense && !p.causal ? 0 : span(false, block_row).end / NB;
        int masked = steps - full;
        // Without causality every tile is searched: none is masked.
        Search state{(p.dense && !p.causal) || noted(CAREFUL), 0, int(p.sizes.tokens)};
#pragma unroll 1
        for (int i = 0; i < masked; i++) step<true>(i, steps, state);
        note(SUSPECT, state.suspect != 0.f);
        if (x.first_bad && threadIdx.x == 0) x.first_bad.set(first_bad_at, uint32_t(state.first_bad));
#pragma unroll 1
        for (int i = masked; i < steps; i++) step<false>(i, steps, state);
        divide();
    }

    // `first_bad_at`: where the block notes the first bad token.
    SFA_DEVICE void run(uint32_t first_bad_at) {
        load_queries();
        if (LISTED) note_rows();
        if (p.scale_sign < 0) {
            hw::copy_wait<0>();
            __syncthreads();
            negate_queries();
        }
#pragma unroll 1
        for (;;) {
            attend(first_bad_at);
            __syncthreads();
            if (!noted(SUSPECT) || noted(CAREFUL)) break;
            __syncthreads();
            note(CAREFUL, threadIdx.x == 0);
        }
        finish();
    }
};
