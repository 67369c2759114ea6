// Attention forward in f32 arithmetic throughout: no tensor cores, since those would round to TF32. Four lanes share a
// row: each takes every fourth group of four elements of D. 32 rows a block; keys and values come through the caches,
// which the rows of a block read in step.
#include "params.cuh"
#include "rows_f32.cuh"

template <int D>
__device__ __forceinline__ void forward_f32_rows(const ColumnsF32& x, Global<float> output, Global<float> log_sum_exp,
                                                 const AttentionParams& p) {
    constexpr int PART = D / 4;
    RowF32<D> row(x, p, 32);
    float sums[PART], query[PART];
    row.load_query(query);
#pragma unroll
    for (int i = 0; i < PART; i++) sums[i] = 0;
    float maximum = -hw::infinity(), sum = 0;
    bool bad = false;
    row.for_each_column([&](const ColumnF32& c) {
        float key[PART], value[PART];
        row.load_part(key, c.keys, c.key_at);
        row.load_part(value, c.values, c.value_at);
        float check = 0, logit = 0;
#pragma unroll
        for (int i = 0; i < PART; i++) logit += query[i] * key[i], check += key[i] * 0.f + value[i] * 0.f;
        logit = row.quad_sum(logit);
        check = row.quad_sum(check);
        if (!c.visible) return;
        bad |= check != 0.f;
        logit = logit + c.addend;
        float raised = hw::max(maximum, logit), base = raised == -hw::infinity() ? 0.f : raised;
        float rescale = exp2f(maximum - base), weight = exp2f(logit - base);
        maximum = raised;
        sum = sum * rescale + weight;
        weight *= c.kept;
#pragma unroll
        for (int i = 0; i < PART; i++) sums[i] = sums[i] * rescale + (weight == 0.f ? 0.f : weight * value[i]);
    });
    float inverse = 1.f / sum, check = inverse * 0.f;
#pragma unroll
    for (int i = 0; i < PART; i++) sums[i] *= inverse, check += sums[i] * 0.f;
    check = row.quad_sum(check);
    if (!row.exists) return;
    if (check != 0.f || bad) {
#pragma unroll
        for (int i = 0; i < PART; i++) sums[i] = hw::nan();
    }
    row.store_part(output, row.at.batch_head * p.sizes.tokens + row.token, sums);
    if (log_sum_exp && threadIdx.x % 4 == 0)
        log_sum_exp.set(row.at.batch_head * p.sizes.tokens + row.token, maximum + log2f(sum));
}

KERNEL __launch_bounds__(128)
    forward_f32(Floats q, Floats k, Floats v, Floats far_k, Floats far_v, Floats far_ln, Words far_index, Words far_before,
                Floats folded_k, Floats folded_v, Floats folded_ln, Floats bias, Global<float> output,
                Global<float> log_sum_exp, AttentionParams p) {
    ColumnsF32 x{q, k, v, far_k, far_v, far_ln, far_index, far_before, folded_k, folded_v, folded_ln, bias};
    if (p.sizes.head_dim <= 64) forward_f32_rows<64>(x, output, log_sum_exp, p);
    else if (p.sizes.head_dim <= 128) forward_f32_rows<128>(x, output, log_sum_exp, p);
    else forward_f32_rows<256>(x, output, log_sum_exp, p);
}

MODULE(forward_f32, ENTRY(forward_f32))
