//! The instructions that multiply pairs of bf16 numbers: Intel's AMX or AMD's AVX512-BF16, where the CPU has them and
//! they pay.

use super::{choose, Choice};
use std::sync::LazyLock;

/// The instructions that multiply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum PairInstructions {
    Amx,
    Avx512Bf16,
}

impl PairInstructions {
    fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512Bf16 => "avx512",
        }
    }
}

/// Names the kernel to use in place of the best one, or "off".
const VARIABLE: &str = "SFATTENTION_BF16";

/// The kernel of this process, chosen once.
pub(crate) fn kernel() -> &'static Choice<Option<PairInstructions>> {
    static KERNEL: LazyLock<Choice<Option<PairInstructions>>> = LazyLock::new(|| {
        let kernels = kernels();
        let mut known: Vec<_> = kernels.iter().map(|kernel| (kernel.name(), Some(*kernel))).collect();
        let off = match kernels.first() {
            Some(PairInstructions::Avx512Bf16) if !avx512_pays() => 0,
            _ => known.len(),
        };
        known.insert(off, ("off", None));
        choose(VARIABLE, &known, None)
    });
    &KERNEL
}

/// The error in the variable's value, if there is one.
pub(crate) fn refused() -> Option<&'static String> {
    kernel().as_ref().err()
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn kernels() -> Vec<PairInstructions> {
    Vec::new()
}

#[cfg(not(target_arch = "x86_64"))]
fn avx512_pays() -> bool {
    false
}

#[cfg(target_arch = "x86_64")]
use x86::avx512_pays;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::kernels;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::PairInstructions;
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid, __cpuid_count};

    /// The instructions that this CPU multiplies with, the best first. The work between two products needs AVX-512 and
    /// AVX512-BF16 in either case; every CPU with AMX has both.
    pub(crate) fn kernels() -> Vec<PairInstructions> {
        let mut kernels = Vec::new();
        let between = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw");
        if between && is_x86_feature_detected!("avx512bf16") {
            if usable() {
                kernels.push(PairInstructions::Amx);
            }
            kernels.push(PairInstructions::Avx512Bf16);
        }
        kernels
    }

    /// Whether products by AVX512-BF16 are faster than f32's. Intel's CPUs multiply no more of them a cycle: a call in
    /// bf16 took 1.4 to 1.8 times as long (Xeon with AMX, which was switched off). By AMD's documents AMD's
    /// CPUs multiply twice as many.
    pub(super) fn avx512_pays() -> bool {
        let vendor = __cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
    }

    /// Whether the CPU has AMX with bf16, and the operating system lets this process use it.
    fn usable() -> bool {
        // CPUID 7.0: EDX bit 22 is AMX-BF16, 24 is AMX-TILE; CPUID 1: ECX bit 27 says that XCR0 can be read.
        if __cpuid(0).eax < 7 || __cpuid(1).ecx & (1 << 27) == 0 {
            return false;
        }
        let features = __cpuid_count(7, 0).edx;
        features & (1 << 22) != 0 && features & (1 << 24) != 0 && state_enabled() && permitted()
    }

    /// Whether the operating system saves the tiles' state (XCR0, bits 17 and 18).
    fn state_enabled() -> bool {
        let low: u32;
        // SAFETY: `usable` has seen OSXSAVE, without which this instruction would fault.
        unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack)) };
        low & (0b11 << 17) == 0b11 << 17
    }

    /// Linux gives the tiles to a process that asks, for all of its threads.
    #[cfg(target_os = "linux")]
    fn permitted() -> bool {
        const SYS_ARCH_PRCTL: i64 = 158;
        const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
        const XFEATURE_XTILEDATA: u64 = 18;
        let result: i64;
        // SAFETY: this call changes nothing but the process's permission; a kernel that does not know it returns an
        // error.
        unsafe {
            asm!("syscall", inlateout("rax") SYS_ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA, out("rcx") _, out("r11") _, options(nostack))
        };
        result == 0
    }

    #[cfg(not(target_os = "linux"))]
    fn permitted() -> bool {
        false
    }
}
