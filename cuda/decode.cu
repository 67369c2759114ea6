// One query row per head against a ragged store of columns: bound by memory, so each key and value is read once and
// serves the query heads of its group. A list's far columns are split over blocks by its length, which only the device
// knows; one more block takes its local columns (the open chain and the window). decode_merge joins the parts.
#include "params.cuh"
#include "hw.cuh"

typedef Global<const uint32_t> Counts;
typedef Global<const float> Numbers;

struct Single {};  // f32 elements

template <class T>
struct Stored {
    typedef Global<const uint16_t> View;
    typedef Global<uint16_t> Target;
    typedef uint4 Raw;
    SFA_DEVICE static Raw zero() { return uint4{0, 0, 0, 0}; }
    SFA_DEVICE static Raw raw(const View& view, int64_t at) { return load_vector<uint4>(view, at); }
    SFA_DEVICE static void load(float (&x)[8], const View& view, int64_t at) { widen(x, raw(view, at)); }
    SFA_DEVICE static void widen(float (&x)[8], const Raw& words) {
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; i++) x[2 * i] = hw::low<T>(pairs[i]), x[2 * i + 1] = hw::high<T>(pairs[i]);
    }
    SFA_DEVICE static void store(const Target& view, int64_t at, const float (&x)[8]) {
        store_vector(view, at, uint4{T::pack(x[0], x[1]), T::pack(x[2], x[3]), T::pack(x[4], x[5]), T::pack(x[6], x[7])});
    }
};

template <>
struct Stored<Single> {
    typedef Global<const float> View;
    typedef Global<float> Target;
    struct Raw {
        float4 low, high;
    };
    SFA_DEVICE static Raw zero() { return Raw{float4{0, 0, 0, 0}, float4{0, 0, 0, 0}}; }
    SFA_DEVICE static Raw raw(const View& view, int64_t at) {
        return Raw{load_vector<float4>(view, at), load_vector<float4>(view, at + 4)};
    }
    SFA_DEVICE static void load(float (&x)[8], const View& view, int64_t at) { widen(x, raw(view, at)); }
    SFA_DEVICE static void widen(float (&x)[8], const Raw& words) {
        float4 a = words.low, b = words.high;
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    }
    SFA_DEVICE static void store(const Target& view, int64_t at, const float (&x)[8]) {
        store_vector(view, at, float4{x[0], x[1], x[2], x[3]});
        store_vector(view, at + 4, float4{x[4], x[5], x[6], x[7]});
    }
};

// Columns of one kind: (lists, capacity, D), ln n (lists, capacity) or null, and how many each list has.
template <class T>
struct Store {
    typename Stored<T>::View keys, values;
    Numbers ln;
    Counts lengths;
    uint32_t capacity;
};

// Unfinished softmaxes of G rows: this lane's eight elements of D.
template <int G>
struct Partial {
    float maximum[G], sum[G], output[G][8];

    SFA_DEVICE Partial() {
#pragma unroll
        for (int g = 0; g < G; g++) {
            maximum[g] = -hw::infinity(), sum[g] = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) output[g][i] = 0;
        }
    }

    // Takes a partial result of other columns into row g.
    SFA_DEVICE void merge(int g, float other_maximum, float other_sum, const float (&other)[8]) {
        float raised = hw::max(maximum[g], other_maximum), base = raised == -hw::infinity() ? 0.f : raised;
        float mine = hw::exp2(maximum[g] - base), theirs = hw::exp2(other_maximum - base);
        maximum[g] = raised;
        sum[g] = sum[g] * mine + other_sum * theirs;
#pragma unroll
        for (int i = 0; i < 8; i++) output[g][i] = output[g][i] * mine + other[i] * theirs;
    }
};

constexpr int DECODE_WARPS = 4, DECODE_UNROLL = 4;

// Rows of D elements are read by D / 8 lanes each; a warp reads 256 / D rows at once.
template <class T, int D, int G>
struct Decoder {
    static constexpr int LANES = D / 8, TOGETHER = 32 / LANES, STEP = TOGETHER * DECODE_WARPS;

    const DecodeParams& p;
    int lane, sub;  // which eight elements, and which of the rows that are read together
    uint32_t dim;
    bool mine;
    float queries[G][8];
    Partial<G> partial;

    SFA_DEVICE Decoder(const DecodeParams& p, const typename Stored<T>::View& q, int64_t first_row)
        : p(p), lane(threadIdx.x % LANES), sub(threadIdx.x / LANES), dim(p.head_dim), mine(lane * 8 < int(p.head_dim)) {
#pragma unroll
        for (int g = 0; g < G; g++) {
#pragma unroll
            for (int i = 0; i < 8; i++) queries[g][i] = 0;
            if (mine) Stored<T>::load(queries[g], q, (first_row + g) * dim + lane * 8);
#pragma unroll
            for (int i = 0; i < 8; i++) queries[g][i] *= p.scale;
        }
    }

    // What is read at once, as it is stored.
    struct Stage {
        typename Stored<T>::Raw keys[DECODE_UNROLL], values[DECODE_UNROLL];
        float added[DECODE_UNROLL];
    };

    SFA_DEVICE void read(Stage& stage, const Store<T>& store, int64_t first, int column, int end) {
#pragma unroll
        for (int u = 0; u < DECODE_UNROLL; u++) {
            int at = column + u * STEP + sub;
            stage.keys[u] = stage.values[u] = Stored<T>::zero();
            stage.added[u] = at < end ? 0.f : -hw::infinity();
            if (at >= end) continue;
            if (store.ln) stage.added[u] = LOG2_E * store.ln[first + at];
            if (!mine) continue;
            stage.keys[u] = Stored<T>::raw(store.keys, (first + at) * dim + lane * 8);
            stage.values[u] = Stored<T>::raw(store.values, (first + at) * dim + lane * 8);
        }
    }

    // Columns [begin, end) of one list; the next ones are on their way while these are weighed.
    SFA_DEVICE void columns(const Store<T>& store, int64_t list, int begin, int end) {
        int64_t first = list * store.capacity;
        if (begin >= end) return;
        Stage stage;
        read(stage, store, first, begin, end);
        for (int column = begin; column < end; column += STEP * DECODE_UNROLL) {
            Stage next;
            read(next, store, first, column + STEP * DECODE_UNROLL, end);
            float keys[DECODE_UNROLL][8], values[DECODE_UNROLL][8];
#pragma unroll
            for (int u = 0; u < DECODE_UNROLL; u++) {
                Stored<T>::widen(keys[u], stage.keys[u]);
                Stored<T>::widen(values[u], stage.values[u]);
            }
#pragma unroll
            for (int g = 0; g < G; g++) weigh(g, keys, values, stage.added);
            stage = next;
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
        float base = largest == -hw::infinity() ? 0.f : largest, rescale = hw::exp2(partial.maximum[g] - base);
        partial.maximum[g] = largest;
        partial.sum[g] *= rescale;
#pragma unroll
        for (int i = 0; i < 8; i++) partial.output[g][i] *= rescale;
#pragma unroll
        for (int u = 0; u < DECODE_UNROLL; u++) {
            float weight = hw::exp2(logits[u] - base);
            partial.sum[g] += weight;
#pragma unroll
            for (int i = 0; i < 8; i++) partial.output[g][i] += weight * values[u][i];
        }
    }

    // Joins the block's parts, through shared memory, in the order of the rows that were read together, and writes them:
    // output (part, G, D), then maximum and sum (part, G, 2).
    SFA_DEVICE void finish(const Global<float>& outputs, const Global<float>& sums, int64_t part) {
        hw::Tile shared = hw::tile(0, STEP * (D + 2) * 4);
#pragma unroll
        for (int g = 0; g < G; g++) {
            uint32_t at = sub * (D + 2) * 4;
            __syncthreads();
            if (lane == 0) hw::store(shared, at, partial.maximum[g]), hw::store(shared, at + 4, partial.sum[g]);
#pragma unroll
            for (int i = 0; i < 8; i++) hw::store(shared, at + (2 + lane * 8 + i) * 4, partial.output[g][i]);
            __syncthreads();
            if (sub != 0) continue;
            for (int other = 1; other < STEP; other++) {
                uint32_t from = other * (D + 2) * 4;
                float part_output[8];
#pragma unroll
                for (int i = 0; i < 8; i++) part_output[i] = hw::load<float>(shared, from + (2 + lane * 8 + i) * 4);
                partial.merge(g, hw::load<float>(shared, from), hw::load<float>(shared, from + 4), part_output);
            }
            int64_t row = part * G + g;
            if (mine) Stored<Single>::store(outputs, row * dim + lane * 8, partial.output[g]);
            if (lane == 0) store_vector(sums, row * 2, float2{partial.maximum[g], partial.sum[g]});
        }
    }
};

// blockIdx.x: the split, the last one for local columns; blockIdx.y: the list; blockIdx.z: G of its query heads.
template <class T, int D, int G>
SFA_DEVICE void decode(const typename Stored<T>::View& q, const Store<T>& far, const Store<T>& local,
                       const Global<float>& outputs, const Global<float>& sums, const DecodeParams& p) {
    int64_t list = blockIdx.y, rows = list * gridDim.z + blockIdx.z;
    Decoder<T, D, G> decoder(p, q, rows * G);
    if (blockIdx.x < p.splits) {
        int length = int(far.lengths[list]);
        int share = (length + int(p.splits) - 1) / int(p.splits), begin = min(length, int(blockIdx.x) * share);
        decoder.columns(far, list, begin, min(length, begin + share));
    } else {
        decoder.columns(local, list, 0, int(local.lengths[list]));
    }
    decoder.finish(outputs, sums, rows * gridDim.x + blockIdx.x);
}

#define DECODE(dtype, T, D, G)                                                                                       \
    KERNEL __launch_bounds__(128) decode_##D##_##G##_##dtype(                                                        \
        Stored<T>::View q, Stored<T>::View keys, Stored<T>::View values, Numbers ln, Counts lengths,                 \
        Stored<T>::View local_keys, Stored<T>::View local_values, Numbers local_ln, Counts local_lengths,            \
        Global<float> outputs, Global<float> sums, DecodeParams p) {                                                 \
        decode<T, D, G>(q, Store<T>{keys, values, ln, lengths, p.capacity},                                          \
                        Store<T>{local_keys, local_values, local_ln, local_lengths, p.local_capacity}, outputs, sums, \
                        p);                                                                                          \
    }
#define DECODE_DIM(dtype, T, D) DECODE(dtype, T, D, 1) DECODE(dtype, T, D, 2) DECODE(dtype, T, D, 4)

// Joins the parts of one query head, in order; a row that holds anything not finite becomes NaN throughout. One warp per
// row, eight elements per lane.
template <class T>
SFA_DEVICE void merge(const Numbers& outputs, const Numbers& sums, const typename Stored<T>::Target& output,
                      const DecodeParams& p) {
    int64_t row = int64_t(blockIdx.x) * DECODE_WARPS + threadIdx.x / 32;
    if (row >= p.rows) return;
    int lane = threadIdx.x % 32;
    bool mine = lane * 8 < int(p.head_dim);
    Partial<1> all;
    for (uint32_t part = 0; part < p.parts; part++) {
        // (list and share of its heads, part, head of the share)
        int64_t at = (row / p.together * p.parts + part) * p.together + row % p.together;
        float2 sum = load_vector<float2>(sums, at * 2);
        float x[8] = {};
        if (mine) Stored<Single>::load(x, outputs, at * p.head_dim + lane * 8);
        all.merge(0, sum.x, sum.y, x);
    }
    float inverse = 1.f / all.sum[0], check = inverse * 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) all.output[0][i] *= inverse, check += all.output[0][i] * 0.f;
    for (int mask = 16; mask > 0; mask /= 2) check += hw::shuffle_xor(check, mask);
    if (!mine) return;
    if (check != 0.f) {
#pragma unroll
        for (int i = 0; i < 8; i++) all.output[0][i] = hw::nan();
    }
    Stored<T>::store(output, row * p.head_dim + lane * 8, all.output[0]);
}

#define DECODE_DTYPE(dtype, T)                                                                                     \
    DECODE_DIM(dtype, T, 64)                                                                                       \
    DECODE_DIM(dtype, T, 128)                                                                                      \
    DECODE_DIM(dtype, T, 256)                                                                                      \
    KERNEL decode_merge_##dtype(Numbers outputs, Numbers sums, Stored<T>::Target output, DecodeParams p) {         \
        merge<T>(outputs, sums, output, p);                                                                        \
    }

DECODE_DTYPE(f32, Single)
DECODE_DTYPE(f16, hw::F16)
DECODE_DTYPE(bf16, hw::BF16)

#define DIM_ENTRIES(dtype, D) ENTRY(decode_##D##_1_##dtype) ENTRY(decode_##D##_2_##dtype) ENTRY(decode_##D##_4_##dtype)
#define DTYPE_ENTRIES(dtype) \
    DIM_ENTRIES(dtype, 64) DIM_ENTRIES(dtype, 128) DIM_ENTRIES(dtype, 256) ENTRY(decode_merge_##dtype)

MODULE(decode, DTYPE_ENTRIES(f32) DTYPE_ENTRIES(f16) DTYPE_ENTRIES(bf16))
