// Hardware instructions: tensor cores (mma), asynchronous copies, shuffles, conversions. mbarrier.cuh has barriers, and
// wgmma.cuh the products of warpgroups.
//
// Under nvcc these are inline PTX (sm_80 and up). Under emulation (SFA_EMULATION) they are plain C++ whose lanes meet
// in emu::gather, so that a kernel's index arithmetic runs on a machine without a GPU. Fragment layouts are those of
// the PTX manual (mma.m16n8k16, ldmatrix). Sources: PTX ISA 8.0, sections 9.7.13 and 9.7.9.
#pragma once

#include "lib/kernel.cuh"

#include <stdint.h>
#define SFA_DEVICE __device__ __forceinline__

namespace hw {

SFA_DEVICE float infinity() { return __uint_as_float(0x7f800000u); }
SFA_DEVICE float nan() { return __uint_as_float(0x7fc00000u); }

// NaN and infinity have all exponent bits set.
SFA_DEVICE bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// 2^x; 0 for minus infinity.
SFA_DEVICE float exp2(float x) {
#ifdef SFA_EMULATION
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// The smaller of x and 0; a NaN stays NaN.
SFA_DEVICE float at_most_zero(float x) {
#ifdef SFA_EMULATION
    return x > 0.f ? 0.f : x;
#else
    float y;
    asm("min.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 1 / x to a unit in the last place, except near the smallest and the largest numbers.
SFA_DEVICE float reciprocal(float x) {
#ifdef SFA_EMULATION
    return 1.f / x;
#else
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

SFA_DEVICE float log2(float x) { return log2f(x); }

// The larger one; a NaN loses against a number.
SFA_DEVICE float max(float a, float b) { return fmaxf(a, b); }

struct F16 {
    static constexpr uint32_t EXPONENTS = 0x7c007c00u, LOWEST = 0x04000400u;
    SFA_DEVICE static float to_float(uint16_t x) {
#ifdef SFA_EMULATION
        return __half2float(half_t{x});
#else
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
        return y;
#endif
    }
    // Two floats, rounded to nearest even; `low` in the low bits.
    SFA_DEVICE static uint32_t pack(float low, float high) {
#ifdef SFA_EMULATION
        return __float2half_rn(low).bits | uint32_t(__float2half_rn(high).bits) << 16;
#else
        uint32_t y;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
        return y;
#endif
    }
};

struct BF16 {
    static constexpr uint32_t EXPONENTS = 0x7f807f80u, LOWEST = 0x00800080u;
    SFA_DEVICE static float to_float(uint16_t x) { return __uint_as_float(uint32_t(x) << 16); }
    SFA_DEVICE static uint32_t pack(float low, float high) {
#ifdef SFA_EMULATION
        return __float2bfloat16_rn(low).bits | uint32_t(__float2bfloat16_rn(high).bits) << 16;
#else
        uint32_t y;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
        return y;
#endif
    }
};

template <class T>
SFA_DEVICE float low(uint32_t pair) {
    return T::to_float(uint16_t(pair & 0xffffu));
}

template <class T>
SFA_DEVICE float high(uint32_t pair) {
    return T::to_float(uint16_t(pair >> 16));
}

// Whether one of the two halves is NaN or infinite: adding the lowest exponent bit to a full exponent carries out.
template <class T>
SFA_DEVICE bool any_not_finite(uint32_t pair) {
    return (((pair & T::EXPONENTS) + T::LOWEST) & 0x80008000u) != 0;
}

// The sum of products of eight halves, on top of `sum`.
template <class T>
SFA_DEVICE float dot(uint4 a, uint4 b, float sum) {
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        sum += low<T>(left[i]) * low<T>(right[i]);
        sum += high<T>(left[i]) * high<T>(right[i]);
    }
    return sum;
}

template <class X>
SFA_DEVICE X shuffle_xor(X x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

template <class X>
SFA_DEVICE X shuffle(X x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}

// Tells the compiler that a number is the same in all lanes.
SFA_DEVICE int uniform(int x) { return shuffle(x, 0); }

SFA_DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x) != 0; }

// ---- shared memory by byte offsets

// A part of a block's dynamic shared memory.
struct Tile {
#ifdef SFA_EMULATION
    Shared<unsigned char> bytes;
#else
    uint32_t address;
    unsigned char* bytes;
#endif
};

SFA_DEVICE Tile tile(uint32_t byte_offset, uint32_t bytes) {
#ifdef SFA_EMULATION
    return {shared_memory<unsigned char>(byte_offset, bytes)};
#else
    unsigned char* data = shared_memory<unsigned char>(byte_offset, bytes).data;
    return {uint32_t(__cvta_generic_to_shared(data)), data};
#endif
}

template <class X>
SFA_DEVICE X load(const Tile& tile, uint32_t offset) {
#ifdef SFA_EMULATION
    X x;
    memcpy(&x, tile.bytes.check_read(offset, sizeof(X), sizeof(X)), sizeof(X));
    return x;
#else
    return *reinterpret_cast<const X*>(tile.bytes + offset);
#endif
}

template <class X>
SFA_DEVICE void store(const Tile& tile, uint32_t offset, X x) {
#ifdef SFA_EMULATION
    memcpy(tile.bytes.check_write(offset, sizeof(X), sizeof(X)), &x, sizeof(X));
#else
    *reinterpret_cast<X*>(tile.bytes + offset) = x;
#endif
}

// A byte offset that differs between lanes, to which constants are added. It is opaque to the compiler, which would
// otherwise hold every sum in a register of its own instead of using the constants as immediates.
SFA_DEVICE uint32_t lane_offset(uint32_t offset) {
#ifndef SFA_EMULATION
    asm("" : "+r"(offset));
#endif
    return offset;
}

// Whether a block's facts are faster in registers than in shared memory. On sm_90 they are (up to 5 % of the forward),
// although a few registers then go to local memory and back; sm_80 is spared any spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool HOLDS = true;
#else
constexpr bool HOLDS = false;
#endif

// This thread's index in its block, read anew, so that nothing computed from it is held in a register.
SFA_DEVICE uint32_t thread() {
#ifdef SFA_EMULATION
    return threadIdx.x;
#else
    uint32_t x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
#endif
}

// Keeps expressions of a number where they are written: hoisted out of a loop, they would cost registers.
SFA_DEVICE void keep_in_place(int64_t& stride) {
#ifndef SFA_EMULATION
    asm volatile("" : "+l"(stride));
#endif
}

SFA_DEVICE void keep_in_place(uint32_t& offset) {
#ifndef SFA_EMULATION
    asm volatile("" : "+r"(offset));
#endif
}

// Starts a copy of 16 bytes, from element `index` of `source` on, to shared memory; writes zeros if not `valid`.
template <class View>
SFA_DEVICE void copy_async(const Tile& tile, uint32_t offset, const View& source, int64_t index, bool valid) {
#ifdef SFA_EMULATION
    uint4 x = {0, 0, 0, 0};
    if (valid) x = load_vector<uint4>(source, index);
    store(tile, offset, x);
#else
    // Nothing is read from the address when no bytes are.
    const void* address = source.data + index;
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(tile.address + offset), "l"(address), "r"(bytes)
                 : "memory");
#endif
}

// The same for halves from a byte offset on: a product of two words plus a pointer is then one instruction.
SFA_DEVICE void copy_async_bytes(const Tile& tile, uint32_t offset, const Global<const uint16_t>& source,
                                 uint64_t bytes, bool valid) {
#ifdef SFA_EMULATION
    copy_async(tile, offset, source, int64_t(bytes / 2), valid);
#else
    const void* address = reinterpret_cast<const unsigned char*>(source.data) + bytes;
    int size = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(tile.address + offset), "l"(address), "r"(size)
                 : "memory");
#endif
}

// The same for one word of 4 bytes.
template <class View>
SFA_DEVICE void copy_async_word(const Tile& tile, uint32_t offset, const View& source, int64_t index, bool valid) {
#ifdef SFA_EMULATION
    uint32_t x = 0;
    if (valid) x = load_vector<uint32_t>(source, index);
    store(tile, offset, x);
#else
    const void* address = source.data + index;
    int bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(tile.address + offset), "l"(address), "r"(bytes)
                 : "memory");
#endif
}

// Atomically adds to two neighbours in memory; `index` is even.
SFA_DEVICE void add_pair(const Global<float>& target, int64_t index, float a, float b) {
#if defined(SFA_EMULATION) || __CUDA_ARCH__ < 900
    target.add(index, a);
    target.add(index + 1, b);
#else
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(target.data + index), "f"(a), "f"(b) : "memory");
#endif
}

// Loads 16 bytes that are read only once: L1 keeps its other lines, and L2 fetches 256 bytes.
template <class V, class View>
SFA_DEVICE V load_once(const View& view, int64_t index) {
    static_assert(sizeof(V) == 16, "one vector");
#ifdef SFA_EMULATION
    return load_vector<V>(view, index);
#else
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(view.data + index));
    return *reinterpret_cast<V*>(&x);
#endif
}

// Lets the next launch on the stream start its blocks beside this one's last ones, if it was launched early. The early
// launch waits by itself for this one's writes.
SFA_DEVICE void let_next_start() {
#if !defined(SFA_EMULATION) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Waits until earlier launches have ended and their writes are visible. An early kernel waits here before it touches
// memory.
SFA_DEVICE void wait_for_previous() {
#ifdef SFA_EMULATION
    emu::wait_for_previous();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A fence: a thread that sees a later write or count of this thread also sees its earlier writes.
SFA_DEVICE void fence() {
#ifndef SFA_EMULATION
    __threadfence();
#endif
}

// Adds 1 to a shared counter; returns its old value.
SFA_DEVICE uint32_t count(const Global<uint32_t>& counters, int64_t index) {
#ifdef SFA_EMULATION
    uint32_t old = counters[index];
    counters.set(index, old + 1);
    return old;
#else
    return atomicAdd(counters.data + index, 1u);
#endif
}

SFA_DEVICE void copy_commit() {
#ifndef SFA_EMULATION
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `PENDING` of this thread's committed groups are in flight.
template <int PENDING>
SFA_DEVICE void copy_wait() {
#ifndef SFA_EMULATION
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// Starts adding contiguous numbers of shared memory to contiguous numbers in memory, atomically. `bytes` and both
// places are multiples of 16.
SFA_DEVICE void add_bulk(const Global<float>& target, int64_t index, const Tile& tile, uint32_t bytes) {
#ifdef SFA_EMULATION
    for (uint32_t i = 0; i < bytes / 4; i++) target.add(index + i, load<float>(tile, i * 4));
#else
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(
            target.data + index),
        "r"(tile.address), "r"(bytes)
                 : "memory");
#endif
}

// Waits until this thread's bulk additions have been read from shared memory, or until they have been added.
SFA_DEVICE void wait_for_bulk_reads() {
#ifndef SFA_EMULATION
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
#endif
}
SFA_DEVICE void wait_for_bulk() {
#ifndef SFA_EMULATION
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
}

// ---- tensor cores

// Four 8x8 matrices of halves; lane l gives the byte offset of row l % 8 of matrix l / 8.
SFA_DEVICE void load_matrices(uint32_t (&fragment)[4], const Tile& tile, uint32_t offset) {
#ifdef SFA_EMULATION
    const uint4* rows = emu::gather(load<uint4>(tile, offset), "ldmatrix", __builtin_LINE());
    for (int m = 0; m < 4; m++)
        memcpy(&fragment[m], (const char*)&rows[m * 8 + emu::lane() / 4] + emu::lane() % 4 * 4, 4);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(tile.address + offset));
#endif
}

// The same, each matrix transposed.
SFA_DEVICE void load_matrices_transposed(uint32_t (&fragment)[4], const Tile& tile, uint32_t offset) {
#ifdef SFA_EMULATION
    const uint4* rows = emu::gather(load<uint4>(tile, offset), "ldmatrix.trans", __builtin_LINE());
    for (int m = 0; m < 4; m++) {
        uint16_t pair[2];
        for (int i = 0; i < 2; i++)
            memcpy(&pair[i], (const char*)&rows[m * 8 + emu::lane() % 4 * 2 + i] + emu::lane() / 4 * 2, 2);
        memcpy(&fragment[m], pair, 4);
    }
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(tile.address + offset));
#endif
}

// Four 8x8 matrices of halves, as `load_matrices` reads them.
SFA_DEVICE void store_matrices(const Tile& tile, uint32_t offset, const uint32_t (&fragment)[4]) {
#ifdef SFA_EMULATION
    struct Lane {
        uint32_t offset, fragment[4];
    } mine{offset, {fragment[0], fragment[1], fragment[2], fragment[3]}};
    const Lane* all = emu::gather(mine, "stmatrix", __builtin_LINE());
    for (int m = 0; m < 4; m++) store(tile, all[m * 8 + emu::lane() / 4].offset + emu::lane() % 4 * 4, fragment[m]);
#else
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(tile.address + offset),
                 "r"(fragment[0]), "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
                 : "memory");
#endif
}

// One 8x8 matrix of halves, transposed: lane l has row l / 4, halves l % 4 * 2 and the next.
SFA_DEVICE uint32_t transpose(uint32_t pair) {
#ifdef SFA_EMULATION
    const uint32_t* all = emu::gather(pair, "movmatrix", __builtin_LINE());
    int row = emu::lane() / 4, column = emu::lane() % 4 * 2;
    auto half = [&](int from) { return all[from * 4 + row / 2] >> row % 2 * 16 & 0xffffu; };
    return half(column) | half(column + 1) << 16;
#else
    uint32_t y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(pair));
    return y;
#endif
}

// The low halves of two pairs, and the high ones.
SFA_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
SFA_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

// Four bytes of eight: those of `a` are numbers 0 to 3, those of `b` 4 to 7. `picked` has a number in every 4 bits.
SFA_DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t picked) {
#ifdef SFA_EMULATION
    uint64_t bytes = a | uint64_t(b) << 32;
    uint32_t y = 0;
    for (int i = 0; i < 4; i++) y |= uint32_t(bytes >> (picked >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return y;
#else
    return __byte_perm(a, b, picked);
#endif
}

// a * b + c of pairs, rounded once.
SFA_DEVICE uint32_t fused_pairs(F16, uint32_t a, uint32_t b, uint32_t c) {
#ifdef SFA_EMULATION
    return F16::pack(low<F16>(a) * low<F16>(b) + low<F16>(c), high<F16>(a) * high<F16>(b) + high<F16>(c));
#else
    uint32_t y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
#endif
}

SFA_DEVICE uint32_t fused_pairs(BF16, uint32_t a, uint32_t b, uint32_t c) {
#ifdef SFA_EMULATION
    return BF16::pack(low<BF16>(a) * low<BF16>(b) + low<BF16>(c), high<BF16>(a) * high<BF16>(b) + high<BF16>(c));
#else
    uint32_t y;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
#endif
}

#ifdef SFA_EMULATION
struct MmaOperands {
    float a[8], b[4];
};

template <class T>
inline void emulated_multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    MmaOperands mine;
    for (int i = 0; i < 4; i++) mine.a[2 * i] = low<T>(a[i]), mine.a[2 * i + 1] = high<T>(a[i]);
    mine.b[0] = low<T>(b0), mine.b[1] = high<T>(b0), mine.b[2] = low<T>(b1), mine.b[3] = high<T>(b1);
    const MmaOperands* all = emu::gather(mine, "mma", __builtin_LINE());
    int row = emu::lane() / 4, column = emu::lane() % 4 * 2;
    for (int i = 0; i < 4; i++) {
        // Row row + 8 * (i / 2) of A (16x16), column column + i % 2 of B (16x8).
        float sum = 0;
        for (int lane = 0; lane < 4; lane++) {
            const float* left = all[row * 4 + lane].a + i / 2 * 2;
            const float* right = all[(column + i % 2) * 4 + lane].b;
            sum += left[0] * right[0] + left[1] * right[1] + left[4] * right[2] + left[5] * right[3];
        }
        c[i] += sum;
    }
}
#endif

// c (16x8) += a (16x16) * b (16x8), f32 sums. Lane l holds rows l / 4 and l / 4 + 8, columns l % 4 * 2 and the next.
SFA_DEVICE void multiply_add(F16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef SFA_EMULATION
    emulated_multiply_add<F16>(c, a, b0, b1);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

SFA_DEVICE void multiply_add(BF16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef SFA_EMULATION
    emulated_multiply_add<BF16>(c, a, b0, b1);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

}  // namespace hw
