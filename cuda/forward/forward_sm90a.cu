// Attention forward for devices of compute capability 9.0: see forward_wgmma.cuh. Other devices have `forward_64`,
// `forward_128` and the kernels of forward_listed.cu.
#include "forward/forward_wgmma.cuh"

// As `ForwardVariant::by_warpgroups` in src/cuda/variants/forward.rs: warpgroups, columns, stages, producer threads,
// registers of an attending thread, resident blocks a multiprocessor, LISTED, SLIDING. The short ones are for few
// tokens: more and smaller blocks.
#define FORWARD_DTYPE(dtype, T)                                                                     \
    FORWARD_WGMMA(forward_wgmma_64_##dtype, T, 64, 3, 128, 2, 128, 160, 1, false, false)            \
    FORWARD_WGMMA(forward_wgmma_128_##dtype, T, 128, 2, 128, 2, 128, 232, 1, false, false)          \
    FORWARD_WGMMA(forward_wgmma_sliding_64_##dtype, T, 64, 3, 128, 2, 128, 160, 1, false, true)     \
    FORWARD_WGMMA(forward_wgmma_sliding_128_##dtype, T, 128, 2, 128, 2, 128, 232, 1, false, true)   \
    FORWARD_WGMMA(forward_wgmma_listed_64_##dtype, T, 64, 3, 128, 2, 128, 160, 1, true, false)      \
    FORWARD_WGMMA(forward_wgmma_listed_128_##dtype, T, 128, 2, 128, 2, 128, 232, 1, true, false)    \
    FORWARD_WGMMA(forward_wgmma_short_64_##dtype, T, 64, 1, 64, 2, 32, 0, 3, false, false)          \
    FORWARD_WGMMA(forward_wgmma_short_listed_64_##dtype, T, 64, 1, 64, 2, 128, 128, 3, true, false) \
    FORWARD_WGMMA(forward_wgmma_short_listed_128_##dtype, T, 128, 1, 64, 2, 64, 0, 2, true, false)

FORWARD_DTYPE(f16, hw::F16)
FORWARD_DTYPE(bf16, hw::BF16)

#define DTYPE_ENTRIES(dtype)                                                           \
    ENTRY(forward_wgmma_64_##dtype) ENTRY(forward_wgmma_128_##dtype)                   \
    ENTRY(forward_wgmma_sliding_64_##dtype) ENTRY(forward_wgmma_sliding_128_##dtype)   \
    ENTRY(forward_wgmma_listed_64_##dtype) ENTRY(forward_wgmma_listed_128_##dtype)     \
    ENTRY(forward_wgmma_short_64_##dtype) ENTRY(forward_wgmma_short_listed_64_##dtype) \
    ENTRY(forward_wgmma_short_listed_128_##dtype)

MODULE(forward_sm90a, DTYPE_ENTRIES(f16) DTYPE_ENTRIES(bf16))
