//! Operations of `ops_reduce_*`.

use crate::case::Op;

pub const OPS: &[(&str, Op)] = &[];
