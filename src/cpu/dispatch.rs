//! The instruction sets of this process: for loops (through pulp), and for products in bf16 pairs. Each is the best that
//! the CPU has, or what an environment variable names.

use candle_core::Result;
use pulp::Arch;
use std::sync::LazyLock;

/// Names the instruction set of loops in place of the best one.
const VARIABLE: &str = "SFATTENTION_SIMD";

/// Chosen once, or what is wrong with the variable's value.
pub(crate) type Choice<T> = std::result::Result<T, String>;

/// The choice that `variable` names among `known`, best first; the best one where it is not set.
pub(crate) fn choose<T: Copy>(variable: &str, known: &[(&'static str, T)], otherwise: T) -> Choice<T> {
    let Some(wanted) = std::env::var_os(variable) else {
        return Ok(known.first().map_or(otherwise, |(_, best)| *best));
    };
    match known.iter().find(|(name, _)| wanted == **name) {
        Some((_, found)) => Ok(*found),
        None => {
            let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
            Err(format!(
                "{variable}: expected one of {names:?}, which this machine has, got {wanted:?}; unset it"
            ))
        }
    }
}

/// What the CPU has, best first.
fn known() -> Vec<(&'static str, Arch)> {
    let mut known = Vec::new();
    #[cfg(target_arch = "x86_64")]
    {
        known.extend(pulp::x86::V4::try_new().map(|simd| ("avx512", Arch::V4(simd))));
        known.extend(pulp::x86::V3::try_new().map(|simd| ("avx2", Arch::V3(simd))));
    }
    #[cfg(target_arch = "aarch64")]
    known.extend(pulp::aarch64::Neon::try_new().map(|simd| ("neon", Arch::Neon(simd))));
    #[cfg(not(target_arch = "wasm32"))]
    known.push(("scalar", Arch::Scalar));
    known
}

static ARCH: LazyLock<Choice<Arch>> = LazyLock::new(|| choose(VARIABLE, &known(), Arch::new()));

/// The instruction set that loops are compiled for.
pub(crate) fn arch() -> Arch {
    match &*ARCH {
        Ok(arch) => *arch,
        // Every call is refused by then.
        Err(_) => Arch::Scalar,
    }
}

/// # Errors
/// The environment asks for instructions that are not there.
pub(crate) fn check_environment() -> Result<()> {
    let refused = ARCH.as_ref().err().or(super::pairs::refused());
    match refused {
        None => Ok(()),
        Some(message) => candle_core::bail!("{message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::softmax::{add_weights, SLACK};
    use crate::cpu::Accumulator;
    use rayon::prelude::*;

    #[test]
    fn what_is_not_known_is_refused() {
        assert_eq!(choose("SFATTENTION_NOT_SET", &[("a", 1), ("b", 2)], 3), Ok(1));
        assert_eq!(choose("SFATTENTION_NOT_SET", &[], 3), Ok(3));
        let refused = choose("PATH", &[("a", 1)], 3);
        assert!(refused.is_err_and(|text| text.contains("expected one of [\"a\"]")));
    }

    /// Every f32 from -126 to 0 and from 2^-31 to what logits may be more than their base, on every instruction set, by
    /// registers and by numbers: 2^x to a relative error of 1.2e-7.
    #[test]
    fn exp2_is_within_its_bound_for_every_f32_in_range() {
        let chunk = 1 << 20;
        let ranges = [(-0f32, -126f32), (2f32.powi(-31), SLACK)].map(|(first, last)| (first.to_bits(), last.to_bits()));
        for (name, arch) in known() {
            let chunks = ranges.iter().flat_map(|(first, last)| {
                let end = move |first: u32| (*last).min(first + (chunk as u32 - 1));
                (*first..=*last).step_by(chunk).map(move |first| (first, end(first)))
            });
            let worst = chunks
                .collect::<Vec<_>>()
                .into_par_iter()
                .map(|(first, last)| arch.dispatch(Worst(first, last)))
                .reduce(|| 0.0, f64::max);
            println!("{name}: relative error at most {worst:e}");
            assert!(worst <= 1.2e-7, "{name}: {worst:e}");
        }
    }

    /// The largest relative error over a range of bit patterns.
    struct Worst(u32, u32);

    impl pulp::WithSimd for Worst {
        type Output = f64;

        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, simd: S) -> f64 {
            let Self(first, last) = self;
            let mut worst = 0.0;
            let mut registers = [0f32; 256];
            for first in (first..=last).step_by(registers.len()) {
                let x = |index: usize| f32::from_bits(last.min(first + index as u32));
                for (index, target) in registers.iter_mut().enumerate() {
                    *target = x(index);
                }
                add_weights(simd, &mut registers, 0.0, &mut [0.0; 256]);
                for (index, power) in registers.iter().enumerate() {
                    // Where 2^x rounds to 1 or its left neighbours, x ln 2 tells the error from 1 to 1e-14.
                    let x = f64::from(x(index));
                    let exact = if x.abs() < 1e-7 {
                        1.0 + x * std::f64::consts::LN_2
                    } else {
                        x.exp2()
                    };
                    for power in [f64::from(*power), f64::from((x as f32).exp2_nonpositive())] {
                        let error = (power / exact - 1.0).abs();
                        worst = f64::max(worst, if error.is_nan() { f64::INFINITY } else { error });
                    }
                }
            }
            worst
        }
    }
}
