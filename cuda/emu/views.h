// The checked views; ../memory.cuh says what they mean.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emu {

// Bytes of one buffer, or of a block's shared memory. `written` has one byte per byte.
struct Span {
  unsigned char* data;
  unsigned char* written;
  size_t bytes;
  // True for a buffer, false for shared memory.
  bool global;
  const char* kind() const { return global ? "global buffer" : "shared memory"; }
};

// Whether the running thread has still to wait for earlier launches: a thread of an early launch may not touch memory
// before.
extern __thread bool has_to_wait;

// Reports an access and does not return to the kernel.
[[noreturn]] void fail_access(const Span& span, const char* what, long long offset, size_t bytes);

template <class T> struct View {
  typedef typename std::remove_const<T>::type Value;
  Span span;
  // Byte offset of element 0, and the bounds in bytes that the view may touch.
  long long first, begin, end;

  // `align` is that of the access.
  unsigned char* check(long long i, size_t bytes, size_t align, const char* what) const {
    long long at = first + i * (long long)sizeof(T);
    if (span.global && has_to_wait) fail_access(span, "access before waiting for the launches before", at, bytes);
    if (at < begin || at + (long long)bytes > end) fail_access(span, what, at, bytes);
    if (((size_t)(span.data + at)) % align != 0) fail_access(span, "misaligned access", at, bytes);
    return span.data + at;
  }
  unsigned char* check_read(long long i, size_t bytes, size_t align) const {
    unsigned char* at = check(i, bytes, align, "read outside of it");
    const unsigned char* written = span.written + (at - span.data);
    for (size_t b = 0; b < bytes; b++)
      if (!written[b]) fail_access(span, "read of bytes that nothing has written", at - span.data, bytes);
    return at;
  }
  unsigned char* check_write(long long i, size_t bytes, size_t align) const {
    unsigned char* at = check(i, bytes, align, "write outside of it");
    memset(span.written + (at - span.data), 1, bytes);
    return at;
  }

  Value operator[](long long i) const {
    Value x;
    memcpy((void*)&x, check_read(i, sizeof(T), alignof(T)), sizeof(T));
    return x;
  }
  const Value* source(long long i, size_t n) const { return (const Value*)check_read(i, n * sizeof(T), alignof(T)); }
  explicit operator bool() const { return span.data != nullptr; }
};

template <class T> struct WritableView : View<T> {
  void set(long long i, T x) const { memcpy(this->check_write(i, sizeof(T), alignof(T)), (const void*)&x, sizeof(T)); }
  void add(long long i, T x) const { set(i, (*this)[i] + x); }
  T* target(long long i, size_t n) const { return (T*)this->check_write(i, n * sizeof(T), alignof(T)); }
};

template <class T> using ViewOf = std::conditional_t<std::is_const<T>::value, View<T>, WritableView<T>>;

Span shared_span();

// The memory that an address lies in, which the host has registered and not yet freed.
Span span_at(uint64_t address);

}  // namespace emu

template <class T> struct Global : emu::ViewOf<T> {
  Global operator+(long long n) const {
    Global moved = *this;
    moved.first += n * (long long)sizeof(T);
    return moved;
  }
};

template <class T> struct Shared : emu::ViewOf<T> {
  Shared operator+(long long n) const {
    Shared moved = *this;
    moved.first += n * (long long)sizeof(T);
    return moved;
  }
};

template <class T> Shared<T> shared_memory(size_t byte_offset, size_t elements) {
  Shared<T> view;
  view.span = emu::shared_span();
  view.first = view.begin = byte_offset;
  view.end = byte_offset + elements * sizeof(T);
  if ((size_t)view.end > view.span.bytes)
    emu::fail_access(view.span, "view larger than the launch asked for", byte_offset, elements * sizeof(T));
  return view;
}

typedef Global<uint8_t> Memory;

inline Memory memory_at(uint64_t address, size_t bytes) {
  Memory view;
  view.span = emu::span_at(address);
  view.first = view.begin = (long long)(address - (uint64_t)view.span.data);
  view.end = view.begin + bytes;
  if ((size_t)view.end > view.span.bytes)
    emu::fail_access(view.span, "memory larger than what was taken", view.begin, bytes);
  return view;
}

template <class T> Global<T> part_of(const Memory& memory, size_t byte_offset, size_t elements) {
  Global<T> view;
  view.span = memory.span;
  view.first = view.begin = memory.begin + byte_offset;
  view.end = view.begin + elements * sizeof(T);
  if (view.end > memory.end)
    emu::fail_access(view.span, "part outside of its memory", view.begin, elements * sizeof(T));
  return view;
}

template <class V, class W> V load_vector(W view, long long i) {
  V x;
  memcpy((void*)&x, view.check_read(i, sizeof(V), sizeof(V)), sizeof(V));
  return x;
}

template <class V, class W> void store_vector(W view, long long i, V x) {
  memcpy(view.check_write(i, sizeof(V), sizeof(V)), (const void*)&x, sizeof(V));
}
