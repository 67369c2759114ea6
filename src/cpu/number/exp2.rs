//! Minimax polynomials for 2^x on [-1/2, 1/2] (Remez, relative error), highest power first.

/// For f32, good to 1.9e-9.
pub(crate) const EXP2_F32: [f32; 7] = [
    1.534_581_2e-4,
    1.339_993_1e-3,
    9.618_489e-3,
    5.550_328_8e-2,
    2.402_264_7e-1,
    6.931_472e-1,
    1.0,
];

/// For f64, good to 3.1e-18.
pub(crate) const EXP2_F64: [f64; 12] = [
    4.435_282_706_957_277e-10,
    7.074_105_613_508_143e-9,
    1.017_819_802_167_193e-7,
    1.321_543_308_967_64e-6,
    1.525_273_348_998_852_6e-5,
    1.540_353_046_251_443_2e-4,
    1.333_355_814_678_992_2e-3,
    9.618_129_107_588_335e-3,
    5.550_410_866_481_992e-2,
    2.402_265_069_591_015_6e-1,
    std::f64::consts::LN_2,
    1.0,
];

/// For a weight that is rounded to bf16, good to 3e-6.
#[cfg(target_arch = "x86_64")]
pub(crate) const EXP2_SHORT: [f32; 5] = [9.570_102e-3, 5.591_786e-2, 2.402_474_4e-1, 6.931_218e-1, 9.999_993e-1];

#[cfg(test)]
mod tests {
    use crate::cpu::number::element::Accumulator;

    #[test]
    fn exp2_is_exact_enough_over_its_whole_range() {
        for step in 0..=4_000_000u32 {
            let x = -126.0 * f64::from(step) / 4_000_000.0;
            let (single, exact) = (x as f32, (f64::from(x as f32)).exp2());
            let error = (f64::from(single.exp2_nonpositive()) - exact).abs() / exact;
            assert!(error <= 3e-7, "f32 x={single} error={error}");
            let error = (x.exp2_nonpositive() - x.exp2()).abs() / x.exp2();
            assert!(error <= 1e-15, "f64 x={x} error={error}");
        }
    }

    #[test]
    fn exp2_at_its_edges() {
        assert_eq!(0f32.exp2_nonpositive(), 1.0);
        assert_eq!(0f64.exp2_nonpositive(), 1.0);
        assert_eq!(f32::NEG_INFINITY.exp2_nonpositive(), 0.0);
        assert_eq!(f64::NEG_INFINITY.exp2_nonpositive(), 0.0);
        assert_eq!((-1e30f32).exp2_nonpositive(), 0.0);
        assert!(f32::NAN.exp2_nonpositive().is_nan());
        assert!(f32::from_bits(0x7fc0_01ff).exp2_nonpositive().is_nan());
        assert!(f64::NAN.exp2_nonpositive().is_nan());
    }
}
