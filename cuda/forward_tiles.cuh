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
    Global<uint16_t> output, rest;
    Global<float> log_sum_exp;
    Global<uint32_t> first_bad;
};

// Four warps of 16 * MT rows, tiles of NB columns.
template <int D, int MT, int NB, bool LISTED>
struct ForwardTiles {
    static constexpr int THREADS = 128, ROWS = 64 * MT;
    static constexpr uint32_t Q_BYTES = ROWS * D * 2, K_BYTES = NB * D * 2, LN_BYTES = NB * 4;
    static constexpr uint32_t BAD_AT = Q_BYTES + 4 * K_BYTES + 2 * LN_BYTES, FACTS_AT = BAD_AT + (NB + 4) * 4;
    static constexpr uint32_t KEYS_START = 32, VALUES_START = 40, FACTS = 48, SEEN_AT = FACTS_AT + FACTS;
    static_assert(NB <= THREADS && ROWS <= THREADS, "a thread per column and per row");

    // A tile's columns: far columns, or tokens (hidden ones where LISTED), from `first` on.
    struct Columns {
        bool near;
        int first, count;
    };

    const AttentionParams& p;
    const ForwardTensors& x;
    // `seen`: two words a row, see `note_rows`; `facts`: see `note_facts`; `held`: the first two, where hw::HOLDS.
    hw::Tile q, bad, facts, seen;
    uint4 held[2];

    SFA_DEVICE ForwardTiles(const AttentionParams& p, const ForwardTensors& x) : p(p), x(x) {
        q = hw::tile(0, Q_BYTES);
        bad = hw::tile(BAD_AT, (NB + 4) * 4);
        facts = hw::tile(FACTS_AT, FACTS);
        seen = hw::tile(SEEN_AT, LISTED ? ROWS * 8 : 0);
    }

    SFA_DEVICE int lane() const { return hw::thread() % 32; }
    SFA_DEVICE int warp_row() const { return hw::thread() / 32 * 16 * MT; }

    // What is the same for a whole block lies in shared memory: in registers it would be held while products need them all
    // (but see hw::HOLDS). Batch, head, KV head, first row; near_first, near_end, far_seen, careful; and where the keys and
    // values of far columns start, or those of raw tokens. Where LISTED, what rows see, from the same reads. A meeting point.
    SFA_DEVICE void note_facts(uint32_t batch_head, int row, bool careful) {
        HeadIndex at(p, batch_head);
        int end = min(int(p.sizes.tokens), row + ROWS);
        if (LISTED) {
            note_rows(at, row, end);
        } else if (hw::thread() == 0) {
            int near_first = max(0, row - int(p.window) + 1), near_end = p.window > 0 && !p.dense ? end : near_first;
            hw::store(facts, 16, uint2{uint32_t(near_first), uint32_t(near_end)});
            hw::store(facts, 24, far_count(p, x.far_before, at.list, end - 1));
        }
        if (hw::thread() == 0) {
            hw::store(facts, 0, uint4{at.batch, at.head, at.kv_head, uint32_t(row)});
            hw::store(facts, 28, int(careful));
            bool raw = LISTED || p.dense;
            int64_t far = at.list * p.capacity * p.sizes.head_dim;
            hw::store(facts, KEYS_START, raw ? int64_t(p.k.at(at.batch, at.kv_head, 0)) : far);
            hw::store(facts, VALUES_START, raw ? int64_t(p.v.at(at.batch, at.kv_head, 0)) : far);
        }
        __syncthreads();
    }

    SFA_DEVICE void hold() {
        if (hw::HOLDS) held[0] = hw::load<uint4>(facts, 0), held[1] = hw::load<uint4>(facts, 16);
    }
    SFA_DEVICE uint4 fact(int i) const { return hw::HOLDS ? held[i] : hw::load<uint4>(facts, i * 16); }

    SFA_DEVICE HeadIndex at() const {
        uint4 place = fact(0);
        return HeadIndex(p, place.x, place.y, place.z);
    }
    SFA_DEVICE int block_row() const { return hw::HOLDS ? int(held[0].w) : hw::load<int>(facts, 12); }
    SFA_DEVICE int row_end() const { return min(int(p.sizes.tokens), block_row() + ROWS); }

    // Whether tiles are searched for numbers that are not finite.
    SFA_DEVICE bool careful() const { return hw::load<int>(facts, 28) != 0; }
    SFA_DEVICE void be_careful() {
        __syncthreads();
        if (hw::thread() == 0) hw::store(facts, 28, 1);
        __syncthreads();
    }

    // Columns of each kind that rows of the block see, and tiles of them.
    struct Bounds {
        int near_first, near_end, far_seen;

        SFA_DEVICE int near_tiles() const { return (near_end - near_first + NB - 1) / NB; }
        SFA_DEVICE int far_tiles() const { return (far_seen + NB - 1) / NB; }
        SFA_DEVICE int steps() const { return near_tiles() + far_tiles(); }
    };
    SFA_DEVICE Bounds bounds() const {
        uint4 found = fact(1);
        return {int(found.x), int(found.y), int(found.z)};
    }

    // How many tokens before one are not hidden.
    SFA_DEVICE int stay_before(const HeadIndex& at, int token) const {
        return int(x.far_before[at.list * (p.sizes.tokens + 1) + token]);
    }

    // Where LISTED: per row from `first` to `end`, how many of the tokens that stay it sees, and the first hidden one; the first
    // row and the last one have the block's facts.
    SFA_DEVICE void note_rows(const HeadIndex& at, int first, int end) {
        int thread = hw::thread(), row = min(first + thread, end - 1), border = max(0, row - int(p.window));
        if (thread >= ROWS) return;
        int stay = stay_before(at, row + 1), hidden = border - stay_before(at, border);
        hw::store(seen, thread * 8, uint2{uint32_t(stay), uint32_t(hidden)});
        if (thread == 0) hw::store(facts, 16, hidden);
        if (first + thread == end - 1) hw::store(facts, 20, end - stay), hw::store(facts, 24, stay);
    }

    // The columns of one kind that a row of the block sees, which starts at `first`.
    SFA_DEVICE Span span(bool near, int row, int first) const {
        if (LISTED) {
            uint2 counts = hw::load<uint2>(seen, (row - first) * 8);
            return near ? Span{int(counts.y), row + 1 - int(counts.x)} : Span{0, int(counts.x)};
        }
        if (near) return {row - int(p.window) + 1, row + 1};
        return {0, far_count(p, x.far_before, at().list, row)};
    }

    // A step goes by how many are left after it. Its buffers; `words`: ln n of far columns, or where LISTED the columns'
    // tokens.
    SFA_DEVICE hw::Tile keys(uint32_t left) const { return hw::tile(Q_BYTES + left % 2 * 2 * K_BYTES, K_BYTES); }
    SFA_DEVICE hw::Tile values(uint32_t left) const { return hw::tile(Q_BYTES + (left % 2 * 2 + 1) * K_BYTES, K_BYTES); }
    SFA_DEVICE hw::Tile words(uint32_t left) const {
        return hw::tile(Q_BYTES + 4 * K_BYTES + left % 2 * LN_BYTES, LN_BYTES);
    }

    SFA_DEVICE int token(const Columns& c, int column) const {
        if (LISTED) return int(x.far_index[listed_at(c, column)]);
        return c.near || p.dense ? c.first + column : int(x.far_index[at().list * p.capacity + c.first + column]);
    }

    // The columns, counted from the tile's first, that rows of this warp see.
    SFA_DEVICE Span reach(const Columns& c) const {
        int block = block_row(), end = min(int(p.sizes.tokens), block + ROWS);
        int first = block + warp_row(), last = min(first + 16 * MT, end) - 1;
        if (last < first) return {0, 0};
        Span top = span(c.near, first, block), bottom = span(c.near, last, block);
        return {max(0, top.begin - c.first), min(c.count, bottom.end - c.first)};
    }

    // FULL: not one of the masked.
    template <bool FULL>
    SFA_DEVICE Columns columns(uint32_t left) const {
        int first = int(left) * NB;
        if (FULL) return {false, first, NB};
        Bounds b = bounds();
        if (int(left) >= b.far_tiles()) {
            first = b.near_first + (int(left) - b.far_tiles()) * NB;
            return {true, first, min(NB, b.near_end - first)};
        }
        return {false, first, min(NB, b.far_seen - first)};
    }

    template <bool FULL>
    SFA_DEVICE void load_columns(const Columns& c, const hw::Tile& tile, Halves raw, const Rows& rows, Halves far,
                                 uint32_t start) {
        bool from_raw = (!FULL && c.near) || p.dense;
        int64_t stride = from_raw ? rows.token_stride : p.sizes.head_dim, first = c.first * stride;
        if (!FULL && c.near) {
            HeadIndex head = at();
            first += rows.at(head.batch, head.kv_head, 0);
        } else {
            first += hw::load<int64_t>(facts, start);
        }
        load_rows<D, NB, THREADS, FULL>(tile, from_raw ? raw : far, first, stride, c.count, p.sizes.head_dim, hw::thread());
    }

    SFA_DEVICE bool has_sizes(const Columns& c) const { return !LISTED && !c.near && x.far_ln; }

    // Where the token of this thread's column is, if LISTED.
    SFA_DEVICE int64_t listed_at(const Columns& c, int column) const {
        int64_t list = at().list * p.capacity;
        return c.near ? list + p.sizes.tokens - 1 - (c.first + column) : list + c.first + column;
    }

    // Starts the tokens of a step's columns on their way.
    template <bool FULL>
    SFA_DEVICE void load_tokens(uint32_t left) {
        Columns c = columns<FULL>(left);
        bool there = int(hw::thread()) < c.count;
        if (hw::thread() < NB)
            hw::copy_async_word(words(left), hw::thread() * 4, x.far_index, there ? listed_at(c, hw::thread()) : 0, there);
    }

    template <bool FULL>
    SFA_DEVICE void load_listed(uint32_t left, const Columns& c, const hw::Tile& tile, Halves raw, const Rows& rows,
                                uint32_t start) {
        int64_t first = hw::load<int64_t>(facts, start);
        load_listed_rows<D, NB, THREADS, FULL>(tile, raw, first, uint32_t(rows.token_stride), words(left), 4,
                                               c.count, p.sizes.head_dim, hw::thread());
    }

    // Starts on its way what a step reads.
    template <bool FULL>
    SFA_DEVICE void load(uint32_t left) {
        Columns c = columns<FULL>(left);
        if constexpr (LISTED) {
            load_listed<FULL>(left, c, keys(left), x.k, p.k, KEYS_START);
            load_listed<FULL>(left, c, values(left), x.v, p.v, VALUES_START);
            if (left > 0) load_tokens<FULL>(left - 1);
        } else {
            load_columns<FULL>(c, keys(left), x.k, p.k, x.far_k, KEYS_START);
            load_columns<FULL>(c, values(left), x.v, p.v, x.far_v, VALUES_START);
            if (has_sizes(c)) {
                int64_t first = at().list * p.capacity + c.first;
                load_words<NB>(words(left), x.far_ln, first, c.count, hw::thread());
            }
        }
        hw::copy_commit();
    }

    SFA_DEVICE void load_queries() {
        HeadIndex head = at();
        int64_t first = p.q.at(head.batch, head.head, block_row());
        load_rows<D, ROWS, THREADS, false>(q, x.q, first, p.q.token_stride, row_end() - block_row(), p.sizes.head_dim,
                                            hw::thread());
        if (hw::thread() < NB) hw::store(bad, hw::thread() * 4, 0u);
        if (hw::thread() < 2) hw::store(bad, (NB + hw::thread()) * 4, 0u);
        if (hw::thread() == 0) hw::store(bad, FIRST_BAD, p.sizes.tokens);
        hw::copy_commit();
    }

    // The first token that is not finite and that all later rows see: the first thread's.
    static constexpr uint32_t FIRST_BAD = (NB + 2) * 4;
    SFA_DEVICE uint32_t first_bad() const { return hw::load<uint32_t>(bad, FIRST_BAD); }
    SFA_DEVICE void note_bad(int token) {
        if (hw::thread() == 0) hw::store(bad, FIRST_BAD, min(first_bad(), uint32_t(token)));
    }

    // A negative scale turns the queries around, so that logits only ever meet a scale of at least 0.
    SFA_DEVICE void negate_queries() {
        for (uint32_t i = hw::thread(); i < Q_BYTES / 4; i += THREADS)
            hw::store(q, i * 4, hw::load<uint32_t>(q, i * 4) ^ 0x80008000u);
        __syncthreads();
    }
};
