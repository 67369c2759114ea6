// The parts of decode_step.cuh: rows in their storage dtype, where a list's columns are, and unfinished softmaxes.
#pragma once

#include "cache/cache_list.cuh"
#include "lib/hw.cuh"

// Eight elements in their storage dtype.
template <class T>
struct Stored;

template <class T>
struct StoredHalves {
    typedef uint4 Raw;
    typedef T Half;
    SFA_DEVICE static Raw zero() { return uint4{0, 0, 0, 0}; }
    template <class View>
    SFA_DEVICE static Raw raw(const View& view, int64_t at) {
        return hw::load_once<uint4>(view, at);
    }
    // The same from any place.
    template <class View>
    SFA_DEVICE static Raw any(const View& view, int64_t at) {
        if (at % 8 == 0) return load_vector<uint4>(view, at);
        uint32_t words[4];
        for (int i = 0; i < 4; i++) words[i] = T::pack(::widen(view[at + 2 * i]), ::widen(view[at + 2 * i + 1]));
        return {words[0], words[1], words[2], words[3]};
    }
    SFA_DEVICE static void widen(float (&x)[8], const Raw& words) {
        const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; i++) x[2 * i] = hw::low<T>(pairs[i]), x[2 * i + 1] = hw::high<T>(pairs[i]);
    }
    template <class View>
    SFA_DEVICE static void store_pair(const View& view, int64_t at, float a, float b) {
        store_vector(view, at, T::pack(a, b));
    }
};

template <>
struct Stored<half_t> : StoredHalves<hw::F16> {};
template <>
struct Stored<bfloat16_t> : StoredHalves<hw::BF16> {};

template <>
struct Stored<float> {
    struct Raw {
        float4 low, high;
    };
    SFA_DEVICE static Raw zero() { return Raw{float4{0, 0, 0, 0}, float4{0, 0, 0, 0}}; }
    template <class View>
    SFA_DEVICE static Raw raw(const View& view, int64_t at) {
        return Raw{hw::load_once<float4>(view, at), hw::load_once<float4>(view, at + 4)};
    }
    SFA_DEVICE static void widen(float (&x)[8], const Raw& words) {
        float4 a = words.low, b = words.high;
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    }
    template <class View>
    SFA_DEVICE static void store_pair(const View& view, int64_t at, float a, float b) {
        store_vector(view, at, float2{a, b});
    }
};

// Columns of one list from one of them on: keys, values, and ln n or null.
template <class T>
struct Store {
    Global<T> keys, values;
    Global<float> ln;

    SFA_DEVICE Store after(int columns, uint32_t dim, uint32_t value_dim) const {
        return {keys + columns * int(dim), values + columns * int(value_dim), ln ? ln + columns : ln};
    }
};

// The same of columns in 8 bits.
struct CodedStore {
    Global<uint8_t> keys, values;
    Global<uint32_t> scales;
    Global<float> ln;

    SFA_DEVICE CodedStore after(int columns, uint32_t dim, uint32_t value_dim) const {
        return {keys + columns * int(dim), values + columns * int(value_dim), scales + columns, ln ? ln + columns : ln};
    }
};

// A list's closed chains, page by page.
template <class T, bool CODED = false>
struct Closed {
    Pages<T, CODED> pages;

    // The columns of the page at `address`, from number `row` on.
    SFA_DEVICE Store<T> store(uint64_t address, int row) const {
        Page<T> page = pages.of(address);
        Global<float> none{};
        return Store<T>{page.keys, page.values, pages.sized ? page.ln : none}.after(row, pages.dim, pages.value_dim);
    }

    SFA_DEVICE CodedStore coded_store(uint64_t address, int row) const {
        CodedPage page = pages.coded_of(address);
        Global<float> none{};
        return CodedStore{page.rows.keys, page.rows.values, page.rows.scales, pages.sized ? page.ln : none}.after(
            row, pages.dim, pages.value_dim);
    }
};

// Unfinished softmaxes of G rows: this lane's eight elements of a value.
template <int G>
struct Partial {
    float maximum[G], sum[G], output[G][8];

    SFA_DEVICE void clear() {
#pragma unroll
        for (int g = 0; g < G; g++) {
            maximum[g] = -hw::infinity(), sum[g] = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) output[g][i] = 0;
        }
    }

    // Merges the partial result of other columns into row g.
    SFA_DEVICE void merge(int g, float other_maximum, float other_sum, const float (&other)[8]) {
        float raised = hw::max(maximum[g], other_maximum), base = raised == -hw::infinity() ? 0.f : raised;
        float mine = hw::exp2(maximum[g] - base), theirs = hw::exp2(other_maximum - base);
        maximum[g] = raised;
        sum[g] = sum[g] * mine + other_sum * theirs;
#pragma unroll
        for (int i = 0; i < 8; i++) output[g][i] = output[g][i] * mine + other[i] * theirs;
    }
};

// Partial results in memory: outputs (rows, parts, Dv), then maxima and sums (rows, parts, 2).
struct Parts {
    Global<float> outputs, sums;

    SFA_DEVICE Parts(const Global<float>& parts, const DecodeParams& p, uint32_t dim)
        : outputs(parts), sums(parts + size_t(p.rows) * p.parts * dim) {}
};
