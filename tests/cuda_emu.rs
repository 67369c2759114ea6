//! The CUDA kernels, run on the CPU by the emulator of `cuda/emu`, and what that emulator detects.
#![cfg(feature = "cuda-emu")]

use anyhow::Result;
use candle_sfattention::emulation;

#[test]
fn a_correct_kernel_runs() -> Result<()> {
    let input: Vec<f32> = (0..128).map(|i| i as f32).collect();
    let output = emulation::run_broken("broken_not", &input, 2)?;
    for (i, x) in output.iter().enumerate() {
        let (block, warp) = (i / 64 * 64, i / 32 * 32);
        let expected = input[block + 63 - i % 64] + input[warp..warp + 32].iter().sum::<f32>();
        assert_eq!(*x, expected, "element {i}");
    }
    Ok(())
}

#[test]
fn every_detector_detects() {
    for (kernel, expected) in [
        ("broken_global_read", "global buffer of 200 bytes: read outside of it"),
        ("broken_global_write", "global buffer of 200 bytes: write outside of it"),
        (
            "broken_before_buffer",
            "global buffer of 200 bytes: read outside of it, at byte -4",
        ),
        (
            "broken_shared_bounds",
            "shared memory of 256 bytes: write outside of it",
        ),
        ("broken_shared_size", "shared memory of 256 bytes: view larger"),
        (
            "broken_shared_unwritten",
            "shared memory of 256 bytes: read of bytes that nothing has written",
        ),
        (
            "broken_global_unwritten",
            "global buffer of 200 bytes: read of bytes that nothing has written",
        ),
        ("broken_misaligned", "misaligned"),
        ("broken_early_return", "divergent barrier"),
        ("broken_two_barriers", "divergent barrier"),
        ("broken_half_warp", "divergent barrier"),
        ("broken_missing_barrier", "read of bytes that nothing has written"),
        (
            "broken_unwritten_output",
            "expected every element to be written, got 49 of 50",
        ),
        ("broken_read_only", "argument 0: expected a buffer to write"),
        ("broken_no_such_kernel", "no kernel of this name"),
    ] {
        match emulation::run_broken(kernel, &[1.0; 50], 1) {
            Ok(_) => panic!("{kernel}: nothing detected"),
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains(expected), "{kernel}: expected {expected:?} in {text:?}");
            }
        }
    }
}
