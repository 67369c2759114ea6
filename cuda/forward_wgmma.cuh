// One block of query rows against its columns by products of warpgroups (wgmma, sm_90a), after FlashAttention-3 (Shah et al.
// 2024): each warpgroup has 64 rows, and tensor cores read queries, keys and values from shared memory by themselves. While the
// products of one tile's weights and values are under way, and those of the next one's logits, the softmax goes on. Some more
// warps do nothing but start the copies of tiles, so that warpgroups need not meet: mbarriers say what has arrived, and what is
// done with.
#pragma once

#include "forward_rows.cuh"
#include "wgmma.cuh"

// WARPGROUPS of 64 rows, tiles of N columns, STAGES_ of these in shared memory, PRODUCERS_ threads that load, BLOCKS of a
// multiprocessor at a time. Where TAKEN_ is not 0 those that load are a warpgroup that leaves registers to the others, who take
// so many each.
template <int DIM, int WARPGROUPS, int N, int STAGES_, int PRODUCERS_, int TAKEN_, int BLOCKS, bool BY_LISTS>
struct WarpgroupShape {
    static constexpr int D = DIM, MT = 1, NB = N, THREADS = 128 * WARPGROUPS, ROWS = 64 * WARPGROUPS;
    static constexpr int PRODUCERS = PRODUCERS_, TAKEN = TAKEN_;
    // What a thread starts with, and what loading keeps.
    static constexpr int REGISTERS = 65536 / BLOCKS / (THREADS + PRODUCERS) / 8 * 8;
    static constexpr int KEPT = REGISTERS * (WARPGROUPS + 1) - TAKEN * WARPGROUPS;
    static_assert(TAKEN == 0 || (PRODUCERS == 128 && KEPT >= 24), "registers that one takes the others have given");
    static constexpr bool LISTED = BY_LISTS;
    // Words are read when keys are done with, and those of up to two tiles more are on their way then.
    static constexpr int TOGETHER = 64, STAGES = STAGES_, WORDS = STAGES + 2;
    // Facts are noted of a block of rows while the one before is attended, and some still read those of the one before that.
    static constexpr int SLOTS = 3, STAGING = ROWS * D * 2, QUEUE = 2048;
    typedef Panels<D, ROWS> Queries;
    typedef Panels<D, NB> Tile;

    SFA_DEVICE static void meet() { hw::meet<1, THREADS>(); }
};

// The mbarriers of the queries and of a ring of tiles, from byte `at` of shared memory on. Blocks of rows and tiles have numbers,
// which rise by one.
template <class S>
struct Ring {
    uint32_t at;

    SFA_DEVICE hw::Mbarrier queries(bool free) const { return hw::Mbarrier(at + (4 * S::STAGES + free) * hw::Mbarrier::BYTES); }

    SFA_DEVICE hw::Mbarrier here(uint32_t tile, bool values, bool free) const {
        return hw::Mbarrier(at + ((tile % S::STAGES * 2 + values) * 2 + free) * hw::Mbarrier::BYTES);
    }

    // Every block of rows is attended, as far as that goes without care.
    SFA_DEVICE hw::Mbarrier over() const { return hw::Mbarrier(at + (4 * S::STAGES + 2) * hw::Mbarrier::BYTES); }

    SFA_DEVICE void init() const {
        constexpr uint32_t ATTEND = S::THREADS / 32 * hw::Mbarrier::WARP;
        for (uint32_t i = 0; i < 2 * S::STAGES; i++) {
            here(i / 2, i % 2, false).init(S::PRODUCERS);
            here(i / 2, i % 2, true).init(ATTEND);
        }
        queries(false).init(2 * S::PRODUCERS);
        queries(true).init(ATTEND);
        over().init(ATTEND);
    }

    // Until the queries and facts of a block of rows are there; may be overwritten by its.
    SFA_DEVICE void wait_for_queries(uint32_t turn) const { queries(false).wait(turn % 2); }
    SFA_DEVICE void wait_for_room(uint32_t turn) const { queries(true).wait(turn % 2 ^ 1); }
    // This thread's copies of queries are started, and its facts noted.
    SFA_DEVICE void loaded_queries() const {
        queries(false).arrive_after_copies();
        queries(false).arrive();
    }
    // This warp is done with the queries.
    SFA_DEVICE void leave_queries() const { queries(true).arrive_as_warp(); }

    // Until the keys or values of tile number `tile` have arrived; may be overwritten by those of this number.
    SFA_DEVICE void wait_for(uint32_t tile, bool values) const { here(tile, values, false).wait(tile / S::STAGES % 2); }
    SFA_DEVICE void wait_for_room(uint32_t tile, bool values) const { here(tile, values, true).wait(tile / S::STAGES % 2 ^ 1); }

    // This thread's copies to keys or values are all started.
    SFA_DEVICE void loaded(uint32_t tile, bool values) const { here(tile, values, false).arrive_after_copies(); }
    // This warp is done with them.
    SFA_DEVICE void leave(uint32_t tile, bool values) const { here(tile, values, true).arrive_as_warp(); }

    // Until all who attend are through with everything; `attends`: this warp is of these.
    SFA_DEVICE void wait_for_all(bool attends) const {
        if (attends) over().arrive_as_warp();
        over().wait(0);
    }
};

// What is noted of all blocks of rows that a block of the grid takes: which of them met numbers that are not finite without care.
template <class S>
struct Redo {
    // A word of suspicion for each of three rows' blocks; whether any bit is set; bits by the round, the same one for several.
    static constexpr uint32_t SUSPECTS = 3, ANY = 3, BITS = 4, ROUNDS = 1024, WORDS = BITS + ROUNDS / 32;
    hw::Tile words;

    SFA_DEVICE Redo() : words(hw::tile(ForwardTiles<S>::NOTES_AT, WORDS * 4)) {}

    SFA_DEVICE uint32_t read(uint32_t i) const { return hw::load<uint32_t>(words, i * 4); }
    SFA_DEVICE void write(uint32_t i, uint32_t x) const { hw::store(words, i * 4, x); }

    SFA_DEVICE void clear() const {
        for (uint32_t i = hw::thread(); i < WORDS; i += S::THREADS + S::PRODUCERS) write(i, 0);
    }

    // Of the block of rows `turn`. The next one's word was last read before the last meeting.
    SFA_DEVICE void clear_next(uint32_t turn) const {
        if (hw::thread() == 0) write((turn + 1) % SUSPECTS, 0);
    }
    SFA_DEVICE void suspect(uint32_t turn, bool holds) const {
        if (holds) write(turn % SUSPECTS, 1);
    }
    SFA_DEVICE bool is_suspect(uint32_t turn) const { return hw::uniform(read(turn % SUSPECTS)) != 0; }

    SFA_DEVICE void note(uint32_t round) const {
        if (hw::thread() != 0) return;
        uint32_t i = BITS + round % ROUNDS / 32;
        write(i, read(i) | 1u << round % 32);
        write(ANY, 1);
    }
    SFA_DEVICE bool any() const { return hw::uniform(read(ANY)) != 0; }
    SFA_DEVICE bool has(uint32_t round) const { return hw::uniform(read(BITS + round % ROUNDS / 32)) >> round % 32 & 1; }
};

template <class S>
SFA_DEVICE Ring<S> ring_of() {
    return {ForwardTiles<S>::NOTES_AT + Redo<S>::WORDS * 4};
}

// The threads that load.
template <class S>
struct ForwardProducers : ForwardTiles<S> {
    typedef ForwardTiles<S> Tiles;
    typedef typename Tiles::Columns Columns;
    using Tiles::p, Tiles::x, Tiles::NB, Tiles::LISTED;
    static constexpr bool ATTENDS = false;
    static constexpr uint32_t STEP = S::PRODUCERS / (S::Tile::GROUP / 16), PASSES = NB / STEP;

    // The tokens of this thread's rows of a tile.
    struct Tokens {
        uint32_t pass[LISTED ? PASSES : 1];

        SFA_DEVICE uint32_t operator()(uint32_t i, uint32_t) const { return pass[LISTED ? i : 0]; }
    };

    Ring<S> ring;
    Tokens tokens;

    SFA_DEVICE ForwardProducers(const AttentionParams& p, const ForwardTensors& x, uint32_t turn) : Tiles(p, x, turn), ring(ring_of<S>()) {}

    SFA_DEVICE uint32_t thread() const { return hw::thread() - S::THREADS; }

    // Reads the tokens of the tile after which `left` are left.
    SFA_DEVICE void read_tokens(int left) {
        if (!LISTED || left < 0) return;
        Columns c = this->template columns<false>(left);
#pragma unroll
        for (uint32_t i = 0; i < PASSES; i++) {
            int column = int(thread() / (S::Tile::GROUP / 16) + i * STEP);
            tokens.pass[i] = column < c.count ? x.far_index[this->listed_at(c, column)] : 0;
        }
    }

    template <bool FULL>
    SFA_DEVICE void load(uint32_t tile, int left) {
        Columns c = this->template columns<FULL>(left);
        Tokens now = tokens;
        // On their way while there is no room yet.
        read_tokens(left - 1);
        ring.wait_for_room(tile, false);
        this->template load_keys<FULL, S::PRODUCERS>(c, this->keys(tile), now, thread());
        this->template load_sizes<S::PRODUCERS>(c, this->words(tile), thread());
        ring.loaded(tile, false);
        ring.wait_for_room(tile, true);
        this->template load_values<FULL, S::PRODUCERS>(c, this->values(tile), now, thread());
        ring.loaded(tile, true);
    }

    // Notes and loads what a block of rows needs, whose first tile has number `tile`; returns that of the next one's.
    template <bool CAREFUL>
    SFA_DEVICE uint32_t run(uint32_t turn, uint32_t tile, uint2 place, uint32_t) {
        this->template note_facts<S::PRODUCERS>(place.x, place.y, CAREFUL, thread());
        hw::meet<2, S::PRODUCERS>();
        this->hold();
        int steps = this->bounds().steps(), full = this->full_tiles();
        read_tokens(steps - 1);
        ring.wait_for_room(turn);
        this->template load_queries<S::PRODUCERS>(thread());
        ring.loaded_queries();
#pragma unroll 1
        for (int left = steps - 1; left >= full; left--) load<false>(tile++, left);
#pragma unroll 1
        for (int left = min(full, steps) - 1; left >= 0; left--) load<true>(tile++, left);
        return tile;
    }
};

// The threads that attend.
template <class T, class S>
struct ForwardWarpgroups : ForwardRows<T, S, false> {
    typedef ForwardRows<T, S, false> Rows;
    typedef typename Rows::Columns Columns;
    using Rows::p, Rows::q, Rows::keys, Rows::values, Rows::output;
    using Rows::D, Rows::NB, Rows::NT, Rows::R, Rows::ROWS, Rows::LISTED;
    static constexpr bool ATTENDS = true;

    Ring<S> ring;

    SFA_DEVICE ForwardWarpgroups(const AttentionParams& p, const ForwardTensors& x, uint32_t turn)
        : Rows(p, x, turn), ring(ring_of<S>()) {}

    // Starts the products of this warpgroup's queries and a tile's keys.
    SFA_DEVICE void multiply_keys(float (&s)[NT][4], uint32_t tile) {
        int first = hw::uniform(this->warp_row()) / 64 * 64;
        hw::Factor rows = hw::along_rows<D, ROWS>(q, first), columns = hw::along_rows<D, NB>(keys(tile));
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            hw::product<T, NB, false, false>(s, hw::along_rows_step<D, ROWS>(rows, k), hw::along_rows_step<D, NB>(columns, k),
                                             k > 0);
        hw::products_commit();
    }

    // Starts the products of weights and a tile's values.
    SFA_DEVICE void multiply_values(const uint32_t (&weights)[NT / 2][4], uint32_t tile) {
        hw::Factor columns = hw::across_rows<D, NB>(values(tile));
#pragma unroll
        for (int k = 0; k < NT / 2; k++)
            hw::product<T, D, true>(output[0], weights[k], hw::across_rows_step(columns, k), true);
        hw::products_commit();
    }

    SFA_DEVICE static void round(uint32_t (&weights)[NT / 2][4], const float (&s)[1][NT][4]) {
#pragma unroll
        for (int k = 0; k < NT / 2; k++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* pair = &s[0][2 * k + i / 2][i % 2 * 2];
                weights[k][i] = T::pack(pair[0], pair[1]);
            }
        }
    }

    // With care: a tile whose keys are about to be multiplied is searched.
    SFA_DEVICE void search_tile(uint32_t tile, int left) {
        ring.wait_for(tile, false);
        ring.wait_for(tile, true);
        S::meet();
        this->search(this->template columns<false>(left), keys(tile), values(tile));
        hw::publish_to_products();
        S::meet();
    }

    // The products of a tile to weights, still as floats; what was summed before is to be multiplied by `rescale` if it says so.
    SFA_DEVICE bool weigh_tile(float (&rescale)[R], float (&s)[1][NT][4], uint32_t tile, int left, int full, float& met) {
        bool masked = left >= full;
        Columns c = this->template columns<false>(left);
        Span all{0, NB};
        if (masked) this->meet(met, s, all);
        float scale = this->to_logits(s, c, tile);
        if (masked) this->mask(s, c, all);
        bool any = this->template raise<false>(rescale, s, scale, all);
        this->template weigh<false>(s, scale, all);
        return any;
    }

    // Attends and writes, or notes that this has to be done again with care. The first tile has number `tile`; returns that of the
    // next block's.
    template <bool CAREFUL>
    SFA_DEVICE uint32_t run(uint32_t turn, uint32_t tile, uint2, uint32_t round) {
        ring.wait_for_queries(turn);
        this->hold();
        Redo<S> redo;
        redo.clear_next(turn);
        this->clear_first_bad();
        this->start();
        hw::publish_to_products();
        if (p.scale_sign < 0) S::meet();
        int steps = hw::uniform(this->bounds().steps());
        float met = 0;
        // Or the compiler takes zeros for constants, and puts products one after the other.
        hw::settle(output[0]);
        attend<CAREFUL>(tile, steps - 1, hw::uniform(this->full_tiles()), met);
        this->write_first_bad();
        redo.suspect(turn, this->divide() || met != 0.f);
        S::meet();
        if (!CAREFUL && redo.is_suspect(turn)) redo.note(round);
        else this->finish();
        return tile + steps;
    }

    // Leaves the first tiles out of which no row of this warpgroup sees a column; returns how many these are.
    SFA_DEVICE int skip(uint32_t tile, int left, int full) {
        int skipped = 0;
        for (; left - skipped >= full; skipped++) {
            Span reach = this->reach(this->template columns<false>(left - skipped));
            if (hw::uniform(reach.begin < reach.end)) break;
            ring.wait_for(tile + skipped, false);
            ring.leave(tile + skipped, false);
            ring.wait_for(tile + skipped, true);
            ring.leave(tile + skipped, true);
        }
        return skipped;
    }

    // CAREFUL: tiles are searched for numbers that are not finite.
    template <bool CAREFUL>
    SFA_DEVICE void attend(uint32_t tile, int left, int full, float& met) {
        if (!CAREFUL) {
            int skipped = skip(tile, left, full);
            tile += skipped, left -= skipped;
        }
        if (left < 0) return ring.leave_queries();
        float s[1][NT][4], rescale[R];
        uint32_t weights[NT / 2][4];
        if (CAREFUL) search_tile(tile, left);
        ring.wait_for(tile, false);
        hw::publish_to_products();
        hw::settle(s[0]);
        hw::products_begin();
        multiply_keys(s[0], tile);
        hw::products_wait<0>();
        hw::settle(s[0]);
        ring.leave(tile, false);
        if (left == 0) ring.leave_queries();
        if (weigh_tile(rescale, s, tile, left, full, met)) this->multiply_output(rescale);
        round(weights, s);
#pragma unroll 1
        for (; left > 0; tile++, left--) {
            if (CAREFUL) search_tile(tile + 1, left - 1);
            ring.wait_for(tile + 1, false);
            ring.wait_for(tile, true);
            hw::publish_to_products();
            hw::settle(output[0]);
            hw::products_begin();
            multiply_keys(s[0], tile + 1);
            multiply_values(weights, tile);
            hw::products_wait<1>();
            hw::settle(s[0]);
            ring.leave(tile + 1, false);
            if (left == 1) ring.leave_queries();
            bool any = weigh_tile(rescale, s, tile + 1, left - 1, full, met);
            hw::products_wait<0>();
            hw::settle(output[0]);
            ring.leave(tile, true);
            if (any) this->multiply_output(rescale);
            round(weights, s);
        }
        ring.wait_for(tile, true);
        hw::publish_to_products();
        hw::settle(output[0]);
        hw::products_begin();
        multiply_values(weights, tile);
        hw::products_wait<0>();
        hw::settle(output[0]);
        ring.leave(tile, true);
    }
};

// What the threads of one role do for all blocks of rows that a block of the grid takes.
template <class Role, class S>
struct Rounds {
    const ForwardTensors& x;
    const AttentionParams& p;
    uint32_t turn = 0, tile = 0;

    // CAREFUL: for those that need care, or where all need it for all.
    template <bool CAREFUL>
    SFA_DEVICE void run(bool all) {
        RowBlocks<S> blocks(p);
        uint32_t grid = gridDim.x;
        for (uint32_t round = 0; round * grid < blocks.count(); round++) {
            // The longest come first: whoever had a longer one than others has a shorter one next.
            uint32_t index = round * grid + (round % 2 == 0 ? blockIdx.x : grid - 1 - blockIdx.x);
            if (index >= blocks.count() || (CAREFUL && !all && !Redo<S>().has(round))) continue;
            tile = Role(p, x, turn).template run<CAREFUL>(turn, tile, blocks.place(index), round);
            turn++;
        }
    }

    SFA_DEVICE void run() {
        // Without causality no tile is masked by itself: every one is searched.
        bool all = p.dense && !p.causal;
        if (!all) {
            run<false>(true);
            ring_of<S>().wait_for_all(Role::ATTENDS);
            if (!Redo<S>().any()) return;
        }
        run<true>(all);
    }
};

template <class T, class S>
SFA_DEVICE void attend_by_warpgroups(const ForwardTensors& x, const AttentionParams& p) {
    if (hw::thread() == 0) ring_of<S>().init();
    Redo<S>().clear();
    ForwardTiles<S>(p, x).clear_marks();
    hw::let_next_start();
    hw::wait_for_previous();
    __syncthreads();
    if (hw::uniform(hw::thread()) >= S::THREADS) {
        if constexpr (S::TAKEN != 0) hw::give_registers<S::KEPT>();
        Rounds<ForwardProducers<S>, S>{x, p}.run();
    } else {
        if constexpr (S::TAKEN != 0) hw::take_registers<S::TAKEN>();
        Rounds<ForwardWarpgroups<T, S>, S>{x, p}.run();
    }
}

#define FORWARD_WGMMA(name, T, D, WARPGROUPS, NB, STAGES, PRODUCERS, TAKEN, BLOCKS, LISTED)         \
    FORWARD_KERNEL(name, 128 * WARPGROUPS + PRODUCERS, BLOCKS, attend_by_warpgroups, T,             \
                   WarpgroupShape<D, WARPGROUPS, NB, STAGES, PRODUCERS, TAKEN, BLOCKS, LISTED>)
