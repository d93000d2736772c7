//! The operations of the comparison, by the family before the slash of a work's name.

use crate::measure::{Case, Timer};
use serde_json::{Value, json};
use smalti::{
    CrossEntropy, DType, Error, InterpolateOptions, Interpolation, OutputSize, PatchOrder, Result, Rng,
    RoiAlignOptions, Tensor,
    nn::Param,
    optim::{self, Algorithm, Optimizer},
};

/// Memory of all sets of inputs together, bytes: several times the L2 cache where the work is small.
const ROTATE: usize = 256 << 20;
const MOST_SETS: usize = 4;

/// Inputs for one set.
struct Make<'a> {
    shape: &'a Value,
    rng: Rng,
    dtype: DType,
}

impl Make<'_> {
    /// A number of the work's shape.
    fn size(&self, key: &str) -> Result<usize> {
        let found = self.shape[key]
            .as_u64()
            .ok_or_else(|| Error::msg(format!("the shape {} has no {key}", self.shape)))?;
        Ok(found as usize)
    }

    fn sizes<const N: usize>(&self, keys: [&str; N]) -> Result<[usize; N]> {
        let mut found = [0; N];
        for (size, key) in found.iter_mut().zip(keys) {
            *size = self.size(key)?;
        }
        Ok(found)
    }

    fn randn(&mut self, shape: &[usize], scale: f64) -> Result<Tensor> {
        Tensor::randn(shape, &mut self.rng)?.mul_scalar(scale)?.to_dtype(self.dtype)
    }

    fn leaf(&mut self, shape: &[usize], scale: f64) -> Result<Tensor> {
        Ok(self.randn(shape, scale)?.requires_grad())
    }

    fn rand(&mut self, shape: &[usize]) -> Result<Tensor> {
        Tensor::rand(shape, &mut self.rng)
    }

    /// Rows of length 1.
    fn unit(&mut self, rows: usize, dim: usize) -> Result<Tensor> {
        Tensor::randn([rows, dim], &mut self.rng)?.normalize(2.0, 1, 1e-12)?.to_dtype(self.dtype)
    }
}

/// A family: its dtype and how to make a set of inputs.
type Build = fn(&mut Make) -> Result<Case>;

fn family(name: &str) -> Option<(DType, Build)> {
    let (bf16, f32) = (DType::BF16, DType::F32);
    Some(match name {
        "window-attn" | "global-attn" => (bf16, window_attention as Build),
        "attn" => (bf16, attention),
        "mae-gather" => (bf16, mae_gather),
        "mae-unshuffle" => (bf16, unshuffle),
        "norm-pix-loss" => (bf16, norm_pix_loss),
        "patch-embed" => (bf16, patch_embed),
        "clip-loss" => (bf16, clip_loss),
        "moco-loss" => (bf16, moco_loss),
        "layer-norm" => (bf16, layer_norm),
        "add-layer-norm" => (bf16, add_layer_norm),
        "linear-gelu" => (bf16, linear_gelu),
        "batch-norm" => (bf16, batch_norm),
        "cross-entropy" => (bf16, cross_entropy),
        "roi-align" => (f32, roi_align),
        "nms" => (f32, boxes_nms),
        "bilinear" => (bf16, bilinear),
        "bicubic" => (f32, bicubic),
        _ => return None,
    })
}

/// The lines of one work, without its name and shape.
pub fn run(timer: &Timer, name: &str, shape: &Value) -> Result<Vec<Value>> {
    let kind = name.split('/').next().unwrap_or(name);
    if let "adamw" | "ema" = kind {
        return update(timer, kind == "adamw", shape);
    }
    let (dtype, build) =
        family(kind).ok_or_else(|| Error::msg(format!("smalti has no work named {name}")))?;
    let make = |set: usize| build(&mut Make { shape, rng: Rng::new(set as u64 + 1), dtype });
    let first = make(0)?;
    let bytes: usize = first.leaves.iter().map(|t| t.numel() * t.dtype().size()).sum();
    let mut cases = vec![first];
    while cases.len() < MOST_SETS && bytes * cases.len() < ROTATE {
        cases.push(make(cases.len())?);
    }
    let lines = timer.directions(&cases)?;
    Ok(lines
        .into_iter()
        .map(|(direction, mut fields)| {
            fields.insert("direction".into(), json!(direction));
            fields.insert("dtype".into(), json!(dtype.to_string()));
            Value::Object(fields)
        })
        .collect())
}

fn one(y: Result<Tensor>) -> Result<Vec<Tensor>> {
    Ok(vec![y?])
}

fn window_attention(make: &mut Make) -> Result<Case> {
    let [b, grid, window, heads, d] = make.sizes(["batch", "grid", "window", "heads", "dim"])?;
    let qkv = make.leaf(&[b, grid, grid, 3, heads, d], 1.0)?;
    let bias = make.leaf(&[3, heads, d], 0.5)?;
    let (rows, columns) = (make.leaf(&[2 * window - 1, d], 0.1)?, make.leaf(&[2 * window - 1, d], 0.1)?);
    let leaves = vec![qkv.clone(), bias.clone(), rows.clone(), columns.clone()];
    let window = (window < grid).then_some(window);
    let forward = move || one(qkv.window_attention(window, Some((&rows, &columns)), Some(&bias), None));
    Ok(Case { leaves, forward: Box::new(forward) })
}

fn attention(make: &mut Make) -> Result<Case> {
    let [b, s, heads, d] = make.sizes(["batch", "seq", "heads", "dim"])?;
    let causal = make.shape["causal"].as_bool().unwrap_or(false);
    let qkv = make.leaf(&[b, s, 3, heads, d], 1.0)?;
    Ok(Case { leaves: vec![qkv.clone()], forward: Box::new(move || one(qkv.attention(causal, None))) })
}

fn mae_gather(make: &mut Make) -> Result<Case> {
    let [n, tokens, keep, dim] = make.sizes(["batch", "tokens", "keep", "dim"])?;
    let (x, cls) = (make.leaf(&[n, tokens, dim], 1.0)?, make.leaf(&[1, 1, dim], 1.0)?);
    let pos = make.randn(&[tokens + 1, dim], 1.0)?;
    let noise = make.rand(&[n, tokens])?;
    let leaves = vec![x.clone(), cls.clone()];
    let forward = move || {
        let (ids, restore, mask) = noise.random_masking_ids(keep)?;
        let kept = x.gather_tokens_add(&pos.narrow(0, 1, tokens)?, &ids)?;
        let first = cls.add(&pos.narrow(0, 0, 1)?)?.expand([n, 1, dim])?;
        Ok(vec![Tensor::cat(&[first, kept], 1)?, mask, restore])
    };
    Ok(Case { leaves, forward: Box::new(forward) })
}

fn unshuffle(make: &mut Make) -> Result<Case> {
    let [n, tokens, keep, dim] = make.sizes(["batch", "tokens", "keep", "dim"])?;
    let (x, token) = (make.leaf(&[n, keep + 1, dim], 1.0)?, make.leaf(&[dim], 1.0)?);
    let pos = make.randn(&[tokens + 1, dim], 1.0)?;
    let (_, restore, _) = make.rand(&[n, tokens])?.random_masking_ids(keep)?;
    let leaves = vec![x.clone(), token.clone()];
    Ok(Case { leaves, forward: Box::new(move || one(x.unshuffle(&token, &restore, &pos))) })
}

fn norm_pix_loss(make: &mut Make) -> Result<Case> {
    let [n, tokens, dim] = make.sizes(["batch", "tokens", "dim"])?;
    // patches of one channel, side by side in one row: `dim` pixels each
    let side = (1..).find(|s| 3 * s * s >= dim).unwrap_or(1);
    let channels = dim / (side * side);
    let pred = make.leaf(&[n, tokens, dim], 1.0)?;
    let images = make.randn(&[n, channels, side, side * tokens], 1.0)?;
    let (_, _, mask) = make.rand(&[n, tokens])?.random_masking_ids((tokens / 4).max(1))?;
    let leaves = vec![pred.clone()];
    let forward = move || one(pred.masked_patch_loss(&images, &mask, side, Some(1e-6)));
    Ok(Case { leaves, forward: Box::new(forward) })
}

fn patch_embed(make: &mut Make) -> Result<Case> {
    let [n, image, p, keep, dim] = make.sizes(["batch", "image", "patch", "keep", "dim"])?;
    let images = make.randn(&[n, 3, image, image], 1.0)?;
    let (weight, bias) = (make.leaf(&[dim, 3 * p * p], 0.03)?, make.leaf(&[dim], 1.0)?);
    let (ids, _, _) = make.rand(&[n, (image / p) * (image / p)])?.random_masking_ids(keep)?;
    let leaves = vec![weight.clone(), bias.clone()];
    let forward =
        move || one(images.patchify_kept(&ids, p, PatchOrder::ChannelFirst)?.linear(&weight, Some(&bias)));
    Ok(Case { leaves, forward: Box::new(forward) })
}

fn clip_loss(make: &mut Make) -> Result<Case> {
    let [n, dim] = make.sizes(["n", "dim"])?;
    let image = make.unit(n, dim)?;
    let near = image.mul_scalar(0.5)?.add(&make.unit(n, dim)?)?;
    let text = near.to_dtype(DType::F32)?.normalize(2.0, 1, 1e-12)?.to_dtype(make.dtype)?;
    let scale = Tensor::full((), 1.0 / 0.07, DType::F32)?.requires_grad();
    let (image, text) = (image.requires_grad(), text.requires_grad());
    let leaves = vec![image.clone(), text.clone(), scale.clone()];
    Ok(Case { leaves, forward: Box::new(move || one(image.contrastive_loss(&text, &scale))) })
}

fn moco_loss(make: &mut Make) -> Result<Case> {
    let [n, queue, dim] = make.sizes(["n", "queue", "dim"])?;
    let query = make.unit(n, dim)?.requires_grad();
    let (key, queue) = (make.unit(n, dim)?, make.unit(queue, dim)?.t()?.contiguous()?);
    let leaves = vec![query.clone()];
    let forward = move || Ok(vec![query.info_nce(&key, &queue, 0.2)?.loss]);
    Ok(Case { leaves, forward: Box::new(forward) })
}

fn layer_norm(make: &mut Make) -> Result<Case> {
    let [rows, dim] = make.sizes(["rows", "dim"])?;
    let (x, w, b) = (make.leaf(&[rows, dim], 1.0)?, make.leaf(&[dim], 1.0)?, make.leaf(&[dim], 1.0)?);
    let leaves = vec![x.clone(), w.clone(), b.clone()];
    Ok(Case { leaves, forward: Box::new(move || one(x.layer_norm([dim], Some(&w), Some(&b), 1e-6))) })
}

fn add_layer_norm(make: &mut Make) -> Result<Case> {
    let [rows, dim] = make.sizes(["rows", "dim"])?;
    let (x, y) = (make.leaf(&[rows, dim], 1.0)?, make.leaf(&[rows, dim], 1.0)?);
    let (w, b) = (make.leaf(&[dim], 1.0)?, make.leaf(&[dim], 1.0)?);
    let leaves = vec![x.clone(), y.clone(), w.clone(), b.clone()];
    let forward = move || {
        let (sum, norm) = x.add_layer_norm(&y, [dim], Some(&w), Some(&b), 1e-6)?;
        Ok(vec![norm, sum])
    };
    Ok(Case { leaves, forward: Box::new(forward) })
}

fn linear_gelu(make: &mut Make) -> Result<Case> {
    let [rows, dim, out] = make.sizes(["rows", "dim", "out"])?;
    let x = make.leaf(&[rows, dim], 1.0)?;
    let (w, b) = (make.leaf(&[out, dim], (dim as f64).powf(-0.5))?, make.leaf(&[out], 1.0)?);
    let leaves = vec![x.clone(), w.clone(), b.clone()];
    Ok(Case { leaves, forward: Box::new(move || one(x.linear_gelu(&w, &b))) })
}

fn batch_norm(make: &mut Make) -> Result<Case> {
    let [n, c, side] = make.sizes(["batch", "channels", "size"])?;
    let x = make.randn(&[n, c, side, side], 1.0)?.to_channels_last()?.requires_grad();
    let (w, b) = (make.leaf(&[c], 1.0)?, make.leaf(&[c], 1.0)?);
    let (mean, var) = (make.rand(&[c])?, make.rand(&[c])?);
    let leaves = vec![x.clone(), w.clone(), b.clone()];
    let forward = move || Ok(vec![x.batch_norm(Some((&mean, &var)), Some(&w), Some(&b), true, 0.1, 1e-5)?.0]);
    Ok(Case { leaves, forward: Box::new(forward) })
}

fn cross_entropy(make: &mut Make) -> Result<Case> {
    let [rows, classes] = make.sizes(["rows", "classes"])?;
    let x = make.leaf(&[rows, classes], 1.0)?;
    let labels = make.rand(&[rows])?.mul_scalar(classes as f64)?.to_dtype(DType::I64)?;
    let leaves = vec![x.clone()];
    Ok(Case { leaves, forward: Box::new(move || one(x.cross_entropy(&labels, &CrossEntropy::default()))) })
}

fn roi_align(make: &mut Make) -> Result<Case> {
    let [b, c, side, count, out] = make.sizes(["batch", "channels", "size", "boxes", "out"])?;
    let x = make.leaf(&[b, c, side, side], 1.0)?;
    let corner = make.rand(&[count, 2])?.mul_scalar(side as f64 * 3.5)?;
    let far = make.rand(&[count, 2])?.affine(96.0, 16.0)?.add(&corner)?;
    let image = make.rand(&[count, 1])?.mul_scalar(b as f64)?.to_dtype(DType::I64)?.to_dtype(DType::F32)?;
    let boxes = Tensor::cat(&[image, corner, far], 1)?;
    let leaves = vec![x.clone()];
    let options =
        RoiAlignOptions { output_size: [out, out], spatial_scale: 0.25, sampling_ratio: 0, aligned: true };
    Ok(Case { leaves, forward: Box::new(move || one(x.roi_align(&boxes, &options))) })
}

fn boxes_nms(make: &mut Make) -> Result<Case> {
    let count = make.size("boxes")?;
    let corner = make.rand(&[count, 2])?.mul_scalar(900.0)?;
    let far = make.rand(&[count, 2])?.affine(120.0, 4.0)?.add(&corner)?;
    let (boxes, scores) = (Tensor::cat(&[corner, far], 1)?, make.rand(&[count])?);
    Ok(Case { leaves: Vec::new(), forward: Box::new(move || one(boxes.nms(&scores, 0.5))) })
}

fn resize(make: &mut Make, mode: Interpolation, antialias: bool) -> Result<Case> {
    let [b, c, side, out] = make.sizes(["batch", "channels", "size", "out"])?;
    let x = make.leaf(&[b, c, side, side], 1.0)?;
    let options = InterpolateOptions { mode, antialias, ..Default::default() };
    let leaves = vec![x.clone()];
    let forward = move || one(x.interpolate(OutputSize::Pixels([out, out]), &options));
    Ok(Case { leaves, forward: Box::new(forward) })
}

fn bilinear(make: &mut Make) -> Result<Case> {
    resize(make, Interpolation::Bilinear, false)
}

fn bicubic(make: &mut Make) -> Result<Case> {
    resize(make, Interpolation::Bicubic, true)
}

/// One update of all weights.
fn update(timer: &Timer, adamw: bool, shape: &Value) -> Result<Vec<Value>> {
    let mut make = Make { shape, rng: Rng::new(1), dtype: DType::F32 };
    let [count, rows, columns] = make.sizes(["tensors", "rows", "cols"])?;
    let params: Vec<Param> = (0..count)
        .map(|i| Ok(Param::new(&format!("weight{i}"), make.randn(&[rows, columns], 1.0)?)))
        .collect::<Result<_>>()?;
    let mut fields = if adamw {
        let loss = params.iter().map(|p| p.get().sum(())).reduce(|a, b| a?.add(&b?));
        let grads = loss.ok_or_else(|| Error::msg("no tensors"))??.backward()?;
        let optimizer = std::cell::RefCell::new(optim::AdamW::default().over(&params, &[])?);
        timer.time(&[()], |()| optimizer.borrow_mut().step(&grads, 1e-4))?
    } else {
        let average = std::cell::RefCell::new(optim::Ema::new(&params, 0.999, false)?);
        timer.time(&[()], |()| average.borrow_mut().update())?
    };
    fields.insert("direction".into(), json!("step"));
    fields.insert("dtype".into(), json!("f32"));
    Ok(vec![Value::Object(fields)])
}
