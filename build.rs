//! Compiles the kernels of `cuda/`: to PTX with nvcc under the feature `cuda`, to a host library with g++ under
//! `cuda-emu`. Without them it does nothing.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda-emu")]
    emulation::build().unwrap_or_else(|error| panic!("emulated kernels: {error:#}"));
    #[cfg(feature = "cuda")]
    ptx::build().unwrap_or_else(|error| panic!("CUDA kernels: {error:#}"));
}

#[cfg(any(feature = "cuda", feature = "cuda-emu"))]
mod sources {
    use anyhow::{Context, Result};
    use std::path::{Path, PathBuf};

    /// The folders of `cuda/` whose files are compiled. Files include one another by paths from `cuda/`.
    pub const ROOMS: [&str; 5] = ["cuda/lib", "cuda/forward", "cuda/backward", "cuda/decide", "cuda/cache"];

    /// The files of these folders with this extension, folder by folder, in the order of their names.
    pub fn files(folders: &[&str], extension: &str) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for folder in folders {
            println!("cargo:rerun-if-changed={folder}");
            let mut here = Vec::new();
            for entry in Path::new(folder).read_dir().with_context(|| folder.to_string())? {
                let path = entry?.path();
                if path.extension().is_some_and(|e| e == extension) {
                    here.push(path);
                }
            }
            here.sort();
            found.extend(here);
        }
        Ok(found)
    }

    pub fn stem(path: &Path) -> Result<String> {
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        Ok(stem.with_context(|| path.display().to_string())?.to_string())
    }
}

#[cfg(feature = "cuda-emu")]
mod emulation {
    use super::sources::{files, stem, ROOMS};
    use anyhow::Result;
    use std::path::PathBuf;

    pub fn build() -> Result<()> {
        let mut kernels = files(&ROOMS, "cu")?;
        kernels.extend(files(&["cuda/emu"], "cu")?);
        let modules = kernels.iter().map(|path| Ok(format!("M({})", stem(path)?)));
        let modules = modules.collect::<Result<Vec<_>>>()?.join(" ");
        kernels.push(PathBuf::from("cuda/emu/emu.cpp"));
        let objects = objects(&kernels, &modules)?;
        cc::Build::new()
            .cpp(true)
            .objects(objects)
            .try_compile("sfattention_emulation")?;
        Ok(())
    }

    /// Compiles files side by side. The feature of cc that does so would change cc for every other crate that is built
    /// with it, and these would be built anew.
    fn objects(kernels: &[PathBuf], modules: &str) -> Result<Vec<PathBuf>> {
        let jobs = std::env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok());
        let jobs = jobs.unwrap_or(1).clamp(1, kernels.len());
        std::thread::scope(|scope| {
            let parts = (0..jobs).map(|job| {
                let part: Vec<&PathBuf> = kernels.iter().skip(job).step_by(jobs).collect();
                scope.spawn(move || compiler(modules).files(part).try_compile_intermediates())
            });
            let parts: Vec<_> = parts.collect();
            let mut objects = Vec::new();
            for part in parts {
                let part = part
                    .join()
                    .map_err(|_| anyhow::anyhow!("expected objects of each thread, got a panic"))?;
                objects.extend(part?);
            }
            Ok(objects)
        })
    }

    fn compiler(modules: &str) -> cc::Build {
        let mut build = cc::Build::new();
        build
            .cpp(true)
            .std("c++17")
            .opt_level(2)
            .debug(false)
            // A GPU does not fuse or reorder what a kernel did not ask for more than this does.
            .flags([
                "-ffp-contract=off",
                "-fno-exceptions",
                "-fno-rtti",
                "-Wall",
                "-Wno-unused-parameter",
                "-Wno-unknown-pragmas",
            ])
            .flags(["-x", "c++"])
            .include("cuda")
            .define("SFA_EMULATION", None)
            .define("EMU_MODULES(M)", modules);
        build
    }
}

#[cfg(feature = "cuda")]
mod ptx {
    use super::sources::{files, stem, ROOMS};
    use anyhow::{bail, ensure, Context, Result};
    use std::collections::BTreeMap;
    use std::fmt::Write;
    use std::path::{Path, PathBuf};
    use std::time::SystemTime;

    /// As src/cuda/ptx.rs has them: the compressed PTX of a kernel and its dynamic shared memory.
    struct Packed {
        text_bytes: usize,
        shared_bytes: usize,
        compressed: Vec<u8>,
    }

    /// Higher levels than 9 take several times as long for little: of 50 MB of PTX, level 9 leaves 6.3 MB, level 15
    /// 6.1 MB, level 19 5.5 MB.
    const LEVEL: i32 = 9;

    /// Leaves `OUT_DIR/kernels.rs`: the compressed PTX of every kernel, by its name.
    pub fn build() -> Result<()> {
        println!("cargo:rerun-if-env-changed=CUDA_COMPUTE_CAP");
        println!("cargo:rerun-if-env-changed=CUDA_HOME");
        println!("cargo:rerun-if-env-changed=SFA_LINE_INFO");
        let (kernels, headers) = (files(&ROOMS, "cu")?, files(&ROOMS, "cuh")?);
        let out_dir = PathBuf::from(std::env::var("OUT_DIR")?);
        let lines = lines_wanted()?;
        remove_stale(&out_dir, &kernels, &headers, lines)?;
        let (hopper, common): (Vec<_>, Vec<_>) = kernels.iter().cloned().partition(|path| is_hopper(path));
        for (sources, architecture) in [(common, None), (hopper, Some("--gpu-architecture=sm_90a"))] {
            let mut builder = bindgen_cuda::Builder::default()
                .kernel_paths(sources)
                .arg("-Icuda")
                .arg("-std=c++17")
                .arg("-O3");
            // The last one counts.
            if let Some(architecture) = architecture {
                builder = builder.arg(architecture);
            }
            if lines {
                builder = builder.arg("-lineinfo");
            }
            ensure!(
                builder.build_ptx().is_ok(),
                "nvcc: expected PTX of every file in cuda/, got an error; see its messages above"
            );
        }
        let mut all = BTreeMap::new();
        for kernel in &kernels {
            let path = out_dir.join(stem(kernel)?).with_extension("ptx");
            let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            for (name, packed) in pack(&text).with_context(|| path.display().to_string())? {
                let twin = all.insert(name.clone(), packed);
                ensure!(
                    twin.is_none(),
                    "{name}: expected kernels of unlike names, got two of this one"
                );
            }
        }
        write_table(&out_dir, &all)
    }

    /// Files whose names end in `_sm90a` use instructions that only devices of capability 9.0 have. Their kernels are
    /// built for this capability alone, for any target of the other kernels, and chosen where the device has it.
    fn is_hopper(path: &Path) -> bool {
        stem(path).is_ok_and(|stem| stem.ends_with("_sm90a"))
    }

    /// Lines for profilers and sanitizers are half of the text, and change no instruction.
    fn lines_wanted() -> Result<bool> {
        match std::env::var("SFA_LINE_INFO").as_deref() {
            Ok("1") => Ok(true),
            Ok("0" | "") | Err(_) => Ok(false),
            Ok(other) => bail!("SFA_LINE_INFO: expected 1 or 0, got {other:?}"),
        }
    }

    /// The kernels of a file, each compressed by itself.
    fn pack(ptx: &str) -> Result<Vec<(String, Packed)>> {
        let (ptx, mut shared_bytes) = take_shared_bytes(ptx)?;
        let mut packed = Vec::new();
        for (name, module) in split(&ptx)? {
            let compressed = zstd::bulk::compress(module.as_bytes(), LEVEL)?;
            let opened = zstd::bulk::decompress(&compressed, module.len())?;
            ensure!(
                opened == module.as_bytes() && module.matches(".entry ").count() == 1,
                "{name}: expected a module of one kernel that opens to the same text"
            );
            let kernel = Packed {
                text_bytes: module.len(),
                shared_bytes: shared_bytes.remove(name).unwrap_or(0),
                compressed,
            };
            packed.push((name.to_string(), kernel));
        }
        ensure!(
            shared_bytes.is_empty(),
            "SHARED_BYTES: expected kernels of the same file, got {:?}",
            shared_bytes.keys()
        );
        Ok(packed)
    }

    /// The text without the variables that SHARED_BYTES of cuda/lib/kernel.cuh makes, and their values by the kernels'
    /// names.
    fn take_shared_bytes(ptx: &str) -> Result<(String, BTreeMap<String, usize>)> {
        const MARK: &str = " shared_bytes_of_";
        let (mut text, mut found) = (String::with_capacity(ptx.len()), BTreeMap::new());
        for line in ptx.split_inclusive('\n') {
            let variable = line.contains(".global ").then(|| line.split_once(MARK)).flatten();
            let Some((_, variable)) = variable else {
                text.push_str(line);
                continue;
            };
            let parts = variable.trim_end().trim_end_matches(';').split_once(" = ");
            let (name, value) = parts.with_context(|| line.to_string())?;
            found.insert(name.to_string(), value.parse().with_context(|| line.to_string())?);
        }
        ensure!(
            !text.contains(MARK),
            "SHARED_BYTES: expected no kernel to read its variable"
        );
        Ok((text, found))
    }

    /// A module for each kernel of a file: the file's PTX without the other kernels. The driver compiles a module as a
    /// whole when a device first meets it, so that a call waits for the kernels it runs and for no others.
    fn split(ptx: &str) -> Result<Vec<(&str, String)>> {
        const ENTRY: &str = ".visible .entry ";
        let mut kernels: Vec<(&str, std::ops::Range<usize>)> = Vec::new();
        let (mut start, mut open, mut depth) = (0, false, 0);
        for line in ptx.split_inclusive('\n') {
            let end = start + line.len();
            if let Some(rest) = line.strip_prefix(ENTRY) {
                ensure!(!open, "expected the end of a kernel, got {line}");
                let name = rest.split('(').next().unwrap_or_default();
                kernels.push((name.trim(), start..end));
                open = true;
            }
            if let Some((_, range)) = kernels.last_mut().filter(|_| open) {
                // Braces are blocks of inline assembly and lists of registers, too.
                let code = line.split("//").next().unwrap_or_default();
                depth += code.matches('{').count();
                let closed = code.matches('}').count();
                ensure!(
                    closed <= depth,
                    "expected no more braces to close than to open, got {line}"
                );
                depth -= closed;
                range.end = end;
                open = depth > 0 || closed == 0;
            }
            start = end;
        }
        ensure!(
            !kernels.is_empty() && !open,
            "expected kernels from {ENTRY:?} to the brace that closes each, got {} (the last one open: {open})",
            kernels.len()
        );
        let without_others = |own: &std::ops::Range<usize>| {
            let (mut module, mut start) = (String::new(), 0);
            for (_, range) in kernels.iter().filter(|(_, range)| range != own) {
                module += &ptx[start..range.start];
                start = range.end;
            }
            module + &ptx[start..]
        };
        Ok(kernels.iter().map(|(name, own)| (*name, without_others(own))).collect())
    }

    /// Every kernel in a file of its own, and the table that includes them, in the order of names.
    fn write_table(out_dir: &Path, kernels: &BTreeMap<String, Packed>) -> Result<()> {
        let folder = out_dir.join("kernels");
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir(&folder)?;
        let mut table = String::from("/// Every kernel of `cuda/`, in the order of names.\n");
        writeln!(table, "static KERNELS: [PackedKernel; {}] = [", kernels.len())?;
        for (name, kernel) in kernels {
            std::fs::write(folder.join(name).with_extension("ptx.zst"), &kernel.compressed)?;
            let file = format!("concat!(env!(\"OUT_DIR\"), \"/kernels/{name}.ptx.zst\")");
            let sizes = format!("{}, {}", kernel.shared_bytes, kernel.text_bytes);
            writeln!(
                table,
                "    PackedKernel::new({name:?}, {sizes}, include_bytes!({file})),"
            )?;
        }
        table.push_str("];\n");
        std::fs::write(out_dir.join("kernels.rs"), table)?;
        Ok(())
    }

    /// bindgen_cuda keeps PTX that is newer than its .cu file, whatever headers, architecture or arguments it had.
    fn remove_stale(out_dir: &Path, kernels: &[PathBuf], headers: &[PathBuf], lines: bool) -> Result<()> {
        let capability = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_default();
        let made_for = format!("{capability}, lines {lines}");
        let stamp = out_dir.join("made_for");
        let same = std::fs::read_to_string(&stamp).is_ok_and(|text| text == made_for);
        std::fs::write(&stamp, made_for)?;
        let mut newest = SystemTime::UNIX_EPOCH;
        for header in headers.iter().map(PathBuf::as_path).chain([Path::new("build.rs")]) {
            newest = newest.max(header.metadata()?.modified()?);
        }
        for kernel in kernels {
            let ptx = out_dir.join(stem(kernel)?).with_extension("ptx");
            if let Ok(made) = ptx.metadata() {
                if !same || made.modified()? <= newest {
                    std::fs::remove_file(ptx)?;
                }
            }
        }
        Ok(())
    }
}
