//! Safetensors: a JSON header, then the tensors' bytes. The `safetensors` crate checks the header: sizes within
//! the file, no overlaps, no gaps. What is written here has checksums in its metadata too: one of the other
//! metadata, and one of each tensor's name, type, shape and bytes in the order of names.

use super::{
    Loaded, Value, atomic,
    bytes::{self, Kind},
    checksum,
};
use crate::{DType, Error, Result, Tensor};
use safetensors::{Dtype, SafeTensors, tensor::TensorInfo};
use serde_json::{Map, json};
use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

/// The metadata key of the checksums.
const CHECKSUMS: &str = "smalti.crc32";

/// Reads a safetensors file. Checksums that smalti wrote into it are verified.
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
    let mut metadata: BTreeMap<String, String> =
        header.metadata().clone().unwrap_or_default().into_iter().collect();
    let views = SafeTensors::deserialize(file).map_err(bad)?;
    if let Some(stored) = metadata.remove(CHECKSUMS) {
        let mut parts = vec![("the metadata".to_owned(), of_metadata(&metadata))];
        for (name, view) in views.iter().collect::<BTreeMap<_, _>>() {
            let sum = of_tensor(name, view.dtype(), view.shape(), view.data());
            parts.push((format!("tensor {name}"), sum));
        }
        verify(&stored, &parts).map_err(|message| Error::format(path, message))?;
    }
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
/// If a name occurs twice, a string has the key of the checksums, or the file cannot be written; what was at
/// `path` is still there then.
pub fn save_safetensors(
    path: impl AsRef<Path>,
    tensors: &[(String, Tensor)],
    metadata: &[(String, String)],
) -> Result<()> {
    let path = path.as_ref();
    let mut stored = BTreeMap::new();
    for (name, tensor) in tensors {
        if stored.insert(name.as_str(), tensor.detach().contiguous()?).is_some() || name == METADATA {
            return Err(Error::format(path, format!("there cannot be another tensor {name}")));
        }
    }
    let mut metadata: BTreeMap<String, String> = metadata.iter().cloned().collect();
    if metadata.contains_key(CHECKSUMS) {
        return Err(Error::format(path, format!("the metadata cannot have a key {CHECKSUMS}")));
    }
    let sums = stored.iter().map(|(name, t)| of_tensor(name, dtype(t), t.shape(), bytes::of(t)));
    let sums: Vec<String> =
        std::iter::once(of_metadata(&metadata)).chain(sums).map(|sum| format!("{sum:08x}")).collect();
    metadata.insert(CHECKSUMS.into(), sums.join(" "));
    // by falling alignment, as other readers expect
    let mut ordered: Vec<_> = stored.into_iter().collect();
    ordered.sort_by_key(|(_, tensor)| std::cmp::Reverse(dtype(tensor)));
    let header = header(&ordered, &metadata).map_err(|e| Error::format(path, e.to_string()))?;
    let put = |file: File| {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        ordered.iter().try_for_each(|(_, tensor)| file.write_all(bytes::of(tensor)))?;
        file.flush()
    };
    atomic::write(path, |temporary| File::create(temporary).and_then(put).map_err(|e| Error::io(path, e)))
}

/// The header's entry that is no tensor.
const METADATA: &str = "__metadata__";

/// Written here, not by the `safetensors` crate, whose metadata come in another order each time: equal content
/// gives equal files.
fn header(tensors: &[(&str, Tensor)], metadata: &BTreeMap<String, String>) -> serde_json::Result<String> {
    let mut map = Map::from_iter([(METADATA.to_owned(), json!(metadata))]);
    let mut at = 0;
    for (name, tensor) in tensors {
        let end = at + bytes::of(tensor).len();
        let info =
            TensorInfo { dtype: dtype(tensor), shape: tensor.shape().to_vec(), data_offsets: (at, end) };
        map.insert((*name).to_owned(), serde_json::to_value(info)?);
        at = end;
    }
    let mut text = serde_json::to_string(&map)?;
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    Ok(text)
}

fn of_metadata(metadata: &BTreeMap<String, String>) -> u32 {
    checksum::crc32(json!(metadata).to_string().as_bytes())
}

fn of_tensor(name: &str, dtype: Dtype, shape: &[usize], data: &[u8]) -> u32 {
    checksum::with_prefix(format!("{name} {dtype:?} {shape:?}").as_bytes(), data)
}

/// Compares what stands in the file with (what it is of, what is found).
fn verify(stored: &str, parts: &[(String, u32)]) -> Result<(), String> {
    let stored: Vec<&str> = stored.split(' ').collect();
    if stored.len() != parts.len() {
        return Err(format!("damaged: it has {} checksums, needs {}", stored.len(), parts.len()));
    }
    let wrong = parts.iter().zip(stored).find(|((_, sum), text)| *text != format!("{sum:08x}"));
    wrong.map_or(Ok(()), |((what, sum), text)| Err(checksum::mismatch(what, text, *sum)))
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

fn dtype(tensor: &Tensor) -> Dtype {
    match tensor.dtype() {
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
        all.push(("scalar, \u{e9}".into(), Tensor::scalar(2.5)));
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
