// Attention forward: see forward_block.cuh. f16 and bf16 on tensor cores; heads' row blocks in one axis of the grid,
// the rows that see most first, neighbouring blocks of one head together so that its columns stay in the L2 cache.
#include "forward_block.cuh"

template <class T, int D, int MT, int NB, bool EXTRAS, bool LISTED>
__device__ __forceinline__ void forward(const ForwardTensors& x, const AttentionParams& p) {
    typedef ForwardBlock<T, D, MT, NB, EXTRAS, LISTED> Block;
    uint32_t blocks = (p.sizes.tokens + Block::ROWS - 1) / Block::ROWS;
    uint32_t head = blockIdx.x / blocks, block = blocks - 1 - blockIdx.x % blocks;
    Block rows(p, x, head, block * Block::ROWS);
    rows.run(head * blocks + block);
}

#define FORWARD(name, T, D, MT, NB, BLOCKS, EXTRAS, LISTED)                                                                  \
    KERNEL __launch_bounds__(128, BLOCKS)                                                                            \
        name(Halves q, Halves k, Halves v, Halves far_k, Halves far_v, Floats far_ln, Words far_index,               \
             Words far_before, Halves folded_k, Halves folded_v, Floats folded_ln, Floats bias,                      \
             Global<uint16_t> output, Global<float> log_sum_exp, Global<uint32_t> first_bad, AttentionParams p) {    \
        forward<T, D, MT, NB, EXTRAS, LISTED>(                                                                               \
            ForwardTensors{q, k, v, far_k, far_v, far_ln, far_index, far_before, folded_k, folded_v, folded_ln, bias, \
                           output, log_sum_exp, first_bad},                                                          \
            p);                                                                                                      \
    }

// (dtype, padded head size) x (plain, listed, with bias or dropout); BLOCKS of one multiprocessor at a time.
#define FORWARD_DTYPE(dtype, T)                                        \
    FORWARD(forward_64_##dtype, T, 64, 2, 64, 3, false, false)         \
    FORWARD(forward_96_##dtype, T, 96, 2, 32, 2, false, false)         \
    FORWARD(forward_128_##dtype, T, 128, 2, 32, 2, false, false)       \
    FORWARD(forward_256_##dtype, T, 256, 1, 32, 2, false, false)       \
    FORWARD(forward_64_listed_##dtype, T, 64, 2, 64, 3, false, true)   \
    FORWARD(forward_96_listed_##dtype, T, 96, 2, 32, 2, false, true)   \
    FORWARD(forward_128_listed_##dtype, T, 128, 2, 32, 2, false, true) \
    FORWARD(forward_64_extras_##dtype, T, 64, 2, 32, 2, true, false)   \
    FORWARD(forward_128_extras_##dtype, T, 128, 1, 32, 2, true, false) \
    FORWARD(forward_256_extras_##dtype, T, 256, 1, 32, 2, true, false)

FORWARD_DTYPE(f16, hw::F16)
FORWARD_DTYPE(bf16, hw::BF16)

// Where rows see every raw token before them (dense and causal) or every one that stays (listed), one that is not finite
// must reach every later row, even one whose logit is minus infinity (an infinite key). Its own block has noted it; here
// all blocks know. One block of SPREAD_WARPS warps per (batch, head).
constexpr uint32_t SPREAD_WARPS = 8;

KERNEL forward_spread_nan(Words first_bad, Global<uint16_t> output, SpreadParams p) {
    Shared<uint32_t> of_warps = shared_memory<uint32_t>(0, SPREAD_WARPS);
    uint32_t blocks = (p.tokens + p.block_rows - 1) / p.block_rows, first = p.tokens;
    for (uint32_t block = threadIdx.x; block < blocks; block += SPREAD_WARPS * 32)
        first = min(first, first_bad[blockIdx.x * blocks + block]);
    for (int mask = 16; mask > 0; mask /= 2) first = min(first, hw::shuffle_xor(first, mask));
    if (threadIdx.x % 32 == 0) of_warps.set(threadIdx.x / 32, first);
    __syncthreads();
    for (uint32_t warp = 0; warp < SPREAD_WARPS; warp++) first = min(first, of_warps[warp]);
    int64_t start = int64_t(blockIdx.x) * p.tokens;
    for (int64_t i = (start + first) * p.head_dim + threadIdx.x; i < (start + p.tokens) * p.head_dim; i += blockDim.x)
        output.set(i, 0x7fff);
}

#define DTYPE_ENTRIES(dtype)                                                                                      \
    ENTRY(forward_64_##dtype)                                                                                     \
    ENTRY(forward_96_##dtype)                                                                                     \
    ENTRY(forward_128_##dtype)                                                                                    \
    ENTRY(forward_256_##dtype)                                                                                    \
    ENTRY(forward_64_listed_##dtype) ENTRY(forward_96_listed_##dtype) ENTRY(forward_128_listed_##dtype)                                                                                               \
    ENTRY(forward_64_extras_##dtype) ENTRY(forward_128_extras_##dtype) ENTRY(forward_256_extras_##dtype)

MODULE(forward, DTYPE_ENTRIES(f16) DTYPE_ENTRIES(bf16) ENTRY(forward_spread_nan))
