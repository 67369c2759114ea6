// Spreads NaN after forward.cu and forward_listed.cu: a token that is not finite reaches every row that sees it.
#include "lib/hw.cuh"
#include "lib/params.cuh"

typedef Global<const uint32_t> Words;

// Where a row sees every earlier raw token (dense and causal) or every earlier one that stays (listed), a token that is
// not finite must reach every later row, even a row whose logit is minus infinity (an infinite key). The block of that
// token's own row noted it in `first_bad`; this kernel tells all later rows. One block of SPREAD_WARPS warps per
// (batch, head).
constexpr uint32_t SPREAD_WARPS = 8;

SHARED_BYTES(forward_spread_nan, SPREAD_WARPS * 4)
KERNEL forward_spread_nan(Words first_bad, Global<uint16_t> output, SpreadParams p) {
    hw::let_next_start();
    hw::wait_for_previous();
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

MODULE(forward_spread, ENTRY(forward_spread_nan))
