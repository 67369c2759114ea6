// One new token of a cache for query heads that share a list: decode_step.cuh on tensor cores.
//
// The idea: a key that serves several query heads costs each of them a scalar product, and these took longer than the
// memory. Here the columns are the rows of a product and up to eight query heads its columns, so that all heads cost
// one product. Keys and values go from memory to registers, and from there into products as they are: no shared memory
// and no meeting of warps until the end.
//
// 1. A warp has 16 columns of every 64, and lane (r, quarter) of it, with r = lane / 4 and quarter = lane % 4, reads
//    keys r and r + 8 and values 2 quarter, 2 quarter + 1, and the same plus 8.
// 2. A product over head sizes may add in any order. So a lane's 16 bytes of a key are four fragments of `mma`, and the
//    queries' fragments are the same 16 bytes of a query: no shuffle, and all reads are whole.
// 3. Logits come with a column for each head; `hw::transpose` makes weights of them, which a product with values takes.
// 4. Values are the transposed left side of that product: its rows are numbers of a value. Two columns' numbers are
//    interleaved in registers. Row r of eight of them is number 8 r + i, so that a lane ends with eight neighbouring
//    numbers of its two heads' outputs.
// 5. The maximum of a head is the same in all lanes, and follows a logit only if that is larger by more than 8.
// 6. Keys of the next columns are asked for once these have been multiplied, and values likewise: both are in flight
//    for half of the time.
// 7. Closed chains in 8 bits (CODE, decode_coded.cuh) become pairs of T in registers. A lane's 16 bytes are then 16
//    numbers of a key, or of a value at D = 128, and rows in T are read in the same order. A key's scale multiplies its
//    logit, and a value's scale its weight.
//
// Shared memory as in decode_step.cuh, for eight heads.
#pragma once

#include "cache/decode_coded.cuh"
#include "cache/decode_step.cuh"

// T: half_t or bfloat16_t. D: 64 or 128, the padded head size. CODE: the PageCode of closed chains.
template <class T, int D, unsigned CODE = AS_T>
struct GroupDecoder {
    typedef typename Stored<T>::Half Half;
    static constexpr bool CODED = CODE != AS_T;
    // The query heads of a block, the columns of a warp, and those of a block.
    static constexpr int G = 8, COLUMNS = 16, STEP = COLUMNS * DECODE_WARPS;
    static constexpr int ROW = D + 4;
    static constexpr uint32_t BYTES = G * DECODE_WARPS * ROW * 4;
    static_assert(STEP == int(PAGE), "a block's columns are those of a page");

    int r, quarter, heads = 0;
    uint32_t dim;
    float scale;
    uint4 queries[D / 32];
    // Of heads 2 quarter and 2 quarter + 1.
    float maximum[2], sum[2], output[D / 16][4];
    WeightUnit<Half, CODED> unit;

    SFA_DEVICE GroupDecoder(const CacheParams& c, float scale)
        : r(threadIdx.x % 32 / 4), quarter(threadIdx.x % 4), dim(c.sizes.head_dim), scale(scale) {}

    // The place of number j of the eight that a lane reads at a time of a key, and of a value.
    SFA_DEVICE int key_place(int j) const { return (CODED ? (j / 2 * 4 + quarter) * 2 + j % 2 : j * 4 + quarter) * 8; }
    SFA_DEVICE int value_place(int j) const { return (CODED ? r * (D / 64) + j : j * 8 + r) * 8; }

    // Reads the query heads of a list from `head` on, as many as there are `left`.
    SFA_DEVICE void start(const Global<const T>& q, const CacheParams& c, uint32_t batch, uint32_t head, int left) {
        heads = min(G, left);
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            uint32_t at = key_place(i);
            queries[i] = Stored<T>::zero();
            if (r < heads && at < dim) queries[i] = Stored<T>::any(q, c.q.at(batch, head + r, 0) + at);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) maximum[i] = -hw::infinity(), sum[i] = 0;
#pragma unroll
        for (int i = 0; i < D / 4; i++) output[i / 4][i % 4] = 0;
        unit.clear();
    }

    struct Keys {
        typedef Store<T> From;
        uint4 rows[2][D / 32];
        float added[2];

        SFA_DEVICE uint4 numbers(int i, int j) const { return rows[i][j]; }
        SFA_DEVICE float factor(int, float scale) const { return scale; }
        SFA_DEVICE float value_factor(int) const { return 1.f; }
    };
    struct Values {
        uint4 rows[4][D / 64];

        SFA_DEVICE uint4 numbers(int i, int j) const { return rows[i][j]; }
    };
    typedef CodedKeys<Half, D, CODE> ByteKeys;
    typedef CodedValues<Half, D, CODE> ByteValues;

    SFA_DEVICE static Store<T> open(const Closed<T, CODED>& closed, uint64_t address, int row, const Store<T>&) {
        return closed.store(address, row);
    }
    SFA_DEVICE static CodedStore open(const Closed<T, CODED>& closed, uint64_t address, int row, const CodedStore&) {
        return closed.coded_store(address, row);
    }

    // Column `row` of a store, unless there are no more than `count`.
    SFA_DEVICE void read_key(Keys& keys, int i, const Store<T>& store, int row, int count) const {
        keys.added[i] = row < count ? 0.f : -hw::infinity();
        if (row < count && store.ln) keys.added[i] = LOG2_E * store.ln[row];
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            int at = key_place(j);
            keys.rows[i][j] = Stored<T>::zero();
            if (row < count && at < int(dim)) keys.rows[i][j] = Stored<T>::raw(store.keys, row * int(dim) + at);
        }
    }

    SFA_DEVICE void read_value(Values& values, int i, const Store<T>& store, int row, int count) const {
#pragma unroll
        for (int j = 0; j < D / 64; j++) {
            int at = value_place(j);
            values.rows[i][j] = Stored<T>::zero();
            if (row < count && at < int(dim)) values.rows[i][j] = Stored<T>::raw(store.values, row * int(dim) + at);
        }
    }

    SFA_DEVICE void read_key(ByteKeys& keys, int i, const CodedStore& store, int row, int count) const {
        keys.read(i, store, row, row < count, quarter, dim);
    }
    SFA_DEVICE void read_value(ByteValues& values, int i, const CodedStore& store, int row, int count) const {
        values.read(i, store, row, row < count, r, dim);
    }

    SFA_DEVICE int key_row(int i) const { return r + i * 8; }
    SFA_DEVICE int value_row(int i) const { return quarter * 2 + i % 2 + i / 2 * 8; }

    template <class K, class S>
    SFA_DEVICE void read_keys(K& keys, const S& store, int count) const {
#pragma unroll
        for (int i = 0; i < 2; i++) read_key(keys, i, store, key_row(i), count);
    }

    template <class V, class S>
    SFA_DEVICE void read_values(V& values, const S& store, int count) const {
#pragma unroll
        for (int i = 0; i < 4; i++) read_value(values, i, store, value_row(i), count);
    }

    // Logits in base 2: [0] and [1] are column r for heads 2 quarter and 2 quarter + 1, [2] and [3] column r + 8.
    template <class K>
    SFA_DEVICE void multiply_keys(float (&s)[4], const K& keys) const {
#pragma unroll
        for (int i = 0; i < 4; i++) s[i] = 0;
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
            const uint4 a = keys.numbers(0, j), b = keys.numbers(1, j);
            hw::multiply_add(Half(), s, {a.x, b.x, a.y, b.y}, queries[j].x, queries[j].y);
            hw::multiply_add(Half(), s, {a.z, b.z, a.w, b.w}, queries[j].z, queries[j].w);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) s[i] = s[i] * keys.factor(i / 2, scale) + keys.added[i / 2];
    }

    // Turns logits into weights, and raises the maxima where they have to follow.
    SFA_DEVICE void weigh(float (&s)[4]) {
        float largest[2] = {hw::max(s[0], s[2]), hw::max(s[1], s[3])};
        if (hw::warp_any(largest[0] - maximum[0] > 8.f || largest[1] - maximum[1] > 8.f)) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float raised = hw::max(maximum[i], largest[i]);
#pragma unroll
                for (int mask = 4; mask < 32; mask *= 2) raised = hw::max(raised, hw::shuffle_xor(raised, mask));
                float rescale = hw::exp2(maximum[i] - (raised == -hw::infinity() ? 0.f : raised));
                maximum[i] = raised, sum[i] *= rescale;
#pragma unroll
                for (int j = 0; j < D / 16; j++) output[j][i] *= rescale, output[j][2 + i] *= rescale;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            s[i] = hw::exp2(s[i] - (maximum[i % 2] == -hw::infinity() ? 0.f : maximum[i % 2]));
            sum[i % 2] += s[i];
        }
    }

    // `factors`: those of the two columns' values.
    template <class V>
    SFA_DEVICE void multiply_values(float (&weights)[4], float (&factors)[2], const V& values) {
        unit.fit(weights, factors, output);
        uint32_t first = hw::transpose(Half::pack(weights[0], weights[1]));
        uint32_t second = hw::transpose(Half::pack(weights[2], weights[3]));
        auto multiply = [&](float (&to)[4], uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
            const uint32_t left[4] = {hw::low_halves(a, b), hw::high_halves(a, b), hw::low_halves(c, d),
                                      hw::high_halves(c, d)};
            hw::multiply_add(Half(), to, left, first, second);
        };
#pragma unroll
        for (int j = 0; j < D / 64; j++) {
            const uint4 a = values.numbers(0, j), b = values.numbers(1, j), c = values.numbers(2, j),
                        d = values.numbers(3, j);
            multiply(output[4 * j], a.x, b.x, c.x, d.x);
            multiply(output[4 * j + 1], a.y, b.y, c.y, d.y);
            multiply(output[4 * j + 2], a.z, b.z, c.z, d.z);
            multiply(output[4 * j + 3], a.w, b.w, c.w, d.w);
        }
    }

    // As Decoder::columns.
    SFA_DEVICE void columns(const Store<T>& store, const Closed<T, CODED>& closed, bool far, int begin, int end) {
        if constexpr (!CODED) return walk<Keys, Values>(store, closed, far, begin, end);
        if (far)
            walk<ByteKeys, ByteValues>(CodedStore{}, closed, true, begin, end);
        else
            local_columns(store, begin, end);
    }

    // Local columns beside closed chains in 8 bits: few, and read in turn, so that registers are not held for them.
    SFA_DEVICE void local_columns(Store<T> store, int begin, int end) {
        int mine = threadIdx.x / 32 * COLUMNS;
        store = store.after(begin + mine, dim, dim);
#pragma unroll 1
        for (int left = end - begin - mine; left > 0; left -= STEP) {
            float s[4], factors[2] = {1.f, 1.f};
            Keys keys;
            read_keys(keys, store, left);
            multiply_keys(s, keys);
            weigh(s);
            Values values;
            read_values(values, store, left);
            multiply_values(s, factors, values);
            store = store.after(STEP, dim, dim);
        }
    }

    // Columns that are read as K and V; the next ones are in flight.
    template <class K, class V>
    SFA_DEVICE void walk(typename K::From store, const Closed<T, CODED>& closed, bool far, int begin, int end) {
        if (begin >= end) return;
        int mine = threadIdx.x / 32 * COLUMNS, left = end - begin - mine;
        if (left <= 0) return;
        int pages = (end - begin + int(PAGE) - 1) / int(PAGE), page = 0, own_page = threadIdx.x % 32;
        Global<const uint64_t> table = closed.pages.table + begin / int(PAGE);
        uint64_t address = 0;
        if (far) {
            if (own_page < pages) address = table[own_page];
            store = open(closed, hw::shuffle(address, 0), mine, store);
        } else {
            store = store.after(begin + mine, dim, dim);
        }
        K keys;
        V values;
        read_keys(keys, store, left);
        read_values(values, store, left);
        for (; left > 0; left -= STEP) {
            if (far) {
                page++;
                if (page % 32 == 0 && page + own_page < pages) address = table[page + own_page];
                uint64_t following = hw::shuffle(address, page % 32);
                if (left > STEP) store = open(closed, following, mine, store);
            } else {
                store = store.after(STEP, dim, dim);
            }
            float s[4];
            multiply_keys(s, keys);
            float factors[2] = {keys.value_factor(0), keys.value_factor(1)};
            read_keys(keys, store, left - STEP);
            weigh(s);
            multiply_values(s, factors, values);
            read_values(values, store, left - STEP);
        }
    }

    // As Decoder::columns_across.
    SFA_DEVICE void columns_across(const Closed<T, CODED>& closed, int begin, int end) {
        if constexpr (CODED)
            across<ByteKeys, ByteValues>(closed, begin, end);
        else
            across<Keys, Values>(closed, begin, end);
    }

    template <class K, class V>
    SFA_DEVICE void across(const Closed<T, CODED>& closed, int begin, int end) {
        for (int first = begin + threadIdx.x / 32 * COLUMNS; first < end; first += STEP) {
            auto store = [&](int column) {
                typename K::From none{};
                return column < end ? open(closed, closed.pages.table[column / int(PAGE)], column % int(PAGE), none)
                                    : none;
            };
            K keys;
            V values;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int column = first + key_row(i);
                read_key(keys, i, store(column), 0, column < end);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int column = first + value_row(i);
                read_value(values, i, store(column), 0, column < end);
            }
            float s[4];
            multiply_keys(s, keys);
            float factors[2] = {keys.value_factor(0), keys.value_factor(1)};
            weigh(s);
            multiply_values(s, factors, values);
        }
    }

    // As Decoder::finish.
    SFA_DEVICE void finish(const Parts& parts, const DecodeParams& p, int64_t row, uint32_t part) {
        hw::Tile shared = hw::tile(0, BYTES);
        unit.undo(output);
        int warp = threadIdx.x / 32;
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) sum[i] += hw::shuffle_xor(sum[i], mask);
            uint32_t at = ((quarter * 2 + i) * DECODE_WARPS + warp) * ROW * 4;
#pragma unroll
            for (int j = 0; j < D / 64; j++) {
                float(&x)[4] = output[4 * j], (&y)[4] = output[4 * j + 1], (&z)[4] = output[4 * j + 2],
                     (&w)[4] = output[4 * j + 3];
                uint32_t to = at + value_place(j) * 4;
                hw::store(shared, to, float4{x[i], x[2 + i], y[i], y[2 + i]});
                hw::store(shared, to + 16, float4{z[i], z[2 + i], w[i], w[2 + i]});
            }
            if (r == 0) hw::store(shared, at + D * 4, float2{maximum[i], sum[i]});
        }
        __syncthreads();
        join_warps<D>(parts, p, dim, heads, row, part);
        __syncthreads();
    }
};

// Resident blocks a multiprocessor: as `resident` in src/cuda/decode.rs.
template <int D, unsigned CODE>
constexpr int GROUP_BLOCKS = CODE != AS_T ? 3 : D == 64 ? 3 : 2;

#define DECODE_GROUP_KERNEL(name, dtype, T, D, CODE)                                                                 \
    SHARED_BYTES(name##_##D##_##dtype, GroupDecoder<T, D, CODE>::BYTES)                                              \
    KERNEL __launch_bounds__(128, (GROUP_BLOCKS<D, CODE>)) name##_##D##_##dtype(                                     \
        Global<const T> q, Global<const T> k, Global<const T> v, Global<const float> tests,                          \
        Global<const float> scores, CACHE_STATE(T), Global<float> parts, Global<uint32_t> counters,                  \
        Global<T> output, CacheParams c, DecodeParams p) {                                                           \
        decode<T, D, GroupDecoder<T, D, CODE>, false>(q, k, v, tests, scores, STATE(T), parts, counters, output, c,  \
                                                      p);                                                            \
    }
#define DECODE_GROUP(dtype, T, D) DECODE_GROUP_KERNEL(decode_group, dtype, T, D, AS_T)
