//! How good a representation is: k nearest neighbours, linear probes, fine-tuning; of images and texts together,
//! zero-shot classification and retrieval.

mod features;
mod knn;
mod lbfgs;
mod linear_classifier;
mod linear_probe;
mod retrieval;
mod zero_shot;

pub use features::Features;
pub use knn::{Vote, knn_accuracy, knn_scores};
pub use linear_classifier::LinearClassifier;
pub use linear_probe::{LinearProbe, ProbeConfig};
pub use retrieval::{Recall, recall};
pub use zero_shot::{SHORT_TEMPLATES, ZeroShot, ensemble, prompts};
