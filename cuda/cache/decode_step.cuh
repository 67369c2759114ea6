// One new token of a cache, appended and attended in one launch.
//
// The grid is (lists, 1 + splits * shares). A list has `group` query heads; a block attends G of them at a time, so
// there are group / G shares. Block y = 0 of a list appends the token, then reads the list's local columns (the open
// chain and the window) and the chain that the token closed, if any, for all shares in turn. Every other block reads
// one split of the far columns for one share. Each block writes a partial softmax of its rows; the block of the list
// that finishes last joins them.
//
// The idea: decoding is bound by memory, so each key and value is read once and serves all G query heads, and the far
// columns of a list are split over enough blocks to keep memory busy. The host does not know how long a list is; each
// block reads the length and divides it by `splits`.
//
// 1. A row of up to D elements is read by D / 8 lanes, 16 bytes a lane in f16 and bf16, so a warp reads 256 / D rows at
//    once. DECODE_UNROLL such reads are in flight while those before are weighed (`columns`).
// 2. Each group of lanes has a softmax of its own; they are merged only at the end (`finish`), first in the warp by
//    shuffles, then through shared memory, always in the same order: the same bits on every run.
// 3. The running maximum follows a logit only if it is larger by more than 8, so that most columns rescale nothing.
// 4. The new length is written last. Other blocks of the list split by the old length, so `next` holds the new one
//    until the last block has arrived (`comes_last`).
// 5. Far columns lie in pages (pages.cuh); a split has whole ones. Columns that are read together lie in one page. A
//    warp holds the addresses of 32 pages, one a lane. Under a sliding window the far columns start at `starts`, which
//    is written last too, and the window's raw tokens are those after its border: where the sliding window is the
//    shorter one, one or two parts of the ring.
// 6. `join` has one warp per row and reads eight parts at a time; the first eight are in flight while their weights are
//    computed.
// 7. OWN_VALUES: values have another size than keys, and D holds the larger one. Kernels of one size save registers.
//
// Shared memory: G rows of 4 warps, D + 4 floats each (output, maximum, sum, padding): 16 * G * (D + 4) bytes, for
// example 8 448 at G = 4, D = 128. `comes_last` uses its first word again.
#pragma once

#include "cache/decode_parts.cuh"

constexpr int DECODE_WARPS = 4, DECODE_UNROLL = 4;
// The fewest pages of a split; with fewer its start and its end cost more than its reading.
constexpr int LEAST_PAGES = 2;

// Joins the warps' partial results of `heads` rows in shared memory, (heads, warps, D + 4): an output, a maximum and a
// sum. Writes rows from `row` on of part `part`.
template <int D>
SFA_DEVICE void join_warps(const Parts& parts, const DecodeParams& p, uint32_t dim, int heads, int64_t row,
                           uint32_t part) {
    constexpr int ROW = D + 4;
    hw::Tile shared = hw::tile(0, heads * DECODE_WARPS * ROW * 4);
    int lane = threadIdx.x % 32;
    if (lane >= D / 8) return;
    for (int head = threadIdx.x / 32; head < heads; head += DECODE_WARPS) {
        Partial<1> all;
        all.clear();
#pragma unroll
        for (int other = 0; other < DECODE_WARPS; other++) {
            uint32_t at = (head * DECODE_WARPS + other) * ROW * 4;
            float4 a = hw::load<float4>(shared, at + lane * 32), b = hw::load<float4>(shared, at + lane * 32 + 16);
            float2 sum = hw::load<float2>(shared, at + D * 4);
            all.merge(0, sum.x, sum.y, {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w});
        }
        int64_t to = (row + head) * p.parts + part;
        const float(&x)[8] = all.output[0];
        if (lane * 8 < int(dim)) {
            store_vector(parts.outputs, to * dim + lane * 8, float4{x[0], x[1], x[2], x[3]});
            store_vector(parts.outputs, to * dim + lane * 8 + 4, float4{x[4], x[5], x[6], x[7]});
        }
        if (lane == 0) store_vector(parts.sums, to * 2, float2{all.maximum[0], all.sum[0]});
    }
}

// The state of a thread. D / 8 lanes read a row; a warp reads 256 / D rows at once.
template <class T, int D, int HEADS, bool OWN_VALUES>
struct Decoder {
    static constexpr int G = HEADS;
    // Whether closed chains are in 8 bits.
    static constexpr bool CODED = false;
    static constexpr int LANES = D / 8, TOGETHER = 32 / LANES, STEP = TOGETHER * DECODE_WARPS;
    // Floats of a part in shared memory: output, maximum, sum and padding to 16 bytes.
    static constexpr int ROW = D + 4;
    static constexpr uint32_t BYTES = G * DECODE_WARPS * ROW * 4;

    int lane, sub;  // which eight elements, and which of the rows that are read together
    uint32_t dim;
    bool mine;
    uint32_t own_dim;  // of values
    Eight<T> raw[G];
    float queries[G][8], scale;
    Partial<G> partial;

    SFA_DEVICE Decoder(const CacheParams& c, float scale)
        : lane(threadIdx.x % LANES), sub(threadIdx.x / LANES), dim(c.sizes.head_dim), mine(lane * 8 < int(dim)),
          own_dim(c.value_dim), scale(scale) {}

    SFA_DEVICE uint32_t value_dim() const { return OWN_VALUES ? own_dim : dim; }
    SFA_DEVICE bool mine_of_value() const { return OWN_VALUES ? lane * 8 < int(own_dim) : mine; }

    // Starts reading G query heads from `head` on. They are used after the first columns are in flight too.
    SFA_DEVICE void start(const Global<const T>& q, const CacheParams& c, uint32_t batch, uint32_t head, int) {
        partial.clear();
#pragma unroll
        for (int g = 0; g < G; g++) {
            raw[g] = Eight<T>();
            if (mine) raw[g].load(q, c.q.at(batch, head + g, 0) + lane * 8);
        }
    }

    // The columns that are read together, in their storage dtype.
    struct Stage {
        typename Stored<T>::Raw keys[DECODE_UNROLL], values[DECODE_UNROLL];
        float added[DECODE_UNROLL];
    };

    // Reads column `row` of a store, unless there are no more than `count`, as row u of the columns that are read
    // together.
    SFA_DEVICE void read_row(Stage& stage, int u, const Store<T>& store, int row, int count) {
        stage.keys[u] = stage.values[u] = Stored<T>::zero();
        stage.added[u] = row < count ? 0.f : -hw::infinity();
        if (row >= count) return;
        if (store.ln) stage.added[u] = LOG2_E * store.ln[row];
        if (!OWN_VALUES && !mine) return;
        if (!OWN_VALUES || mine) stage.keys[u] = Stored<T>::raw(store.keys, row * int(dim) + lane * 8);
        if (!OWN_VALUES || mine_of_value())
            stage.values[u] = Stored<T>::raw(store.values, row * int(value_dim()) + lane * 8);
    }

    SFA_DEVICE void read(Stage& stage, const Store<T>& store, int count) {
#pragma unroll
        for (int u = 0; u < DECODE_UNROLL; u++) read_row(stage, u, store, u * STEP + sub, count);
    }

    SFA_DEVICE void scale_queries() {
#pragma unroll
        for (int i = 0; i < 8 * G; i++) queries[i / 8][i % 8] = raw[i / 8][i % 8] * scale;
    }

    SFA_DEVICE void weigh_all(const Stage& stage) {
        float keys[DECODE_UNROLL][8], values[DECODE_UNROLL][8];
#pragma unroll
        for (int u = 0; u < DECODE_UNROLL; u++) {
            Stored<T>::widen(keys[u], stage.keys[u]);
            Stored<T>::widen(values[u], stage.values[u]);
        }
#pragma unroll
        for (int g = 0; g < G; g++) weigh(g, keys, values, stage.added);
    }

    // Attends columns [begin, end) of one list; the next ones are in flight while these are weighed. Closed chains if
    // `far`, which begin where the columns of a page are read together, else those of `store`. Each lane holds the
    // address of one of 32 pages: a load of one address a page would have to wait for the columns that are in flight.
    SFA_DEVICE void columns(Store<T> store, const Closed<T>& closed, bool far, int begin, int end) {
        if (begin >= end) return;
        constexpr int COLUMNS = STEP * DECODE_UNROLL;
        static_assert(PAGE % COLUMNS == 0, "columns that are read together lie in one page");
        int left = end - begin, row = begin % int(PAGE), pages = (row + left + int(PAGE) - 1) / int(PAGE), page = 0;
        Global<const uint64_t> table = closed.pages.table + begin / int(PAGE);
        int own_page = threadIdx.x % 32;
        uint64_t address = 0;
        if (far) {
            if (own_page < pages) address = table[own_page];
            store = closed.store(hw::shuffle(address, 0), row);
        } else {
            store = store.after(begin, dim, value_dim());
        }
        Stage stage;
        read(stage, store, left);
        scale_queries();
        for (; left > 0; left -= COLUMNS) {
            row += COLUMNS;
            if (far && row == int(PAGE)) {
                row = 0, page++;
                if (page % 32 == 0 && page + own_page < pages) address = table[page + own_page];
                uint64_t following = hw::shuffle(address, page % 32);
                if (left > COLUMNS) store = closed.store(following, 0);
            } else {
                store = store.after(COLUMNS, dim, value_dim());
            }
            Stage next;
            read(next, store, left - COLUMNS);
            weigh_all(stage);
            stage = next;
        }
    }

    // The same for closed chains that begin anywhere, as they do under a sliding window: columns that are read together
    // lie across two pages, and each row finds its own.
    SFA_DEVICE void columns_across(const Closed<T>& closed, int begin, int end) {
        if (begin >= end) return;
        scale_queries();
        for (int column = begin; column < end; column += STEP * DECODE_UNROLL) {
            Stage stage;
#pragma unroll
            for (int u = 0; u < DECODE_UNROLL; u++) {
                int at = column + u * STEP + sub;
                Store<T> store{};
                if (at < end) store = closed.store(closed.pages.table[at / int(PAGE)], at % int(PAGE));
                read_row(stage, u, store, 0, at < end);
            }
            weigh_all(stage);
        }
    }

    SFA_DEVICE void weigh(int g, const float (&keys)[DECODE_UNROLL][8], const float (&values)[DECODE_UNROLL][8],
                          const float (&added)[DECODE_UNROLL]) {
        float logits[DECODE_UNROLL], largest = partial.maximum[g];
#pragma unroll
        for (int u = 0; u < DECODE_UNROLL; u++) {
            float logit = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) logit += queries[g][i] * keys[u][i];
#pragma unroll
            for (int mask = LANES / 2; mask > 0; mask /= 2) logit += hw::shuffle_xor(logit, mask);
            logits[u] = logit + added[u];
            largest = hw::max(largest, logits[u]);
        }
        // The maximum follows only a logit that exceeds it by more than 8: weights reach 2^8, and most columns rescale
        // nothing.
        if (largest - partial.maximum[g] > 8.f) {
            float rescale = hw::exp2(partial.maximum[g] - largest);
            partial.maximum[g] = largest;
            partial.sum[g] *= rescale;
#pragma unroll
            for (int i = 0; i < 8; i++) partial.output[g][i] *= rescale;
        }
        float base = partial.maximum[g] == -hw::infinity() ? 0.f : partial.maximum[g];
#pragma unroll
        for (int u = 0; u < DECODE_UNROLL; u++) {
            float weight = hw::exp2(logits[u] - base);
            partial.sum[g] += weight;
#pragma unroll
            for (int i = 0; i < 8; i++) partial.output[g][i] += weight * values[u][i];
        }
    }

    // Joins the block's partial results, first within each warp, then through shared memory, always in the same order.
    // Writes rows `row` to `row + G` of part `part`. A meeting point of the block.
    SFA_DEVICE void finish(const Parts& parts, const DecodeParams& p, int64_t row, uint32_t part) {
        hw::Tile shared = hw::tile(0, G * DECODE_WARPS * ROW * 4);
        int warp = threadIdx.x / 32, first = threadIdx.x % 32;
#pragma unroll
        for (int g = 0; g < G; g++) {
#pragma unroll
            for (int mask = LANES; mask < 32; mask *= 2) {
                float other[8];
#pragma unroll
                for (int i = 0; i < 8; i++) other[i] = hw::shuffle_xor(partial.output[g][i], mask);
                float maximum = hw::shuffle_xor(partial.maximum[g], mask), sum = hw::shuffle_xor(partial.sum[g], mask);
                partial.merge(g, maximum, sum, other);
            }
            if (first >= LANES) continue;
            uint32_t at = (g * DECODE_WARPS + warp) * ROW * 4;
            const float(&x)[8] = partial.output[g];
            hw::store(shared, at + lane * 32, float4{x[0], x[1], x[2], x[3]});
            hw::store(shared, at + lane * 32 + 16, float4{x[4], x[5], x[6], x[7]});
            if (lane == 0) hw::store(shared, at + D * 4, float2{partial.maximum[g], partial.sum[g]});
        }
        __syncthreads();
        join_warps<D>(parts, p, value_dim(), G, row, part);
        __syncthreads();
    }
};

// Whether this block is the last of its list to arrive; it may then read what the others wrote. A meeting point of the
// block.
SFA_DEVICE bool comes_last(const Global<uint32_t>& arrived, int64_t list) {
    hw::Tile flag = hw::tile(0, 4);
    hw::fence();
    __syncthreads();
    if (threadIdx.x == 0) hw::store(flag, 0, hw::count(arrived, list) + 1);
    __syncthreads();
    bool last = hw::load<uint32_t>(flag, 0) == gridDim.y;
    if (last) hw::fence();
    return last;
}

// Joins the parts of one row, in order. A row that holds a number that is not finite becomes NaN throughout. One warp.
template <class T, int D>
SFA_DEVICE void join(const Parts& parts, const Global<T>& output, const DecodeParams& p, uint32_t dim, int64_t row) {
    constexpr int PAIRS = D / 64, TOGETHER = 8;
    int lane = threadIdx.x % 32, count = p.parts;
    int64_t first = row * count;
    float2 x[TOGETHER][PAIRS];
    auto read = [&](int part) {
#pragma unroll
        for (int i = 0; i < TOGETHER * PAIRS; i++) {
            int at = part + i / PAIRS, d = i % PAIRS * 64 + lane * 2;
            x[i / PAIRS][i % PAIRS] = float2{0, 0};
            if (at < count && d < int(dim))
                x[i / PAIRS][i % PAIRS] = load_vector<float2>(parts.outputs, (first + at) * dim + d);
        }
    };
    auto sums = [&](int part) {
        return part < count ? load_vector<float2>(parts.sums, (first + part) * 2) : float2{-hw::infinity(), 0};
    };
    // The first parts are in flight while their weights are computed.
    read(0);
    float2 mine = sums(lane);
    float maximum = mine.x, total = 0, out[PAIRS][2] = {};
    for (int part = 32 + lane; part < count; part += 32) maximum = hw::max(maximum, sums(part).x);
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) maximum = hw::max(maximum, hw::shuffle_xor(maximum, mask));
    float base = maximum == -hw::infinity() ? 0.f : maximum;
    for (int start = 0; start < count; start += 32) {
        if (start > 0) mine = sums(start + lane);
        float weight = hw::exp2(mine.x - base);
        total += mine.y * weight;
        for (int part = 0; part < 32 && start + part < count; part += TOGETHER) {
            if (start + part > 0) read(start + part);
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) {
                float of_part = hw::shuffle(weight, part + i);
#pragma unroll
                for (int pair = 0; pair < PAIRS; pair++) {
                    out[pair][0] += of_part * x[i][pair].x;
                    out[pair][1] += of_part * x[i][pair].y;
                }
            }
        }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) total += hw::shuffle_xor(total, mask);
    float inverse = 1.f / total, check = inverse * 0.f;
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
        out[pair][0] *= inverse, out[pair][1] *= inverse;
        check += out[pair][0] * 0.f + out[pair][1] * 0.f;
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) check += hw::shuffle_xor(check, mask);
#pragma unroll
    for (int pair = 0; pair < PAIRS; pair++) {
        int d = pair * 64 + lane * 2;
        if (d >= int(dim)) continue;
        if (check != 0.f) out[pair][0] = out[pair][1] = hw::nan();
        Stored<T>::store_pair(output, row * dim + d, out[pair][0], out[pair][1]);
    }
}

// A batch row that sits out leaves its output alone.
//
// blockIdx.x: the list. blockIdx.y: 0 for the appending block, else 1 + share * splits + split. `counters` (4, lists):
// the blocks that have arrived, 0 between launches; the list's next length, and its next `starts`.
template <class T, int D, class Decoder, bool OWN_VALUES>
SFA_DEVICE void decode(const Global<const T>& q, const Global<const T>& k, const Global<const T>& v,
                       const Global<const float>& tests, const Global<const float>& scores,
                       const CacheState<T>& state, const Global<float>& memory, const Global<uint32_t>& counters,
                       const Global<T>& output, const CacheParams& c, const DecodeParams& p) {
    int64_t list = blockIdx.x;
    constexpr int G = Decoder::G;
    int group = c.sizes.heads / c.sizes.lists, share = 0, shares = (group + G - 1) / G, kinds = 2;
    uint32_t batch = list / c.sizes.lists, head = list % c.sizes.lists * group, part = 0,
             value_dim = OWN_VALUES ? c.value_dim : c.sizes.head_dim;
    Global<uint32_t> next = counters + gridDim.x, next_starts = next + gridDim.x;
    bool slides = c.slide != NO_SLIDE;
    // The query's token, and the first token that it sees.
    uint32_t before = state.seen ? state.seen[batch] : c.first;
    if (before == SITS_OUT) return;
    uint32_t token = p.appends ? before : before - 1, seen = slides ? first_seen(c.slide, token) : 0;
    if (slides && c.slide <= c.window) kinds = 3;
    Parts parts(memory, p, value_dim);
    if (blockIdx.y > 0) share = (blockIdx.y - 1) / p.splits, shares = share + 1, kinds = 1;
    Decoder decoder(c, p.scale);
    decoder.start(q, c, batch, head + share * G, group - share * G);
    constexpr bool CODED = Decoder::CODED;
    Closed<T, CODED> closed{{state.table + list * c.pages, c.sizes.head_dim, value_dim, c.fold == MEAN, c.code}};
    // Other blocks of the list read the old length until the last of them has arrived.
    int length = int(state.lengths[list]), begin = length, end = length, start = 0;
    if (slides) {
        start = int(state.starts[list]);
        // After an append `starts` are those of the next row.
        if (!p.appends && start > 0 && closed.pages.token(start - 1) >= seen) start--;
        // It came by way of an address in memory: the compiler would guard every shuffle below.
        start = hw::uniform(start);
    }
    if (blockIdx.y == 0) {
        if (p.appends && threadIdx.x < 32) {
            CacheList<T, OWN_VALUES, CODED> taken(c, state);
            taken.take(q, k, v, tests, Global<const float>{}, scores, 0);
            taken.finish(next);
            taken.slide(token + 1);
            taken.write_starts(next_starts);
        }
        __syncthreads();
        // The chain that was closed ends one token before the edge.
        if (p.appends && token >= seen + c.window + 1) end = int(next[list]);
    } else {
        // Splits follow from the number of entries alone, so that equal lists give equal bits. They begin where pages
        // do, unless a sliding window has left entries behind.
        constexpr int WHOLE = int(PAGE);
        int all = length - start, splits = int(p.splits), pages = (all + WHOLE - 1) / WHOLE;
        int split = (blockIdx.y - 1) % p.splits, each = max(LEAST_PAGES, (pages + splits - 1) / splits) * WHOLE;
        part = 1 + split;
        begin = start + min(all, split * each), end = min(length, begin + each);
    }
    for (; share < shares; share++) {
        if (share > 0 && blockIdx.y == 0) decoder.start(q, c, batch, head + share * G, group - share * G);
#pragma unroll 1
        for (int kind = 0; kind < kinds; kind++) {
            bool far = kind == 0;
            int64_t local = list * (c.window + 1);
            Store<T> store = {state.local_k + local * c.sizes.head_dim, state.local_v + local * value_dim,
                              state.local_ln ? state.local_ln + local : state.local_ln};
            int from = far ? begin : 0, to = far ? end : state.local_lengths ? int(state.local_lengths[list]) : 0;
            if (kinds == 3 && !far) {
                // The tokens from `seen` on: from its slot to the end of the ring, then from the ring's start.
                int oldest = int(seen % c.window), newest = int(token % c.window);
                bool second = kind == 2, wraps = oldest > newest;
                from = second ? 0 : oldest, to = second && !wraps ? 0 : !second && wraps ? int(c.window) : newest + 1;
            }
            if (far && from % int(PAGE) != 0)
                decoder.columns_across(closed, from, to);
            else
                decoder.columns(store, closed, far, from, to);
        }
        decoder.finish(parts, p, list * group + share * G, part);
    }
    if (!comes_last(counters, list)) return;
    for (int row = threadIdx.x / 32; row < group; row += DECODE_WARPS)
        join<T, D>(parts, output, p, value_dim, list * group + row);
    if (threadIdx.x != 0) return;
    counters.set(list, 0);
    if (!p.appends) return;
    state.lengths.set(list, next[list]);
    if (!slides) return;
    state.starts.set(list, next_starts[list]);
    state.starts.set(gridDim.x + list, next_starts[gridDim.x + list]);
}

// Resident blocks a multiprocessor: as `resident` in src/cuda/decode.rs.
template <class T, int G>
constexpr int DECODE_BLOCKS = sizeof(T) == 4 ? 2 : G == 1 ? 4 : G == 2 ? 3 : 2;

#define DECODE_KERNEL(name, OWN_VALUES, dtype, T, D, G)                                                              \
    SHARED_BYTES(name##_##D##_##G##_##dtype, Decoder<T, D, G, OWN_VALUES>::BYTES)                                    \
    KERNEL __launch_bounds__(128, (DECODE_BLOCKS<T, G>)) name##_##D##_##G##_##dtype(                                 \
        Global<const T> q, Global<const T> k, Global<const T> v, Global<const float> tests,                          \
        Global<const float> scores, CACHE_STATE(T), Global<float> parts, Global<uint32_t> counters,                  \
        Global<T> output, CacheParams c, DecodeParams p) {                                                           \
        decode<T, D, Decoder<T, D, G, OWN_VALUES>, OWN_VALUES>(q, k, v, tests, scores, STATE(T), parts, counters,    \
                                                               output, c, p);                                        \
    }
#define DECODE_DIM(name, own, dtype, T, D)         \
    DECODE_KERNEL(name, own, dtype, T, D, 1)       \
    DECODE_KERNEL(name, own, dtype, T, D, 2)       \
    DECODE_KERNEL(name, own, dtype, T, D, 4)
#define DECODE_DTYPE(name, own, dtype, T)                                                                       \
    DECODE_DIM(name, own, dtype, T, 64) DECODE_DIM(name, own, dtype, T, 128) DECODE_DIM(name, own, dtype, T, 256)

#define DIM_ENTRIES(name, dtype, D)                                                             \
    ENTRY(name##_##D##_1_##dtype) ENTRY(name##_##D##_2_##dtype) ENTRY(name##_##D##_4_##dtype)
#define DTYPE_ENTRIES(name, dtype)                                                              \
    DIM_ENTRIES(name, dtype, 64) DIM_ENTRIES(name, dtype, 128) DIM_ENTRIES(name, dtype, 256)
