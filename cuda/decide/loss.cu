// The sums S and M of the compression loss, and the gradient of S. One warp per pair or token: 4 warps a block, grid
// (pairs or tokens / 4, batch * heads). Lists are query heads.
#include "lib/cosine.cuh"

// The distance of a cosine from the strategy's goal: 1 for similarity, 0 for difference.
__device__ __forceinline__ float residual(unsigned strategy, float cosine) {
  return strategy == SIMILARITY ? cosine - 1.0f : cosine;
}

// Per block: the sum of squares, and how many pairs qualify, as two f64 in `sums`, so that they are added in the same
// order on every run.
template <class T>
__device__ void partial_sums(Global<const T> q, Global<const T> k, Global<const float> tests, Global<double> sums,
                             const DecideParams& p) {
  Shared<double> squared = shared_memory<double>(0, 4), merged = shared_memory<double>(32, 4);
  unsigned warp = threadIdx.x / 32, t = blockIdx.x * 4 + warp;
  double square = 0.0, merges = 0.0;
  HeadTest test(tests, blockIdx.y);
  if (t + 1 < p.sizes.tokens && test.strategy != OFF) {
    List list(p.sizes, blockIdx.y);
    float cosine = pair_cosine(q, k, p, list, list.first_head, t + 1, t);
    double x = residual(test.strategy, cosine);
    square = x * x;
    merges = test.passes(cosine);
  }
  if (threadIdx.x % 32 == 0) {
    squared.set(warp, square);
    merged.set(warp, merges);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  size_t block = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
  sums.set(2 * block, squared[0] + squared[1] + squared[2] + squared[3]);
  sums.set(2 * block + 1, merged[0] + merged[1] + merged[2] + merged[3]);
}


// Adds up the blocks' sums into [S, M]. One block of 256 threads.
SHARED_BYTES(loss_total, 2 * 256 * sizeof(double))
KERNEL loss_total(Global<const double> sums, Global<float> out, TotalParams p) {
  Shared<double> squared = shared_memory<double>(0, 256), merged = shared_memory<double>(2048, 256);
  double s = 0.0, m = 0.0;
  for (size_t block = threadIdx.x; block < p.blocks; block += 256) {
    s += sums[2 * block];
    m += sums[2 * block + 1];
  }
  squared.set(threadIdx.x, s);
  merged.set(threadIdx.x, m);
  for (unsigned half = 128; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
      squared.set(threadIdx.x, squared[threadIdx.x] + squared[threadIdx.x + half]);
      merged.set(threadIdx.x, merged[threadIdx.x] + merged[threadIdx.x + half]);
    }
  }
  if (threadIdx.x == 0) {
    out.set(0, (float)squared[0]);
    out.set(1, (float)merged[0]);
  }
}

constexpr unsigned PER_LANE = 8;

// One vector of a pair; `norm` is at least MIN_NORM, and `free` tells whether it is the vector's own norm.
template <class T> struct Side {
  Global<const T> rows;
  size_t at;
  float norm;
  bool free;

  __device__ __forceinline__ Side(Global<const T> rows, size_t at, float norm)
      : rows(rows), at(at), norm(norm < MIN_NORM ? MIN_NORM : norm), free(norm >= MIN_NORM) {}
};

// sum += factor * (w - c u) / norm, with u this unit vector and w the other one; c u is dropped if the norm was raised
// to MIN_NORM.
template <class T>
__device__ void add_gradient(float (&sum)[PER_LANE], const Side<T>& mine, const Side<T>& other, float cosine,
                             float factor, unsigned dim) {
  float projection = mine.free ? cosine / mine.norm : 0.0f;
#pragma unroll
  for (unsigned i = 0; i < PER_LANE; i++) {
    unsigned d = i * 32 + threadIdx.x % 32;
    if (d >= dim) continue;
    float x = widen(mine.rows[mine.at + d]), y = widen(other.rows[other.at + d]);
    sum[i] += factor / mine.norm * (y / other.norm - projection * x);
  }
}

// Adds the gradient of pair (t + 1, t) of one head with respect to its left vector (token t + 1) or its right one
// (token t).
template <class T>
__device__ void add_pair(float (&sum)[PER_LANE], Global<const T> q, Global<const T> k, Global<const float> tests,
                         float upstream, const DecideParams& p, unsigned batch, unsigned head, unsigned t, bool left) {
  HeadTest test(tests, (size_t)batch * p.sizes.heads + head);
  if (test.strategy == OFF) return;
  unsigned kv_head = head / (p.sizes.heads / p.sizes.kv_heads), dim = p.sizes.head_dim;
  size_t a_at = p.key_key ? p.k.at(batch, kv_head, t + 1) : p.q.at(batch, head, t + 1);
  size_t b_at = p.k.at(batch, kv_head, t);
  Global<const T> a_rows = p.key_key ? k : q;
  Products both = products(a_rows, a_at, k, b_at, dim);
  Side<T> a(a_rows, a_at, both.norm_a), b(k, b_at, both.norm_b);
  float cosine = both.cosine(), factor = upstream * 2.0f * residual(test.strategy, cosine);
  if (left)
    add_gradient(sum, a, b, cosine, factor, dim);
  else
    add_gradient(sum, b, a, cosine, factor, dim);
}

template <class T> __device__ void store_row(const float (&sum)[PER_LANE], Global<T> out, size_t at, unsigned dim) {
#pragma unroll
  for (unsigned i = 0; i < PER_LANE; i++) {
    unsigned d = i * 32 + threadIdx.x % 32;
    if (d < dim) out.set(at + d, narrow<T>(sum[i]));
  }
}

// dq (batch, heads, N, D): each token is the left vector of one pair. `upstream` is [dS, dM]; M is a constant, so dM is
// not read.
template <class T>
__device__ void query_gradient(Global<const T> q, Global<const T> k, Global<const float> tests,
                               Global<const float> upstream, Global<T> dq, const DecideParams& p) {
  unsigned t = blockIdx.x * 4 + threadIdx.x / 32;
  if (t >= p.sizes.tokens) return;
  float sum[PER_LANE] = {};
  if (t > 0 && !p.key_key)
    add_pair(sum, q, k, tests, upstream[0], p, blockIdx.y / p.sizes.heads, blockIdx.y % p.sizes.heads, t - 1, true);
  store_row(sum, dq, ((size_t)blockIdx.y * p.sizes.tokens + t) * p.sizes.head_dim, p.sizes.head_dim);
}

// dk (batch, kv_heads, N, D), over the group's heads. Grid (tokens / 4, batch * kv_heads).
template <class T>
__device__ void key_gradient(Global<const T> q, Global<const T> k, Global<const float> tests,
                             Global<const float> upstream, Global<T> dk, const DecideParams& p) {
  unsigned t = blockIdx.x * 4 + threadIdx.x / 32, group = p.sizes.heads / p.sizes.kv_heads;
  if (t >= p.sizes.tokens) return;
  unsigned batch = blockIdx.y / p.sizes.kv_heads, first = blockIdx.y % p.sizes.kv_heads * group;
  float sum[PER_LANE] = {};
  for (unsigned head = first; head < first + group; head++) {
    if (t + 1 < p.sizes.tokens) add_pair(sum, q, k, tests, upstream[0], p, batch, head, t, false);
    if (t > 0 && p.key_key) add_pair(sum, q, k, tests, upstream[0], p, batch, head, t - 1, true);
  }
  store_row(sum, dk, ((size_t)blockIdx.y * p.sizes.tokens + t) * p.sizes.head_dim, p.sizes.head_dim);
}

#define LOSS(suffix, T)                                                                                            \
  SHARED_BYTES(loss_sums_##suffix, 2 * 4 * sizeof(double))                                                         \
  KERNEL loss_sums_##suffix(Global<const T> q, Global<const T> k, Global<const float> tests, Global<double> sums,  \
                            DecideParams p) {                                                                      \
    partial_sums(q, k, tests, sums, p);                                                                            \
  }                                                                                                                \
  KERNEL loss_dq_##suffix(Global<const T> q, Global<const T> k, Global<const float> tests,                         \
                          Global<const float> upstream, Global<T> dq, DecideParams p) {                            \
    query_gradient(q, k, tests, upstream, dq, p);                                                                  \
  }                                                                                                                \
  KERNEL loss_dk_##suffix(Global<const T> q, Global<const T> k, Global<const float> tests,                         \
                          Global<const float> upstream, Global<T> dk, DecideParams p) {                            \
    key_gradient(q, k, tests, upstream, dk, p);                                                                    \
  }
FOR_EACH_DTYPE(LOSS)

MODULE(loss, ENTRIES(loss_sums) ENTRY(loss_total) ENTRIES(loss_dq) ENTRIES(loss_dk))
