// For the emulator's own tests: one correct kernel, and one for each fault that the emulator must detect. All take the
// same arguments: `in` and `out` of `n` floats each, 64 threads a block, 64 floats of shared memory.
#include "lib/kernel.cuh"
#include "lib/mbarrier.cuh"

struct BrokenParams {
  unsigned n;
};

#define BROKEN(name) KERNEL name(Global<const float> in, Global<float> out, BrokenParams p)

// Reverses each block's elements through shared memory and adds the sum of the warp's.
BROKEN(broken_not) {
  Shared<float> shared = shared_memory<float>(0, 64);
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  float x = i < p.n ? in[i] : 0.0f;
  shared.set(threadIdx.x, x);
  __syncthreads();
  float sum = shared[63 - threadIdx.x];
  float warp = x;
  for (int lanes = 16; lanes > 0; lanes /= 2) warp += __shfl_xor_sync(0xffffffffu, warp, lanes);
  if (i < p.n) out.set(i, sum + warp);
}

BROKEN(broken_global_read) { out.set(threadIdx.x % p.n, in[blockIdx.x * blockDim.x + threadIdx.x]); }

BROKEN(broken_global_write) { out.set(blockIdx.x * blockDim.x + threadIdx.x, 1.0f); }

BROKEN(broken_before_buffer) { out.set(threadIdx.x % p.n, (in + threadIdx.x % p.n)[-1]); }

BROKEN(broken_shared_bounds) {
  Shared<float> shared = shared_memory<float>(0, 64);
  shared.set(threadIdx.x + 1, 1.0f);
}

BROKEN(broken_shared_size) {
  Shared<float> shared = shared_memory<float>(0, 65);
  shared.set(threadIdx.x, 1.0f);
}

BROKEN(broken_shared_unwritten) {
  Shared<float> shared = shared_memory<float>(0, 64);
  if (threadIdx.x != 17) shared.set(threadIdx.x, 1.0f);
  __syncthreads();
  out.set(threadIdx.x % p.n, shared[63 - threadIdx.x]);
}

BROKEN(broken_global_unwritten) { out.set(threadIdx.x % p.n, out[(threadIdx.x + 1) % p.n]); }

BROKEN(broken_misaligned) { out.set(threadIdx.x % p.n, load_vector<float4>(in, 1).x); }

BROKEN(broken_early_return) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  out.set(threadIdx.x % p.n, 1.0f);
}

BROKEN(broken_two_barriers) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out.set(threadIdx.x % p.n, 1.0f);
}

BROKEN(broken_half_warp) {
  float x = 0.0f;
  if (threadIdx.x < 16) x = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  out.set(threadIdx.x % p.n, x);
}

BROKEN(broken_missing_barrier) {
  Shared<float> shared = shared_memory<float>(0, 64);
  shared.set(threadIdx.x, 1.0f);
  out.set(threadIdx.x % p.n, shared[63 - threadIdx.x]);
}

BROKEN(broken_unwritten_output) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i + 1 < p.n) out.set(i, 1.0f);
}

// Launched early.
BROKEN(broken_waits_late) {
  out.set(threadIdx.x % p.n, 1.0f);
  hw::wait_for_previous();
}

BROKEN(broken_waits_in_part) {
  if (threadIdx.x == 5) return;
  hw::wait_for_previous();
  out.set(threadIdx.x % p.n, in[threadIdx.x % p.n]);
}

// Half of 64 threads come to the barrier.
BROKEN(broken_part_meets) {
  if (threadIdx.x < 32) hw::meet<1, 64>();
  out.set(threadIdx.x % p.n, 1.0f);
}

// 63 threads arrive where 64 are waited for.
BROKEN(broken_too_few_arrive) {
  hw::Mbarrier gate(0);
  if (threadIdx.x == 0) gate.init(64);
  __syncthreads();
  if (threadIdx.x > 0) gate.arrive();
  gate.wait(0);
  out.set(threadIdx.x % p.n, 1.0f);
}

// A correct use: 32 threads arrive, twice, and the other warp waits for them at the mbarrier.
BROKEN(broken_not_by_mbarriers) {
  hw::Mbarrier gate(8);
  if (threadIdx.x == 0) gate.init(32);
  hw::meet<2, 64>();
  Shared<float> shared = shared_memory<float>(16, 48);
  for (int turn = 0; turn < 2; turn++) {
    if (threadIdx.x < 32) shared.set(threadIdx.x, in[threadIdx.x % p.n]), gate.arrive();
    else gate.wait(turn);
    __syncthreads();
  }
  if (threadIdx.x < p.n) out.set(threadIdx.x, shared[threadIdx.x % 32]);
}

KERNEL broken_read_only(Global<float> in, Global<float> out, BrokenParams p) { in.set(0, 1.0f); }

MODULE(broken,
       ENTRY(broken_not) ENTRY(broken_global_read) ENTRY(broken_global_write) ENTRY(broken_before_buffer)
       ENTRY(broken_shared_bounds) ENTRY(broken_shared_size) ENTRY(broken_shared_unwritten)
       ENTRY(broken_global_unwritten) ENTRY(broken_misaligned) ENTRY(broken_early_return) ENTRY(broken_two_barriers)
       ENTRY(broken_half_warp) ENTRY(broken_missing_barrier) ENTRY(broken_unwritten_output) ENTRY(broken_read_only)
       ENTRY(broken_waits_late) ENTRY(broken_waits_in_part) ENTRY(broken_part_meets) ENTRY(broken_too_few_arrive)
       ENTRY(broken_not_by_mbarriers))
