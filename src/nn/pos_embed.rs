//! Position embeddings of vision transformers.

use crate::{DType, InterpolateOptions, Interpolation, OutputSize, Result, Tensor, ensure};

/// Which axis of the grid fills the first half of the channels of a sin-cos table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum First {
    /// [sin(column) | cos(column) | sin(row) | cos(row)]: MAE.
    Column,
    /// [sin(row) | cos(row) | sin(column) | cos(column)]: MoCo v3.
    Row,
}

/// Fixed 2-D sin-cos table `[rows * columns, width]`: four blocks of width/4 channels, frequencies
/// 10000^(-i / (width/4)). Computed in f64, rounded to f32.
///
/// # Errors
/// If the width does not divide by 4.
#[track_caller]
pub fn sin_cos_2d(width: usize, rows: usize, columns: usize, first: First) -> Result<Tensor> {
    ensure!(width > 0 && width.is_multiple_of(4), "sin_cos_2d", "width {width} does not divide by 4");
    let quarter = width / 4;
    let frequency: Vec<f64> = (0..quarter).map(|i| 10_000f64.powf(-(i as f64) / quarter as f64)).collect();
    let mut table = Vec::with_capacity(rows * columns * width);
    for r in 0..rows {
        for c in 0..columns {
            let axes = if first == First::Column { [c, r] } else { [r, c] };
            for position in axes {
                table.extend(frequency.iter().map(|w| (position as f64 * w).sin() as f32));
                table.extend(frequency.iter().map(|w| (position as f64 * w).cos() as f32));
            }
        }
    }
    Tensor::from_slice(&table, [rows * columns, width])
}

/// Puts `extra` rows of zeros (class tokens) in front and a batch axis: `[1, extra + L, width]`.
///
/// # Errors
/// If `table` is no matrix.
#[track_caller]
pub fn with_class_rows(table: &Tensor, extra: usize) -> Result<Tensor> {
    let [_, width] = table.dims("with_class_rows")?;
    Tensor::cat(&[&Tensor::zeros([extra, width], DType::F32)?, table], 0)?.unsqueeze(0)
}

/// Resizes a learned or fixed table `[1, extra + g*g, width]` to another square grid, keeping the first `extra`
/// rows: bicubic, `align_corners` off, no antialias, as the official fine-tuning code of MAE does.
///
/// # Errors
/// If the rows behind the first `extra` do not form a square grid.
#[track_caller]
pub fn resize(table: &Tensor, extra: usize, grid: [usize; 2]) -> Result<Tensor> {
    resize_with(table, extra, grid, false)
}

/// [`resize`], with antialiasing if asked for: open_clip does.
///
/// # Errors
/// As [`resize`].
#[track_caller]
pub fn resize_with(table: &Tensor, extra: usize, grid: [usize; 2], antialias: bool) -> Result<Tensor> {
    let [_, rows, width] = table.dims("resize position embedding")?;
    let side = (rows.saturating_sub(extra) as f64).sqrt() as usize;
    ensure!(
        extra + side * side == rows,
        "resize position embedding",
        "{rows} rows, {extra} of them for class tokens, leave no square grid"
    );
    if [side, side] == grid {
        return Ok(table.clone());
    }
    let bicubic = InterpolateOptions { mode: Interpolation::Bicubic, antialias, ..Default::default() };
    let class = table.narrow(1, 0, extra)?;
    let image =
        table.narrow(1, extra, side * side)?.reshape([1, side, side, width])?.permute([0, 3, 1, 2])?;
    let image = image.interpolate(OutputSize::Pixels(grid), &bicubic)?;
    let image = image.permute([0, 2, 3, 1])?.reshape([1, grid[0] * grid[1], width])?;
    Tensor::cat(&[&class, &image], 1)
}
