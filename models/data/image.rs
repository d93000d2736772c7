//! Pixels: decoding and resizing.

use std::{cell::RefCell, io::Cursor, panic, path::Path};

use fast_image_resize as fir;
use image::{ImageFormat, ImageReader};
use smalti::{Error, Result, bail, ensure};

/// 8-bit RGB pixels, row by row.
pub use image::RgbImage;

/// How pixels between pixels are found. In [`resize`] a filter widens with the scale when it shrinks
/// (antialiasing), as in Pillow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filter {
    /// The pixel that the centre falls on.
    Nearest,
    /// Triangle.
    Bilinear,
    /// Cubic. Pillow's `resize` has a = -0.5, its affine transform a = -1; each is followed where it belongs.
    Bicubic,
}

/// A rectangle of an image, in pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First column.
    pub left: u32,
    /// First row.
    pub top: u32,
    /// Columns.
    pub width: u32,
    /// Rows.
    pub height: u32,
}

impl Region {
    /// All of `image`.
    pub fn whole(image: &RgbImage) -> Self {
        Region { left: 0, top: 0, width: image.width(), height: image.height() }
    }

    /// Whether the rectangle has pixels and all of them lie in an image of `width` x `height`.
    pub fn fits(&self, width: u32, height: u32) -> bool {
        let inside = |start: u32, size: u32, limit: u32| size > 0 && start <= limit && size <= limit - start;
        inside(self.left, self.width, width) && inside(self.top, self.height, height)
    }
}

/// Reads a JPEG or PNG file; grey becomes RGB, alpha is dropped, orientation tags are not applied (as
/// torchvision's folder loader does). The content decides about the format, not the name.
///
/// Errors: [`Error::Io`] if the file cannot be read, [`Error::Format`] if it cannot be decoded; both name it.
pub fn read(path: &Path) -> Result<RgbImage> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    decode(&bytes, path)
}

/// Decodes a JPEG or PNG; `path` is for messages alone.
pub fn decode(bytes: &[u8], path: &Path) -> Result<RgbImage> {
    let reader =
        ImageReader::new(Cursor::new(bytes)).with_guessed_format().map_err(|e| Error::io(path, e))?;
    match reader.format() {
        Some(ImageFormat::Jpeg) if is_cut_off(bytes) => {
            return Err(Error::format(path, "the JPEG is cut off: no end marker follows its last scan"));
        }
        Some(ImageFormat::Jpeg | ImageFormat::Png) => {}
        _ => return Err(Error::format(path, "not a JPEG or PNG file")),
    }
    // A decoder must not panic on bad bytes; should one do so all the same, one file is lost, not the run.
    let decoded = panic::catch_unwind(|| reader.decode())
        .map_err(|_| Error::format(path, "the decoder failed on this file"))?
        .map_err(|e| Error::format(path, e.to_string()))?;
    let image = decoded.into_rgb8();
    if image.is_empty() {
        return Err(Error::format(path, "the image has no pixels"));
    }
    Ok(image)
}

/// The decoder fills what is missing of a JPEG with grey and reports nothing. Marker bytes cannot occur inside
/// coded data, so a whole file has an end marker behind its last start of scan.
fn is_cut_off(bytes: &[u8]) -> bool {
    let markers = |wanted: u8| move |pair: &[u8]| pair[0] == 0xFF && pair[1] == wanted;
    let last_scan = bytes.windows(2).rposition(markers(0xDA)).unwrap_or(0);
    !bytes[last_scan..].windows(2).any(markers(0xD9))
}

/// Scales the whole image to `width` x `height`.
pub fn resize(image: &RgbImage, width: u32, height: u32, filter: Filter) -> Result<RgbImage> {
    resized_crop(image, Region::whole(image), width, height, filter)
}

/// Cuts out `region` and scales it to `width` x `height`. Pixels outside of the region have no influence.
/// Results are within one level of Pillow's.
pub fn resized_crop(
    image: &RgbImage,
    region: Region,
    width: u32,
    height: u32,
    filter: Filter,
) -> Result<RgbImage> {
    ensure!(width > 0 && height > 0, "resize", "the result would be {width}x{height}, without pixels");
    if !region.fits(image.width(), image.height()) {
        bail!(
            "resize",
            "{region:?} is empty or not inside the image of {}x{}",
            image.width(),
            image.height()
        );
    }
    let algorithm = match filter {
        Filter::Nearest => fir::ResizeAlg::Nearest,
        Filter::Bilinear => fir::ResizeAlg::Convolution(fir::FilterType::Bilinear),
        Filter::Bicubic => fir::ResizeAlg::Convolution(fir::FilterType::CatmullRom),
    };
    let mut result = RgbImage::new(width, height);
    scale(image, region, &mut result, algorithm).map_err(|message| Error::op("resize", message))?;
    Ok(result)
}

#[derive(Default)]
struct Scratch {
    resizer: fir::Resizer,
    rows: Vec<u8>,
}

thread_local! {
    // Keeps buffers that would otherwise be allocated for every image.
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Rows are scaled first, columns then, as Pillow does. The library by itself begins with the columns, which is
/// off by up to ten levels where a bicubic overshoot is cut off between the passes.
fn scale(
    from: &RgbImage,
    region: Region,
    to: &mut RgbImage,
    algorithm: fir::ResizeAlg,
) -> Result<(), String> {
    use fir::images::{TypedCroppedImage, TypedImage, TypedImageRef};
    type Rows<'a> = TypedImageRef<'a, fir::pixels::U8x3>;
    let Region { left, top, width, height } = region;
    let (to_width, to_height) = to.dimensions();
    let whole = Rows::from_buffer(from.width(), from.height(), from.as_raw()).map_err(|e| e.to_string())?;
    let source = TypedCroppedImage::from_ref(&whole, left, top, width, height).map_err(|e| e.to_string())?;
    let mut target = TypedImage::from_buffer(to_width, to_height, to).map_err(|e| e.to_string())?;
    let options = fir::ResizeOptions::new().resize_alg(algorithm);
    SCRATCH.with_borrow_mut(|Scratch { resizer, rows }| {
        if width == to_width || height == to_height || algorithm == fir::ResizeAlg::Nearest {
            return resizer.resize_typed(&source, &mut target, &options).map_err(|e| e.to_string());
        }
        rows.resize(to_width as usize * height as usize * 3, 0);
        let mut between = TypedImage::from_buffer(to_width, height, rows).map_err(|e| e.to_string())?;
        resizer.resize_typed(&source, &mut between, &options).map_err(|e| e.to_string())?;
        let between = Rows::from_buffer(to_width, height, rows).map_err(|e| e.to_string())?;
        resizer.resize_typed(&between, &mut target, &options).map_err(|e| e.to_string())
    })
}

/// The part of `image` inside `region`, unscaled.
pub fn crop(image: &RgbImage, region: Region) -> Result<RgbImage> {
    if !region.fits(image.width(), image.height()) {
        bail!("crop", "{region:?} is empty or not inside the image of {}x{}", image.width(), image.height());
    }
    let Region { left, top, width, height } = region;
    Ok(image::imageops::crop_imm(image, left, top, width, height).to_image())
}

/// Pillow's grey value of a pixel (`convert("L")`, ITU-R 601 in 16-bit fixed point).
#[inline]
pub fn luma(pixel: &[u8]) -> u8 {
    ((u32::from(pixel[0]) * 19595 + u32::from(pixel[1]) * 38470 + u32::from(pixel[2]) * 7471 + 0x8000) >> 16)
        as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use smalti::Rng;
    use std::path::PathBuf;

    fn data(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("data").join(name)
    }

    #[test]
    fn resize_is_that_of_pillow() {
        let source = read(&data("goldens/source.png")).unwrap();
        let mut seen = 0;
        for entry in std::fs::read_dir(data("goldens")).unwrap() {
            let path = entry.unwrap().path();
            let Some(name) = path.file_stem().unwrap().to_str().unwrap().strip_prefix("resize_") else {
                continue;
            };
            let mut parts = name.split('_');
            let filter = match parts.next().unwrap() {
                "nearest" => Filter::Nearest,
                "bilinear" => Filter::Bilinear,
                _ => Filter::Bicubic,
            };
            let region = parts.nth(1).map_or(Region::whole(&source), |corners| {
                let c: Vec<u32> = corners.split('.').map(|n| n.parse().unwrap()).collect();
                Region { left: c[0], top: c[1], width: c[2] - c[0], height: c[3] - c[1] }
            });
            let want = read(&path).unwrap();
            let got = resized_crop(&source, region, want.width(), want.height(), filter).unwrap();
            let worst = got.iter().zip(want.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            assert!(worst <= 1, "{name}: off by {worst}");
            seen += 1;
        }
        assert_eq!(seen, 6);
    }

    #[test]
    fn grey_and_alpha_become_rgb() {
        let mut bytes = Cursor::new(Vec::new());
        image::GrayImage::from_pixel(3, 2, image::Luma([7])).write_to(&mut bytes, ImageFormat::Png).unwrap();
        let grey = decode(bytes.get_ref(), Path::new("grey.png")).unwrap();
        assert_eq!((grey.dimensions(), grey.get_pixel(2, 1).0), ((3, 2), [7; 3]));
        let mut bytes = Cursor::new(Vec::new());
        image::RgbaImage::from_pixel(3, 2, image::Rgba([1, 2, 3, 0]))
            .write_to(&mut bytes, ImageFormat::Png)
            .unwrap();
        assert_eq!(decode(bytes.get_ref(), Path::new("a.png")).unwrap().get_pixel(0, 0).0, [1, 2, 3]);
    }

    #[test]
    fn bad_files_are_errors_that_name_the_file() {
        let jpeg = std::fs::read(data("files/photos/coins.jpg")).unwrap();
        for bytes in [&jpeg[..jpeg.len() / 2], &jpeg[..20], b"", b"GIF89a", b"\x89PNG\r\n\x1a\n"] {
            let error = decode(bytes, Path::new("some/name.jpg")).unwrap_err().to_string();
            assert!(error.starts_with("some/name.jpg: "), "{error}");
        }
        assert!(read(Path::new("no/such.png")).unwrap_err().to_string().starts_with("no/such.png: "));
    }

    #[test]
    fn mutated_bytes_never_panic() {
        let small = read(&data("goldens/source.png")).unwrap();
        let mut jpeg = Cursor::new(Vec::new());
        small.write_to(&mut jpeg, ImageFormat::Jpeg).unwrap();
        let files = [jpeg.into_inner(), std::fs::read(data("goldens/source.png")).unwrap()];
        let mut rng = Rng::new(5);
        for round in 0..600 {
            let mut bytes = files[round % 2].clone();
            for _ in 0..=rng.below(8) {
                let at = rng.below(bytes.len() as u64) as usize;
                bytes[at] = rng.next_u32() as u8;
            }
            if rng.bernoulli(0.2) {
                bytes.truncate(rng.below(bytes.len() as u64) as usize);
            }
            let _ = decode(&bytes, Path::new("mutated"));
        }
    }

    #[test]
    fn regions_outside_are_errors() {
        let image = RgbImage::new(4, 3);
        for (left, top, width, height) in [(0, 0, 5, 1), (4, 0, 1, 1), (0, 0, 0, 1), (2, 2, u32::MAX, 1)] {
            let region = Region { left, top, width, height };
            assert!(resized_crop(&image, region, 2, 2, Filter::Bicubic).is_err());
            assert!(crop(&image, region).is_err());
        }
        assert!(resize(&image, 0, 2, Filter::Bicubic).is_err());
    }
}
