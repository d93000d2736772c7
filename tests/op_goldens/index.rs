//! Operations of `ops_index_*`.

use crate::case::{Case, Op};
use smalti::{Error, PadMode, Result, Tensor};

pub const OPS: &[(&str, Op)] = &[
    ("gather", |c| Ok(vec![c.input(0)?.gather(c.i64("dim")?, c.input(1)?)?])),
    ("scatter", |c| Ok(vec![c.input(0)?.scatter(c.i64("dim")?, c.input(1)?, c.input(2)?)?])),
    ("scatter_add", |c| Ok(vec![c.input(0)?.scatter_add(c.i64("dim")?, c.input(1)?, c.input(2)?)?])),
    ("index_select", |c| Ok(vec![c.input(0)?.index_select(c.i64("dim")?, c.input(1)?)?])),
    ("index_add", |c| {
        let (dim, alpha) = (c.i64("dim")?, c.f64("alpha")?);
        Ok(vec![c.input(0)?.index_add(dim, c.input(1)?, c.input(2)?, alpha)?])
    }),
    ("take_along_dim", |c| {
        let (x, dim) = flattened(c, "dim")?;
        Ok(vec![x.take_along_dim(c.input(1)?, dim)?])
    }),
    ("masked_fill", |c| Ok(vec![c.input(0)?.masked_fill(c.input(1)?, c.f64("value")?)?])),
    ("masked_select", |c| Ok(vec![c.input(0)?.masked_select(c.input(1)?)?])),
    ("embedding", |c| Ok(vec![c.input(1)?.embedding(c.input(0)?, c.opt_usize("padding_idx")?)?])),
    ("one_hot", |c| {
        let classes = c.i64("num_classes")?;
        Ok(vec![c.input(0)?.one_hot((classes >= 0).then_some(classes as usize))?])
    }),
    ("topk", |c| {
        let (values, indices) = c.input(0)?.topk(c.usize("k")?, c.i64("dim")?, c.bool("largest")?)?;
        Ok(vec![values, indices])
    }),
    ("sort", |c| {
        let (values, indices) = c.input(0)?.sort(c.i64("dim")?, c.bool("descending")?)?;
        Ok(vec![values, indices])
    }),
    ("argsort", |c| Ok(vec![c.input(0)?.argsort(c.i64("dim")?, c.bool("descending")?)?])),
    ("nonzero", |c| Ok(vec![c.input(0)?.nonzero()?])),
    ("roll", roll),
    ("flip", |c| Ok(vec![c.input(0)?.flip(&c.i64s("dims")?[..])?])),
    ("pad", pad),
    ("cat", |c| Ok(vec![Tensor::cat(&c.inputs(), c.i64("dim")?)?])),
    ("stack", |c| Ok(vec![Tensor::stack(&c.inputs(), c.i64("dim")?)?])),
    ("split", |c| {
        let (sizes, dim) = (c.usizes("split_size_or_sections")?, c.i64("dim")?);
        match c.is_list("split_size_or_sections")? {
            true => c.input(0)?.split_sizes(&sizes, dim),
            false => c.input(0)?.split(sizes[0], dim),
        }
    }),
    ("chunk", |c| c.input(0)?.chunk(c.usize("chunks")?, c.i64("dim")?)),
    ("tril", |c| Ok(vec![c.input(0)?.tril(c.i64("diagonal")?)?])),
    ("triu", |c| Ok(vec![c.input(0)?.triu(c.i64("diagonal")?)?])),
    ("repeat", |c| Ok(vec![c.input(0)?.repeat(c.usizes("repeats")?)?])),
    ("repeat_interleave", |c| {
        let (x, dim) = flattened(c, "dim")?;
        Ok(vec![match c.optional(1) {
            Some(times) => x.repeat_interleave_each(times, dim)?,
            None => x.repeat_interleave(c.usize("repeats")?, dim)?,
        }])
    }),
    ("pixel_shuffle", |c| Ok(vec![c.input(0)?.pixel_shuffle(c.usize("upscale_factor")?)?])),
    ("fold", |c| {
        let (size, kernel, dilation) = (c.pair("output_size")?, c.pair("kernel_size")?, c.pair("dilation")?);
        Ok(vec![c.input(0)?.fold(size, kernel, dilation, c.pair("padding")?, c.pair("stride")?)?])
    }),
    ("unfold", |c| {
        let (kernel, dilation) = (c.pair("kernel_size")?, c.pair("dilation")?);
        Ok(vec![c.input(0)?.unfold(kernel, dilation, c.pair("padding")?, c.pair("stride")?)?])
    }),
];

/// The first input and a dimension of it: all of it in one dimension if the argument is null.
fn flattened(c: &Case, dim: &str) -> Result<(Tensor, i64)> {
    let x = c.input(0)?;
    Ok(match c.opt_i64(dim)? {
        Some(dim) => (x.clone(), dim),
        None => (x.reshape([x.numel()])?, 0),
    })
}

fn roll(c: &Case) -> Result<Vec<Tensor>> {
    let (x, shifts) = (c.input(0)?, c.i64s("shifts")?);
    Ok(vec![match c.opt_i64s("dims")? {
        Some(dims) => x.roll(&shifts, &dims)?,
        None => x.reshape([x.numel()])?.roll(&shifts, &[0])?.reshape(x.shape())?,
    }])
}

fn pad(c: &Case) -> Result<Vec<Tensor>> {
    let mode = match c.str("mode")? {
        "constant" => PadMode::Constant(c.f64("value")?),
        "reflect" => PadMode::Reflect,
        "replicate" => PadMode::Replicate,
        other => return Err(Error::msg(format!("unknown mode `{other}`"))),
    };
    let pads: Vec<(i64, i64)> = c.i64s("pad")?.chunks(2).map(|p| (p[0], p[1])).collect();
    Ok(vec![c.input(0)?.pad(&pads, mode)?])
}
