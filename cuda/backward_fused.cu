// Attention backward where sums may differ in their last bits: see backward_fused.cuh. The rest is in backward.cu.
#include "backward_fused.cuh"

template <class Gradients>
__device__ __forceinline__ void fused(const BackwardTensors& x, const Global<float>& dq, const ColumnTarget& dk,
                                      const ColumnTarget& dv, const AttentionParams& p, bool near) {
    // Of listed columns there are two kinds, each with a last block of its own.
    uint32_t blocks = (p.sizes.tokens + Gradients::COLUMNS - 1) / Gradients::COLUMNS + Gradients::IS_LISTED;
    Gradients(p, x, blockIdx.x / blocks, blockIdx.x % blocks, near).run(dq, dk, dv);
}

#define TARGETS                                                                                                       \
    Global<float> dq, Global<float> dk, Global<float> dv, Global<uint16_t> done_k, Global<uint16_t> done_v,           \
        AttentionParams p
#define FUSED(name, T, D, MT, WARPS, NB, BLOCKS)                                                                      \
    KERNEL __launch_bounds__(32 * WARPS, BLOCKS) name##_far(BACKWARD_INPUTS, TARGETS) {                               \
        fused<FusedGradients<T, D, MT, WARPS, NB, false>>(BACKWARD_TENSORS, dq, {dk, done_k}, {dv, done_v}, p, false); \
    }                                                                                                                 \
    KERNEL __launch_bounds__(32 * WARPS, BLOCKS) name##_near(BACKWARD_INPUTS, TARGETS) {                              \
        fused<FusedGradients<T, D, MT, WARPS, NB, false>>(BACKWARD_TENSORS, dq, {dk, done_k}, {dv, done_v}, p, true);  \
    }                                                                                                                 \
    KERNEL __launch_bounds__(32 * WARPS, BLOCKS) name##_listed(BACKWARD_INPUTS, TARGETS) {                            \
        fused<FusedGradients<T, D, MT, WARPS, NB, true>>(BACKWARD_TENSORS, dq, {dk, done_k}, {dv, done_v}, p, false);  \
    }

// As `Fused::pick` in src/cuda/backward.rs.
#define FUSED_DTYPE(dtype, T)                              \
    FUSED(backward_fused_64_##dtype, T, 64, 2, 4, 32, 2)       \
    FUSED(backward_fused_128_##dtype, T, 128, 1, 8, 64, 1)

FUSED_DTYPE(f16, hw::F16)
FUSED_DTYPE(bf16, hw::BF16)

#define DTYPE_ENTRIES(dtype)                                                          \
    ENTRY(backward_fused_64_##dtype##_far) ENTRY(backward_fused_64_##dtype##_near) ENTRY(backward_fused_64_##dtype##_listed) \
    ENTRY(backward_fused_128_##dtype##_far) ENTRY(backward_fused_128_##dtype##_near) ENTRY(backward_fused_128_##dtype##_listed)

MODULE(backward_fused, DTYPE_ENTRIES(f16) DTYPE_ENTRIES(bf16))
