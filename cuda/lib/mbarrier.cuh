// Meeting points for a part of a block's threads: named barriers and mbarriers.
//
// Sources: PTX ISA 8.0, sections 9.7.12 (bar.sync, mbarrier) and 9.7.8.22 (cp.async).
#pragma once

#include "lib/hw.cuh"

namespace hw {

// A barrier of THREADS threads, in whole warps. NUMBER is 1 to 15; __syncthreads is barrier 0.
template <int NUMBER, int THREADS>
SFA_DEVICE void meet() {
#ifdef SFA_EMULATION
    emu::named_barrier(NUMBER, THREADS, __builtin_LINE());
#else
    asm volatile("bar.sync %0, %1;" ::"n"(NUMBER), "n"(THREADS) : "memory");
#endif
}

// An mbarrier: 8 bytes of shared memory that count arrivals, phase after phase. A thread that waits for the end of a
// phase names its parity; the first phase has parity 0.
struct Mbarrier {
    static constexpr uint32_t BYTES = 8;
    Tile word;

    // Arrivals of a warp in `arrive_as_warp`. compute-sanitizer's racecheck does not see that a warp's lanes meet
    // before one of them arrives for all, and reports that their reads are overwritten. For racecheck every lane
    // arrives by itself: NVCC_APPEND_FLAGS=-DSFA_EVERY_LANE_ARRIVES, in a target folder of its own.
#ifdef SFA_EVERY_LANE_ARRIVES
    static constexpr uint32_t WARP = 32;
#else
    static constexpr uint32_t WARP = 1;
#endif

    SFA_DEVICE Mbarrier(uint32_t offset) : word(tile(offset, BYTES)) {}

    // Called by one thread, before the block meets. `count`: the arrivals of a phase.
    SFA_DEVICE void init(uint32_t count) const {
#ifdef SFA_EMULATION
        store(word, 0, uint2{count << 16 | count, 0});
#else
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(word.address), "r"(count) : "memory");
#endif
    }

    SFA_DEVICE void arrive() const {
#ifdef SFA_EMULATION
        uint2 state = load<uint2>(word, 0);
        state.x--;
        if ((state.x & 0xffff) == 0) state.x |= state.x >> 16, state.y++;
        store(word, 0, state);
        emu::note_progress();
#else
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(word.address) : "memory");
#endif
    }

    // Arrives for the whole warp, after all its lanes have come here.
    SFA_DEVICE void arrive_as_warp() const {
        __syncwarp();
        if (WARP == 32 || thread() % 32 == 0) arrive();
    }

    // Arrives once all copies that this thread has started have arrived.
    SFA_DEVICE void arrive_after_copies() const {
#ifdef SFA_EMULATION
        arrive();
#else
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(word.address) : "memory");
#endif
    }

    // Waits for the end of the latest phase of this parity; the phase before the first counts as ended.
    SFA_DEVICE void wait(uint32_t parity) const {
#ifdef SFA_EMULATION
        while ((load<uint2>(word, 0).y & 1) == parity) emu::wait_for_progress("an mbarrier", __builtin_LINE());
#else
        asm volatile(
            "{\n.reg .pred p;\nretry:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
            "@p bra done;\nbra retry;\ndone:\n}\n" ::"r"(word.address),
            "r"(parity)
            : "memory");
#endif
    }
};

}  // namespace hw
