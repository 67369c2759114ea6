// Closed chains in 8 bits between pages and buffers, code by code: what cache.cu does with rows in T.
#include "cache/pages.cuh"

// Writes the closed chains that a list's rows see to buffers. A warp per entry in turn: grid (lists, any), 128 threads.
KERNEL cache_gather_coded(Global<uint8_t> keys, Global<uint8_t> values, Global<uint32_t> scales,
                          Global<uint32_t> tokens, Global<const uint32_t> firsts, Global<const uint64_t> table,
                          Global<const uint32_t> lengths, Global<const uint32_t> starts, CacheParams p) {
  size_t list = blockIdx.x;
  unsigned warp = blockIdx.y * 4 + threadIdx.x / 32, start = p.slide != NO_SLIDE ? starts[list] : 0,
           length = lengths[list];
  CodedRows<uint8_t, uint32_t> to{keys, values, scales, tokens};
  for (unsigned entry = start + warp; entry < length; entry += gridDim.y * 4) {
    uint64_t address = table[list * p.pages + entry / PAGE];
    CodedPage page = coded_page(address, p.sizes.head_dim, p.value_dim, p.fold == MEAN);
    copy_coded(page.rows, entry % PAGE, to, firsts[list] + entry - start, p.sizes.head_dim, p.value_dim);
  }
}

// Writes closed chains into the lists' pages. A warp per entry in turn: grid (lists, any), 128 threads.
KERNEL cache_restore_coded(Global<const uint8_t> keys, Global<const uint8_t> values, Global<const uint32_t> scales,
                           Global<const uint32_t> tokens, Global<const uint32_t> firsts, Global<const uint64_t> table,
                           Global<const uint32_t> lengths, Global<const uint32_t> starts, CacheParams p) {
  size_t list = blockIdx.x, first = firsts[list];
  unsigned length = lengths[list];
  CodedRows<const uint8_t, const uint32_t> from{keys, values, scales, tokens};
  for (unsigned entry = blockIdx.y * 4 + threadIdx.x / 32; entry < length; entry += gridDim.y * 4) {
    uint64_t address = table[list * p.pages + entry / PAGE];
    CodedPage page = coded_page(address, p.sizes.head_dim, p.value_dim, p.fold == MEAN);
    copy_coded(from, first + entry, page.rows, entry % PAGE, p.sizes.head_dim, p.value_dim);
    unsigned before = entry > 0 ? tokens[first + entry - 1] + 1 : starts[gridDim.x + list];
    if (p.fold == MEAN && threadIdx.x % 32 == 0)
      page.ln.set(entry % PAGE, logf((float)(tokens[first + entry] + 1 - before)));
  }
}

// Copies the first `used[i]` entries of the page at address from[i] to the page at to[i]. A warp per entry: grid
// (pages, PAGE / 4), 128 threads.
KERNEL cache_copy_page_coded(Global<const uint64_t> from, Global<const uint64_t> to, Global<const uint32_t> used,
                             CacheParams p) {
  unsigned entry = blockIdx.y * 4 + threadIdx.x / 32;
  bool sized = p.fold == MEAN;
  if (entry >= used[blockIdx.x]) return;
  CodedPage old = coded_page(from[blockIdx.x], p.sizes.head_dim, p.value_dim, sized);
  CodedPage page = coded_page(to[blockIdx.x], p.sizes.head_dim, p.value_dim, sized);
  copy_coded(old.rows, entry, page.rows, entry, p.sizes.head_dim, p.value_dim);
  if (sized && threadIdx.x % 32 == 0) page.ln.set(entry, old.ln[entry]);
}

MODULE(coded, ENTRY(cache_gather_coded) ENTRY(cache_restore_coded) ENTRY(cache_copy_page_coded))
