//! Files of real PyTorch (tests/fixtures, made by make_pth.py there), round trips, and damaged files.

use proptest::prelude::*;
use smalti::{
    DType, Error, Result, Tensor,
    io::{Loaded, Value, load, save_pth},
};
use std::{collections::BTreeMap, path::PathBuf};

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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]
    /// Damage gives an error or other values: no panic, no endless loop, no absurd memory. Most edits go to the
    /// pickle, which lies at the start.
    #[test]
    fn damaged_pth(
        protocol in 0..2,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>(), any::<u8>()), 1..5),
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let name = if protocol == 0 { "protocol2.pth" } else { "protocol5.pth" };
        let mut bytes = std::fs::read(fixture(name)).unwrap();
        for (at, pickle, value) in edits {
            let n = if pickle { 1600 } else { bytes.len() };
            bytes[at.index(n)] = value;
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
