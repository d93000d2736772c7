//! Nine vision papers on smalti.

pub mod data;
pub mod train;
