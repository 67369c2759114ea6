// Philox 4x32-10, the counter-based generator of Salmon et al. (SC 2011), as src/cpu/philox.rs draws it.
#pragma once

#include "lib/kernel.cuh"

#include <stdint.h>

// The word of one row and column: four neighbouring columns share one draw.
__device__ __forceinline__ uint32_t philox_word(const uint32_t (&seed)[2], uint32_t batch_head, uint32_t row,
                                                uint32_t column) {
    uint32_t counter[4] = {column / 4, row, batch_head, 0}, key[2] = {seed[0], seed[1]};
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint32_t high0 = __umulhi(0xD2511F53u, counter[0]), low0 = 0xD2511F53u * counter[0];
        uint32_t high1 = __umulhi(0xCD9E8D57u, counter[2]), low1 = 0xCD9E8D57u * counter[2];
        counter[0] = high1 ^ counter[1] ^ key[0], counter[1] = low1;
        counter[2] = high0 ^ counter[3] ^ key[1], counter[3] = low0;
        key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    }
    uint32_t index = column % 4;
    return index < 2 ? (index == 0 ? counter[0] : counter[1]) : (index == 2 ? counter[2] : counter[3]);
}
