//! Whole files or none.

use crate::{Error, Result};
use memmap2::Mmap;
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

/// A file in memory, read as it is touched.
pub(crate) fn map(path: &Path) -> Result<Mmap> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    // As with every mapped file, somebody who shortens it meanwhile ends the process; nothing is written to it.
    unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))
}

/// Lets `write` fill a new file beside `path`, brings it to disk, and puts it in `path`'s place. If anything
/// fails, what was at `path` is still there and the new file is gone.
pub(crate) fn write(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name() else { return Err(Error::format(path, "names no file")) };
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temporary = folder.join(format!(".{}.{}-{number}.tmp", name.to_string_lossy(), std::process::id()));
    let result = write(&temporary).and_then(|()| publish(&temporary, path, folder));
    if result.is_err() {
        // There may be nothing to remove; the first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    result
}

fn publish(temporary: &PathBuf, path: &Path, folder: &Path) -> Result<()> {
    let io = |e| Error::io(path, e);
    File::open(temporary).and_then(|file| file.sync_all()).map_err(io)?;
    fs::rename(temporary, path).map_err(io)?;
    // The new name is safe once the folder is; not every file system can synchronise one.
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file() -> Result<()> {
        let folder = tempfile::tempdir().map_err(|e| Error::io(".", e))?;
        let path = folder.path().join("a.bin");
        let put = |text: &'static str| move |p: &Path| fs::write(p, text).map_err(|e| Error::io(p, e));
        write(&path, put("one"))?;
        let failed = write(&path, |p| put("half")(p).and(Err(Error::msg("full"))));
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap_or_default(), b"one");
        write(&path, put("two"))?;
        assert_eq!(fs::read(&path).unwrap_or_default(), b"two");
        assert_eq!(fs::read_dir(folder.path()).map(|d| d.count()).unwrap_or(0), 1);
        Ok(())
    }
}
