// Pages: where the closed chains of a cache's lists lie.
//
// The idea: a list has as many pages of PAGE entries as its own entries need, wherever memory was free, and a table of
// their addresses, (lists, p.pages). Entry i is number i % PAGE of page i / PAGE. So no list pays for a longer one, a
// list grows without a copy, and two lists may share the pages of a common beginning. The host hands pages out before
// a launch that may need them, and takes them back.
//
// A page is one piece of memory: PAGE keys, PAGE values, the last token of each chain, and under MEAN the logarithm of
// each chain's size. In 8 bits (codes.cuh): PAGE keys, PAGE values, PAGE words of scales, then tokens and logarithms.
#pragma once

#include "cache/codes.cuh"

// As in src/cuda/cache/pages.rs.
constexpr unsigned PAGE = 64;
// In the tokens of each batch row before a launch: the row takes no token in it.
constexpr unsigned SITS_OUT = 0xffffffffu;

template <class T> struct Page {
  Global<T> keys, values;
  Global<uint32_t> tokens;
  Global<float> ln;
};

// A page in 8 bits.
struct CodedPage {
  CodedRows<uint8_t, uint32_t> rows;
  Global<float> ln;
};

__device__ __forceinline__ CodedPage coded_page(uint64_t address, unsigned dim, unsigned value_dim, bool sized) {
  unsigned both = PAGE * (dim + value_dim);
  Memory page = memory_at(address, both + PAGE * (sized ? 12 : 8));
  return {{part_of<uint8_t>(page, 0, PAGE * dim), part_of<uint8_t>(page, PAGE * dim, PAGE * value_dim),
           part_of<uint32_t>(page, both, PAGE), part_of<uint32_t>(page, both + PAGE * 4, PAGE)},
          part_of<float>(page, both + PAGE * 8, sized ? PAGE : 0)};
}

// The pages of one list. CODED: whether its rows may be in 8 bits; kernels for rows in T alone save registers.
template <class T, bool CODED = true> struct Pages {
  // The list's row of the table.
  Global<const uint64_t> table;
  unsigned dim, value_dim;
  // Whether chains have sizes.
  bool sized;
  // A PageCode.
  unsigned code;

  // A page of rows in T.
  __device__ __forceinline__ Page<T> of(uint64_t address) const {
    unsigned keys = PAGE * dim * sizeof(T), both = PAGE * (dim + value_dim) * sizeof(T);
    Memory page = memory_at(address, both + PAGE * (sized ? 8 : 4));
    return {part_of<T>(page, 0, PAGE * dim), part_of<T>(page, keys, PAGE * value_dim),
            part_of<uint32_t>(page, both, PAGE), part_of<float>(page, both + PAGE * 4, sized ? PAGE : 0)};
  }

  __device__ __forceinline__ CodedPage coded_of(uint64_t address) const {
    return coded_page(address, dim, value_dim, sized);
  }

  __device__ __forceinline__ bool coded() const { return CODED && code != AS_T; }

  // The last token of chain `entry`.
  __device__ __forceinline__ unsigned token(unsigned entry) const {
    uint64_t address = table[entry / PAGE];
    return coded() ? coded_of(address).rows.tokens[entry % PAGE] : of(address).tokens[entry % PAGE];
  }

  // The logarithm of its size, where chains have sizes.
  __device__ __forceinline__ float ln(unsigned entry) const {
    uint64_t address = table[entry / PAGE];
    return coded() ? coded_of(address).ln[entry % PAGE] : of(address).ln[entry % PAGE];
  }

  // Reads the key and the value of chain `entry`: a warp does.
  __device__ void load(unsigned entry, WarpRow& key, WarpRow& value) const {
    uint64_t address = table[entry / PAGE];
    unsigned at = entry % PAGE;
    if (!coded()) {
      Page<T> page = of(address);
      key.load(page.keys, at * dim, dim), value.load(page.values, at * value_dim, value_dim);
      return;
    }
    CodedPage page = coded_of(address);
    unsigned first = threadIdx.x % 32 * PER_LANE, scales = page.rows.scales[at];
    key.fill(0.0f), value.fill(0.0f);
    if (first < dim)
      decode(code, load_vector<uint2>(page.rows.keys, at * dim + first), scales & 0xffffu, key);
    if (first < value_dim)
      decode(code, load_vector<uint2>(page.rows.values, at * value_dim + first), scales >> 16, value);
    key.limit<T>(), value.limit<T>();
  }

  // Writes chain `entry`: one warp does.
  __device__ void put(unsigned entry, const WarpRow& key, const WarpRow& value, unsigned token, float ln) const {
    uint64_t address = table[entry / PAGE];
    unsigned at = entry % PAGE;
    if (!coded()) {
      Page<T> page = of(address);
      key.store(page.keys, at * dim, dim), value.store(page.values, at * value_dim, value_dim);
      if (threadIdx.x % 32 != 0) return;
      page.tokens.set(at, token);
      if (sized) page.ln.set(at, ln);
      return;
    }
    CodedPage page = coded_of(address);
    unsigned first = threadIdx.x % 32 * PER_LANE, key_scale, value_scale;
    uint2 key_codes = encode(code, key, key_scale), value_codes = encode(code, value, value_scale);
    if (first < dim) store_vector(page.rows.keys, at * dim + first, key_codes);
    if (first < value_dim) store_vector(page.rows.values, at * value_dim + first, value_codes);
    if (first != 0) return;
    page.rows.scales.set(at, key_scale | value_scale << 16);
    page.rows.tokens.set(at, token);
    if (sized) page.ln.set(at, ln);
  }
};
