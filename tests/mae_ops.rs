//! The operations of masked autoencoders against the reference model's values: every `mae_*.safetensors` in
//! `models/goldens/` and in the folder of the environment variable `SMALTI_GOLDENS`. Tolerances are those of
//! `models/goldens/mae.md`.

use safetensors::{Dtype, SafeTensors};
use smalti::{DType, Error, PatchOrder, Result, Tensor};
use std::{collections::HashMap, path::Path};

#[test]
fn masking_patches_and_loss() -> Result<()> {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/goldens");
    let extra = std::env::var_os("SMALTI_GOLDENS").map(Into::into);
    let mut files = 0;
    for folder in [Some(shipped), extra].into_iter().flatten() {
        let entries = std::fs::read_dir(&folder).map_err(|e| Error::io(&folder, e))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with("mae_") && name.ends_with(".safetensors") {
                for dtype in [DType::F32, DType::F64] {
                    Golden::load(&path, dtype)?.check()?;
                }
                files += 1;
            }
        }
    }
    assert!(files > 0, "no reference values found");
    Ok(())
}

struct Golden {
    name: String,
    tensors: HashMap<String, Tensor>,
    patch: usize,
    norm_pix: bool,
    /// Added to the variance of a normalised target.
    eps: f64,
    dtype: DType,
}

impl Golden {
    fn load(path: &Path, dtype: DType) -> Result<Golden> {
        let bad = |what: String| Error::format(path, what);
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(e.to_string()))?;
        let config = header.metadata().as_ref().and_then(|m| m.get("config").cloned()).unwrap_or_default();
        let config: serde_json::Value = serde_json::from_str(&config).map_err(|e| bad(e.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(e.to_string()))?;
        let mut tensors = HashMap::new();
        for (name, view) in file.tensors() {
            let data = view.data();
            let tensor = match view.dtype() {
                Dtype::F32 => {
                    let values: Vec<f32> =
                        data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
                    Tensor::from_slice(&values, view.shape())?.to_dtype(dtype)?
                }
                Dtype::I64 => {
                    let values: Vec<i64> =
                        data.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b)).collect();
                    Tensor::from_slice(&values, view.shape())?
                }
                other => return Err(bad(format!("tensor `{name}` is {other:?}"))),
            };
            tensors.insert(name, tensor);
        }
        let patch = config["patch_size"].as_u64().ok_or_else(|| bad("no patch_size".into()))? as usize;
        let norm_pix = config["norm_pix_loss"].as_bool().ok_or_else(|| bad("no norm_pix_loss".into()))?;
        let eps = config["target_eps"].as_f64().unwrap_or(1e-6);
        Ok(Golden { name: path.display().to_string(), tensors, patch, norm_pix, eps, dtype })
    }

    fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::msg(format!("{}: no tensor `{name}`", self.name)))
    }

    /// `got` equals `expected` to `tolerance` (f32; 1e-6 in f64) of its largest magnitude.
    fn close(&self, what: &str, got: &Tensor, expected: &Tensor, tolerance: f64) -> Result<()> {
        assert_eq!(got.shape(), expected.shape(), "{}: {what}", self.name);
        let values = |t: &Tensor| t.to_dtype(DType::F64)?.to_vec::<f64>();
        let (a, b) = (values(got)?, values(expected)?);
        let tolerance = if self.dtype == DType::F64 { 1e-6 } else { tolerance };
        let scale = b.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        // NaN must not pass, so the deviation is folded by `total_cmp`'s order
        let worst = a.iter().zip(&b).map(|(a, b)| (a - b).abs() / scale).max_by(f64::total_cmp);
        let worst = worst.unwrap_or(0.0);
        println!("{} {} {what}: {worst:.1e}", self.name, self.dtype);
        assert!(worst <= tolerance, "{} {}: {what} is off by {worst:.1e}", self.name, self.dtype);
        Ok(())
    }

    fn check(&self) -> Result<()> {
        self.masking()?;
        self.patches()?;
        self.loss()
    }

    fn masking(&self) -> Result<()> {
        let keep = self.get("output.ids_keep")?;
        let (ids_keep, ids_restore, mask) = self.get("input.noise")?.random_masking_ids(keep.dim(1)?)?;
        assert_eq!(ids_keep.to_vec::<i64>()?, keep.to_vec::<i64>()?);
        assert_eq!(ids_restore.to_vec::<i64>()?, self.get("output.ids_restore")?.to_vec::<i64>()?);
        let expected = self.get("output.mask")?.to_dtype(DType::F32)?;
        assert_eq!(mask.to_vec::<f32>()?, expected.to_vec::<f32>()?);
        Ok(())
    }

    /// Embedding kept patches alone is the same as embedding all and gathering, and images come back.
    fn patches(&self) -> Result<()> {
        let (images, ids) = (self.get("input.imgs")?, self.get("output.ids_keep")?);
        let weight = self.get("weight.patch_embed.proj.weight")?;
        let columns = weight.numel() / weight.dim(0)?;
        let kept = images.patchify_kept(ids, self.patch, PatchOrder::ChannelFirst)?;
        let embedded = kept
            .matmul(&weight.reshape([weight.dim(0)?, columns])?.t()?)?
            .add(self.get("weight.patch_embed.proj.bias")?)?;
        let expected = self.get("output.patch_embed")?.gather_tokens(ids)?;
        self.close("embedding of kept patches", &embedded, &expected, 6e-6)?;
        let [_, _, h, w] = images.dims("images")?;
        let pred = self.get("output.pred")?;
        let grid = [h / self.patch, w / self.patch];
        let image = pred.unpatchify(self.patch, grid, PatchOrder::ChannelLast)?;
        self.close("reconstruction", &image, self.get("output.reconstruction")?, 0.0)
    }

    fn loss(&self) -> Result<()> {
        let (images, mask) = (self.get("input.imgs")?, self.get("output.mask")?);
        let pred = self.get("output.pred")?.requires_grad();
        let loss = |mask: &Tensor, norm_pix: bool| {
            pred.masked_patch_loss(images, mask, self.patch, norm_pix.then_some(self.eps))
        };
        self.close("normalised loss", &loss(mask, true)?, self.get("output.loss_norm_pix")?, 5e-6)?;
        self.close("raw loss", &loss(mask, false)?, self.get("output.loss_raw_pix")?, 5e-6)?;

        let mut each = Vec::new();
        for i in 0..mask.numel() {
            let one = Tensor::arange(mask.numel(), DType::I64)?.reshape(mask.shape())?;
            let one = one.eq(&Tensor::full((), i as f64, DType::I64)?)?;
            each.push(loss(&one, self.norm_pix)?);
        }
        let each = Tensor::stack(&each, 0)?.reshape(mask.shape())?;
        self.close("loss per patch", &each, self.get("output.loss_per_patch")?, 5e-6)?;

        let grads = loss(mask, self.norm_pix)?.backward()?;
        let grad = grads.get(&pred).ok_or_else(|| Error::msg("no gradient"))?;
        let count = mask.sum(())?.item()? * pred.dim(2)? as f64;
        let expected = pred.sub(self.get("output.target")?)?.mul(&mask.unsqueeze(2)?)?;
        self.close("gradient", grad, &expected.mul_scalar(2.0 / count)?, 5e-5)?;
        let bias = self.get("grad.decoder_pred.bias")?;
        self.close("gradient of the prediction's bias", &grad.sum([0, 1])?, bias, 1e-5)
    }
}
