// Columns in 8 bits as decode_group.cuh reads them: codes in registers, pairs of halves made of them, and the units of
// weights.
#pragma once

#include "cache/decode_parts.cuh"

// Pairs of halves from the bytes of a word, exact up to a power of two. `number` of the word's two pairs.
template <class Half, unsigned CODE>
struct CodedPairs;

// A byte x + 128 as the low bits of 1024 + 128 + x.
template <>
struct CodedPairs<hw::F16, CODE_I8> {
    // A number over what the pair holds.
    static constexpr float UNIT = 1.f;
    SFA_DEVICE static uint32_t pair(uint32_t word, int number) {
        uint32_t raised = hw::pick_bytes(word ^ 0x80808080u, 0x64646464u, number ? 0x4342u : 0x4140u);
        // Times 1, minus 1152.
        return hw::fused_pairs(hw::F16(), raised, 0x3c003c00u, 0xe480e480u);
    }
};

// The low seven bits as those of 128 + bits; minus 128, or 256 where the sign is set.
template <>
struct CodedPairs<hw::BF16, CODE_I8> {
    static constexpr float UNIT = 1.f;
    SFA_DEVICE static uint32_t pair(uint32_t word, int number) {
        uint32_t raised = hw::pick_bytes(word, 0x43434343u, number ? 0x4342u : 0x4140u);
        // Times -1.
        return hw::fused_pairs(hw::BF16(), raised & 0xff80ff80u, 0xbf80bf80u, raised & 0xff7fff7fu);
    }
};

// The exponent's bias is 7 in a code and 15 in a half: the pair holds 2^-8 of the number.
template <>
struct CodedPairs<hw::F16, CODE_F8E4M3> {
    static constexpr float UNIT = 256.f;
    SFA_DEVICE static uint32_t pair(uint32_t word, int number) {
        uint32_t high = hw::pick_bytes(word, 0, number ? 0x3424u : 0x1404u);
        return (high >> 1 & 0x3f803f80u) | (high & 0x80008000u);
    }
};

// The bias is 127 in bf16, and codes without a leading one need a product: times 2^120.
template <>
struct CodedPairs<hw::BF16, CODE_F8E4M3> {
    static constexpr float UNIT = 1.f;
    SFA_DEVICE static uint32_t pair(uint32_t word, int number) {
        uint32_t high = hw::pick_bytes(word, 0, number ? 0x3424u : 0x1404u);
        uint32_t small = (high >> 4 & 0x07f007f0u) | (high & 0x80008000u);
        return hw::fused_pairs(hw::BF16(), small, 0x7b807b80u, 0x80008000u);
    }
};

// Rows in T alone: a stand-in.
template <class Half>
struct CodedPairs<Half, AS_T> {
    static constexpr float UNIT = 1.f;
    SFA_DEVICE static uint32_t pair(uint32_t, int) { return 0; }
};

// Eight numbers of eight codes.
template <class Half, unsigned CODE>
SFA_DEVICE uint4 halves_of(uint32_t first, uint32_t second) {
    typedef CodedPairs<Half, CODE> Pairs;
    return {Pairs::pair(first, 0), Pairs::pair(first, 1), Pairs::pair(second, 0), Pairs::pair(second, 1)};
}

// A lane's codes of two keys, and the scales of both columns.
template <class Half, int D, unsigned CODE>
struct CodedKeys {
    typedef CodedStore From;
    uint4 codes[2][D / 64];
    uint32_t scales[2];
    float added[2];

    SFA_DEVICE void read(int i, const CodedStore& store, int row, bool exists, int quarter, uint32_t dim) {
        added[i] = exists ? 0.f : -hw::infinity();
        scales[i] = 0;
        if (exists) scales[i] = store.scales[row];
        if (exists && store.ln) added[i] = LOG2_E * store.ln[row];
#pragma unroll
        for (int j = 0; j < D / 64; j++) {
            int at = (j * 4 + quarter) * 16;
            codes[i][j] = uint4{0, 0, 0, 0};
            if (exists && at < int(dim)) codes[i][j] = hw::load_once<uint4>(store.keys, row * int(dim) + at);
        }
    }

    SFA_DEVICE uint4 numbers(int i, int j) const {
        const uint4& all = codes[i][j / 2];
        return j % 2 == 0 ? halves_of<Half, CODE>(all.x, all.y) : halves_of<Half, CODE>(all.z, all.w);
    }
    SFA_DEVICE float factor(int i, float scale) const {
        return scale * CodedPairs<Half, CODE>::UNIT * bf16_of(scales[i] & 0xffffu);
    }
    SFA_DEVICE float value_factor(int i) const { return CodedPairs<Half, CODE>::UNIT * bf16_of(scales[i] >> 16); }
};

// A lane's codes of four values.
template <class Half, int D, unsigned CODE>
struct CodedValues {
    static constexpr int WORDS = D / 32;
    uint32_t codes[4][WORDS];

    SFA_DEVICE void read(int i, const CodedStore& store, int row, bool exists, int r, uint32_t dim) {
        int at = r * WORDS * 4;
#pragma unroll
        for (int j = 0; j < WORDS; j++) codes[i][j] = 0;
        if (!exists || at >= int(dim)) return;
        if constexpr (D == 64) {
            uint2 all = load_vector<uint2>(store.values, row * int(dim) + at);
            codes[i][0] = all.x, codes[i][1] = all.y;
        } else {
            uint4 all = hw::load_once<uint4>(store.values, row * int(dim) + at);
            codes[i][0] = all.x, codes[i][1] = all.y, codes[i][2] = all.z, codes[i][3] = all.w;
        }
    }

    SFA_DEVICE uint4 numbers(int i, int j) const { return halves_of<Half, CODE>(codes[i][2 * j], codes[i][2 * j + 1]); }
};

// Weights times the scales of values, as halves. bf16 holds all of them. In f16 they are kept over a unit: the largest
// scale of the columns at which one exceeded 16 units. A weight is at most 2^8, so that none reaches 2^13.
template <class Half, bool CODED>
struct WeightUnit {
    SFA_DEVICE void clear() {}
    template <int N>
    SFA_DEVICE void fit(float (&weights)[4], const float (&factors)[2], float (&)[N][4]) {
        if constexpr (CODED) {
#pragma unroll
            for (int i = 0; i < 4; i++) weights[i] *= factors[i / 2];
        }
    }
    template <int N>
    SFA_DEVICE void undo(float (&)[N][4]) {}
};

template <>
struct WeightUnit<hw::F16, true> {
    float unit, inverse;

    SFA_DEVICE void clear() { unit = inverse = 0; }

    template <int N>
    SFA_DEVICE void scale(float (&output)[N][4], float factor) {
#pragma unroll
        for (int i = 0; i < 4 * N; i++) output[i / 4][i % 4] *= factor;
    }

    template <int N>
    SFA_DEVICE void fit(float (&weights)[4], const float (&factors)[2], float (&output)[N][4]) {
        float largest = hw::max(factors[0], factors[1]);
        if (hw::warp_any(largest > 16.f * unit)) {
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) largest = hw::max(largest, hw::shuffle_xor(largest, mask));
            inverse = 1.f / largest;
            scale(output, unit * inverse);
            unit = largest;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) weights[i] *= factors[i / 2] * inverse;
    }

    // Brings the output back.
    template <int N>
    SFA_DEVICE void undo(float (&output)[N][4]) {
        scale(output, unit);
    }
};
