//! Pictures side by side.

use image::{Rgb, RgbImage, imageops};
use smalti::{Result, ensure};

const GAP: u32 = 4;
const BACKGROUND: Rgb<u8> = Rgb([255; 3]);

/// Rows of pictures of one size with gaps between them, each pixel as a square so large that the pictures are
/// some `side` pixels wide (never smaller than they are).
///
/// # Errors
/// If there is no picture, or the sizes differ.
pub fn grid(rows: &[Vec<RgbImage>], side: u32) -> Result<RgbImage> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0) as u32;
    let Some(first) = rows.iter().flatten().next() else {
        smalti::bail!("grid", "there are no pictures");
    };
    let (w, h) = first.dimensions();
    ensure!(w > 0 && h > 0, "grid", "the pictures have no pixels");
    if let Some(other) = rows.iter().flatten().find(|p| p.dimensions() != (w, h)) {
        smalti::bail!("grid", "pictures of {w}x{h} and {}x{}", other.width(), other.height());
    }
    let scale = (side / w).max(1);
    let (w, h) = (w * scale, h * scale);
    let mut all =
        RgbImage::from_pixel(columns * (w + GAP) + GAP, rows.len() as u32 * (h + GAP) + GAP, BACKGROUND);
    for (y, row) in rows.iter().enumerate() {
        for (x, picture) in row.iter().enumerate() {
            let large = imageops::resize(picture, w, h, imageops::FilterType::Nearest);
            let corner = (x as u32 * (w + GAP) + GAP, y as u32 * (h + GAP) + GAP);
            imageops::replace(&mut all, &large, i64::from(corner.0), i64::from(corner.1));
        }
    }
    Ok(all)
}

/// Puts several triples (original, masked, reconstruction) of a row next to one another, `across` of them.
pub fn fold_rows(rows: Vec<Vec<RgbImage>>, across: usize) -> Vec<Vec<RgbImage>> {
    let mut rows = rows.into_iter();
    let mut folded = Vec::new();
    loop {
        let row: Vec<RgbImage> = rows.by_ref().take(across.max(1)).flatten().collect();
        if row.is_empty() {
            return folded;
        }
        folded.push(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_and_sizes() {
        let picture = |v: u8| RgbImage::from_pixel(8, 8, Rgb([v; 3]));
        let rows = fold_rows((0..3).map(|v| vec![picture(v), picture(v + 10)]).collect(), 2);
        assert_eq!(rows.iter().map(Vec::len).collect::<Vec<_>>(), [4, 2]);
        let all = grid(&rows, 64).unwrap();
        assert_eq!(all.dimensions(), (4 * 68 + 4, 2 * 68 + 4));
        assert_eq!((all.get_pixel(0, 0).0[0], all.get_pixel(4, 4).0[0]), (255, 0));
        assert_eq!((all.get_pixel(72, 4).0[0], all.get_pixel(67 + 68 + 68, 67).0[0]), (10, 1));
        assert_eq!(all.get_pixel(4, 72).0[0], 2);
        assert!(grid(&[], 64).is_err());
        assert!(grid(&[vec![picture(1), RgbImage::new(4, 8)]], 64).is_err());
    }
}
