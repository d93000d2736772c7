//! Operations of `ops_matmul_*`.

use crate::case::Op;

pub const OPS: &[(&str, Op)] = &[];
