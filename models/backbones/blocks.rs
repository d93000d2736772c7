//! Stacks of transformer blocks.

use smalti::{Result, Rng, Tensor, nn::Block};

/// Tokens `[N, S, D]` through all blocks. `rng`: draws of drop path, in training; `None` in evaluation.
pub(crate) fn run(blocks: &[Block], mut x: Tensor, mut rng: Option<&mut Rng>) -> Result<Tensor> {
    for block in blocks {
        x = block.forward(&x, rng.as_deref_mut())?;
    }
    Ok(x)
}

/// Tokens `[N, S, D]` through all blocks, where only the one that `keep` leaves of each row is wanted, `[N, D]`: the
/// last block computes no other.
pub(crate) fn one_token(
    blocks: &[Block],
    x: Tensor,
    keep: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let kept = match blocks.split_last() {
        Some((last, others)) => last.forward_kept(&run(others, x, None)?, keep, None)?,
        None => keep(&x)?,
    };
    kept.select(1, 0)
}

/// [`one_token`] for the first, where class tokens stand.
pub(crate) fn first_token(blocks: &[Block], x: Tensor) -> Result<Tensor> {
    one_token(blocks, x, |tokens| tokens.narrow(1, 0, 1))
}
