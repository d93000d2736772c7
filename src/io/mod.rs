//! Files: safetensors, PyTorch's `.pth`, and checkpoints of a training run.
//!
//! Reading never runs code that stands in a file, and every size and offset is checked against the file before
//! memory is taken. The checksums of a `.pth`, and of what smalti writes as safetensors, are verified. Writing goes
//! to a temporary file in the same folder that is synchronised and then renamed, so that a crash leaves the old
//! file or the new one.

mod atomic;
mod bytes;
pub mod checkpoint;
mod checksum;
mod pth;
mod safetensors;
mod value;

pub use checkpoint::Progress;
pub use pth::{load_pth, save_pth};
pub use safetensors::{load_safetensors, save_safetensors};
pub use value::Value;

pub(crate) use atomic::map;

use crate::{Error, Result, Tensor};
use std::{collections::BTreeMap, path::Path};

/// A file's content.
#[derive(Debug)]
pub struct Loaded {
    /// The tree that the file holds: a flat dictionary for safetensors.
    pub tree: Value,
    /// Strings beside the tensors (safetensors).
    pub metadata: BTreeMap<String, String>,
}

impl Loaded {
    /// The model's tensors: those below `model` or `state_dict` if there is such a key at the top, else all;
    /// names of nested dictionaries are joined by dots.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let inner = ["model", "state_dict"].iter().find_map(|key| self.tree.get(key).filter(|v| v.is_dict()));
        inner.unwrap_or(&self.tree).tensors()
    }
}

/// Reads a safetensors file or a `.pth`, told apart by their first bytes.
///
/// # Errors
/// If the file cannot be read, is of neither kind, is damaged, or is a `.pth` of the form before PyTorch 1.6.
pub fn load(path: impl AsRef<Path>) -> Result<Loaded> {
    let path = path.as_ref();
    let bytes = map(path)?;
    match &bytes[..] {
        [b'P', b'K', 3, 4, ..] => Ok(Loaded { tree: pth::read(path, &bytes)?, metadata: BTreeMap::new() }),
        // before the pickle: a header of 640 bytes begins as one
        [_, _, _, _, _, _, _, _, b'{', ..] => safetensors::read(path, &bytes),
        [0x80, protocol, ..] if *protocol >= 2 => Err(Error::format(
            path,
            "a pickle that is not in a zip file: the legacy format of PyTorch before 1.6. Load it there and save \
             it again with a newer version",
        )),
        _ => Err(Error::format(path, "neither a safetensors file nor a .pth (zip) file")),
    }
}
