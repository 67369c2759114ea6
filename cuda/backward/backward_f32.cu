// Attention backward in f32 arithmetic: the kernels of backward.cu with four lanes per row, or per column.
#include "lib/params.cuh"
#include "backward/backward_f32.cuh"

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
    hw::let_next_start();
    hw::wait_for_previous();
    int64_t row = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
    bool exists = row < int64_t(p.sizes.batch) * p.sizes.heads * p.sizes.tokens;
    float sum = 0;
    for (uint32_t d = threadIdx.x % 32; exists && d < p.sizes.head_dim; d += 32)
        sum += output[row * p.sizes.head_dim + d] * grad_output[row * p.sizes.head_dim + d];
    for (int mask = 16; mask > 0; mask /= 2) sum += hw::shuffle_xor(sum, mask);
    if (exists && threadIdx.x % 32 == 0) delta.set(row, sum);
}

// By padded head size. The launcher gives edges a block per four tokens, as for the half kernels; here a block takes 32
// tokens, so seven of eight blocks end at once.
#define BACKWARD(D)                                                                                         \
    KERNEL __launch_bounds__(128) backward_queries_##D##_f32(INPUTS, Global<float> dq, AttentionParams p) { \
        query_gradients<D>(TENSORS, dq, p);                                                                 \
    }                                                                                                       \
    KERNEL __launch_bounds__(128)                                                                           \
        backward_columns_##D##_f32_far(INPUTS, Global<float> dk, Global<float> dv, AttentionParams p) {     \
        column_gradients<D>(TENSORS, dk, dv, p, false);                                                     \
    }                                                                                                       \
    KERNEL __launch_bounds__(128)                                                                           \
        backward_columns_##D##_f32_near(INPUTS, Global<float> dk, Global<float> dv, AttentionParams p) {    \
        column_gradients<D>(TENSORS, dk, dv, p, true);                                                      \
    }                                                                                                       \
    KERNEL __launch_bounds__(128) backward_columns_##D##_f32_faded(                                         \
        INPUTS, Global<float> dk, Global<float> dv, AttentionParams p, Global<float> fades) {               \
        column_gradients<D, true>(TENSORS, dk, dv, p, false, fades);                                        \
    }                                                                                                       \
    KERNEL __launch_bounds__(128)                                                                           \
        backward_edges_##D##_f32(INPUTS, Global<float> dk, Global<float> dv, AttentionParams p) {           \
        edge_gradients<D>(TENSORS, dk, dv, p);                                                              \
    }

BACKWARD(64)
BACKWARD(128)
BACKWARD(256)

#define DIM_ENTRIES(D)                                                               \
    ENTRY(backward_queries_##D##_f32) ENTRY(backward_columns_##D##_f32_far)      \
    ENTRY(backward_columns_##D##_f32_near) ENTRY(backward_edges_##D##_f32)       \
    ENTRY(backward_columns_##D##_f32_faded)

MODULE(backward_f32, ENTRY(backward_delta_f32) DIM_ENTRIES(64) DIM_ENTRIES(128) DIM_ENTRIES(256))
