//! Files of real PyTorch (tests/fixtures, made by make_pth.py there), round trips, and damaged files.

use proptest::prelude::*;
use smalti::{
    DType, Error, Result, Tensor,
    io::{Loaded, Progress, Value, checkpoint, load, save_pth, save_safetensors},
    nn::Params,
    optim::{AdamW, Algorithm, Optimizer},
};
use std::{
    collections::BTreeMap,
    io::{Cursor, Read, Write},
    path::{Path, PathBuf},
};

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn folder() -> Result<tempfile::TempDir> {
    tempfile::tempdir().map_err(|e| Error::io(".", e))
}

fn by_name(loaded: &Loaded) -> BTreeMap<String, Tensor> {
    loaded.tensors().into_iter().collect()
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.to_vec()
}

#[test]
fn tensors_of_every_kind() -> Result<()> {
    for name in ["protocol2.pth", "protocol5.pth"] {
        let loaded = load(fixture(name))?;
        let model = by_name(&loaded);
        assert_eq!(model.len(), 16, "{name}");
        let range = |n: usize| (0..n).map(|x| x as f64).collect::<Vec<_>>();
        assert_eq!((model["weight"].shape(), values(&model["weight"])?), (&[4, 6][..], range(24)));
        assert_eq!(values(&model["transposed"].permute([1, 0])?)?, range(24));
        assert_eq!(values(&model["part"])?, [6., 7., 10., 11., 14., 15.]);
        assert_eq!((model["expanded"].shape(), values(&model["expanded"])?), (&[3, 4][..], vec![2.5; 12]));
        assert_eq!((model["scalar"].shape(), model["scalar"].item()?), (&[][..], -1.5));
        assert_eq!(model["empty"].shape(), [0, 3]);
        assert_eq!(values(&model["channels_last"])?, range(16));
        assert_eq!(model["channels_last"].strides()[1], 1);
        for (name, dtype) in [
            ("float16", DType::F16),
            ("bfloat16", DType::BF16),
            ("float64", DType::F64),
            ("int64", DType::I64),
            ("int32", DType::I32),
            ("int16", DType::I32),
            ("int8", DType::I32),
            ("uint8", DType::U8),
        ] {
            assert_eq!((model[name].dtype(), values(&model[name])?), (dtype, range(6)), "{name}");
        }
        assert_eq!(model["bool"].to_vec::<bool>()?, [false, true, true, true, true, true]);
    }
    Ok(())
}

#[test]
fn the_rest_of_the_tree() -> Result<()> {
    let tree = load(fixture("protocol2.pth"))?.tree;
    assert!(matches!(tree.get("epoch"), Some(Value::Int(7))));
    assert!(matches!(tree.get("large"), Some(Value::Int(n)) if *n == 1 << 40));
    assert!(matches!(tree.get("flag"), Some(Value::Bool(true))));
    assert!(matches!(tree.get("none"), Some(Value::None)));
    let Some(args @ Value::Object { class, .. }) = tree.get("args") else { panic!("{tree:?}") };
    assert_eq!(class, "argparse.Namespace");
    assert!(matches!(args.get("batch_size"), Some(Value::Int(64))));
    let all: BTreeMap<String, Tensor> = tree.tensors().into_iter().collect();
    assert_eq!(all["optimizer.state.0.step"].item()?, 3.0);
    assert_eq!(load(fixture("flat.pth"))?.tensors()[0].0, "weight");
    Ok(())
}

#[test]
fn refused_files() -> Result<()> {
    let legacy = load(fixture("legacy.pth")).map(|_| ()).map_err(|e| e.to_string());
    assert!(legacy.is_err_and(|e| e.contains("legacy format")));
    let folder = folder()?;
    for (name, bytes) in [("empty", &b""[..]), ("text", b"hello, world"), ("zip", b"PK\x03\x04")] {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).map_err(|e| Error::io(&path, e))?;
        assert!(load(&path).is_err(), "{name}");
    }
    assert!(matches!(load(folder.path().join("nothing")), Err(Error::Io { .. })));
    Ok(())
}

#[test]
fn pth_round_trip() -> Result<()> {
    let folder = folder()?;
    let path = folder.path().join("a.pth");
    let model = load(fixture("protocol2.pth"))?.tensors();
    let leaves =
        vec![Value::Int(-3), Value::Int(1 << 40), Value::Float(0.1), Value::None, Value::Bool(false)];
    let tree = Value::Dict(vec![
        ("model".into(), Value::state_dict(model.clone())),
        ("rest".into(), Value::List(leaves)),
        ("text".into(), Value::Str("glass \u{e9}".into())),
    ]);
    save_pth(&path, &tree)?;
    let loaded = load(&path)?;
    for ((name, a), (other, b)) in model.iter().zip(loaded.tensors()) {
        assert_eq!((name, a.dtype(), a.shape()), (&other, b.dtype(), b.shape()));
        assert_eq!(values(a)?, values(&b)?, "{name}");
    }
    let text = |v: Option<&Value>| format!("{v:?}");
    assert_eq!(text(loaded.tree.get("rest")), text(tree.get("rest")));
    assert_eq!(text(loaded.tree.get("text")), text(tree.get("text")));
    let opaque = Value::Object { class: "a.b".into(), fields: Vec::new() };
    assert!(save_pth(&path, &opaque).is_err() && load(&path).is_ok());
    Ok(())
}

/// Name, dtype, shape and values, by bits.
type Content = (String, DType, Vec<usize>, Vec<u64>);

fn content(tensors: &[(String, Tensor)]) -> Result<Vec<Content>> {
    let bits = |t: &Tensor| Ok(values(t)?.into_iter().map(f64::to_bits).collect());
    tensors.iter().map(|(name, t)| Ok((name.clone(), t.dtype(), t.shape().to_vec(), bits(t)?))).collect()
}

fn tensors() -> Result<Vec<(String, Tensor)>> {
    let x = Tensor::randn([4, 3], &mut smalti::Rng::new(3))?;
    let dtypes = [DType::F32, DType::BF16, DType::I64, DType::U8];
    let mut all = dtypes
        .map(|dtype| Ok((format!("w.{dtype}"), x.to_dtype(dtype)?)))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    all.extend([
        ("empty".into(), Tensor::zeros([0, 3], DType::F32)?),
        ("scalar".into(), Tensor::scalar(2.5)),
    ]);
    Ok(all)
}

/// Flips every bit of a file in turn: an error or the same content. Gives the number of errors.
fn flip_every_bit<C: PartialEq>(path: &Path, read: impl Fn(&Path) -> Result<C>) -> Result<(usize, usize)> {
    let io = |e| Error::io(path, e);
    let mut bytes = std::fs::read(path).map_err(io)?;
    let expected = read(path)?;
    let (mut errors, bits) = (0, bytes.len() * 8);
    for bit in 0..bits {
        bytes[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(path, &bytes).map_err(io)?;
        match read(path) {
            Ok(got) => assert!(got == expected, "bit {bit} of {} changes the content", path.display()),
            Err(_) => errors += 1,
        }
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    Ok((errors, bits))
}

#[test]
fn a_flipped_bit_is_noticed_or_harmless() -> Result<()> {
    let folder = folder()?;
    let path = folder.path().join("a.pth");
    save_pth(&path, &Value::Dict(vec![("model".into(), Value::state_dict(tensors()?))]))?;
    // Many of a zip file's bits mean nothing: times, attributes, padding.
    let read = |path: &Path| content(&load(path)?.tensors());
    assert!(flip_every_bit(&path, read)?.0 > 5000);

    let path = folder.path().join("a.safetensors");
    save_safetensors(&path, &tensors()?, &[("recipe".into(), "a = 1".into())])?;
    let read = |path: &Path| {
        let loaded = load(path)?;
        Ok((content(&loaded.tensors())?, loaded.metadata["recipe"].clone()))
    };
    let (errors, bits) = flip_every_bit(&path, read)?;
    assert!(errors > bits * 9 / 10, "{errors} of {bits}");
    Ok(())
}

#[test]
fn a_flipped_bit_of_a_checkpoint_is_noticed_or_harmless() -> Result<()> {
    let model = |value: f32| -> Result<_> {
        let params = Params::new();
        params.param("w", Tensor::from_slice(&[value, 2.0, 3.0], [3])?)?;
        let optimizer = AdamW::default().over(&params.trained(), &[])?;
        Ok((params, optimizer))
    };
    let folder = folder()?;
    let path = folder.path().join("last.safetensors");
    let (params, mut optimizer) = model(1.0)?;
    let loss = params.all()[0].get().exp()?.sum(())?;
    optimizer.step(&loss.backward()?, 0.1)?;
    let progress =
        Progress { step: 17, rngs: [("data".into(), smalti::Rng::new(3))].into(), ..Default::default() };
    checkpoint::save(&path, &params, &[("main", &optimizer)], &progress)?;
    let (errors, bits) = flip_every_bit(&path, |path| {
        let (params, mut optimizer) = model(0.0)?;
        let progress = checkpoint::load(path, &params, &mut [("main", &mut optimizer)])?;
        let rng = progress.rngs["data"].state();
        Ok((content(&params.tensors())?, content(&optimizer.state())?, progress.step, progress.epoch, rng))
    })?;
    assert!(errors > bits * 9 / 10, "{errors} of {bits}");
    Ok(())
}

#[test]
fn damage_is_named() -> Result<()> {
    let folder = folder()?;
    let message = |path: &Path, needle: &[u8]| -> Result<String> {
        let io = |e| Error::io(path, e);
        let mut bytes = std::fs::read(path).map_err(io)?;
        let at =
            bytes.windows(needle.len()).position(|w| w == needle).expect("the needle stands in the file");
        bytes[at] ^= 4;
        std::fs::write(path, &bytes).map_err(io)?;
        Ok(load(path).map(|_| ()).unwrap_err().to_string())
    };
    let tensors =
        [("bias".to_owned(), Tensor::zeros([4], DType::F32)?), ("w".to_owned(), Tensor::scalar(2.5))];
    let (needle, zeros) = (2.5f32.to_le_bytes(), crc32fast::hash(&2.5f32.to_le_bytes()));
    let path = folder.path().join("a.pth");
    save_pth(&path, &Value::state_dict(tensors.clone()))?;
    let text = message(&path, &needle)?;
    let expected = format!("a.pth: zip entry data/1 is damaged: its CRC-32 should be {zeros:08x}, is ");
    assert!(text.contains(&expected), "{text}");
    let path = folder.path().join("a.safetensors");
    save_safetensors(&path, &tensors, &[("recipe".into(), "lr = 10".into())])?;
    let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let text = message(&path, &needle)?;
    assert!(text.contains("a.safetensors: tensor w is damaged: its CRC-32 should be "), "{text}");
    std::fs::write(&path, &bytes).map_err(|e| Error::io(&path, e))?;
    let text = message(&path, b"10\"")?;
    assert!(text.contains("the metadata is damaged"), "{text}");
    Ok(())
}

/// A header of 640 bytes makes a safetensors file begin with the two bytes of a pickle.
#[test]
fn a_safetensors_file_may_begin_like_a_pickle() -> Result<()> {
    let (folder, tensors) = (folder()?, tensors()?);
    let path = folder.path().join("x.safetensors");
    let mut met = false;
    for length in 0..1200 {
        let note = ("note".to_owned(), "x".repeat(length));
        save_safetensors(&path, &tensors[..1], &[note])?;
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        if bytes[..2] == [0x80, 2] {
            met = true;
            assert_eq!(content(&load(&path)?.tensors())?, content(&tensors[..1])?);
        }
    }
    assert!(met);
    Ok(())
}

#[test]
fn safetensors_of_others_have_no_checksums() -> Result<()> {
    let folder = folder()?;
    let path = folder.path().join("a.safetensors");
    let header = br#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  "#;
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header, &2.5f32.to_le_bytes()].concat();
    std::fs::write(&path, bytes).map_err(|e| Error::io(&path, e))?;
    assert_eq!(load(&path)?.tensors()[0].1.item()?, 2.5);
    Ok(())
}

/// The same zip file with `edit` done to its pickle, and fitting checksums: damage that gets as far as the parser.
fn with_pickle(bytes: &[u8], edit: impl Fn(&mut [u8])) -> Vec<u8> {
    let mut zip = zip::ZipArchive::new(Cursor::new(bytes)).unwrap();
    let mut out = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
    for i in 0..zip.len() {
        let mut entry = zip.by_index(i).unwrap();
        let name = String::from_utf8_lossy(entry.name_raw()).into_owned();
        let mut data = Vec::new();
        entry.read_to_end(&mut data).unwrap();
        if name.ends_with("data.pkl") {
            edit(&mut data);
        }
        out.start_file(name, options).unwrap();
        out.write_all(&data).unwrap();
    }
    out.finish().unwrap().into_inner()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    /// Damage gives an error or other values: no panic, no endless loop, no absurd memory. Half of the edits go to
    /// the pickle, behind the checksum's back.
    #[test]
    fn damaged_pth(
        protocol in 0..2,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), any::<u8>()), 1..5),
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let name = if protocol == 0 { "protocol2.pth" } else { "protocol5.pth" };
        let bytes = std::fs::read(fixture(name)).unwrap();
        let mut bytes = with_pickle(&bytes, |data| {
            for (at, _, value) in edits.iter().filter(|(_, pickle, _)| *pickle) {
                data[at.index(data.len())] = *value;
            }
        });
        for (at, _, value) in edits.iter().filter(|(_, pickle, _)| !pickle) {
            let n = bytes.len();
            bytes[at.index(n)] = *value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let folder = folder().unwrap();
        let path = folder.path().join("a.pth");
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(loaded) = load(&path) {
            for (_, t) in loaded.tree.tensors() {
                let _ = t.contiguous();
            }
        }
    }
}
