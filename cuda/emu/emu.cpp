// The scheduler: fibers, meeting points, and the C function that Rust launches with.
#include "emu.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <sys/mman.h>
#include <unordered_map>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define DECLARE_MODULE(stem) extern "C" void emu_module_##stem(emu::Registry& registry);
EMU_MODULES(DECLARE_MODULE)
#undef DECLARE_MODULE

namespace emu {

__thread dim3 thread_index, block_index, block_dim, grid_dim;
__thread bool has_to_wait;

struct Registry {
  std::unordered_map<std::string, Entry> entries;
};

void add_entry(Registry& registry, const Entry& entry) { registry.entries[entry.name] = entry; }

// Filled by constructors of other files, which may run before this file's.
static std::unordered_map<std::string, size_t>& shared_bytes() {
  static std::unordered_map<std::string, size_t> of_kernels;
  return of_kernels;
}

SharedBytes::SharedBytes(const char* name, size_t bytes) { shared_bytes()[name] = bytes; }

// --- Memory that kernels find by an address --------------------------------------------------------------------------

// By the address of the first byte. Launches of several threads look here.
struct Memories {
  std::shared_mutex lock;
  std::map<uint64_t, Span> all;
  // Counts changes of `all`.
  std::atomic<uint64_t> version{1};
};

static Memories& memories() {
  static Memories* made = new Memories;
  return *made;
}

Span span_at(uint64_t address) {
  // The last one found is most often the next.
  static thread_local Span last{};
  static thread_local uint64_t version = 0;
  auto holds = [&](const Span& span) { return address - (uint64_t)span.data < span.bytes; };
  if (version == memories().version.load(std::memory_order_acquire) && holds(last)) return last;
  {
    std::shared_lock<std::shared_mutex> held(memories().lock);
    auto after = memories().all.upper_bound(address);
    if (after != memories().all.begin() && holds(std::prev(after)->second)) {
      last = std::prev(after)->second;
      version = memories().version.load(std::memory_order_relaxed);
      return last;
    }
  }
  fail("address %#llx: expected one in memory that lives, got none", (unsigned long long)address);
}

// --- Contexts -------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack and resumes the other context where it stopped.
extern "C" void emu_switch(void** save, void* resume);
asm(R"(
.text
.globl emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");

struct Context {
  void* stack_pointer;
  void start(unsigned char* stack, size_t bytes, void (*entry)()) {
    void** top = (void**)(stack + bytes);
    // A function is entered with the stack 8 below a multiple of 16: where its return address would lie.
    *--top = nullptr;
    *--top = (void*)entry;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    stack_pointer = top;
  }
  static void change(Context& from, Context& to) { emu_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void start(unsigned char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// --- One launch -----------------------------------------------------------------------------------------------------

constexpr size_t STACK_BYTES = 256 << 10, GUARD_BYTES = 4096, MEETING_BYTES = 512;

enum class State { Ready, Barrier, Named, Progress, Warp, Finished };

struct Fiber {
  Context context;
  State state;
  dim3 index;
  // The place where it waits.
  const char* what;
  int line;
  // For a named barrier.
  unsigned number, threads;
  // For State::Progress: `progress` when the fiber last looked.
  size_t seen;
  bool has_to_wait;
};

struct Warp {
  // The lanes' contributions, in turns: a lane cannot be two meetings ahead.
  unsigned char brought[2][32 * MEETING_BYTES];
  unsigned turn;
  size_t bytes;
};

struct Machine {
  Context scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char*> stacks;
  std::vector<unsigned char> shared, shared_written;
  const Entry* entry = nullptr;
  const Argument* arguments = nullptr;
  size_t current = 0;
  // Whether the launch may start before the one before it ends.
  bool early = false;
  // Counts the events that threads may wait for.
  size_t progress = 0;
  std::string error;

  ~Machine() {
    for (unsigned char* stack : stacks) munmap(stack - GUARD_BYTES, GUARD_BYTES + STACK_BYTES);
  }
};

static thread_local Machine machine;
// The compiler may not keep the address of a thread-local variable across a switch; fibers stay on their OS thread.
static Machine& here() { return machine; }

static void yield(State state, const char* what, int line) {
  Machine& m = here();
  Fiber& fiber = m.fibers[m.current];
  fiber.state = state;
  fiber.what = what;
  fiber.line = line;
  Context::change(fiber.context, m.scheduler);
}

void fail(const char* format, ...) {
  Machine& m = here();
  char text[512];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  char place[160];
  snprintf(place, sizeof place, " (block %u,%u,%u, thread %u,%u,%u)", block_index.x, block_index.y, block_index.z,
           thread_index.x, thread_index.y, thread_index.z);
  m.error = std::string(text) + place;
  for (;;) yield(State::Finished, "failed", 0);
}

void fail_access(const Span& span, const char* what, long long offset, size_t bytes) {
  fail("%s of %zu bytes: %s, at byte %lld for %zu bytes", span.kind(), span.bytes, what, offset, bytes);
}

Span shared_span() {
  Machine& m = here();
  return Span{m.shared.data(), m.shared_written.data(), m.shared.size(), false};
}

unsigned lane() { return here().current % 32; }

void wait_for_previous() {
  Machine& m = here();
  has_to_wait = m.fibers[m.current].has_to_wait = false;
}

void barrier(int line) { yield(State::Barrier, "__syncthreads", line); }

void named_barrier(unsigned number, unsigned threads, int line) {
  Machine& m = here();
  Fiber& fiber = m.fibers[m.current];
  fiber.number = number, fiber.threads = threads;
  yield(State::Named, "a named barrier", line);
}

void wait_for_progress(const char* what, int line) {
  Machine& m = here();
  m.fibers[m.current].seen = m.progress;
  yield(State::Progress, what, line);
}

void note_progress() { here().progress++; }

const void* meet(const void* mine, size_t bytes, const char* what, int line) {
  Machine& m = here();
  if (bytes > MEETING_BYTES) fail("%s: a lane brings %zu bytes, at most %zu are possible", what, bytes, MEETING_BYTES);
  Warp& warp = m.warps[m.current / 32];
  unsigned char* brought = warp.brought[warp.turn % 2];
  memcpy(brought + lane() * bytes, mine, bytes);
  warp.bytes = bytes;
  yield(State::Warp, what, line);
  return brought;
}

static void run_fiber() {
  Machine& m = here();
  m.entry->call(m.arguments, m.entry->kernel);
  // Otherwise the launch could end before the previous one, and a later launch would wait for this one only.
  if (has_to_wait) fail("a thread of an early launch ends without waiting for the launches before");
  for (;;) yield(State::Finished, "finished", 0);
}

static const char* describe(const Fiber& fiber, char* text, size_t capacity) {
  if (fiber.state == State::Finished)
    snprintf(text, capacity, "thread %u,%u,%u has finished", fiber.index.x, fiber.index.y, fiber.index.z);
  else
    snprintf(text, capacity, "thread %u,%u,%u waits in %s of line %d", fiber.index.x, fiber.index.y, fiber.index.z,
             fiber.what, fiber.line);
  return text;
}

static bool same_place(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.line == b.line && strcmp(a.what, b.what) == 0;
}

// Resumes threads [begin, end) if all of them wait in one place; otherwise reports two that do not.
static bool release(Machine& m, size_t begin, size_t end) {
  for (size_t i = begin + 1; i < end; i++) {
    if (same_place(m.fibers[begin], m.fibers[i])) continue;
    char a[160], b[160];
    m.error = std::string("divergent barrier: ") + describe(m.fibers[begin], a, sizeof a) + ", " +
              describe(m.fibers[i], b, sizeof b);
    char place[80];
    snprintf(place, sizeof place, " (block %u,%u,%u)", block_index.x, block_index.y, block_index.z);
    m.error += place;
    return false;
  }
  for (size_t i = begin; i < end; i++) m.fibers[i].state = State::Ready;
  return true;
}

// Resumes the threads of a named barrier that has all the threads it waits for; returns whether there was one.
static bool release_named(Machine& m) {
  for (const Fiber& first : m.fibers) {
    if (first.state != State::Named) continue;
    const Fiber place = first;
    auto waits_there = [&](const Fiber& other) { return same_place(place, other) && place.number == other.number; };
    size_t come = 0;
    for (const Fiber& other : m.fibers) come += waits_there(other);
    if (come != place.threads) continue;
    for (Fiber& other : m.fibers)
      if (waits_there(other)) other.state = State::Ready;
    return true;
  }
  return false;
}

// Resumes those of threads [begin, end) that wait for progress made since; returns whether there were any.
static bool release_progress(Machine& m, size_t begin, size_t end) {
  bool any = false;
  for (size_t i = begin; i < end; i++) {
    Fiber& fiber = m.fibers[i];
    if (fiber.state != State::Progress || fiber.seen == m.progress) continue;
    fiber.state = State::Ready;
    any = true;
  }
  return any;
}

// Whether no thread waits for an event that cannot come; otherwise reports one.
static bool none_stuck(Machine& m) {
  for (const Fiber& fiber : m.fibers) {
    if (fiber.state != State::Named && fiber.state != State::Progress) continue;
    char text[160];
    m.error = std::string("stuck: ") + describe(fiber, text, sizeof text) + ", and no other thread can go on";
    return false;
  }
  return true;
}

// Runs one warp until all of its lanes wait for the block or have finished.
static bool run_warp(Machine& m, size_t begin, bool descending) {
  for (;;) {
    for (size_t n = 0; n < 32; n++) {
      m.current = begin + (descending ? 31 - n : n);
      Fiber& fiber = m.fibers[m.current];
      if (fiber.state != State::Ready) continue;
      thread_index = fiber.index;
      has_to_wait = fiber.has_to_wait;
      Context::change(m.scheduler, fiber.context);
      if (!m.error.empty()) return false;
    }
    if (release_progress(m, begin, begin + 32)) continue;
    bool collective = false, behind = false;
    for (size_t i = begin; i < begin + 32; i++) {
      collective |= m.fibers[i].state == State::Warp;
      behind |= m.fibers[i].state == State::Progress;
    }
    // Lanes may leave a loop one after another, and wait for slower lanes.
    if (!collective || behind) return true;
    m.warps[begin / 32].turn++;
    if (!release(m, begin, begin + 32)) return false;
  }
}

static bool run_block(Machine& m) {
  size_t threads = m.fibers.size();
  bool descending = (block_index.x + block_index.y + block_index.z) % 2 == 1;
  for (size_t i = 0; i < threads; i++) {
    Fiber& fiber = m.fibers[i];
    fiber.state = State::Ready;
    fiber.index = dim3{(unsigned)(i % block_dim.x), (unsigned)(i / block_dim.x % block_dim.y),
                       (unsigned)(i / block_dim.x / block_dim.y)};
    fiber.what = "";
    fiber.line = 0;
    fiber.has_to_wait = m.early;
    fiber.context.start(m.stacks[i], STACK_BYTES, run_fiber);
  }
  for (;;) {
    for (size_t n = 0; n < threads; n += 32)
      if (!run_warp(m, descending ? threads - 32 - n : n, descending)) return false;
    bool waiting = false;
    for (const Fiber& fiber : m.fibers) waiting |= fiber.state != State::Finished;
    if (!waiting) return true;
    if (release_progress(m, 0, threads) || release_named(m)) continue;
    if (!none_stuck(m) || !release(m, 0, threads)) return false;
  }
}

static bool prepare(Machine& m, const Entry& entry, const Argument* arguments, size_t threads, size_t shared) {
  m.error.clear();
  m.entry = &entry;
  m.arguments = arguments;
  m.fibers.resize(threads);
  m.warps.resize(threads / 32);
  m.shared.resize(shared);
  m.shared_written.resize(shared);
  while (m.stacks.size() < threads) {
    // A guard page below each stack keeps an overflow out of its neighbour.
    void* memory = mmap(nullptr, GUARD_BYTES + STACK_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, GUARD_BYTES, PROT_NONE) != 0) {
      m.error = "no memory for the stacks of the emulated threads";
      return false;
    }
    m.stacks.push_back((unsigned char*)memory + GUARD_BYTES);
  }
  return true;
}

static bool run_grid(Machine& m) {
  for (block_index.z = 0; block_index.z < grid_dim.z; block_index.z++)
    for (block_index.y = 0; block_index.y < grid_dim.y; block_index.y++)
      for (block_index.x = 0; block_index.x < grid_dim.x; block_index.x++) {
        // Shared memory that a block has not written reads as NaN.
        if (!m.shared.empty()) {
          memset(m.shared.data(), 0xff, m.shared.size());
          memset(m.shared_written.data(), 0, m.shared.size());
        }
        for (Warp& warp : m.warps) warp.turn = 0;
        if (!run_block(m)) return false;
      }
  return true;
}

static const Registry& registry() {
  static const Registry* all = [] {
    Registry* made = new Registry;
#define MODULE_OF(stem) emu_module_##stem(*made);
    EMU_MODULES(MODULE_OF)
#undef MODULE_OF
    return made;
  }();
  return *all;
}

}  // namespace emu

// Lets kernels find memory by its address, until `emu_forget`.
extern "C" void emu_register(unsigned char* data, unsigned char* written, size_t bytes) {
  std::unique_lock<std::shared_mutex> held(emu::memories().lock);
  emu::memories().all[(uint64_t)data] = emu::Span{data, written, bytes, true};
  emu::memories().version++;
}

extern "C" void emu_forget(const unsigned char* data) {
  std::unique_lock<std::shared_mutex> held(emu::memories().lock);
  emu::memories().all.erase((uint64_t)data);
  emu::memories().version++;
}

// Returns 0 if the kernel ran; otherwise `message` holds the error.
extern "C" size_t emu_shared_bytes(const char* name) {
  auto found = emu::shared_bytes().find(name);
  return found == emu::shared_bytes().end() ? 0 : found->second;
}

// `shared`: bytes beyond those that the kernel has by SHARED_BYTES.
extern "C" int emu_launch(const char* name, const unsigned grid[3], const unsigned block[3], size_t shared,
                          bool early, const emu::Argument* arguments, size_t count, char* message, size_t capacity) {
  using namespace emu;
  auto refuse = [&](const std::string& text) {
    snprintf(message, capacity, "%s", text.c_str());
    return 1;
  };
  auto found = registry().entries.find(name);
  if (found == registry().entries.end()) return refuse("no kernel of this name");
  const Entry& entry = found->second;
  if (entry.arguments != count)
    return refuse("expected " + std::to_string(entry.arguments) + " arguments, got " + std::to_string(count));
  size_t index;
  if (const char* wrong = entry.refuse(arguments, &index))
    return refuse("argument " + std::to_string(index) + ": " + wrong);
  size_t threads = (size_t)block[0] * block[1] * block[2];
  if (threads == 0 || threads % 32 != 0 || threads > 1024)
    return refuse("expected a block of 32 to 1024 threads in whole warps, got " + std::to_string(threads));
  shared += emu_shared_bytes(name);
  // The limit of sm_90; sm_80 has less, which the launcher must know.
  if (shared > 227 * 1024) return refuse("shared memory: expected at most 232448 bytes, got " + std::to_string(shared));
  if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0 || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535)
    return refuse("grid: expected 1 to 2^31-1, 65535 and 65535 blocks");
  grid_dim = dim3{grid[0], grid[1], grid[2]};
  block_dim = dim3{block[0], block[1], block[2]};
  Machine& m = here();
  m.early = early;
  if (!prepare(m, entry, arguments, threads, shared) || !run_grid(m)) return refuse(m.error);
  return 0;
}
