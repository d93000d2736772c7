//! Writing `.pth` files that `torch.load(weights_only=True)` reads.

use super::super::{Value, atomic, bytes};
use crate::{DType, Error, Result, Tensor};
use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};
use zip::{ZipWriter, write::SimpleFileOptions};

/// Writes a tree: `save_pth(path, &Value::Dict(vec![("model".into(), Value::state_dict(tensors))]))`. Tensors are
/// stored row-major; what Python knows as tuples becomes lists.
///
/// # Errors
/// If the tree holds a [`Value::Object`], or the file cannot be written; what was at `path` is still there then.
pub fn save_pth(path: impl AsRef<Path>, tree: &Value) -> Result<()> {
    let path = path.as_ref();
    let mut pickler = Pickler { out: vec![0x80, 2], tensors: Vec::new() };
    pickler.value(tree).map_err(|message| Error::format(path, message))?;
    pickler.out.push(b'.');
    let tensors = pickler.tensors.iter().map(|t| t.detach().contiguous()).collect::<Result<Vec<_>>>()?;
    atomic::write(path, |temporary| {
        let file = File::create(temporary).map_err(|e| Error::io(path, e))?;
        write_zip(file, &pickler.out, &tensors).map_err(|e| Error::io(path, e))
    })
}

fn write_zip(file: File, pickle: &[u8], tensors: &[Tensor]) -> std::io::Result<()> {
    let mut zip = ZipWriter::new(BufWriter::with_capacity(1 << 20, file));
    let mut entry = |name: &str, data: &[u8]| {
        let options = SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored)
            // as PyTorch, so that its mapped loading works
            .with_alignment(64)
            .large_file(data.len() >= u32::MAX as usize);
        zip.start_file(format!("archive/{name}"), options)?;
        zip.write_all(data)
    };
    entry("data.pkl", pickle)?;
    entry("byteorder", b"little")?;
    for (key, tensor) in tensors.iter().enumerate() {
        entry(&format!("data/{key}"), bytes::of(tensor))?;
    }
    entry("version", b"3\n")?;
    zip.finish()?.flush()
}

struct Pickler<'a> {
    out: Vec<u8>,
    tensors: Vec<&'a Tensor>,
}

const ORDERED_DICT: &str = "collections\nOrderedDict";

impl<'a> Pickler<'a> {
    fn value(&mut self, value: &'a Value) -> Result<(), String> {
        match value {
            Value::None => self.out.push(b'N'),
            Value::Bool(b) => self.out.push(if *b { 0x88 } else { 0x89 }),
            Value::Int(i) => self.int(*i),
            Value::Float(x) => {
                self.out.push(b'G');
                self.out.extend(x.to_bits().to_be_bytes());
            }
            Value::Str(s) => self.text(s),
            Value::Tensor(t) => self.tensor(t),
            Value::List(items) => {
                self.out.extend(b"](");
                for item in items {
                    self.value(item)?;
                }
                self.out.push(b'e');
            }
            Value::Dict(entries) => {
                self.empty_dict();
                self.out.push(b'(');
                for (key, value) in entries {
                    self.text(key);
                    self.value(value)?;
                }
                self.out.push(b'u');
            }
            Value::Object { class, .. } => {
                return Err(format!("an object of class {class} cannot be written"));
            }
        }
        Ok(())
    }

    fn int(&mut self, i: i64) {
        match i32::try_from(i) {
            Ok(i) => {
                self.out.push(b'J');
                self.out.extend(i.to_le_bytes());
            }
            Err(_) => {
                self.out.extend([0x8a, 8]);
                self.out.extend(i.to_le_bytes());
            }
        }
    }

    fn text(&mut self, text: &str) {
        self.out.push(b'X');
        self.out.extend((text.len() as u32).to_le_bytes());
        self.out.extend(text.as_bytes());
    }

    fn global(&mut self, name: &str) {
        self.out.push(b'c');
        self.out.extend(name.as_bytes());
        self.out.push(b'\n');
    }

    fn empty_dict(&mut self) {
        self.global(ORDERED_DICT);
        self.out.extend(b")R");
    }

    fn numbers(&mut self, numbers: impl IntoIterator<Item = i64>) {
        self.out.push(b'(');
        numbers.into_iter().for_each(|n| self.int(n));
        self.out.push(b't');
    }

    /// `_rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())`
    fn tensor(&mut self, tensor: &'a Tensor) {
        self.global("torch._utils\n_rebuild_tensor_v2");
        self.out.extend(b"((");
        self.text("storage");
        self.global(match tensor.dtype() {
            DType::F32 => "torch\nFloatStorage",
            DType::F64 => "torch\nDoubleStorage",
            DType::F16 => "torch\nHalfStorage",
            DType::BF16 => "torch\nBFloat16Storage",
            DType::I64 => "torch\nLongStorage",
            DType::I32 => "torch\nIntStorage",
            DType::U8 => "torch\nByteStorage",
            DType::Bool => "torch\nBoolStorage",
        });
        self.text(&self.tensors.len().to_string());
        self.text("cpu");
        self.int(tensor.numel() as i64);
        self.out.extend(b"tQ");
        self.int(0);
        self.numbers(tensor.shape().iter().map(|&n| n as i64));
        self.numbers(crate::shape::contiguous_strides(tensor.shape()).iter().map(|&s| s as i64));
        self.out.push(0x89);
        self.empty_dict();
        self.out.extend(b"tR");
        self.tensors.push(tensor);
    }
}
