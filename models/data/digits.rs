//! The shipped handwritten digits.

use std::{io::Read, path::Path, sync::Arc};

use smalti::{Error, Result};

use super::{Dataset, Filter, RgbImage, Sample, image};

/// Mean of the training rows, levels scaled to 0..1.
pub const DIGITS_MEAN: f32 = 0.3057;
/// Standard deviation of the training rows, levels scaled to 0..1.
pub const DIGITS_STD: f32 = 0.3756;

const SIDE: usize = 8;
const PIXELS: usize = SIDE * SIDE;
const ROWS: usize = 1797;
const TRAIN: usize = 1347;

/// Which rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DigitsSplit {
    /// The first 1347.
    Train,
    /// The last 450.
    Test,
}

/// 1797 scans of digits, 8 x 8 in 17 grey levels, part of the program. Source: E. Alpaydin, C. Kaynak, "Optical
/// Recognition of Handwritten Digits" (UCI, 1998), CC BY 4.0.
#[derive(Clone, Debug)]
pub struct Digits {
    levels: Vec<u8>,
    labels: Vec<i64>,
    size: u32,
    filter: Filter,
}

impl Digits {
    /// The rows of a split, as images of 8 x 8.
    pub fn open(split: DigitsSplit) -> Result<Self> {
        let name = Path::new("digits.csv.gz");
        let mut text = String::new();
        let bytes: &[u8] = include_bytes!("files/digits.csv.gz");
        flate2::read::GzDecoder::new(bytes).read_to_string(&mut text).map_err(|e| Error::io(name, e))?;
        let rows = match split {
            DigitsSplit::Train => 0..TRAIN,
            DigitsSplit::Test => TRAIN..ROWS,
        };
        let (levels, labels) = parse(&text, name, rows)?;
        Ok(Digits { levels, labels, size: SIDE as u32, filter: Filter::Nearest })
    }

    /// The images scaled to `size` x `size`, by nearest neighbour or bicubic. The arrays stay as they are.
    pub fn scaled(mut self, size: u32, filter: Filter) -> Self {
        (self.size, self.filter) = (size, filter);
        self
    }

    /// Labels, 0 to 9.
    pub fn labels(&self) -> &[i64] {
        &self.labels
    }

    /// Grey levels of digit `index`, 0 to 16, row by row.
    pub fn levels(&self, index: usize) -> &[u8] {
        &self.levels[index * PIXELS..(index + 1) * PIXELS]
    }

    /// All digits as floats [N, channels, 8, 8], level / 16, the same in every channel.
    pub fn array(&self, channels: usize) -> Vec<f32> {
        let digits = self.levels.chunks_exact(PIXELS);
        digits.flat_map(|d| (0..channels).flat_map(move |_| d.iter().map(|&v| f32::from(v) / 16.0))).collect()
    }

    /// Digit `index` as an image: level * 255 / 16, rounded, in all channels, then scaled.
    pub fn image(&self, index: usize) -> Result<RgbImage> {
        let levels = self.levels(index);
        let image = RgbImage::from_fn(SIDE as u32, SIDE as u32, |x, y| {
            let level = u32::from(levels[y as usize * SIDE + x as usize]);
            ::image::Rgb([((level * 255 + 8) / 16) as u8; 3])
        });
        if self.size == SIDE as u32 {
            return Ok(image);
        }
        image::resize(&image, self.size, self.size, self.filter)
    }
}

fn parse(text: &str, name: &Path, rows: std::ops::Range<usize>) -> Result<(Vec<u8>, Vec<i64>)> {
    let (mut levels, mut labels) = (Vec::with_capacity(rows.len() * PIXELS), Vec::with_capacity(rows.len()));
    for (row, line) in text.lines().enumerate().skip(rows.start).take(rows.len()) {
        let numbers: Result<Vec<u8>, _> = line.split(',').map(str::parse::<u8>).collect();
        match numbers.as_deref() {
            Ok([pixels @ .., label])
                if pixels.len() == PIXELS && *label < 10 && pixels.iter().all(|v| *v <= 16) =>
            {
                levels.extend_from_slice(pixels);
                labels.push(i64::from(*label));
            }
            _ => {
                let what = format!("line {}: not {PIXELS} levels of 0 to 16 and a digit", row + 1);
                return Err(Error::format(name, what));
            }
        }
    }
    if labels.len() != rows.len() {
        return Err(Error::format(
            name,
            format!("{} rows from {} on; needs {}", labels.len(), rows.start, rows.len()),
        ));
    }
    Ok((levels, labels))
}

impl Dataset for Digits {
    type Label = i64;

    fn len(&self) -> usize {
        self.labels.len()
    }

    fn get(&self, index: usize) -> Result<Sample<i64>> {
        Ok(Sample { image: Arc::new(self.image(index)?), label: self.labels[index] })
    }

    fn name(&self, index: usize) -> String {
        format!("digit {index}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_sums() {
        let (train, test) =
            (Digits::open(DigitsSplit::Train).unwrap(), Digits::open(DigitsSplit::Test).unwrap());
        let count = |d: &Digits| -> Vec<usize> {
            (0..10).map(|c| d.labels().iter().filter(|l| **l == c).count()).collect()
        };
        assert_eq!(count(&train), [135, 136, 134, 136, 133, 137, 134, 134, 133, 135]);
        assert_eq!(count(&test), [43, 46, 43, 47, 48, 45, 47, 45, 41, 45]);
        let sum = |d: &Digits| (0..d.len()).flat_map(|i| d.levels(i)).map(|v| u32::from(*v)).sum::<u32>();
        assert_eq!((sum(&train), sum(&test)), (561_718 - 140_022, 140_022));
    }

    #[test]
    fn arrays_and_constants() {
        let train = Digits::open(DigitsSplit::Train).unwrap();
        let array = train.array(3);
        assert_eq!(array.len(), 1347 * 3 * 64);
        assert_eq!(array[2..5], [5.0 / 16.0, 13.0 / 16.0, 9.0 / 16.0]);
        assert_eq!(array[..64], array[128..192]);
        let mean = array.iter().map(|v| f64::from(*v)).sum::<f64>() / array.len() as f64;
        let square = array.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / array.len() as f64;
        assert!((mean - f64::from(DIGITS_MEAN)).abs() < 1e-4);
        assert!(((square - mean * mean).sqrt() - f64::from(DIGITS_STD)).abs() < 1e-4);
    }

    #[test]
    fn images() {
        let test = Digits::open(DigitsSplit::Test).unwrap();
        let small = test.image(0).unwrap();
        let large = test.clone().scaled(32, Filter::Nearest).image(0).unwrap();
        assert_eq!((small.dimensions(), large.dimensions()), ((8, 8), (32, 32)));
        for (x, y, pixel) in large.enumerate_pixels() {
            assert_eq!(pixel, small.get_pixel(x / 4, y / 4));
        }
        assert_eq!(test.scaled(28, Filter::Bicubic).get(3).unwrap().image.dimensions(), (28, 28));
    }

    #[test]
    fn bad_rows_are_named() {
        let good = format!("{}7", "16,".repeat(64));
        let name = Path::new("x.csv");
        assert_eq!(parse(&good, name, 0..1).unwrap().1, [7]);
        for bad in [
            "",
            "1,2,3",
            &good.replacen("16", "17", 1),
            &good.replace('7', "10"),
            &good.replacen("16", "x", 1),
        ] {
            let error = parse(&format!("{good}\n{bad}\n"), name, 0..2).unwrap_err().to_string();
            assert!(error.starts_with("x.csv: line 2"), "{error}");
        }
        assert!(parse(&good, name, 0..2).is_err());
    }
}
