// Attention forward: see forward_block.cuh. f16 and bf16 on tensor cores; heads' row blocks in one axis of the grid,
// the rows that see most first, neighbouring blocks of one head together so that its columns stay in the L2 cache.
#include "forward_block.cuh"

template <class T, int D, int MT, int NB, bool EXTRAS>
__device__ __forceinline__ void forward(const ForwardTensors& x, const AttentionParams& p) {
    typedef ForwardBlock<T, D, MT, NB, EXTRAS> Block;
    uint32_t blocks = (p.sizes.tokens + Block::ROWS - 1) / Block::ROWS;
    uint32_t head = blockIdx.x / blocks, block = blocks - 1 - blockIdx.x % blocks;
    Block rows(p, x, head, block * Block::ROWS);
    rows.run();
    if (p.dense && p.causal && threadIdx.x == 0) x.first_bad.set(head * blocks + block, uint32_t(rows.first_bad));
}

#define FORWARD(name, T, D, MT, NB, BLOCKS, EXTRAS)                                                                  \
    KERNEL __launch_bounds__(128, BLOCKS)                                                                            \
        name(Halves q, Halves k, Halves v, Halves far_k, Halves far_v, Floats far_ln, Words far_index,               \
             Words far_before, Halves folded_k, Halves folded_v, Floats folded_ln, Floats bias,                      \
             Global<uint16_t> output, Global<float> log_sum_exp, Global<uint32_t> first_bad, AttentionParams p) {    \
        forward<T, D, MT, NB, EXTRAS>(                                                                               \
            ForwardTensors{q, k, v, far_k, far_v, far_ln, far_index, far_before, folded_k, folded_v, folded_ln, bias, \
                           output, log_sum_exp, first_bad},                                                          \
            p);                                                                                                      \
    }

// (dtype, padded head size) x (plain, with bias or dropout); BLOCKS of one multiprocessor at a time.
#define FORWARD_DTYPE(dtype, T)                                 \
    FORWARD(forward_64_##dtype, T, 64, 2, 64, 3, false)         \
    FORWARD(forward_96_##dtype, T, 96, 2, 32, 2, false)         \
    FORWARD(forward_128_##dtype, T, 128, 2, 32, 2, false)       \
    FORWARD(forward_256_##dtype, T, 256, 1, 32, 2, false)       \
    FORWARD(forward_64_extras_##dtype, T, 64, 2, 32, 2, true)   \
    FORWARD(forward_128_extras_##dtype, T, 128, 1, 32, 2, true) \
    FORWARD(forward_256_extras_##dtype, T, 256, 1, 32, 2, true)

FORWARD_DTYPE(f16, hw::F16)
FORWARD_DTYPE(bf16, hw::BF16)

// In the dense causal case a token that is not finite must reach every later row, even one whose logit is minus infinity
// (an infinite key). Its own block has noted it; here all blocks know. One block per (batch, head).
KERNEL forward_spread_nan(Words first_bad, Global<uint16_t> output, SpreadParams p) {
    uint32_t blocks = (p.tokens + p.block_rows - 1) / p.block_rows, first = p.tokens;
    for (uint32_t block = 0; block < blocks && first == p.tokens; block++) first = first_bad[blockIdx.x * blocks + block];
    int64_t start = int64_t(blockIdx.x) * p.tokens;
    for (int64_t i = (start + first) * p.head_dim + threadIdx.x; i < (start + p.tokens) * p.head_dim; i += blockDim.x)
        output.set(i, 0x7fff);
}

#define DTYPE_ENTRIES(dtype)                                                                                      \
    ENTRY(forward_64_##dtype)                                                                                     \
    ENTRY(forward_96_##dtype)                                                                                     \
    ENTRY(forward_128_##dtype)                                                                                    \
    ENTRY(forward_256_##dtype)                                                                                    \
    ENTRY(forward_64_extras_##dtype) ENTRY(forward_128_extras_##dtype) ENTRY(forward_256_extras_##dtype)

MODULE(forward, DTYPE_ENTRIES(f16) DTYPE_ENTRIES(bf16) ENTRY(forward_spread_nan))
