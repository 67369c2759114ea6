// Attention forward over raw tokens by token lists: see forward_tiles.cuh. A file of its own, so that nvcc can compile
// it in parallel with forward.cu.
#include "forward/forward_block.cuh"

// As FORWARD_DTYPE in forward.cu.
#define FORWARD_DTYPE(dtype, T)                                      \
    FORWARD(forward_listed_64_##dtype, T, 64, 2, 64, 3, false, true) \
    FORWARD(forward_listed_96_##dtype, T, 96, 2, 32, 2, false, true) \
    FORWARD(forward_listed_128_##dtype, T, 128, 2, 64, 2, false, true)

FORWARD_DTYPE(f16, hw::F16)
FORWARD_DTYPE(bf16, hw::BF16)

#define DTYPE_ENTRIES(dtype) \
    ENTRY(forward_listed_64_##dtype) ENTRY(forward_listed_96_##dtype) ENTRY(forward_listed_128_##dtype)

MODULE(forward_listed, DTYPE_ENTRIES(f16) DTYPE_ENTRIES(bf16))
