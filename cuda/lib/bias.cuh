// The one hook through which a bias reaches a logit.
#pragma once

#include "lib/params.cuh"

// A bias in base 2. A finite bias of any size stays finite: if its product with log2(e) would reach 2^125, it grows
// with its logarithm instead. That keeps the order of biases and leaves room for the dot product and for differences of
// two logits. Minus infinity hides a column.
__device__ __forceinline__ float bias_in_base_2(float bias) {
  constexpr float LARGE = 4.253529586511731e37f, LARGE_LOG2 = 125.0f, LOG2_LOG2_E = 0.5287663729448977f;
  float product = LOG2_E * bias;
  // A NaN passes through the logarithm.
  if (fabsf(product) < LARGE || fabsf(bias) == INFINITY) return product;
  float beyond = log2f(fabsf(bias)) + LOG2_LOG2_E - LARGE_LOG2;
  return copysignf(LARGE * (1.0f + beyond * (1.0f / 128.0f)), bias);
}
