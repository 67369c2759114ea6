// Cosines, one warp each, and the heads' tests. Sums in f32 for every dtype.
#pragma once

#include "lib/params.cuh"

// Norms are never taken smaller than this when a cosine divides by them.
constexpr float MIN_NORM = 1e-12f;

enum Strategy : unsigned { SIMILARITY = 0, DIFFERENCE = 1, OFF = 2 };

// The pair or row of this warp: 4 warps a block.
__device__ __forceinline__ unsigned warp_pair() { return blockIdx.x * 4 + threadIdx.x / 32; }

// Every lane gets the sum over the warp.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

// Two rows' dot product and norms; a and b start at `at_a` and `at_b`.
struct Products {
  float dot, norm_a, norm_b;

  // A NaN norm becomes MIN_NORM here; the dot product is NaN too.
  __device__ __forceinline__ float cosine() const {
    float a = norm_a > MIN_NORM ? norm_a : MIN_NORM, b = norm_b > MIN_NORM ? norm_b : MIN_NORM;
    return dot / a / b;
  }
};

template <class A, class B>
__device__ Products products(A a, size_t at_a, B b, size_t at_b, unsigned dim) {
  float dot = 0.0f, aa = 0.0f, bb = 0.0f;
  for (unsigned d = threadIdx.x % 32; d < dim; d += 32) {
    float x = widen(a[at_a + d]), y = widen(b[at_b + d]);
    dot += x * y;
    aa += x * x;
    bb += y * y;
  }
  return {warp_sum(dot), sqrtf(warp_sum(aa)), sqrtf(warp_sum(bb))};
}

// The tests of a call, in a buffer or, if they are few, in the launch's arguments, which need no copy.
struct Tests {
  Global<const float> many;
  const FewTests& few;

  __device__ __forceinline__ float operator[](size_t i) const { return many ? many[i] : few.numbers[i]; }
};

// A head's strategy and threshold: two floats in a table (batch, heads, 2).
struct HeadTest {
  unsigned strategy;
  float threshold;

  template <class Tests>
  __device__ __forceinline__ HeadTest(const Tests& tests, size_t batch_head)
      : strategy((unsigned)tests[2 * batch_head]), threshold(tests[2 * batch_head + 1]) {}

  // Strict, and false for NaN.
  __device__ __forceinline__ bool passes(float cosine) const {
    if (strategy == SIMILARITY) return 1.0f - cosine < threshold;
    return strategy == DIFFERENCE && fabsf(cosine) < threshold;
  }
};

// The query heads that decide together, and the KV head they read.
struct List {
  unsigned batch, first_head, group, kv_head;

  __device__ __forceinline__ List(const Sizes& sizes, unsigned index) {
    batch = index / sizes.lists;
    group = sizes.heads / sizes.lists;
    first_head = index % sizes.lists * group;
    kv_head = first_head / (sizes.heads / sizes.kv_heads);
  }
};

// The cosine of token a's query (or key) and token b's key for one query head.
template <class T>
__device__ float pair_cosine(Global<const T> q, Global<const T> k, const DecideParams& p, const List& list,
                             unsigned head, unsigned a, unsigned b) {
  size_t right = p.k.at(list.batch, list.kv_head, b);
  if (p.key_key) return products(k, p.k.at(list.batch, list.kv_head, a), k, right, p.sizes.head_dim).cosine();
  return products(q, p.q.at(list.batch, head, a), k, right, p.sizes.head_dim).cosine();
}

// Whether token a passes against token b for every head of the list; the same in all lanes.
template <class T>
__device__ bool passes(Global<const T> q, Global<const T> k, const Tests& tests, const DecideParams& p,
                       const List& list, unsigned a, unsigned b) {
  float cosine = 0.0f;
  for (unsigned head = list.first_head; head < list.first_head + list.group; head++) {
    if (!p.key_key || head == list.first_head) cosine = pair_cosine(q, k, p, list, head, a, b);
    if (!HeadTest(tests, list.batch * p.sizes.heads + head).passes(cosine)) return false;
  }
  return true;
}
