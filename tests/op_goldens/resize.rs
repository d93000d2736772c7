//! Operations of `ops_resize_*`.

use crate::case::Op;

pub const OPS: &[(&str, Op)] = &[];
