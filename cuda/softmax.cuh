// The online softmax of rows held by quads of lanes, in base 2: logits arrive multiplied by log2(e).
#pragma once

#include "hw.cuh"

// From this magnitude on a logit's last bit counts. Then a scaled product is rounded before anything is subtracted, so that the
// largest logit of a row minus itself is 0 wherever it is computed; and what rounding left of a row's log-sum-exp is read.
constexpr float LARGE_LOGIT = 4096;

// The log-sum-exp of a row's logits, given their maximum and log2 of the sum of 2^(logit - maximum), and what rounding left of
// it: equal logits of any size have equal weights by these two. Of a row that sees nothing, whose sum is 0, the former is
// infinity: every weight is 0 then.
SFA_DEVICE float2 saved_sum(float maximum, float sum) {
    if (sum == 0.f) return float2{hw::infinity(), 0};
    float rest = hw::log2(sum), rounded = maximum + rest;
    rest -= rounded - maximum;
    return float2{rounded, hw::finite(rest) ? rest : 0.f};
}

// log2 of a weight from a logit and these; never more than 0, even where the logit was computed in another order.
SFA_DEVICE float exponent_of(float logit, float log_sum_exp, float rest) {
    return hw::at_most_zero((logit - log_sum_exp) - rest);
}

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
