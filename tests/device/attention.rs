//! The CUDA path on a GPU, through candle's tensors: the table of settings times odd shapes against the f64 reference,
//! by the rules of `crate::common::judge`; golden cases; repeats; large sizes against the CPU path; refusals.
//!
//! Without a GPU each test prints that it is skipped, unless `SFA_REQUIRE_GPU` is set: then it fails.

use crate::common::budget::Side;
use crate::common::device::gpu;
use crate::common::golden::cases;
use crate::common::inputs::{values, Memory, Shape};
use crate::common::judge::{differentiate, largest, largest_error, Expected, Shares, F32_TIMES};
use crate::common::settings::{settings, Setting};
use anyhow::{ensure, Context, Result};
use candle_core::{DType, Device, DeviceLocation, Tensor};
use candle_sfattention::{
    attend, compressed_attention, AttentionOptions, CompressedKvCache, CompressionConfig, Criterion, Fold, GroupRule,
    HeadStrategies, MergePlan, MergeStrategy,
};

/// Odd sizes, with every padded head size, and more tokens than a block or a tile has.
const SHAPES: [Shape; 12] = [
    Shape(1, 1, 1, 1, 32),
    Shape(2, 3, 1, 2, 8),
    Shape(1, 2, 2, 59, 96),
    Shape(1, 4, 2, 97, 24),
    Shape(1, 2, 1, 97, 72),
    Shape(3, 1, 1, 130, 64),
    Shape(1, 2, 1, 70, 128),
    Shape(1, 6, 3, 140, 128),
    Shape(1, 1, 1, 67, 256),
    Shape(1, 2, 1, 257, 16),
    Shape(1, 2, 2, 300, 160),
    Shape(1, 1, 1, 513, 64),
];

/// Whether the shape has at most `SFA_TOKENS` tokens.
fn short_enough(shape: &Shape) -> bool {
    let tokens = std::env::var("SFA_TOKENS").ok().and_then(|most| most.parse().ok());
    tokens.is_none_or(|most: usize| shape.3 <= most)
}

/// Whether the setting's name contains `SFA_CASE`, and the shape is short enough.
fn wanted(setting: &Setting, shape: &Shape) -> bool {
    std::env::var("SFA_CASE").map_or(true, |part| setting.name.contains(&part)) && short_enough(shape)
}

/// The same values in another memory layout, as part of the graph.
fn laid_out(x: &Tensor, memory: Memory) -> Result<Tensor> {
    Ok(match memory {
        Memory::HeadMajor => x.clone(),
        Memory::TokenMajor => x.transpose(1, 2)?.contiguous()?.transpose(1, 2)?,
        // A part of a fused projection: its rows have more numbers than the heads'.
        Memory::Fused => {
            let by_token = x.transpose(1, 2)?.contiguous()?;
            let heads = x.dim(1)?;
            Tensor::cat(&[&by_token, &by_token], 2)?
                .narrow(2, heads, heads)?
                .transpose(1, 2)?
        }
    })
}

fn on(device: &Device, qkv: &[Tensor; 3]) -> Result<[Tensor; 3]> {
    let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(|x| x.to_device(device));
    Ok([q?, k?, v?])
}

fn random_like_output(shape: &Shape, seed: u64, dtype: DType) -> Result<Tensor> {
    let &Shape(batch, heads, _, tokens, dim) = shape;
    Ok(Shape(batch, heads, heads, tokens, dim).qkv(seed + 77, dtype)?[2].clone())
}

fn bits_of(x: &Tensor) -> Result<Vec<u64>> {
    Ok(values(x)?.into_iter().map(f64::to_bits).collect())
}

/// Decisions, outputs and gradients; every tenth case ten times, bit for bit.
fn check_table(dtype: DType, memory: Memory) -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let (mut shares, mut cases) = (Shares::default(), 0);
    for setting in &settings() {
        for (seed, shape) in SHAPES.iter().enumerate().filter(|(_, shape)| wanted(setting, shape)) {
            let what = format!("{} {shape:?} {dtype:?} {memory:?}", setting.name);
            let options = (setting.options)(shape);
            let qkv = shape.qkv(seed as u64, dtype)?;
            let grad_output = random_like_output(shape, seed as u64, dtype)?;
            let expected = Expected::new(Side::Cuda, &qkv, &grad_output, setting, &options)?;
            let (qkv, grad_output) = (on(&device, &qkv)?, grad_output.to_device(&device)?);
            let options = AttentionOptions {
                bias: options.bias.as_ref().map(|bias| bias.to_device(&device)).transpose()?,
                ..options
            };
            let strategies = setting.strategies(shape)?;
            let plan = || MergePlan::new(&qkv[0], &qkv[1], &qkv[2], &strategies, &setting.config, &options);
            let run = |deterministic| {
                let plan = plan()?;
                let options = AttentionOptions {
                    deterministic,
                    ..options.clone()
                };
                differentiate(&qkv, &grad_output, |q, k, v| {
                    let [q, k, v] = [q, k, v].map(|x| laid_out(x, memory));
                    Ok(attend(&q?, &k?, &v?, &plan, &options)?)
                })
            };
            let decided = plan().with_context(|| what.clone())?.indicators().to_vec3::<u8>()?;
            ensure!(decided == expected.bits.to_vec3::<u8>()?, "{what}: other decisions");
            for deterministic in [false, true] {
                let what = format!("{what} deterministic {deterministic}");
                let got = run(deterministic).with_context(|| what.clone())?;
                expected.check(&what, [&got[0], &got[1], &got[2], &got[3]], &mut shares)?;
                if deterministic && cases % 10 == 0 {
                    let first = got.iter().map(bits_of).collect::<Result<Vec<_>>>()?;
                    for _ in 1..10 {
                        let again = run(true)?.iter().map(bits_of).collect::<Result<Vec<_>>>()?;
                        ensure!(again == first, "{what}: another run gave other bits");
                    }
                }
            }
            cases += 1;
        }
    }
    println!("{dtype:?} {memory:?}: {cases} cases");
    // A part of the table need not come near the allowance.
    let part = ["SFA_CASE", "SFA_TOKENS"]
        .iter()
        .any(|name| std::env::var_os(name).is_some());
    match part {
        true => Ok(()),
        false => shares.report(),
    }
}

#[test]
fn table_f32() -> Result<()> {
    check_table(DType::F32, Memory::TokenMajor)
}

#[test]
fn table_f16() -> Result<()> {
    check_table(DType::F16, Memory::HeadMajor)
}

#[test]
fn table_bf16() -> Result<()> {
    check_table(DType::BF16, Memory::Fused)
}

#[test]
fn golden_cases() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let mut checked = 0;
    for case in cases("golden.safetensors")? {
        if case.tensor("q")?.dim(3)? % 8 != 0 {
            continue;
        }
        let one = |name: &str| -> Result<Tensor> { Ok(case.tensor(name)?.to_device(&device)?) };
        let (qkv, grad_output) = ([one("q")?, one("k")?, one("v")?], one("grad_output")?);
        let plan = MergePlan::new(&qkv[0], &qkv[1], &qkv[2], &case.strategies, &case.config, &case.options)?;
        if let Some(expected) = case.get("indicators") {
            let got = plan.indicators().to_vec3::<u8>()?;
            ensure!(got == expected.to_vec3::<u8>()?, "{}: other decisions", case.name);
        }
        let run = |qkv: &[Tensor; 3], grad_output: &Tensor, plan: &MergePlan| {
            differentiate(qkv, grad_output, |q, k, v| Ok(attend(q, k, v, plan, &case.options)?))
        };
        let got = run(&qkv, &grad_output, &plan)?;
        let cpu_qkv = on(&Device::Cpu, &qkv)?;
        let cpu_plan = MergePlan::from_indicators(&plan.indicators().to_device(&Device::Cpu)?, &case.config)?;
        let cpu = run(&cpu_qkv, case.tensor("grad_output")?, &cpu_plan)?;
        for (index, name) in ["output", "dq", "dk", "dv"].into_iter().enumerate() {
            let exact = case.tensor(name)?;
            let (error, cpu) = (largest_error(&got[index], exact)?, largest_error(&cpu[index], exact)?);
            let allowed = F32_TIMES * cpu + 4.0 * 2f64.powi(-24) * largest(exact)?.max(1.0);
            ensure!(
                error <= allowed,
                "{} {name}: {error:e}, the CPU's is {cpu:e}",
                case.name
            );
        }
        checked += 1;
    }
    println!("{checked} golden cases");
    ensure!(checked > 20, "{checked} golden cases");
    Ok(())
}

/// More than a wave of blocks, forward and backward, against the CPU path on the same values.
#[test]
fn large_sizes_agree_with_the_cpu() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    use MergeStrategy::{Off, Similarity};
    for (shape, dtype, strategy, window, fold) in [
        (Shape(2, 8, 2, 2048, 128), DType::BF16, Off, 0, Fold::Mean),
        (Shape(2, 8, 2, 2048, 128), DType::BF16, Similarity, 32, Fold::Mean),
        (Shape(2, 8, 2, 2048, 128), DType::BF16, Similarity, 32, Fold::Drop),
        (Shape(1, 4, 2, 2500, 64), DType::BF16, Off, 0, Fold::Mean),
        (Shape(1, 4, 4, 4096, 64), DType::F16, Similarity, 0, Fold::Mean),
        (Shape(1, 4, 4, 4096, 64), DType::F16, Similarity, 32, Fold::Drop),
        (Shape(1, 4, 2, 4500, 64), DType::BF16, Similarity, 32, Fold::Drop),
        (Shape(1, 4, 1, 2500, 64), DType::F32, Similarity, 16, Fold::Mean),
        (Shape(1, 2, 1, 1537, 256), DType::BF16, Similarity, 5, Fold::Mean),
    ] {
        if !short_enough(&shape) {
            println!("{shape:?} {dtype:?} skipped: SFA_TOKENS");
            continue;
        }
        let config = CompressionConfig {
            similarity_threshold: 0.35,
            window,
            fold,
            ..CompressionConfig::pretrained()
        };
        let (qkv, grad_output) = (shape.qkv(3, dtype)?, random_like_output(&shape, 3, dtype)?);
        let (strategies, options) = (HeadStrategies::uniform(strategy), AttentionOptions::default());
        let run = |qkv: &[Tensor; 3], grad_output: &Tensor| -> Result<(Tensor, [Tensor; 4])> {
            let plan = MergePlan::new(&qkv[0], &qkv[1], &qkv[2], &strategies, &config, &options)?;
            let found = differentiate(qkv, grad_output, |q, k, v| Ok(attend(q, k, v, &plan, &options)?))?;
            Ok((plan.indicators().clone(), found))
        };
        // The CPU computes in f32, which is exact enough to judge halves.
        let single = |x: &Tensor| x.to_dtype(DType::F32);
        let wide = [single(&qkv[0])?, single(&qkv[1])?, single(&qkv[2])?];
        let (bits, expected) = run(&wide, &single(&grad_output)?)?;
        let (got_bits, got) = run(&on(&device, &qkv)?, &grad_output.to_device(&device)?)?;
        ensure!(
            got_bits.to_vec3::<u8>()? == bits.to_vec3::<u8>()?,
            "{shape:?} {dtype:?}: other decisions"
        );
        // A few roundings of the largest number, the terms being about 1.
        let unit = match dtype {
            DType::F16 => 2f64.powi(-10),
            DType::BF16 => 2f64.powi(-7),
            _ => 2f64.powi(-17),
        };
        for (name, got, expected) in [
            ("output", &got[0], &expected[0]),
            ("dq", &got[1], &expected[1]),
            ("dk", &got[2], &expected[2]),
            ("dv", &got[3], &expected[3]),
        ] {
            let (error, most) = (largest_error(got, expected)?, largest(expected)?);
            println!("{shape:?} {dtype:?} {strategy:?} {fold:?} {name}: error {error:.2e} of {most:.2e}");
            ensure!(
                error <= 4.0 * unit * most.max(1.0),
                "{shape:?} {dtype:?} {name}: {error:e} of {most:e}"
            );
        }
    }
    Ok(())
}

/// Settings whose kernels depend on the length: nothing hidden, folded columns, lists.
const LONG: [&str; 3] = ["off", "mean", "drop"];

/// A NaN or infinite token makes the rows that see it NaN, and no other.
#[test]
fn bad_numbers_stay_where_they_are() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let settings = settings();
    let every = settings.iter().flat_map(|setting| {
        let dtypes = [DType::F32, DType::BF16];
        dtypes.map(|dtype| (setting, Shape(1, 2, 1, 300, 64), dtype))
    });
    // Long sequences have other kernels.
    let long = settings.iter().filter(|setting| LONG.contains(&setting.name));
    let long = long.flat_map(|setting| {
        let shapes = [
            Shape(1, 2, 1, 1100, 64),
            Shape(1, 2, 1, 1100, 128),
            Shape(1, 2, 1, 4200, 64),
        ];
        shapes.map(|shape| (setting, shape, DType::BF16))
    });
    let cases = every
        .chain(long)
        .filter(|(setting, shape, _)| (setting.options)(shape).causal);
    let (mut short, mut long) = (0, 0);
    for (setting, shape, dtype) in cases {
        *(if shape.3 > 1000 { &mut long } else { &mut short }) += 1;
        // In different parts of a tile.
        for (token, part, bad) in [
            (77, 0, f64::NAN),
            (77, 1, f64::INFINITY),
            (121, 1, f64::NEG_INFINITY),
            (121, 2, f64::NEG_INFINITY),
            (77, 1, f64::NAN),
        ] {
            let mut qkv = shape.qkv(3, dtype)?;
            let mut data = values(&qkv[part])?;
            data[token * shape.4 + 5] = bad;
            qkv[part] = Tensor::from_vec(data, qkv[part].dims(), &Device::Cpu)?.to_dtype(dtype)?;
            let options = (setting.options)(&shape);
            let strategies = setting.strategies(&shape)?;
            let run = |qkv: &[Tensor; 3], options: &AttentionOptions| -> Result<Vec<bool>> {
                let [q, k, v] = qkv;
                let got = compressed_attention(q, k, v, &strategies, &setting.config, options)?.output;
                Ok(values(&got)?.iter().map(|x| x.is_nan()).collect())
            };
            let expected = run(&qkv, &options)?;
            let options = AttentionOptions {
                bias: options.bias.as_ref().map(|bias| bias.to_device(&device)).transpose()?,
                ..options
            };
            let got = run(&on(&device, &qkv)?, &options)?;
            ensure!(
                got == expected,
                "{} {shape:?} {dtype:?} token {token} part {part} {bad}",
                setting.name
            );
        }
    }
    println!("bad numbers: {short} cases, and {long} long ones");
    ensure!(short > long && long == 3 * LONG.len(), "{short} and {long} cases");
    Ok(())
}

/// Two handles of one GPU count as one GPU, as for candle: in attention, its gradients, and a cache.
#[test]
fn two_handles_of_one_gpu_go_together() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let DeviceLocation::Cuda { gpu_id } = device.location() else {
        panic!("a GPU is asked for")
    };
    let (shape, config) = (Shape(1, 4, 2, 150, 64), CompressionConfig::pretrained());
    let (qkv, grad_output) = (shape.qkv(3, DType::F32)?, random_like_output(&shape, 3, DType::F32)?);
    let (strategies, options) = (
        HeadStrategies::uniform(MergeStrategy::Similarity),
        AttentionOptions::default(),
    );
    let run = |devices: [&Device; 4]| -> Result<Vec<Vec<u64>>> {
        let place = |index: usize| qkv[index].to_device(devices[index]);
        let (qkv, grad_output) = ([place(0)?, place(1)?, place(2)?], grad_output.to_device(devices[3])?);
        let found = differentiate(&qkv, &grad_output, |q, k, v| {
            Ok(compressed_attention(q, k, v, &strategies, &config, &options)?.output)
        })?;
        let mut cache = CompressedKvCache::new(strategies.clone(), config.clone(), Default::default())?;
        let [q, k, v] = &qkv;
        let first = cache.append_and_attend(q, k, v, &options)?;
        // The next tokens come through the other handle.
        let [q, k, v] = [&qkv[0], &qkv[1], &qkv[2]].map(|x| x.to_device(&Device::Cpu)?.to_device(devices[3]));
        let second = cache.append_and_attend(&q?, &k?, &v?, &options)?;
        let back = cache.to_device(devices[3])?;
        assert_eq!(back.lens(), cache.lens());
        found.iter().chain([&first, &second]).map(bits_of).collect()
    };
    for other in [Device::new_cuda(gpu_id)?, Device::new_cuda_with_stream(gpu_id)?] {
        assert!(!other.same_device(&device));
        let expected = run([&device; 4])?;
        let mixed = run([&device, &other, &device, &other])?;
        ensure!(mixed == expected, "a second handle gave other numbers");
        ensure!(
            run([&other, &device, &other, &device])? == expected,
            "a second handle gave other numbers"
        );
    }
    Ok(())
}

/// The kernels refuse inputs that they do not take, with a remedy.
#[test]
fn refusals_say_what_to_do() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    let (strategies, options) = (
        HeadStrategies::uniform(MergeStrategy::Similarity),
        AttentionOptions::default(),
    );
    let run = |qkv: &[Tensor; 3]| {
        let [q, k, v] = qkv;
        compressed_attention(q, k, v, &strategies, &CompressionConfig::default(), &options)
    };
    let refused = |qkv: &[Tensor; 3], part: &str| match run(qkv) {
        Ok(_) => panic!("expected an error with {part:?}"),
        Err(error) => assert!(error.to_string().contains(part), "expected {part:?} in {error}"),
    };
    refused(
        &on(&device, &Shape(1, 1, 1, 9, 16).qkv(0, DType::F64)?)?,
        "expected dtype f32, f16 or bf16 on CUDA",
    );
    refused(
        &on(&device, &Shape(1, 1, 1, 9, 20).qkv(0, DType::F32)?)?,
        "a multiple of 8 and at most 256 on CUDA",
    );
    refused(
        &on(&device, &Shape(1, 1, 1, 9, 264).qkv(0, DType::F32)?)?,
        "a multiple of 8 and at most 256 on CUDA",
    );
    let mut mixed = on(&device, &Shape(1, 1, 1, 9, 16).qkv(0, DType::F32)?)?;
    mixed[1] = mixed[1].to_device(&Device::Cpu)?;
    refused(&mixed, "expected the query's device");
    let odd = Tensor::zeros((1, 1, 9, 17), DType::F32, &device)?.narrow(3, 0, 16)?;
    refused(&[odd.clone(), odd.clone(), odd], "start at multiples of 8 elements");
    Ok(())
}

/// Decisions per query head and per group, for every criterion, on views, in all dtypes: as on the CPU.
#[test]
fn decisions_agree_with_the_cpu() -> Result<()> {
    let Some(device) = gpu()? else { return Ok(()) };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (criterion, group_rule) in [
            (Criterion::QueryKey, GroupRule::PerQueryHead),
            (Criterion::QueryKey, GroupRule::Unanimous),
            (Criterion::KeyKey, GroupRule::Unanimous),
        ] {
            for (seed, shape) in [Shape(2, 6, 2, 1025, 64), Shape(1, 4, 1, 777, 128)].iter().enumerate() {
                let config = CompressionConfig {
                    criterion,
                    group_rule,
                    fold: Fold::Mean,
                    similarity_threshold: 0.3,
                    sinks: 3,
                    ..Default::default()
                };
                let qkv = shape.qkv(seed as u64, dtype)?;
                let strategies = HeadStrategies::uniform(MergeStrategy::Similarity);
                let decide = |[q, k, v]: &[Tensor; 3]| {
                    MergePlan::new(q, k, v, &strategies, &config, &AttentionOptions::default())
                };
                let (expected, got) = (decide(&qkv)?, decide(&on(&device, &qkv)?)?);
                assert!(expected.stats()?.hidden > 0);
                assert_eq!(got.stats()?, expected.stats()?, "{config:?} {shape:?} {dtype:?}");
                assert_eq!(
                    got.indicators().to_vec3::<u8>()?,
                    expected.indicators().to_vec3::<u8>()?
                );
            }
        }
    }
    Ok(())
}
