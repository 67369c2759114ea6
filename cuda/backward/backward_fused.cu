// Attention backward in one pass over columns, whose sums may differ in their last bits: see backward_fused.cuh. Other
// kernels of the pass are in backward.cu.
#include "backward/backward_fused.cuh"

#define FUSED(name, T, D, MT, WARPS, SPLIT, NB, BLOCKS)                                                               \
    SHARED_BYTES(name##_far, FusedGradients<T, D, MT, WARPS, SPLIT, NB, false>::BYTES)                                \
    SHARED_BYTES(name##_near, FusedGradients<T, D, MT, WARPS, SPLIT, NB, false>::BYTES)                               \
    KERNEL __launch_bounds__(32 * WARPS, BLOCKS) name##_far(BACKWARD_INPUTS, TARGETS) {                               \
        fused<FusedGradients<T, D, MT, WARPS, SPLIT, NB, false>>(BACKWARD_TENSORS, dq, {dk, done_k}, {dv, done_v}, p, \
                                                                 false);                                              \
    }                                                                                                                 \
    KERNEL __launch_bounds__(32 * WARPS, BLOCKS) name##_near(BACKWARD_INPUTS, TARGETS) {                              \
        fused<FusedGradients<T, D, MT, WARPS, SPLIT, NB, false>>(BACKWARD_TENSORS, dq, {dk, done_k}, {dv, done_v}, p, \
                                                                 true);                                               \
    }

// Far columns with a column bias.
#define FADED(name, T, D, MT, WARPS, SPLIT, NB, BLOCKS)                                                               \
    SHARED_BYTES(name##_faded, FusedGradients<T, D, MT, WARPS, SPLIT, NB, false, true>::BYTES)                        \
    KERNEL __launch_bounds__(32 * WARPS, BLOCKS) name##_faded(BACKWARD_INPUTS, TARGETS, Global<float> fades) {        \
        faded<FusedGradients<T, D, MT, WARPS, SPLIT, NB, false, true>>(BACKWARD_TENSORS, dq, {dk, done_k},            \
                                                                       {dv, done_v}, p, fades);                       \
    }

// As `BackwardVariant::pick` in src/cuda/variants/backward.rs.
#define FUSED_DTYPE(dtype, T)                                 \
    FUSED(backward_fused_64_##dtype, T, 64, 2, 4, 1, 32, 2)   \
    FUSED(backward_fused_128_##dtype, T, 128, 2, 8, 2, 64, 1) \
    FADED(backward_fused_64_##dtype, T, 64, 2, 4, 1, 32, 2)   \
    FADED(backward_fused_128_##dtype, T, 128, 2, 8, 2, 64, 1)

FUSED_DTYPE(f16, hw::F16)
FUSED_DTYPE(bf16, hw::BF16)

#define DTYPE_ENTRIES(dtype)                                                         \
    ENTRY(backward_fused_64_##dtype##_far) ENTRY(backward_fused_64_##dtype##_near)   \
    ENTRY(backward_fused_128_##dtype##_far) ENTRY(backward_fused_128_##dtype##_near) \
    ENTRY(backward_fused_64_##dtype##_faded) ENTRY(backward_fused_128_##dtype##_faded)

MODULE(backward_fused, DTYPE_ENTRIES(f16) DTYPE_ENTRIES(bf16))
