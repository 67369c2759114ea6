// Attention forward: see forward_block.cuh. f16 and bf16 on tensor cores; heads' row blocks in one axis of the grid,
// the rows that see most first.
#include "forward_block.cuh"

// (dtype, padded head size) x (plain, with bias or dropout); BLOCKS of one multiprocessor at a time.
#define FORWARD_DTYPE(dtype, T)                                        \
    FORWARD(forward_64_##dtype, T, 64, 2, 64, 3, false, false)         \
    FORWARD(forward_96_##dtype, T, 96, 2, 32, 2, false, false)         \
    FORWARD(forward_128_##dtype, T, 128, 2, 64, 2, false, false)       \
    FORWARD(forward_256_##dtype, T, 256, 1, 32, 2, false, false)       \
    FORWARD(forward_64_extras_##dtype, T, 64, 2, 32, 2, true, false)   \
    FORWARD(forward_128_extras_##dtype, T, 128, 1, 32, 2, true, false) \
    FORWARD(forward_256_extras_##dtype, T, 256, 1, 32, 2, true, false)

FORWARD_DTYPE(f16, hw::F16)
FORWARD_DTYPE(bf16, hw::BF16)

#define DTYPE_ENTRIES(dtype)                                                                                     \
    ENTRY(forward_64_##dtype) ENTRY(forward_96_##dtype) ENTRY(forward_128_##dtype) ENTRY(forward_256_##dtype)    \
    ENTRY(forward_64_extras_##dtype) ENTRY(forward_128_extras_##dtype) ENTRY(forward_256_extras_##dtype)

MODULE(forward, DTYPE_ENTRIES(f16) DTYPE_ENTRIES(bf16))
