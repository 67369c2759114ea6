// Rows in 8 bits: a code for each number, and a bf16 scale for each row, rounded up so that no code overflows. The same
// rounding as src/cpu/cache/bytes.rs, bit for bit: quotients in f32 fall on the side of a border between two codes on
// which exact ones fall, since borders times scales have few bits.
#pragma once

#include "lib/params.cuh"
#include "lib/warp_row.cuh"

// The largest number of a code.
__device__ __forceinline__ float largest_of(unsigned code) { return code == CODE_I8 ? 127.0f : 448.0f; }

// The number with these bf16 bits.
__device__ __forceinline__ float bf16_of(unsigned bits) { return __uint_as_float(bits << 16); }

// The bits of the least bf16 number, of at least the smallest normal one, that is not below largest / most; 0 for 0.
__device__ __forceinline__ unsigned scale_of(float largest, float most) {
  if (largest == 0.0f) return 0;
  unsigned bits = __float_as_uint(largest / most) >> 16;
  if (bits < 0x0080u) bits = 0x0080u;
  // A scale times the largest code is exact.
  return bf16_of(bits) * most < largest ? bits + 1 : bits;
}

// The code of a number that is no larger than the code's largest.
__device__ __forceinline__ unsigned code_of(unsigned code, float x) {
  if (code == CODE_I8) return (unsigned)(int)rintf(x) & 0xffu;
  unsigned bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  // From 2^-6 on there is a leading one: 3 bits of 23 stay, and the exponent's bias is 7 instead of 127.
  unsigned rounded = magnitude < 0x3c800000u ? (unsigned)rintf(fabsf(x) * 512.0f)
                                             : ((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
  return rounded | (bits >> 24 & 0x80u);
}

// The number of a code.
__device__ __forceinline__ float number_of(unsigned code, unsigned byte) {
  if (code == CODE_I8) return (float)(int)(signed char)byte;
  unsigned magnitude = byte & 0x7fu;
  float x = __uint_as_float((magnitude << 20) + (120u << 23));
  // Below 2^-6 there is no leading one.
  if (magnitude < 8) x = (x - 0.0078125f) * 2.0f;
  return (byte & 0x80u) ? -x : x;
}

// The codes of this lane's eight numbers of a row, and the row's scale: NaN for a row that is not finite. A warp.
__device__ __forceinline__ uint2 encode(unsigned code, const WarpRow& row, unsigned& scale) {
  float largest = 0.0f;
  bool finite = true;
#pragma unroll
  for (unsigned i = 0; i < PER_LANE; i++) {
    float x = fabsf(row.x[i]);
    finite = finite && x <= 3.402823466e38f;
    largest = x > largest ? x : largest;
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    float other = __shfl_xor_sync(0xffffffffu, largest, lanes);
    largest = other > largest ? other : largest;
  }
  bool bad = __any_sync(0xffffffffu, !finite);
  scale = bad ? 0x7fc0u : scale_of(largest, largest_of(code));
  if (bad || scale == 0) return make_uint2(0, 0);
  float wide = bf16_of(scale);
  unsigned words[2] = {0, 0};
#pragma unroll
  for (unsigned i = 0; i < PER_LANE; i++) words[i / 4] |= code_of(code, row.x[i] / wide) << i % 4 * 8;
  return make_uint2(words[0], words[1]);
}

__device__ __forceinline__ void decode(unsigned code, uint2 codes, unsigned scale, WarpRow& row) {
  float wide = bf16_of(scale);
#pragma unroll
  for (unsigned i = 0; i < PER_LANE; i++)
    row.x[i] = number_of(code, (i < 4 ? codes.x : codes.y) >> i % 4 * 8 & 0xffu) * wide;
}

// The row that a row's codes stand for, no number beyond the largest of T: the rounded scale may reach further.
template <class T> __device__ __forceinline__ void round_to_code(unsigned code, WarpRow& row) {
  unsigned scale;
  uint2 codes = encode(code, row, scale);
  decode(code, codes, scale, row);
  row.limit<T>();
}

// Rows in 8 bits, as pages and buffers hold them: keys (entries, D), values (entries, Dv), a word of both scales, the
// key's in the low half, and the last token of each chain.
template <class Byte, class Word> struct CodedRows {
  Global<Byte> keys, values;
  Global<Word> scales, tokens;
};

// Copies entry `from` of some rows to entry `to` of others. A warp.
template <class Byte, class Word>
__device__ __forceinline__ void copy_coded(const CodedRows<Byte, Word>& source, size_t from,
                                           const CodedRows<uint8_t, uint32_t>& target, size_t to, unsigned dim,
                                           unsigned value_dim) {
  unsigned first = threadIdx.x % 32 * PER_LANE;
  if (first < dim)
    store_vector(target.keys, to * dim + first, load_vector<uint2>(source.keys, from * dim + first));
  if (first < value_dim)
    store_vector(target.values, to * value_dim + first, load_vector<uint2>(source.values, from * value_dim + first));
  if (first != 0) return;
  target.scales.set(to, source.scales[from]);
  target.tokens.set(to, source.tokens[from]);
}
