// Attention backward with one owner per sum: see backward_block.cuh. Kernels in their order: backward_delta,
// backward_queries, then for keys and values backward_edges (folded tokens at edges) and backward_columns (far, and
// near). The fold's kernels (fold.cu) add these gradients up and map them back to raw tokens.
#include "backward/backward_block.cuh"

// delta = sum of output * grad_output, per row, (B, H, N). `rest`: the rounding remainder of the output, if it was
// kept. A warp takes several rows if they fit: `rows_of_warp` in src/cuda/fold.rs.
template <class T>
__device__ __forceinline__ void row_products(Halves output, Halves rest, Halves grad_output, Global<float> delta,
                                             const AttentionParams& p) {
    hw::let_next_start();
    hw::wait_for_previous();
    uint32_t lanes = p.sizes.head_dim <= 64 ? 8 : p.sizes.head_dim <= 128 ? 16 : 32, lane = threadIdx.x % lanes;
    int64_t row = int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
    bool exists = row < int64_t(p.sizes.batch) * p.sizes.heads * p.sizes.tokens;
    float sum = 0;
    if (exists && lane * 8 < p.sizes.head_dim) {
        int64_t at = row * p.sizes.head_dim + lane * 8;
        uint4 grad = load_vector<uint4>(grad_output, at);
        if (rest) sum = hw::dot<T>(load_vector<uint4>(rest, at), grad, sum);
        sum = hw::dot<T>(load_vector<uint4>(output, at), grad, sum);
    }
    for (uint32_t mask = lanes / 2; mask > 0; mask /= 2) sum += hw::shuffle_xor(sum, mask);
    if (exists && lane == 0) delta.set(row, sum);
}

template <class T, int D>
__device__ __forceinline__ void queries(const BackwardTensors& x, Global<float> dq, const AttentionParams& p) {
    uint32_t blocks = blocks_of_rows(p, 64), end = (p.sizes.tokens + 63) / 64;
    uint32_t head = blockIdx.x / blocks, block = end - 1 - blockIdx.x % blocks;
    QueryGradients<T, D>(p, x, head, block * 64).run(dq);
}

// `near`: near columns; else far ones, which in the dense case are all.
template <class T, int D, bool KEYS, bool VALUES>
__device__ __forceinline__ void columns(const BackwardTensors& x, Global<float> dk, Global<float> dv,
                                        const AttentionParams& p, bool near) {
    uint32_t blocks = (p.sizes.tokens + 63) / 64;
    ColumnGradients<T, D, KEYS, VALUES>(p, x, blockIdx.x / blocks, blockIdx.x % blocks * 64, near).run(dk, dv);
}

// Far columns with a column bias.
template <class Gradients>
__device__ __forceinline__ void faded_columns(const BackwardTensors& x, Global<float> dk, Global<float> dv,
                                              Global<float> fades, const AttentionParams& p) {
    uint32_t blocks = (p.sizes.tokens + 63) / 64;
    Gradients columns(p, x, blockIdx.x / blocks, blockIdx.x % blocks * 64, false);
    columns.run(dk, dv);
    columns.store_fades(fades);
}

// The product of a query and a key, eight numbers a lane, added up in the order in which forward_rows.cuh adds edges.
// In another order large products would differ by more than 1.
template <class T>
__device__ __forceinline__ float edge_product(uint4 query, uint4 key, uint32_t dim) {
    uint32_t lane = threadIdx.x % 32, last = (dim / 8 - 1) / 4 * 4;
    float sum = 0;
    for (uint32_t first = 0; first <= last; first += 4) {
        float before = hw::shuffle(sum, (lane + 28) % 32);
        if (lane / 4 * 4 == first) sum = hw::dot<T>(query, key, first > 0 ? before : 0.f);
    }
    float a = hw::shuffle(sum, last), b = hw::shuffle(sum, last + 1);
    return (a + b) + (hw::shuffle(sum, last + 2) + hw::shuffle(sum, last + 3));
}

// dK and dV of edge columns, one warp per folded token: only one row of each head of the list sees it as its edge. The
// queries' share is added to `dq` if it is given.
template <class T>
__device__ __forceinline__ void edges(const BackwardTensors& x, Global<float> dq, Global<float> dk, Global<float> dv,
                                      const AttentionParams& p) {
    uint32_t lane = threadIdx.x % 32, dim = p.sizes.head_dim, tokens = p.sizes.tokens;
    int64_t index = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
    if (index >= int64_t(p.sizes.batch) * p.sizes.lists * tokens) return;
    int64_t list = index / tokens;
    int token = int(index % tokens), row = p.causal ? token + int(p.window) : token;
    bool seen = row < int(tokens) && row >= int(p.first_row) && edge_token(p, x.far_before, list, row) == token;
    bool mine = lane * 8 < dim;
    float key_sum[8] = {}, value_sum[8] = {};
    uint32_t heads = p.sizes.heads / p.sizes.lists;
    uint32_t head = uint32_t(list / p.sizes.lists) * p.sizes.heads + uint32_t(list % p.sizes.lists) * heads;
    for (uint32_t h = head; seen && h < head + heads; h++) {
        HeadIndex at(p, h);
        int64_t row_at = at.batch_head * tokens + row;
        uint4 q{0, 0, 0, 0}, grad = q, key = q, value = q;
        if (mine) {
            q = load_vector<uint4>(x.q, p.q.at(at.batch, at.head, row) + lane * 8);
            grad = load_vector<uint4>(x.grad_output, row_at * dim + lane * 8);
            key = load_vector<uint4>(edge_row(p, x.folded_k, x.k, p.k, at, token), lane * 8);
            value = load_vector<uint4>(edge_row(p, x.folded_v, x.v, p.v, at, token), lane * 8);
        }
        float logit = hw::dot<T>(q, key, 0.f), weight_grad = hw::dot<T>(grad, value, 0.f);
        for (int mask = 16; mask > 0; mask /= 2) {
            logit += hw::shuffle_xor(logit, mask);
            weight_grad += hw::shuffle_xor(weight_grad, mask);
        }
        float sum = x.log_sum_exp[row_at], delta = x.delta[row_at];
        if (!(fabsf(sum) < LARGE_LOGIT)) logit = edge_product<T>(q, key, dim);
        float slope;
        logit = scaled(p, logit, slope);
        if (x.folded_ln) logit += LOG2_E * x.folded_ln[index];
        if (x.bias) logit += bias_at(p, x.bias, at, row, token);
        float kept = p.dropout_cut != 0 ? dropout_factor(p, at, row, token) : 1.f;
        float weight = hw::exp2(exponent_of(logit, sum, x.log_sum_exp[rest_of_sums(p) + row_at]));
        // A row that is NaN throughout makes its columns' gradients NaN.
        if (delta != delta) weight = delta;
        float factor = weight * (weight_grad * kept - delta) * slope * p.scale * p.scale_sign * LN_2;
        const uint32_t keys[4] = {key.x, key.y, key.z, key.w};
#pragma unroll
        for (int i = 0; dq && mine && i < 4; i++)
            hw::add_pair(dq, row_at * dim + lane * 8 + 2 * i, factor * hw::low<T>(keys[i]),
                         factor * hw::high<T>(keys[i]));
        const uint32_t queries[4] = {q.x, q.y, q.z, q.w}, grads[4] = {grad.x, grad.y, grad.z, grad.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            key_sum[2 * i] += factor * hw::low<T>(queries[i]), key_sum[2 * i + 1] += factor * hw::high<T>(queries[i]);
            value_sum[2 * i] += weight * kept * hw::low<T>(grads[i]);
            value_sum[2 * i + 1] += weight * kept * hw::high<T>(grads[i]);
        }
    }
    if (!mine) return;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        store_vector(dk, index * dim + lane * 8 + i,
                     float4{key_sum[i], key_sum[i + 1], key_sum[i + 2], key_sum[i + 3]});
        store_vector(dv, index * dim + lane * 8 + i,
                     float4{value_sum[i], value_sum[i + 1], value_sum[i + 2], value_sum[i + 3]});
    }
}

#define BACKWARD_DIM(dtype, T, D)                                                              \
    SHARED_BYTES(backward_queries_##D##_##dtype, QueryGradients<T, D>::BYTES)                  \
    KERNEL __launch_bounds__(128)                                                              \
        backward_queries_##D##_##dtype(BACKWARD_INPUTS, Global<float> dq, AttentionParams p) { \
        queries<T, D>(BACKWARD_TENSORS, dq, p);                                                \
    }
#define BACKWARD_COLUMNS(name, T, D, KEYS, VALUES)                                            \
    SHARED_BYTES(name##_far, ColumnGradients<T, D, KEYS, VALUES>::BYTES)                      \
    SHARED_BYTES(name##_near, ColumnGradients<T, D, KEYS, VALUES>::BYTES)                     \
    KERNEL __launch_bounds__(128)                                                             \
        name##_far(BACKWARD_INPUTS, Global<float> dk, Global<float> dv, AttentionParams p) {  \
        columns<T, D, KEYS, VALUES>(BACKWARD_TENSORS, dk, dv, p, false);                      \
    }                                                                                         \
    KERNEL __launch_bounds__(128)                                                             \
        name##_near(BACKWARD_INPUTS, Global<float> dk, Global<float> dv, AttentionParams p) { \
        columns<T, D, KEYS, VALUES>(BACKWARD_TENSORS, dk, dv, p, true);                       \
    }
#define BACKWARD_FADED(name, T, D, VALUES)                                                                           \
    SHARED_BYTES(name##_faded, ColumnGradients<T, D, true, VALUES, true>::BYTES)                                     \
    KERNEL __launch_bounds__(128)                                                                                    \
        name##_faded(BACKWARD_INPUTS, Global<float> dk, Global<float> dv, AttentionParams p, Global<float> fades) {  \
        faded_columns<ColumnGradients<T, D, true, VALUES, true>>(BACKWARD_TENSORS, dk, dv, fades, p);                \
    }
#define BACKWARD_DTYPE(dtype, T)                                                                                    \
    KERNEL backward_delta_##dtype(Halves output, Halves rest, Halves grad_output, Global<float> delta,              \
                                  AttentionParams p) {                                                              \
        row_products<T>(output, rest, grad_output, delta, p);                                                       \
    }                                                                                                               \
    KERNEL backward_edges_##dtype(BACKWARD_INPUTS, Global<float> dq, Global<float> dk, Global<float> dv,             \
                                  AttentionParams p) {                                                              \
        edges<T>(BACKWARD_TENSORS, dq, dk, dv, p);                                                                  \
    }                                                                                                               \
    BACKWARD_DIM(dtype, T, 64)                                                                                      \
    BACKWARD_DIM(dtype, T, 128)                                                                                     \
    BACKWARD_DIM(dtype, T, 256)                                                                                     \
    BACKWARD_COLUMNS(backward_columns_64_##dtype, T, 64, true, true)                                                \
    BACKWARD_COLUMNS(backward_columns_128_##dtype, T, 128, true, true)                                              \
    BACKWARD_COLUMNS(backward_keys_256_##dtype, T, 256, true, false)                                                \
    BACKWARD_COLUMNS(backward_values_256_##dtype, T, 256, false, true)                                              \
    BACKWARD_FADED(backward_columns_64_##dtype, T, 64, true)                                                        \
    BACKWARD_FADED(backward_columns_128_##dtype, T, 128, true)                                                      \
    BACKWARD_FADED(backward_keys_256_##dtype, T, 256, false)

BACKWARD_DTYPE(f16, hw::F16)
BACKWARD_DTYPE(bf16, hw::BF16)

#define COLUMN_ENTRIES(name) ENTRY(name##_far) ENTRY(name##_near)
#define DTYPE_ENTRIES(dtype)                                                                                         \
    ENTRY(backward_delta_##dtype)                                                                                    \
    ENTRY(backward_edges_##dtype)                                                                                    \
    ENTRY(backward_queries_64_##dtype) ENTRY(backward_queries_128_##dtype) ENTRY(backward_queries_256_##dtype)       \
    COLUMN_ENTRIES(backward_columns_64_##dtype) COLUMN_ENTRIES(backward_columns_128_##dtype)                         \
    COLUMN_ENTRIES(backward_keys_256_##dtype) COLUMN_ENTRIES(backward_values_256_##dtype)                            \
    ENTRY(backward_columns_64_##dtype##_faded) ENTRY(backward_columns_128_##dtype##_faded)                           \
    ENTRY(backward_keys_256_##dtype##_faded)

MODULE(backward, DTYPE_ENTRIES(f16) DTYPE_ENTRIES(bf16))
