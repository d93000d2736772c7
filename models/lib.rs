//! Nine vision papers on smalti.

pub mod data;
