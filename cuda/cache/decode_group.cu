// Query heads that share a list, on tensor cores: the kernels of decode_group.cuh.
#include "cache/decode_group.cuh"

DECODE_GROUP(f16, half_t, 64)
DECODE_GROUP(f16, half_t, 128)
DECODE_GROUP(bf16, bfloat16_t, 64)
DECODE_GROUP(bf16, bfloat16_t, 128)

MODULE(decode_group, ENTRY(decode_group_64_f16) ENTRY(decode_group_128_f16) ENTRY(decode_group_64_bf16)
                         ENTRY(decode_group_128_bf16))
