// One row of f32 attention, shared by four lanes. Columns are visited one by one: far, edge, near.
#pragma once

#include "lib/attention.cuh"

struct ColumnsF32 {
    Floats q, k, v;
    Floats far_k, far_v;
    Floats far_ln;
    Words far_index, far_before;
    Floats folded_k, folded_v;
    Floats folded_ln, bias;
};

// A column as one row sees it. If it is not visible, the addresses are still those of some column.
struct ColumnF32 {
    bool visible;
    Floats keys, values;
    int64_t key_at, value_at;
    float addend;  // ln n and the bias, in base 2
    float kept;    // dropout's factor
};

template <int D>
struct RowF32 {
    static constexpr int PART = D / 4;
    const ColumnsF32& x;
    const AttentionParams& p;
    HeadIndex at;
    int token, last;
    bool exists;

    // `rows` per block; blockIdx.x counts blocks of rows within heads, the last rows first. `last` is the block's last
    // row: all lanes of a warp walk as far as that row's columns reach.
    SFA_DEVICE RowF32(const ColumnsF32& x, const AttentionParams& p, int rows)
        : x(x), p(p), at(p, blockIdx.x / blocks_of_rows(p, rows)) {
        int all = (p.sizes.tokens + rows - 1) / rows, block = all - 1 - blockIdx.x % blocks_of_rows(p, rows);
        token = block * rows + threadIdx.x / 4;
        last = min(int(p.sizes.tokens), (block + 1) * rows) - 1;
        exists = token <= last;
        token = min(token, last);
    }

    SFA_DEVICE static float quad_sum(float x) {
        x += hw::shuffle_xor(x, 1);
        return x + hw::shuffle_xor(x, 2);
    }

    // Of the groups of four elements of D, this lane has every fourth.
    SFA_DEVICE static void load(float (&part)[PART], const Floats& source, int64_t first, uint32_t dim) {
#pragma unroll
        for (int i = 0; i < PART / 4; i++) {
            uint32_t column = (i * 4 + hw::thread() % 4) * 4;
            float4 x = column < dim ? load_vector<float4>(source, first + column) : float4{0, 0, 0, 0};
            part[4 * i] = x.x, part[4 * i + 1] = x.y, part[4 * i + 2] = x.z, part[4 * i + 3] = x.w;
        }
    }

    SFA_DEVICE static void store(const Global<float>& target, int64_t row, const float (&part)[PART], uint32_t dim) {
#pragma unroll
        for (int i = 0; i < PART / 4; i++) {
            uint32_t column = (i * 4 + hw::thread() % 4) * 4;
            if (column < dim)
                store_vector(target, row * dim + column,
                             float4{part[4 * i], part[4 * i + 1], part[4 * i + 2], part[4 * i + 3]});
        }
    }

    SFA_DEVICE void load_part(float (&part)[PART], const Floats& source, int64_t first) const {
        load(part, source, first, p.sizes.head_dim);
    }

    SFA_DEVICE void store_part(const Global<float>& target, int64_t row, const float (&part)[PART]) const {
        store(target, row, part, p.sizes.head_dim);
    }

    // This row's query, scaled so that its products are logits in base 2.
    SFA_DEVICE void load_query(float (&part)[PART]) const {
        load_part(part, x.q, p.q.at(at.batch, at.head, token));
#pragma unroll
        for (int i = 0; i < PART; i++) part[i] *= p.scale * p.scale_sign;
    }

    SFA_DEVICE ColumnF32 far(int column, bool visible) const {
        ColumnF32 c{visible, x.far_k, x.far_v, 0, 0, 0, 1};
        int at_token = column;
        if (p.dense) {
            c.keys = x.k, c.values = x.v;
            c.key_at = p.k.at(at.batch, at.kv_head, column), c.value_at = p.v.at(at.batch, at.kv_head, column);
        } else {
            int64_t index = at.list * p.capacity + column;
            c.key_at = c.value_at = index * p.sizes.head_dim;
            if (x.far_ln) c.addend = LOG2_E * x.far_ln[index];
            at_token = int(x.far_index[index]);
        }
        return adjust(c, at_token);
    }

    SFA_DEVICE ColumnF32 edge() const {
        int column = edge_token(p, x.far_before, at.list, token);
        bool visible = column >= 0;
        column = max(column, 0);
        ColumnF32 c{visible, edge_row(p, x.folded_k, x.k, p.k, at, column),
                    edge_row(p, x.folded_v, x.v, p.v, at, column), 0, 0, 0, 1};
        if (x.folded_ln) c.addend = LOG2_E * x.folded_ln[at.list * p.sizes.tokens + column];
        return adjust(c, column);
    }

    SFA_DEVICE ColumnF32 near(int column) const {
        bool visible = column > token - int(p.window) && column <= token;
        ColumnF32 c{visible, x.k, x.v, 0, 0, 0, 1};
        c.key_at = p.k.at(at.batch, at.kv_head, column), c.value_at = p.v.at(at.batch, at.kv_head, column);
        return adjust(c, column);
    }

    SFA_DEVICE ColumnF32 adjust(ColumnF32 c, int column) const {
        if (x.bias) c.addend += bias_at(p, x.bias, at, token, column);
        if (p.dropout_cut != 0) c.kept = dropout_factor(p, at, token, column);
        return c;
    }

    // Visits a superset of this row's columns, in step with the block's other rows, so that `visit` may shuffle.
    template <class Visit>
    SFA_DEVICE void for_each_column(Visit visit) const {
        int top = last / 32 * 32;
        int mine = far_count(p, x.far_before, at.list, token), all = far_count(p, x.far_before, at.list, last);
        int begin = far_first(p, x.far_before, at.list, token), from = far_first(p, x.far_before, at.list, top);
        for (int column = from; column < all; column++) visit(far(column, column >= begin && column < mine));
        if (p.dense) return;
        visit(edge());
        int first = max(0, top - int(p.window) + 1);
        for (int column = first; p.window > 0 && column <= last; column++) visit(near(column));
    }
};
