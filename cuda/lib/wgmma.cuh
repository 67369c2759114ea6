// Products of a warpgroup (wgmma, sm_90a): 64 rows times N columns, summed over 16 numbers. Tensor cores read shared
// memory while the threads go on. As in hw.cuh there is an emulated form, which computes a product when it is issued.
//
// Sources: PTX ISA 8.0, section 9.7.15 (wgmma.mma_async, its matrix descriptors and fragments).
#pragma once

#include "lib/mbarrier.cuh"

#include <type_traits>

// A tile of rows of D halves in the layout of these products: 64 numbers of every row, 128 bytes each, then the next
// 64. 16-byte chunks are swizzled within 128 bytes. Tiles start at multiples of 1024 bytes.
template <int D, int ROWS>
struct Panels {
    static_assert(D % 64 == 0 && ROWS % 8 == 0, "whole groups of 8 rows of 128 bytes");
    static constexpr uint32_t GROUP = 128, CHUNKS = D / 8, ROW_STRIDE = 128, GROUP_STRIDE = ROWS * 128;

    SFA_DEVICE static uint32_t chunk(uint32_t row, uint32_t index) {
        return index / 8 * GROUP_STRIDE + row * 128 + ((index % 8 ^ (row & 7)) * 16);
    }
};

namespace hw {

// A factor in shared memory: the two words of a matrix descriptor for swizzled 128-byte rows.
struct Factor {
    uint32_t low, high;

    // The same factor, `bytes` further on.
    SFA_DEVICE Factor from(uint32_t bytes) const { return {low + bytes / 16, high}; }
    SFA_DEVICE uint64_t descriptor() const { return uint64_t(high) << 32 | low; }
};

SFA_DEVICE Factor factor(const Tile& tile, uint32_t offset, uint32_t group_stride) {
#ifdef SFA_EMULATION
    uint32_t address = uint32_t(tile.bytes.begin) + offset;
#else
    uint32_t address = tile.address + offset;
#endif
    // In units of 16 bytes: bits 0 to 13 the start, 16 to 29 the distance of groups of 64 numbers, 32 to 45 the
    // distance of groups of 8 rows. Bit 62: swizzled within 128 bytes.
    return {(address & 0x3ffff) >> 4 | (group_stride >> 4) << 16, (1024 >> 4) | 1u << 30};
}

// Tile rows from `row` (a multiple of 8) on are the factor's rows (of A) or columns (of B). The sum runs along them,
// from number `first` (a multiple of 16) on.
template <int D, int ROWS>
SFA_DEVICE Factor along_rows(const Tile& tile, int row = 0, int first = 0) {
    return factor(tile, first / 64 * Panels<D, ROWS>::GROUP_STRIDE + row * 128 + first % 64 * 2, 16);
}

// The same 16 * k numbers further on.
template <int D, int ROWS>
SFA_DEVICE Factor along_rows_step(const Factor& factor, int k) {
    return factor.from(k / 4 * Panels<D, ROWS>::GROUP_STRIDE + k % 4 * 32);
}

// The sum runs over 16 tile rows, from `row` (a multiple of 8) on. The tile's numbers from `first` (a multiple of 64)
// on are the factor's rows (of A) or columns (of B).
template <int D, int ROWS>
SFA_DEVICE Factor across_rows(const Tile& tile, int row = 0, int first = 0) {
    return factor(tile, first / 64 * Panels<D, ROWS>::GROUP_STRIDE + row * 128, Panels<D, ROWS>::GROUP_STRIDE);
}

// The same 16 * k tile rows further on.
SFA_DEVICE Factor across_rows_step(const Factor& factor, int k) { return factor.from(k * 16 * 128); }

// Orders the first product after earlier writes to its registers. For all threads of a warpgroup.
SFA_DEVICE void products_begin() {
#ifndef SFA_EMULATION
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes a group of products.
SFA_DEVICE void products_commit() {
#ifndef SFA_EMULATION
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `PENDING` groups are in flight. The sums of finished groups may be read after `settle`.
template <int PENDING>
SFA_DEVICE void products_wait() {
#ifndef SFA_EMULATION
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#endif
}

// Keeps the compiler from moving reads and writes of these sums across this point.
template <int N>
SFA_DEVICE void settle(float (&c)[N][4]) {
#ifndef SFA_EMULATION
#pragma unroll
    for (int i = 0; i < N * 4; i++) asm volatile("" : "+f"(c[i / 4][i % 4])::"memory");
#endif
}

// Gives registers of a warpgroup back, or takes registers that others of the block gave back: N a thread from here on.
// For all threads of a warpgroup.
template <int N>
SFA_DEVICE void give_registers() {
#ifndef SFA_EMULATION
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

template <int N>
SFA_DEVICE void take_registers() {
#ifndef SFA_EMULATION
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}

// A fence: products of threads that meet this one later read its writes to shared memory, copies that have arrived
// included.
SFA_DEVICE void publish_to_products() {
#ifndef SFA_EMULATION
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

#ifdef SFA_EMULATION
// Number (i, k) of a factor, as the descriptor says.
inline uint16_t emulated_number(const Factor& factor, bool across, uint32_t i, uint32_t k) {
    uint32_t start = (factor.low & 0x3fff) << 4, group = (factor.low >> 16 & 0x3fff) << 4,
             eight = (factor.high & 0x3fff) << 4;
    uint32_t at = across ? start + i / 64 * group + k / 8 * eight + k % 8 * 128 + i % 64 * 2
                         : start + i / 8 * eight + i % 8 * 128 + k * 2;
    at ^= (at >> 7 & 7) << 4;
    uint16_t x;
    memcpy(&x, shared_memory<unsigned char>(at, 2).check_read(0, 2, 2), 2);
    return x;
}

// This lane's part of A (a warp has 16 of its 64 rows), in the order of the registers.
inline void emulated_left(uint32_t (&a)[4], const Factor& factor, bool across) {
    uint32_t row = threadIdx.x / 32 % 4 * 16 + emu::lane() / 4, k = emu::lane() % 4 * 2;
    for (uint32_t i = 0; i < 4; i++) {
        uint32_t r = row + i % 2 * 8, first = k + i / 2 * 8;
        a[i] = emulated_number(factor, across, r, first) |
               uint32_t(emulated_number(factor, across, r, first + 1)) << 16;
    }
}

// A lane's contribution to a product: its part of A, and the B columns that it reads for all.
template <int N>
struct WarpgroupOperands {
    float a[8], b[N / 32][16];
};

template <class T, int N, bool ACROSS>
inline void emulated_product(float (&c)[N / 8][4], const uint32_t (&a)[4], const Factor& b, bool add) {
    WarpgroupOperands<N> mine;
    for (int i = 0; i < 4; i++) mine.a[2 * i] = low<T>(a[i]), mine.a[2 * i + 1] = high<T>(a[i]);
    for (int i = 0; i < N / 2; i++)
        mine.b[i / 16][i % 16] = T::to_float(emulated_number(b, ACROSS, emu::lane() * (N / 32) + i / 16, i % 16));
    const WarpgroupOperands<N>* all = emu::gather(mine, "wgmma", __builtin_LINE());
    float left[2][16];
    for (int i = 0; i < 32; i++) {
        int k = i % 16, lane = emu::lane() / 4 * 4 + k % 8 / 2;
        left[i / 16][k] = all[lane].a[(k / 8 * 2 + i / 16) * 2 + k % 2];
    }
    for (int i = 0; i < N / 2; i++) {
        int column = i / 4 * 8 + emu::lane() % 4 * 2 + i % 2;
        const float* right = all[column / (N / 32)].b[column % (N / 32)];
        float sum = 0;
        for (int k = 0; k < 16; k++) sum += left[i / 2 % 2][k] * right[k];
        float& x = c[i / 4][i % 4];
        x = add ? x + sum : sum;
    }
}
#endif

#ifndef SFA_EMULATION
// The sums of N columns as operands (`io`: "+f", or "=f" if their old values are not read), and their list.
#define SFA_SUMS_64(io) \
    io(c[0][0]), io(c[0][1]), io(c[0][2]), io(c[0][3]), io(c[1][0]), io(c[1][1]), io(c[1][2]), io(c[1][3]), \
    io(c[2][0]), io(c[2][1]), io(c[2][2]), io(c[2][3]), io(c[3][0]), io(c[3][1]), io(c[3][2]), io(c[3][3]), \
    io(c[4][0]), io(c[4][1]), io(c[4][2]), io(c[4][3]), io(c[5][0]), io(c[5][1]), io(c[5][2]), io(c[5][3]), \
    io(c[6][0]), io(c[6][1]), io(c[6][2]), io(c[6][3]), io(c[7][0]), io(c[7][1]), io(c[7][2]), io(c[7][3])
#define SFA_LIST_64 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SFA_SUMS_128(io) \
    io(c[0][0]), io(c[0][1]), io(c[0][2]), io(c[0][3]), io(c[1][0]), io(c[1][1]), io(c[1][2]), io(c[1][3]), \
    io(c[2][0]), io(c[2][1]), io(c[2][2]), io(c[2][3]), io(c[3][0]), io(c[3][1]), io(c[3][2]), io(c[3][3]), \
    io(c[4][0]), io(c[4][1]), io(c[4][2]), io(c[4][3]), io(c[5][0]), io(c[5][1]), io(c[5][2]), io(c[5][3]), \
    io(c[6][0]), io(c[6][1]), io(c[6][2]), io(c[6][3]), io(c[7][0]), io(c[7][1]), io(c[7][2]), io(c[7][3]), \
    io(c[8][0]), io(c[8][1]), io(c[8][2]), io(c[8][3]), io(c[9][0]), io(c[9][1]), io(c[9][2]), io(c[9][3]), \
    io(c[10][0]), io(c[10][1]), io(c[10][2]), io(c[10][3]), io(c[11][0]), io(c[11][1]), io(c[11][2]), io(c[11][3]), \
    io(c[12][0]), io(c[12][1]), io(c[12][2]), io(c[12][3]), io(c[13][0]), io(c[13][1]), io(c[13][2]), io(c[13][3]), \
    io(c[14][0]), io(c[14][1]), io(c[14][2]), io(c[14][3]), io(c[15][0]), io(c[15][1]), io(c[15][2]), io(c[15][3])
#define SFA_LIST_128 \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"            \
    "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"  \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"  \
    "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

#define SFA_PRODUCT(N, dtype, io, scale, a, b, last_a, last_b, ...)                                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " scale ", 0;\n"                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." dtype "." dtype " {" SFA_LIST_##N "}, " a ", " b \
                 ", p, 1, 1" last_a last_b ";\n}\n"                                                              \
                 : SFA_SUMS_##N(io)                                                                               \
                 : __VA_ARGS__)
// %r after the sums' registers: 32 of 64 columns, 64 of 128.
#define SFA_SHARED_PRODUCT(N, dtype, io, add, r0, r1, r2, r3, r4)                                             \
    SFA_PRODUCT(N, dtype, io, r2, r0, r1, ", " r3, ", " r4, "l"(a.descriptor()), "l"(b.descriptor()), "r"(int(add)), \
                "n"(int(ACROSS_A)), "n"(int(ACROSS_B)))
// The product of T and N.
#define SFA_SHARED_PRODUCTS(io, add)                                                                         \
    constexpr bool F = std::is_same<T, F16>::value;                                                          \
    if constexpr (N == 64 && F) SFA_SHARED_PRODUCT(64, "f16", io, add, "%32", "%33", "%34", "%35", "%36");   \
    if constexpr (N == 64 && !F) SFA_SHARED_PRODUCT(64, "bf16", io, add, "%32", "%33", "%34", "%35", "%36"); \
    if constexpr (N == 128 && F) SFA_SHARED_PRODUCT(128, "f16", io, add, "%64", "%65", "%66", "%67", "%68"); \
    if constexpr (N == 128 && !F) SFA_SHARED_PRODUCT(128, "bf16", io, add, "%64", "%65", "%66", "%67", "%68")
#define SFA_HELD_PRODUCT(N, dtype, r0, r1, r2, r3, r4, r5, r6)                                                    \
    SFA_PRODUCT(N, dtype, "+f", r5, "{" r0 "," r1 "," r2 "," r3 "}", r4, "", ", " r6, "r"(a[0]), "r"(a[1]), "r"(a[2]), \
                "r"(a[3]), "l"(b.descriptor()), "r"(int(add)), "n"(int(ACROSS_B)))
#endif

// c (64 rows x N columns of a warpgroup) = a * b over 16 numbers, plus c if `add`. A warp has 16 rows, in the order of
// `multiply_add`. ACROSS: the factor is one of `across_rows`.
template <class T, int N, bool ACROSS_A, bool ACROSS_B>
SFA_DEVICE void product(float (&c)[N / 8][4], const Factor& a, const Factor& b, bool add) {
    static_assert(N == 64 || N == 128, "the forms above");
#ifdef SFA_EMULATION
    uint32_t left[4];
    emulated_left(left, a, ACROSS_A);
    emulated_product<T, N, ACROSS_B>(c, left, b, add);
#else
    SFA_SHARED_PRODUCTS("+f", add);
#endif
}

// The same without adding to c, whose registers are free until here; `product` keeps their old values alive even if it
// does not add.
template <class T, int N, bool ACROSS_A, bool ACROSS_B>
SFA_DEVICE void first_product(float (&c)[N / 8][4], const Factor& a, const Factor& b) {
    static_assert(N == 64 || N == 128, "the forms above");
#ifdef SFA_EMULATION
    product<T, N, ACROSS_A, ACROSS_B>(c, a, b, false);
#else
    SFA_SHARED_PRODUCTS("=f", false);
#endif
}

// The same with A in registers, as `multiply_add` has it for each warp's 16 rows.
template <class T, int N, bool ACROSS_B>
SFA_DEVICE void product(float (&c)[N / 8][4], const uint32_t (&a)[4], const Factor& b, bool add) {
    static_assert(N == 64 || N == 128, "the forms above");
#ifdef SFA_EMULATION
    emulated_product<T, N, ACROSS_B>(c, a, b, add);
#else
    constexpr bool F = std::is_same<T, F16>::value;
    if constexpr (N == 64 && F) SFA_HELD_PRODUCT(64, "f16", "%32", "%33", "%34", "%35", "%36", "%37", "%38");
    if constexpr (N == 64 && !F) SFA_HELD_PRODUCT(64, "bf16", "%32", "%33", "%34", "%35", "%36", "%37", "%38");
    if constexpr (N == 128 && F) SFA_HELD_PRODUCT(128, "f16", "%64", "%65", "%66", "%67", "%68", "%69", "%70");
    if constexpr (N == 128 && !F) SFA_HELD_PRODUCT(128, "bf16", "%64", "%65", "%66", "%67", "%68", "%69", "%70");
#endif
}

}  // namespace hw
