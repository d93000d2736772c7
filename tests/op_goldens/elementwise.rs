//! Operations of `ops_elementwise_*`.

use crate::case::Op;

pub const OPS: &[(&str, Op)] = &[];
