// Keys and values of one size: the kernels of decode_step.cuh.
#include "cache/decode_step.cuh"

#define EACH_DECODE(dtype, T) DECODE_DTYPE(decode, false, dtype, T)
FOR_EACH_DTYPE(EACH_DECODE)

MODULE(decode, DTYPE_ENTRIES(decode, f32) DTYPE_ENTRIES(decode, f16) DTYPE_ENTRIES(decode, bf16))
