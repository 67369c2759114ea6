// Values of another size than keys: the kernels of decode_step.cuh.
#include "cache/decode_step.cuh"

#define EACH_DECODE(dtype, T) DECODE_DTYPE(decode_values, true, dtype, T)
FOR_EACH_DTYPE(EACH_DECODE)

#define DECODE_ENTRIES(dtype, T) DTYPE_ENTRIES(decode_values, dtype)
MODULE(decode_values, FOR_EACH_DTYPE(DECODE_ENTRIES))
