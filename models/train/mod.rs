//! Training runs: recipe, loop, log, pictures, checkpoints.

mod canvas;
pub mod features;
pub mod grid;
mod mae_task;
pub mod metrics;
pub mod plot;
pub mod progress;
pub mod recipe;
pub mod run_dir;
pub mod sheet;
pub mod source;
pub mod trainer;
mod transfer;

pub use mae_task::MaeTask;
pub use metrics::Metrics;
pub use progress::Progress;
pub use recipe::Recipe;
pub use run_dir::RunDir;
pub use trainer::{Batches, Outcome, Output, Settings, Task, Trainer, optimizer};
pub use transfer::{Classifier, FinetuneTask, ProbeTask};
