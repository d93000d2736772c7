//! Image folders in ImageNet's layout.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use smalti::{Error, Result};
use walkdir::{DirEntry, WalkDir};

use super::{Dataset, Sample, image};

/// A folder of JPEG and PNG files: `root/class/**/name.jpg`, the classes numbered in the order of their names,
/// or just `root/name.jpg` without classes (then every label is 0).
///
/// Endings are `jpg`, `jpeg`, `png` in any case. Names that start with a dot are passed over (archives made on a
/// Mac bring `._name.jpg` companions that are no images). Files are ordered by path within their class.
#[derive(Clone, Debug)]
pub struct Folder {
    classes: Vec<String>,
    files: Vec<(PathBuf, u32)>,
}

const SPLITS: [&str; 3] = ["train", "val", "test"];

impl Folder {
    /// Lists the images of `root`.
    ///
    /// Errors: no such folder; no images; a class folder without images; images next to class folders; a folder
    /// of splits (`train`, `val`), which [`split`](Self::split) opens.
    pub fn open(root: &Path) -> Result<Self> {
        let mut loose = Vec::new();
        let mut classes = Vec::new();
        for entry in children(root)? {
            let entry = entry?;
            if entry.file_type().is_dir() {
                let name = entry.file_name().to_string_lossy().into_owned();
                classes.push((name, images_below(entry.path())?));
            } else if is_image(&entry) {
                loose.push(entry.into_path());
            }
        }
        if classes.iter().all(|(_, files)| files.is_empty()) {
            return Self::flat(root, loose, classes.len());
        }
        check_classes(root, &loose, &classes)?;
        let mut folder = Folder { classes: Vec::new(), files: Vec::new() };
        for (label, (name, files)) in classes.into_iter().enumerate() {
            folder.classes.push(name);
            folder.files.extend(files.into_iter().map(|file| (file, label as u32)));
        }
        Ok(folder)
    }

    fn flat(root: &Path, files: Vec<PathBuf>, folders: usize) -> Result<Self> {
        if files.is_empty() {
            let what = format!("no .jpg, .jpeg or .png file in this folder or in its {folders} subfolders");
            return Err(Error::format(root, what));
        }
        Ok(Folder { classes: Vec::new(), files: files.into_iter().map(|file| (file, 0)).collect() })
    }

    /// Opens `root/name`, for `name` such as `train` or `val`; the message of a missing one lists what is there.
    pub fn split(root: &Path, name: &str) -> Result<Self> {
        let path = root.join(name);
        if path.is_dir() {
            return Self::open(&path);
        }
        let present: Vec<String> = children(root)?
            .filter_map(|entry| entry.ok().filter(|e| e.file_type().is_dir()))
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .take(5)
            .collect();
        let present = if present.is_empty() { "none".to_owned() } else { present.join(", ") };
        Err(Error::format(root, format!("no subfolder `{name}`; subfolders here: {present}")))
    }

    /// The same files with labels counted in `classes`, those of the training folder, so that a validation
    /// folder that lacks a class does not shift the numbers of the others.
    ///
    /// Errors: a class that is not in `classes`.
    pub fn with_classes(mut self, classes: &[String]) -> Result<Self> {
        let mut labels = Vec::with_capacity(self.classes.len());
        for name in &self.classes {
            let Some(label) = classes.iter().position(|c| c == name) else {
                return Err(Error::msg(format!(
                    "image folder: class `{name}` is not among the {} known",
                    classes.len()
                )));
            };
            labels.push(label as u32);
        }
        for (_, label) in &mut self.files {
            *label = labels.get(*label as usize).copied().unwrap_or(0);
        }
        self.classes = classes.to_vec();
        Ok(self)
    }

    /// Names of the classes by label; empty if the folder has none.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Path and label of sample `index`.
    pub fn file(&self, index: usize) -> (&Path, i64) {
        let (path, label) = &self.files[index];
        (path, i64::from(*label))
    }
}

impl Dataset for Folder {
    type Label = i64;

    fn len(&self) -> usize {
        self.files.len()
    }

    fn get(&self, index: usize) -> Result<Sample<i64>> {
        let (path, label) = self.file(index);
        Ok(Sample { image: Arc::new(image::read(path)?), label })
    }

    fn name(&self, index: usize) -> String {
        self.file(index).0.display().to_string()
    }
}

fn check_classes(root: &Path, loose: &[PathBuf], classes: &[(String, Vec<PathBuf>)]) -> Result<()> {
    if classes.iter().all(|(name, _)| SPLITS.contains(&name.as_str())) {
        return Err(Error::format(root, "this folder holds splits, not classes; open one of them by name"));
    }
    if let Some(file) = loose.first() {
        let what = format!("images ({}) lie next to class folders; move them or the folders", file.display());
        return Err(Error::format(root, what));
    }
    match classes.iter().find(|(_, files)| files.is_empty()) {
        Some((name, _)) => Err(Error::format(root, format!("class folder `{name}` has no images"))),
        None => Ok(()),
    }
}

fn walk(root: &Path) -> WalkDir {
    WalkDir::new(root).follow_links(true).min_depth(1).sort_by_file_name()
}

fn visible(entry: &DirEntry) -> bool {
    !entry.file_name().as_encoded_bytes().starts_with(b".")
}

fn children(root: &Path) -> Result<impl Iterator<Item = Result<DirEntry>>> {
    let metadata = std::fs::metadata(root).map_err(|e| Error::io(root, e))?;
    if !metadata.is_dir() {
        return Err(Error::format(root, "not a folder"));
    }
    Ok(walk(root).max_depth(1).into_iter().filter_entry(visible).map(|entry| entry.map_err(walk_error)))
}

fn images_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in walk(folder).into_iter().filter_entry(visible) {
        let entry = entry.map_err(walk_error)?;
        if is_image(&entry) {
            files.push(entry.into_path());
        }
    }
    Ok(files)
}

fn is_image(entry: &DirEntry) -> bool {
    let extension = entry.path().extension().map(|e| e.to_ascii_lowercase());
    entry.file_type().is_file() && extension.is_some_and(|e| e == "jpg" || e == "jpeg" || e == "png")
}

fn walk_error(error: walkdir::Error) -> Error {
    let path = error.path().unwrap_or(Path::new("image folder")).to_path_buf();
    Error::format(path, error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A temporary folder with empty files (listing does not read them).
    fn tree(files: &[&str]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for file in files {
            let path = root.path().join(file);
            if file.ends_with('/') {
                fs::create_dir_all(&path).unwrap();
            } else {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(&path, b"").unwrap();
            }
        }
        root
    }

    fn message(result: Result<Folder>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn classes_are_numbered_by_name() {
        let files =
            ["b/2.JPG", "b/1.jpeg", "a/deep/x.Png", "a/notes.txt", "b/._1.jpg", ".hidden/y.png", "c/z.png"];
        let root = tree(&files);
        let folder = Folder::open(root.path()).unwrap();
        assert_eq!(folder.classes(), ["a", "b", "c"]);
        let listed: Vec<_> = (0..folder.len())
            .map(|i| {
                (folder.file(i).0.strip_prefix(root.path()).unwrap().to_str().unwrap(), folder.file(i).1)
            })
            .collect();
        assert_eq!(listed, [("a/deep/x.Png", 0), ("b/1.jpeg", 1), ("b/2.JPG", 1), ("c/z.png", 2)]);
    }

    #[test]
    fn a_flat_folder_has_one_label() {
        let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/files/photos");
        let folder = Folder::open(&photos).unwrap();
        assert_eq!((folder.len(), folder.classes().len()), (12, 0));
        let sample = folder.get(0).unwrap();
        assert!(sample.label == 0 && sample.image.width() <= 512);
        assert!(folder.name(0).ends_with("astronaut.jpg"));
    }

    #[test]
    fn splits() {
        let root = tree(&["train/a/1.png", "train/b/1.png", "val/b/1.png"]);
        let train = Folder::split(root.path(), "train").unwrap();
        let val = Folder::split(root.path(), "val").unwrap().with_classes(train.classes()).unwrap();
        assert_eq!((train.len(), val.len(), val.file(0).1), (2, 1, 1));
        assert!(message(Folder::split(root.path(), "valid")).contains("subfolders here: train, val"));
        assert!(message(Folder::open(root.path())).contains("splits"));
        assert!(message(train.with_classes(val.classes()[..1].as_ref())).contains("class `b`"));
    }

    #[test]
    fn mistakes_have_clear_messages() {
        let root = tree(&["empty/", "a/1.png", "b/readme.txt"]);
        assert!(message(Folder::open(&root.path().join("missing"))).contains("missing"));
        assert!(message(Folder::open(&root.path().join("a/1.png"))).contains("not a folder"));
        assert!(message(Folder::open(&root.path().join("empty"))).contains("no .jpg"));
        assert!(message(Folder::open(root.path())).contains("class folder `b` has no images"));
        let mixed = tree(&["a/1.png", "loose.png"]);
        assert!(message(Folder::open(mixed.path())).contains("loose.png"));
    }
}
