// The online softmax of rows held by quads of lanes, in base 2: logits arrive multiplied by log2(e).
#pragma once

#include "hw.cuh"

// Running maximum of `ROWS` rows, and this lane's share of their sums.
template <int ROWS>
struct OnlineSoftmax {
    float maximum[ROWS];
    float sum[ROWS];

    SFA_DEVICE void reset() {
#pragma unroll
        for (int r = 0; r < ROWS; r++) maximum[r] = -hw::infinity(), sum[r] = 0;
    }

    // A row's first column; returns the weight of its value. Minus infinity leaves the row empty; a NaN stays one.
    // `owner` is one lane of the row's quad.
    SFA_DEVICE float start(int r, float logit, bool owner) {
        bool empty = logit == -hw::infinity();
        float weight = empty ? 0.f : hw::exp2(logit - logit);
        maximum[r] = logit;
        sum[r] = owner ? weight : 0.f;
        return weight;
    }

    // Takes the largest logit of this lane's share of a tile; returns what older sums are multiplied by. A row that saw
    // only minus infinities keeps weight 0: nothing is subtracted from them.
    SFA_DEVICE float raise(int r, float largest, float& base) {
        largest = hw::max(largest, hw::shuffle_xor(largest, 1));
        largest = hw::max(largest, hw::shuffle_xor(largest, 2));
        float old = maximum[r];
        maximum[r] = hw::max(old, largest);
        base = maximum[r] == -hw::infinity() ? 0.f : maximum[r];
        float rescale = hw::exp2(old - base);
        sum[r] *= rescale;
        return rescale;
    }

    // Adds up the quad's shares; every lane then holds the row's sum.
    SFA_DEVICE float finish(int r) {
        sum[r] += hw::shuffle_xor(sum[r], 1);
        sum[r] += hw::shuffle_xor(sum[r], 2);
        return sum[r];
    }

    // log2 of the sum of 2^logit, after `finish`.
    SFA_DEVICE float log_sum_exp(int r) const { return maximum[r] + hw::log2(sum[r]); }
};
