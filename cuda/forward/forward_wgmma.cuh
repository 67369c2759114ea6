// Forward attention by warpgroup products (wgmma, sm_90a), after FlashAttention-3 (Shah et al. 2024).
//
// A block of the grid owns one or more blocks of query rows, one after another. A block of rows has 64 query rows of
// one head for each attending warpgroup, with their output rows and log-sum-exps. The threads of a block have one of
// two roles. Attending warpgroups multiply and keep the softmax and the output in registers. Producers only start the
// copies of queries, keys and values into shared memory.
//
// The idea: tensor cores read queries, keys and values from shared memory, weights from registers, and run while the
// threads go on. So the softmax of one tile overlaps the products of its neighbours. After the start, the producers and
// the attending warpgroups meet at mbarriers only, never at a barrier of the whole block.
//
// 1. Software pipeline (`attend`). Two products are issued together: the logits of tile i + 1, and the weights of tile
//    i times its values. The softmax of tile i + 1 runs while the second product is in flight.
// 2. A ring of STAGES tiles (`Ring`). Keys and values of a stage have two mbarriers each: "arrived", on which every
//    producer thread arrives after its copies, and "free", on which every attending warp arrives after its product.
//    Keys become free before values, so their next copy starts earlier.
// 3. Registers move between roles. Where TAKEN is not 0, the producers are a whole warpgroup; they give registers back
//    (setmaxnreg) and the attending warpgroups take them.
// 4. The output has its own staging buffer. Producers load the next block's queries and first tiles while the attending
//    warps still write the output of this one.
// 5. Masked tiles come first, full tiles after them: see forward_tiles.cuh. A warpgroup skips the leading tiles from
//    which none of its rows sees a column.
// 6. Numbers that are not finite. The first pass searches no tile. If it meets a NaN or an infinity, the block of rows
//    writes no output and its round is noted in `Redo`. After the last round the noted ones run again with `CAREFUL`,
//    which searches each tile before its product. Dense attention without causality runs with care from the start.
// 7. Rounds change direction. Blocks of rows are ordered from the longest to the shortest, and every second round
//    counts blocks of the grid from the end, which evens out their work.
//
// Shared memory, in this order; bytes of forward_wgmma_64 and forward_wgmma_128:
//
//   queries             ROWS * D * 2                     24 576   32 768
//   keys and values     2 * STAGES * NB * D * 2          65 536  131 072
//   output (staging)    ROWS * D * 2                     24 576   32 768
//   words of tiles      (STAGES + 2) * NB * 4             2 048    2 048
//   marks of bad rows   (NB + 4) * 4                        528      528
//   facts               3 * (48 + 8 * ROWS if LISTED)       144      144
//   `Redo`              36 * 4                              144      144
//   mbarriers           (4 * STAGES + 3) * 8                 88       88
#pragma once

#include "forward/forward_rows.cuh"
#include "lib/wgmma.cuh"

// Shape of a kernel: WARPGROUPS attending warpgroups of 64 rows, tiles of N columns, STAGES_ of them in shared memory,
// PRODUCERS_ producer threads, BLOCKS resident blocks a multiprocessor. If TAKEN_ is not 0, the producers are a
// warpgroup that gives registers up and each attending thread then has TAKEN_ registers.
template <int DIM, int WARPGROUPS, int N, int STAGES_, int PRODUCERS_, int TAKEN_, int BLOCKS, bool BY_LISTS,
          bool SLIDES>
struct WarpgroupShape {
    static constexpr int D = DIM, MT = 1, NB = N, THREADS = 128 * WARPGROUPS, ROWS = 64 * WARPGROUPS;
    static constexpr int PRODUCERS = PRODUCERS_, TAKEN = TAKEN_;
    // Registers a thread starts with, and registers a producer keeps.
    static constexpr int REGISTERS = 65536 / BLOCKS / (THREADS + PRODUCERS) / 8 * 8;
    static constexpr int KEPT = REGISTERS * (WARPGROUPS + 1) - TAKEN * WARPGROUPS;
    static_assert(TAKEN == 0 || (PRODUCERS == 128 && KEPT >= 24), "registers that one takes the others have given");
    static constexpr bool LISTED = BY_LISTS, SLIDING = SLIDES;
    // The words of a tile are read after its keys are free; up to two later tiles are in flight by then.
    static constexpr int TOGETHER = 64, STAGES = STAGES_, WORDS = STAGES + 2;
    // Producers note the facts of the next block of rows while this one is attended, and a slower warp may still read
    // the facts of the block before.
    static constexpr int SLOTS = 3, STAGING = ROWS * D * 2, QUEUE = 2048;
    typedef Panels<D, ROWS> Queries;
    typedef Panels<D, NB> Tile;

    SFA_DEVICE static void meet() { hw::meet<1, THREADS>(); }
};

// The mbarriers of the queries and of the ring of tiles, from byte `at` of shared memory on. Blocks of rows and tiles
// are numbered consecutively.
template <class S>
struct Ring {
    static constexpr uint32_t BYTES = (4 * S::STAGES + 3) * hw::Mbarrier::BYTES;
    uint32_t at;

    SFA_DEVICE hw::Mbarrier queries(bool free) const {
        return hw::Mbarrier(at + (4 * S::STAGES + free) * hw::Mbarrier::BYTES);
    }

    SFA_DEVICE hw::Mbarrier here(uint32_t tile, bool values, bool free) const {
        return hw::Mbarrier(at + ((tile % S::STAGES * 2 + values) * 2 + free) * hw::Mbarrier::BYTES);
    }

    // Attending warps arrive after the last round of the pass without care.
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

    // Wait until the queries and facts of block `turn` have arrived; wait until their buffer may be overwritten by
    // them.
    SFA_DEVICE void wait_for_queries(uint32_t turn) const { queries(false).wait(turn % 2); }
    SFA_DEVICE void wait_for_room(uint32_t turn) const { queries(true).wait(turn % 2 ^ 1); }
    // This producer thread has started its copies of queries and has noted its facts: two arrivals.
    SFA_DEVICE void loaded_queries() const {
        queries(false).arrive_after_copies();
        queries(false).arrive();
    }
    // This warp has read the queries for the last time.
    SFA_DEVICE void leave_queries() const { queries(true).arrive_as_warp(); }

    // Wait until the keys or values of tile `tile` have arrived; wait until their stage may be overwritten by them.
    SFA_DEVICE void wait_for(uint32_t tile, bool values) const { here(tile, values, false).wait(tile / S::STAGES % 2); }
    SFA_DEVICE void wait_for_room(uint32_t tile, bool values) const {
        here(tile, values, true).wait(tile / S::STAGES % 2 ^ 1);
    }

    // This producer thread has started all its copies of the tile's keys or values.
    SFA_DEVICE void loaded(uint32_t tile, bool values) const { here(tile, values, false).arrive_after_copies(); }
    // This warp has read them for the last time.
    SFA_DEVICE void leave(uint32_t tile, bool values) const { here(tile, values, true).arrive_as_warp(); }

    // Waits until every attending warp has arrived at `over`; `attends`: this warp is one of them.
    SFA_DEVICE void wait_for_all(bool attends) const {
        if (attends) over().arrive_as_warp();
        over().wait(0);
    }
};

// Which blocks of rows of this block of the grid met a number that is not finite in the pass without care.
template <class S>
struct Redo {
    // Words 0 to 2: suspicion, one word for each of three blocks of rows. Word 3: whether any bit is set. Then one bit
    // a round, modulo ROUNDS: rounds that share a bit are repeated together.
    static constexpr uint32_t SUSPECTS = 3, ANY = 3, BITS = 4, ROUNDS = 1024, WORDS = BITS + ROUNDS / 32;
    hw::Tile words;

    SFA_DEVICE Redo() : words(hw::tile(ForwardTiles<S>::NOTES_AT, WORDS * 4)) {}

    SFA_DEVICE uint32_t read(uint32_t i) const { return hw::load<uint32_t>(words, i * 4); }
    SFA_DEVICE void write(uint32_t i, uint32_t x) const { hw::store(words, i * 4, x); }

    SFA_DEVICE void clear() const {
        for (uint32_t i = hw::thread(); i < WORDS; i += S::THREADS + S::PRODUCERS) write(i, 0);
    }

    // Clears the word of block `turn` + 1, which was last read before the last meeting.
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
    SFA_DEVICE bool has(uint32_t round) const {
        return hw::uniform(read(BITS + round % ROUNDS / 32)) >> round % 32 & 1;
    }
};

template <class S>
constexpr uint32_t RING_AT = ForwardTiles<S>::NOTES_AT + Redo<S>::WORDS * 4;

template <class S>
SFA_DEVICE Ring<S> ring_of() {
    return {RING_AT<S>};
}

// Shared memory of a block.
template <class S>
constexpr uint32_t BLOCK_BYTES = RING_AT<S> + Ring<S>::BYTES;

// The producers.
template <class S>
struct ForwardProducers : ForwardTiles<S> {
    typedef ForwardTiles<S> Tiles;
    typedef typename Tiles::Columns Columns;
    typedef typename Tiles::Walk Walk;
    using Tiles::p, Tiles::x, Tiles::NB, Tiles::LISTED;
    static constexpr bool ATTENDS = false;
    static constexpr uint32_t STEP = S::PRODUCERS / (S::Tile::GROUP / 16), PASSES = NB / STEP;

    // The tokens of the rows of a tile that this thread copies.
    struct Tokens {
        uint32_t pass[LISTED ? PASSES : 1];

        SFA_DEVICE uint32_t operator()(uint32_t i, uint32_t) const { return pass[LISTED ? i : 0]; }
    };

    Ring<S> ring;
    Tokens tokens;

    SFA_DEVICE ForwardProducers(const AttentionParams& p, const ForwardTensors& x, uint32_t turn)
        : Tiles(p, x, turn), ring(ring_of<S>()) {}

    SFA_DEVICE uint32_t thread() const { return hw::thread() - S::THREADS; }

    // Reads the tokens of a tile; `left` tiles follow it.
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
        // These reads are in flight while the thread waits for a free stage.
        read_tokens(left - 1);
        ring.wait_for_room(tile, false);
        this->template load_keys<FULL, S::PRODUCERS>(c, this->keys(tile), now, thread());
        this->template load_sizes<S::PRODUCERS>(c, this->words(tile), thread());
        ring.loaded(tile, false);
        ring.wait_for_room(tile, true);
        this->template load_values<FULL, S::PRODUCERS>(c, this->values(tile), now, thread());
        ring.loaded(tile, true);
    }

    // Notes the facts of a block of rows and loads its queries and tiles. `tile`: the number of its first tile; returns
    // the number of the next block's first tile.
    template <bool CAREFUL>
    SFA_DEVICE uint32_t run(uint32_t turn, uint32_t tile, uint2 place, uint32_t) {
        this->template note_facts<S::PRODUCERS>(place.x, place.y, CAREFUL, thread());
        hw::meet<2, S::PRODUCERS>();
        this->hold();
        int steps = this->bounds().steps();
        Walk walk = this->walk();
        read_tokens(steps - 1);
        ring.wait_for_room(turn);
        this->template load_queries<S::PRODUCERS>(thread());
        ring.loaded_queries();
#pragma unroll 1
        for (int left = steps - 1; left >= walk.end; left--) load<false>(tile++, left);
#pragma unroll 1
        for (int left = min(walk.end, steps) - 1; left >= walk.first; left--) load<true>(tile++, left);
        return tile;
    }
};

// The attending warpgroups.
template <class T, class S>
struct ForwardWarpgroups : ForwardRows<T, S, false> {
    typedef ForwardRows<T, S, false> Rows;
    typedef typename Rows::Columns Columns;
    typedef typename Rows::Walk Walk;
    using Rows::p, Rows::q, Rows::keys, Rows::values, Rows::output;
    using Rows::D, Rows::NB, Rows::NT, Rows::R, Rows::ROWS, Rows::LISTED, Rows::SLIDING;
    static constexpr bool ATTENDS = true;

    Ring<S> ring;

    SFA_DEVICE ForwardWarpgroups(const AttentionParams& p, const ForwardTensors& x, uint32_t turn)
        : Rows(p, x, turn), ring(ring_of<S>()) {}

    // Issues the product of this warpgroup's queries and a tile's keys.
    SFA_DEVICE void multiply_keys(float (&s)[NT][4], uint32_t tile) {
        int first = hw::uniform(this->warp_row()) / 64 * 64;
        hw::Factor rows = hw::along_rows<D, ROWS>(q, first), columns = hw::along_rows<D, NB>(keys(tile));
#pragma unroll
        for (int k = 0; k < D / 16; k++)
            hw::product<T, NB, false, false>(s, hw::along_rows_step<D, ROWS>(rows, k),
                                             hw::along_rows_step<D, NB>(columns, k), k > 0);
        hw::products_commit();
    }

    // Issues the product of weights and a tile's values.
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

    // With care: searches a tile for numbers that are not finite before its keys are multiplied.
    SFA_DEVICE void search_tile(uint32_t tile, int left) {
        ring.wait_for(tile, false);
        ring.wait_for(tile, true);
        S::meet();
        this->search(this->template columns<false>(left), keys(tile), values(tile));
        hw::publish_to_products();
        S::meet();
    }

    // Turns the products of a tile into weights, as floats. Returns whether older sums have to be multiplied by
    // `rescale`.
    SFA_DEVICE bool weigh_tile(float (&rescale)[R], float (&s)[1][NT][4], uint32_t tile, int left, const Walk& walk,
                               float& met) {
        bool masked = left >= walk.end || (SLIDING && left < walk.begin);
        Columns c = this->template columns<false>(left);
        Span all{0, NB};
        if (masked || (SLIDING && this->watches())) this->meet(met, s, all);
        float scale = this->to_logits(s, c, tile);
        if (masked) this->mask(s, c, all);
        bool any = this->template raise<false>(rescale, s, scale, all);
        this->template weigh<false>(s, scale, all);
        return any;
    }

    // Attends a block of rows, then writes its output or notes the round for a second pass with care. `tile`: the
    // number of its first tile; returns the number of the next block's first tile.
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
        // Otherwise the compiler knows that these are zeros, and serializes the products.
        hw::settle(output[0]);
        Walk walk = this->walk();
        walk = {hw::uniform(walk.first), hw::uniform(walk.begin), hw::uniform(walk.end)};
        attend<CAREFUL>(tile, steps - 1, walk, met);
        this->write_first_bad();
        redo.suspect(turn, this->divide() || met != 0.f);
        S::meet();
        if (!CAREFUL && redo.is_suspect(turn)) redo.note(round);
        else this->finish();
        return tile + max(0, steps - walk.first);
    }

    // Frees the first tiles from which no row of this warpgroup sees a column; returns their number.
    SFA_DEVICE int skip(uint32_t tile, int left, const Walk& walk) {
        int skipped = 0;
        for (; left - skipped >= walk.end; skipped++) {
            Span reach = this->reach(this->template columns<false>(left - skipped));
            if (hw::uniform(reach.begin < reach.end)) break;
            ring.wait_for(tile + skipped, false);
            ring.leave(tile + skipped, false);
            ring.wait_for(tile + skipped, true);
            ring.leave(tile + skipped, true);
        }
        return skipped;
    }

    // CAREFUL: each tile is searched for numbers that are not finite.
    template <bool CAREFUL>
    SFA_DEVICE void attend(uint32_t tile, int left, const Walk& walk, float& met) {
        if (!CAREFUL) {
            int skipped = skip(tile, left, walk);
            tile += skipped, left -= skipped;
        }
        if (left < walk.first) return ring.leave_queries();
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
        if (left == walk.first) ring.leave_queries();
        if (weigh_tile(rescale, s, tile, left, walk, met)) this->multiply_output(rescale);
        round(weights, s);
#pragma unroll 1
        for (; left > walk.first; tile++, left--) {
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
            if (left == walk.first + 1) ring.leave_queries();
            bool any = weigh_tile(rescale, s, tile + 1, left - 1, walk, met);
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

// The rounds of one role over the blocks of rows of a block of the grid.
template <class Role, class S>
struct Rounds {
    const ForwardTensors& x;
    const AttentionParams& p;
    uint32_t turn = 0, tile = 0;

    // CAREFUL: only the noted rounds, or every round if `all`.
    template <bool CAREFUL>
    SFA_DEVICE void run(bool all) {
        RowBlocks<S> blocks(p);
        uint32_t grid = gridDim.x;
        for (uint32_t round = 0; round * grid < blocks.count(); round++) {
            // The longest blocks of rows come first. Every second round counts backwards, so a block of the grid that
            // had a longer one than its neighbours has a shorter one next.
            uint32_t index = round * grid + (round % 2 == 0 ? blockIdx.x : grid - 1 - blockIdx.x);
            if (index >= blocks.count() || (CAREFUL && !all && !Redo<S>().has(round))) continue;
            tile = Role(p, x, turn).template run<CAREFUL>(turn, tile, blocks.place(index), round);
            turn++;
        }
    }

    SFA_DEVICE void run() {
        // Dense and without causality, no tile needs a mask, and an infinite key may show only as a logit of minus
        // infinity: every tile is searched.
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

#define FORWARD_WGMMA(name, T, D, WARPGROUPS, NB, STAGES, PRODUCERS, TAKEN, BLOCKS, ...)                           \
    FORWARD_KERNEL(name, 128 * WARPGROUPS + PRODUCERS, BLOCKS,                                                     \
                   (BLOCK_BYTES<WarpgroupShape<D, WARPGROUPS, NB, STAGES, PRODUCERS, TAKEN, BLOCKS, __VA_ARGS__>>), \
                   attend_by_warpgroups, T,                                                                        \
                   WarpgroupShape<D, WARPGROUPS, NB, STAGES, PRODUCERS, TAKEN, BLOCKS, __VA_ARGS__>)
