// Keys and values of one size: the kernels of decode_step.cuh.
#include "cache/decode_step.cuh"

#define EACH_DECODE(dtype, T) DECODE_DTYPE(decode, false, dtype, T)
FOR_EACH_DTYPE(EACH_DECODE)

#define DECODE_ENTRIES(dtype, T) DTYPE_ENTRIES(decode, dtype)
MODULE(decode, FOR_EACH_DTYPE(DECODE_ENTRIES))
