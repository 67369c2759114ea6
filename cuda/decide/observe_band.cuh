// Observed mass on tensor cores in one pass, if a row's band fits into registers: windows of at most 8 BAND - 15
// tokens, at most 8 sinks.
#pragma once

#include "lib/attention.cuh"
#include "decide/observe_row.cuh"

// A block's tiles: the keys that its rows see, followed by the sinks; and two stages of 16 rows a warp, 64 numbers of
// each row, which that warp alone copies and reads: queries of one head after another, then values. A stage is copied
// as a whole while the one before is multiplied. WHOLE: windows of 8 BAND - 16 tokens, and a scale above 0.
template <class T, int D, int BAND, int WARPS, bool WHOLE>
struct ObserveBand {
    static constexpr int THREADS = 32 * WARPS, ROWS = 16 * WARPS, COLUMNS = 8 * BAND, CHUNKS = D / 8;
    static constexpr int SINKS_AT = ROWS - 16 + COLUMNS, KEYS = SINKS_AT + 16, PARTS = D / 64;
    static constexpr uint32_t KEY_BYTES = KEYS * D * 2, STAGE_BYTES = ROWS * 128,
                              WORDS_AT = KEY_BYTES + 2 * STAGE_BYTES;
    // WHOLE: the eights of tokens in a window, and the eights of a warp's columns that have mass.
    static constexpr int EIGHTHS = BAND - 2, MASSES = WHOLE ? EIGHTHS / 2 + 2 : BAND;
    // The masses that each warp's rows give to columns, then the norms of values.
    static constexpr uint32_t MASS_BYTES = WARPS * 8 * MASSES * 4, NORMS_AT = WORDS_AT + MASS_BYTES,
                              BYTES = NORMS_AT + ROWS * 4;

    const ObservedParams& p;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4, tokens = p.sizes.tokens;
    int window = WHOLE ? 8 * EIGHTHS : p.window;
    hw::Tile keys = hw::tile(0, KEY_BYTES);

    SFA_DEVICE static hw::Tile stage(uint32_t index) {
        return hw::tile(KEY_BYTES + index % 2 * STAGE_BYTES, STAGE_BYTES);
    }

    // Starts the copy of COUNT keys, tokens from `first` on, to rows from `row` on, by STEP threads. Tokens that do not
    // exist are replaced by the nearest that does: rows that see them decide nothing.
    template <int COUNT, int STEP>
    SFA_DEVICE void copy(int row, const Halves& k, int64_t start, int first) const {
        static_assert(STEP % CHUNKS == 0 && COUNT * CHUNKS % 32 == 0,
                      "a thread keeps to a chunk, a warp to the same pass");
        int thread = threadIdx.x % STEP, at = thread / CHUNKS, chunk = thread % CHUNKS;
        bool valid = chunk * 8 < int(p.sizes.head_dim);
#pragma unroll
        for (int pass = 0; pass < COUNT; pass += STEP / CHUNKS) {
            int to = at + pass, token = min(max(first + to, 0), tokens - 1);
            if (pass + STEP / CHUNKS > COUNT && to >= COUNT) continue;
            hw::copy_async(keys, Layout<D>::chunk(row + to, chunk), k, start + token * p.k.token_stride + chunk * 8,
                           valid);
        }
    }

    SFA_DEVICE void copy_keys(const Halves& k, uint32_t batch, uint32_t kv_head, int first) const {
        int64_t start = p.k.at(batch, kv_head, 0);
        copy<SINKS_AT, THREADS>(0, k, start, first);
        if (p.sinks > 0 && warp == 0) copy<16, 32>(SINKS_AT, k, start, 0);
    }

    // Starts the copy of part `part` of this warp's rows: tokens from `first` on, whose first row starts at `start`.
    SFA_DEVICE void copy_own(uint32_t index, const Halves& source, const Rows& rows, int64_t start, int first,
                             int part) const {
        int at = lane / 8, chunk = lane % 8, column = part * 64 + chunk * 8, last = max(tokens - 1 - first, 0);
        bool valid = column < int(p.sizes.head_dim);
#pragma unroll
        for (int pass = 0; pass < 16; pass += 4) {
            uint32_t stride = rows.token_stride, row = at + pass;
            int64_t index_of = start + int64_t(uint64_t(min(int(row), last)) * stride) + column;
            hw::copy_async(stage(index), Layout<64>::chunk(warp * 16 + row, chunk), source, index_of, valid);
        }
    }

    // s (16 rows, 8 columns each) += part `part` of a stage's queries times keys; the sinks come last.
    SFA_DEVICE void multiply(float (&s)[BAND + 1][4], uint32_t index, int part) const {
        Fragments<64> rows(false, warp * 16);
        Fragments<D> columns(true, warp * 16), sinks(true, SINKS_AT);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32_t a[4], b[4];
            hw::load_matrices(a, stage(index), rows.at(0, k));
#pragma unroll
            for (int n = 0; n < BAND / 2; n++) {
                hw::load_matrices(b, keys, columns.at(n * 16, part * 4 + k));
                hw::multiply_add(T(), s[2 * n], a, b[0], b[1]);
                hw::multiply_add(T(), s[2 * n + 1], a, b[2], b[3]);
            }
            if (p.sinks == 0) continue;
            hw::load_matrices(b, keys, sinks.at(0, part * 4 + k));
            hw::multiply_add(T(), s[BAND], a, b[0], b[1]);
        }
    }

    // A bit for each number of a lane's row l / 4 (r = 0) or l / 4 + 8: of columns 8 n + l % 4 * 2 + i, then of sinks.
    // The same for every head.
    struct Marks {
        uint32_t bits[2];
        SFA_DEVICE bool has(int r, int i) const { return bits[r] >> i & 1; }
    };

    // Marks the columns that the rows from token `row` on see, and those that count as mass.
    SFA_DEVICE void mark(Marks& seen, Marks& counted, int row) const {
        int first = row - window + 1;
        for (int r = 0; r < 2; r++) {
            seen.bits[r] = counted.bits[r] = 0;
            // `age`: how many tokens older than the row's own column 0 is. A younger column has a negative age, which
            // is large as an unsigned number; a column before the first token has a larger age than the row can have.
            int own = row + lane / 4 + r * 8, age = own - first - quad * 2;
            uint32_t sees = min(window, own + 1), half = window / 2, ages = sees > half ? sees - half : 0;
            for (int i = 0; i < 2 * BAND + 2; i++) {
                int column = i / 2 * 8 + i % 2, sink = quad * 2 + i % 2;
                bool sink_seen = sink < int(p.sinks) && own - sink >= window;
                seen.bits[r] |= uint32_t(i < 2 * BAND ? uint32_t(age - column) < sees : sink_seen) << i;
                counted.bits[r] |= uint32_t(i < 2 * BAND && uint32_t(age - column - int(half)) < ages) << i;
            }
            // Otherwise the compiler recomputes the marks for every head, which only pays if it spills otherwise.
            if (D > 64) continue;
            hw::keep_in_place(seen.bits[r]);
            hw::keep_in_place(counted.bits[r]);
        }
    }

    // Adds the mass that the warp's 16 rows (tokens from `row` on) give to the COLUMNS tokens from `row` - window + 1
    // on. Lane l has columns 8 n + l % 4 * 2 + i, and the sum over rows l / 4 and l / 4 + 8.
    SFA_DEVICE void add(float (&masses)[MASSES][2], float (&s)[BAND + 1][4], const Marks& seen,
                        const Marks& counted) const {
        float scale = p.scale * LOG2_E;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float weights[BAND + 1][2];
#pragma unroll
            for (int i = 0; i < 2 * BAND + 2; i++) {
                float logit = s[i / 2][r * 2 + i % 2];
                weights[i / 2][i % 2] = seen.has(r, i) ? logit * scale : -hw::infinity();
            }
            float inverse = weigh(weights, 1);
#pragma unroll
            for (int i = 0; i < 2 * BAND; i++)
                if (counted.has(r, i)) masses[i / 2][i % 2] += weights[i / 2][i % 2] * inverse;
        }
    }

    // The same for WHOLE. Row r of the 16 sees the columns from r on: the end of one eight, and the beginning of the
    // eight a window later. These two make one eight together, so only the first tokens' rows need a mask.
    SFA_DEVICE void add_whole(float (&masses)[MASSES][2], float (&s)[BAND + 1][4], int row) const {
        if (row < window + 8) hide_early(s, row);
        bool from[2] = {quad * 2 >= lane / 4, quad * 2 + 1 >= lane / 4};
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float weights[EIGHTHS + 1][2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int at = r * 2 + i;
                weights[0][i] = from[i] ? s[r][at] : s[r + EIGHTHS][at];
#pragma unroll
                for (int n = 1; n < EIGHTHS; n++) weights[n][i] = s[r + n][at];
                weights[EIGHTHS][i] = quad * 2 + i < int(p.sinks) ? s[BAND][at] : -hw::infinity();
            }
            float inverse = weigh(weights, p.scale * LOG2_E);
            // The older half of the window counts.
#pragma unroll
            for (int i = 0; i < 2; i++) {
                constexpr int HALF = EIGHTHS / 2;
                if (from[i]) masses[r][i] += weights[0][i] * inverse;
#pragma unroll
                for (int n = 1; n < HALF; n++) masses[r + n][i] += weights[n][i] * inverse;
                if (!from[i]) masses[r + HALF][i] += weights[HALF][i] * inverse;
            }
        }
    }

    // Hides tokens before the first one, and sinks that are still in the window.
    SFA_DEVICE void hide_early(float (&s)[BAND + 1][4], int row) const {
#pragma unroll
        for (int i = 0; i < 4 * BAND + 4; i++) {
            int own = row + lane / 4 + i % 4 / 2 * 8, column = quad * 2 + i % 2;
            bool hidden = i < 4 * BAND ? row - window + 1 + i / 4 * 8 + column < 0 : own - column < window;
            if (hidden) s[i / 4][i % 4] = -hw::infinity();
        }
    }

    // Turns a row's logits, which four lanes share, into unnormalized weights; returns 1 over their sum.
    template <int COUNT>
    SFA_DEVICE static float weigh(float (&weights)[COUNT][2], float scale) {
        float maximum = -hw::infinity(), sum = 0;
#pragma unroll
        for (int i = 0; i < 2 * COUNT; i++) maximum = hw::max(maximum, weights[i / 2][i % 2]);
        maximum = hw::max(maximum, hw::shuffle_xor(maximum, 1));
        maximum = hw::max(maximum, hw::shuffle_xor(maximum, 2));
        float base = maximum == -hw::infinity() ? 0.f : maximum * scale;
#pragma unroll
        for (int i = 0; i < 2 * COUNT; i++) {
            float& weight = weights[i / 2][i % 2];
            weight = hw::exp2(weight * scale - base), sum += weight;
        }
        sum += hw::shuffle_xor(sum, 1);
        sum += hw::shuffle_xor(sum, 2);
        return hw::reciprocal(sum);
    }

    // Adds the squares of half a part of a value to `sum`; two lanes share a row.
    SFA_DEVICE float squares(uint32_t index, float sum) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint4 x = hw::load<uint4>(stage(index), Layout<64>::chunk(warp * 16 + lane / 2, i + lane % 2 * 4));
            sum = hw::dot<T>(x, x, sum);
        }
        return sum;
    }
};

// Bits of every head of a KV head, as observe_bits. A block has 16 * WARPS rows: those that give mass to its tokens.
// Grid (pairs / (16 WARPS + 1 - (window - window / 2)), kv_heads, batch).
template <class T, int D, int BAND, int WARPS, bool WHOLE>
__device__ __forceinline__ void observe_band(const Halves& q, const Halves& k, const Halves& v, const Tests& tests,
                                             const Global<uint8_t>& bits, const ObservedParams& p) {
    typedef ObserveBand<T, D, BAND, WARPS, WHOLE> Band;
    hw::let_next_start();
    hw::wait_for_previous();
    Band band = {p};
    uint32_t kv_head = blockIdx.y, batch = blockIdx.z, group = p.group, first_head = kv_head * group;
    int window = band.window, pairs = band.tokens - 1, share = Band::ROWS + 1 - (window - window / 2);
    int first_token = blockIdx.x * share;
    // Later tokens have not been seen by all the rows that decide them.
    int decided = min(pairs - window, first_token + share);
    constexpr uint32_t COLUMNS = 8 * Band::MASSES;
    hw::Tile masses = hw::tile(Band::WORDS_AT, Band::MASS_BYTES), norms = hw::tile(Band::NORMS_AT, Band::ROWS * 4);
    // The first row of the block and of the warp, and the first token whose value the warp has.
    int block_row = first_token + window / 2, row = block_row + band.warp * 16, own = first_token + band.warp * 16;
    int64_t queries = p.q.at(batch, first_head, min(row, pairs)), values = p.v.at(batch, kv_head, min(own, pairs));
    // Stages of queries per head of the group, then of values.
    auto load = [&](uint32_t head, int part) {
        uint32_t index = head * Band::PARTS + part;
        if (head < group) band.copy_own(index, q, p.q, queries + head * p.q.head_stride, row, part);
        else if (head == group) band.copy_own(index, v, p.v, values, own, part);
        hw::copy_commit();
    };
    auto wait = [&] {
        hw::copy_wait<1>();
        __syncwarp();
    };
    // How many heads two stages hold.
    constexpr uint32_t NEXT = 2 / Band::PARTS;
    if (decided > first_token) {
        float sums[Band::MASSES][2] = {};
        typename Band::Marks seen, counted;
        band.copy_keys(k, batch, kv_head, block_row - window + 1);
        load(0, 0);
        load(NEXT - 1, Band::PARTS - 1);
        if (!WHOLE) band.mark(seen, counted, row);
        hw::copy_wait<1>();
        __syncthreads();
#pragma unroll 1
        for (uint32_t head = 0; head < group; head++) {
            float s[BAND + 1][4] = {};
#pragma unroll
            for (int part = 0; part < Band::PARTS; part++) {
                band.multiply(s, head * Band::PARTS + part, part);
                __syncwarp();
                load(head + NEXT, part);
                if (part < Band::PARTS - 1) wait();
            }
            if (WHOLE) band.add_whole(sums, s, row);
            else band.add(sums, s, seen, counted);
            wait();
        }
        float squares = band.squares(group * Band::PARTS, 0);
        if (Band::PARTS > 1) {
            hw::copy_wait<0>();
            __syncwarp();
            squares = band.squares(group * Band::PARTS + 1, squares);
        }
        squares += hw::shuffle_xor(squares, 1);
        if (band.lane % 2 == 0) hw::store(norms, (band.warp * 16 + band.lane / 2) * 4, sqrtf(squares));
#pragma unroll
        for (int i = 0; i < 2 * Band::MASSES; i++) {
            float& sum = sums[i / 2][i % 2];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) sum += hw::shuffle_xor(sum, lanes);
            if (band.lane < 4) hw::store(masses, (band.warp * COLUMNS + i / 2 * 8 + band.quad * 2 + i % 2) * 4, sum);
        }
    }
    __syncthreads();
    int at = threadIdx.x, token = first_token + at;
    if (at >= share || token >= pairs) return;
    bool bit = false;
    if (token >= int(p.sinks) && token < decided) {
        float mass = 0;
        // A warp's columns begin 16 tokens after the previous warp's; the order of the sum is always the same.
        int column = at + window - 1 - window / 2, warp = column / 16;
        column %= 16;
        for (; column < int(COLUMNS) && warp >= 0; column += 16, warp--)
            mass += hw::load<float>(masses, (warp * COLUMNS + column) * 4);
        float least = observed_threshold(tests, size_t(batch) * p.sizes.heads + first_head, group);
        bit = mass * hw::load<float>(norms, at * 4) < least;
    }
    size_t first = (size_t(batch) * p.sizes.heads + first_head) * pairs + token;
    for (uint32_t head = 0; head < group; head++) bits.set(first + size_t(head) * pairs, bit);
}
