// Attention forward in f32 arithmetic throughout: tensor cores would round to TF32. Four lanes share a row; each takes
// every fourth group of four elements of D. A block has 32 rows, which read keys and values in step, so that the caches
// serve all of them.
#include "lib/params.cuh"
#include "lib/rows_f32.cuh"
#include "lib/softmax.cuh"

template <int D>
__device__ __forceinline__ void forward_f32_rows(const ColumnsF32& x, Global<float> output, Global<float> log_sum_exp,
                                                 const Floats& sinks, const AttentionParams& p) {
    hw::let_next_start();
    hw::wait_for_previous();
    constexpr int PART = D / 4;
    RowF32<D> row(x, p, 32);
    float sums[PART], query[PART];
    row.load_query(query);
#pragma unroll
    for (int i = 0; i < PART; i++) sums[i] = 0;
    float maximum = -hw::infinity(), sum = 0;
    bool bad = false;
    // A query that is not finite makes its logits NaN, unless a logit is minus infinity: so it is checked here.
#pragma unroll
    for (int i = 0; i < PART; i++) bad |= !hw::finite(query[i]);
    row.for_each_column([&](const ColumnF32& c) {
        float key[PART], value[PART], logit = 0, check = 0;
        row.load_part(key, c.keys, c.key_at);
#pragma unroll
        for (int i = 0; i < PART; i++) logit += query[i] * key[i], check += key[i] * 0.f;
        logit = capped(p.softcap, row.quad_sum(logit)) + c.addend;
        if (!c.visible) return;
        float raised = hw::max(maximum, logit), base = raised == -hw::infinity() ? 0.f : raised;
        float rescale = exp2f(maximum - base), weight = exp2f(logit - base);
        maximum = raised;
        sum = sum * rescale + weight;
        weight *= c.kept;
        row.load_part(value, c.values, c.value_at);
#pragma unroll
        for (int i = 0; i < PART; i++) {
            check += value[i] * 0.f;
            sums[i] = sums[i] * rescale + (weight == 0.f ? 0.f : weight * value[i]);
        }
        bad |= check != 0.f;
    });
    bool empty = sum == 0.f;
    float factor = 1;
    if (sinks) {
        OnlineSoftmax<1> softmax{{maximum}, {sum}};
        factor = softmax.add_sink(0, bias_in_base_2(sinks[row.at.head]));
        maximum = softmax.maximum[0], sum = softmax.sum[0];
    }
    // A row whose every column the bias hides gives zeros.
    float inverse = !empty ? factor / sum : x.bias ? 0.f : hw::nan(), check = bad ? hw::nan() : inverse * 0.f;
#pragma unroll
    for (int i = 0; i < PART; i++) sums[i] *= inverse, check += sums[i] * 0.f;
    check = row.quad_sum(check);
    if (!row.exists) return;
    if (check != 0.f) {
#pragma unroll
        for (int i = 0; i < PART; i++) sums[i] = hw::nan();
    }
    row.store_part(output, row.at.batch_head * p.sizes.tokens + row.token, sums);
    if (!log_sum_exp || threadIdx.x % 4 != 0) return;
    float2 saved = saved_sum(maximum, sum);
    int64_t index = row.at.batch_head * p.sizes.tokens + row.token;
    log_sum_exp.set(index, check != 0.f ? hw::nan() : saved.x), log_sum_exp.set(rest_of_sums(p) + index, saved.y);
}

#define FORWARD(D)                                                                                                  \
    KERNEL __launch_bounds__(128)                                                                                   \
        forward_##D##_f32(Floats q, Floats k, Floats v, Floats far_k, Floats far_v, Floats far_ln, Words far_index, \
                        Words far_before, Floats folded_k, Floats folded_v, Floats folded_ln, Floats bias,          \
                        Global<float> output, Global<float> log_sum_exp, Floats sinks, AttentionParams p) {         \
        ColumnsF32 x{q, k, v, far_k, far_v, far_ln, far_index, far_before, folded_k, folded_v, folded_ln, bias};    \
        forward_f32_rows<D>(x, output, log_sum_exp, sinks, p);                                                      \
    }

// By padded head size.
FORWARD(64)
FORWARD(128)
FORWARD(256)

MODULE(forward_f32, ENTRY(forward_64_f32) ENTRY(forward_128_f32) ENTRY(forward_256_f32))
