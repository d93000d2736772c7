//! Operations of `ops_optim_*`.

use crate::case::Op;

pub const OPS: &[(&str, Op)] = &[];
