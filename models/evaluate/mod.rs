//! How good a representation is: k nearest neighbours, linear probes, fine-tuning.

mod features;
mod knn;
mod lbfgs;
mod linear_classifier;
mod linear_probe;

pub use features::Features;
pub use knn::{Vote, knn_accuracy};
pub use linear_classifier::LinearClassifier;
pub use linear_probe::{LinearProbe, ProbeConfig};
