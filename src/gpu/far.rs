//! Views whose rows lie 2^30 elements apart, so that the last begins beyond 2^31: kernels that computed offsets in 32 bits
//! would read elsewhere. The memory between is asked for and never touched, so it costs nothing.

use super::{empty_on, trim};
use crate::{
    CrossEntropy, DType, Device, GridOptions, InterpolateOptions, Interpolation, OutputSize, PadMode,
    PatchOrder, PoolDivisor, PoolOptions, Reduction, Result, Rng, Tensor, Tensor as T,
};
use half::bf16;

const GPU: Device = Device::Cuda(1);
const ROWS: usize = 3;
const WIDTH: usize = 96;
const STEP: usize = (1 << 30) + 8;

/// The values `[ROWS, WIDTH]` as rows that lie far apart.
fn far(values: &[bf16]) -> Result<T> {
    let whole = empty_on(1, &[ROWS, STEP], DType::BF16, "far")?;
    for (row, values) in values.chunks_exact(WIDTH).enumerate() {
        // device memory is host memory here
        let to =
            unsafe { std::slice::from_raw_parts_mut(whole.gpu_ptr().cast::<bf16>().add(row * STEP), WIDTH) };
        to.copy_from_slice(values);
    }
    whole.narrow(1, 0, WIDTH)
}

type Op = fn(&T, &mut Rng) -> Result<T>;

/// `[3, 96]` seen as images.
fn image(x: &T) -> Result<T> {
    x.reshape([ROWS, 6, 4, 4])
}

fn vector(n: usize, rng: &mut Rng) -> Result<T> {
    Tensor::randn([n], rng)?.to_dtype(DType::BF16)
}

fn ids(n: usize, below: usize) -> Result<T> {
    let ids: Vec<i64> = (0..n).map(|i| (i * 5 % below) as i64).collect();
    Tensor::from_slice(&ids, [n])
}

fn operations() -> Vec<(&'static str, Op)> {
    vec![
        ("unary", |x, _| x.exp()),
        ("binary", |x, _| x.mul(&x.add_scalar(1.0)?)),
        ("broadcast", |x, rng| x.add(&vector(WIDTH, rng)?)),
        ("where_cond", |x, _| x.gt(&x.mul_scalar(0.0)?)?.where_cond(x, &x.neg()?)),
        ("to_dtype", |x, _| x.to_dtype(DType::F32)),
        ("transposed copy", |x, _| x.t()?.contiguous()),
        ("sum of rows", |x, _| x.sum(1)),
        ("sum of columns", |x, _| x.sum(0)),
        ("max", |x, _| Ok(x.max(0)?.0)),
        ("var", |x, _| x.var(1, 1)),
        ("cumsum", |x, _| x.cumsum(0)),
        ("sort", |x, _| Ok(x.sort(1, false)?.0)),
        ("softmax of rows", |x, _| x.softmax(1)),
        ("softmax of columns", |x, _| x.log_softmax(0)),
        ("layer_norm", |x, rng| x.layer_norm([WIDTH], Some(&vector(WIDTH, rng)?), None, 1e-6)),
        ("group_norm", |x, _| image(x)?.group_norm(2, None, None, 1e-5)),
        ("batch_norm", |x, _| Ok(image(x)?.batch_norm(None, None, None, true, 0.1, 1e-5)?.0)),
        ("normalize", |x, _| x.normalize(2.0, 1, 1e-12)),
        ("cross_entropy", |x, _| x.cross_entropy(&ids(ROWS, WIDTH)?, &CrossEntropy::default())),
        ("mse_loss", |x, rng| x.mse_loss(&vector(WIDTH, rng)?.expand([ROWS, WIDTH])?, Reduction::Mean)),
        ("matmul", |x, _| x.matmul(&x.t()?)),
        ("linear", |x, rng| x.linear(&vector(5 * WIDTH, rng)?.reshape([5, WIDTH])?, None)),
        ("linear_gelu", |x, rng| {
            let w = vector(5 * WIDTH, rng)?.reshape([5, WIDTH])?;
            x.linear_gelu(&w, &vector(5, rng)?)
        }),
        ("gather", |x, _| x.gather(1, &ids(ROWS * 7, WIDTH)?.reshape([ROWS, 7])?)),
        ("index_select", |x, _| x.index_select(0, &ids(4, ROWS)?)),
        ("masked_fill", |x, _| x.masked_fill(&x.gt(&x.neg()?)?, -1.0)),
        ("cat", |x, _| Tensor::cat(&[x, x], 0)),
        ("pad", |x, _| x.pad(&[(1, 2)], PadMode::Constant(0.0))),
        ("flip", |x, _| x.flip([0, 1])),
        ("dropout", |x, rng| x.dropout(0.5, rng)),
        ("attention", |x, _| x.reshape([ROWS, 2, 3, 2, 8])?.attention(false, None)),
        ("window_attention", |x, rng| {
            let tables = (vector(24, rng)?.reshape([3, 8])?, vector(24, rng)?.reshape([3, 8])?);
            x.reshape([ROWS, 2, 2, 3, 1, 8])?.window_attention(
                Some(2),
                Some((&tables.0, &tables.1)),
                None,
                None,
            )
        }),
        ("gather_tokens", |x, _| {
            x.reshape([ROWS, 12, 8])?.gather_tokens(&ids(ROWS * 4, 12)?.reshape([ROWS, 4])?)
        }),
        ("unshuffle", |x, rng| {
            let (_, restore, _) = Tensor::rand([ROWS, 20], rng)?.random_masking_ids(11)?;
            x.reshape([ROWS, 12, 8])?.unshuffle(
                &vector(8, rng)?,
                &restore,
                &vector(21 * 8, rng)?.reshape([21, 8])?,
            )
        }),
        ("patchify", |x, _| image(x)?.patchify(2, PatchOrder::ChannelLast)),
        ("masked_patch_loss", |x, rng| {
            let (_, _, mask) = Tensor::rand([ROWS, 4], rng)?.random_masking_ids(1)?;
            x.reshape([ROWS, 4, 24])?.masked_patch_loss(&image(x)?.detach(), &mask, 2, Some(1e-6))
        }),
        ("contrastive_loss", |x, _| {
            let scale = Tensor::full((), 2.0, DType::F32)?;
            x.contrastive_loss(&x.mul_scalar(0.5)?, &scale)
        }),
        ("conv2d", |x, rng| {
            let w = vector(2 * 6 * 9, rng)?.reshape([2, 6, 3, 3])?;
            image(x)?.conv2d(&w, None, Default::default())
        }),
        ("max_pool2d", |x, _| image(x)?.max_pool2d(PoolOptions::new(2, 2, 0))),
        ("avg_pool2d", |x, _| image(x)?.avg_pool2d(PoolOptions::new(2, 2, 0), PoolDivisor::WithPadding)),
        ("interpolate", |x, _| {
            let options = InterpolateOptions { mode: Interpolation::Bilinear, ..Default::default() };
            image(x)?.interpolate(OutputSize::Pixels([7, 5]), &options)
        }),
        ("grid_sample", |x, rng| {
            let grid = Tensor::rand([ROWS, 3, 3, 2], rng)?.to_dtype(DType::BF16)?;
            image(x)?.grid_sample(&grid, &GridOptions::default())
        }),
    ]
}

/// An operation and its gradient.
fn both(op: Op, x: &T) -> Result<[T; 2]> {
    let x = x.requires_grad();
    let y = op(&x, &mut Rng::new(3))?;
    let loss = y.to_dtype(DType::F32)?.square()?.sum(())?;
    let grad = loss.backward()?.get(&x).cloned().ok_or_else(|| crate::Error::msg("no gradient"))?;
    Ok([y.detach(), grad])
}

#[test]
fn rows_beyond_two_to_the_31() -> Result<()> {
    let _alone = super::alone();
    GPU.scope(|| {
        let near = Tensor::randn([ROWS, WIDTH], &mut Rng::new(1))?.to_dtype(DType::BF16)?;
        let far = far(&near.to_vec::<bf16>()?)?;
        assert!(far.strides()[0] as usize * (ROWS - 1) > 1 << 31 && far.device() == GPU);
        super::reset_host_operations();
        for (name, op) in operations() {
            let (got, want) = (both(op, &far)?, both(op, &near)?);
            for (what, (got, want)) in ["result", "gradient"].iter().zip(got.iter().zip(&want)) {
                let (got, want) =
                    [got, want].map(|t| t.to_dtype(DType::F32).and_then(|t| t.to_vec::<f32>())).into();
                let (got, want): (Vec<f32>, Vec<f32>) = (got?, want?);
                assert_eq!(got.len(), want.len(), "{name}");
                let scale = want.iter().fold(1e-3f32, |m, w| m.max(w.abs()));
                // another order of sums may round the last bit of bf16 otherwise
                let equal = got.iter().zip(&want).all(|(a, b)| (a - b).abs() <= scale / 64.0);
                assert!(equal, "{name}: {what} {got:?}, near each other {want:?}");
            }
        }
        drop(far);
        trim(GPU)
    })
}
