//! Operations of `ops_attention_*`.

use crate::case::Op;

pub const OPS: &[(&str, Op)] = &[];
