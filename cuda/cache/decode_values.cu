// Values of another size than keys: the kernels of decode_step.cuh.
#include "cache/decode_step.cuh"

#define EACH_DECODE(dtype, T) DECODE_DTYPE(decode_values, true, dtype, T)
FOR_EACH_DTYPE(EACH_DECODE)

MODULE(decode_values, DTYPE_ENTRIES(decode_values, f32) DTYPE_ENTRIES(decode_values, f16) DTYPE_ENTRIES(decode_values, bf16))
