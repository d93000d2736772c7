//! Operations of `ops_index_*`.

use crate::case::Op;

pub const OPS: &[(&str, Op)] = &[];
