// Which pairs merge. Four warps a block.
#include "decide/observe_row.cuh"
#include "lib/cosine.cuh"
#include "lib/hw.cuh"
#include "lib/warp_row.cuh"

// The tests of all query heads of a list on one cosine.
struct GroupTest {
  float similar = INFINITY, different = INFINITY;
  bool off = false, compares_similar = false, compares_different = false;

  __device__ GroupTest(const Tests& tests, size_t first, unsigned heads) {
    for (unsigned head = 0; head < heads; head++) {
      HeadTest test(tests, first + head);
      if (test.strategy == SIMILARITY) compares_similar = true, similar = fminf(similar, test.threshold);
      else if (test.strategy == DIFFERENCE) compares_different = true, different = fminf(different, test.threshold);
      else off = true;
    }
  }
  // Strict, and false for NaN.
  __device__ __forceinline__ bool passes(float cosine) const {
    return !off && (!compares_similar || 1.0f - cosine < similar) && (!compares_different || fabsf(cosine) < different);
  }
};

// Rows that are compared one after another: token t starts at `first` + t * `stride`.
template <class T> struct Track {
  Global<const T> rows;
  size_t first, stride;
};

// Pairs that eight lanes walk through, and those of a warp.
constexpr unsigned WALK = 16, WARP_PAIRS = 4 * WALK;

// Bit i: whether the cosine of left token t + i + 1 and right token t + i passes, for i < count <= WALK; the same in
// all of the eight lanes that share t. PARTS: 64 dimensions each. SAME: both tracks are the keys, and each key is read
// once.
template <class T, unsigned PARTS, bool SAME>
__device__ __forceinline__ unsigned walk(const Track<T>& left, const Track<T>& right, unsigned t, unsigned count,
                                         unsigned dim, const GroupTest& test) {
  // Few rows in flight a thread leave registers for many warps.
  constexpr unsigned FIT = 4 / sizeof(T) / PARTS, AHEAD = FIT > 1 ? FIT : 1;
  unsigned at = threadIdx.x % 8 * 8, mask = 0;
  float before[PARTS][8], before_norm = 0.0f;
  auto load = [&](Eight<T>(&row)[PARTS], const Track<T>& track, unsigned token) {
#pragma unroll
    for (unsigned part = 0; part < PARTS; part++)
      if (part * 64 + at < dim) row[part].load(track.rows, track.first + token * track.stride + part * 64 + at);
  };
  auto spread = [&](float (&x)[PARTS][8], const Eight<T>(&row)[PARTS]) {
#pragma unroll
    for (unsigned i = 0; i < PARTS * 8; i++) x[i / 8][i % 8] = i / 8 * 64 + at < dim ? row[i / 8][i % 8] : 0.0f;
  };
  auto sum = [](float x) {
#pragma unroll
    for (unsigned lanes = 4; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
  };
  if (SAME) {
    Eight<T> row[PARTS] = {};
    if (count > 0) load(row, right, t);
    spread(before, row);
#pragma unroll
    for (unsigned i = 0; i < PARTS * 8; i++) before_norm += before[i / 8][i % 8] * before[i / 8][i % 8];
    before_norm = sqrtf(sum(before_norm));
  }
#pragma unroll 1
  for (unsigned first = 0; __any_sync(0xffffffffu, first < count); first += AHEAD) {
    Eight<T> next[AHEAD][PARTS] = {}, beside[SAME ? 1 : AHEAD][PARTS] = {};
#pragma unroll
    for (unsigned i = 0; i < AHEAD; i++) {
      if (first + i < count) load(next[i], left, t + first + i + 1);
      if (!SAME && first + i < count) load(beside[SAME ? 0 : i], right, t + first + i);
    }
#pragma unroll
    for (unsigned i = 0; i < AHEAD; i++) {
      float x[PARTS][8], dot = 0.0f, norm = 0.0f, other = 0.0f;
      spread(x, next[i]);
      if (!SAME) spread(before, beside[SAME ? 0 : i]);
#pragma unroll
      for (unsigned j = 0; j < PARTS * 8; j++) {
        float a = x[j / 8][j % 8], b = before[j / 8][j % 8];
        dot += a * b, norm += a * a;
        if (!SAME) other += b * b;
      }
      dot = sum(dot), norm = sqrtf(sum(norm));
      if (!SAME) before_norm = sqrtf(sum(other));
      bool pass = first + i < count && test.passes(Products{dot, norm, before_norm}.cosine());
      mask |= (unsigned)pass << (first + i);
      if (!SAME) continue;
      before_norm = norm;
#pragma unroll
      for (unsigned j = 0; j < PARTS * 8; j++) before[j / 8][j % 8] = x[j / 8][j % 8];
    }
  }
  return mask;
}

// The candidates of one list: pairs that pass their own test.
template <class T, unsigned PARTS> struct Candidates {
  Global<const T> q, k;
  Global<const float> bias;
  Tests tests;
  const DecideParams& p;
  const List& list;

  // Whether the row of pair t's second token sees both of its tokens by every head's bias.
  __device__ __forceinline__ bool seen(unsigned t) const {
    bool all = true;
    if (t + 1 < p.first_row) return all;
    unsigned row = t + 1 - p.first_row;
    for (unsigned head = list.first_head; head < list.first_head + list.group; head++) {
      float left = bias[p.bias.at(list.batch, head, row, t)], right = bias[p.bias.at(list.batch, head, row, t + 1)];
      all = all && left != -INFINITY && right != -INFINITY;
    }
    return all;
  }

  // Bit i: `seen(t + i)`, for i < count <= WALK; each group of eight lanes may ask for another t.
  __device__ unsigned all_seen(unsigned t, unsigned count) const {
    unsigned mask = 0;
    for (unsigned i = threadIdx.x % 8; i < count; i += 8) mask |= (unsigned)seen(t + i) << i;
#pragma unroll
    for (unsigned lanes = 4; lanes > 0; lanes /= 2) mask |= __shfl_xor_sync(0xffffffffu, mask, lanes);
    return mask;
  }

  // Bit i: whether pair t + i is a candidate, for i < count <= WALK; each group of eight lanes may ask for another t.
  // PARTS 0: all lanes ask for the same t, and for one pair.
  __device__ __forceinline__ unsigned operator()(unsigned t, unsigned count) const {
    size_t first = (size_t)list.batch * p.sizes.heads + list.first_head;
    if constexpr (PARTS == 0) {
      return count > 0 && t >= p.sinks && (!bias || seen(t)) && passes(q, k, tests, p, list, t + 1, t);
    } else {
      Track<T> keys = {k, p.k.at(list.batch, list.kv_head, 0), p.k.token_stride};
      unsigned dim = p.sizes.head_dim;
      unsigned all = p.key_key ? walk<T, PARTS, true>(keys, keys, t, count, dim, GroupTest(tests, first, list.group))
                               : queries_beside(keys, first, t, count);
      if (bias) all &= all_seen(t, count);
      // The first tokens stay.
      unsigned sunk = p.sinks > t ? min(p.sinks - t, WALK) : 0;
      return all & ~((1u << sunk) - 1);
    }
  }

  // The same for query-key cosines: each query head's next token against the track of keys.
  __device__ __forceinline__ unsigned queries_beside(const Track<T>& keys, size_t first, unsigned t,
                                                     unsigned count) const {
    unsigned all = ~0u;
    for (unsigned head = 0; head < list.group; head++) {
      Track<T> queries = {q, p.q.at(list.batch, list.first_head + head, 0), p.q.token_stride};
      all &= walk<T, PARTS, false>(queries, keys, t, count, p.sizes.head_dim, GroupTest(tests, first + head, 1));
    }
    return all;
  }

  // Whether token t + 1 passes against token `start`. Each group of eight lanes may ask for another pair of tokens; if
  // it does not ask, it gets false. PARTS 0: all lanes ask for the same pair.
  __device__ __forceinline__ bool against(unsigned start, unsigned t, bool asks) const {
    if constexpr (PARTS == 0) {
      return asks && passes(q, k, tests, p, list, t + 1, start);
    } else {
      size_t first = (size_t)list.batch * p.sizes.heads + list.first_head;
      // A track on which token t is `start`.
      size_t stride = p.k.token_stride, row = p.k.at(list.batch, list.kv_head, 0);
      Track<T> keys = {k, row, stride}, still = {k, row + start * stride - t * stride, stride};
      unsigned dim = p.sizes.head_dim;
      unsigned all = p.key_key ? walk<T, PARTS, false>(keys, still, t, asks, dim, GroupTest(tests, first, list.group))
                               : queries_beside(still, first, t, asks);
      return asks && (all & 1);
    }
  }
};

// Bit i: whether pair first + i is a candidate, for the WARP_PAIRS pairs of a warp.
template <class T, unsigned PARTS>
__device__ __forceinline__ uint64_t stretch(const Candidates<T, PARTS>& candidates, unsigned first, unsigned pairs) {
  uint64_t found = 0;
  if constexpr (PARTS == 0) {
    for (unsigned i = 0; i < WARP_PAIRS && first + i < pairs; i++) found |= (uint64_t)candidates(first + i, 1) << i;
  } else {
    unsigned t = first + threadIdx.x % 32 / 8 * WALK, mine = candidates(t, t < pairs ? min(pairs - t, WALK) : 0);
#pragma unroll
    for (unsigned i = 0; i < 4; i++) found |= (uint64_t)__shfl_sync(0xffffffffu, mine, i * 8) << (i * WALK);
  }
  return found;
}

// The causal rule. Its decisions are independent from one stretch of candidates (consecutive pairs that pass their own
// test) to the next. A warp finds the candidates of WARP_PAIRS pairs and walks along each stretch that begins there, to
// the stretch's end. Each group of eight lanes walks along a stretch of its own; all lanes together walk along the one
// that leaves the warp's pairs. Grid (pairs / (4 * WARP_PAIRS), batch * lists); bits are (batch, heads, pairs).
template <class T, unsigned PARTS> struct Causal {
  const DecideParams& p;
  const List& list;
  Candidates<T, PARTS> candidates;
  Global<uint8_t> bits;
  unsigned first, pairs;
  uint64_t found;

  // For lane `lane` of the `lanes` that share the work.
  __device__ __forceinline__ void write(unsigned t, bool bit, unsigned lane, unsigned lanes) const {
    size_t at = ((size_t)list.batch * p.sizes.heads + list.first_head) * pairs + t;
    for (unsigned head = lane; head < list.group; head += lanes) bits.set(at + (size_t)head * pairs, bit);
  }

  __device__ __forceinline__ bool is_candidate(unsigned t) const { return found >> (t - first) & 1; }

  // All lanes walk along a stretch from pair t on; `running`: in a run that began at `start`.
  __device__ void walk_together(unsigned t, unsigned start, bool running) {
    constexpr unsigned AHEAD = PARTS == 0 ? 1 : 4;
    unsigned lane = threadIdx.x % 32, ahead = 0, across = 0;
    for (; t < pairs; t++) {
      if (t - first == WARP_PAIRS) first = t, found = stretch(candidates, t, pairs);
      if (!is_candidate(t)) break;
      bool merges = !running;
      if (merges) {
        start = t, ahead = 0;
      } else if (t - start < p.max_merge_level) {
        if (ahead == 0) {
          // Four tokens ahead at once, one for each group of eight lanes.
          unsigned mine = PARTS == 0 ? t : t + lane / 8;
          across = __ballot_sync(0xffffffffu, candidates.against(start, mine, mine < pairs)), ahead = AHEAD;
        }
        merges = across & 1;
        across >>= 8, ahead--;
      }
      running = merges;
      write(t, merges, lane, 32);
    }
  }

  __device__ void walk_apart(uint64_t starts) {
    constexpr unsigned ALL = 0xffffffffu, GROUPS = 0x01010101u;
    unsigned lane = threadIdx.x % 32, t = 0, start = 0;
    bool active = false, running = false, leaves = false;
    while (true) {
      // Idle groups take the next stretches, in order.
      unsigned idle = __ballot_sync(ALL, !active) & GROUPS;
      uint64_t rest = starts;
      for (int before = __popc(idle & ((1u << lane / 8 * 8) - 1)); before > 0; before--) rest &= rest - 1;
      if (!active && rest != 0) active = true, running = false, t = first + __ffsll(rest) - 1;
      for (int taken = __popc(idle); taken > 0; taken--) starts &= starts - 1;
      if (!__any_sync(ALL, active)) break;
      bool asks = false;
      while (active && !asks) {
        leaves = leaves || (t < pairs && t - first == WARP_PAIRS);
        if (t == pairs || t - first == WARP_PAIRS || !is_candidate(t)) active = false;
        else if (running && t - start < p.max_merge_level) asks = true;
        else {
          running = !running;
          if (running) start = t;
          write(t++, running, lane % 8, 8);
        }
      }
      bool merges = candidates.against(start, t, asks);
      if (!asks) continue;
      running = merges;
      write(t++, merges, lane % 8, 8);
    }
    unsigned leaving = __ballot_sync(ALL, leaves);
    if (leaving == 0) return;
    unsigned from = __ffs(leaving) - 1;
    walk_together(__shfl_sync(ALL, t, from), __shfl_sync(ALL, start, from), __shfl_sync(ALL, (unsigned)running, from));
  }
};

template <class T, unsigned PARTS>
__device__ void causal(Global<const T> q, Global<const T> k, Global<const float> bias, const Tests& tests,
                       Global<uint8_t> bits, const DecideParams& p) {
  hw::wait_for_previous();
  unsigned first = warp_pair() * WARP_PAIRS, pairs = p.sizes.tokens - 1, lane = threadIdx.x % 32;
  if (first >= pairs) return;
  List list(p.sizes, blockIdx.y);
  Candidates<T, PARTS> candidates = {q, k, bias, tests, p, list};
  Causal<T, PARTS> rule = {p, list, candidates, bits, first, pairs, stretch(candidates, first, pairs)};
  uint64_t found = rule.found;
  for (unsigned i = lane; i < WARP_PAIRS && first + i < pairs; i += 32)
    if (!(found >> i & 1)) rule.write(first + i, false, 0, 1);
  if (found == 0) return;
  bool goes_on = (found & 1) && first > 0 && (candidates(first - 1, 1) & 1);
  uint64_t starts = found & ~(found << 1 | (uint64_t)goes_on);
  if constexpr (PARTS == 0) {
    for (; starts != 0; starts &= starts - 1) {
      Causal<T, PARTS> along = rule;
      along.walk_together(first + __ffsll(starts) - 1, 0, false);
    }
  } else {
    rule.walk_apart(starts);
  }
}

// The reference rule's candidates: bit l of levels[head][t] is whether token t + l + 1 passes against token t. Lists
// are query heads; one warp per pair: grid (pairs / 4, batch * lists).
template <class T>
__device__ void levels(Global<const T> q, Global<const T> k, const Tests& tests, Global<uint8_t> levels,
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

// Sweeps go on while the previous one cleared a bit and two neighbouring bits are set anywhere in the call. flags[2 *
// sweep]: two neighbours are set; flags[2 * sweep + 1]: the sweep cleared a bit. A thread per pair.
KERNEL decide_adjacent(Global<const uint8_t> bits, Global<uint32_t> flags, SweepParams p) {
  size_t t = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (p.sweep > 0 && !flags[2 * p.sweep - 1]) return;
  if (t + 1 >= p.pairs) return;
  Global<const uint8_t> head = bits + (size_t)blockIdx.y * p.pairs;
  if (head[t] && head[t + 1]) flags.set(2 * p.sweep, 1);
}

// The number of a set bit in its run, from 0, or from 1 in the run at the very start. Numbers above `levels` are not
// told apart.
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

// Scores (batch, KV heads, N) that the caller gives. A thread per token: grid (pairs / 128, batch * KV heads).
KERNEL decide_given(Global<const float> scores, Global<const float> many, Global<uint8_t> bits, ScoreParams p,
                    const __grid_constant__ FewTests few) {
  unsigned t = blockIdx.x * blockDim.x + threadIdx.x, pairs = p.tokens - 1;
  if (t >= pairs) return;
  size_t first_head = (size_t)blockIdx.y * p.group;
  float threshold = observed_threshold(Tests{many, few}, first_head, p.group);
  bool hidden = t >= p.sinks && t < p.decided && scores[(size_t)blockIdx.y * p.tokens + t] < threshold;
  for (unsigned head = 0; head < p.group; head++) bits.set((first_head + head) * pairs + t, hidden);
}

// PARTS: 64 dimensions each; 0 for longer rows and for sizes that are no multiple of 8.
#define DECIDE_CAUSAL(suffix, T, DIM, PARTS)                                                                          \
  KERNEL __launch_bounds__(128, PARTS < 4 ? 8 : 4) decide_causal_##DIM##_##suffix(                                    \
      Global<const T> q, Global<const T> k, Global<const float> bias, Global<const float> many, Global<uint8_t> bits,  \
      DecideParams p, const __grid_constant__ FewTests few) {                                                         \
    causal<T, PARTS>(q, k, bias, Tests{many, few}, bits, p);                                                          \
  }
#define DECIDE(suffix, T)                                                                                             \
  DECIDE_CAUSAL(suffix, T, any, 0)                                                                                    \
  DECIDE_CAUSAL(suffix, T, 64, 1)                                                                                     \
  DECIDE_CAUSAL(suffix, T, 128, 2)                                                                                    \
  DECIDE_CAUSAL(suffix, T, 256, 4)                                                                                    \
  KERNEL decide_levels_##suffix(Global<const T> q, Global<const T> k, Global<const float> many, Global<uint8_t> out,  \
                                Global<uint8_t> bits, DecideParams p, const __grid_constant__ FewTests few) {         \
    levels(q, k, Tests{many, few}, out, bits, p);                                                                     \
  }
FOR_EACH_DTYPE(DECIDE)

MODULE(decide, ENTRIES(decide_causal_any) ENTRIES(decide_causal_64) ENTRIES(decide_causal_128)
                   ENTRIES(decide_causal_256) ENTRIES(decide_levels) ENTRY(decide_adjacent) ENTRY(decide_sweep)
                   ENTRY(decide_given))
