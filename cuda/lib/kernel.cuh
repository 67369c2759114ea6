// Every .cu file starts with this: dtypes, views, and the macros that declare kernels for nvcc and for emulation alike.
//
//   template <class T> __device__ void scale(Global<const T> in, Global<T> out, ScaleParams p) { ... }
//   #define SCALE(x, T) KERNEL scale_##x(Global<const T> in, Global<T> out, ScaleParams p) { scale(in, out, p); }
//   FOR_EACH_DTYPE(SCALE)
//   MODULE(file_stem, ENTRIES(scale))
//
// SHARED_BYTES(name, bytes) beside a kernel says how much dynamic shared memory a block of it has. It stands nowhere
// else: every launch has that much, and as much more as the launcher asks for. Under nvcc it is a variable that no
// kernel reads; build.rs takes its value out of the PTX.
#pragma once

#ifdef SFA_EMULATION
#include "emu/emu.h"
#define KERNEL static void
#define ENTRY(name) emu::add(registry, #name, name);
#define SHARED_BYTES(name, ...) static const emu::SharedBytes shared_bytes_of_##name(#name, __VA_ARGS__);
#define MODULE(stem, entries) \
  extern "C" void emu_module_##stem(emu::Registry& registry) { entries }
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#define KERNEL extern "C" __global__ void
#define ENTRY(name)
#define SHARED_BYTES(name, ...) extern "C" { __device__ unsigned shared_bytes_of_##name = __VA_ARGS__; }
#define MODULE(stem, entries)
typedef __half half_t;
typedef __nv_bfloat16 bfloat16_t;
#endif

#include "lib/memory.cuh"

// Logits are in base 2.
constexpr float LOG2_E = 1.4426950408889634f;

#define FOR_EACH_DTYPE(M) M(f32, float) M(f16, half_t) M(bf16, bfloat16_t)
#define ENTRIES(name) ENTRY(name##_f32) ENTRY(name##_f16) ENTRY(name##_bf16)

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(half_t x) { return __half2float(x); }
__device__ __forceinline__ float widen(bfloat16_t x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ half_t narrow<half_t>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bfloat16_t narrow<bfloat16_t>(float x) { return __float2bfloat16_rn(x); }
