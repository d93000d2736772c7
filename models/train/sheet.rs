//! Contact sheets: images beside what a network gets to see of them.

use image::{Rgb, RgbImage, imageops};
use smalti::{Result, Rng, ensure};

use super::grid::{fold_rows, grid};
use crate::data::{self, Dataset, Filter, Transform, Views};

/// Originals that are not square stand on white.
const MARGIN: Rgb<u8> = Rgb([255; 3]);

/// The first `count` images of a dataset, each followed by its views as epoch 0 of a loader with this seed makes
/// them, normalisation undone; `across` images in a row, pictures at least `side` pixels wide.
///
/// # Errors
/// If an image cannot be read, there is none, or the views have not all the same size.
pub fn sheet(
    dataset: &impl Dataset,
    views: &Views,
    count: usize,
    across: usize,
    side: u32,
    seed: u64,
) -> Result<RgbImage> {
    let count = count.min(dataset.len());
    ensure!(count > 0, "sheet", "there are no images");
    let mut rows = Vec::with_capacity(count);
    for index in 0..count {
        let image = dataset.get(index)?.image;
        let made = views.views(&image, &mut Rng::new(seed).stream(0).stream(index as u64))?;
        let pictures = views.0.iter().zip(&made).map(|(p, view)| p.normalize().image(&view.data, view.shape));
        let pictures: Vec<RgbImage> = pictures.collect::<Result<_>>()?;
        let Some(first) = pictures.first() else { smalti::bail!("sheet", "there are no views") };
        rows.push([vec![fit(&image, first.width(), first.height())?], pictures].concat());
    }
    grid(&fold_rows(rows, across), side)
}

/// The whole image in the middle of `width` x `height`.
fn fit(image: &RgbImage, width: u32, height: u32) -> Result<RgbImage> {
    let (w, h) = (f64::from(image.width()), f64::from(image.height()));
    let scale = (f64::from(width) / w).min(f64::from(height) / h);
    let side = |length: f64, limit: u32| ((length * scale).round() as u32).clamp(1, limit);
    let (w, h) = (side(w, width), side(h, height));
    let small = data::image::resize(image, w, h, Filter::Bilinear)?;
    let mut all = RgbImage::from_pixel(width, height, MARGIN);
    imageops::replace(&mut all, &small, i64::from((width - w) / 2), i64::from((height - h) / 2));
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{
        Digits, DigitsSplit, Loader, LoaderOptions,
        presets::{DigitViews, digit_views},
    };

    #[test]
    fn shows_what_a_loader_gives() {
        let digits = Digits::open(DigitsSplit::Test).unwrap();
        let views = || digit_views(16, 1, DigitViews::default()).unwrap();
        let all = sheet(&digits, &views(), 3, 2, 16, 7).unwrap();
        assert_eq!(all.dimensions(), (6 * 20 + 4, 2 * 20 + 4));
        let options = LoaderOptions { seed: 7, ..LoaderOptions::evaluation(3) };
        let loader = Loader::new(digits, views(), options).unwrap();
        let batch = loader.epoch(0).next().unwrap().unwrap();
        let normalize = views().0[1].normalize().clone();
        let want = normalize.image(&batch.views[1].data[256..512], [1, 16, 16]).unwrap();
        // The second image of the first row begins at the fourth picture.
        let got = data::image::crop(&all, data::Region { left: 4 + 20 * 5, top: 4, width: 16, height: 16 });
        assert_eq!(got.unwrap(), want);
    }

    #[test]
    fn originals_keep_their_shape() {
        let image = RgbImage::from_pixel(40, 10, Rgb([0; 3]));
        let fitted = fit(&image, 20, 20).unwrap();
        let black: Vec<_> = fitted.enumerate_pixels().filter(|(.., p)| p.0[0] == 0).collect();
        assert_eq!((black.len(), black[0].0, black[0].1), (100, 0, 7));
        assert_eq!(fit(&RgbImage::new(1, 900), 4, 4).unwrap().dimensions(), (4, 4));
    }
}
