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

    /// The files of a folder with this extension, in the order of their names.
    pub fn files(folder: &str, extension: &str) -> Result<Vec<PathBuf>> {
        println!("cargo:rerun-if-changed={folder}");
        let mut found = Vec::new();
        for entry in Path::new(folder).read_dir().with_context(|| folder.to_string())? {
            let path = entry?.path();
            if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
        found.sort();
        Ok(found)
    }

    pub fn stem(path: &Path) -> Result<String> {
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        Ok(stem.with_context(|| path.display().to_string())?.to_string())
    }
}

#[cfg(feature = "cuda-emu")]
mod emulation {
    use super::sources::{files, stem};
    use anyhow::Result;

    pub fn build() -> Result<()> {
        let mut kernels = files("cuda", "cu")?;
        kernels.extend(files("cuda/emu", "cu")?);
        let modules = kernels.iter().map(|path| Ok(format!("M({})", stem(path)?)));
        let modules = modules.collect::<Result<Vec<_>>>()?.join(" ");
        cc::Build::new()
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
            .define("EMU_MODULES(M)", modules.as_str())
            .files(kernels)
            .file("cuda/emu/emu.cpp")
            .try_compile("sfattention_emulation")?;
        Ok(())
    }
}

#[cfg(feature = "cuda")]
mod ptx {
    use super::sources::{files, stem};
    use anyhow::{ensure, Result};
    use std::fmt::Write;
    use std::path::PathBuf;
    use std::time::SystemTime;

    /// Leaves `OUT_DIR/kernels.rs`: a function from a file's stem to its PTX.
    pub fn build() -> Result<()> {
        println!("cargo:rerun-if-env-changed=CUDA_COMPUTE_CAP");
        println!("cargo:rerun-if-env-changed=CUDA_HOME");
        let (kernels, headers) = (files("cuda", "cu")?, files("cuda", "cuh")?);
        remove_stale(&kernels, &headers)?;
        let builder = bindgen_cuda::Builder::default()
            .kernel_paths(kernels.clone())
            .include_paths(headers)
            .arg("-std=c++17")
            .arg("-O3")
            .arg("-lineinfo");
        ensure!(
            builder.build_ptx().is_ok(),
            "nvcc: expected PTX of every file in cuda/, got an error; see its messages above"
        );
        let out_dir = PathBuf::from(std::env::var("OUT_DIR")?);
        let mut table = String::from("/// The PTX of the kernels in `cuda/<stem>.cu`.\n");
        writeln!(
            table,
            "pub(crate) fn ptx(stem: &str) -> Option<&'static str> {{\n    match stem {{"
        )?;
        for kernel in &kernels {
            let stem = stem(kernel)?;
            writeln!(
                table,
                "        {stem:?} => Some(include_str!(concat!(env!(\"OUT_DIR\"), \"/{stem}.ptx\"))),"
            )?;
        }
        table.push_str("        _ => None,\n    }\n}\n");
        std::fs::write(out_dir.join("kernels.rs"), table)?;
        Ok(())
    }

    /// bindgen_cuda keeps PTX that is newer than its .cu file, whatever headers, architecture or arguments it had.
    fn remove_stale(kernels: &[PathBuf], headers: &[PathBuf]) -> Result<()> {
        let out_dir = PathBuf::from(std::env::var("OUT_DIR")?);
        let made_for = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_default();
        let stamp = out_dir.join("compute_cap");
        let same = std::fs::read_to_string(&stamp).is_ok_and(|text| text == made_for);
        std::fs::write(&stamp, made_for)?;
        let mut newest = SystemTime::UNIX_EPOCH;
        for header in headers
            .iter()
            .map(PathBuf::as_path)
            .chain([std::path::Path::new("build.rs")])
        {
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
