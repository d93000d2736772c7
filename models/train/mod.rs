//! Training runs: recipe, loop, log, pictures, checkpoints.

mod canvas;
pub mod grid;
pub mod metrics;
pub mod plot;
pub mod progress;
pub mod recipe;
pub mod run_dir;

pub use progress::Progress;
pub use recipe::Recipe;
pub use run_dir::RunDir;
