//! Laws that hold for any shape, layout and index.

use proptest::{prelude::*, test_runner::TestCaseError};
use smalti::{DType, PadMode, PatchOrder, Result, Rng, Tensor};

/// Runs a law; an error of an operation is a failed case.
fn law(f: impl FnOnce() -> Result<()>) -> Result<(), TestCaseError> {
    f().map_err(|e| TestCaseError::fail(e.to_string()))
}

fn values(t: &Tensor) -> Result<Vec<f64>> {
    t.to_dtype(DType::F64)?.to_vec()
}

/// A tensor of this shape, stored with its dimensions rotated by `turn`.
fn tensor(shape: &[usize], turn: usize, seed: u64) -> Result<Tensor> {
    let rank = shape.len();
    let stored: Vec<usize> = (0..rank).map(|d| shape[(d + turn) % rank]).collect();
    let back: Vec<usize> = (0..rank).map(|d| (d + rank - turn % rank) % rank).collect();
    Tensor::randn(stored, &mut Rng::new(seed))?.permute(back)
}

fn shape() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0usize..6, 1..5)
}

fn indices(shape: &[usize], below: usize, seed: u64) -> Result<Tensor> {
    let mut rng = Rng::new(seed);
    let ids: Vec<i64> = (0..shape.iter().product()).map(|_| rng.below(below as u64) as i64).collect();
    Tensor::from_slice(&ids, shape)
}

proptest! {
    #[test]
    fn cat_joins_what_split_cuts(
        shape in shape(), turn in 0usize..4, dim in 0usize..4, size in 1usize..4, seed: u64,
    ) {
        law(|| {
            let (x, dim) = (tensor(&shape, turn, seed)?, dim % shape.len());
            let pieces = x.split(size, dim)?;
            assert!(pieces.iter().rev().skip(1).all(|p| p.shape()[dim] == size));
            assert_eq!(values(&Tensor::cat(&pieces, dim)?)?, values(&x)?);
            let chunks = x.chunk(size, dim)?;
            assert!(chunks.len() <= size);
            assert_eq!(values(&Tensor::cat(&chunks, dim)?)?, values(&x)?);
            let stacked = Tensor::stack(&[&x, &x], dim)?;
            assert_eq!(values(&stacked.select(dim, 1)?)?, values(&x)?);
            Ok(())
        })?;
    }

    #[test]
    fn sorting_is_a_gather_that_scatter_undoes(
        shape in shape(), turn in 0usize..4, dim in 0usize..4, descending: bool, seed: u64,
    ) {
        law(|| {
            let (x, dim) = (tensor(&shape, turn, seed)?, dim % shape.len());
            let (sorted, index) = x.sort(dim, descending)?;
            assert_eq!(values(&x.take_along_dim(&index, dim)?)?, values(&sorted)?);
            let empty = Tensor::full(&shape, f64::NAN, x.dtype())?;
            assert_eq!(values(&empty.scatter(dim, &index, &sorted)?)?, values(&x)?);
            let (top, at) = x.topk(shape[dim] / 2, dim, descending)?;
            assert_eq!(values(&top)?, values(&sorted.narrow(dim, 0, shape[dim] / 2)?)?);
            assert_eq!(values(&at)?, values(&index.narrow(dim, 0, shape[dim] / 2)?)?);
            Ok(())
        })?;
    }

    /// <gather(x), y> = <x, scatter_add(y)>, and so for slices.
    #[test]
    fn scatter_add_is_the_transpose_of_gather(
        shape in prop::collection::vec(1usize..6, 1..5), turn in 0usize..4, dim in 0usize..4, n in 0usize..9, seed: u64,
    ) {
        law(|| {
            let dim = dim % shape.len();
            let mut longer = shape.clone();
            longer[dim] = n;
            let x = tensor(&shape, turn, seed)?.to_dtype(DType::F64)?;
            let y = tensor(&longer, turn + 1, seed ^ 1)?.to_dtype(DType::F64)?;
            let dot = |a: &Tensor, b: &Tensor| a.mul(b)?.sum(())?.item();
            let index = indices(&longer, shape[dim], seed)?;
            let a = dot(&x.gather(dim, &index)?, &y)?;
            let b = dot(&x, &x.zeros_like()?.scatter_add(dim, &index, &y)?)?;
            assert!((a - b).abs() < 1e-9, "{a} {b}");
            let rows = indices(&[n], shape[dim], seed)?;
            let a = dot(&x.index_select(dim, &rows)?, &y)?;
            let b = dot(&x, &x.zeros_like()?.index_add(dim, &rows, &y, 1.0)?)?;
            assert!((a - b).abs() < 1e-9, "{a} {b}");
            Ok(())
        })?;
    }

    #[test]
    fn unshuffle_puts_kept_tokens_back(
        n in 1usize..4, l in 1usize..9, keep in 0usize..9, d in 1usize..5, seed: u64,
    ) {
        law(|| {
            let keep = keep.min(l);
            let x = tensor(&[n, l, d], 1, seed)?;
            let (ids, restore, mask) = Tensor::rand([n, l], &mut Rng::new(seed))?.random_masking_ids(keep)?;
            assert_eq!(mask.sum(())?.item()? as usize, n * (l - keep));
            let kept = x.gather_tokens(&ids)?;
            // without class token and positions, and with a mask token of 0, it is the transpose of the gather
            let tokens = Tensor::cat(&[&Tensor::ones([n, 1, d], DType::F32)?, &kept], 1)?;
            let (zero, pos) = (Tensor::zeros([d], DType::F32)?, Tensor::zeros([l + 1, d], DType::F32)?);
            let y = tokens.unshuffle(&zero, &restore, &pos)?;
            assert_eq!(values(&y.narrow(1, 0, 1)?)?, vec![1.0; n * d]);
            let visible = x.mul(&mask.mul_scalar(-1.0)?.add_scalar(1.0)?.unsqueeze(2)?)?;
            let positive = |t: &Tensor| values(&t.add_scalar(0.0)?);
            assert_eq!(positive(&y.narrow(1, 1, l)?)?, positive(&visible)?);
            assert_eq!(positive(&kept.ungather_tokens(&ids, l)?)?, positive(&visible)?);
            Ok(())
        })?;
    }

    #[test]
    fn patches_come_back(
        n in 0usize..3, c in 1usize..5, p in 1usize..5, rows in 1usize..4, columns in 1usize..4,
        turn in 0usize..4, channel_last: bool, seed: u64,
    ) {
        law(|| {
            let order = if channel_last { PatchOrder::ChannelLast } else { PatchOrder::ChannelFirst };
            let x = tensor(&[n, c, rows * p, columns * p], turn, seed)?;
            let y = x.patchify(p, order)?;
            assert_eq!(y.shape(), [n, rows * columns, p * p * c]);
            assert_eq!(values(&y.unpatchify(p, [rows, columns], order)?)?, values(&x)?);
            Ok(())
        })?;
    }

    #[test]
    fn what_is_undone_is_as_before(
        shape in shape(), turn in 0usize..4, dim in 0usize..4, shift in -9i64..9, before in 0i64..4, after in 0i64..4,
        seed: u64,
    ) {
        law(|| {
            let (x, dim) = (tensor(&shape, turn, seed)?, dim % shape.len());
            assert_eq!(values(&x.roll(&[shift], &[dim])?.roll(&[-shift], &[dim])?)?, values(&x)?);
            assert_eq!(values(&x.flip(())?.flip(())?)?, values(&x)?);
            let mode = PadMode::Constant(1.0);
            let padded = x.pad(&[(before, after)], mode)?;
            assert_eq!(values(&padded.pad(&[(-before, -after)], mode)?)?, values(&x)?);
            Ok(())
        })?;
    }
}
