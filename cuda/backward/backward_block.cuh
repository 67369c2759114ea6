// Gradients of attention on tensor cores, with one owner per sum: no atomics, and the same bits on every run.
// backward_fused.cuh gives that up for speed. All gradients leave in f32.
//
// Two kernels. A block of `QueryGradients` owns dQ of 64 query rows of one head and walks over the tiles of 64 columns
// that they see. A block of `ColumnGradients` owns dK and dV of 64 columns of one list and walks over the tiles of 64
// rows that see them, of every query head of the list. Edge columns are the first kernel's for dQ; for dK and dV they
// have a kernel of their own, in backward.cu.
//
// The idea: weights are not stored by the forward pass. They are computed again from the saved log-sum-exp L of the
// row: P = 2^(logit - L). With dP = dO V' and delta = sum(O * dO), the gradient of a logit is dS = P * (dP - delta).
// Then dQ = dS K, dK = dS' Q, dV = P' dO. Logits are in base 2, so dQ and dK are multiplied by scale * ln 2 at
// the end.
//
// 1. Four warps own 16 rows (or columns) each; dQ (or dK and dV) stays in registers during the walk.
// 2. A tile is copied while the one before is multiplied, where shared memory has room for two stages (D up to 128). At
//    D = 256 there is one stage, and dK and dV are two kernels: their sums would not fit into registers together.
// 3. Gradients of logits stay in registers as left fragments of the next product; they are rounded to T there.
// 4. A tile that every row sees whole takes a path without masks (`FULL`). A bias, dropout or an odd row takes the
//    general path.
// 5. Odd rows: a large log-sum-exp is read with its rounding remainder, so that equal logits of any size keep equal
//    weights; NaN rows are contained (`OddRows`), so that 0 * NaN does not reach columns they do not see.
//
// Shared memory in KiB, at D = 64, 128 and 256:
//
//   QueryGradients:   queries, output gradients               2 * 64 * D * 2              16  32  64
//                     stages of keys, values                  STAGES * 2 * 64 * D * 2     32  64  64
//   ColumnGradients:  keys, values                            2 * 64 * D * 2              16  32  64
//                     stages of queries, output gradients     STAGES * 2 * 64 * D * 2     32  64  64
//                     and their log-sum-exps and deltas       STAGES * 2 * 64 * 4          1   1  0.5
#pragma once

#include "lib/attention.cuh"
#include "lib/softmax.cuh"

struct BackwardTensors {
    Halves q, k, v;
    Halves far_k, far_v;
    Floats far_ln;
    Words far_index, far_before;
    Halves folded_k, folded_v;
    Floats folded_ln, bias;
    Halves grad_output;         // (B, H, N, D)
    Floats log_sum_exp;         // (2, B, H, N): log-sum-exps, then their rounding remainders
    Floats delta;               // (B, H, N)
};

// The parameters of every kernel of gradients, and the struct it keeps them in.
#define BACKWARD_INPUTS                                                                                          \
    Halves q, Halves k, Halves v, Halves far_k, Halves far_v, Floats far_ln, Words far_index, Words far_before,  \
        Halves folded_k, Halves folded_v, Floats folded_ln, Floats bias, Halves grad_output, Floats log_sum_exp, \
        Floats delta
#define BACKWARD_TENSORS                                                                                        \
    BackwardTensors {                                                                                           \
        q, k, v, far_k, far_v, far_ln, far_index, far_before, folded_k, folded_v, folded_ln, bias, grad_output, \
            log_sum_exp, delta                                                                                  \
    }

// dQ and dK are scaled by this times the scale of the logits, which has log2(e) in it.
constexpr float LN_2 = 0.6931471805599453f;

// A logit in base 2 from a product of a query and a key, and the factor from its gradient to that of the product.
SFA_DEVICE float scaled(const AttentionParams& p, float product, float& slope) {
    return capped(p.softcap, product * p.scale * p.scale_sign, slope);
}

// Whether a bias, dropout or a softcap excludes the shortest path.
SFA_DEVICE bool has_extras(const AttentionParams& p, const BackwardTensors& x) {
    return x.bias || p.dropout_cut != 0 || p.softcap != 0.f;
}

// Buffers of tiles: at D = 256 shared memory has no room for two.
constexpr int stages(int dim) { return dim <= 128 ? 2 : 1; }

// Whether a tile has odd rows, by their log-sum-exps and deltas in shared memory; the same in all warps of a block.
struct OddRows {
    // `any`: a log-sum-exp is large, infinite or NaN; weights then read the rounding remainders. `bad`: a row is NaN.
    bool any, bad;

    template <int ROWS>
    SFA_DEVICE static OddRows of(const hw::Tile& log_sum_exp, const hw::Tile& delta) {
        bool any = false, bad = false;
#pragma unroll
        for (uint32_t row = hw::thread() % 32; row < ROWS; row += 32) {
            float sum = hw::load<float>(log_sum_exp, row * 4), mean = hw::load<float>(delta, row * 4);
            bad |= sum != sum || mean != mean;
            any |= !(fabsf(sum) < LARGE_LOGIT);
        }
        any = hw::warp_any(any || bad);
        return {any, any && hw::warp_any(bad)};
    }

    // NaN rows must not reach columns that they do not see, by 0 * NaN. Their queries, output gradients and deltas
    // become zeros, and only the log-sum-exp stays NaN. For THREADS threads, which meet between `of` and this, and
    // again after it.
    template <class T, class L, int ROWS, int THREADS>
    SFA_DEVICE static void contain(const hw::Tile& q, const hw::Tile& grad, const hw::Tile& log_sum_exp,
                                   const hw::Tile& delta) {
        cleanse<T, L, ROWS, THREADS>(q);
        cleanse<T, L, ROWS, THREADS>(grad);
        if (threadIdx.x >= ROWS) return;
        float sum = hw::load<float>(log_sum_exp, threadIdx.x * 4), mean = hw::load<float>(delta, threadIdx.x * 4);
        if (sum == sum && mean == mean) return;
        hw::store(log_sum_exp, threadIdx.x * 4, hw::nan());
        hw::store(delta, threadIdx.x * 4, 0.f);
    }
};

// dQ of 64 rows: four warps of 16 rows, tiles of 64 columns.
template <class T, int D>
struct QueryGradients {
    static constexpr int THREADS = 128, ROWS = 64, NB = 64, NT = NB / 8, STAGES = stages(D);
    // Queries and output gradients; each stage has a tile of keys and one of values.
    static constexpr uint32_t TILE = 64 * D * 2, BYTES = 2 * TILE + STAGES * 2 * TILE;

    struct Columns {
        bool near;
        int first, count;
    };

    const AttentionParams& p;
    const BackwardTensors& x;
    HeadIndex at;
    hw::Tile q, grad;
    Fragments<D> own_rows, column_rows, right_rows;
    float dq[1][D / 8][4];
    float log_sum_exp[2], rest[2], delta[2];
    // A row of this warp has a large log-sum-exp: no tile takes the FULL path.
    bool large;
    int lane, warp_row, block_row, row_end;
    int far, far_skipped, far_tiles, near_first, near_tiles;
    int far_begin[2], far_end[2];  // the far columns that this lane's rows see

    SFA_DEVICE QueryGradients(const AttentionParams& p, const BackwardTensors& x, uint32_t batch_head, int row)
        : p(p), x(x), at(p, batch_head), own_rows(false, threadIdx.x / 32 * 16), column_rows(true, 0),
          right_rows(false, 0), block_row(row) {
        q = hw::tile(0, TILE), grad = hw::tile(TILE, TILE);
        lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
        row_end = min(int(p.sizes.tokens), row + ROWS);
        // The walk starts at the first tile of far columns that a row sees.
        far_skipped = far_first(p, x.far_before, at.list, row) / NB;
        far = far_count(p, x.far_before, at.list, row_end - 1), far_tiles = (far + NB - 1) / NB - far_skipped;
        near_first = p.window > 0 && !p.dense ? max(0, row - int(p.window) + 1) : row_end;
        near_tiles = (row_end - near_first + NB - 1) / NB;
        for (int r = 0; r < 2; r++) {
            int64_t index = at.batch_head * p.sizes.tokens + min(row_of(r), row_end - 1);
            log_sum_exp[r] = x.log_sum_exp[index], delta[r] = x.delta[index];
            rest[r] = x.log_sum_exp[rest_of_sums(p) + index];
            far_begin[r] = far_first(p, x.far_before, at.list, min(row_of(r), row_end - 1));
            far_end[r] = far_count(p, x.far_before, at.list, min(row_of(r), row_end - 1));
        }
#pragma unroll
        for (int i = 0; i < D / 2; i++) dq[0][i / 4][i % 4] = 0;
        large = hw::warp_any(!(fabsf(log_sum_exp[0]) < LARGE_LOGIT && fabsf(log_sum_exp[1]) < LARGE_LOGIT));
    }

    SFA_DEVICE int row_of(int r) const { return block_row + warp_row + r * 8 + lane / 4; }

    SFA_DEVICE int token(const Columns& c, int column) const {
        return c.near || p.dense ? c.first + column : int(x.far_index[at.list * p.capacity + c.first + column]);
    }

    SFA_DEVICE hw::Tile keys(int stage) const { return hw::tile((2 + 2 * stage) * TILE, TILE); }
    SFA_DEVICE hw::Tile values(int stage) const { return hw::tile((3 + 2 * stage) * TILE, TILE); }

    SFA_DEVICE Columns columns(int step) const {
        bool is_near = step >= far_tiles;
        int first = is_near ? near_first + (step - far_tiles) * NB : (far_skipped + step) * NB;
        return {is_near, first, min(NB, (is_near ? row_end : far) - first)};
    }

    template <bool FULL>
    SFA_DEVICE void load(const Columns& c, int stage) {
        bool raw = c.near || p.dense;
        uint32_t dim = p.sizes.head_dim;
        int64_t first = (at.list * p.capacity + c.first) * dim;
        int64_t key = raw ? p.k.at(at.batch, at.kv_head, c.first) : first;
        int64_t value = raw ? p.v.at(at.batch, at.kv_head, c.first) : first;
        int64_t key_stride = raw ? p.k.token_stride : dim, value_stride = raw ? p.v.token_stride : dim;
        load_rows<Layout<D>, NB, THREADS, FULL>(keys(stage), raw ? x.k : x.far_k, key, key_stride, c.count, dim);
        load_rows<Layout<D>, NB, THREADS, FULL>(values(stage), raw ? x.v : x.far_v, value, value_stride, c.count, dim);
        hw::copy_commit();
    }

    // Whether every row sees every column of the tile, and there is neither bias nor dropout nor softcap.
    SFA_DEVICE bool full(const Columns& c) const {
        if (has_extras(p, x) || c.count < NB || row_end - block_row < ROWS) return false;
        if (c.near) return c.first + NB <= block_row + 1 && c.first > row_end - 1 - int(p.window);
        return c.first + NB <= far_count(p, x.far_before, at.list, block_row) &&
               c.first >= far_first(p, x.far_before, at.list, row_end - 1);
    }

    // The gradient of a logit, from the logit and the gradient of its weight.
    SFA_DEVICE float to_logit(int r, float logit, float weight_grad, int column_token) const {
        int row = row_of(r);
        if (x.bias) logit += bias_at(p, x.bias, at, row, column_token);
        if (p.dropout_cut != 0) weight_grad *= dropout_factor(p, at, row, column_token);
        return hw::exp2(exponent_of(logit, log_sum_exp[r], rest[r])) * (weight_grad - delta[r]);
    }

    template <bool FULL>
    SFA_DEVICE void tile(const Columns& c, int stage) {
        hw::Tile k = keys(stage), v = values(stage);
        float s[1][NT][4], grads[1][NT][4];
#pragma unroll
        for (int i = 0; i < NT * 4; i++) s[0][i / 4][i % 4] = 0, grads[0][i / 4][i % 4] = 0;
        multiply_rows<T, D, 1, NT>(s, own_rows, q, column_rows, k);
        multiply_rows<T, D, 1, NT>(grads, own_rows, grad, column_rows, v);
        bool sizes = !c.near && x.far_ln;
        if (FULL) {
            float scale = p.scale * p.scale_sign;
#pragma unroll
            for (int i = 0; i < 2 * NT; i++) {
                int index = c.first + i / 2 * 8 + lane % 4 * 2 + i % 2;
                float size = sizes ? LOG2_E * x.far_ln[at.list * p.capacity + index] : 0.f;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float& logit = s[0][i / 2][r * 2 + i % 2];
                    float weight = hw::exp2(logit * scale + (size - log_sum_exp[r]));
                    logit = weight * (grads[0][i / 2][r * 2 + i % 2] - delta[r]);
                }
            }
        } else {
            // A key that is not finite must not reach rows that do not see it, by 0 * NaN. Each warp cleans the tile by
            // itself.
            float met = 0;
#pragma unroll
            for (int i = 0; i < NT * 4; i++) met += s[0][i / 4][i % 4] * 0.f;
            if (hw::warp_any(met != 0.f)) {
                cleanse<T, Layout<D>, NB, 32>(k, lane);
                __syncwarp();
            }
#pragma unroll
            for (int r = 0; r < 2; r++) {
                int row = row_of(r), last = min(row, row_end - 1);
                int begin = c.near ? last - int(p.window) + 1 : far_begin[r], end = c.near ? last + 1 : far_end[r];
#pragma unroll
                for (int i = 0; i < 2 * NT; i++) {
                    int column = i / 2 * 8 + lane % 4 * 2 + i % 2, index = c.first + column;
                    float& logit = s[0][i / 2][r * 2 + i % 2];
                    bool visible = row < row_end && column < c.count && index >= begin && index < end;
                    if (visible) {
                        float slope;
                        logit = scaled(p, logit, slope);
                        if (sizes) logit += LOG2_E * x.far_ln[at.list * p.capacity + index];
                        int id = x.bias || p.dropout_cut ? token(c, column) : 0;
                        logit = to_logit(r, logit, grads[0][i / 2][r * 2 + i % 2], id) * slope;
                    } else {
                        logit = 0;
                    }
                }
            }
        }
        multiply_weights<T, D, 1, NT>(dq, right_rows, s, k);
    }

    // Multiplies the tile of a step, whose copies are in flight, and starts the copies of the next.
    SFA_DEVICE void step(int index, int steps) {
        Columns c = columns(index);
        int stage = index % STAGES;
        hw::copy_wait<0>();
        __syncthreads();
        bool more = index + 1 < steps;
        if (STAGES == 2 && more) load_next(index + 1);
        if (full(c) && !large) tile<true>(c, stage);
        else tile<false>(c, stage);
        if (STAGES == 1 && more) {
            __syncthreads();
            load_next(index + 1);
        }
    }

    SFA_DEVICE void load_next(int index) { load<false>(columns(index), index % STAGES); }

    SFA_DEVICE void edge(int r) {
        int row = row_of(r), column = edge_token(p, x.far_before, at.list, row);
        Halves key = edge_row(p, x.folded_k, x.k, p.k, at, max(column, 0));
        Halves value = edge_row(p, x.folded_v, x.v, p.v, at, max(column, 0));
        float logit = 0, weight_grad = 0;
        for (uint32_t chunk = lane % 4; column >= 0 && chunk * 8 < p.sizes.head_dim; chunk += 4) {
            uint32_t offset = Layout<D>::chunk(row - block_row, chunk);
            logit = hw::dot<T>(hw::load<uint4>(q, offset), load_vector<uint4>(key, chunk * 8), logit);
            weight_grad = hw::dot<T>(hw::load<uint4>(grad, offset), load_vector<uint4>(value, chunk * 8), weight_grad);
        }
        logit += hw::shuffle_xor(logit, 1);
        logit += hw::shuffle_xor(logit, 2);
        weight_grad += hw::shuffle_xor(weight_grad, 1);
        weight_grad += hw::shuffle_xor(weight_grad, 2);
        if (column < 0) return;
        float slope;
        logit = scaled(p, logit, slope);
        if (x.folded_ln) logit += LOG2_E * x.folded_ln[at.list * p.sizes.tokens + column];
        float factor = to_logit(r, logit, weight_grad, column) * slope;
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            uint32_t element = d * 8 + lane % 4 * 2;
            uint32_t pair = element < p.sizes.head_dim ? load_vector<uint32_t>(key, element) : 0u;
            dq[0][d][r * 2] += factor * hw::low<T>(pair);
            dq[0][d][r * 2 + 1] += factor * hw::high<T>(pair);
        }
    }

    SFA_DEVICE void run(const Global<float>& target) {
        uint32_t dim = p.sizes.head_dim;
        load_rows<Layout<D>, ROWS, THREADS, false>(q, x.q, p.q.at(at.batch, at.head, block_row), p.q.token_stride,
                                                   row_end - block_row, dim);
        load_rows<Layout<D>, ROWS, THREADS, false>(
            grad, x.grad_output, (at.batch_head * p.sizes.tokens + block_row) * dim, dim, row_end - block_row, dim);
        int steps = far_tiles + near_tiles;
        if (steps > 0) load_next(0);
        hw::copy_commit();
        hw::copy_wait<0>();
        __syncthreads();
        edge(0);
        edge(1);
#pragma unroll 1
        for (int i = 0; i < steps; i++) step(i, steps);
        float factor = p.scale * p.scale_sign * LN_2;
#pragma unroll
        for (int i = 0; i < D / 4; i++) {
            int d = i / 2, row = row_of(i % 2);
            uint32_t element = d * 8 + lane % 4 * 2;
            if (row < row_end && element < dim)
                store_vector(target, (at.batch_head * p.sizes.tokens + row) * dim + element,
                             float2{dq[0][d][i % 2 * 2] * factor, dq[0][d][i % 2 * 2 + 1] * factor});
        }
    }
};

// The rows that see a column, [begin, end), and its ln n in base 2.
struct ColumnRows {
    int token, begin, end;
    float addend;

    SFA_DEVICE ColumnRows(int token, int begin, int end, float addend)
        : token(token), begin(begin), end(end), addend(addend) {}

    // `near`: raw token `column` inside the window. Otherwise far column `column` of the list, or in the dense case a
    // raw token. A column beyond the last is seen by no row.
    SFA_DEVICE ColumnRows(const AttentionParams& p, const Words& far_before, const Words& far_index,
                          const Floats& far_ln, int64_t list, int column, bool near) {
        int tokens = int(p.sizes.tokens);
        token = column, begin = tokens, end = tokens, addend = 0;
        bool raw = near || p.dense;
        int count = raw ? tokens : int(far_before[list * (tokens + 1) + tokens]);
        if (column >= count) return;
        if (!raw) token = int(far_index[list * p.capacity + column]);
        if (!raw && far_ln) addend = LOG2_E * far_ln[list * p.capacity + column];
        begin = !p.causal ? 0 : raw ? token : min(tokens, token + int(p.window) + 1);
        begin = max(begin, int(p.first_row));
        end = min(tokens, token + int(near ? p.window : p.slide));
    }
};

// A sum over the four lanes of a quad.
SFA_DEVICE float quad_sum(float x) {
    x += hw::shuffle_xor(x, 1);
    return x + hw::shuffle_xor(x, 2);
}

// dK (KEYS) and dV (VALUES) of 64 columns: four warps of 16 columns, tiles of 64 rows. FADED (with KEYS): also the
// columns' sums of gradients of logits, (B * lists, N), for the gradient of a column bias.
template <class T, int D, bool KEYS, bool VALUES, bool FADED = false>
struct ColumnGradients {
    static constexpr int THREADS = 128, NB = 64, NT = NB / 8, STAGES = stages(D);
    // A stage has a tile of queries, one of output gradients, and two words per row.
    static constexpr uint32_t TILE = 64 * D * 2, STAGE = 2 * TILE + 2 * NB * 4, BYTES = 2 * TILE + STAGES * STAGE;

    const AttentionParams& p;
    const BackwardTensors& x;
    bool near;
    uint32_t batch, kv_head;
    int64_t list;
    int first;
    hw::Tile k, v;
    Fragments<D> own_columns, row_rows, right_rows;
    float dk[1][KEYS ? D / 8 : 1][4], dv[1][VALUES ? D / 8 : 1][4];
    // This thread's share of two columns' sums.
    float fades[2] = {};
    int lane, warp_column;
    ColumnRows columns[2];

    // `unit`: batch * lists + list.
    SFA_DEVICE ColumnGradients(const AttentionParams& p, const BackwardTensors& x, uint32_t unit, int column, bool near)
        : p(p), x(x), near(near), first(column), own_columns(false, threadIdx.x / 32 * 16), row_rows(true, 0),
          right_rows(false, 0), lane(threadIdx.x % 32), warp_column(threadIdx.x / 32 * 16),
          columns{rows_of(unit, column + warp_column + lane / 4), rows_of(unit, column + warp_column + lane / 4 + 8)} {
        batch = unit / p.sizes.lists, list = unit;
        kv_head = unit % p.sizes.lists / (p.sizes.lists / p.sizes.kv_heads);
        k = hw::tile(0, TILE), v = hw::tile(TILE, TILE);
#pragma unroll
        for (int i = 0; i < (KEYS ? D / 2 : 4); i++) dk[0][i / 4][i % 4] = 0;
#pragma unroll
        for (int i = 0; i < (VALUES ? D / 2 : 4); i++) dv[0][i / 4][i % 4] = 0;
    }

    SFA_DEVICE ColumnRows rows_of(uint32_t unit, int column) const {
        return ColumnRows(p, x.far_before, x.far_index, x.far_ln, unit, column, near);
    }

    SFA_DEVICE void load_columns(int count) {
        uint32_t dim = p.sizes.head_dim;
        if (near || p.dense) {
            load_rows<Layout<D>, 64, THREADS, false>(k, x.k, p.k.at(batch, kv_head, first), p.k.token_stride, count,
                                                     dim);
            load_rows<Layout<D>, 64, THREADS, false>(v, x.v, p.v.at(batch, kv_head, first), p.v.token_stride, count,
                                                     dim);
        } else {
            int64_t index = (list * p.capacity + first) * dim;
            load_rows<Layout<D>, 64, THREADS, false>(k, x.far_k, index, dim, count, dim);
            load_rows<Layout<D>, 64, THREADS, false>(v, x.far_v, index, dim, count, dim);
        }
    }

    // Buffer `index` of a stage: queries, output gradients, log-sum-exps, deltas.
    SFA_DEVICE hw::Tile part(int stage, int index) const {
        uint32_t first = 2 * TILE + stage * STAGE;
        return index < 2 ? hw::tile(first + index * TILE, TILE)
                         : hw::tile(first + 2 * TILE + (index - 2) * NB * 4, NB * 4);
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

    // FULL: every row sees every column, there is neither bias nor dropout, and no row is odd.
    template <bool FULL>
    SFA_DEVICE void tile(const HeadIndex& at, int row, int stage) {
        hw::Tile q = part(stage, 0), grad = part(stage, 1), log_sum_exp = part(stage, 2), delta = part(stage, 3);
        int count = min(NB, int(p.sizes.tokens) - row);
        float s[1][NT][4], grads[1][NT][4];
#pragma unroll
        for (int i = 0; i < NT * 4; i++) s[0][i / 4][i % 4] = 0, grads[0][i / 4][i % 4] = 0;
        multiply_rows<T, D, 1, NT>(s, own_columns, k, row_rows, q);
        if (KEYS) multiply_rows<T, D, 1, NT>(grads, own_columns, v, row_rows, grad);
        float scale = p.scale * p.scale_sign;
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float2 sums = hw::load<float2>(log_sum_exp, (n * 8 + lane % 4 * 2) * 4);
            float2 deltas = hw::load<float2>(delta, (n * 8 + lane % 4 * 2) * 4);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const ColumnRows& column = columns[i / 2];
                float sum = i % 2 ? sums.y : sums.x, mean = i % 2 ? deltas.y : deltas.x;
                if (FULL) {
                    float weight = hw::exp2(s[0][n][i] * scale + (column.addend - sum));
                    s[0][n][i] = weight;
                    grads[0][n][i] = weight * (grads[0][n][i] - mean);
                    if (FADED) fades[i / 2] += grads[0][n][i];
                    continue;
                }
                int r = row + n * 8 + lane % 4 * 2 + i % 2;
                float weight = 0, kept = 1, slope = 1;
                bool visible = r >= column.begin && r < column.end && r < row + count;
                if (visible) {
                    float logit = scaled(p, s[0][n][i], slope) + column.addend;
                    if (x.bias) logit += bias_at(p, x.bias, at, r, column.token);
                    if (p.dropout_cut != 0) kept = dropout_factor(p, at, r, column.token);
                    float rest = fabsf(sum) < LARGE_LOGIT ? 0.f : rest_of_sum(p, x.log_sum_exp, at, r);
                    weight = hw::exp2(exponent_of(logit, sum, rest));
                }
                s[0][n][i] = weight * kept;
                float logit_grad = visible ? weight * (grads[0][n][i] * kept - mean) : 0.f;
                if (FADED) fades[i / 2] += logit_grad;
                grads[0][n][i] = visible ? logit_grad * slope : 0.f;
            }
        }
        if constexpr (VALUES) multiply_weights<T, D, 1, NT>(dv, right_rows, s, grad);
        if constexpr (KEYS) multiply_weights<T, D, 1, NT>(dk, right_rows, grads, q);
    }

    template <int N>
    SFA_DEVICE void store(const Global<float>& target, const float (&sums)[1][N][4], float factor, int count) const {
#pragma unroll
        for (int i = 0; i < 2 * N; i++) {
            int column = warp_column + lane / 4 + i % 2 * 8;
            uint32_t element = i / 2 * 8 + lane % 4 * 2;
            if (column >= count || element >= p.sizes.head_dim) continue;
            store_vector(target, (list * p.sizes.tokens + first + column) * p.sizes.head_dim + element,
                         float2{sums[0][i / 2][i % 2 * 2] * factor, sums[0][i / 2][i % 2 * 2 + 1] * factor});
        }
    }

    SFA_DEVICE int far_columns() const {
        int64_t tokens = p.sizes.tokens;
        return near || p.dense ? int(tokens) : int(x.far_before[list * (tokens + 1) + tokens]);
    }

    SFA_DEVICE void run(const Global<float>& keys, const Global<float>& values) {
        int count = min(64, far_columns() - first);
        if (count <= 0) return;
        load_columns(count);
        hw::copy_commit();
        ColumnRows last = rows_of(uint32_t(list), first + count - 1);
        int begin = rows_of(uint32_t(list), first).begin / NB * NB, end = last.end;
        int full_end = rows_of(uint32_t(list), first).end - NB;
        bool plain = count == 64 && !has_extras(p, x);
        uint32_t heads = p.sizes.heads / p.sizes.lists;
        uint32_t head = batch * p.sizes.heads + uint32_t(list) % p.sizes.lists * heads;
        int tiles = max(0, end - begin + NB - 1) / NB, steps = tiles * int(heads);
        if (steps > 0) load_tile(HeadIndex(p, head), begin, 0);
#pragma unroll 1
        for (int i = 0; i < steps; i++) {
            HeadIndex at(p, head + i / tiles);
            int row = begin + i % tiles * NB, stage = i % STAGES, next = i + 1;
            hw::copy_wait<0>();
            __syncthreads();
            if (STAGES == 2 && next < steps)
                load_tile(HeadIndex(p, head + next / tiles), begin + next % tiles * NB, next % STAGES);
            bool odd = has_odd_rows(stage);
            if (plain && !odd && row >= last.begin && row <= full_end) tile<true>(at, row, stage);
            else tile<false>(at, row, stage);
            if (STAGES == 1 && next < steps) {
                __syncthreads();
                load_tile(HeadIndex(p, head + next / tiles), begin + next % tiles * NB, 0);
            }
        }
        // If no row sees these columns, their copies are still in flight.
        hw::copy_wait<0>();
        if constexpr (KEYS) store(keys, dk, p.scale * p.scale_sign * LN_2, count);
        if constexpr (VALUES) store(values, dv, 1.f, count);
    }

    // After `run`.
    SFA_DEVICE void store_fades(const Global<float>& target) const {
        int count = min(64, far_columns() - first);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int column = warp_column + lane / 4 + r * 8;
            float sum = quad_sum(fades[r]);
            if (lane % 4 == 0 && column < count) target.set(list * p.sizes.tokens + first + column, sum);
        }
    }
};
