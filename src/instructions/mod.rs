//! The instruction sets of this process: for loops (through pulp), and for products in bf16 pairs. Each is the best set
//! that the CPU has, or the set that an environment variable names.

pub(crate) mod bf16;

use candle_core::Result;
use pulp::Arch;
use std::sync::LazyLock;

/// Names the instruction set of loops in place of the best one.
const VARIABLE: &str = "SFATTENTION_SIMD";

/// The choice, made once, or the error in the variable's value.
pub(crate) type Choice<T> = std::result::Result<T, String>;

/// The set that `variable` names among `known`, best first; the best one where the variable is not set.
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

/// The sets that the CPU has, best first.
pub(crate) fn known() -> Vec<(&'static str, Arch)> {
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
        // `check_environment` refuses every call before this is used.
        Err(_) => Arch::Scalar,
    }
}

/// Refuses a call where an environment variable names an unusable set.
///
/// # Errors
/// The environment asks for instructions that the CPU does not have.
pub(crate) fn check_environment() -> Result<()> {
    let refused = ARCH.as_ref().err().or(bf16::refused());
    match refused {
        None => Ok(()),
        Some(message) => candle_core::bail!("{message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_refused() {
        assert_eq!(choose("SFATTENTION_NOT_SET", &[("a", 1), ("b", 2)], 3), Ok(1));
        assert_eq!(choose("SFATTENTION_NOT_SET", &[], 3), Ok(3));
        let refused = choose("PATH", &[("a", 1)], 3);
        assert!(refused.is_err_and(|text| text.contains("expected one of [\"a\"]")));
    }
}
