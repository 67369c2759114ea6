// Observed mass, one row at a time, as a cache decides by it: the mass that a row's local softmax gives each token of
// its window. One warp; lane l takes columns l, l + 32 and so on, so that only the softmax itself is summed across
// lanes.
#pragma once

#include "lib/cosine.cuh"
#include "lib/warp_row.cuh"

// Every lane gets the largest. A NaN never becomes the largest; it makes the sum NaN later.
__device__ __forceinline__ float warp_largest(float x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    float other = __shfl_xor_sync(0xffffffffu, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

// The dot product of two rows, by one lane. `dim` is a multiple of 8.
template <class A, class B>
__device__ float lane_dot(Global<A> a, size_t at_a, Global<B> b, size_t at_b, unsigned dim) {
  float sum = 0.0f;
  for (unsigned d = 0; d < dim; d += 8) {
    float x[8], y[8];
    load_eight(a, at_a + d, x);
    load_eight(b, at_b + d, y);
#pragma unroll
    for (unsigned i = 0; i < 8; i++) sum += x[i] * y[i];
  }
  return sum;
}

// The state of a list that observes; see params.cuh for window and sinks.
template <class T> struct Observed {
  // (lists, sinks + window, D): raw keys of the first tokens, then of token t at sinks + t % window.
  Global<T> keys;
  // (lists, window) each, token t at t % window: its mass so far, and the norm of its value.
  Global<float> masses, norms;
  // (lists, sinks + window): one row's logits. A lane reads only its own writes.
  Global<float> logits;
};

// Adds the mass that query row `row` gives to the tokens of its window that count it, which are at least window / 2
// rows older. Token t's mass is at masses + t % window; `dot(t)` is query . key of token t.
template <class Dot>
__device__ void observe_row(unsigned row, const CacheParams& p, Global<float> logits, Global<float> masses, Dot dot) {
  unsigned window = p.window, first = row + 1 > window ? row + 1 - window : 0;
  unsigned sinks = p.sinks < first ? p.sinks : first, columns = sinks + (row + 1 - first), lane = threadIdx.x % 32;
  auto token = [&](unsigned column) { return column < sinks ? column : first + (column - sinks); };
  float maximum = -INFINITY, sum = 0.0f;
  for (unsigned column = lane; column < columns; column += 32) {
    float logit = p.scale * dot(token(column));
    logits.set(column, logit);
    maximum = logit > maximum ? logit : maximum;
  }
  maximum = warp_largest(maximum);
  for (unsigned column = lane; column < columns; column += 32) sum += expf(logits[column] - maximum);
  float inverse = 1.0f / warp_sum(sum);
  for (unsigned column = lane; column < columns; column += 32) {
    unsigned t = token(column), slot = t % window;
    if (column < sinks || row - t < window / 2) continue;
    masses.set(slot, masses[slot] + expf(logits[column] - maximum) * inverse);
  }
}

// The score below which a list hides a token: the least of its heads' thresholds, or minus infinity if a head is off.
template <class Tests>
__device__ __forceinline__ float observed_threshold(const Tests& tests, size_t first_head, unsigned group) {
  float least = INFINITY;
  for (unsigned head = 0; head < group; head++) {
    HeadTest test(tests, first_head + head);
    if (test.strategy == OFF) return -INFINITY;
    least = fminf(least, test.threshold);
  }
  return least;
}
