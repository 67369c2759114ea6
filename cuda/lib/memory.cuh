// Views of device memory. Kernels reach global and shared memory only through them: under nvcc they are bare pointers;
// under emulation every access is checked against its buffer and against earlier writes.
//
//   view[i]                    reads element i, by value
//   view.set(i, x)             writes element i
//   view.add(i, x)             adds to element i atomically
//   view + n                   the view from element n on
//   load_vector<V>(view, i)    reads a vector V (float4, uint4 ...) that starts at element i
//   store_vector(view, i, x)   writes one
//   view.source(i, n)          address of n elements that are about to be read (for cp.async, ldmatrix ...)
//   view.target(i, n)          address of n elements that are about to be written
//
// Global<T> is a kernel parameter (one pointer wide under nvcc); Global<const T> cannot be written. Shared<T> is made
// from the block's dynamic shared memory (SHARED_BYTES in kernel.cuh) with shared_memory<T>(byte offset, elements).
// Memory is a piece that a kernel finds by its address in a table, with memory_at(address, bytes); part_of<T>(memory,
// byte offset, elements) is the view of a part of it.
#pragma once

#ifdef SFA_EMULATION
#include "emu/views.h"
#else

template <class T> struct Pointer {
  T* data;
  __device__ __forceinline__ T operator[](size_t i) const { return data[i]; }
  __device__ __forceinline__ void set(size_t i, T x) const { data[i] = x; }
  __device__ __forceinline__ void add(size_t i, T x) const { atomicAdd(data + i, x); }
  __device__ __forceinline__ const T* source(size_t i, size_t) const { return data + i; }
  __device__ __forceinline__ T* target(size_t i, size_t) const { return data + i; }
  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
};

template <class T> struct Global : Pointer<T> {
  __device__ __forceinline__ Global operator+(size_t n) const { return {{this->data + n}}; }
};

template <class T> struct Global<const T> {
  const T* __restrict__ data;
  __device__ __forceinline__ T operator[](size_t i) const { return data[i]; }
  __device__ __forceinline__ const T* source(size_t i, size_t) const { return data + i; }
  __device__ __forceinline__ Global operator+(size_t n) const { return {data + n}; }
  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
};

template <class T> struct Shared : Pointer<T> {
  __device__ __forceinline__ Shared operator+(size_t n) const { return {{this->data + n}}; }
};

template <class T> __device__ __forceinline__ Shared<T> shared_memory(size_t byte_offset, size_t) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return {{reinterpret_cast<T*>(shared_bytes + byte_offset)}};
}

typedef Global<uint8_t> Memory;

__device__ __forceinline__ Memory memory_at(uint64_t address, size_t) {
  return {{reinterpret_cast<uint8_t*>(address)}};
}

template <class T> __device__ __forceinline__ Global<T> part_of(const Memory& memory, size_t byte_offset, size_t) {
  return {{reinterpret_cast<T*>(memory.data + byte_offset)}};
}

template <class V, class View> __device__ __forceinline__ V load_vector(View view, size_t i) {
  return *reinterpret_cast<const V*>(view.source(i, 0));
}

template <class V, class View> __device__ __forceinline__ void store_vector(View view, size_t i, V x) {
  *reinterpret_cast<V*>(view.target(i, 0)) = x;
}

#endif
