// The columns of a block of query rows in tiles: which rows see which columns, and the copies of tiles to shared
// memory.
//
// A row starts with its edge column. Then come tiles of near tokens, then tiles of far columns, each kind from the last
// tile to the first. So the tiles that need a mask come first, and the rest runs without one. LISTED (see params.cuh):
// there is no edge; the columns are the tokens that stay, up to the row's own, followed by the hidden tokens of the
// window, in common tiles.
//
// SLIDING: rows have a left border too, that of a sliding window. The walk ends at the first tile that a row of the
// block sees, and the tiles at the left border need a mask again (`Walk`). Blocks of rows may be left out, too.
#pragma once

#include "lib/attention.cuh"

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
    // (H)
    Floats sinks;
};

// Four warps of 16 * M rows, tiles of N columns; each warp multiplies its own rows.
template <int DIM, int M, int N, bool BY_LISTS, bool SLIDES>
struct WarpShape {
    static constexpr int D = DIM, MT = M, NB = N, THREADS = 128, ROWS = 64 * M;
    static constexpr bool LISTED = BY_LISTS, SLIDING = SLIDES;
    // TOGETHER: rows that are multiplied together. STAGES: tiles of keys and values in shared memory. WORDS: tiles
    // whose words are.
    static constexpr int TOGETHER = 16 * M, STAGES = 2, WORDS = 2;
    // SLOTS: blocks of rows whose facts are kept. STAGING: bytes of a buffer for the output, which else replaces the
    // queries. QUEUE: see RowBlocks.
    static constexpr int SLOTS = 1, STAGING = 0, QUEUE = 1024;
    typedef Layout<D> Queries;
    typedef Layout<D> Tile;

    // A barrier of the attending threads.
    SFA_DEVICE static void meet() { __syncthreads(); }
};

// A block of query rows and its columns, in the shape S: D elements a row, 16 * MT rows a warp, tiles of NB columns.
template <class S>
struct ForwardTiles {
    static constexpr int D = S::D, MT = S::MT, NB = S::NB, THREADS = S::THREADS, ROWS = S::ROWS;
    static constexpr bool LISTED = S::LISTED, SLIDING = S::SLIDING;
    static_assert(!(LISTED && SLIDING), "listed columns have no left border");
    static constexpr uint32_t Q_BYTES = ROWS * D * 2, K_BYTES = NB * D * 2, LN_BYTES = NB * 4;
    static constexpr uint32_t STAGING_AT = Q_BYTES + 2 * S::STAGES * K_BYTES, WORDS_AT = STAGING_AT + S::STAGING;
    static constexpr uint32_t BAD_AT = WORDS_AT + S::WORDS * LN_BYTES, FACTS_AT = BAD_AT + (NB + 4) * 4;
    static constexpr uint32_t KEYS_START = 32, VALUES_START = 40, FACTS = 48, SEEN = LISTED ? ROWS * 8 : 0;
    static constexpr uint32_t NOTES_AT = FACTS_AT + S::SLOTS * (FACTS + SEEN);
    static_assert(NB <= THREADS && ROWS <= THREADS, "a thread per column and per row");

    // A tile's columns: far columns, or tokens if `near`, from `first` on. LISTED: the columns that the block sees,
    // tokens that stay before hidden ones.
    struct Columns {
        bool near;
        int first, count;
    };

    const AttentionParams& p;
    const ForwardTensors& x;
    // `staging`: the output's buffer. `seen`: two words a row, see `note_row`. `facts`: see `note_facts`. `held`: its
    // first 32 bytes in registers, if hw::HOLDS.
    hw::Tile q, staging, bad, facts, seen;
    uint4 held[2];

    // `turn`: the number of this block of rows in its block of the grid.
    SFA_DEVICE ForwardTiles(const AttentionParams& p, const ForwardTensors& x, uint32_t turn = 0) : p(p), x(x) {
        q = hw::tile(0, Q_BYTES);
        staging = S::STAGING == 0 ? q : hw::tile(STAGING_AT, S::STAGING);
        bad = hw::tile(BAD_AT, (NB + 4) * 4);
        facts = hw::tile(FACTS_AT + turn % S::SLOTS * (FACTS + SEEN), FACTS);
        seen = hw::tile(FACTS_AT + turn % S::SLOTS * (FACTS + SEEN) + FACTS, SEEN);
    }

    SFA_DEVICE int lane() const { return hw::thread() % 32; }
    SFA_DEVICE int warp_row() const { return hw::thread() / 32 * 16 * MT; }

    // Writes the facts of a block of rows. They lie in shared memory: in registers they would be held while products
    // need them all (but see hw::HOLDS). Words 0 to 3: batch, head, KV head, first row. Words 4 to 7: near_first,
    // near_end, far_seen, careful. Then the elements at which keys and values of far columns start, or those of raw
    // tokens. If LISTED, also `seen`, from the same reads. For COUNT threads, this one being `thread`; readers meet
    // them afterwards.
    template <int COUNT>
    SFA_DEVICE void note_facts(uint32_t batch_head, int row, bool careful, uint32_t thread) {
        HeadIndex at(p, batch_head);
        int end = min(int(p.sizes.tokens), row + ROWS);
        if (LISTED) {
            for (int i = thread; i < ROWS; i += COUNT) note_row(at, row, i, end);
        } else if (thread == 0) {
            int near_first = max(0, row - int(p.window) + 1), near_end = p.window > 0 && !p.dense ? end : near_first;
            hw::store(facts, 16, uint2{uint32_t(near_first), uint32_t(near_end)});
            hw::store(facts, 24, far_count(p, x.far_before, at.list, end - 1));
        }
        if (thread == 0) {
            hw::store(facts, 0, uint4{at.batch, at.head, at.kv_head, uint32_t(row)});
            hw::store(facts, 28, int(careful));
            bool raw = LISTED || p.dense;
            int64_t far = at.list * p.capacity * p.sizes.head_dim;
            hw::store(facts, KEYS_START, raw ? int64_t(p.k.at(at.batch, at.kv_head, 0)) : far);
            hw::store(facts, VALUES_START, raw ? int64_t(p.v.at(at.batch, at.kv_head, 0)) : far);
        }
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

    // The columns of each kind that rows of the block see, and their tiles.
    struct Bounds {
        int near_first, near_end, far_seen;

        SFA_DEVICE int near_count() const { return near_end - near_first; }
        SFA_DEVICE int near_tiles() const { return (near_count() + NB - 1) / NB; }
        SFA_DEVICE int far_tiles() const { return (far_seen + NB - 1) / NB; }
        SFA_DEVICE int steps() const {
            return LISTED ? (far_seen + near_count() + NB - 1) / NB : near_tiles() + far_tiles();
        }
        // LISTED: the distance from a hidden token's number to its column.
        SFA_DEVICE int near_shift() const { return far_seen - near_first; }
    };
    SFA_DEVICE Bounds bounds() const {
        uint4 found = fact(1);
        return {int(found.x), int(found.y), int(found.z)};
    }

    // How many tokens before `token` stay.
    SFA_DEVICE int stay_before(const HeadIndex& at, int token) const {
        return int(x.far_before[at.list * (p.sizes.tokens + 1) + token]);
    }

    // LISTED: notes for row `first + i` how many of the tokens that stay it sees, and its first hidden token. The first
    // and the last row also note the block's facts.
    SFA_DEVICE void note_row(const HeadIndex& at, int first, int i, int end) {
        int row = min(first + i, end - 1), border = max(0, row - int(p.window));
        int stay = stay_before(at, row + 1), hidden = border - stay_before(at, border);
        hw::store(seen, i * 8, uint2{uint32_t(stay), uint32_t(hidden)});
        if (i == 0) hw::store(facts, 16, hidden);
        if (first + i == end - 1) hw::store(facts, 20, end - stay), hw::store(facts, 24, stay);
    }

    // The columns that a row sees, or those of one kind: from `begin` to `end`, and if LISTED also those before `stay`.
    struct Visible {
        int stay, begin, end;

        SFA_DEVICE Visible from(int first) const { return {stay - first, begin - first, end - first}; }

        // A bit for each column 0, 1, 8, 9, 16 ... of a tile: the columns of a row that one thread holds.
        SFA_DEVICE uint32_t bits() const {
            uint32_t near = before(end) & ~before(begin);
            return LISTED ? near | before(stay) : near;
        }
        SFA_DEVICE static uint32_t before(int column) {
            uint32_t within = uint32_t(max(0, min(column, NB))), count = within / 8 * 2 + min(within % 8, 2u);
            return count < 32 ? (1u << count) - 1 : ~0u;
        }
    };

    // The columns that a row sees; its block starts at row `first`.
    SFA_DEVICE Visible visible(bool near, int row, int first) const {
        if (LISTED) {
            uint2 counts = hw::load<uint2>(seen, (row - first) * 8);
            int stay = int(counts.x), shift = bounds().near_shift();
            return {stay, int(counts.y) + shift, row + 1 - stay + shift};
        }
        if (near) return {0, row - int(p.window) + 1, row + 1};
        return {0, SLIDING ? first_seen(row) : 0, int(far_count(p, x.far_before, at().list, row))};
    }

    // The first far column that a row sees.
    SFA_DEVICE int first_seen(int row) const { return far_first(p, x.far_before, at().list, row); }

    // Whether tiles without a mask are watched for numbers that are not finite, too: under a sliding window of raw
    // tokens, and where rows are left out, no other block finds these for the rows of this one.
    SFA_DEVICE bool watches() const {
        return SLIDING && p.dense && (p.slide < p.sizes.tokens || p.first_row > 0);
    }

    // The number of whole tiles of far columns, or of tokens that stay, that every row sees.
    SFA_DEVICE int full_tiles() const {
        if (p.dense && !p.causal) return 0;
        Visible first = visible(false, block_row(), block_row());
        return (LISTED ? first.stay : first.end) / NB;
    }

    // The tiles of a walk, by their numbers from the last on: masked ones down to `end`, whole ones down to `begin`,
    // and those of the left border down to `first`, the last to be visited.
    struct Walk {
        int first, begin, end;
    };
    SFA_DEVICE Walk walk() const {
        if constexpr (!SLIDING) return {0, 0, full_tiles()};
        int first = first_seen(block_row()) / NB;
        int begin = (first_seen(row_end() - 1) + NB - 1) / NB, end = full_tiles();
        // With care every tile is searched that no other block searches.
        if (begin >= end || (careful() && watches())) return {first, first, first};
        return {first, begin, end};
    }

    // The buffers of a tile, by a number that changes by one from tile to tile. `words`: ln n of far columns or, if
    // LISTED, the columns' tokens.
    SFA_DEVICE hw::Tile keys(uint32_t tile) const {
        return hw::tile(Q_BYTES + tile % S::STAGES * 2 * K_BYTES, K_BYTES);
    }
    SFA_DEVICE hw::Tile values(uint32_t tile) const {
        return hw::tile(Q_BYTES + (tile % S::STAGES * 2 + 1) * K_BYTES, K_BYTES);
    }
    SFA_DEVICE hw::Tile words(uint32_t tile) const { return hw::tile(WORDS_AT + tile % S::WORDS * LN_BYTES, LN_BYTES); }

    SFA_DEVICE int token(const Columns& c, int column) const {
        if (LISTED) return int(x.far_index[listed_at(c, column)]);
        return c.near || p.dense ? c.first + column : int(x.far_index[at().list * p.capacity + c.first + column]);
    }

    // The columns, counted from the tile's first, that are seen by the rows that are multiplied together with this
    // thread's.
    SFA_DEVICE Span reach(const Columns& c) const {
        int block = block_row(), end = min(int(p.sizes.tokens), block + ROWS);
        int first = block + warp_row() / S::TOGETHER * S::TOGETHER, last = min(first + S::TOGETHER, end) - 1;
        if (last < first) return {0, 0};
        Visible top = visible(c.near, first, block).from(c.first), bottom = visible(c.near, last, block).from(c.first);
        Span all{max(0, top.begin), min(c.count, bottom.end)};
        if (LISTED && bottom.stay > 0) all = {0, max(all.end, min(c.count, bottom.stay))};
        return all;
    }

    // FULL: a tile that needs no mask.
    template <bool FULL>
    SFA_DEVICE Columns columns(uint32_t left) const {
        int first = int(left) * NB;
        if (FULL) return {false, first, NB};
        Bounds b = bounds();
        if (LISTED) return {false, first, min(NB, b.far_seen + b.near_count() - first)};
        if (int(left) >= b.far_tiles()) {
            first = b.near_first + (int(left) - b.far_tiles()) * NB;
            return {true, first, min(NB, b.near_end - first)};
        }
        return {false, first, min(NB, b.far_seen - first)};
    }

    // Starts the copies of a tile's keys or values, by THREADS threads, this one being `thread`. `start`: KEYS_START or
    // VALUES_START. LISTED: `tokens` as in `load_listed_rows`.
    template <bool FULL, int THREADS, class Tokens>
    SFA_DEVICE void load_columns(const Columns& c, const hw::Tile& tile, Halves raw, const Rows& rows, Halves far,
                                 uint32_t start, const Tokens& tokens, uint32_t thread) {
        uint32_t dim = p.sizes.head_dim;
        if constexpr (LISTED) {
            int64_t first = hw::load<int64_t>(facts, start);
            load_listed_rows<typename S::Tile, NB, THREADS, FULL>(tile, raw, first, uint32_t(rows.token_stride), tokens,
                                                                  c.count, dim, thread);
            return;
        }
        bool from_raw = (!FULL && c.near) || p.dense;
        int64_t stride = from_raw ? rows.token_stride : dim, first = c.first * stride;
        if (!FULL && c.near) {
            HeadIndex head = at();
            first += rows.at(head.batch, head.kv_head, 0);
        } else {
            first += hw::load<int64_t>(facts, start);
        }
        load_rows<typename S::Tile, NB, THREADS, FULL>(tile, from_raw ? raw : far, first, stride, c.count, dim, thread);
    }

    template <bool FULL, int THREADS, class Tokens>
    SFA_DEVICE void load_keys(const Columns& c, const hw::Tile& tile, const Tokens& tokens, uint32_t thread) {
        load_columns<FULL, THREADS>(c, tile, x.k, p.k, x.far_k, KEYS_START, tokens, thread);
    }

    template <bool FULL, int THREADS, class Tokens>
    SFA_DEVICE void load_values(const Columns& c, const hw::Tile& tile, const Tokens& tokens, uint32_t thread) {
        load_columns<FULL, THREADS>(c, tile, x.v, p.v, x.far_v, VALUES_START, tokens, thread);
    }

    SFA_DEVICE bool has_sizes(const Columns& c) const { return !LISTED && !c.near && x.far_ln; }

    template <int COUNT>
    SFA_DEVICE void load_sizes(const Columns& c, const hw::Tile& words, uint32_t thread) {
        if (has_sizes(c)) load_words<NB, COUNT>(words, x.far_ln, at().list * p.capacity + c.first, c.count, thread);
    }

    // LISTED: the index of a column's token in far_index.
    SFA_DEVICE int64_t listed_at(const Columns& c, int column) const {
        Bounds b = bounds();
        int index = c.first + column;
        // Hidden tokens are listed from the end on.
        if (index >= b.far_seen) index = int(p.sizes.tokens) - 1 - (index - b.near_shift());
        return at().list * p.capacity + index;
    }

    // Starts the copies of the queries, by COUNT threads, this one being `thread`.
    template <int COUNT>
    SFA_DEVICE void load_queries(uint32_t thread) {
        HeadIndex head = at();
        int64_t first = p.q.at(head.batch, head.head, block_row());
        load_rows<typename S::Queries, ROWS, COUNT, false>(q, x.q, first, p.q.token_stride, row_end() - block_row(),
                                                           p.sizes.head_dim, thread);
    }

    // Clears the marks of bad columns.
    SFA_DEVICE void clear_marks() {
        if (hw::thread() < NB) hw::store(bad, hw::thread() * 4, 0u);
        if (hw::thread() < 2) hw::store(bad, (NB + hw::thread()) * 4, 0u);
    }

    // The first token that is not finite and that all later rows see. Thread 0 alone reads and writes it.
    static constexpr uint32_t FIRST_BAD = (NB + 2) * 4;
    SFA_DEVICE uint32_t first_bad() const { return hw::load<uint32_t>(bad, FIRST_BAD); }
    SFA_DEVICE void clear_first_bad() {
        if (hw::thread() == 0) hw::store(bad, FIRST_BAD, p.sizes.tokens);
    }
    SFA_DEVICE void note_bad(int token) {
        if (hw::thread() == 0) hw::store(bad, FIRST_BAD, min(first_bad(), uint32_t(token)));
    }

    // A negative scale is moved into the queries, so that logits only meet a scale of at least 0.
    SFA_DEVICE void negate_queries() {
        for (uint32_t i = hw::thread(); i < Q_BYTES / 4; i += THREADS)
            hw::store(q, i * 4, hw::load<uint32_t>(q, i * 4) ^ 0x80008000u);
        S::meet();
    }
};
