// Attention backward in one pass over columns for devices of compute capability 9.0, without a bias or dropout: see
// backward_wgmma.cuh. Other devices have the kernels of backward_fused.cu and backward_listed.cu.
#include "backward/backward_wgmma.cuh"

#define WARPGROUPS(name, T, D, LISTED, near)                                                                \
    SHARED_BYTES(name, WarpgroupGradients<T, D, LISTED>::BYTES)                                             \
    KERNEL __launch_bounds__(384, 1) name(BACKWARD_INPUTS, TARGETS) {                                       \
        fused<WarpgroupGradients<T, D, LISTED>>(BACKWARD_TENSORS, dq, {dk, done_k}, {dv, done_v}, p, near); \
    }

// Far columns with a column bias.
#define FADED(name, T, D)                                                                                         \
    SHARED_BYTES(name##_faded, WarpgroupGradients<T, D, false, true>::BYTES)                                      \
    KERNEL __launch_bounds__(384, 1) name##_faded(BACKWARD_INPUTS, TARGETS, Global<float> fades) {                \
        faded<WarpgroupGradients<T, D, false, true>>(BACKWARD_TENSORS, dq, {dk, done_k}, {dv, done_v}, p, fades); \
    }

// As `BackwardVariant::pick` in src/cuda/variants/backward.rs.
#define WARPGROUPS_DTYPE(dtype, T)                                               \
    FADED(backward_wgmma_64_##dtype, T, 64)                                      \
    FADED(backward_wgmma_128_##dtype, T, 128)                                    \
    WARPGROUPS(backward_wgmma_64_##dtype##_far, T, 64, false, false)             \
    WARPGROUPS(backward_wgmma_64_##dtype##_near, T, 64, false, true)             \
    WARPGROUPS(backward_wgmma_listed_64_##dtype, T, 64, true, false)             \
    WARPGROUPS(backward_wgmma_128_##dtype##_far, T, 128, false, false)           \
    WARPGROUPS(backward_wgmma_128_##dtype##_near, T, 128, false, true)           \
    WARPGROUPS(backward_wgmma_listed_128_##dtype, T, 128, true, false)

WARPGROUPS_DTYPE(f16, hw::F16)
WARPGROUPS_DTYPE(bf16, hw::BF16)

#define DTYPE_ENTRIES(dtype)                                                             \
    ENTRY(backward_wgmma_64_##dtype##_far) ENTRY(backward_wgmma_64_##dtype##_near)   \
    ENTRY(backward_wgmma_listed_64_##dtype)                                          \
    ENTRY(backward_wgmma_128_##dtype##_far) ENTRY(backward_wgmma_128_##dtype##_near) \
    ENTRY(backward_wgmma_listed_128_##dtype)                                             \
    ENTRY(backward_wgmma_64_##dtype##_faded) ENTRY(backward_wgmma_128_##dtype##_faded)

MODULE(backward_sm90a, DTYPE_ENTRIES(f16) DTYPE_ENTRIES(bf16))
