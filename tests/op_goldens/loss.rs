//! Operations of `ops_loss_*`.

use crate::case::Op;

pub const OPS: &[(&str, Op)] = &[];
