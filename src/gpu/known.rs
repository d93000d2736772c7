//! What is known of the content of GPU memory without a look at it. A check that needs a look has to wait for the
//! device, and cannot be part of a captured graph; most indices of a training step are the work of this crate's own
//! kernels and need none.

use super::memory::Buffer;
use crate::{DType, Tensor, storage::Storage};

/// Facts about a whole buffer. Nothing is claimed by a default.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Known {
    /// i64 numbers, all in 0..below.
    pub below: Option<i64>,
    /// Each `below` of them in a row are a permutation of 0..below.
    pub permutations: bool,
    /// The sum of the elements is positive.
    pub positive: bool,
    /// All elements are this number.
    pub value: Option<f64>,
}

/// What is known of the tensor's elements.
pub(crate) fn known(t: &Tensor) -> Known {
    match t.storage() {
        Storage::Cpu(_) => Known::default(),
        Storage::Cuda(buffer) => buffer.known(),
    }
}

/// The buffer, if the tensor is all of it.
fn whole(t: &Tensor) -> Option<&Buffer> {
    match t.storage() {
        Storage::Cuda(buffer) if t.is_contiguous() && t.offset() == 0 => {
            (t.numel() * t.dtype().size() == buffer.bytes()).then_some(buffer)
        }
        _ => None,
    }
}

/// Notes facts about a tensor that is all of its storage; about others it does nothing.
pub(crate) fn know(t: &Tensor, facts: Known) {
    if let Some(buffer) = whole(t) {
        buffer.know(facts);
    }
}

/// Is the sum of the elements known to be positive?
pub(crate) fn is_positive(t: &Tensor) -> bool {
    let all = known(t).value.is_some_and(|value| value > 0.0);
    t.numel() > 0 && (all || whole(t).is_some_and(|buffer| buffer.known().positive))
}

/// Are the rows of this tensor known to be permutations of 0..their length?
pub(crate) fn are_permutations(t: &Tensor) -> bool {
    let (facts, length) = (known(t), t.shape().last().map_or(0, |&n| n as i64));
    t.dtype() == DType::I64
        && t.is_contiguous()
        && facts.permutations
        && facts.below == Some(length)
        && t.offset() as i64 % length.max(1) == 0
}
