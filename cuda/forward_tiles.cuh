// The columns of a block of query rows in tiles: which rows see which, and how tiles get into shared memory.
//
// A row's columns: the edge first, row by row; then near tiles of raw tokens, then far tiles, each from the last to the
// first, so that the tiles that need a mask come first and the rest runs without one. LISTED (see params.cuh): no edge;
// hidden tokens in place of the near ones, and tokens that stay, up to the row's own, in place of the far ones.
#pragma once

#include "attention.cuh"

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

// Four warps of 16 * MT rows, tiles of NB columns.
template <int D, int MT, int NB, bool LISTED>
struct ForwardTiles {
    static constexpr int THREADS = 128, ROWS = 64 * MT;
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
    int lane, warp_row, block_row, row_end;
    int near_first, near_end, near_tiles, far_seen, far_tiles;

    SFA_DEVICE ForwardTiles(const AttentionParams& p, const ForwardTensors& x, uint32_t batch_head, int row)
        : p(p), x(x), at(p, batch_head), block_row(row) {
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

    SFA_DEVICE int token(const Columns& c, int column) const {
        if (LISTED) return int(x.far_index[listed_at(c, column)]);
        return c.near || p.dense ? c.first + column : int(x.far_index[at.list * p.capacity + c.first + column]);
    }

    // The columns, counted from the tile's first, that rows of this warp see.
    SFA_DEVICE Span reach(const Columns& c) const {
        int first = block_row + warp_row, last = min(first + 16 * MT, row_end) - 1;
        if (last < first) return {0, 0};
        return {max(0, span(c.near, first).begin - c.first), min(c.count, span(c.near, last).end - c.first)};
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
        if (threadIdx.x < 2) hw::store(bad, (NB + threadIdx.x) * 4, 0u);
        hw::copy_commit();
    }

    // A negative scale turns the queries around, so that logits only ever meet a scale of at least 0.
    SFA_DEVICE void negate_queries() {
        for (uint32_t i = threadIdx.x; i < Q_BYTES / 4; i += THREADS)
            hw::store(q, i * 4, hw::load<uint32_t>(q, i * 4) ^ 0x80008000u);
        __syncthreads();
    }
};
