//! burn's side of the comparison, on its `flex` backend: the CPU backend burn recommends.
#![recursion_limit = "256"]

#[path = "../../worker.rs"]
mod worker;

use burn::module::{Module, Param, ParamGroup};
use burn::nn::{LayerNorm, LayerNormConfig, Linear};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::ops::{AttentionModuleOptions, ConvOptions};
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData, activation, module};
use worker::shapes::{self, BATCH, DECODER, ENCODER, KEEP, PATCH, PATCHES, PIXELS, SIDE};
use worker::{Outputs, Result, Variant, fill, mean_square, serve, sizes, variant};

/// On the plain device, or on the one that records for backward.
fn tensor<const D: usize>(shape: [usize; D], seed: u32, scale: f64, mean: f64, d: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(fill(shape.iter().product(), seed, scale, mean), shape), d)
}

type Check = Box<dyn FnOnce() -> Result<f64>>;

fn check<const D: usize>(t: Tensor<D>) -> Check {
    Box::new(move || Ok(mean_square(&t.into_data().try_to_vec::<f32>().map_err(|e| format!("{e:?}"))?)))
}

fn gradient<const D: usize>(leaf: &Tensor<D>, grads: &Gradients) -> Result<Check> {
    Ok(check(leaf.grad(grads).ok_or("a gradient is missing")?))
}

fn outputs(all: Vec<Check>) -> Outputs {
    Box::new(move || all.into_iter().map(|square| square()).collect())
}

/// Forward only.
fn forward<const D: usize>(name: &'static str, d: &Device, f: impl Fn() -> Tensor<D> + 'static) -> Variant {
    let d = d.clone();
    variant(name, move || {
        let y = f();
        d.sync().map_err(|e| format!("{e:?}"))?;
        Ok(outputs(vec![check(y)]))
    })
}

/// Forward and backward. `backward` starts from ones only: the gradient `dy` enters as the loss sum(y * dy).
/// `leaves` gives the gradients that the case asks for.
fn backward<const D: usize>(
    name: &'static str,
    dy: Tensor<D>,
    f: impl Fn() -> Tensor<D> + 'static,
    leaves: impl Fn(&Gradients) -> Result<Vec<Check>> + 'static,
) -> Variant {
    variant(name, move || {
        let y = f();
        let grads = (y.clone() * dy.clone()).sum().backward();
        let mut all = vec![check(y)];
        all.extend(leaves(&grads)?);
        dy.device().sync().map_err(|e| format!("{e:?}"))?;
        Ok(outputs(all))
    })
}

// ---- ViT block

#[derive(Clone, Copy)]
enum Attention {
    Composed,
    Module,
}

fn attention(kind: Attention, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    match kind {
        Attention::Composed => {
            let scale = (q.dims()[3] as f64).powf(-0.5);
            activation::softmax((q * scale).matmul(k.swap_dims(2, 3)), 3).matmul(v)
        }
        Attention::Module => module::attention(q, k, v, None, None, AttentionModuleOptions::default()),
    }
}

/// Gives a model its parameters one after the other, in the order of `shapes`, as every other worker has them.
struct Fill<'a> {
    seed: u32,
    device: &'a Device,
}

impl Fill<'_> {
    fn next<const D: usize>(&mut self, (shape, scale, mean): &shapes::Parameter) -> Tensor<D> {
        self.seed += 1;
        let shape: [usize; D] = std::array::from_fn(|i| shape[i]);
        tensor(shape, self.seed - 1, *scale, *mean, self.device)
    }

    fn linear(&mut self, out: usize, inp: usize) -> Linear {
        let [w, b] = shapes::linear(out, inp);
        // burn keeps [in, out]; through data, so that the parameter is contiguous in that order.
        let w = self.next::<2>(&w).transpose().into_data();
        let weight = Param::from_tensor(Tensor::from_data(w, self.device));
        Linear { weight, bias: Some(Param::from_tensor(self.next(&b))) }
    }

    fn norm(&mut self, width: usize) -> LayerNorm {
        let [w, b] = shapes::norm(width);
        let mut norm = LayerNormConfig::new(width).with_epsilon(1e-6).init(self.device);
        norm.gamma = Param::from_tensor(self.next(&w));
        norm.beta = Some(Param::from_tensor(self.next(&b)));
        norm
    }
}

#[derive(Module, Debug)]
struct Block {
    norm1: LayerNorm,
    qkv: Linear,
    proj: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Block {
    fn new(fill: &mut Fill, c: usize) -> Self {
        Self {
            norm1: fill.norm(c),
            qkv: fill.linear(3 * c, c),
            proj: fill.linear(c, c),
            norm2: fill.norm(c),
            fc1: fill.linear(4 * c, c),
            fc2: fill.linear(c, 4 * c),
        }
    }

    fn forward(&self, x: Tensor<3>, heads: usize, kind: Attention) -> Tensor<3> {
        let [n, t, c] = x.dims();
        let qkv = self.qkv.forward(self.norm1.forward(x.clone())).reshape([n, t, 3, heads, c / heads]);
        let qkv = qkv.permute([2, 0, 3, 1, 4]);
        let part = |i: usize| qkv.clone().narrow(0, i, 1).reshape([n, heads, t, c / heads]);
        let o = attention(kind, part(0), part(1), part(2)).swap_dims(1, 2).reshape([n, t, c]);
        let x = x + self.proj.forward(o);
        let h = activation::gelu(self.fc1.forward(self.norm2.forward(x.clone())));
        x + self.fc2.forward(h)
    }

    fn gradients(&self, grads: &Gradients) -> Result<Vec<Check>> {
        let one = |p: &Param<Tensor<1>>| gradient(&p.val(), grads);
        let norm =
            |n: &LayerNorm| Ok::<_, worker::Error>([one(&n.gamma)?, one(n.beta.as_ref().ok_or("no bias")?)?]);
        let linear = |l: &Linear| {
            Ok::<_, worker::Error>([
                gradient(&l.weight.val(), grads)?,
                one(l.bias.as_ref().ok_or("no bias")?)?,
            ])
        };
        let all = [
            norm(&self.norm1)?,
            linear(&self.qkv)?,
            linear(&self.proj)?,
            norm(&self.norm2)?,
            linear(&self.fc1)?,
            linear(&self.fc2)?,
        ];
        Ok(all.into_iter().flatten().collect())
    }
}

// ---- MAE

#[derive(Module, Debug)]
struct Mae {
    cls_token: Param<Tensor<3>>,
    mask_token: Param<Tensor<3>>,
    patch_weight: Param<Tensor<4>>,
    patch_bias: Param<Tensor<1>>,
    blocks: Vec<Block>,
    norm: LayerNorm,
    decoder_embed: Linear,
    decoder_blocks: Vec<Block>,
    decoder_norm: LayerNorm,
    decoder_pred: Linear,
}

impl Mae {
    fn new(d: &Device) -> Self {
        let ((w, depth, _), (dw, d_depth, _)) = (ENCODER, DECODER);
        let fill = &mut Fill { seed: 100, device: d };
        let [patch_w, patch_b] = shapes::linear(w, PIXELS);
        let parameters = shapes::mae();
        Self {
            cls_token: Param::from_tensor(fill.next(&parameters[0])),
            mask_token: Param::from_tensor(fill.next(&parameters[1])),
            patch_weight: Param::from_tensor(fill.next::<2>(&patch_w).reshape([w, 3, PATCH, PATCH])),
            patch_bias: Param::from_tensor(fill.next(&patch_b)),
            blocks: (0..depth).map(|_| Block::new(fill, w)).collect(),
            norm: fill.norm(w),
            decoder_embed: fill.linear(dw, w),
            decoder_blocks: (0..d_depth).map(|_| Block::new(fill, dw)).collect(),
            decoder_norm: fill.norm(dw),
            decoder_pred: fill.linear(PIXELS, dw),
        }
    }

    /// The loss of the official MAE, norm_pix_loss.
    fn loss(
        &self,
        imgs: Tensor<4>,
        noise: Tensor<2>,
        pos: Tensor<3>,
        d_pos: Tensor<3>,
        kind: Attention,
    ) -> Tensor<1> {
        let ((w, _, heads), (dw, _, d_heads)) = (ENCODER, DECODER);
        let index = |ids: Tensor<2, Int>, width: usize| ids.unsqueeze_dim::<3>(2).repeat_dim(2, width);
        let stride = ConvOptions::new([PATCH, PATCH], [0, 0], [1, 1], 1);
        let x = module::conv2d(imgs.clone(), self.patch_weight.val(), Some(self.patch_bias.val()), stride);
        let x = x.reshape([BATCH, w, PATCHES]).swap_dims(1, 2) + pos.clone().narrow(1, 1, PATCHES);
        let shuffle = noise.clone().argsort(1);
        let restore = shuffle.clone().argsort(1);
        let x = x.gather(1, index(shuffle.narrow(1, 0, KEEP), w));
        let kept = noise.zeros_like();
        let mask =
            Tensor::cat(vec![kept.clone().narrow(1, 0, KEEP), kept.narrow(1, KEEP, PATCHES - KEEP) + 1.0], 1);
        let mask = mask.gather(1, restore.clone());

        let cls = (self.cls_token.val() + pos.narrow(1, 0, 1)).repeat_dim(0, BATCH);
        let x = Tensor::cat(vec![cls, x], 1);
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, heads, kind));
        let x = self.decoder_embed.forward(self.norm.forward(x));

        let hidden = self.mask_token.val().repeat(&[BATCH, PATCHES - KEEP, 1]);
        let tokens = Tensor::cat(vec![x.clone().narrow(1, 1, KEEP), hidden], 1).gather(1, index(restore, dw));
        let x = Tensor::cat(vec![x.narrow(1, 0, 1), tokens], 1) + d_pos;
        let x = self.decoder_blocks.iter().fold(x, |x, block| block.forward(x, d_heads, kind));
        let pred = self.decoder_pred.forward(self.decoder_norm.forward(x)).narrow(1, 1, PATCHES);

        let g = SIDE / PATCH;
        let target = imgs.reshape([BATCH, 3, g, PATCH, g, PATCH]).permute([0, 2, 4, 3, 5, 1]);
        let target: Tensor<3> = target.reshape([BATCH, PATCHES, PIXELS]);
        let (var, mean) = target.clone().var_mean(2);
        let target = (target - mean) / (var + 1e-6).sqrt();
        let loss = (pred - target).square().mean_dim(2).reshape([BATCH, PATCHES]);
        (loss * mask.clone()).sum() / mask.sum()
    }
}

fn mae_step(name: &'static str, kind: Attention, d: &Device) -> Variant {
    let mut model = Some(Mae::new(d));
    let adamw = |decay| AdamWConfig::new().with_beta_2(0.95).with_epsilon(1e-8).with_weight_decay(decay);
    let plain = ParamGroup::from_any_predicates(vec!["bias", "gamma", "beta"]);
    let mut optimizer = adamw(0.05).init().with_group(plain, adamw(0.0).build(), None);
    let pos = tensor([1, 1 + PATCHES, ENCODER.0], 5, 1.0, 0.0, d);
    let d_pos = tensor([1, 1 + PATCHES, DECODER.0], 6, 1.0, 0.0, d);
    let imgs = tensor([BATCH, 3, SIDE, SIDE], 7, 1.7, 0.0, d);
    let noise = tensor([BATCH, PATCHES], 8, 1.0, 0.0, d);
    variant(name, move || {
        let m = model.take().ok_or("an earlier step failed")?;
        let loss = m.loss(imgs.clone(), noise.clone(), pos.clone(), d_pos.clone(), kind);
        let grads = GradientsParams::from_grads(loss.backward(), &m);
        model = Some(optimizer.step(1e-4, m, grads));
        imgs.device().sync().map_err(|e| format!("{e:?}"))?;
        Ok(outputs(vec![check(loss)]))
    })
}

// ---- cases

const X: [usize; 3] = [8, 197, 768];

fn cases(name: &str, plain: &Device, recording: &Device) -> Result<Option<Vec<Variant>>> {
    let (d, ad) = (plain, recording);
    let kind = name.split('/').next().unwrap_or(name);
    let kinds = [("composed", Attention::Composed), ("module::attention", Attention::Module)];
    Ok(Some(match (kind, name) {
        ("matmul", _) => {
            let [m, k, n] = sizes(name)?;
            let (a, b) = (tensor([m, k], 1, 1.0, 0.0, d), tensor([k, n], 2, 1.0, 0.0, d));
            vec![forward("matmul", d, move || a.clone().matmul(b.clone()))]
        }
        ("qk", _) => {
            let shape = sizes::<4>(name)?;
            let (q, k) = (tensor(shape, 1, 1.0, 0.0, d), tensor(shape, 2, 1.0, 0.0, d));
            vec![forward("matmul", d, move || q.clone().matmul(k.clone().swap_dims(2, 3)))]
        }
        ("av", _) => {
            let [b, h, t, e] = sizes(name)?;
            let (a, v) = (tensor([b, h, t, t], 1, 1.0, 0.0, d), tensor([b, h, t, e], 2, 1.0, 0.0, d));
            vec![forward("matmul", d, move || a.clone().matmul(v.clone()))]
        }
        ("layer_norm", _) => {
            let recorded = name.ends_with("backward");
            let d = if recorded { ad } else { d };
            let x = tensor(X, 1, 2.0, 0.0, d);
            let (w, b) = (tensor([X[2]], 2, 0.1, 1.0, d), tensor([X[2]], 3, 0.1, 0.0, d));
            if recorded {
                let (x, w, b) = (x.require_grad(), w.require_grad(), b.require_grad());
                let (xs, ws, bs) = (x.clone(), w.clone(), b.clone());
                let f = move || module::layer_norm(x.clone(), w.clone(), Some(b.clone()), 1e-6);
                let leaves =
                    move |g: &Gradients| Ok(vec![gradient(&xs, g)?, gradient(&ws, g)?, gradient(&bs, g)?]);
                vec![backward("layer_norm", tensor(X, 9, 1.0, 0.0, ad), f, leaves)]
            } else {
                let f = move || module::layer_norm(x.clone(), w.clone(), Some(b.clone()), 1e-6);
                vec![forward("layer_norm", d, f)]
            }
        }
        ("softmax", _) => vec![elementwise("softmax", name, 4.0, d, ad, |x| activation::softmax(x, 2))],
        ("gelu", _) => vec![elementwise("gelu", name, 3.0, d, ad, activation::gelu)],
        ("attention", _) => {
            let shape = sizes::<4>(name)?;
            let one = |(name, kind)| {
                let qkv = [1, 2, 3].map(|seed| tensor(shape, seed, 2.0, 0.0, ad).require_grad());
                let leaves = qkv.clone();
                let f = move || attention(kind, qkv[0].clone(), qkv[1].clone(), qkv[2].clone());
                let leaves = move |g: &Gradients| leaves.iter().map(|leaf| gradient(leaf, g)).collect();
                backward(name, tensor(shape, 9, 1.0, 0.0, ad), f, leaves)
            };
            kinds.map(one).into()
        }
        ("conv2d", _) => {
            let groups: usize = name.trim_start_matches("conv2d/groups").parse()?;
            let shape = [8, 64, 56, 56];
            let x = tensor(shape, 1, 1.0, 0.0, ad).require_grad();
            let w = tensor([64, 64 / groups, 3, 3], 2, 0.1, 0.0, ad).require_grad();
            let (xs, ws) = (x.clone(), w.clone());
            let options = move || ConvOptions::new([1, 1], [1, 1], [1, 1], groups);
            let f = move || module::conv2d(x.clone(), w.clone(), None, options());
            let leaves = move |g: &Gradients| Ok(vec![gradient(&xs, g)?, gradient(&ws, g)?]);
            vec![backward("conv2d", tensor(shape, 9, 1.0, 0.0, ad), f, leaves)]
        }
        (_, "vit_block") => {
            let one = |(name, kind)| {
                let block = Block::new(&mut Fill { seed: 10, device: ad }, X[2]);
                let x = tensor(X, 1, 1.0, 0.0, ad).require_grad();
                let (leaves, leaf) = (block.clone(), x.clone());
                let f = move || block.forward(x.clone(), 12, kind);
                let leaves = move |g: &Gradients| {
                    let mut all = vec![gradient(&leaf, g)?];
                    all.extend(leaves.gradients(g)?);
                    Ok(all)
                };
                backward(name, tensor(X, 9, 1.0, 0.0, ad), f, leaves)
            };
            kinds.map(one).into()
        }
        // One variant: two models with their moments would not leave the other workers enough memory.
        (_, "mae_step") => vec![mae_step("composed", Attention::Composed, ad)],
        _ => return Ok(None),
    }))
}

/// A function of one [8, 197, 768] tensor, forward or forward and backward as the case's name says.
fn elementwise(
    variant: &'static str,
    case: &str,
    scale: f64,
    plain: &Device,
    recording: &Device,
    f: impl Fn(Tensor<3>) -> Tensor<3> + 'static,
) -> Variant {
    if case.ends_with("backward") {
        let x = tensor(X, 1, scale, 0.0, recording).require_grad();
        let leaf = x.clone();
        let dy = tensor(X, 9, 1.0, 0.0, recording);
        backward(variant, dy, move || f(x.clone()), move |g| Ok(vec![gradient(&leaf, g)?]))
    } else {
        let x = tensor(X, 1, scale, 0.0, plain);
        forward(variant, plain, move || f(x.clone()))
    }
}

fn main() -> Result<()> {
    let plain = Device::flex();
    let recording = plain.clone().autodiff();
    serve("burn", "0.22.1 flex (rayon simd x86-v4)", |name| cases(name, &plain, &recording))
}
