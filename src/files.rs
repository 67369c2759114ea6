//! Files that appear whole or not at all: saved caches, and all files of the examples, which include this module.

use std::fs;
use std::io::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};

/// The most links that are followed, one to the next; as many as Linux follows.
const MOST_LINKS: usize = 40;

/// The target of a file's content.
enum Place {
    /// A file, or a name that is still free: a new file takes it.
    Name(PathBuf),
    /// A device, a pipe or a descriptor of this process: no other file can stand in for it.
    Stream,
}

/// Lets `fill` write a new file, whose path it gets, and renames that file to `path`. The new file is on the disk
/// before the rename, so that `path` holds the old content or the new one after any failure. A link stays a link: the
/// file that it names is replaced. The permissions of a replaced file are kept. A device or a pipe is written to.
///
/// # Errors
/// A folder that does not exist or may not be written to, a file that may only be read, a full disk, or an error of
/// `fill`. The new file is then removed.
pub(crate) fn replace(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let target = match place(path)? {
        Place::Name(target) => target,
        Place::Stream => return stream(path, fill),
    };
    let folder = folder_of(&target);
    let beside = new_file(folder, &target)?;
    fill(&beside)?;
    fs::File::options().write(true).open(&beside)?.sync_all()?;
    if let Ok(old) = fs::metadata(&target) {
        fs::set_permissions(&beside, old.permissions())?;
    }
    beside.persist(&target).map_err(|error| error.error)?;
    // The file has its name; not every file system can tell when the folder is on the disk.
    #[cfg(unix)]
    let _ = fs::File::open(folder).and_then(|folder| folder.sync_all());
    Ok(())
}

/// A file with an unused, hidden name. Its permissions are those of any new file.
fn new_file(folder: &Path, target: &Path) -> Result<tempfile::TempPath> {
    let mut prefix = std::ffi::OsString::from(".");
    prefix.push(target.file_name().unwrap_or_default());
    prefix.push(".");
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    // The process's umask is subtracted.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    Ok(builder.tempfile_in(folder)?.into_temp_path())
}

fn folder_of(path: &Path) -> &Path {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

fn place(path: &Path) -> Result<Place> {
    let mut target = path.to_path_buf();
    for _ in 0..MOST_LINKS {
        let Some(name) = target.file_name() else {
            return Err(Error::new(ErrorKind::IsADirectory, "a folder in the place of a file"));
        };
        let folder = folder_of(&target).canonicalize()?;
        // Links in /proc name open files, not paths.
        if folder.starts_with("/proc") {
            return Ok(Place::Stream);
        }
        target = folder.join(name);
        match fs::symlink_metadata(&target) {
            Ok(found) if found.is_symlink() => target = folder.join(fs::read_link(&target)?),
            Ok(found) if found.is_dir() => {
                return Err(Error::new(ErrorKind::IsADirectory, "a folder in the place of a file"))
            }
            Ok(found) if !found.is_file() => return Ok(Place::Stream),
            // A rename would not check that.
            Ok(found) if found.permissions().readonly() => {
                return Err(Error::new(ErrorKind::PermissionDenied, "a file that may only be read"))
            }
            Ok(_) => return Ok(Place::Name(target)),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Place::Name(target)),
            Err(error) => return Err(error),
        }
    }
    Err(Error::other(format!(
        "more than {MOST_LINKS} links from one to the next"
    )))
}

/// Buffers the whole content first, so that an error of `fill` writes nothing.
fn stream(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let whole = tempfile::NamedTempFile::new()?.into_temp_path();
    fill(&whole)?;
    let mut stream = fs::File::options().append(true).open(path)?;
    std::io::copy(&mut fs::File::open(&whole)?, &mut stream)?;
    Ok(())
}
