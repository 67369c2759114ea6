// Gradients by warpgroup products (wgmma, sm_90a), in one pass over columns, after FlashAttention-3's backward pass
// (Shah et al. 2024). No bias and no dropout.
//
// A block owns 128 columns of one list: it alone makes their dK and dV, which stay in registers until the end. It walks
// over every tile of rows, of every query head of the list, that sees one of these columns. The dQ that a tile's rows
// get from these columns is added to memory, so its last bits depend on the order in which blocks run (as in
// backward_fused.cuh).
//
// The idea: products have the block's columns as their left factor. So the accumulators of one product, weights or
// gradients of logits, already lie in registers as the left factor of the next. Only the gradients of logits also go to
// shared memory, for dQ, whose left factor is their transpose.
//
// Five products a tile: keys times queries, values times output gradients, weights times output gradients (dV),
// gradients of logits times queries (dK), and their transpose times keys (dQ).
//
// 1. Three roles. Two warpgroups own 64 columns each and multiply. In the third warpgroup, two warps are loaders, which
//    fill a ring of three stages with queries and output gradients, and one thread adds dQ to memory. The third
//    warpgroup gives registers to the owners.
// 2. Products overlap with arithmetic. Weights are computed while values are multiplied by output gradients. At the end
//    of a tile dQ, dK and the logits of the next tile are issued together; dQ is waited for and gathered while tensor
//    cores are busy with the other two.
// 3. dQ is gathered in shared memory in the order in which it lies in global memory, then added by one bulk instruction
//    a tile (cp.reduce.async.bulk).
// 4. Mbarriers connect the roles: `come` and `left` for the stages, `multiplied` for the gradients of logits,
//    `gathered` and `added` for the buffer of dQ. Only the owners meet at a named barrier.
// 5. Odd rows (a large log-sum-exp, or NaN) take a slower path for their tile: see OddRows. Keys and values that are
//    not finite become zeros once, before the first product.
//
// Shared memory, in this order; KiB at D = 64 (tiles of 128 rows) and D = 128 (tiles of 64 rows):
//
//   keys, values                       2 * 128 * D * 2         32     64
//   queries, output gradients          3 * 2 * NB * D * 2      96     96
//   gradients of logits                128 * NB * 2            32     16
//   gradients of queries               NB * D * 4              32     32
//   log-sum-exps, deltas               3 * 2 * NB * 4           3    1.5
//   words of the columns               128 * 16                 2      2
//   mbarriers                          9 * 8 bytes
//   FADED: the owners' sums            256 * 8                 2      2
#pragma once

#include "backward/backward_columns.cuh"
#include "lib/wgmma.cuh"

// The kernel's block: threads 0 to 255 own columns, the next 64 load, and one more adds. FADED: the owners also make
// their columns' sums of gradients of logits, for the gradient of a column bias.
template <class T, int D, bool BY_LISTS, bool FADED = false>
struct WarpgroupGradients : OwnedColumns<128, BY_LISTS> {
    typedef OwnedColumns<128, BY_LISTS> Owned;
    using Owned::p, Owned::x, Owned::batch, Owned::list, Owned::first, Owned::count, Owned::words;
    using Owned::COLUMNS;
    static constexpr int OWNERS = 256, LOADERS = 64, THREADS = 384, NB = 8192 / D, NT = NB / 8, STAGES = 3;
    static constexpr int TOGETHER = 264;
    static constexpr uint32_t OWNERS_ARRIVE = OWNERS / 32 * hw::Mbarrier::WARP;
    // Registers a thread of each role: 256 * 240 + 128 * 24 = 384 * 168, with which all threads start.
    static constexpr int OWNERS_HAVE = 240, OTHERS_HAVE = 24;
    // A warpgroup's part of a tile's dQ: 64 rows, PART elements of D.
    static constexpr int PART = 64;
    // Byte offsets, in the order of the table above.
    static constexpr uint32_t OWN = COLUMNS * D * 2, TILE = NB * D * 2, TILES_AT = 2 * OWN;
    static constexpr uint32_t LOGITS = COLUMNS * NB * 2, LOGITS_AT = TILES_AT + STAGES * 2 * TILE;
    static constexpr uint32_t ADDS = NB * D * 4, ADDS_AT = LOGITS_AT + LOGITS;
    static constexpr uint32_t SUMS = NB * 4, SUMS_AT = ADDS_AT + ADDS, WORDS_AT = SUMS_AT + STAGES * 2 * SUMS;
    static constexpr uint32_t MARKS_AT = WORDS_AT + Owned::WORDS,
                              FADES_AT = MARKS_AT + (2 * STAGES + 3) * hw::Mbarrier::BYTES,
                              BYTES = FADES_AT + (FADED ? OWNERS * 8 : 0);
    typedef Panels<D, COLUMNS> Columns;
    typedef Panels<D, NB> Rows;
    typedef Panels<NB, COLUMNS> Logits;

    // A tile of rows of a head; `index`: its number in the walk.
    struct Step {
        uint32_t head;
        int row, index;
    };

    // The tiles of rows that see some of the columns, head after head.
    struct Steps {
        int begin, end;
        uint32_t head, last_head;

        SFA_DEVICE Step first() const { return {head, begin, 0}; }
        SFA_DEVICE bool has(const Step& step) const { return begin < end && step.head < last_head; }

        SFA_DEVICE Step after(const Step& step) const {
            Step next{step.head, step.row + NB, step.index + 1};
            if (next.row >= end) next.row = begin, next.head++;
            return next;
        }
    };

    hw::Tile k, v;
    float dk[D / 8][4], dv[D / 8][4];
    int group;

    SFA_DEVICE WarpgroupGradients(const AttentionParams& p, const BackwardTensors& x, uint32_t unit, uint32_t block,
                                  bool is_near)
        : Owned(p, x, unit, block, is_near, WORDS_AT), k(hw::tile(0, OWN)), v(hw::tile(OWN, OWN)),
          group(hw::uniform(int(threadIdx.x / 128))) {
#pragma unroll
        for (int i = 0; i < D / 2; i++) dk[i / 4][i % 4] = 0, dv[i / 4][i % 4] = 0;
    }

    // The first of this warp's columns.
    SFA_DEVICE int own_column() const { return group * 64 + warp() * 16; }

    // Read anew at each use: held, they would cost registers.
    SFA_DEVICE int lane() const { return int(hw::thread() % 32); }
    SFA_DEVICE int warp() const { return int(hw::thread() / 32 % 4); }

    SFA_DEVICE static void meet() { hw::meet<1, OWNERS>(); }

    SFA_DEVICE hw::Tile logits() const { return hw::tile(LOGITS_AT, LOGITS); }
    SFA_DEVICE hw::Tile adds() const { return hw::tile(ADDS_AT, ADDS); }

    // The buffers of a stage.
    SFA_DEVICE hw::Tile queries(int stage) const { return hw::tile(TILES_AT + stage * 2 * TILE, TILE); }
    SFA_DEVICE hw::Tile grads(int stage) const { return hw::tile(TILES_AT + stage * 2 * TILE + TILE, TILE); }
    SFA_DEVICE hw::Tile sums(int stage) const { return hw::tile(SUMS_AT + stage * 2 * SUMS, SUMS); }
    SFA_DEVICE hw::Tile deltas(int stage) const { return hw::tile(SUMS_AT + stage * 2 * SUMS + SUMS, SUMS); }

    SFA_DEVICE hw::Mbarrier mark(int index) const { return hw::Mbarrier(MARKS_AT + index * hw::Mbarrier::BYTES); }
    // The tile of a stage has arrived; the owners have read it for the last time.
    SFA_DEVICE hw::Mbarrier come(int stage) const { return mark(stage); }
    SFA_DEVICE hw::Mbarrier left(int stage) const { return mark(STAGES + stage); }
    // The owners have multiplied a tile's gradients of logits; its dQ is gathered; the adding thread has read it.
    SFA_DEVICE hw::Mbarrier multiplied() const { return mark(2 * STAGES); }
    SFA_DEVICE hw::Mbarrier gathered() const { return mark(2 * STAGES + 1); }
    SFA_DEVICE hw::Mbarrier added() const { return mark(2 * STAGES + 2); }

    SFA_DEVICE void init_marks() const {
        for (int stage = 0; stage < STAGES; stage++) come(stage).init(LOADERS), left(stage).init(OWNERS_ARRIVE);
        multiplied().init(OWNERS_ARRIVE), gathered().init(OWNERS_ARRIVE), added().init(1);
    }

    SFA_DEVICE void load_tile(const Step& step) const {
        HeadIndex at(p, batch, step.head);
        uint32_t dim = p.sizes.head_dim, thread = hw::thread() - OWNERS;
        int count = min(NB, int(p.sizes.tokens) - step.row), stage = step.index % STAGES;
        int64_t index = at.batch_head * p.sizes.tokens + step.row;
        int64_t query = p.q.at(at.batch, at.head, step.row);
        load_rows<Rows, NB, LOADERS, false>(queries(stage), x.q, query, p.q.token_stride, count, dim, thread);
        load_rows<Rows, NB, LOADERS, false>(grads(stage), x.grad_output, index * dim, dim, count, dim, thread);
        for (int i = int(thread); i < NB; i += LOADERS) {
            hw::copy_async_word(sums(stage), i * 4, x.log_sum_exp, index + i, i < count);
            hw::copy_async_word(deltas(stage), i * 4, x.delta, index + i, i < count);
        }
        come(stage).arrive_after_copies();
    }

    // Turns products of keys and queries into weights.
    template <bool FULL>
    SFA_DEVICE void weigh(float (&s)[NT][4], int first_row, int stage) const {
        hw::Tile log_sum_exp = sums(stage);
        float scale = p.scale * p.scale_sign;
        int lane = this->lane();
        uint32_t own = (own_column() + lane / 4) * 16;
        uint4 word[2] = {hw::load<uint4>(words, own), hw::load<uint4>(words, own + 128)};
        int begin[2], end[2], row = first_row + lane % 4 * 2;
#pragma unroll
        for (int r = 0; r < 2; r++) begin[r] = int(word[r].y) - row, end[r] = int(word[r].z) - row;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float2 sums = hw::load<float2>(log_sum_exp, (n * 8 + lane % 4 * 2) * 4);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float weight = hw::exp2(s[n][i] * scale + (__uint_as_float(word[i / 2].w) - (i % 2 ? sums.y : sums.x)));
                bool visible = FULL || (n * 8 + i % 2 >= begin[i / 2] && n * 8 + i % 2 < end[i / 2]);
                s[n][i] = visible ? weight : 0.f;
            }
        }
    }

    // The same for a tile with odd rows.
    SFA_DEVICE void weigh_odd(float (&s)[NT][4], const Step& now, int stage) const {
        hw::Tile log_sum_exp = sums(stage);
        HeadIndex at(p, batch, now.head);
        float scale = p.scale * p.scale_sign;
        int lane = this->lane(), tokens = int(p.sizes.tokens);
        uint32_t own = (own_column() + lane / 4) * 16;
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                uint4 word = hw::load<uint4>(words, own + i / 2 * 128);
                int in_tile = n * 8 + lane % 4 * 2 + i % 2, row = now.row + in_tile;
                float weight = 0;
                if (row >= int(word.y) && row < int(word.z) && row < tokens) {
                    float logit = s[n][i] * scale + __uint_as_float(word.w),
                          sum = hw::load<float>(log_sum_exp, in_tile * 4);
                    weight = hw::exp2(exponent_of(logit, sum, rest_of_sum(p, x.log_sum_exp, at, row)));
                }
                s[n][i] = weight;
            }
        }
    }

    // Whether the tile that has arrived has odd rows; NaN rows are contained here.
    SFA_DEVICE bool has_odd_rows(int stage) const {
        OddRows odd = OddRows::of<NB>(sums(stage), deltas(stage));
        if (!odd.bad) return odd.any;
        meet();
        OddRows::contain<T, Rows, NB, OWNERS>(queries(stage), grads(stage), sums(stage), deltas(stage));
        hw::publish_to_products();
        meet();
        return true;
    }

    // Packs weights and gradients of logits as left factors of the next products. `g`: products of values and output
    // gradients.
    SFA_DEVICE void differentiate(uint32_t (&weights)[NT / 2][4], uint32_t (&slopes)[NT / 2][4],
                                  const float (&w)[NT][4], const float (&g)[NT][4], int stage) const {
        hw::Tile delta = deltas(stage);
        int lane = this->lane();
        float sums[2] = {};
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float2 means = hw::load<float2>(delta, (n * 8 + lane % 4 * 2) * 4);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float a = w[n][r * 2], b = w[n][r * 2 + 1];
                weights[n / 2][n % 2 * 2 + r] = T::pack(a, b);
                float left = a * (g[n][r * 2] - means.x), right = b * (g[n][r * 2 + 1] - means.y);
                if (FADED) sums[r] += left, sums[r] += right;
                slopes[n / 2][n % 2 * 2 + r] = T::pack(left, right);
            }
        }
        if constexpr (FADED) {
            float2 before = hw::load<float2>(fades(), 0);
            hw::store(fades(), 0, float2{before.x + sums[0], before.y + sums[1]});
        }
    }

    // FADED: this thread's share of two columns' sums. In registers they would be held while products need them all.
    SFA_DEVICE hw::Tile fades() const { return hw::tile(FADES_AT + hw::thread() * 8, 8); }

    // Stores the gradients of logits in shared memory: one row of that tile per column.
    SFA_DEVICE void share(const uint32_t (&a)[NT / 2][4]) const {
        int lane = this->lane();
        uint32_t at = hw::lane_offset(Logits::chunk(own_column() + lane % 16, lane / 16));
#pragma unroll
        for (int i = 0; i < NT / 2; i++)
            hw::store_matrices(logits(), (at ^ (i % 4 * 32)) + i / 4 * Logits::GROUP_STRIDE, a[i]);
    }

    // Issues the product of own keys and queries, or of own values and output gradients.
    SFA_DEVICE void multiply_own(float (&c)[NT][4], const hw::Tile& own, const hw::Tile& rows) const {
        hw::Factor a = hw::along_rows<D, COLUMNS>(own, group * 64), b = hw::along_rows<D, NB>(rows);
        hw::products_begin();
        hw::first_product<T, NB, false, false>(c, a, b);
#pragma unroll
        for (int i = 1; i < D / 16; i++)
            hw::product<T, NB, false, false>(c, hw::along_rows_step<D, COLUMNS>(a, i), hw::along_rows_step<D, NB>(b, i),
                                             true);
        hw::products_commit();
    }

    // Issues a tile's share of dV (weights times output gradients) or dK (gradients of logits times queries).
    SFA_DEVICE void multiply_tile(float (&c)[D / 8][4], const uint32_t (&a)[NT / 2][4], const hw::Tile& rows) const {
        hw::Factor b = hw::across_rows<D, NB>(rows);
        hw::products_begin();
#pragma unroll
        for (int i = 0; i < NB / 16; i++) hw::product<T, D, true>(c, a[i], hw::across_rows_step(b, i), true);
        hw::products_commit();
    }

    // Issues this warpgroup's part of the tile's dQ.
    SFA_DEVICE void multiply_queries(float (&c)[PART / 8][4]) const {
        hw::Factor a = hw::across_rows<NB, COLUMNS>(logits(), 0, NB == 128 ? group * 64 : 0);
        hw::Factor b = hw::across_rows<D, COLUMNS>(k, 0, NB == 128 ? 0 : group * PART);
        hw::products_begin();
        hw::first_product<T, PART, true, true>(c, a, b);
#pragma unroll
        for (int i = 1; i < COLUMNS / 16; i++)
            hw::product<T, PART, true, true>(c, hw::across_rows_step(a, i), hw::across_rows_step(b, i), true);
        hw::products_commit();
    }

    // Stores this warp's part of dQ into the gathering buffer, in the order of global memory. A warp writes eight rows
    // at a time, and in plain order four of them would fall into the same banks: rows exchange chunks of 8 numbers by
    // `mix`.
    SFA_DEVICE void gather_queries(const float (&c)[PART / 8][4]) const {
        float factor = p.scale * p.scale_sign * LN_2;
        uint32_t dim = p.sizes.head_dim;
        int lane = this->lane(), first_row = (NB == 128 ? group * 64 : 0) + warp() * 16 + lane / 4;
        int part = NB == 128 ? 0 : group * PART, mix = lane / 4 % 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            uint32_t at = (first_row + r * 8) * dim * 4 + part * 4 + mix * 32 + lane % 4 * 8;
            float2 pairs[PART / 8];
#pragma unroll
            for (int d = 0; d < PART / 8; d++) pairs[d] = float2{c[d][r * 2] * factor, c[d][r * 2 + 1] * factor};
#pragma unroll
            for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
                for (int d = 0; d < PART / 8; d++) {
                    if (d & bit) continue;
                    float2 low = pairs[d], high = pairs[d ^ bit];
                    bool swaps = mix & bit;
                    pairs[d] = swaps ? high : low, pairs[d ^ bit] = swaps ? low : high;
                }
            if (dim == D) {
#pragma unroll
                for (int d = 0; d < PART / 8; d++) hw::store(adds(), (at ^ (d % 4 * 32)) + d / 4 * 128, pairs[d]);
            } else {
#pragma unroll
                for (int d = 0; d < PART / 8; d++)
                    if (part + (d ^ mix) * 8 < int(dim)) hw::store(adds(), at - mix * 32 + (d ^ mix) * 32, pairs[d]);
            }
        }
    }

    // Starts adding the gathered dQ of a tile to memory.
    SFA_DEVICE void add_queries(const Global<float>& dq, const Step& step) const {
        uint32_t dim = p.sizes.head_dim;
        int rows = min(NB, int(p.sizes.tokens) - step.row);
        int64_t target = ((int64_t(batch) * p.sizes.heads + step.head) * p.sizes.tokens + step.row) * dim;
        hw::add_bulk(dq, target, adds(), rows * dim * 4);
    }

    // `tile`: the block's keys or values, which no product reads any more; it serves as a staging buffer.
    SFA_DEVICE void store(const ColumnTarget& target, const hw::Tile& tile, const float (&sums)[D / 8][4],
                          float factor) const {
        if (target.sums) store_sums(target.sums, sums, factor);
        else store_done(target.done, tile, sums, factor);
    }

    SFA_DEVICE void store_sums(const Global<float>& target, const float (&sums)[D / 8][4], float factor) const {
        int lane = this->lane();
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int column = own_column() + r * 8 + lane / 4;
            if (column >= count) continue;
            int64_t at = this->target_of(column);
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                uint32_t element = d * 8 + lane % 4 * 2;
                float2 pair{sums[d][r * 2] * factor, sums[d][r * 2 + 1] * factor};
                if (element < p.sizes.head_dim) store_vector(target, at + element, pair);
            }
        }
    }

    // Goes through shared memory, so that neighbouring lanes write neighbouring 16 bytes.
    SFA_DEVICE void store_done(const Global<uint16_t>& target, const hw::Tile& tile, const float (&sums)[D / 8][4],
                               float factor) const {
        int lane = this->lane();
        uint32_t at = hw::lane_offset(Columns::chunk(own_column() + lane % 16, lane / 16));
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            uint32_t a[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float* pair = &sums[2 * i + j / 2][j % 2 * 2];
                a[j] = T::pack(pair[0] * factor, pair[1] * factor);
            }
            hw::store_matrices(tile, (at ^ (i % 4 * 32)) + i / 4 * Columns::GROUP_STRIDE, a);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            int column = own_column() + (i * 32 + lane) / (D / 8), chunk = lane % (D / 8);
            if (column >= count || chunk * 8 >= int(p.sizes.head_dim)) continue;
            store_vector(target, this->target_of(column) + chunk * 8,
                         hw::load<uint4>(tile, Columns::chunk(column, chunk)));
        }
    }

    // The owners' work on a tile. On entry the product of its logits, `s`, is in flight; on return that of the next
    // tile is.
    SFA_DEVICE void tile(float (&s)[NT][4], const Step& now, bool more, bool full) {
        int stage = now.index % STAGES, next = more ? (now.index + 1) % STAGES : stage;
        hw::Tile q = queries(stage), grad = grads(stage);
        float g[NT][4], c[PART / 8][4];
        uint32_t weights[NT / 2][4], slopes[NT / 2][4];
        hw::products_wait<0>();
        hw::settle(s);
        if (now.index > 0) left((now.index - 1) % STAGES).arrive_as_warp();
        bool odd = has_odd_rows(stage);
        // Before `g` needs registers.
        if (odd) weigh_odd(s, now, stage);
        multiply_own(g, v, grad);
        if (full && !odd) weigh<true>(s, now.row, stage);
        else if (!odd) weigh<false>(s, now.row, stage);
        hw::products_wait<0>();
        hw::settle(g);
        differentiate(weights, slopes, s, g, stage);
        multiply_tile(dv, weights, grad);
        if (now.index > 0) multiplied().wait((now.index - 1) % 2);
        share(slopes);
        // After the last tile the same stage is multiplied once more, and the result is not used.
        if (more) come(next).wait((now.index + 1) / STAGES % 2);
        hw::publish_to_products();
        meet();
        hw::products_wait<0>();
        multiply_queries(c);
        multiply_tile(dk, slopes, q);
        multiply_own(s, k, queries(next));
        hw::products_wait<2>();
        hw::settle(c);
        multiplied().arrive_as_warp();
        if (now.index > 0) added().wait((now.index - 1) % 2);
        gather_queries(c);
        hw::publish_to_products();
        gathered().arrive_as_warp();
    }

    SFA_DEVICE void own(const Steps& steps, const ColumnTarget& keys, const ColumnTarget& values,
                        const Global<float>& column_sums) {
        if constexpr (FADED) hw::store(fades(), 0, float2{0, 0});
        this->template load_columns<Columns, OWNERS>(k, v, [] { meet(); });
        hw::copy_commit();
        ColumnRows head_column = this->rows_of(first), last = this->rows_of(first + count - 1);
        int full_end = head_column.end - NB, full_begin = count == COLUMNS ? last.begin : steps.end;
        float s[NT][4];
        Step now = steps.first();
        bool any = steps.has(now);
        hw::copy_wait<0>();
        // A key or value that is not finite must not reach rows that do not see it, by 0 * NaN.
        cleanse<T, Columns, COLUMNS, OWNERS>(k);
        cleanse<T, Columns, COLUMNS, OWNERS>(v);
        if (any) come(0).wait(0);
        hw::publish_to_products();
        meet();
        // The zeros are written before any product is in flight.
        hw::settle(dk);
        hw::settle(dv);
        if (any) {
            multiply_own(s, k, queries(0));
#pragma unroll 1
            do {
                Step next = steps.after(now);
                tile(s, now, steps.has(next), now.row >= full_begin && now.row <= full_end);
                now = next;
            } while (steps.has(now));
        }
        hw::products_wait<0>();
        hw::settle(s);
        hw::settle(dk);
        hw::settle(dv);
        meet();
        store(keys, k, dk, p.scale * p.scale_sign * LN_2);
        store(values, v, dv, 1.f);
        if constexpr (FADED) store_fades(column_sums);
    }

    SFA_DEVICE void store_fades(const Global<float>& target) const {
        int lane = this->lane();
        float2 sums = hw::load<float2>(fades(), 0);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int column = own_column() + r * 8 + lane / 4;
            float sum = quad_sum(r == 0 ? sums.x : sums.y);
            if (lane % 4 == 0 && column < count) target.set(list * p.sizes.tokens + first + column, sum);
        }
    }

    // The loaders: copy each tile as soon as its stage is free.
    SFA_DEVICE void load(const Steps& steps) const {
#pragma unroll 1
        for (Step now = steps.first(); steps.has(now); now = steps.after(now)) {
            if (now.index >= STAGES) left(now.index % STAGES).wait((now.index / STAGES - 1) % 2);
            load_tile(now);
        }
    }

    // The adding thread: adds each tile's gathered dQ to memory.
    SFA_DEVICE void add(const Steps& steps, const Global<float>& dq) const {
#pragma unroll 1
        for (Step now = steps.first(); steps.has(now); now = steps.after(now)) {
            gathered().wait(now.index % 2);
            add_queries(dq, now);
            hw::wait_for_bulk_reads();
            added().arrive();
        }
        hw::wait_for_bulk();
    }

    // `column_sums`: where those of FADED go.
    SFA_DEVICE void run(const Global<float>& dq, const ColumnTarget& keys, const ColumnTarget& values,
                        const Global<float>& column_sums = {}) {
        if (count <= 0) return;
        uint32_t heads = p.sizes.heads / p.sizes.lists, head = uint32_t(list) % p.sizes.lists * heads;
        Steps steps{this->rows_of(first).begin / NB * NB, this->rows_of(first + count - 1).end, head, head + heads};
        if (hw::thread() == 0) init_marks();
        __syncthreads();
        int role = hw::uniform(int(threadIdx.x));
        if (role < OWNERS) {
            hw::take_registers<OWNERS_HAVE>();
            own(steps, keys, values, column_sums);
        } else {
            hw::give_registers<OTHERS_HAVE>();
            if (role < OWNERS + LOADERS) load(steps);
            else if (threadIdx.x == OWNERS + LOADERS) add(steps, dq);
        }
    }
};
