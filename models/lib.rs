//! Nine vision papers on smalti: architecture, loss, training recipe, evaluation. One file or folder a paper.

pub mod backbones;
pub mod data;
pub mod evaluate;
pub mod flip;
pub mod mae;
pub mod moco;
pub mod moco_v3;
pub mod simsiam;
pub mod train;
