//! A plotters backend that draws on an image, with an 8 x 8 font of its own: charts look the same on every
//! machine and need no font installed.

use font8x8::UnicodeFonts;
use image::RgbImage;
use plotters_backend::{
    BackendColor, BackendCoord, BackendTextStyle, DrawingBackend, DrawingErrorKind,
    text_anchor::{HPos, VPos},
};

/// The image that is drawn on.
pub(super) struct Canvas<'a>(pub &'a mut RgbImage);

/// Drawing on an image cannot fail.
#[derive(Debug)]
pub(super) enum Never {}
impl std::fmt::Display for Never {
    fn fmt(&self, _: &mut std::fmt::Formatter) -> std::fmt::Result {
        match *self {}
    }
}
impl std::error::Error for Never {}

type Outcome<T> = Result<T, DrawingErrorKind<Never>>;

impl DrawingBackend for Canvas<'_> {
    type ErrorType = Never;

    fn get_size(&self) -> (u32, u32) {
        self.0.dimensions()
    }

    fn ensure_prepared(&mut self) -> Outcome<()> {
        Ok(())
    }

    fn present(&mut self) -> Outcome<()> {
        Ok(())
    }

    fn draw_pixel(&mut self, (x, y): BackendCoord, color: BackendColor) -> Outcome<()> {
        if let (Ok(x), Ok(y)) = (u32::try_from(x), u32::try_from(y))
            && let Some(pixel) = self.0.get_pixel_mut_checked(x, y)
        {
            let new: [u8; 3] = color.rgb.into();
            for (old, new) in pixel.0.iter_mut().zip(new) {
                *old = (f64::from(*old) * (1.0 - color.alpha) + f64::from(new) * color.alpha).round() as u8;
            }
        }
        Ok(())
    }

    fn estimate_text_size<S: BackendTextStyle>(&self, text: &str, style: &S) -> Outcome<(u32, u32)> {
        let scale = scale(style);
        Ok((text.chars().count() as u32 * 8 * scale, 8 * scale))
    }

    fn draw_text<S: BackendTextStyle>(&mut self, text: &str, style: &S, (x, y): BackendCoord) -> Outcome<()> {
        let (width, height) = self.estimate_text_size(text, style)?;
        let anchor = style.anchor();
        let left = match anchor.h_pos {
            HPos::Left => x,
            HPos::Center => x - width as i32 / 2,
            HPos::Right => x - width as i32,
        };
        let top = match anchor.v_pos {
            VPos::Top => y,
            VPos::Center => y - height as i32 / 2,
            VPos::Bottom => y - height as i32,
        };
        let scale = scale(style) as i32;
        for (i, letter) in text.chars().enumerate() {
            let rows = font8x8::BASIC_FONTS.get(letter).unwrap_or_default();
            for (row, bits) in rows.iter().enumerate() {
                for column in (0..8).filter(|column| bits >> column & 1 == 1) {
                    let corner = (left + (i as i32 * 8 + column) * scale, top + row as i32 * scale);
                    for pixel in 0..scale * scale {
                        let at = (corner.0 + pixel % scale, corner.1 + pixel / scale);
                        self.draw_pixel(at, style.color())?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The font comes in whole multiples of its size.
fn scale(style: &impl BackendTextStyle) -> u32 {
    (style.size() / 8.0).round().max(1.0) as u32
}
