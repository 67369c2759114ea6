// Which pairs merge. Warps are given pairs: grid (pairs / 4, batch * lists), 4 warps a block, except where it says
// otherwise.
#include "cosine.cuh"
#include "warp_row.cuh"

// candidates[list][t]: whether the pair t passes by itself. Everything else that the causal rule asks of a token happens
// within a stretch of candidates. Grid (pairs / 16, batch * lists): a warp takes four pairs.
template <class T>
__device__ void candidates(Global<const T> q, Global<const T> k, Global<const float> tests, Global<uint8_t> out,
                           const DecideParams& p) {
  unsigned first = warp_pair() * 4, pairs = p.sizes.tokens - 1, dim = p.sizes.head_dim;
  if (first >= pairs) return;
  List list(p.sizes, blockIdx.y);
  if (!p.key_key || dim > 128) {
    for (unsigned t = first; t < first + 4 && t < pairs; t++) {
      bool pass = t >= p.sinks && passes(q, k, tests, p, list, t + 1, t);
      if (threadIdx.x % 32 == 0) out.set((size_t)blockIdx.y * pairs + t, pass);
    }
    return;
  }
  // Eight lanes a pair, each with every eighth stretch of eight numbers: the four pairs' sums run side by side.
  unsigned lane = threadIdx.x % 8, t = first + threadIdx.x % 32 / 8;
  float dot = 0.0f, aa = 0.0f, bb = 0.0f;
  if (t < pairs) {
    size_t at_a = p.k.at(list.batch, list.kv_head, t + 1), at_b = p.k.at(list.batch, list.kv_head, t);
    for (unsigned d = lane * 8; d < dim; d += 64) {
      float x[8], y[8];
      load_eight(k, at_a + d, x);
      load_eight(k, at_b + d, y);
#pragma unroll
      for (unsigned i = 0; i < 8; i++) dot += x[i] * y[i], aa += x[i] * x[i], bb += y[i] * y[i];
    }
  }
#pragma unroll
  for (unsigned lanes = 4; lanes > 0; lanes /= 2) {
    dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
    aa += __shfl_xor_sync(0xffffffffu, aa, lanes);
    bb += __shfl_xor_sync(0xffffffffu, bb, lanes);
  }
  if (t >= pairs || lane != 0) return;
  float cosine = Products{dot, sqrtf(aa), sqrtf(bb)}.cosine();
  bool pass = t >= p.sinks;
  for (unsigned head = list.first_head; pass && head < list.first_head + list.group; head++)
    pass = HeadTest(tests, list.batch * p.sizes.heads + head).passes(cosine);
  out.set((size_t)blockIdx.y * pairs + t, pass);
}

// The causal rule: the warp of a stretch's first pair walks along it. Bits are (batch, heads, pairs).
template <class T>
__device__ void runs(Global<const T> q, Global<const T> k, Global<const float> tests, Global<const uint8_t> candidates,
                     Global<uint8_t> bits, const DecideParams& p) {
  unsigned t = warp_pair(), pairs = p.sizes.tokens - 1;
  if (t >= pairs) return;
  List list(p.sizes, blockIdx.y);
  Global<const uint8_t> candidate = candidates + (size_t)blockIdx.y * pairs;
  size_t first = ((size_t)list.batch * p.sizes.heads + list.first_head) * pairs;
  auto write = [&](unsigned pair, bool bit) {
    for (unsigned head = threadIdx.x % 32; head < list.group; head += 32) bits.set(first + (size_t)head * pairs + pair, bit);
  };
  if (!candidate[t]) return write(t, false);
  if (t > 0 && candidate[t - 1]) return;
  bool running = false;
  for (unsigned start = t; t < pairs && candidate[t]; t++) {
    bool merges = !running || (t - start < p.max_merge_level && passes(q, k, tests, p, list, t + 1, start));
    if (merges && !running) start = t;
    running = merges;
    write(t, merges);
  }
}

// The reference rule's candidates: bit l of levels[head][t] is whether token t + l + 1 passes against token t. Lists are
// query heads.
template <class T>
__device__ void levels(Global<const T> q, Global<const T> k, Global<const float> tests, Global<uint8_t> levels,
                       Global<uint8_t> bits, const DecideParams& p) {
  unsigned t = warp_pair(), pairs = p.sizes.tokens - 1, reached = 0;
  if (t >= pairs) return;
  List list(p.sizes, blockIdx.y);
  for (unsigned level = 0; level < p.levels && t + level < pairs; level++)
    reached |= (unsigned)passes(q, k, tests, p, list, t + level + 1, t) << level;
  if (threadIdx.x % 32 != 0) return;
  levels.set((size_t)blockIdx.y * pairs + t, (uint8_t)reached);
  bits.set((size_t)blockIdx.y * pairs + t, (uint8_t)(reached & 1));
}

// Sweeps go on while the one before cleared a bit and somewhere in the call two neighbouring bits are set.
// flags[2 * sweep]: two neighbours are set; flags[2 * sweep + 1]: the sweep cleared a bit. A thread per pair.
KERNEL decide_adjacent(Global<const uint8_t> bits, Global<uint32_t> flags, SweepParams p) {
  size_t t = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (p.sweep > 0 && !flags[2 * p.sweep - 1]) return;
  if (t + 1 >= p.pairs) return;
  Global<const uint8_t> head = bits + (size_t)blockIdx.y * p.pairs;
  if (head[t] && head[t + 1]) flags.set(2 * p.sweep, 1);
}

// The number of a set bit in its run, from 0 (from 1 in the run at the very start); more than `levels` is not told apart.
__device__ unsigned number_in_run(Global<const uint8_t> head, unsigned t, unsigned levels) {
  unsigned before = 0;
  while (before <= levels && before < t && head[t - before - 1]) before++;
  return before + (before == t);
}

KERNEL decide_sweep(Global<const uint8_t> levels, Global<const uint8_t> bits, Global<uint8_t> swept,
                    Global<uint32_t> flags, SweepParams p) {
  unsigned t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= p.pairs) return;
  Global<const uint8_t> head = bits + (size_t)blockIdx.y * p.pairs;
  bool bit = head[t];
  if (bit && flags[2 * p.sweep]) {
    unsigned number = number_in_run(head, t, p.levels);
    bool unreachable = number >= 1 && number < p.levels && !(levels[(size_t)blockIdx.y * p.pairs + t] >> number & 1);
    if (number > p.levels || unreachable) {
      bit = false;
      flags.set(2 * p.sweep + 1, 1);
    }
  }
  swept.set((size_t)blockIdx.y * p.pairs + t, bit);
}

#define DECIDE(suffix, T)                                                                                             \
  KERNEL decide_candidates_##suffix(Global<const T> q, Global<const T> k, Global<const float> tests,                  \
                                    Global<uint8_t> out, DecideParams p) {                                            \
    candidates(q, k, tests, out, p);                                                                                  \
  }                                                                                                                   \
  KERNEL decide_runs_##suffix(Global<const T> q, Global<const T> k, Global<const float> tests,                        \
                              Global<const uint8_t> candidates, Global<uint8_t> bits, DecideParams p) {               \
    runs(q, k, tests, candidates, bits, p);                                                                           \
  }                                                                                                                   \
  KERNEL decide_levels_##suffix(Global<const T> q, Global<const T> k, Global<const float> tests, Global<uint8_t> out, \
                                Global<uint8_t> bits, DecideParams p) {                                               \
    levels(q, k, tests, out, bits, p);                                                                                \
  }
FOR_EACH_DTYPE(DECIDE)

MODULE(decide, ENTRIES(decide_candidates) ENTRIES(decide_runs) ENTRIES(decide_levels) ENTRY(decide_adjacent)
                   ENTRY(decide_sweep))
