//! PyTorch's `.pth` since 1.6: a zip file of `data.pkl` (a pickle that describes the tree) and one uncompressed
//! entry `data/<key>` for each storage.

mod pickle;
mod write;

pub use write::save_pth;

use super::{
    Value, atomic,
    bytes::{self, Kind},
    checksum,
};
use crate::{
    DType, Error, Result, Tensor,
    shape::{Dims, Strides, checked_count},
};
use pickle::{Graph, Object};
use std::{collections::HashMap, io::Cursor, ops::Range, path::Path};

/// Reads a `.pth` as a tree. Python classes become [`Value::Object`]; nothing of the file is executed.
///
/// # Errors
/// If the file cannot be read or is damaged, is a TorchScript archive, or was written on a big-endian machine.
pub fn load_pth(path: impl AsRef<Path>) -> Result<Value> {
    let path = path.as_ref();
    read(path, &atomic::map(path)?)
}

pub(super) fn read(path: &Path, file: &[u8]) -> Result<Value> {
    let bad = |message: String| Error::format(path, message);
    let archive = Archive::new(file).map_err(bad)?;
    let graph = pickle::parse(archive.entry("data.pkl").map_err(bad)?).map_err(bad)?;
    // Shared objects are converted once for each place; a damaged or malicious file could nest them until the
    // tree outgrows any memory, so the places are counted.
    let budget = 4 * graph.objects.len() + 1000;
    let mut reader = Reader { archive, graph: &graph, storages: HashMap::new(), budget };
    reader.value(graph.root, 0).map_err(bad)
}

/// The zip file's uncompressed entries below its one top folder, with their checksums.
struct Archive<'a> {
    file: &'a [u8],
    entries: HashMap<String, (Range<usize>, u32)>,
}

impl<'a> Archive<'a> {
    fn new(file: &'a [u8]) -> Result<Self, String> {
        let zip_error = |e: zip::result::ZipError| format!("damaged zip file: {e}");
        let mut zip = zip::ZipArchive::new(Cursor::new(file)).map_err(zip_error)?;
        let mut all = Vec::with_capacity(zip.len());
        for i in 0..zip.len() {
            let entry = zip.by_index_raw(i).map_err(zip_error)?;
            let name = String::from_utf8_lossy(entry.name_raw()).into_owned();
            let start = entry.data_start().ok_or_else(|| format!("zip entry {name} has no data"))?;
            let end = start.checked_add(entry.size()).filter(|&end| end <= file.len() as u64);
            let plain = entry.compression() == zip::CompressionMethod::Stored;
            let end = end.filter(|_| plain && !entry.encrypted());
            all.push((name, end.map(|end| (start as usize..end as usize, entry.crc32()))));
        }
        let pickle = all.iter().find_map(|(name, _)| name.strip_suffix("data.pkl"));
        let prefix = pickle.ok_or("a zip file without data.pkl, so not one of torch.save")?.to_owned();
        if all.iter().any(|(name, _)| name.strip_prefix(&prefix) == Some("constants.pkl")) {
            return Err("a TorchScript archive (torch.jit.save); save the state_dict instead".into());
        }
        let mut entries = HashMap::new();
        for (name, range) in all {
            if let Some(short) = name.strip_prefix(&prefix) {
                let range = range.ok_or_else(|| format!("zip entry {name} is compressed or cut off"))?;
                if entries.insert(short.to_owned(), range).is_some() {
                    return Err(format!("zip entry {name} occurs twice"));
                }
            }
        }
        let archive = Archive { file, entries };
        if archive.entries.contains_key("byteorder") && archive.entry("byteorder")?.trim_ascii() != b"little"
        {
            return Err("written on a big-endian machine".into());
        }
        Ok(archive)
    }

    /// The bytes of an entry, which have its checksum.
    fn entry(&self, name: &str) -> Result<&'a [u8], String> {
        let (range, stored) =
            self.entries.get(name).ok_or_else(|| format!("the file has no entry {name}"))?;
        let bytes = &self.file[range.clone()];
        let found = checksum::crc32(bytes);
        if found != *stored {
            let what = format!("zip entry {name}");
            return Err(checksum::mismatch(&what, &format!("{stored:08x}"), found));
        }
        Ok(bytes)
    }
}

/// Dictionaries and lists may be this deep.
const DEPTH: usize = 64;
/// A view that repeats elements may be as large as the file, or as this.
const REPEATED_BYTES: usize = 64 << 20;

/// Turns the pickle's objects into values.
struct Reader<'a> {
    archive: Archive<'a>,
    graph: &'a Graph,
    /// Storages that have been read, as flat tensors that views share.
    storages: HashMap<String, (Kind, Tensor)>,
    budget: usize,
}

impl Reader<'_> {
    fn value(&mut self, at: usize, depth: usize) -> Result<Value, String> {
        self.budget = self.budget.checked_sub(1).ok_or("objects are nested without end")?;
        if depth > DEPTH {
            return Err(format!("objects are nested more than {DEPTH} deep"));
        }
        Ok(match &self.graph.objects[at] {
            Object::None => Value::None,
            Object::Bool(b) => Value::Bool(*b),
            Object::Int(i) => Value::Int(*i),
            Object::Float(x) => Value::Float(*x),
            Object::Str(s) => Value::Str(s.clone()),
            Object::Tuple(items) | Object::List(items) => {
                Value::List(items.iter().map(|&i| self.value(i, depth + 1)).collect::<Result<_, _>>()?)
            }
            Object::Dict(entries) => Value::Dict(self.entries(entries, depth)?),
            Object::Tensor { storage, offset, size, stride } => {
                Value::Tensor(self.tensor(*storage, *offset, size, stride)?)
            }
            Object::Instance { class, state } => {
                let fields = match state.map(|i| &self.graph.objects[i]) {
                    Some(Object::Dict(entries)) => self.entries(entries, depth)?,
                    _ => Vec::new(),
                };
                Value::Object { class: class.clone(), fields }
            }
            Object::Global(name) => Value::Object { class: name.clone(), fields: Vec::new() },
            Object::Bytes => opaque("bytes"),
            Object::LongInt => opaque("int"),
            Object::Storage { .. } => opaque("torch storage"),
        })
    }

    fn entries(&mut self, entries: &[(usize, usize)], depth: usize) -> Result<Vec<(String, Value)>, String> {
        let mut list = Vec::with_capacity(entries.len());
        for &(key, value) in entries {
            let key = match &self.graph.objects[key] {
                Object::Str(s) => s.clone(),
                Object::Int(i) => i.to_string(),
                Object::Float(x) => x.to_string(),
                Object::Bool(b) => b.to_string(),
                Object::None => "None".into(),
                _ => continue,
            };
            list.push((key, self.value(value, depth + 1)?));
        }
        Ok(list)
    }

    fn tensor(
        &mut self,
        storage: usize,
        offset: i64,
        size: &[i64],
        stride: &[i64],
    ) -> Result<Tensor, String> {
        let Object::Storage { class, key, numel } = &self.graph.objects[storage] else {
            return Err("a tensor without a storage".into());
        };
        let (kind, flat) = self.storage(class, key, *numel)?;
        let fail = || {
            format!(
                "a tensor of size {size:?}, stride {stride:?}, offset {offset} in storage {key} of {numel}"
            )
        };
        let shape: Option<Dims> = size.iter().map(|&n| usize::try_from(n).ok()).collect();
        let (Some(shape), Ok(offset)) = (shape, usize::try_from(offset)) else { return Err(fail()) };
        if stride.len() != shape.len() || stride.iter().any(|&s| s < 0) {
            return Err(fail());
        }
        let count = checked_count("load", &shape, 8).map_err(|_| fail())?;
        let last = shape.iter().zip(stride).try_fold(offset as u64, |at, (&n, &s)| {
            (n.saturating_sub(1) as u64).checked_mul(s as u64)?.checked_add(at)
        });
        let fits = count == 0 || last.is_some_and(|last| last < flat.numel() as u64);
        // An expanded view may be larger than its storage, but not beyond reason.
        let reasonable =
            count <= flat.numel() || count * kind.size() <= self.archive.file.len().max(REPEATED_BYTES);
        if !fits || !reasonable {
            return Err(fail());
        }
        if count == 0 {
            return Tensor::zeros(shape, flat.dtype()).map_err(|e| e.to_string());
        }
        let strides: Strides = stride.iter().map(|&s| s as isize).collect();
        Ok(flat.view_as(shape, strides, offset, "load"))
    }

    fn storage(&mut self, class: &str, key: &str, numel: i64) -> Result<(Kind, Tensor), String> {
        if let Some((kind, flat)) = self.storages.get(key) {
            return if Some(*kind) == storage_kind(class) {
                Ok((*kind, flat.clone()))
            } else {
                Err(format!("storage {key} is read as two types"))
            };
        }
        let kind =
            storage_kind(class).ok_or_else(|| format!("a tensor in a {class}, which has no counterpart"))?;
        let bytes = self.archive.entry(&format!("data/{key}"))?;
        let n = bytes.len() / kind.size();
        if i64::try_from(n) != Ok(numel) || n * kind.size() != bytes.len() {
            return Err(format!("storage {key} has {} bytes, needs {numel} numbers of {class}", bytes.len()));
        }
        let flat = bytes::tensor(kind, bytes, n);
        self.storages.insert(key.to_owned(), (kind, flat.clone()));
        Ok((kind, flat))
    }
}

fn opaque(class: &str) -> Value {
    Value::Object { class: class.into(), fields: Vec::new() }
}

/// Number format by PyTorch's class name.
fn storage_kind(class: &str) -> Option<Kind> {
    Some(match class.strip_prefix("torch.")? {
        "FloatStorage" => Kind::Same(DType::F32),
        "DoubleStorage" => Kind::Same(DType::F64),
        "HalfStorage" => Kind::Same(DType::F16),
        "BFloat16Storage" => Kind::Same(DType::BF16),
        "LongStorage" => Kind::Same(DType::I64),
        "IntStorage" => Kind::Same(DType::I32),
        "ByteStorage" => Kind::Same(DType::U8),
        "BoolStorage" => Kind::Same(DType::Bool),
        "CharStorage" => Kind::I8,
        "ShortStorage" => Kind::I16,
        _ => return None,
    })
}
