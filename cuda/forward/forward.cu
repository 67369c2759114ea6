// Attention forward in f16 and bf16: see forward_block.cuh. One axis of the grid has the blocks of rows of all heads,
// those that see the most columns first.
#include "forward/forward_block.cuh"

// By dtype and padded head size, plain or with a bias, dropout, a softcap, sinks or a sliding window. Arguments: T, D,
// MT, NB, resident blocks a multiprocessor, EXTRAS (and SLIDING), LISTED.
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
