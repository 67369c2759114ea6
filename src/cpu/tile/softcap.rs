//! Softcap of logits: z becomes c · tanh(z / c), and the factor 1 - tanh² of its gradient.
//!
//! With e = exp(-2|z/c|), tanh|z/c| is (1 - e) / (1 + e) and 1 - tanh² is 4e / (1 + e)². 1 - e comes from a polynomial
//! without the 1, so that small logits keep their precision, and a huge one is c itself.

use crate::cpu::number::element::Accumulator;

/// Numbers that are held as values: the compiler makes registers of them.
const TOGETHER: usize = 16;

/// One call's softcap, for numbers in one unit.
#[derive(Clone, Copy)]
pub(crate) struct Softcap<A> {
    /// A number's absolute value times this is log2 of e.
    rate: A,
    /// c in the unit of the numbers.
    cap: A,
}

impl<A: Accumulator> Softcap<A> {
    /// For numbers that times `to_base_2` (2^-20 to 2^20) are logits in base 2.
    pub fn new(c: f64, to_base_2: f64) -> Self {
        // Outside of this range `rate` or `cap` would leave that of A.
        let largest = (A::MAX_EXPONENT - 28.0).exp2();
        let c = c.clamp(1.0 / largest, largest);
        Self {
            rate: A::of(-2.0 * to_base_2 / c),
            cap: A::of(c * std::f64::consts::LOG2_E / to_base_2),
        }
    }

    /// The capped number, and 1 - tanh² there. NaN gives NaN; an infinite number is capped.
    #[inline(always)]
    pub fn of(&self, x: A) -> [A; 2] {
        let size = if x < A::ZERO { A::ZERO - x } else { x };
        let [e, less_one] = (size * self.rate).exp2_and_less_one();
        let sum = A::ONE + e;
        let inverse = A::ONE / sum;
        let capped = less_one * inverse * self.cap;
        let half = (e + e) * inverse;
        [
            if x < A::ZERO { capped } else { A::ZERO - capped },
            (half + half) * inverse,
        ]
    }

    /// Caps a column of a tile; writes 1 - tanh² of each number to `slopes`, unless that is empty.
    #[inline(always)]
    pub fn column(&self, numbers: &mut [A], slopes: &mut [A]) {
        let (chunks, rest) = numbers.as_chunks_mut::<TOGETHER>();
        debug_assert!(rest.is_empty() && (slopes.is_empty() || slopes.len() == chunks.len() * TOGETHER));
        let mut slopes = slopes.as_chunks_mut::<TOGETHER>().0.iter_mut();
        for chunk in chunks {
            let (mut capped, mut slope) = ([A::ZERO; TOGETHER], [A::ZERO; TOGETHER]);
            for (index, x) in chunk.iter().enumerate() {
                [capped[index], slope[index]] = self.of(*x);
            }
            *chunk = capped;
            if let Some(target) = slopes.next() {
                *target = slope;
            }
        }
    }
}

/// Changes gradients of capped logits to those of the logits: multiplies a column by its `slopes`, where the weight is
/// not 0. A masked column has weight 0, and its logit, of a row that is NaN elsewhere, may be NaN.
#[inline(always)]
pub(crate) fn uncap<A: Accumulator>(weights: &[A], gradients: &mut [A], slopes: &[A]) {
    for ((gradient, slope), weight) in gradients.iter_mut().zip(slopes).zip(weights) {
        let product = *gradient * *slope;
        *gradient = if *weight == A::ZERO { *gradient } else { product };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instructions::known;

    /// Exponents of two from 2^-40 to 2^11 in small steps, of both signs.
    fn numbers() -> Vec<f64> {
        let sizes = (0..16 * 4000).map(|step| (f64::from(step) * (51.0 / (16.0 * 4000.0)) - 40.0).exp2());
        sizes.flat_map(|size| [size, -size]).collect()
    }

    struct Columns<'n, A>(Softcap<A>, &'n mut [A], &'n mut [A]);

    impl<A: Accumulator> pulp::WithSimd for Columns<'_, A> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, _: S) {
            self.0.column(self.1, self.2)
        }
    }

    fn within<A: Accumulator + std::fmt::Debug>(c: f64, to_base_2: f64, capped_bound: f64, slope_bound: f64) {
        for (name, arch) in known() {
            let given: Vec<A> = numbers().into_iter().map(A::of).collect();
            let (mut capped, mut slopes) = (given.clone(), given.clone());
            arch.dispatch(Columns(Softcap::new(c, to_base_2), &mut capped, &mut slopes));
            for ((x, capped), slope) in given.iter().zip(capped).zip(slopes) {
                let natural = x.double() * to_base_2 * std::f64::consts::LN_2;
                let exact = c * (natural / c).tanh() * std::f64::consts::LOG2_E / to_base_2;
                let error = (capped.double() - exact).abs() / exact.abs();
                assert!(
                    error <= capped_bound,
                    "{name}: {c} at {natural}: {capped:?} for {exact}: {error:e}"
                );
                let exact = (natural / c).cosh().powi(-2);
                let error = (slope.double() - exact).abs();
                // Below the smallest normal number a slope may be as large as that.
                assert!(
                    error <= slope_bound * exact + 1e-37,
                    "{name}: {c} at {natural}: slope {slope:?} for {exact}: {error:e}"
                );
            }
        }
    }

    #[test]
    fn tanh_is_exact_enough_on_every_instruction_set() {
        for (c, to_base_2) in [(1.0, 1.0), (50.0, 1.0), (30.0, 0.18), (0.01, 3.0)] {
            // The slope's error grows with the exponent, as that of exp2 of a rounded product does.
            within::<f32>(c, to_base_2, 1e-6, 2e-5);
            within::<f64>(c, to_base_2, 1e-14, 2e-13);
        }
    }

    #[test]
    fn numbers_at_the_edges() {
        for c in [1e-300, 1e-30, 50.0, 1e30, 1e300] {
            let softcap = Softcap::<f32>::new(c, 1.0);
            assert_eq!(softcap.of(0.0), [0.0, 1.0], "{c}");
            for x in [1e-30f32, 1.0, 1e30, f32::MAX, f32::INFINITY] {
                let [up, down] = [x, -x].map(|x| softcap.of(x)[0]);
                assert!(up.is_finite() && up >= 0.0 && down == -up, "{c} {x}: {up} {down}");
            }
            assert!(softcap.of(f32::NAN).iter().all(|x| x.is_nan()), "{c}");
        }
        let [capped, slope] = Softcap::<f64>::new(50.0, 1.0).of(f64::MAX);
        assert!((capped - 50.0 * std::f64::consts::LOG2_E).abs() < 1e-12 && slope < 1e-300);
    }
}
