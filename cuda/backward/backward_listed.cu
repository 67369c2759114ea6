// Attention backward over raw tokens by token lists: see backward_fused.cuh. A file of its own, like forward_listed.cu.
#include "backward/backward_fused.cuh"

#define LISTED(name, T, D, MT, WARPS, SPLIT, NB, BLOCKS)                                                              \
    SHARED_BYTES(name, FusedGradients<T, D, MT, WARPS, SPLIT, NB, true>::BYTES)                                       \
    KERNEL __launch_bounds__(32 * WARPS, BLOCKS) name(BACKWARD_INPUTS, TARGETS) {                                     \
        fused<FusedGradients<T, D, MT, WARPS, SPLIT, NB, true>>(BACKWARD_TENSORS, dq, {dk, done_k}, {dv, done_v}, p,  \
                                                                false);                                               \
    }

// As `BackwardVariant::pick` in src/cuda/variants/backward.rs.
#define LISTED_DTYPE(dtype, T)                                \
    LISTED(backward_listed_64_##dtype, T, 64, 2, 4, 1, 32, 2) \
    LISTED(backward_listed_128_##dtype, T, 128, 2, 8, 2, 64, 1)

LISTED_DTYPE(f16, hw::F16)
LISTED_DTYPE(bf16, hw::BF16)

#define DTYPE_ENTRIES(dtype) ENTRY(backward_listed_64_##dtype) ENTRY(backward_listed_128_##dtype)

MODULE(backward_listed, DTYPE_ENTRIES(f16) DTYPE_ENTRIES(bf16))
