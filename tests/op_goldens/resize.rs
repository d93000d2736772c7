//! Operations of `ops_resize_*`.

use crate::case::{Case, Op};
use smalti::{
    Error, GridMode, GridOptions, GridPadding, InterpolateOptions, Interpolation, OutputSize, Result,
};

pub const OPS: &[(&str, Op)] = &[
    ("interpolate", |c| {
        let mode = match c.str("mode")? {
            "nearest" => Interpolation::Nearest,
            "nearest-exact" => Interpolation::NearestExact,
            "bilinear" => Interpolation::Bilinear,
            "bicubic" => Interpolation::Bicubic,
            "area" => Interpolation::Area,
            other => return unknown(other),
        };
        let align_corners = flag(c, "align_corners")?;
        let options = InterpolateOptions { mode, align_corners, antialias: c.bool("antialias")? };
        Ok(vec![c.input(0)?.interpolate(size(c)?, &options)?])
    }),
    ("grid_sample", |c| {
        let mode = match c.str("mode")? {
            "bilinear" => GridMode::Bilinear,
            "nearest" => GridMode::Nearest,
            "bicubic" => GridMode::Bicubic,
            other => return unknown(other),
        };
        let padding = match c.str("padding_mode")? {
            "zeros" => GridPadding::Zeros,
            "border" => GridPadding::Border,
            "reflection" => GridPadding::Reflection,
            other => return unknown(other),
        };
        let options = GridOptions { mode, padding, align_corners: c.bool("align_corners")? };
        Ok(vec![c.input(0)?.grid_sample(c.input(1)?, &options)?])
    }),
    ("affine_grid", |c| match c.usizes("size")?[..] {
        [n, channels, h, w] => {
            Ok(vec![c.input(0)?.affine_grid([n, channels, h, w], c.bool("align_corners")?)?])
        }
        _ => Err(Error::msg("`size` is not of four numbers")),
    }),
];

fn unknown<T>(word: &str) -> Result<T> {
    Err(Error::msg(format!("unknown word `{word}`")))
}

/// A truth value that may be null.
fn flag(c: &Case, name: &str) -> Result<bool> {
    if c.is_null(name)? { Ok(false) } else { c.bool(name) }
}

fn size(c: &Case) -> Result<OutputSize> {
    if !c.is_null("size")? {
        return Ok(OutputSize::Pixels(c.pair("size")?));
    }
    let factor = match c.f64s("scale_factor")?[..] {
        [a] => [a, a],
        [a, b] => [a, b],
        _ => return Err(Error::msg("`scale_factor` is no pair")),
    };
    let rounded = flag(c, "recompute_scale_factor")?;
    Ok(if rounded { OutputSize::RoundedFactor(factor) } else { OutputSize::Factor(factor) })
}
