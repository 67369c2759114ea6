// Attention backward in f32 arithmetic: the kernels of backward.cu with four lanes per row, or per column.
#include "params.cuh"
#include "backward_f32.cuh"

#define INPUTS                                                                                                        \
    Floats q, Floats k, Floats v, Floats far_k, Floats far_v, Floats far_ln, Words far_index, Words far_before,       \
        Floats folded_k, Floats folded_v, Floats folded_ln, Floats bias, Floats grad_output, Floats log_sum_exp,      \
        Floats delta
#define TENSORS                                                                                                       \
    BackwardF32 {                                                                                                     \
        {q, k, v, far_k, far_v, far_ln, far_index, far_before, folded_k, folded_v, folded_ln, bias}, grad_output,     \
            log_sum_exp, delta                                                                                        \
    }

KERNEL backward_delta_f32(Floats output, Floats grad_output, Global<float> delta, AttentionParams p) {
    int64_t row = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
    bool exists = row < int64_t(p.sizes.batch) * p.sizes.heads * p.sizes.tokens;
    float sum = 0;
    for (uint32_t d = threadIdx.x % 32; exists && d < p.sizes.head_dim; d += 32)
        sum += output[row * p.sizes.head_dim + d] * grad_output[row * p.sizes.head_dim + d];
    for (int mask = 16; mask > 0; mask /= 2) sum += hw::shuffle_xor(sum, mask);
    if (exists && threadIdx.x % 32 == 0) delta.set(row, sum);
}

KERNEL __launch_bounds__(128) backward_queries_f32(INPUTS, Global<float> dq, AttentionParams p) {
    if (p.sizes.head_dim <= 64) query_gradients<64>(TENSORS, dq, p);
    else if (p.sizes.head_dim <= 128) query_gradients<128>(TENSORS, dq, p);
    else query_gradients<256>(TENSORS, dq, p);
}

#define COLUMNS(name, KIND)                                                                                     \
    KERNEL __launch_bounds__(128) name(INPUTS, Global<float> dk, Global<float> dv, AttentionParams p) {         \
        if (p.sizes.head_dim <= 64) column_gradients<64>(TENSORS, dk, dv, p, KIND);                             \
        else if (p.sizes.head_dim <= 128) column_gradients<128>(TENSORS, dk, dv, p, KIND);                      \
        else column_gradients<256>(TENSORS, dk, dv, p, KIND);                                                   \
    }
COLUMNS(backward_columns_f32_far, 0)
COLUMNS(backward_columns_f32_near, 1)

// As its sisters it gets a block per four tokens, of which every eighth works: 32 tokens a block.
KERNEL __launch_bounds__(128) backward_edges_f32(INPUTS, Global<float> dk, Global<float> dv, AttentionParams p) {
    if (p.sizes.head_dim <= 64) edge_gradients<64>(TENSORS, dk, dv, p);
    else if (p.sizes.head_dim <= 128) edge_gradients<128>(TENSORS, dk, dv, p);
    else edge_gradients<256>(TENSORS, dk, dv, p);
}

MODULE(backward_f32, ENTRY(backward_delta_f32) ENTRY(backward_queries_f32) ENTRY(backward_columns_f32_far)
                         ENTRY(backward_columns_f32_near) ENTRY(backward_edges_f32))
