//! Convolutions.
//!
//! Three operations belong together: with the form `F(x, y, w)`, the sum over all products that a convolution
//! of image `x` with kernel `w` would add into image `y`, times the elements of `y`, the convolution is the
//! derivative of F by `y`, the transposed convolution that by `x`, and the weight gradient that by `w`. F is
//! linear in each, so the gradients of each of the three are the other two, at any order.

mod cpu;
#[cfg(gpu)]
mod gpu;
mod pack;
mod tile;

use crate::{
    DType, Device, Result, Tensor,
    autograd::{Backward, Ctx, Grads, is_grad_enabled},
    ensure, for_real, on_device,
    ops::binary::kept,
};
use smallvec::smallvec;

/// How a convolution's window moves. Pairs are (height, width).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConvOptions {
    /// Pixels from window to window.
    pub stride: [usize; 2],
    /// Zeros on each side.
    pub padding: [usize; 2],
    /// Pixels from tap to tap of the kernel.
    pub dilation: [usize; 2],
    /// Groups of channels that do not see each other.
    pub groups: usize,
}

impl Default for ConvOptions {
    fn default() -> Self {
        ConvOptions { stride: [1, 1], padding: [0, 0], dilation: [1, 1], groups: 1 }
    }
}

impl ConvOptions {
    /// A square window with this stride and padding.
    pub fn new(stride: usize, padding: usize) -> Self {
        ConvOptions { stride: [stride; 2], padding: [padding; 2], ..Default::default() }
    }

    /// The same in `groups` groups.
    pub fn groups(self, groups: usize) -> Self {
        ConvOptions { groups, ..self }
    }
}

/// Sizes of a convolution from image `x` to image `y`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub options: ConvOptions,
    pub batch: usize,
    /// Channels of x and of y.
    pub channels: [usize; 2],
    pub x: [usize; 2],
    pub y: [usize; 2],
    pub kernel: [usize; 2],
}

/// By which argument of the form the derivative is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    /// (x, w) to y: the convolution.
    Down,
    /// (y, w) to x: the transposed convolution.
    Up,
    /// (x, y) to w.
    Weight,
}

impl Tensor {
    /// 2-D convolution (cross-correlation) of `[N, C, H, W]` with weight `[out, C / groups, kh, kw]` and bias
    /// `[out]`. The result has the input's memory order, NCHW or NHWC.
    ///
    /// # Errors
    /// If ranks, sizes or dtypes do not fit, or the padded image is smaller than the kernel.
    #[track_caller]
    pub fn conv2d(&self, weight: &Tensor, bias: Option<&Tensor>, options: ConvOptions) -> Result<Tensor> {
        const OP: &str = "conv2d";
        if self.rank() == 3 {
            return self.unsqueeze(0)?.conv2d(weight, bias, options)?.squeeze(0);
        }
        let ([batch, c, h, w], [out, per_group, kh, kw]) = (self.dims(OP)?, weight.dims(OP)?);
        check(OP, self, weight, bias, out, options, [kh, kw])?;
        ensure!(
            c == per_group * options.groups && out % options.groups == 0,
            OP,
            "input {:?} and weight {:?} do not fit {} groups",
            self.shape(),
            weight.shape(),
            options.groups
        );
        let mut y = [0; 2];
        for d in 0..2 {
            let padded = [h, w][d] + 2 * options.padding[d];
            let span = options.dilation[d] * ([kh, kw][d] - 1) + 1;
            ensure!(
                padded >= span,
                OP,
                "the kernel spans {span} pixels, the padded image {:?} has {padded}",
                self.shape()
            );
            y[d] = (padded - span) / options.stride[d] + 1;
        }
        let geometry = Geometry { options, batch, channels: [c, out], x: [h, w], y, kernel: [kh, kw] };
        apply(OP, Kind::Down, geometry, self, weight, bias)
    }

    /// 2-D transposed convolution of `[N, C, H, W]` with weight `[C, out / groups, kh, kw]` and bias `[out]`:
    /// the gradient of [`conv2d`](Self::conv2d) with respect to its input. `output_padding` adds to the bottom
    /// and right of the result, `(H - 1) stride - 2 padding + dilation (kh - 1) + 1 + output_padding`.
    ///
    /// # Errors
    /// If ranks, sizes or dtypes do not fit, or the output padding is not below the stride or the dilation.
    #[track_caller]
    pub fn conv_transpose2d(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        options: ConvOptions,
        output_padding: [usize; 2],
    ) -> Result<Tensor> {
        const OP: &str = "conv_transpose2d";
        if self.rank() == 3 {
            return self.unsqueeze(0)?.conv_transpose2d(weight, bias, options, output_padding)?.squeeze(0);
        }
        let ([batch, c, h, w], [inputs, per_group, kh, kw]) = (self.dims(OP)?, weight.dims(OP)?);
        let out = per_group * options.groups;
        check(OP, self, weight, bias, out, options, [kh, kw])?;
        ensure!(
            c == inputs && c % options.groups == 0,
            OP,
            "input {:?} and weight {:?} do not fit {} groups",
            self.shape(),
            weight.shape(),
            options.groups
        );
        let mut x = [0; 2];
        for d in 0..2 {
            let (stride, dilation) = (options.stride[d], options.dilation[d]);
            ensure!(
                output_padding[d] < stride.max(dilation),
                OP,
                "the output padding {output_padding:?} is not below the stride or the dilation"
            );
            let full = ([h, w][d].max(1) - 1) * stride + dilation * ([kh, kw][d] - 1) + 1 + output_padding[d];
            ensure!(
                [h, w][d] > 0 && full > 2 * options.padding[d],
                OP,
                "nothing is left of input {:?} under a padding of {:?}",
                self.shape(),
                options.padding
            );
            x[d] = full - 2 * options.padding[d];
        }
        let geometry = Geometry { options, batch, channels: [out, c], x, y: [h, w], kernel: [kh, kw] };
        apply(OP, Kind::Up, geometry, self, weight, bias)
    }

    /// 1-D convolution of `[N, C, L]` with weight `[out, C / groups, k]` and bias `[out]`; of the options the
    /// second of each pair counts.
    ///
    /// # Errors
    /// As [`conv2d`](Self::conv2d).
    #[track_caller]
    pub fn conv1d(&self, weight: &Tensor, bias: Option<&Tensor>, options: ConvOptions) -> Result<Tensor> {
        self.dims::<3>("conv1d")?;
        weight.dims::<3>("conv1d")?;
        let row = |pair: [usize; 2], first| [first, pair[1]];
        let options = ConvOptions {
            stride: row(options.stride, 1),
            padding: row(options.padding, 0),
            dilation: row(options.dilation, 1),
            groups: options.groups,
        };
        self.unsqueeze(2)?.conv2d(&weight.unsqueeze(2)?, bias, options)?.squeeze(2)
    }
}

#[track_caller]
fn check(
    op: &'static str,
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    out: usize,
    options: ConvOptions,
    kernel: [usize; 2],
) -> Result<()> {
    let positive = options.stride.iter().chain(&options.dilation).chain(&kernel).all(|&n| n > 0);
    ensure!(
        positive && options.groups > 0,
        op,
        "kernel {kernel:?}, stride, dilation and groups must be positive: {options:?}"
    );
    let same = [Some(input), bias].into_iter().flatten().all(|t| t.dtype() == weight.dtype());
    ensure!(same, op, "input ({}), weight ({}) and bias need one dtype", input.dtype(), weight.dtype());
    if let Some(bias) = bias {
        ensure!(bias.shape() == [out], op, "the bias has shape {:?}, needs [{out}]", bias.shape());
    }
    Ok(())
}

/// One of the three operations on the other two arguments, and its place in the graph.
#[track_caller]
fn apply(
    op: &'static str,
    kind: Kind,
    geometry: Geometry,
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let bias_values = bias.map(Tensor::detach);
    let y = values(op, kind, geometry, &a.detach(), &b.detach(), bias_values.as_ref())?;
    let saved = |x: &Tensor, with: &Tensor| with.tracked().then(|| x.clone());
    let rule = Form { kind, geometry, a: saved(a, b), b: saved(b, a) };
    match bias {
        Some(bias) => y.record([a, b, bias], rule),
        None => y.record([a, b], rule),
    }
}

/// The values, untracked.
#[track_caller]
fn values(
    op: &'static str,
    kind: Kind,
    geometry: Geometry,
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let through_host = || on_device!(a, op, on_cpu(op, kind, geometry, a, b, bias));
    on_device!(
        a,
        op,
        through_host(),
        match gpu::run(op, kind, &geometry, a, b, bias)? {
            Some(y) => Ok(y),
            None => through_host(),
        },
        when gpu::takes(&geometry)
    )
}

/// The CPU code. Half types are computed in f32 and rounded once.
pub(crate) fn on_cpu(
    op: &'static str,
    kind: Kind,
    geometry: Geometry,
    a: &Tensor,
    b: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Tensor> {
    let run = |a: &Tensor, b: &Tensor, bias: Option<&Tensor>| {
        for_real!(a.dtype(), op, T => Ok(match kind {
            Kind::Down => cpu::down::<T>(op, &geometry, a, b, bias),
            Kind::Up => cpu::up::<T>(op, &geometry, a, b, bias),
            Kind::Weight => cpu::weight::<T>(op, &geometry, a, b),
        }))
    };
    match bias {
        Some(bias) => Tensor::in_f32([a, b, bias], |[a, b, bias]| run(a, b, Some(bias))),
        None => Tensor::in_f32([a, b], |[a, b]| run(a, b, None)),
    }
}

struct Form {
    kind: Kind,
    geometry: Geometry,
    a: Option<Tensor>,
    b: Option<Tensor>,
}

impl Backward for Form {
    const NAME: &'static str = "convolution";
    const TWICE: bool = true;

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let apply = |kind, a: &Tensor, b: &Tensor| apply(Self::NAME, kind, self.geometry, a, b, None);
        let (a, b) = (|| kept(Self::NAME, &self.a), || kept(Self::NAME, &self.b));
        let da = ctx.grad(0, || match self.kind {
            Kind::Down => self.input(grad, b()?, ctx),
            Kind::Up => apply(Kind::Down, grad, b()?),
            Kind::Weight => apply(Kind::Up, b()?, grad),
        })?;
        let db = ctx.grad(1, || match self.kind {
            Kind::Down => apply(Kind::Weight, a()?, grad),
            Kind::Up => apply(Kind::Weight, grad, a()?),
            Kind::Weight => apply(Kind::Down, a()?, grad),
        })?;
        let bias = ctx.grad(2, || grad.sum([0, 2, 3]))?;
        Ok(smallvec![da, db, bias])
    }
}

impl Form {
    /// The gradient of a convolution's input, together with what other paths have sent there: in a residual network
    /// each block's input has two, and tiles that start with one save a pass over both.
    fn input(&self, grad: &Tensor, weight: &Tensor, ctx: &Ctx) -> Result<Tensor> {
        let pending = if is_grad_enabled() { None } else { ctx.take_pending(0) };
        let Some(mut sum) = pending else {
            return apply(Self::NAME, Kind::Up, self.geometry, grad, weight, None);
        };
        let (g, w) = (&self.geometry, weight.detach());
        let added = [grad, &sum].iter().all(|t| t.device() == Device::Cpu)
            && match grad.dtype() {
                DType::F32 => cpu::up_onto::<f32>(g, grad, &w, &mut sum),
                DType::F64 => cpu::up_onto::<f64>(g, grad, &w, &mut sum),
                _ => false,
            };
        if added { Ok(sum) } else { sum.accumulate(&apply(Self::NAME, Kind::Up, *g, grad, &w, None)?) }
    }
}

#[cfg(test)]
mod tests;
