// Gradients of f32 attention: a quad of lanes per row for the queries, per column for keys and values.
#pragma once

#include "backward/backward_block.cuh"
#include "lib/rows_f32.cuh"

struct BackwardF32 {
    ColumnsF32 columns;
    Floats grad_output, log_sum_exp, delta;
};

template <int D>
SFA_DEVICE void query_gradients(const BackwardF32& x, const Global<float>& dq, const AttentionParams& p) {
    constexpr int PART = D / 4;
    RowF32<D> row(x.columns, p, 32);
    int64_t index = row.at.batch_head * p.sizes.tokens + row.token;
    float log_sum_exp = x.log_sum_exp[index], rest = x.log_sum_exp[rest_of_sums(p) + index], delta = x.delta[index];
    float query[PART], grad[PART], sums[PART];
    row.load_query(query);
    row.load_part(grad, x.grad_output, index * p.sizes.head_dim);
#pragma unroll
    for (int i = 0; i < PART; i++) sums[i] = 0;
    row.for_each_column([&](const ColumnF32& c) {
        float key[PART], value[PART], logit = 0, weight_grad = 0;
        row.load_part(key, c.keys, c.key_at);
        row.load_part(value, c.values, c.value_at);
#pragma unroll
        for (int i = 0; i < PART; i++) logit += query[i] * key[i], weight_grad += grad[i] * value[i];
        logit = row.quad_sum(logit);
        weight_grad = row.quad_sum(weight_grad);
        if (!c.visible) return;
        float slope;
        logit = capped(p.softcap, logit, slope);
        float factor = exp2f(exponent_of(logit + c.addend, log_sum_exp, rest)) * (weight_grad * c.kept - delta) * slope;
#pragma unroll
        for (int i = 0; i < PART; i++) sums[i] += factor * key[i];
    });
#pragma unroll
    for (int i = 0; i < PART; i++) sums[i] *= p.scale * p.scale_sign * LN_2;
    if (row.exists) row.store_part(dq, index, sums);
}

// A quad's column, with its sums over the rows that see it. FADED: also that of gradients of logits.
template <int D, bool FADED = false>
struct ColumnF32Sums {
    static constexpr int PART = D / 4;
    const BackwardF32& x;
    const AttentionParams& p;
    float key[PART], value[PART], dk[PART], dv[PART], fade = 0;

    SFA_DEVICE ColumnF32Sums(const BackwardF32& x, const AttentionParams& p) : x(x), p(p) {
#pragma unroll
        for (int i = 0; i < PART; i++) key[i] = 0, value[i] = 0, dk[i] = 0, dv[i] = 0;
    }

    SFA_DEVICE void load(const Floats& keys, int64_t key_at, const Floats& values, int64_t value_at) {
        RowF32<D>::load(key, keys, key_at, p.sizes.head_dim);
        RowF32<D>::load(value, values, value_at, p.sizes.head_dim);
    }

    SFA_DEVICE void row(const HeadIndex& at, int row, int token, float addend, bool visible) {
        int64_t index = at.batch_head * p.sizes.tokens + row;
        float query[PART], grad[PART], logit = 0, weight_grad = 0;
        RowF32<D>::load(query, x.columns.q, p.q.at(at.batch, at.head, row), p.sizes.head_dim);
        // As in the forward pass; otherwise products of large numbers would differ from those it saw.
#pragma unroll
        for (int i = 0; i < PART; i++) query[i] *= p.scale * p.scale_sign;
        RowF32<D>::load(grad, x.grad_output, index * p.sizes.head_dim, p.sizes.head_dim);
#pragma unroll
        for (int i = 0; i < PART; i++) logit += query[i] * key[i], weight_grad += grad[i] * value[i];
        float slope;
        logit = capped(p.softcap, RowF32<D>::quad_sum(logit), slope) + addend;
        weight_grad = RowF32<D>::quad_sum(weight_grad);
        if (!visible) return;
        if (x.columns.bias) logit += bias_at(p, x.columns.bias, at, row, token);
        float kept = p.dropout_cut != 0 ? dropout_factor(p, at, row, token) : 1.f;
        float weight = exp2f(exponent_of(logit, x.log_sum_exp[index], x.log_sum_exp[rest_of_sums(p) + index]));
        float delta = x.delta[index];
        // A row that is NaN throughout makes its columns' gradients NaN.
        if (delta != delta) weight = delta;
        float logit_grad = weight * (weight_grad * kept - delta), factor = logit_grad * slope * LN_2;
        if (FADED) fade += logit_grad;
        weight *= kept;
#pragma unroll
        for (int i = 0; i < PART; i++) dk[i] += factor * query[i], dv[i] += weight * grad[i];
    }

    SFA_DEVICE void store(const Global<float>& keys, const Global<float>& values, int64_t row) const {
        RowF32<D>::store(keys, row, dk, p.sizes.head_dim);
        RowF32<D>::store(values, row, dv, p.sizes.head_dim);
    }
};

// The first query head of a list, counted over all batch rows; the list has heads / lists of them.
SFA_DEVICE uint32_t first_head(const AttentionParams& p, int64_t list) {
    return uint32_t(list / p.sizes.lists) * p.sizes.heads +
           uint32_t(list % p.sizes.lists) * (p.sizes.heads / p.sizes.lists);
}

// A block has 32 columns, which walk through the rows in step. FADED: their sums of gradients of logits go to `fades`,
// (B * lists, N).
template <int D, bool FADED = false>
SFA_DEVICE void column_gradients(const BackwardF32& x, const Global<float>& dk, const Global<float>& dv,
                                 const AttentionParams& p, bool near, const Global<float>& fades = {}) {
    const ColumnsF32& c = x.columns;
    int tokens = int(p.sizes.tokens), blocks = (tokens + 31) / 32;
    int64_t list = blockIdx.x / blocks;
    int first = blockIdx.x % blocks * 32, column = first + int(threadIdx.x) / 4;
    bool raw = near || p.dense;
    int count = raw ? tokens : int(c.far_before[list * (tokens + 1) + tokens]);
    if (first >= count) return;
    auto rows_of = [&](int column) { return ColumnRows(p, c.far_before, c.far_index, c.far_ln, list, column, near); };
    ColumnRows mine = rows_of(column);
    int begin = rows_of(first).begin, end = rows_of(min(first + 31, count - 1)).end;
    uint32_t head = first_head(p, list), heads = p.sizes.heads / p.sizes.lists;
    HeadIndex at_first(p, head);
    ColumnF32Sums<D, FADED> sums(x, p);
    int safe = min(column, count - 1);
    int64_t far_at = (list * p.capacity + safe) * p.sizes.head_dim;
    if (raw)
        sums.load(c.k, p.k.at(at_first.batch, at_first.kv_head, safe), c.v,
                  p.v.at(at_first.batch, at_first.kv_head, safe));
    else sums.load(c.far_k, far_at, c.far_v, far_at);
    for (uint32_t h = head; h < head + heads; h++) {
        HeadIndex at(p, h);
        for (int row = begin; row < end; row++)
            sums.row(at, row, mine.token, mine.addend, row >= mine.begin && row < mine.end);
    }
    if (column < count) sums.store(dk, dv, list * tokens + column);
    if (FADED && column < count && threadIdx.x % 4 == 0) fades.set(list * tokens + column, sums.fade);
}

// A block has 32 folded tokens; each is the edge of at most one row per head.
template <int D>
SFA_DEVICE void edge_gradients(const BackwardF32& x, const Global<float>& dk, const Global<float>& dv,
                               const AttentionParams& p) {
    const ColumnsF32& c = x.columns;
    int64_t tokens = p.sizes.tokens, all = int64_t(p.sizes.batch) * p.sizes.lists * tokens;
    int64_t first = int64_t(blockIdx.x) * 32;
    if (first >= all) return;
    int64_t index = first + threadIdx.x / 4, safe = index < all ? index : all - 1, list = safe / tokens;
    int token = int(safe % tokens), row = p.causal ? token + int(p.window) : token;
    bool seen = row < int(tokens) && row >= int(p.first_row) && edge_token(p, c.far_before, list, row) == token;
    ColumnF32Sums<D> sums(x, p);
    uint32_t head = first_head(p, list), heads = p.sizes.heads / p.sizes.lists;
    HeadIndex at_first(p, head);
    sums.load(edge_row(p, c.folded_k, c.k, p.k, at_first, token), 0, edge_row(p, c.folded_v, c.v, p.v, at_first, token),
              0);
    float addend = c.folded_ln ? LOG2_E * c.folded_ln[safe] : 0.f;
    for (uint32_t h = head; h < head + heads; h++) sums.row(HeadIndex(p, h), seen ? row : 0, token, addend, seen);
    if (index < all) sums.store(dk, dv, index);
}
