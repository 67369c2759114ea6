// f16 and bf16 as storage with conversions, rounding to nearest even as the device does.
#pragma once

struct half_t {
  unsigned short bits;
};
struct bfloat16_t {
  unsigned short bits;
};

inline float __bfloat162float(bfloat16_t x) {
  unsigned u = (unsigned)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline bfloat16_t __float2bfloat16_rn(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {(unsigned short)((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}

inline float __half2float(half_t x) {
  unsigned sign = (unsigned)(x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ffu;
  unsigned u;
  if (exponent == 31) {
    u = sign | 0x7f800000u | mantissa << 13;
  } else if (exponent != 0) {
    u = sign | (exponent + 112) << 23 | mantissa << 13;
  } else {
    // 2^-24 units; exact.
    float f = (float)mantissa * 5.9604644775390625e-8f;
    memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline half_t __float2half_rn(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  unsigned short sign = (unsigned short)(u >> 16 & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return {0x7fff};
  if (u >= 0x477ff000u) return {(unsigned short)(sign | 0x7c00u)};
  if (u < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded to nearest even.
    float magnitude;
    memcpy(&magnitude, &u, 4);
    magnitude += 0.5f;
    memcpy(&u, &magnitude, 4);
    return {(unsigned short)(sign | (u - 0x3f000000u))};
  }
  u += 0xfffu + (u >> 13 & 1);
  return {(unsigned short)(sign | (u - 0x38000000u) >> 13)};
}
