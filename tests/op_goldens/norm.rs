//! Operations of `ops_norm_*`.

use crate::case::Op;

pub const OPS: &[(&str, Op)] = &[];
