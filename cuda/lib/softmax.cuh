// The online softmax of rows that a quad of lanes holds, in base 2: logits come multiplied by log2(e).
#pragma once

#include "lib/hw.cuh"

// From this magnitude on a logit's last bit matters. Then a scaled product is rounded before anything is subtracted, so
// that a row's largest logit minus itself is 0 wherever it is computed; and the rounding remainder of the log-sum-exp
// is read.
constexpr float LARGE_LOGIT = 4096;

// The log-sum-exp of a row's logits and its rounding remainder, from their maximum and the sum of 2^(logit - maximum).
// By both, equal logits of any size have equal weights. If a row sees nothing, its sum is 0 and its log-sum-exp
// infinity: every weight is 0 then.
SFA_DEVICE float2 saved_sum(float maximum, float sum) {
    if (sum == 0.f) return float2{hw::infinity(), 0};
    float rest = hw::log2(sum), rounded = maximum + rest;
    rest -= rounded - maximum;
    return float2{rounded, hw::finite(rest) ? rest : 0.f};
}

// log2 of a weight, from a logit, the log-sum-exp and its remainder; at most 0, even if the logit was computed in
// another order.
SFA_DEVICE float exponent_of(float logit, float log_sum_exp, float rest) {
    return hw::at_most_zero((logit - log_sum_exp) - rest);
}

// Running maximum (to within SLACK) of `ROWS` rows, and this lane's share of their sums.
template <int ROWS>
struct OnlineSoftmax {
    static constexpr float SLACK = 8;
    float maximum[ROWS];
    float sum[ROWS];

    // A row's first column; returns the weight of its value. Minus infinity leaves the row empty; a NaN stays NaN.
    // `owner`: one lane of the row's quad.
    SFA_DEVICE float start(int r, float logit, bool owner) {
        bool empty = logit == -hw::infinity();
        float weight = empty ? 0.f : hw::exp2(logit - logit);
        maximum[r] = logit;
        sum[r] = owner ? weight : 0.f;
        return weight;
    }

    // Raises the maximum to the largest logit of a tile, given that of this lane's share; returns the factor for older
    // sums. The maximum follows only a logit that exceeds it by SLACK, so weights reach 2^SLACK, and most tiles rescale
    // nothing.
    SFA_DEVICE float raise(int r, float largest) {
        largest = hw::max(largest, hw::shuffle_xor(largest, 1));
        largest = hw::max(largest, hw::shuffle_xor(largest, 2));
        float old = maximum[r];
        if (!(largest - old > SLACK)) return 1;
        maximum[r] = largest;
        return hw::exp2(old - largest);
    }

    // The number that is subtracted from a row's logits: 0 if the row saw only minus infinities, which keeps their
    // weights 0.
    SFA_DEVICE float base(int r) const { return maximum[r] == -hw::infinity() ? 0.f : maximum[r]; }

    // Adds up the quad's shares; every lane then holds the row's sum.
    SFA_DEVICE float finish(int r) {
        sum[r] += hw::shuffle_xor(sum[r], 1);
        sum[r] += hw::shuffle_xor(sum[r], 2);
        return sum[r];
    }

    // Adds a term without a value, after `finish`; returns the factor for the row's output. Minus infinity adds
    // nothing.
    SFA_DEVICE float add_sink(int r, float sink) {
        float old = maximum[r];
        if (sink == -hw::infinity()) return 1;
        if (!(sink > old)) {
            sum[r] += hw::exp2(sink - old);
            return 1;
        }
        float rescale = hw::exp2(old - sink);
        maximum[r] = sink, sum[r] = sum[r] * rescale + 1.f;
        return rescale;
    }

    // log2 of the sum of 2^logit, after `finish`.
    SFA_DEVICE float log_sum_exp(int r) const { return maximum[r] + hw::log2(sum[r]); }
};
