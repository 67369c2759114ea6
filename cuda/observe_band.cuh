// Observed mass on tensor cores in one pass, where a row's band fits into registers: windows of at most 8 BAND - 15 tokens, at
// most 8 sinks.
#pragma once

#include "attention.cuh"
#include "observe_row.cuh"

// A block's tiles: the keys that its rows see, with the sinks behind them, and two stages of 16 rows a warp, each copied and
// read by that warp alone: queries of one head after the other, then values. Everything of a stage is asked for at once, and
// the next one is on its way while it is computed.
template <class T, int D, int BAND>
struct ObserveBand {
    static constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 16 * WARPS, COLUMNS = 8 * BAND, CHUNKS = D / 8;
    static constexpr int SINKS_AT = ROWS - 16 + COLUMNS, KEYS = SINKS_AT + 16;
    static constexpr uint32_t KEY_BYTES = KEYS * D * 2, STAGE_BYTES = ROWS * D * 2, WORDS_AT = KEY_BYTES + 2 * STAGE_BYTES;

    const ObservedParams& p;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4, window = p.window, tokens = p.sizes.tokens;
    hw::Tile keys = hw::tile(0, KEY_BYTES);

    SFA_DEVICE static hw::Tile stage(uint32_t index) {
        return hw::tile(KEY_BYTES + index % 2 * STAGE_BYTES, STAGE_BYTES);
    }

    // Starts the copy of COUNT tokens from `first` on to rows from `row` on, by STEP threads. Those that do not exist, and
    // from `end` on, become zeros: rows that see them decide nothing.
    template <int COUNT, int STEP>
    SFA_DEVICE void copy(const hw::Tile& to, int row, const Halves& source, const Rows& rows, uint32_t batch, uint32_t head,
                         int first, int end) const {
        static_assert(COUNT * CHUNKS % STEP == 0, "no thread has more than another");
        int64_t start = rows.at(batch, head, 0);
        int thread = threadIdx.x % STEP;
#pragma unroll
        for (int i = 0; i < COUNT * CHUNKS / STEP; i++) {
            int index = i * STEP + thread, at = index / CHUNKS, chunk = index % CHUNKS, token = first + at;
            bool valid = token >= 0 && token < end && chunk * 8 < int(p.sizes.head_dim);
            hw::copy_async(to, Layout<D>::chunk(row + at, chunk), source, start + token * rows.token_stride + chunk * 8, valid);
        }
    }

    SFA_DEVICE void copy_keys(const Halves& k, uint32_t batch, uint32_t kv_head, int first) const {
        copy<SINKS_AT, THREADS>(keys, 0, k, p.k, batch, kv_head, first, tokens);
        if (p.sinks > 0 && warp == 0) copy<16, 32>(keys, SINKS_AT, k, p.k, batch, kv_head, 0, min(8, tokens));
    }

    // This warp's rows of a stage, which are tokens from `first` on.
    SFA_DEVICE void copy_own(uint32_t index, const Halves& source, const Rows& rows, uint32_t batch, uint32_t head,
                             int first) const {
        copy<16, 32>(stage(index), warp * 16, source, rows, batch, head, first, tokens);
    }

    // A bit for each number that a lane has of its row l / 4 (r = 0) or l / 4 + 8, of columns 8 n + l % 4 * 2 + i and then of
    // sinks: the same for every head.
    struct Marks {
        uint32_t bits[2];
        SFA_DEVICE bool has(int r, int i) const { return bits[r] >> i & 1; }
    };

    // What the rows from token `row` on see, and of it what counts as mass.
    SFA_DEVICE void mark(Marks& seen, Marks& counted, int row) const {
        int first = row - window + 1;
        for (int r = 0; r < 2; r++) {
            seen.bits[r] = counted.bits[r] = 0;
            // How many tokens a row's own one comes after that of column 0; a younger one would have a negative age, which is
            // large as an unsigned number, and one before the first token a larger age than the row has.
            int own = row + lane / 4 + r * 8, age = own - first - quad * 2;
            uint32_t sees = min(window, own + 1), half = window / 2, ages = sees > half ? sees - half : 0;
            for (int i = 0; i < 2 * BAND + 2; i++) {
                int column = i / 2 * 8 + i % 2, sink = quad * 2 + i % 2;
                bool sink_seen = sink < int(p.sinks) && own - sink >= window;
                seen.bits[r] |= uint32_t(i < 2 * BAND ? uint32_t(age - column) < sees : sink_seen) << i;
                counted.bits[r] |= uint32_t(i < 2 * BAND && uint32_t(age - column - int(half)) < ages) << i;
            }
            // Or the compiler works them out anew for every head, which only pays where it spills otherwise.
            if (D > 64) continue;
            hw::keep_in_place(seen.bits[r]);
            hw::keep_in_place(counted.bits[r]);
        }
    }

    // Adds to the masses of the COLUMNS tokens from `row` - window + 1 on what the warp's 16 rows, tokens from `row` on, give
    // them: lane l has columns 8 n + l % 4 * 2 + i, and the sum over rows l / 4 and l / 4 + 8.
    SFA_DEVICE void add(float (&masses)[BAND][2], uint32_t index, const Marks& seen, const Marks& counted) const {
        // The last eight columns are the sinks that have left the window.
        float s[BAND + 1][4] = {};
        multiply(s, index);
        float scale = p.scale * LOG2_E;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float maximum = -hw::infinity(), sum = 0;
#pragma unroll
            for (int i = 0; i < 2 * BAND + 2; i++) {
                float& logit = s[i / 2][r * 2 + i % 2];
                logit = seen.has(r, i) ? logit * scale : -hw::infinity();
                maximum = hw::max(maximum, logit);
            }
            maximum = hw::max(maximum, hw::shuffle_xor(maximum, 1));
            maximum = hw::max(maximum, hw::shuffle_xor(maximum, 2));
            float base = maximum == -hw::infinity() ? 0.f : maximum;
#pragma unroll
            for (int i = 0; i < 2 * BAND + 2; i++) {
                float& weight = s[i / 2][r * 2 + i % 2];
                weight = hw::exp2(weight - base), sum += weight;
            }
            sum += hw::shuffle_xor(sum, 1);
            sum += hw::shuffle_xor(sum, 2);
            float inverse = 1.f / sum;
#pragma unroll
            for (int i = 0; i < 2 * BAND; i++)
                if (counted.has(r, i)) masses[i / 2][i % 2] += s[i / 2][r * 2 + i % 2] * inverse;
        }
    }

    // s (16 rows, 8 columns each) = a stage's queries times keys, the sinks' last.
    SFA_DEVICE void multiply(float (&s)[BAND + 1][4], uint32_t index) const {
        Fragments<D> rows(false, warp * 16), columns(true, warp * 16), sinks(true, SINKS_AT);
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            uint32_t a[4], b[4];
            hw::load_matrices(a, stage(index), rows.at(0, k));
#pragma unroll
            for (int n = 0; n < BAND / 2; n++) {
                hw::load_matrices(b, keys, columns.at(n * 16, k));
                hw::multiply_add(T(), s[2 * n], a, b[0], b[1]);
                hw::multiply_add(T(), s[2 * n + 1], a, b[2], b[3]);
            }
            if (p.sinks == 0) continue;
            hw::load_matrices(b, keys, sinks.at(0, k));
            hw::multiply_add(T(), s[BAND], a, b[0], b[1]);
        }
    }

    // The norms of this warp's values into shared memory: two lanes a row.
    SFA_DEVICE void norms(const hw::Tile& to, uint32_t index) const {
        int row = warp * 16 + lane / 2;
        float squares = 0;
#pragma unroll
        for (int i = 0; i < CHUNKS / 2; i++) {
            uint4 x = hw::load<uint4>(stage(index), Layout<D>::chunk(row, i / 4 * 8 + i % 4 + lane % 2 * 4));
            squares = hw::dot<T>(x, x, squares);
        }
        squares += hw::shuffle_xor(squares, 1);
        if (lane % 2 == 0) hw::store(to, row * 4, sqrtf(squares));
    }
};

// Bits of every head of a KV head, as observe_bits. A block has eight times 16 rows: those that a stretch of tokens is
// given mass by. Grid (pairs / (129 - (window - window / 2)), batch * kv_heads).
template <class T, int D, int BAND>
__device__ __forceinline__ void observe_band(const Halves& q, const Halves& k, const Halves& v, const Floats& tests,
                                             const Global<uint8_t>& bits, const ObservedParams& p) {
    typedef ObserveBand<T, D, BAND> Band;
    Band band = {p};
    uint32_t batch = blockIdx.y / p.sizes.kv_heads, kv_head = blockIdx.y % p.sizes.kv_heads;
    uint32_t group = p.sizes.heads / p.sizes.kv_heads, first_head = kv_head * group;
    int window = p.window, pairs = band.tokens - 1, share = Band::ROWS + 1 - (window - window / 2);
    int first_token = blockIdx.x * share;
    // Later tokens have not been looked at by all of their rows.
    int decided = min(pairs - window, first_token + share);
    constexpr uint32_t MASSES = Band::WARPS * Band::COLUMNS * 4;
    hw::Tile masses = hw::tile(Band::WORDS_AT, MASSES), norms = hw::tile(Band::WORDS_AT + MASSES, Band::ROWS * 4);
    // The first row of the block, and of the warp.
    int block_row = first_token + window / 2, row = block_row + band.warp * 16;
    // A stage of queries per head of the group, then one of values.
    auto load = [&](uint32_t stage) {
        if (stage < group) band.copy_own(stage, q, p.q, batch, first_head + stage, row);
        else if (stage == group) band.copy_own(stage, v, p.v, batch, kv_head, first_token + band.warp * 16);
        hw::copy_commit();
    };
    if (decided > first_token) {
        float sums[BAND][2] = {};
        typename Band::Marks seen, counted;
        band.copy_keys(k, batch, kv_head, block_row - window + 1);
        load(0);
        load(1);
        band.mark(seen, counted, row);
        hw::copy_wait<1>();
        __syncthreads();
#pragma unroll 1
        for (uint32_t head = 0; head < group; head++) {
            band.add(sums, head, seen, counted);
            __syncwarp();
            load(head + 2);
            hw::copy_wait<1>();
            __syncwarp();
        }
        band.norms(norms, group);
#pragma unroll
        for (int i = 0; i < 2 * BAND; i++) {
            float& sum = sums[i / 2][i % 2];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) sum += hw::shuffle_xor(sum, lanes);
            if (band.lane < 4) hw::store(masses, (band.warp * Band::COLUMNS + i / 2 * 8 + band.quad * 2 + i % 2) * 4, sum);
        }
    }
    __syncthreads();
    int at = threadIdx.x, token = first_token + at;
    if (at >= share || token >= pairs) return;
    bool bit = false;
    if (token >= int(p.sinks) && token < decided) {
        float mass = 0;
        // Each warp's columns begin 16 tokens after those of the one before; always in the same order.
        int column = at + window - 1 - window / 2;
        for (int other = 0; other < Band::WARPS; other++, column -= 16)
            if (column >= 0 && column < Band::COLUMNS) mass += hw::load<float>(masses, (other * Band::COLUMNS + column) * 4);
        float least = observed_threshold(tests, size_t(batch) * p.sizes.heads + first_head, group);
        bit = mass * hw::load<float>(norms, at * 4) < least;
    }
    size_t first = (size_t(batch) * p.sizes.heads + first_head) * pairs + token;
    for (uint32_t head = 0; head < group; head++) bits.set(first + size_t(head) * pairs, bit);
}
