//! Safetensors: a JSON header, then the tensors' bytes. The `safetensors` crate checks the header: sizes within
//! the file, no overlaps, no gaps.

use super::{
    Loaded, Value, atomic,
    bytes::{self, Kind},
};
use crate::{DType, Error, Result, Tensor};
use safetensors::{Dtype, SafeTensors, View};
use std::{borrow::Cow, collections::HashMap, path::Path};

/// Reads a safetensors file.
///
/// # Errors
/// If the file cannot be read, is damaged, or holds a type that has no counterpart here.
pub fn load_safetensors(path: impl AsRef<Path>) -> Result<Loaded> {
    let path = path.as_ref();
    read(path, &atomic::map(path)?)
}

pub(super) fn read(path: &Path, file: &[u8]) -> Result<Loaded> {
    let bad =
        |e: safetensors::SafeTensorError| Error::format(path, format!("no valid safetensors file: {e}"));
    let (_, header) = SafeTensors::read_metadata(file).map_err(bad)?;
    let metadata = header.metadata().clone().unwrap_or_default().into_iter().collect();
    let views = SafeTensors::deserialize(file).map_err(bad)?;
    let mut tensors = Vec::with_capacity(views.len());
    for name in header.offset_keys() {
        let view = views.tensor(&name).map_err(bad)?;
        let Some(kind) = kind(view.dtype()) else {
            return Err(Error::format(path, format!("tensor {name} is {:?}", view.dtype())));
        };
        tensors.push((name, bytes::tensor(kind, view.data(), view.shape())));
    }
    Ok(Loaded { tree: Value::state_dict(tensors), metadata })
}

/// Writes tensors and strings. Every tensor is stored row-major.
///
/// # Errors
/// If a name occurs twice or the file cannot be written; what was at `path` is still there then.
pub fn save_safetensors(
    path: impl AsRef<Path>,
    tensors: &[(String, Tensor)],
    metadata: &[(String, String)],
) -> Result<()> {
    let path = path.as_ref();
    let mut names = std::collections::HashSet::new();
    let mut stored = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        if !names.insert(name) || name == "__metadata__" {
            return Err(Error::format(path, format!("there cannot be another tensor {name}")));
        }
        stored.push((name.as_str(), Stored(tensor.detach().contiguous()?)));
    }
    let metadata: Option<HashMap<String, String>> =
        (!metadata.is_empty()).then(|| metadata.iter().cloned().collect());
    atomic::write(path, |temporary| {
        safetensors::serialize_to_file(stored, metadata, temporary).map_err(|e| match e {
            safetensors::SafeTensorError::IoError(e) => Error::io(path, e),
            e => Error::format(path, e.to_string()),
        })
    })
}

fn kind(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F32 => Kind::Same(DType::F32),
        Dtype::BF16 => Kind::Same(DType::BF16),
        Dtype::F16 => Kind::Same(DType::F16),
        Dtype::F64 => Kind::Same(DType::F64),
        Dtype::I64 => Kind::Same(DType::I64),
        Dtype::I32 => Kind::Same(DType::I32),
        Dtype::U8 => Kind::Same(DType::U8),
        Dtype::BOOL => Kind::Same(DType::Bool),
        Dtype::I8 => Kind::I8,
        Dtype::I16 => Kind::I16,
        Dtype::U16 => Kind::U16,
        Dtype::U32 => Kind::U32,
        _ => return None,
    })
}

/// A contiguous tensor.
struct Stored(Tensor);

impl View for Stored {
    fn dtype(&self) -> Dtype {
        match self.0.dtype() {
            DType::F32 => Dtype::F32,
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
            DType::F64 => Dtype::F64,
            DType::I64 => Dtype::I64,
            DType::I32 => Dtype::I32,
            DType::U8 => Dtype::U8,
            DType::Bool => Dtype::BOOL,
        }
    }
    fn shape(&self) -> &[usize] {
        self.0.shape()
    }
    fn data(&self) -> Cow<'_, [u8]> {
        bytes::of(&self.0).into()
    }
    fn data_len(&self) -> usize {
        bytes::of(&self.0).len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Result<Vec<(String, Tensor)>> {
        let x = Tensor::arange(6, DType::F32)?.reshape([2, 3])?;
        let mut all = Vec::new();
        for dtype in
            [DType::F32, DType::BF16, DType::F16, DType::F64, DType::I64, DType::I32, DType::U8, DType::Bool]
        {
            all.push((dtype.to_string(), x.to_dtype(dtype)?.permute([1, 0])?));
        }
        all.push(("empty".into(), Tensor::zeros([0, 3], DType::F32)?));
        all.push(("scalar".into(), Tensor::scalar(2.5)));
        Ok(all)
    }

    fn folder() -> Result<tempfile::TempDir> {
        tempfile::tempdir().map_err(|e| Error::io(".", e))
    }

    #[test]
    fn round_trip() -> Result<()> {
        let folder = folder()?;
        let path = folder.path().join("a.safetensors");
        save_safetensors(&path, &sample()?, &[("key".into(), "\"value\"\n".into())])?;
        let loaded = crate::io::load(&path)?;
        assert_eq!(loaded.metadata["key"], "\"value\"\n");
        let tensors = loaded.tensors();
        assert_eq!(tensors.len(), sample()?.len());
        for (name, expected) in sample()? {
            let Some((_, got)) = tensors.iter().find(|(n, _)| *n == name) else { panic!("{name}") };
            assert_eq!((got.dtype(), got.shape()), (expected.dtype(), expected.shape()));
            let values = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec::<f64>();
            assert_eq!(values(got)?, values(&expected)?, "{name}");
        }
        let twice = [sample()?, sample()?].concat();
        assert!(save_safetensors(&path, &twice, &[]).is_err() && crate::io::load(&path).is_ok());
        Ok(())
    }

    proptest! {
        /// Damage gives an error or other numbers, never a panic.
        #[test]
        fn damaged_files(cut in 0usize..1500, edits in prop::collection::vec((0usize..1500, any::<u8>()), 0..6)) {
            let folder = folder().unwrap();
            let path = folder.path().join("a.safetensors");
            save_safetensors(&path, &sample().unwrap(), &[]).unwrap();
            let mut bytes = std::fs::read(&path).unwrap();
            for (at, value) in edits {
                let n = bytes.len();
                bytes[at % n] = value;
            }
            if cut < bytes.len() && cut % 3 == 0 {
                bytes.truncate(cut);
            }
            let _ = read(&path, &bytes);
        }
    }
}
