// Closed chains in 8 bits, one query head or several that share a list: the kernels of decode_group.cuh.
#include "cache/decode_group.cuh"

#define DECODE_BYTES(name, CODE)                             \
    DECODE_GROUP_KERNEL(name, f16, half_t, 64, CODE)         \
    DECODE_GROUP_KERNEL(name, f16, half_t, 128, CODE)        \
    DECODE_GROUP_KERNEL(name, bf16, bfloat16_t, 64, CODE)    \
    DECODE_GROUP_KERNEL(name, bf16, bfloat16_t, 128, CODE)
DECODE_BYTES(decode_i8, CODE_I8)
DECODE_BYTES(decode_f8e4m3, CODE_F8E4M3)

#define BYTES_ENTRIES(name) \
    ENTRY(name##_64_f16) ENTRY(name##_128_f16) ENTRY(name##_64_bf16) ENTRY(name##_128_bf16)
MODULE(decode_bytes, BYTES_ENTRIES(decode_i8) BYTES_ENTRIES(decode_f8e4m3))
