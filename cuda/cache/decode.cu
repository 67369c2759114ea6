// Keys and values of one size: the kernels of decode_step.cuh. In halves, query heads that share a list have kernels of
// their own up to 128 numbers (decode_group.cu).
#include "cache/decode_step.cuh"

#define DECODE_HALVES(dtype, T)                     \
    DECODE_KERNEL(decode, false, dtype, T, 64, 1)   \
    DECODE_KERNEL(decode, false, dtype, T, 128, 1)  \
    DECODE_DIM(decode, false, dtype, T, 256)
DECODE_DTYPE(decode, false, f32, float)
DECODE_HALVES(f16, half_t)
DECODE_HALVES(bf16, bfloat16_t)

#define HALVES_ENTRIES(dtype) \
    ENTRY(decode_64_1_##dtype) ENTRY(decode_128_1_##dtype) DIM_ENTRIES(decode, dtype, 256)
MODULE(decode, DTYPE_ENTRIES(decode, f32) HALVES_ENTRIES(f16) HALVES_ENTRIES(bf16))
