//! Operations of `ops_conv_*`.

use crate::case::{Case, Op};
use smalti::{ConvOptions, Result};

pub const OPS: &[(&str, Op)] = &[
    ("conv1d", |c| Ok(vec![c.input(0)?.conv1d(c.input(1)?, c.optional(2), options(c)?)?])),
    ("conv2d", |c| Ok(vec![c.input(0)?.conv2d(c.input(1)?, c.optional(2), options(c)?)?])),
    ("conv_transpose2d", |c| {
        let padding = c.pair("output_padding")?;
        Ok(vec![c.input(0)?.conv_transpose2d(c.input(1)?, c.optional(2), options(c)?, padding)?])
    }),
];

fn options(c: &Case) -> Result<ConvOptions> {
    Ok(ConvOptions {
        stride: c.pair("stride")?,
        padding: c.pair("padding")?,
        dilation: c.pair("dilation")?,
        groups: c.usize("groups")?,
    })
}
