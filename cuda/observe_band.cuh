// Observed mass on tensor cores in one pass, where a row's band fits into registers: windows of at most 8 BAND - 15 tokens, at
// most 8 sinks.
#pragma once

#include "attention.cuh"
#include "observe_row.cuh"

// Eight halves of eight rows, as fragments of products over D: lane l holds chunk l % 4 of row l / 4 of every 64 bytes.
// Both sides of a product take the same eight numbers for the same places, so that their order does not matter.
template <class T, int D, int BAND>
struct ObserveBand {
    static constexpr int WARPS = 8, ROWS = 16 * WARPS, COLUMNS = 8 * BAND, HALVES = D / 32;

    const ObservedParams& p;
    int lane = threadIdx.x % 32, quad = lane % 4, window = p.window, tokens = p.sizes.tokens;

    SFA_DEVICE void load(uint4 (&x)[HALVES], const Halves& source, size_t row) const {
#pragma unroll
        for (int i = 0; i < HALVES; i++) {
            uint32_t d = i * 32 + quad * 8;
            x[i] = uint4{0, 0, 0, 0};
            if (d < p.sizes.head_dim) x[i] = load_vector<uint4>(source, row + d);
        }
    }

    // s (16 rows, 8 columns) = rows times columns.
    SFA_DEVICE static void multiply(float (&s)[4], const uint4 (&low)[HALVES], const uint4 (&high)[HALVES],
                                    const uint4 (&columns)[HALVES]) {
#pragma unroll
        for (int i = 0; i < 4; i++) s[i] = 0;
#pragma unroll
        for (int i = 0; i < HALVES; i++) {
            hw::multiply_add(T(), s, {low[i].x, high[i].x, low[i].y, high[i].y}, columns[i].x, columns[i].y);
            hw::multiply_add(T(), s, {low[i].z, high[i].z, low[i].w, high[i].w}, columns[i].z, columns[i].w);
        }
    }

    // Adds to the masses of the COLUMNS tokens from `first` on what the 16 rows from `row` on give them: lane l has
    // columns 8 n + l % 4 * 2 + i, and the sum over rows l / 4 and l / 4 + 8. Tokens that do not exist are read as their
    // neighbours, and the rows that see them decide nothing.
    SFA_DEVICE void add(float (&masses)[BAND][2], const Halves& q, const Halves& k, uint32_t batch, uint32_t head,
                        uint32_t kv_head, int row, int first) const {
        auto token = [&](int t) { return max(0, min(t, tokens - 1)); };
        uint4 low[HALVES], high[HALVES];
        load(low, q, p.q.at(batch, head, token(row + lane / 4)));
        load(high, q, p.q.at(batch, head, token(row + lane / 4 + 8)));
        // The last eight columns are the sinks that have left the window.
        float s[BAND + 1][4] = {};
#pragma unroll
        for (int n = 0; n < BAND; n++) {
            uint4 keys[HALVES];
            load(keys, k, p.k.at(batch, kv_head, token(first + n * 8 + lane / 4)));
            multiply(s[n], low, high, keys);
        }
        if (p.sinks > 0) {
            uint4 keys[HALVES];
            load(keys, k, p.k.at(batch, kv_head, token(lane / 4)));
            multiply(s[BAND], low, high, keys);
        }
        float scale = p.scale * LOG2_E;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            // How many tokens a row's own one comes after that of column 0; a younger one would have a negative age, which is
            // large as an unsigned number, and one before the first token a larger age than the row has.
            int own = row + lane / 4 + r * 8, age = own - first - quad * 2;
            uint32_t sees = min(window, own + 1), half = window / 2, ages = sees > half ? sees - half : 0;
            float maximum = -hw::infinity(), sum = 0;
#pragma unroll
            for (int i = 0; i < 2 * BAND + 2; i++) {
                float& logit = s[i / 2][r * 2 + i % 2];
                int column = i / 2 * 8 + i % 2, sink = quad * 2 + i % 2;
                bool seen = i < 2 * BAND ? uint32_t(age - column) < sees : sink < int(p.sinks) && own - sink >= window;
                logit = seen ? logit * scale : -hw::infinity();
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
            for (int i = 0; i < 2 * BAND; i++) {
                bool counts = uint32_t(age - (i / 2 * 8 + i % 2) - int(half)) < ages;
                masses[i / 2][i % 2] += counts ? s[i / 2][r * 2 + i % 2] * inverse : 0.f;
            }
        }
    }

    // The norms of the values of ROWS tokens from `first` on, into shared memory.
    SFA_DEVICE void norms(const hw::Tile& to, const Halves& v, uint32_t batch, uint32_t kv_head, int first) const {
#pragma unroll
        for (int pass = 0; pass < ROWS / 32; pass++) {
            int at = pass * 32 + threadIdx.x / 8;
            size_t row = p.v.at(batch, kv_head, min(first + at, tokens - 1));
            float squares = 0;
            for (uint32_t d = threadIdx.x % 8 * 8; d < p.sizes.head_dim; d += 64) {
                uint4 x = load_vector<uint4>(v, row + d);
                squares = hw::dot<T>(x, x, squares);
            }
#pragma unroll
            for (int lanes = 1; lanes < 8; lanes *= 2) squares += hw::shuffle_xor(squares, lanes);
            if (threadIdx.x % 8 == 0) hw::store(to, at * 4, sqrtf(squares));
        }
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
    int first_token = blockIdx.x * share, warp = threadIdx.x / 32;
    // Later tokens have not been looked at by all of their rows.
    int decided = min(pairs - window, first_token + share);
    constexpr uint32_t MASSES = Band::WARPS * Band::COLUMNS * 4;
    hw::Tile masses = hw::tile(0, MASSES), norms = hw::tile(MASSES, Band::ROWS * 4);
    // The first row of the warp.
    int row = first_token + window / 2 + warp * 16;
    if (decided > first_token) {
        float sums[BAND][2] = {};
        band.norms(norms, v, batch, kv_head, first_token);
        for (uint32_t head = first_head; head < first_head + group; head++) {
            band.add(sums, q, k, batch, head, kv_head, row, row - window + 1);
        }
#pragma unroll
        for (int i = 0; i < 2 * BAND; i++) {
            float& sum = sums[i / 2][i % 2];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) sum += hw::shuffle_xor(sum, lanes);
            if (band.lane < 4) hw::store(masses, (warp * Band::COLUMNS + i / 2 * 8 + band.quad * 2 + i % 2) * 4, sum);
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
