// The one hook through which a softcap reaches a logit.
#pragma once

#include "lib/params.cuh"

// A logit z in base 2 becomes c * tanh(z / c), c in base 2; `slope` is the derivative there. A logit that is not finite
// becomes NaN: a cap would hide the key that made it.
__device__ __forceinline__ float capped(float softcap, float logit, float& slope) {
  slope = 1.0f;
  if (softcap == 0.0f) return logit;
  float tanh = tanhf(logit / softcap);
  slope = (1.0f - tanh) * (1.0f + tanh);
  return softcap * tanh + logit * 0.0f;
}

__device__ __forceinline__ float capped(float softcap, float logit) {
  float slope;
  return capped(softcap, logit, slope);
}
