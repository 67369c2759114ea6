// The online softmax of rows held by quads of lanes, in base 2: logits arrive multiplied by log2(e).
#pragma once

#include "hw.cuh"

// Running maximum (to within SLACK) of `ROWS` rows, and this lane's share of their sums.
template <int ROWS>
struct OnlineSoftmax {
    static constexpr float SLACK = 8;
    float maximum[ROWS];
    float sum[ROWS];

    // A row's first column; returns the weight of its value. Minus infinity leaves the row empty; a NaN stays one.
    // `owner` is one lane of the row's quad.
    SFA_DEVICE float start(int r, float logit, bool owner) {
        bool empty = logit == -hw::infinity();
        float weight = empty ? 0.f : hw::exp2(logit - logit);
        maximum[r] = logit;
        sum[r] = owner ? weight : 0.f;
        return weight;
    }

    // Takes the largest logit of this lane's share of a tile; returns what older sums are multiplied by. The maximum only
    // follows logits that are beyond it by SLACK: weights reach 2^SLACK then, and most tiles rescale nothing.
    SFA_DEVICE float raise(int r, float largest) {
        largest = hw::max(largest, hw::shuffle_xor(largest, 1));
        largest = hw::max(largest, hw::shuffle_xor(largest, 2));
        float old = maximum[r];
        if (!(largest - old > SLACK)) return 1;
        maximum[r] = largest;
        return hw::exp2(old - largest);
    }

    // What is subtracted from a row's logits. A row that saw only minus infinities keeps weight 0: 0 is.
    SFA_DEVICE float base(int r) const { return maximum[r] == -hw::infinity() ? 0.f : maximum[r]; }

    // Adds up the quad's shares; every lane then holds the row's sum.
    SFA_DEVICE float finish(int r) {
        sum[r] += hw::shuffle_xor(sum[r], 1);
        sum[r] += hw::shuffle_xor(sum[r], 2);
        return sum[r];
    }

    // log2 of the sum of 2^logit, after `finish`.
    SFA_DEVICE float log_sum_exp(int r) const { return maximum[r] + hw::log2(sum[r]); }
};
