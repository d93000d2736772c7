//! Operations of `ops_pool_*`.

use crate::case::Op;

pub const OPS: &[(&str, Op)] = &[];
