//! Operations of `ops_conv_*`.

use crate::case::Op;

pub const OPS: &[(&str, Op)] = &[];
