// Runs kernels on the CPU: every thread of a block is a fiber, blocks run one after another. Barriers and warp
// collectives are meeting points. Plain C++17, no CUDA toolkit.
//
// Proves index arithmetic, masks and numerics. It detects: accesses outside of a buffer or of shared memory, reads of
// memory that nothing has written, writes through a read-only argument, misaligned vectors; barriers and collectives
// that some thread never reaches; and threads of an early launch that touch memory or end before they have waited.
// Threads run in ascending order in even blocks and in descending order in odd ones, so that a missing barrier changes
// results. It does not model the order of asynchronous copies, or speed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#include "halves.h"
#include "views.h"

namespace emu {

extern __thread dim3 thread_index, block_index, block_dim, grid_dim;

// One launch argument: a value (kind 0), a buffer to read (1) or to write (2).
struct Argument {
  const void* data;
  size_t bytes;
  unsigned char* written;
  size_t kind;
};

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits for every thread of the block.
void barrier(int line);
// Waits until `threads` threads have come to the barrier `number`, which is not 0.
void named_barrier(unsigned number, unsigned threads, int line);
// Lets other threads run until `note_progress` is called: for loops that wait for another thread's writes. It is an
// error if all other threads wait, too.
void wait_for_progress(const char* what, int line);
void note_progress();
// Waits for every lane of the warp. Returns the contributions of all 32 lanes, `bytes` each, valid until the second
// call after this one.
const void* meet(const void* mine, size_t bytes, const char* what, int line);
unsigned lane();
// Notes that this thread has waited for earlier launches; under emulation they have ended.
void wait_for_previous();

// The contributions of all lanes.
template <class T> const T* gather(const T& mine, const char* what, int line) {
  static_assert(std::is_trivially_copyable<T>::value, "lanes exchange bytes");
  return (const T*)meet(&mine, sizeof(T), what, line);
}

template <class A> struct Unpack {
  static const char* refuse(const Argument& a) {
    if (a.kind != 0) return "expected a value, got a buffer";
    return a.bytes == sizeof(A) ? nullptr : "expected a value of another size";
  }
  static A get(const Argument& a) {
    A x;
    memcpy((void*)&x, a.data, sizeof(A));
    return x;
  }
};

template <class T> struct Unpack<Global<T>> {
  static const char* refuse(const Argument& a) {
    if (a.kind == 0) return "expected a buffer, got a value";
    if (a.kind == 1 && !std::is_const<T>::value) return "expected a buffer to write, got one to read";
    if (a.bytes % sizeof(T) != 0) return "expected a buffer of whole elements";
    return nullptr;
  }
  static Global<T> get(const Argument& a) {
    Global<T> view;
    view.span = Span{(unsigned char*)a.data, a.written, a.bytes, true};
    view.first = view.begin = 0;
    view.end = a.bytes;
    return view;
  }
};

struct Entry {
  const char* name;
  size_t arguments;
  // Null, or the fault of argument `*index`.
  const char* (*refuse)(const Argument* arguments, size_t* index);
  void (*call)(const Argument* arguments, const void* kernel);
  const void* kernel;
};

struct Registry;
void add_entry(Registry& registry, const Entry& entry);

// Notes how much dynamic shared memory a block of a kernel has, before anything is launched.
struct SharedBytes {
  SharedBytes(const char* name, size_t bytes);
};

template <class... A> struct Signature {
  template <size_t... I> static void unpack(void (*kernel)(A...), const Argument* a, std::index_sequence<I...>) {
    kernel(Unpack<A>::get(a[I])...);
  }
  static void call(const Argument* a, const void* kernel) {
    unpack((void (*)(A...))kernel, a, std::index_sequence_for<A...>());
  }
  static const char* refuse(const Argument* a, size_t* index) {
    const char* (*checks[])(const Argument&) = {Unpack<A>::refuse...};
    for (*index = 0; *index < sizeof...(A); ++*index)
      if (const char* wrong = checks[*index](a[*index])) return wrong;
    return nullptr;
  }
};

template <class... A> void add(Registry& registry, const char* name, void (*kernel)(A...)) {
  add_entry(registry, Entry{name, sizeof...(A), Signature<A...>::refuse, Signature<A...>::call, (const void*)kernel});
}

template <class T> T shuffle(const T& x, unsigned source, const char* what, int line) {
  return gather(x, what, line)[source];
}

}  // namespace emu

#define threadIdx (emu::thread_index)
#define blockIdx (emu::block_index)
#define blockDim (emu::block_dim)
#define gridDim (emu::grid_dim)
#define warpSize 32

inline void __syncthreads(int line = __builtin_LINE()) { emu::barrier(line); }

// Warp collectives take the full mask only: kernels keep whole warps together.
inline void check_mask(unsigned mask, const char* what) {
  if (mask != 0xffffffffu) emu::fail("%s: expected the full mask, got %08x", what, mask);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  check_mask(mask, "__syncwarp");
  emu::gather(0, "__syncwarp", line);
}
template <class T> T __shfl_sync(unsigned mask, T x, unsigned source, int line = __builtin_LINE()) {
  check_mask(mask, "__shfl_sync");
  return emu::shuffle(x, source % 32, "__shfl_sync", line);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, unsigned lanes, int line = __builtin_LINE()) {
  check_mask(mask, "__shfl_xor_sync");
  return emu::shuffle(x, (emu::lane() ^ lanes) % 32, "__shfl_xor_sync", line);
}
template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned delta, int line = __builtin_LINE()) {
  check_mask(mask, "__shfl_up_sync");
  unsigned lane = emu::lane();
  return emu::shuffle(x, lane >= delta ? lane - delta : lane, "__shfl_up_sync", line);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned delta, int line = __builtin_LINE()) {
  check_mask(mask, "__shfl_down_sync");
  unsigned lane = emu::lane();
  return emu::shuffle(x, lane + delta < 32 ? lane + delta : lane, "__shfl_down_sync", line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  check_mask(mask, "__ballot_sync");
  const int* all = emu::gather(predicate, "__ballot_sync", line);
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= (unsigned)(all[i] != 0) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return __ballot_sync(mask, predicate, line) == 0xffffffffu;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz((unsigned)x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)(((uint64_t)a * b) >> 32); }
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline float __int_as_float(int x) { return __uint_as_float((unsigned)x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float rsqrtf(float a) { return 1.0f / sqrtf(a); }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }
