// Observed mass: each row's local softmax, then the mass that it gave each token. Three versions: a warp per row or
// token, for f32 and for unaligned rows; on tensor cores for f16 and bf16, in two passes for any window; and in one
// pass for the usual windows (observe_band.cuh).
#include "lib/attention.cuh"
#include "decide/observe_band.cuh"
#include "decide/observe_row.cuh"
#include "lib/softmax.cuh"

// ---- a warp per row or token

// Calls visit(column, logit) for every local column of a row, in all lanes.
template <class T, class Visit>
__device__ void local_columns(Global<const T> q, Global<const T> k, const ObservedParams& p, const List& list,
                              unsigned head, unsigned row, Visit visit) {
  unsigned first = row + 1 > p.window ? row + 1 - p.window : 0, sinks = p.sinks < first ? p.sinks : first;
  for (unsigned i = 0; i < sinks + (row + 1 - first); i++) {
    unsigned t = i < sinks ? i : first + (i - sinks);
    Products both =
        products(q, p.q.at(list.batch, head, row), k, p.k.at(list.batch, list.kv_head, t), p.sizes.head_dim);
    visit(t, both.dot * p.scale);
  }
}

// The log-sum-exp of each row's local softmax, (batch, heads, tokens). Grid (tokens / 4, batch * heads): lists are
// query heads.
template <class T>
__device__ void observe_rows(Global<const T> q, Global<const T> k, Global<float> log_sum_exp, const ObservedParams& p) {
  unsigned row = warp_pair();
  if (row >= p.sizes.tokens) return;
  List list(p.sizes, blockIdx.y);
  float maximum = -INFINITY, sum = 0.0f;
  local_columns(q, k, p, list, list.first_head, row, [&](unsigned, float logit) {
    // A NaN never becomes the maximum; it makes the sum NaN.
    float larger = logit > maximum ? logit : maximum;
    sum = sum * expf(maximum - larger) + expf(logit - larger);
    maximum = larger;
  });
  if (threadIdx.x % 32 == 0) log_sum_exp.set((size_t)blockIdx.y * p.sizes.tokens + row, maximum + logf(sum));
}

// Bits of every head of a KV head: the mass that rows t + W/2 .. t + W - 1 gave token t, times its value's norm,
// against the group's thresholds. Lists are KV heads.
template <class T>
__device__ void observe_bits(Global<const T> q, Global<const T> k, Global<const T> v, Global<const float> log_sum_exp,
                              const Tests& tests, Global<uint8_t> bits, const ObservedParams& p) {
  unsigned t = warp_pair(), pairs = p.sizes.tokens - 1, dim = p.sizes.head_dim;
  if (t >= pairs) return;
  List list(p.sizes, blockIdx.y);
  size_t first = (size_t)list.batch * p.sizes.heads + list.first_head;
  bool bit = false;
  if (t >= p.sinks && (size_t)t + p.window + 1 <= pairs) {
    float mass = 0.0f;
    for (unsigned head = 0; head < list.group; head++) {
      for (unsigned row = t + p.window / 2; row < t + p.window; row++) {
        size_t query = p.q.at(list.batch, list.first_head + head, row), key = p.k.at(list.batch, list.kv_head, t);
        float logit = products(q, query, k, key, dim).dot * p.scale;
        mass += expf(logit - log_sum_exp[(first + head) * p.sizes.tokens + row]);
      }
    }
    size_t value = p.v.at(list.batch, list.kv_head, t);
    bit = mass * products(v, value, v, value, dim).norm_a < observed_threshold(tests, first, list.group);
  }
  for (unsigned head = threadIdx.x % 32; head < list.group; head += 32) bits.set((first + head) * pairs + t, bit);
}

#define OBSERVE(suffix, T)                                                                                             \
    KERNEL observe_rows_##suffix(Global<const T> q, Global<const T> k, Global<float> log_sum_exp, ObservedParams p) { \
        observe_rows(q, k, log_sum_exp, p);                                                                            \
    }                                                                                                                  \
    KERNEL observe_bits_##suffix(Global<const T> q, Global<const T> k, Global<const T> v,                              \
                                 Global<const float> log_sum_exp, Global<const float> many, Global<uint8_t> bits,      \
                                 ObservedParams p, const __grid_constant__ FewTests few) {                             \
        observe_bits(q, k, v, log_sum_exp, Tests{many, few}, bits, p);                                                 \
    }
FOR_EACH_DTYPE(OBSERVE)

// ---- on tensor cores: tiles of 64 tokens. A block keeps one tile and streams the tiles of its band through two
// buffers: one is copied while the other is multiplied.

template <class T, int D>
struct ObserveBlock {
    static constexpr int THREADS = 128, ROWS = 64, NT = ROWS / 8;
    // A tile that stays and two that are streamed, each of these with a word a row where bits are decided.
    static constexpr uint32_t TILE = ROWS * D * 2, WORDS = ROWS * 4, WORDS_AT = 3 * TILE,
                              BYTES = WORDS_AT + 2 * WORDS;

    hw::Tile own;
    Fragments<D> own_rows, other_rows;
    int lane;

    SFA_DEVICE ObserveBlock()
        : own(hw::tile(0, TILE)), own_rows(false, threadIdx.x / 32 * 16), other_rows(true, 0), lane(threadIdx.x % 32) {}

    SFA_DEVICE static hw::Tile other(int step) { return hw::tile(TILE + step % 2 * TILE, TILE); }
    // A word for each row of `other`.
    SFA_DEVICE static hw::Tile words(int step) { return hw::tile(WORDS_AT + step % 2 * WORDS, WORDS); }

    // The rows (r: 0 or 1) and columns (i: 0 or 1 of each eight) of this lane, counted from the tiles' first tokens.
    SFA_DEVICE int row(int r) const { return threadIdx.x / 32 * 16 + r * 8 + lane / 4; }
    SFA_DEVICE int column(int n, int i) const { return n * 8 + lane % 4 * 2 + i; }

    SFA_DEVICE static void load(const hw::Tile& tile, const Halves& source, const Rows& rows, uint32_t batch,
                                uint32_t head, int first, int count, uint32_t dim) {
        load_rows<Layout<D>, ROWS, THREADS, false>(tile, source, rows.at(batch, head, first), rows.token_stride, count,
                                                   dim);
    }

    // Own rows times the first `count` rows of the other tile.
    SFA_DEVICE void products(float (&s)[1][NT][4], int step, int count) const {
#pragma unroll
        for (int i = 0; i < NT * 4; i++) s[0][i / 4][i % 4] = 0;
        multiply_rows<T, D, 1, NT, true>(s, own_rows, own, other_rows, other(step), Span{0, count});
    }
};

// The log-sum-exp, in base 2, of each row's local softmax: (batch, heads, tokens). Grid (tokens / 64, batch * heads).
// A tile of queries stays; keys stream: those of the sinks that come before the band, then the band.
template <class T, int D>
__device__ __forceinline__ void observe_row_tiles(const Halves& q, const Halves& k, const Global<float>& log_sum_exp,
                                             const ObservedParams& p) {
    typedef ObserveBlock<T, D> Block;
    Block block;
    uint32_t batch = blockIdx.y / p.sizes.heads, head = blockIdx.y % p.sizes.heads;
    uint32_t kv_head = head / (p.sizes.heads / p.sizes.kv_heads);
    int first_row = blockIdx.x * Block::ROWS, row_end = min(int(p.sizes.tokens), first_row + Block::ROWS);
    int window = p.window, band = max(0, first_row - window + 1), sinks = min(int(p.sinks), band);
    int sink_tiles = (sinks + Block::ROWS - 1) / Block::ROWS;
    int tiles = sink_tiles + (row_end - band + Block::ROWS - 1) / Block::ROWS;
    auto first = [&](int tile) {
        return tile < sink_tiles ? tile * Block::ROWS : band + (tile - sink_tiles) * Block::ROWS;
    };
    auto count = [&](int tile) { return min(Block::ROWS, (tile < sink_tiles ? sinks : row_end) - first(tile)); };
    auto load = [&](int tile) {
        Block::load(Block::other(tile), k, p.k, batch, kv_head, first(tile), count(tile), p.sizes.head_dim);
        hw::copy_commit();
    };
    Block::load(block.own, q, p.q, batch, head, first_row, row_end - first_row, p.sizes.head_dim);
    load(0);
    float scale = p.scale * LOG2_E;
    OnlineSoftmax<2> softmax;
    for (int r = 0; r < 2; r++) softmax.maximum[r] = -hw::infinity(), softmax.sum[r] = 0;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
        hw::copy_wait<0>();
        __syncthreads();
        if (tile + 1 < tiles) load(tile + 1);
        float s[1][Block::NT][4];
        block.products(s, tile, count(tile));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            int row = first_row + block.row(r);
            float largest = -hw::infinity();
#pragma unroll
            for (int i = 0; i < 2 * Block::NT; i++) {
                float& logit = s[0][i / 2][r * 2 + i % 2];
                int column = block.column(i / 2, i % 2), token = first(tile) + column;
                bool seen = column < count(tile) && token <= row && (row - token < window || token < int(p.sinks));
                logit = seen ? logit * scale : -hw::infinity();
                largest = hw::max(largest, logit);
            }
            softmax.sum[r] *= softmax.raise(r, largest);
            float base = softmax.base(r);
#pragma unroll
            for (int i = 0; i < 2 * Block::NT; i++) softmax.sum[r] += hw::exp2(s[0][i / 2][r * 2 + i % 2] - base);
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = first_row + block.row(r);
        softmax.finish(r);
        if (row < row_end && block.lane % 4 == 0)
            log_sum_exp.set(int64_t(blockIdx.y) * p.sizes.tokens + row, softmax.log_sum_exp(r));
    }
}

// Bits of every head of a KV head, (batch, heads, tokens - 1): the mass that rows t + W/2 .. t + W - 1 gave token t,
// times its value's norm, against the group's threshold. Grid (pairs / 64, batch * kv_heads). A tile of keys stays;
// queries of all the group's heads stream, with their log-sum-exps.
template <class T, int D>
__device__ __forceinline__ void observe_bit_tiles(const Halves& q, const Halves& k, const Halves& v,
                                             const Floats& log_sum_exp, const Tests& tests,
                                             const Global<uint8_t>& bits, const ObservedParams& p) {
    typedef ObserveBlock<T, D> Block;
    Block block;
    uint32_t batch = blockIdx.y / p.sizes.kv_heads, kv_head = blockIdx.y % p.sizes.kv_heads;
    uint32_t group = p.sizes.heads / p.sizes.kv_heads, first_head = kv_head * group;
    int64_t first_list = int64_t(batch) * p.sizes.heads + first_head;
    int tokens = p.sizes.tokens, pairs = tokens - 1, window = p.window;
    // Later tokens have not been seen by all the rows that decide them.
    int first_token = blockIdx.x * Block::ROWS, decided = min(pairs - window, first_token + Block::ROWS);
    int first_row = first_token + window / 2, rows = decided > first_token ? decided + window - 1 - first_row : 0;
    int tiles = (rows + Block::ROWS - 1) / Block::ROWS, steps = tiles * int(group);
    auto first = [&](int step) { return first_row + step % tiles * Block::ROWS; };
    auto count = [&](int step) { return min(Block::ROWS, first_row + rows - first(step)); };
    auto load = [&](int step) {
        uint32_t head = step / tiles;
        Block::load(Block::other(step), q, p.q, batch, first_head + head, first(step), count(step), p.sizes.head_dim);
        load_words<Block::ROWS>(Block::words(step), log_sum_exp, (first_list + head) * tokens + first(step),
                                count(step));
        hw::copy_commit();
    };
    Block::load(block.own, k, p.k, batch, kv_head, first_token, min(Block::ROWS, tokens - first_token),
                p.sizes.head_dim);
    if (steps > 0) load(0);
    float scale = p.scale * LOG2_E, mass[2] = {0, 0};
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        hw::copy_wait<0>();
        __syncthreads();
        if (step + 1 < steps) load(step + 1);
        float s[1][Block::NT][4];
        block.products(s, step, count(step));
        hw::Tile sums = Block::words(step);
#pragma unroll
        for (int n = 0; n < Block::NT; n++) {
            float2 sum = hw::load<float2>(sums, block.column(n, 0) * 4);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int column = block.column(n, i % 2), age = first(step) + column - first_token - block.row(i / 2);
                bool counts = column < count(step) && age >= window / 2 && age < window;
                float weight = hw::exp2(s[0][n][i] * scale - (i % 2 ? sum.y : sum.x));
                mass[i / 2] += counts ? weight : 0.f;
            }
        }
    }
    if (steps == 0) hw::copy_wait<0>();
    float least = observed_threshold(tests, first_list, group);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int token = first_token + block.row(r);
        float squares = 0;
        if (token < decided) {
            for (uint32_t d = block.lane % 4 * 8; d < p.sizes.head_dim; d += 32) {
                uint4 x = load_vector<uint4>(v, p.v.at(batch, kv_head, token) + d);
                squares = hw::dot<T>(x, x, squares);
            }
        }
#pragma unroll
        for (int lanes = 1; lanes < 4; lanes *= 2) {
            squares += hw::shuffle_xor(squares, lanes);
            mass[r] += hw::shuffle_xor(mass[r], lanes);
        }
        if (token >= pairs || block.lane % 4 != 0) continue;
        bool bit = token >= int(p.sinks) && token < decided && mass[r] * sqrtf(squares) < least;
        for (uint32_t head = 0; head < group; head++) bits.set((first_list + head) * pairs + token, bit);
    }
}

#define OBSERVE_TILES(D, dtype, T)                                                                                    \
    SHARED_BYTES(observe_rows_##D##_##dtype, ObserveBlock<T, D>::WORDS_AT)                                            \
    SHARED_BYTES(observe_bits_##D##_##dtype, ObserveBlock<T, D>::BYTES)                                               \
    KERNEL __launch_bounds__(128)                                                                                     \
        observe_rows_##D##_##dtype(Halves q, Halves k, Global<float> log_sum_exp, ObservedParams p) {                 \
        observe_row_tiles<T, D>(q, k, log_sum_exp, p);                                                                \
    }                                                                                                                 \
    KERNEL __launch_bounds__(128) observe_bits_##D##_##dtype(Halves q, Halves k, Halves v, Floats log_sum_exp,        \
                                                             Floats many, Global<uint8_t> bits, ObservedParams p,     \
                                                             const __grid_constant__ FewTests few) {                  \
        observe_bit_tiles<T, D>(q, k, v, log_sum_exp, Tests{many, few}, bits, p);                                     \
    }

// As `Band` in src/cuda/observe.rs; BLOCKS: resident blocks a multiprocessor.
#define OBSERVE_BAND(D, BAND, WARPS, BLOCKS, dtype, T)                                                                \
    OBSERVE_BAND_OF(observe_band_##D##_##BAND##_##dtype, D, BAND, WARPS, BLOCKS, false, T)                            \
    OBSERVE_BAND_OF(observe_whole_##D##_##BAND##_##dtype, D, BAND, WARPS, BLOCKS, true, T)
#define OBSERVE_BAND_OF(name, D, BAND, WARPS, BLOCKS, WHOLE, T)                                                       \
    SHARED_BYTES(name, ObserveBand<T, D, BAND, WARPS, WHOLE>::BYTES)                                                  \
    KERNEL __launch_bounds__(32 * WARPS, BLOCKS) name(Halves q, Halves k, Halves v, Floats many, Global<uint8_t> bits, \
                                                      ObservedParams p, const __grid_constant__ FewTests few) {       \
        observe_band<T, D, BAND, WARPS, WHOLE>(q, k, v, Tests{many, few}, bits, p);                                   \
    }

#define OBSERVE_DTYPE(dtype, T)                                                                                       \
    OBSERVE_TILES(64, dtype, T) OBSERVE_TILES(128, dtype, T) OBSERVE_TILES(256, dtype, T)                             \
    OBSERVE_BAND(64, 6, 8, 3, dtype, T) OBSERVE_BAND(128, 6, 10, 2, dtype, T)                                         \
    OBSERVE_BAND(64, 10, 8, 2, dtype, T) OBSERVE_BAND(128, 10, 8, 2, dtype, T)

OBSERVE_DTYPE(f16, hw::F16)
OBSERVE_DTYPE(bf16, hw::BF16)

#define DTYPE_ENTRIES(dtype)                                                                                          \
    ENTRY(observe_rows_64_##dtype) ENTRY(observe_rows_128_##dtype) ENTRY(observe_rows_256_##dtype)                    \
    ENTRY(observe_bits_64_##dtype) ENTRY(observe_bits_128_##dtype) ENTRY(observe_bits_256_##dtype)                    \
    ENTRY(observe_band_64_6_##dtype) ENTRY(observe_band_128_6_##dtype)                                                \
    ENTRY(observe_band_64_10_##dtype) ENTRY(observe_band_128_10_##dtype)                                              \
    ENTRY(observe_whole_64_6_##dtype) ENTRY(observe_whole_128_6_##dtype)                                              \
    ENTRY(observe_whole_64_10_##dtype) ENTRY(observe_whole_128_10_##dtype)

MODULE(observe, ENTRIES(observe_rows) ENTRIES(observe_bits) DTYPE_ENTRIES(f16) DTYPE_ENTRIES(bf16))
