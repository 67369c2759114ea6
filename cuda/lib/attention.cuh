// Shared by forward and backward: swizzled tiles, their copies and products, columns and the rows that see them.
#pragma once

#include "lib/bias.cuh"
#include "lib/hw.cuh"
#include "lib/params.cuh"
#include "lib/philox.cuh"
#include "lib/softcap.cuh"

typedef Global<const uint16_t> Halves;
typedef Global<const uint32_t> Words;
typedef Global<const float> Floats;

// Byte offsets in a tile of rows of D halves. 16-byte chunks are swizzled within 128 bytes (64 where a row is an odd
// multiple of 64 bytes), so that eight rows' chunks of one index lie in different banks.
template <int D>
struct Layout {
    static constexpr uint32_t ROW = D * 2, CHUNKS = D / 8, GROUP = ROW % 128 == 0 ? 128 : 64;
    // From one row to the next, and from one swizzled group of a row to the next.
    static constexpr uint32_t ROW_STRIDE = ROW, GROUP_STRIDE = GROUP;

    SFA_DEVICE static uint32_t swizzle(uint32_t row) { return (GROUP == 128 ? row & 7 : (row >> 1) & 3) * 16; }
    SFA_DEVICE static uint32_t chunk(uint32_t row, uint32_t index) {
        return row * ROW + ((index * 16) ^ swizzle(row));
    }
};

// Starts the copy of `count` of `ROWS` rows into a tile of layout L; the other rows, and columns from `dim` on, become
// zeros. `stride`: elements from one row to the next. FULL: all rows exist. A thread keeps to one chunk of each
// swizzled group, so that its addresses are one register and constants. `thread`: this thread's index, as the caller
// reads it.
template <class L, int ROWS, int THREADS, bool FULL>
SFA_DEVICE void load_rows(const hw::Tile& tile, const Halves& source, int64_t first, int64_t stride, int count,
                          uint32_t dim, uint32_t thread = threadIdx.x) {
    constexpr uint32_t CHUNKS = L::GROUP / 16, STEP = THREADS / CHUNKS;
    static_assert(ROWS % STEP == 0 && (STEP % 8 == 0 || (STEP == 4 && L::GROUP == 128)),
                  "a pass flips bits of the swizzle");
    uint32_t row = thread / CHUNKS, chunk = thread % CHUNKS;
    hw::keep_in_place(stride);
    uint32_t target = hw::lane_offset(L::chunk(row, chunk));
    int64_t index = first + row * stride + chunk * 8;
#pragma unroll
    for (uint32_t pass = 0; pass < ROWS / STEP; pass++) {
#pragma unroll
        for (uint32_t group = 0; group < L::CHUNKS / CHUNKS; group++) {
            bool valid = (FULL || int(row + pass * STEP) < count) && (group * CHUNKS + chunk) * 8 < dim;
            uint32_t offset = (target ^ pass * STEP % 8 * 16) + pass * STEP * L::ROW_STRIDE + group * L::GROUP_STRIDE;
            hw::copy_async(tile, offset, source, index + group * CHUNKS * 8, valid);
        }
        index += STEP * stride;
    }
}

// The token of each row of a tile, for `load_listed_rows`: words of shared memory, `stride` bytes apart.
struct TokensInMemory {
    hw::Tile tokens;
    uint32_t stride;

    SFA_DEVICE uint32_t operator()(uint32_t, uint32_t row) const { return hw::load<uint32_t>(tokens, row * stride); }
};

// The same for rows that a list names: `tokens(pass, row)` is the token of a row. `first`: where token 0 starts. Tokens
// are less than 2^31 elements apart.
template <class L, int ROWS, int THREADS, bool FULL, class Tokens>
SFA_DEVICE void load_listed_rows(const hw::Tile& tile, const Halves& source, int64_t first, uint32_t token_stride,
                                 const Tokens& tokens, int count, uint32_t dim, uint32_t thread = threadIdx.x) {
    constexpr uint32_t CHUNKS = L::GROUP / 16, STEP = THREADS / CHUNKS;
    static_assert(ROWS % STEP == 0 && (STEP % 8 == 0 || (STEP == 4 && L::GROUP == 128)),
                  "a pass flips bits of the swizzle");
    uint32_t row = thread / CHUNKS, chunk = thread % CHUNKS;
    uint32_t target = hw::lane_offset(L::chunk(row, chunk));
    Halves start = source + (first + chunk * 8);
#pragma unroll
    for (uint32_t pass = 0; pass < ROWS / STEP; pass++) {
        uint32_t token = tokens(pass, row + pass * STEP);
        uint64_t bytes = uint64_t(token) * (2 * token_stride);
#pragma unroll
        for (uint32_t group = 0; group < L::CHUNKS / CHUNKS; group++) {
            bool valid = (FULL || int(row + pass * STEP) < count) && (group * CHUNKS + chunk) * 8 < dim;
            uint32_t offset = (target ^ pass * STEP % 8 * 16) + pass * STEP * L::ROW_STRIDE + group * L::GROUP_STRIDE;
            hw::copy_async_bytes(tile, offset, start, bytes + group * L::GROUP, valid);
        }
    }
}

// Starts the copy of one word per row by THREADS threads; by default there is a thread for each.
template <int ROWS, int THREADS = ROWS, class View>
SFA_DEVICE void load_words(const hw::Tile& tile, const View& source, int64_t first, int count,
                           uint32_t thread = threadIdx.x) {
    for (uint32_t i = thread; i < ROWS; i += THREADS)
        hw::copy_async_word(tile, i * 4, source, first + i, int(i) < count);
}

// This lane's addresses of a tile's fragments. Chunk pairs of a swizzled group differ in bits that no row touches, so
// one register is held and the rest is derived where it is used.
template <int D>
struct Fragments {
    static constexpr uint32_t PAIRS = Layout<D>::GROUP / 32;
    uint32_t first;

    // TRANSPOSED: lane l has row l % 8 + l / 16 * 8 and chunk l / 8 % 2: B of a product over D. Otherwise row l % 16
    // and chunk l / 16: A, or B of a product over tile rows.
    SFA_DEVICE Fragments(bool transposed, uint32_t first_row) {
        uint32_t lane = threadIdx.x % 32, row = transposed ? lane % 8 + lane / 16 * 8 : lane % 16;
        first = first_row * Layout<D>::ROW + Layout<D>::chunk(row, transposed ? lane / 8 % 2 : lane / 16);
    }

    // A copy that the compiler cannot hoist sums of out of a loop.
    SFA_DEVICE Fragments here() const {
        Fragments copy = *this;
        hw::keep_in_place(copy.first);
        return copy;
    }

    // The fragments from number `part` of each row on; a multiple of 16.
    SFA_DEVICE Fragments from(int part) const {
        Fragments moved = *this;
        moved.first = (first ^ (part / 16 % PAIRS * 32)) + part / 16 / PAIRS * Layout<D>::GROUP;
        return moved;
    }

    // Chunks 2 * k and 2 * k + 1 of 16 rows from `row` on.
    SFA_DEVICE uint32_t at(int row, int k) const {
        return (first ^ (k % PAIRS * 32)) + (row * Layout<D>::ROW + k / PAIRS * Layout<D>::GROUP);
    }
};

// Part of a tile's columns, [begin, end).
struct Span {
    int begin, end;

    // Whether it overlaps the 16 columns from `first` on.
    SFA_DEVICE bool touches(int first) const { return first < end && first + 16 > begin; }
};

// c[m][n] (16 rows, 8 columns) += left rows times right rows (transposed fragments), over D. LIMITED: right rows
// outside of `span` may be left out, 16 at a time.
template <class T, int D, int MT, int NT, bool LIMITED = false>
SFA_DEVICE void multiply_rows(float (&c)[MT][NT][4], const Fragments<D>& left_rows, const hw::Tile& left,
                              const Fragments<D>& right_rows, const hw::Tile& right, Span span = {}) {
    const Fragments<D> left_at = left_rows.here(), right_at = right_rows.here();
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) hw::load_matrices(a[m], left, left_at.at(m * 16, k));
#pragma unroll
        for (int n = 0; n < NT / 2; n++) {
            if (LIMITED && !span.touches(n * 16)) continue;
            uint32_t b[4];
            hw::load_matrices(b, right, right_at.at(n * 16, k));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                hw::multiply_add(T(), c[m][2 * n], a[m], b[0], b[1]);
                hw::multiply_add(T(), c[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// c[m][d] (16 rows, 8 of WIDTH columns) += weights (rows x tile rows), rounded to T, times the tile. LIMITED: weights
// outside of `span` are 0.
template <class T, int D, int MT, int NT, bool LIMITED = false, int WIDTH = D>
SFA_DEVICE void multiply_weights(float (&c)[MT][WIDTH / 8][4], const Fragments<D>& rows,
                                 const float (&weights)[MT][NT][4], const hw::Tile& right, Span span = {}) {
    const Fragments<D> at = rows.here();
#pragma unroll
    for (int k = 0; k < NT / 2; k++) {
        if (LIMITED && !span.touches(k * 16)) continue;
        uint32_t a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
            a[m][0] = T::pack(weights[m][2 * k][0], weights[m][2 * k][1]);
            a[m][1] = T::pack(weights[m][2 * k][2], weights[m][2 * k][3]);
            a[m][2] = T::pack(weights[m][2 * k + 1][0], weights[m][2 * k + 1][1]);
            a[m][3] = T::pack(weights[m][2 * k + 1][2], weights[m][2 * k + 1][3]);
        }
#pragma unroll
        for (int d = 0; d < WIDTH / 16; d++) {
            uint32_t b[4];
            hw::load_matrices_transposed(b, right, at.at(k * 16, d));
#pragma unroll
            for (int m = 0; m < MT; m++) {
                hw::multiply_add(T(), c[m][2 * d], a[m], b[0], b[1]);
                hw::multiply_add(T(), c[m][2 * d + 1], a[m], b[2], b[3]);
            }
        }
    }
}

template <class T>
SFA_DEVICE bool any_not_finite(uint4 x) {
    return hw::any_not_finite<T>(x.x) || hw::any_not_finite<T>(x.y) || hw::any_not_finite<T>(x.z) ||
           hw::any_not_finite<T>(x.w);
}

// Gives columns whose key or value is not finite a NaN key and a zero value. A row that sees such a column becomes NaN
// through its logit; no other row is touched by 0 * NaN. `bad` has ROWS + 1 words, zero before and after. Returns the
// first such column, or ROWS. For THREADS threads, which meet at `meet`; both tiles have arrived. The loops stay
// rolled: unrolled, they would take registers from the common path.
template <class T, class L, int ROWS, int THREADS, class Meet>
SFA_DEVICE int quarantine(const hw::Tile& keys, const hw::Tile& values, const hw::Tile& bad, const Meet& meet) {
    constexpr uint32_t CHUNKS = L::CHUNKS, ALL = ROWS * CHUNKS, PASSES = (ALL + THREADS - 1) / THREADS;
#pragma unroll 1
    for (uint32_t i = 0; i < PASSES; i++) {
        uint32_t index = threadIdx.x + i * THREADS, row = index / CHUNKS, at = L::chunk(row, index % CHUNKS);
        if (ALL % THREADS != 0 && index >= ALL) break;
        if (any_not_finite<T>(hw::load<uint4>(keys, at)) || any_not_finite<T>(hw::load<uint4>(values, at))) {
            hw::store(bad, row * 4, 1u);
            hw::store(bad, ROWS * 4, 1u);
        }
    }
    meet();
    int first = ROWS;
    if (hw::load<uint32_t>(bad, ROWS * 4) == 0) return first;
#pragma unroll 1
    for (uint32_t i = 0; i < PASSES; i++) {
        uint32_t index = threadIdx.x + i * THREADS, row = index / CHUNKS, at = L::chunk(row, index % CHUNKS);
        if (ALL % THREADS != 0 && index >= ALL) break;
        if (hw::load<uint32_t>(bad, row * 4) == 0) continue;
        hw::store(keys, at, uint4{0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu});
        hw::store(values, at, uint4{0, 0, 0, 0});
    }
    for (int row = ROWS - 1; row >= 0; row--)
        if (hw::load<uint32_t>(bad, row * 4) != 0) first = row;
    meet();
    if (threadIdx.x <= ROWS) hw::store(bad, threadIdx.x * 4, 0u);
    if (threadIdx.x == 0) hw::store(bad, ROWS * 4, 0u);
    meet();
    return first;
}

// The unit (a head or a list), and the block of its rows or columns, that a block of the grid takes; a unit has
// `blocks` blocks. Blocks that share a unit's columns or rows run close in time, so that L2 holds them. But a group of
// units, of about `together` blocks, is interleaved, and its longest blocks (a unit's first ones) come first; otherwise
// the last unit's longest blocks would run alone at the end. Groups are about equal in size for the same reason.
struct Place {
    uint32_t unit, block;

    SFA_DEVICE Place(uint32_t index, uint32_t blocks, uint32_t units, uint32_t together) {
        uint32_t most = (together + blocks - 1) / blocks, groups = (units + most - 1) / most;
        uint32_t group = ((index / blocks + 1) * groups - 1) / units, first = group * units / groups;
        uint32_t count = (group + 1) * units / groups - first, inside = index - first * blocks;
        unit = first + inside % count, block = inside / count;
    }
};

// The indices of one (batch, query head).
struct HeadIndex {
    uint32_t batch, head, kv_head;
    int64_t list;        // batch * lists + list
    int64_t batch_head;  // batch * heads + head

    SFA_DEVICE HeadIndex(const AttentionParams& p, uint32_t index)
        : HeadIndex(p, index / p.sizes.heads, index % p.sizes.heads) {}

    SFA_DEVICE HeadIndex(const AttentionParams& p, uint32_t batch, uint32_t head)
        : HeadIndex(p, batch, head, head / (p.sizes.heads / p.sizes.kv_heads)) {}

    SFA_DEVICE HeadIndex(const AttentionParams& p, uint32_t batch, uint32_t head, uint32_t kv_head)
        : batch(batch), head(head), kv_head(kv_head) {
        list = int64_t(batch) * p.sizes.lists + (p.sizes.lists == p.sizes.heads ? head : kv_head);
        batch_head = int64_t(batch) * p.sizes.heads + head;
    }
};

// The blocks of `rows` rows of a head that are computed: the last ones, without those before `first_row`.
SFA_DEVICE uint32_t blocks_of_rows(const AttentionParams& p, uint32_t rows) {
    return (p.sizes.tokens + rows - 1) / rows - p.first_row / rows;
}

// How many far columns a row sees. In the dense case these are raw tokens, including the row's own.
SFA_DEVICE int far_count(const AttentionParams& p, const Words& before, int64_t list, int row) {
    if (p.dense) return p.causal ? row + 1 : int(p.sizes.tokens);
    int64_t first = list * (p.sizes.tokens + 1);
    if (!p.causal) return int(before[first + p.sizes.tokens]);
    return row < int(p.window) ? 0 : int(before[first + row - p.window]);
}

// How many of the first far columns a row does not see because its sliding window starts after them.
SFA_DEVICE int far_first(const AttentionParams& p, const Words& before, int64_t list, int row) {
    int first = row + 1 - int(p.slide);
    if (first <= 0) return 0;
    return p.dense ? first : int(before[list * (p.sizes.tokens + 1) + first]);
}

// The edge column of a row, or -1: the token at the left border of the window. Without causality only a hidden row's
// own token needs an edge.
SFA_DEVICE int edge_token(const AttentionParams& p, const Words& before, int64_t list, int row) {
    if (p.dense || row >= int(p.sizes.tokens)) return -1;
    if (p.causal) return row - int(p.window) < 0 ? -1 : row - int(p.window);
    int64_t at = list * (p.sizes.tokens + 1) + row;
    return before[at] == before[at + 1] ? row : -1;
}

// An edge column's key or value: a folded row, or the raw row if the fold changes none.
template <class View>
SFA_DEVICE View edge_row(const AttentionParams& p, View folded, View raw, const Rows& rows, const HeadIndex& at,
                         int token) {
    if (!folded) return raw + rows.at(at.batch, at.kv_head, token);
    return folded + (at.list * p.sizes.tokens + token) * p.sizes.head_dim;
}

// Where the rounding remainders of the log-sum-exps start, after the log-sum-exps.
SFA_DEVICE int64_t rest_of_sums(const AttentionParams& p) {
    return int64_t(p.sizes.batch) * p.sizes.heads * p.sizes.tokens;
}

// A row's remainder; it is read only if the log-sum-exp is large. Its address is recomputed, not held.
SFA_DEVICE float rest_of_sum(const AttentionParams& p, const Floats& log_sum_exp, const HeadIndex& at, int row) {
    uint32_t place = uint32_t(row);
    hw::keep_in_place(place);
    return log_sum_exp[rest_of_sums(p) + at.batch_head * p.sizes.tokens + place];
}

// Zeroes 16-byte chunks of a tile that hold a number that is not finite; each of THREADS threads checks the chunks that
// `load_rows` gave it. A weight of 0 times such a chunk is then 0; a weight that is not 0 there is NaN itself.
template <class T, class L, int ROWS, int THREADS>
SFA_DEVICE void cleanse(const hw::Tile& tile, uint32_t thread = threadIdx.x) {
    constexpr uint32_t CHUNKS = L::GROUP / 16, STEP = THREADS / CHUNKS;
#pragma unroll 1
    for (uint32_t row = thread / CHUNKS; row < ROWS; row += STEP) {
#pragma unroll 1
        for (uint32_t group = 0; group < L::CHUNKS / CHUNKS; group++) {
            uint32_t at = L::chunk(row, group * CHUNKS + thread % CHUNKS);
            if (any_not_finite<T>(hw::load<uint4>(tile, at))) hw::store(tile, at, uint4{0, 0, 0, 0});
        }
    }
}

// The bias of a row and a token, in base 2.
SFA_DEVICE float bias_at(const AttentionParams& p, const Floats& bias, const HeadIndex& at, int row, int token) {
    int from = max(row - int(p.first_row), 0);
    return bias_in_base_2(bias[p.bias.at(at.batch, at.head, from, token)]);
}

// Dropout's factor of a weight: 0 or 1 / (1 - p).
SFA_DEVICE float dropout_factor(const AttentionParams& p, const HeadIndex& at, int row, int token) {
    uint32_t word = philox_word(p.dropout_key, uint32_t(at.batch_head) + p.drawn_from[0],
                                uint32_t(row) + p.drawn_from[1], uint32_t(token) + p.drawn_from[2]);
    return word >= p.dropout_cut ? p.dropout_scale : 0.f;
}
