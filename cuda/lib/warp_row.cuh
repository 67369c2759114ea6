// One row of q, k or v, spread over a warp: lane l holds numbers 8 l to 8 l + 7, read and written 16 bytes at a time if
// they are aligned.
#pragma once

#include <type_traits>

#include "lib/kernel.cuh"

// A lane holds this many numbers of a row: head_dim up to 256.
constexpr unsigned PER_LANE = 8;

// A vector of 16 bytes.
template <class T> struct alignas(16) Part {
  static constexpr unsigned COUNT = 16 / sizeof(T);
  T x[COUNT];
};

// Eight numbers from `at` on.
template <class View> __device__ __forceinline__ void load_eight(Global<View> from, size_t at, float (&x)[8]) {
  typedef typename std::remove_const<View>::type T;
  if (at % Part<T>::COUNT == 0) {
#pragma unroll
    for (unsigned i = 0; i < 8; i += Part<T>::COUNT) {
      Part<T> part = load_vector<Part<T>>(from, at + i);
#pragma unroll
      for (unsigned j = 0; j < Part<T>::COUNT; j++) x[i + j] = widen(part.x[j]);
    }
  } else {
#pragma unroll
    for (unsigned i = 0; i < 8; i++) x[i] = widen(from[at + i]);
  }
}

// Eight numbers in their storage dtype.
template <class T> struct Eight {
  Part<T> parts[8 / Part<T>::COUNT];

  __device__ __forceinline__ void load(Global<const T> from, size_t at) {
    constexpr unsigned COUNT = Part<T>::COUNT;
#pragma unroll
    for (unsigned i = 0; i < 8; i += COUNT) {
      if (at % COUNT == 0) {
        parts[i / COUNT] = load_vector<Part<T>>(from, at + i);
      } else {
#pragma unroll
        for (unsigned j = 0; j < COUNT; j++) parts[i / COUNT].x[j] = from[at + i + j];
      }
    }
  }
  __device__ __forceinline__ float operator[](unsigned i) const {
    return widen(parts[i / Part<T>::COUNT].x[i % Part<T>::COUNT]);
  }
};

// The lanes that share a row: a warp, or a part of one if rows are short and independent.
struct Lanes {
  unsigned count, lane;

  __device__ __forceinline__ Lanes() : count(32), lane(threadIdx.x % 32) {}
  // As few as hold `dim` numbers: `rows_of_warp` in src/cuda/fold.rs.
  __device__ __forceinline__ explicit Lanes(unsigned dim) : count(dim <= 64 ? 8 : dim <= 128 ? 16 : 32) {
    lane = threadIdx.x % count;
  }
  // These lanes' bits in a ballot.
  __device__ __forceinline__ unsigned mask() const {
    return count == 32 ? 0xffffffffu : ((1u << count) - 1) << (threadIdx.x % 32 - lane);
  }
};

// One row, spread over a warp or a part of it.
struct WarpRow {
  float x[PER_LANE] = {};

  template <class View>
  __device__ __forceinline__ void load(Global<View> from, size_t at, unsigned dim, Lanes lanes = Lanes()) {
    unsigned first = lanes.lane * PER_LANE;
    if (first >= dim) return fill(0.0f);
    load_eight(from, at + first, x);
  }
  template <class T>
  __device__ __forceinline__ void store(Global<T> to, size_t at, unsigned dim, Lanes lanes = Lanes()) const {
    unsigned first = lanes.lane * PER_LANE;
    if (first >= dim) return;
    if (at % Part<T>::COUNT == 0) {
#pragma unroll
      for (unsigned i = 0; i < PER_LANE; i += Part<T>::COUNT) {
        Part<T> part;
#pragma unroll
        for (unsigned j = 0; j < Part<T>::COUNT; j++) part.x[j] = narrow<T>(x[i + j]);
        store_vector(to, at + first + i, part);
      }
    } else {
#pragma unroll
      for (unsigned i = 0; i < PER_LANE; i++) to.set(at + first + i, narrow<T>(x[i]));
    }
  }
  __device__ __forceinline__ void add(const WarpRow& other) {
#pragma unroll
    for (unsigned i = 0; i < PER_LANE; i++) x[i] += other.x[i];
  }
  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (unsigned i = 0; i < PER_LANE; i++) x[i] *= factor;
  }
  __device__ __forceinline__ void fill(float value) {
#pragma unroll
    for (unsigned i = 0; i < PER_LANE; i++) x[i] = value;
  }
  // Turns the mean of `size` tokens into the mean of those and one more.
  __device__ __forceinline__ void running_mean(const WarpRow& next, float size) {
    float inverse = 1.0f / (size + 1.0f);
#pragma unroll
    for (unsigned i = 0; i < PER_LANE; i++) x[i] = (next.x[i] + size * x[i]) * inverse;
  }
  // Replaces numbers beyond the largest one of T by that.
  template <class T> __device__ __forceinline__ void limit() {
    if constexpr (std::is_same<T, half_t>::value) {
#pragma unroll
      for (unsigned i = 0; i < PER_LANE; i++)
        // A NaN stays.
        x[i] = x[i] > 65504.0f ? 65504.0f : x[i] < -65504.0f ? -65504.0f : x[i];
    }
  }
  // The row's Euclidean norm, in every lane.
  __device__ __forceinline__ float norm() const {
    float sum = 0.0f;
#pragma unroll
    for (unsigned i = 0; i < PER_LANE; i++) sum += x[i] * x[i];
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    return sqrtf(sum);
  }
  // Whether this lane's numbers are finite once they are stored as T.
  template <class T> __device__ __forceinline__ bool finite() const {
    bool all = true;
#pragma unroll
    for (unsigned i = 0; i < PER_LANE; i++) all = all && fabsf(widen(narrow<T>(x[i]))) <= 3.402823466e38f;
    return all;
  }
  // Gives a token whose key or value is not finite a NaN key and a zero value. A row that sees it is NaN through its
  // logit; no other row is touched by 0 * NaN. A meeting point of the whole warp.
  template <class T>
  __device__ __forceinline__ static void quarantine(WarpRow& key, WarpRow& value, Lanes lanes = Lanes()) {
    unsigned bad = __ballot_sync(0xffffffffu, !(key.finite<T>() && value.finite<T>()));
    if ((bad & lanes.mask()) == 0) return;
    key.fill(NAN);
    value.fill(0.0f);
  }
};
