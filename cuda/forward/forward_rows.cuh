// The softmax of a block of query rows, its output, and the writing of it. forward_block.cuh and forward_wgmma.cuh
// multiply the tiles.
#pragma once

#include "forward/forward_tiles.cuh"
#include "lib/softmax.cuh"

// EXTRAS: bias, dropout, a softcap and sink logits are possible. S::SLIDING: a sliding window, and rows that are left
// out.
template <class T, class S, bool EXTRAS>
struct ForwardRows : ForwardTiles<S> {
    typedef ForwardTiles<S> Tiles;
    typedef typename Tiles::Columns Columns;
    using Tiles::p, Tiles::x, Tiles::at, Tiles::q, Tiles::staging, Tiles::words, Tiles::bad;
    using Tiles::lane, Tiles::warp_row, Tiles::block_row, Tiles::row_end, Tiles::has_sizes, Tiles::token;
    using Tiles::D, Tiles::MT, Tiles::NB, Tiles::THREADS, Tiles::ROWS, Tiles::LISTED, Tiles::SLIDING;
    static constexpr int R = 2 * MT, NT = NB / 8;

    OnlineSoftmax<R> softmax;
    float output[MT][D / 8][4];

    SFA_DEVICE ForwardRows(const AttentionParams& p, const ForwardTensors& x, uint32_t turn = 0) : Tiles(p, x, turn) {}

    SFA_DEVICE int row_of(int r) const {
        uint32_t first = block_row() + warp_row() + lane() / 4;
        hw::keep_in_place(first);
        return int(first) + r / 2 * 16 + r % 2 * 8;
    }

    // Rows start with no column.
    SFA_DEVICE void clear() {
#pragma unroll
        for (int r = 0; r < R; r++) softmax.maximum[r] = -hw::infinity(), softmax.sum[r] = 0;
#pragma unroll
        for (int i = 0; i < MT * D / 2; i++) output[i / (D / 2)][i / 4 % (D / 8)][i % 4] = 0;
    }

    // Rows start with their edge columns.
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
                    uint4 a = hw::load<uint4>(q, S::Queries::chunk(row - block_row(), chunk));
                    uint4 b = load_vector<uint4>(key, chunk * 8);
                    logit = hw::dot<T>(a, b, logit);
                    // A value that is not finite makes the row NaN by itself; a key might only give a logit of minus
                    // infinity.
                    if (any_not_finite<T>(b)) logit = hw::nan();
                }
            }
            logit += hw::shuffle_xor(logit, 1);
            logit += hw::shuffle_xor(logit, 2);
            float weight = 0;
            if (token >= 0) {
                logit *= p.scale;
                if (EXTRAS) logit = capped(p.softcap, logit);
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

    // Scales and caps logits and adds ln n and the bias, all in base 2.
    SFA_DEVICE void add_terms(float (&s)[MT][NT][4], const Columns& c, uint32_t tile) {
        bool sizes = has_sizes(c);
        int first = lane() % 4 * 2;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float2 size = sizes ? hw::load<float2>(words(tile), (n * 8 + first) * 4) : float2{0, 0};
#pragma unroll
            for (int i = 0; i < 4 * MT; i++) {
                float& logit = s[i / 4][n][i % 4];
                if (EXTRAS) logit = capped(p.softcap, logit * p.scale) + (i % 2 ? size.y : size.x) * LOG2_E;
                else logit = logit * p.scale + (i % 2 ? size.y : size.x) * LOG2_E;
                if (EXTRAS && x.bias) {
                    int row = row_of(i / 2), column = n * 8 + first + i % 2;
                    if (row < row_end() && column < c.count) logit += bias_at(p, x.bias, at(), row, token(c, column));
                }
            }
        }
    }

    // Turns a tile's products into logits, except for a scale that is still to be applied, which is returned.
    SFA_DEVICE float to_logits(float (&s)[MT][NT][4], const Columns& c, uint32_t tile) {
        if (!has_sizes(c) && !(EXTRAS && (x.bias || p.softcap != 0.f)) && p.scale != 0.f) return p.scale;
        add_terms(s, c, tile);
        return 1;
    }

    // Hides columns from the rows that do not see them; columns outside of `wanted` are not touched.
    SFA_DEVICE void mask(float (&s)[MT][NT][4], const Columns& c, const Span& wanted) {
        int block = block_row(), last = min(int(p.sizes.tokens), block + ROWS) - 1, thread = hw::thread();
        int row = block + thread / 32 * 16 * MT + thread % 32 / 4, first = c.first + thread % 4 * 2;
#pragma unroll
        for (int r = 0; r < R; r++) {
            uint32_t visible = this->visible(c.near, min(row + r / 2 * 16 + r % 2 * 8, last), block).from(first).bits();
#pragma unroll
            for (int n = 0; n < NT; n++) {
                if (!wanted.touches(n / 2 * 16)) continue;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (!(visible >> (n * 2 + i) & 1)) s[r / 2][n][r % 2 * 2 + i] = -hw::infinity();
                }
            }
        }
    }

    // Raises the rows' maxima to a tile's largest logits within `wanted`. Older sums of outputs have to be multiplied
    // by `rescale`. Returns whether a row of the warp changes.
    template <bool MASKED>
    SFA_DEVICE bool raise(float (&rescale)[R], const float (&s)[MT][NT][4], float scale, const Span& wanted) {
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
        any = hw::warp_any(any);
#pragma unroll
        for (int r = 0; any && r < R; r++) softmax.sum[r] *= rescale[r];
        return any;
    }

    SFA_DEVICE void multiply_output(const float (&rescale)[R]) {
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int i = 0; i < D / 4; i++) output[r / 2][i / 2][r % 2 * 2 + i % 2] *= rescale[r];
        }
    }

    // Turns logits into weights, in place, 16 columns of all rows at a time: their product with values can start while
    // the next ones are computed.
    template <bool MASKED>
    SFA_DEVICE void weigh(float (&s)[MT][NT][4], float scale, const Span& wanted) {
        float base[R];
        bool large = false;
#pragma unroll
        for (int r = 0; r < R; r++) base[r] = softmax.base(r), large |= !(fabsf(base[r]) < LARGE_LOGIT);
        // The base is rounded. An unrounded product minus it would be off by as much as the base's last bit, so
        // products are rounded first.
        if (large) {
#pragma unroll
            for (int i = 0; i < MT * NT * 4; i++) s[i / (NT * 4)][i / 4 % NT][i % 4] *= scale;
            scale = 1;
        }
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

    // A masked tile's logits: `met` becomes NaN where one is not finite.
    SFA_DEVICE void meet(float& met, const float (&s)[MT][NT][4], const Span& wanted) const {
#pragma unroll
        for (int i = 0; i < MT * NT * 4; i++)
            if (wanted.touches(i / 8 % (NT / 2) * 16)) met += s[i / (NT * 4)][i / 4 % NT][i % 4] * 0.f;
    }

    // Searches a tile of raw keys and values, which have arrived, for numbers that are not finite. A meeting point.
    SFA_DEVICE void search(const Columns& c, const hw::Tile& keys, const hw::Tile& values) {
        if (!(LISTED || c.near || p.dense)) return;
        int row = quarantine<T, typename S::Tile, NB, THREADS>(keys, values, bad, [] { S::meet(); });
        // A hidden token is seen only by rows of blocks that find it by themselves.
        if (row < NB && !(LISTED && c.first + row >= this->bounds().far_seen)) this->note_bad(token(c, row));
    }

    // Whether a row of the block has a query that is not finite.
    SFA_DEVICE bool has_bad_query(int row) const {
        bool bad = false;
        for (uint32_t chunk = 0; chunk < S::Queries::CHUNKS; chunk++)
            bad |= any_not_finite<T>(hw::load<uint4>(q, S::Queries::chunk(row - block_row(), chunk)));
        return bad;
    }

    // Adds the sinks and divides by the sums. The first number of a row becomes NaN if any of its numbers, or its sum,
    // is not finite. A row whose every column the bias hides gives zeros, unless its query is not finite. Returns
    // whether this thread met a NaN.
    SFA_DEVICE bool divide() {
        bool unsound = false;
#pragma unroll
        for (int r = 0; r < R; r++) {
            bool empty = softmax.finish(r) == 0.f;
            float factor = EXTRAS && x.sinks ? softmax.add_sink(r, bias_in_base_2(x.sinks[at().head])) : 1.f;
            float inverse = factor / softmax.sum[r];
            if (EXTRAS && empty) inverse = has_bad_query(row_of(r)) ? hw::nan() : 1.f;
            float check = inverse * 0.f;
#pragma unroll
            for (int i = 0; i < D / 4; i++) {
                float& x = output[r / 2][i / 2][r % 2 * 2 + i % 2];
                x *= inverse;
                check += x * 0.f;
            }
            check += hw::shuffle_xor(check, 1);
            check += hw::shuffle_xor(check, 2);
            output[r / 2][0][r % 2 * 2] += check;
            unsound |= check != 0.f;
        }
        return unsound;
    }

    // Writes outputs and log-sum-exps. A row that holds a number that is not finite is NaN throughout.
    SFA_DEVICE void finish() {
#pragma unroll
        for (int r = 0; r < R; r++) {
            int row = row_of(r);
            if (!x.log_sum_exp || row >= row_end() || lane() % 4 != 0) continue;
            // The weights of a NaN row are NaN, too.
            float2 sums = saved_sum(softmax.maximum[r], softmax.sum[r]);
            if (!hw::finite(output[r / 2][0][r % 2 * 2])) sums.x = hw::nan();
            int64_t index = at().batch_head * p.sizes.tokens + row;
            x.log_sum_exp.set(index, sums.x), x.log_sum_exp.set(rest_of_sums(p) + index, sums.y);
        }
        write<false>(x.output);
        if (x.rest) write<true>(x.rest);
    }

    // Writes the rounded output or, if REST, its rounding remainder.
    template <bool REST>
    SFA_DEVICE void write(const Global<uint16_t>& target) {
        // Lanes have read these rows for one another (as queries); they are overwritten now.
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
                hw::store(staging, S::Queries::chunk(row - block_row(), d) + quad_lane * 4, pair);
            }
        }
        __syncwarp();
        int first = block_row(), end = row_end();
        uint32_t first_of_warp = warp_row();
        int64_t head_rows = at().batch_head * p.sizes.tokens;
        for (uint32_t i = lane(); i < 16 * MT * S::Queries::CHUNKS; i += 32) {
            uint32_t row = first_of_warp + i / S::Queries::CHUNKS, chunk = i % S::Queries::CHUNKS;
            if (first + int(row) >= end || chunk * 8 >= p.sizes.head_dim) continue;
            int64_t index = (head_rows + first + row) * p.sizes.head_dim + chunk * 8;
            store_vector(target, index, hw::load<uint4>(staging, S::Queries::chunk(row, chunk)));
        }
    }

    // Starts the rows, after the queries have arrived: with their edges, or with no column if LISTED. A meeting point.
    SFA_DEVICE void start() {
        if (p.scale_sign < 0) this->negate_queries();
        if constexpr (LISTED) clear();
        else edges();
    }

    SFA_DEVICE void write_first_bad() const {
        if (!x.first_bad || hw::thread() != 0) return;
        uint32_t blocks = (p.sizes.tokens + ROWS - 1) / ROWS;
        x.first_bad.set(at().batch_head * blocks + block_row() / ROWS, this->first_bad());
    }
};

// The order of a launch's blocks of rows. S::QUEUE of them go together (see Place): several for each that a device runs
// at a time.
template <class S>
struct RowBlocks {
    // `end`: all of a head's blocks; the last `blocks` of them are computed.
    uint32_t end, blocks, heads;

    SFA_DEVICE RowBlocks(const AttentionParams& p)
        : end((p.sizes.tokens + S::ROWS - 1) / S::ROWS), blocks(S::SLIDING ? blocks_of_rows(p, S::ROWS) : end),
          heads(p.sizes.batch * p.sizes.heads) {}

    SFA_DEVICE uint32_t count() const { return blocks * heads; }

    // Batch and head, and the first row, of block `index`.
    SFA_DEVICE uint2 place(uint32_t index) const {
        Place place(index, blocks, heads, S::QUEUE);
        return {place.unit, (end - 1 - place.block) * S::ROWS};
    }
};

// Declares a kernel that runs `attend`; the shape of its blocks has BYTES of shared memory.
#define FORWARD_KERNEL(name, THREADS, BLOCKS, BYTES, attend, ...)                                                    \
    SHARED_BYTES(name, BYTES)                                                                                        \
    KERNEL __launch_bounds__(THREADS, BLOCKS)                                                                        \
        name(Halves q, Halves k, Halves v, Halves far_k, Halves far_v, Floats far_ln, Words far_index,               \
             Words far_before, Halves folded_k, Halves folded_v, Floats folded_ln, Floats bias,                      \
             Global<uint16_t> output, Global<uint16_t> rest, Global<float> log_sum_exp, Global<uint32_t> first_bad,  \
             Floats sinks, AttentionParams p) {                                                                      \
        attend<__VA_ARGS__>(ForwardTensors{q, k, v, far_k, far_v, far_ln, far_index, far_before, folded_k, folded_v, \
                                                folded_ln, bias, output, rest, log_sum_exp, first_bad, sinks},       \
                                 p);                                                                                 \
    }
