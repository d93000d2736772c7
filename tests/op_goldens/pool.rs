//! Operations of `ops_pool_*`.

use crate::case::{Case, Op};
use smalti::{PoolDivisor, PoolOptions, Result};

pub const OPS: &[(&str, Op)] = &[
    ("adaptive_avg_pool2d", |c| Ok(vec![c.input(0)?.adaptive_avg_pool2d(c.pair("output_size")?)?])),
    ("adaptive_max_pool2d", |c| {
        let (y, at) = c.input(0)?.adaptive_max_pool2d_with_indices(c.pair("output_size")?)?;
        Ok(vec![y, at])
    }),
    ("avg_pool2d", |c| {
        let divisor = match (c.opt_usize("divisor_override")?, c.bool("count_include_pad")?) {
            (Some(n), _) => PoolDivisor::Fixed(n),
            (None, true) => PoolDivisor::WithPadding,
            (None, false) => PoolDivisor::WithoutPadding,
        };
        Ok(vec![c.input(0)?.avg_pool2d(options(c, [1, 1])?, divisor)?])
    }),
    ("max_pool2d", |c| {
        let (y, at) = c.input(0)?.max_pool2d_with_indices(options(c, c.pair("dilation")?)?)?;
        Ok(vec![y, at])
    }),
];

fn options(c: &Case, dilation: [usize; 2]) -> Result<PoolOptions> {
    Ok(PoolOptions {
        kernel_size: c.pair("kernel_size")?,
        stride: c.pair("stride")?,
        padding: c.pair("padding")?,
        dilation,
        ceil_mode: c.bool("ceil_mode")?,
    })
}
