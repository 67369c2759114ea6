//! A saved cache replaces the old file, or leaves it unchanged.

use crate::common::inputs::Shape;
use anyhow::{Context, Result};
use candle_core::{DType, Device};
use candle_sfattention::{CompressedKvCache, HeadStrategies, MergeStrategy};
use std::fs;
use std::path::{Path, PathBuf};

/// A folder of its own for each test, removed with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Self> {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("files").join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        Ok(Self(folder))
    }

    fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            names.push(entry?.file_name().into_string().ok().context("a name")?);
        }
        names.sort();
        Ok(names)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn cache(tokens: usize) -> Result<CompressedKvCache> {
    let off = HeadStrategies::uniform(MergeStrategy::Off);
    let mut cache = CompressedKvCache::new(off, Default::default(), Default::default())?;
    let [q, k, v] = Shape(1, 1, 1, tokens, 8).qkv(0, DType::F32)?;
    cache.append_and_attend(&q, &k, &v, &Default::default())?;
    Ok(cache)
}

fn tokens_in(file: &Path) -> Result<usize> {
    Ok(CompressedKvCache::load(file, &Device::Cpu)?.seq_len())
}

#[test]
fn a_folder_in_the_place_of_the_file_is_kept() -> Result<()> {
    let folder = Folder::new("a_folder")?;
    let path = folder.0.join("cache");
    fs::create_dir(&path)?;
    let error = cache(3)?.save(&path).unwrap_err().to_string();
    assert!(error.contains("a folder in the place of a file"), "{error}");
    assert_eq!(folder.names()?, ["cache"]);
    Ok(())
}

#[cfg(unix)]
mod unix {
    use super::*;
    use candle_core::Tensor;
    use std::os::unix::fs::{symlink, MetadataExt, PermissionsExt};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    fn mode(path: &Path) -> Result<u32> {
        Ok(fs::metadata(path)?.permissions().mode() & 0o777)
    }

    #[test]
    fn a_link_stays_a_link() -> Result<()> {
        let folder = Folder::new("a_link")?;
        fs::create_dir(folder.0.join("far"))?;
        let (file, link, again) = (folder.0.join("far/file"), folder.0.join("link"), folder.0.join("again"));
        symlink("far/file", &link)?;
        symlink("link", &again)?;
        // First a link to a file that does not exist yet.
        for tokens in [3, 5] {
            cache(tokens)?.save(&again)?;
            assert_eq!(tokens_in(&file)?, tokens);
        }
        assert!(link.is_symlink() && again.is_symlink());
        assert_eq!(folder.names()?, ["again", "far", "link"]);
        let circle = folder.0.join("circle");
        symlink("circle", &circle)?;
        let error = cache(3)?.save(&circle).unwrap_err().to_string();
        assert!(error.contains("links"), "{error}");
        Ok(())
    }

    #[test]
    fn permissions_stay() -> Result<()> {
        let folder = Folder::new("permissions")?;
        let file = folder.0.join("cache");
        cache(3)?.save(&file)?;
        assert_eq!(mode(&file)?, 0o600);
        fs::set_permissions(&file, PermissionsExt::from_mode(0o640))?;
        cache(4)?.save(&file)?;
        assert_eq!((mode(&file)?, tokens_in(&file)?), (0o640, 4));
        fs::set_permissions(&file, PermissionsExt::from_mode(0o400))?;
        let error = cache(5)?.save(&file).unwrap_err().to_string();
        assert!(error.contains("a file that may only be read"), "{error}");
        assert_eq!((tokens_in(&file)?, folder.names()?), (4, vec!["cache".to_string()]));
        Ok(())
    }

    /// A device cannot be replaced by a file.
    #[test]
    #[cfg(target_os = "linux")]
    fn devices_are_written_to() -> Result<()> {
        use std::os::unix::fs::FileTypeExt;
        let error = cache(3)?.save("/dev/full").unwrap_err().to_string();
        assert!(error.contains("No space left"), "{error}");
        cache(3)?.save("/dev/null")?;
        for device in ["/dev/full", "/dev/null"] {
            assert!(fs::metadata(device)?.file_type().is_char_device(), "{device}");
        }
        Ok(())
    }

    /// The process that the test below starts; its files may hold nothing.
    #[test]
    #[ignore]
    fn saves_where_it_is_told() {
        let path = std::env::var("SFATTENTION_TEST_SAVE_TO").expect("a path");
        let error = cache(5).unwrap().save(path).unwrap_err().to_string();
        assert!(error.contains("too large") && error.contains("has room"), "{error}");
    }

    #[test]
    fn a_full_disk_leaves_the_old_file() -> Result<()> {
        let folder = Folder::new("a_full_disk")?;
        let file = folder.0.join("cache");
        cache(3)?.save(&file)?;
        let old = fs::read(&file)?;
        let output = Command::new("sh")
            .args(["-c", r#"ulimit -f 0; trap "" XFSZ; exec "$0" "$@""#])
            .arg(std::env::current_exe()?)
            .args(["--ignored", "--exact", "files::unix::saves_where_it_is_told"])
            .env("SFATTENTION_TEST_SAVE_TO", &file)
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        assert_eq!(fs::read(&file)?, old);
        assert_eq!(folder.names()?, ["cache"], "no temporary file");
        Ok(())
    }

    /// The process that the test below starts, and kills: 64 MiB are long enough to be met while they are written.
    #[test]
    #[ignore]
    fn saves_much_where_it_is_told() {
        let path = std::env::var("SFATTENTION_TEST_SAVE_TO").expect("a path");
        much().unwrap().save(path).unwrap();
    }

    const MANY: usize = 16384;

    fn much() -> Result<CompressedKvCache> {
        let off = HeadStrategies::uniform(MergeStrategy::Off);
        let mut cache = CompressedKvCache::new(off, Default::default(), Default::default())?;
        let zeros = Tensor::zeros((1, 8, MANY, 64), DType::F32, &Device::Cpu)?;
        cache.append_without_queries(&zeros, &zeros, 8)?;
        Ok(cache)
    }

    /// A process that is killed while it writes leaves the old file, and what it had written under hidden names. A
    /// process may be faster than the signal: it has saved the whole new file then, and another one is started.
    #[test]
    fn a_process_that_is_killed_while_it_saves_leaves_the_old_file() -> Result<()> {
        for _ in 0..20 {
            let folder = Folder::new("killed")?;
            let file = folder.0.join("cache");
            cache(3)?.save(&file)?;
            let old = fs::read(&file)?;
            let mut child = Command::new(std::env::current_exe()?)
                .args(["--ignored", "--exact", "files::unix::saves_much_where_it_is_told"])
                .env("SFATTENTION_TEST_SAVE_TO", &file)
                .stdout(Stdio::null())
                .spawn()?;
            while child.try_wait()?.is_none() && written(&folder)? == 0 {
                std::thread::yield_now();
            }
            child.kill()?;
            let status = child.wait()?;
            let now = fs::read(&file)?;
            if now != old {
                assert_eq!(tokens_in(&file)?, MANY, "{status:?}");
                continue;
            }
            assert_eq!(status.signal(), Some(9), "{status:?}");
            assert!(written(&folder)? > 0, "{:?}", folder.names()?);
            // The names are no hindrance.
            cache(4)?.save(&file)?;
            assert_eq!(tokens_in(&file)?, 4);
            return Ok(());
        }
        anyhow::bail!("no process was killed while it wrote")
    }

    /// Bytes on the disk of the files with hidden names; they may come and go meanwhile.
    fn written(folder: &Folder) -> Result<u64> {
        let names = folder.names()?.into_iter().filter(|name| name.starts_with('.'));
        let sizes = names.map(|name| fs::metadata(folder.0.join(name)).map_or(0, |file| 512 * file.blocks()));
        Ok(sizes.sum())
    }
}
