// Pages: where the closed chains of a cache's lists lie.
//
// The idea: a list has as many pages of PAGE entries as its own entries need, wherever memory was free, and a table of
// their addresses, (lists, p.pages). Entry i is number i % PAGE of page i / PAGE. So no list pays for a longer one, a
// list grows without a copy, and two lists may share the pages of a common beginning. The host hands pages out before
// a launch that may need them, and takes them back.
//
// A page is one piece of memory: PAGE keys, PAGE values, the last token of each chain, and under MEAN the logarithm of
// each chain's size.
#pragma once

#include "lib/warp_row.cuh"

// As in src/cuda/cache/pages.rs.
constexpr unsigned PAGE = 64;
// In the tokens of each batch row before a launch: the row takes no token in it.
constexpr unsigned SITS_OUT = 0xffffffffu;

template <class T> struct Page {
  Global<T> keys, values;
  Global<uint32_t> tokens;
  Global<float> ln;
};

// The pages of one list.
template <class T> struct Pages {
  // The list's row of the table.
  Global<const uint64_t> table;
  unsigned dim, value_dim;
  // Whether chains have sizes.
  bool sized;

  __device__ __forceinline__ Page<T> of(uint64_t address) const {
    unsigned keys = PAGE * dim * sizeof(T), both = PAGE * (dim + value_dim) * sizeof(T);
    Memory page = memory_at(address, both + PAGE * (sized ? 8 : 4));
    return {part_of<T>(page, 0, PAGE * dim), part_of<T>(page, keys, PAGE * value_dim),
            part_of<uint32_t>(page, both, PAGE), part_of<float>(page, both + PAGE * 4, sized ? PAGE : 0)};
  }

  // Page number `page`.
  __device__ __forceinline__ Page<T> operator[](unsigned page) const { return of(table[page]); }

  // The last token of chain `entry`.
  __device__ __forceinline__ unsigned token(unsigned entry) const {
    return (*this)[entry / PAGE].tokens[entry % PAGE];
  }

  // Writes chain `entry`: one warp does.
  __device__ void put(unsigned entry, const WarpRow& key, const WarpRow& value, unsigned token, float ln) const {
    Page<T> page = (*this)[entry / PAGE];
    unsigned at = entry % PAGE;
    key.store(page.keys, at * dim, dim), value.store(page.values, at * value_dim, value_dim);
    if (threadIdx.x % 32 != 0) return;
    page.tokens.set(at, token);
    if (sized) page.ln.set(at, ln);
  }
};
