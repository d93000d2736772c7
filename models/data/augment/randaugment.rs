//! RandAugment (Cubuk et al. 2020) in timm's dialect, as the MAE and ViT fine-tuning recipes use it.

use std::borrow::Cow;

use smalti::{Error, Result, Rng};

use super::{
    affine::{affine, rotate},
    colour,
};
use crate::data::{
    ImageOp,
    image::{Filter, RgbImage},
};

/// One edit with its argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Edit {
    /// Each channel stretched to the full range.
    AutoContrast,
    /// Even histograms.
    Equalize,
    /// 255 - level.
    Invert,
    /// Counter-clockwise, in degrees.
    Rotate(f64),
    /// Upper bits kept.
    Posterize(u32),
    /// Levels from this threshold on are inverted.
    Solarize(u32),
    /// Amount added to levels below 128.
    SolarizeAdd(u32),
    /// Saturation, 1 is the image.
    Color(f32),
    /// Contrast, 1 is the image.
    Contrast(f32),
    /// Brightness, 1 is the image.
    Brightness(f32),
    /// Sharpness, 1 is the image.
    Sharpness(f32),
    /// Columns to the right per row.
    ShearX(f64),
    /// Rows down per column.
    ShearY(f64),
    /// Fraction of the width.
    TranslateX(f64),
    /// Fraction of the height.
    TranslateY(f64),
}

impl Edit {
    /// The edited image. `filter` and `fill` matter to the geometric edits alone.
    pub fn apply<'a>(self, mut image: Cow<'a, RgbImage>, filter: Filter, fill: [u8; 3]) -> Cow<'a, RgbImage> {
        let (width, height) = (f64::from(image.width()), f64::from(image.height()));
        match self {
            Edit::AutoContrast => colour::auto_contrast(image.to_mut()),
            Edit::Equalize => colour::equalize(image.to_mut()),
            Edit::Invert => colour::invert(image.to_mut()),
            Edit::Posterize(bits) => colour::posterize(image.to_mut(), bits),
            Edit::Solarize(threshold) => colour::solarize(image.to_mut(), threshold),
            Edit::SolarizeAdd(amount) => colour::solarize_add(image.to_mut(), amount),
            Edit::Color(factor) => colour::color(image.to_mut(), factor),
            Edit::Contrast(factor) => colour::contrast(image.to_mut(), factor),
            Edit::Brightness(factor) => colour::brightness(image.to_mut(), factor),
            Edit::Sharpness(factor) => colour::sharpness(image.to_mut(), factor),
            Edit::Rotate(degrees) => return Cow::Owned(rotate(&image, degrees, filter, fill)),
            Edit::ShearX(f) => return warp(&image, [1.0, f, 0.0, 0.0, 1.0, 0.0], filter, fill),
            Edit::ShearY(f) => return warp(&image, [1.0, 0.0, 0.0, f, 1.0, 0.0], filter, fill),
            Edit::TranslateX(f) => return warp(&image, [1.0, 0.0, f * width, 0.0, 1.0, 0.0], filter, fill),
            Edit::TranslateY(f) => return warp(&image, [1.0, 0.0, 0.0, 0.0, 1.0, f * height], filter, fill),
        }
        image
    }
}

fn warp<'a>(image: &RgbImage, map: [f64; 6], filter: Filter, fill: [u8; 3]) -> Cow<'a, RgbImage> {
    Cow::Owned(affine(image, map, filter, fill))
}

/// The kinds of [`Edit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum EditKind {
    AutoContrast,
    Equalize,
    Invert,
    Rotate,
    Posterize,
    Solarize,
    SolarizeAdd,
    Color,
    Contrast,
    Brightness,
    Sharpness,
    ShearX,
    ShearY,
    TranslateX,
    TranslateY,
}

impl EditKind {
    /// All of them, in timm's order.
    pub const ALL: [EditKind; 15] = [
        EditKind::AutoContrast,
        EditKind::Equalize,
        EditKind::Invert,
        EditKind::Rotate,
        EditKind::Posterize,
        EditKind::Solarize,
        EditKind::SolarizeAdd,
        EditKind::Color,
        EditKind::Contrast,
        EditKind::Brightness,
        EditKind::Sharpness,
        EditKind::ShearX,
        EditKind::ShearY,
        EditKind::TranslateX,
        EditKind::TranslateY,
    ];

    /// The edit of a magnitude in 0..=10; signs are drawn from `rng`. With `increasing` every edit departs
    /// further from the image as the magnitude grows; without, Posterize, Solarize and the four factors run in
    /// timm's older directions.
    pub fn edit(self, magnitude: f64, increasing: bool, rng: &mut Rng) -> Edit {
        let f = magnitude / 10.0;
        let mut signed = |v: f64| if rng.bernoulli(0.5) { -v } else { v };
        let mut factor = || (if increasing { 1.0 + signed(f * 0.9) } else { f * 1.8 + 0.1 }) as f32;
        let down = |full: u32, amount: u32| if increasing { full.saturating_sub(amount) } else { amount };
        match self {
            EditKind::AutoContrast => Edit::AutoContrast,
            EditKind::Equalize => Edit::Equalize,
            EditKind::Invert => Edit::Invert,
            EditKind::Posterize => Edit::Posterize(down(4, (f * 4.0) as u32)),
            EditKind::Solarize => Edit::Solarize(down(256, (f * 256.0) as u32)),
            EditKind::SolarizeAdd => Edit::SolarizeAdd((f * 110.0) as u32),
            EditKind::Color => Edit::Color(factor()),
            EditKind::Contrast => Edit::Contrast(factor()),
            EditKind::Brightness => Edit::Brightness(factor()),
            EditKind::Sharpness => Edit::Sharpness(factor()),
            EditKind::Rotate => Edit::Rotate(signed(f * 30.0)),
            EditKind::ShearX => Edit::ShearX(signed(f * 0.3)),
            EditKind::ShearY => Edit::ShearY(signed(f * 0.3)),
            EditKind::TranslateX => Edit::TranslateX(signed(f * 0.45)),
            EditKind::TranslateY => Edit::TranslateY(signed(f * 0.45)),
        }
    }
}

/// Filter of the geometric edits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resample {
    /// Always this one. timm takes the filter of the recipe's crop, if it names one: bicubic for MAE.
    Fixed(Filter),
    /// Bilinear or bicubic, drawn for every edit: timm's choice if the recipe names none.
    Random,
}

/// Per image `layers` edits drawn with replacement, each carried out with probability one half.
#[derive(Clone, Debug, PartialEq)]
pub struct RandAugment {
    /// Number of edits drawn.
    pub layers: usize,
    /// Mean magnitude, 0 to 10.
    pub magnitude: f64,
    /// Standard deviation of the magnitude; what is drawn is cut to 0..=10.
    pub magnitude_std: f64,
    /// See [`EditKind::edit`].
    pub increasing: bool,
    /// Filter of the geometric edits.
    pub resample: Resample,
    /// Colour of what a geometric edit brings in.
    pub fill: [u8; 3],
}

impl RandAugment {
    /// Parses timm's notation: `rand`, then parts joined by `-`: `m9` magnitude (10), `n2` edits (2), `mstd0.5`
    /// standard deviation (0), `inc1` increasing (`inc0`, 0; timm itself takes `inc0` for 1). Fills are the
    /// ImageNet mean, (124, 116, 104); the filter is drawn.
    ///
    /// Errors: another part, a bad number, a magnitude outside of 0 to 10, weighted choice (`w`).
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |what: String| Error::msg(format!("RandAugment `{text}`: {what}"));
        let mut parts = text.split('-');
        if parts.next() != Some("rand") {
            return Err(wrong("must start with `rand`, as in rand-m9-mstd0.5-inc1".into()));
        }
        let (resample, fill) = (Resample::Random, [124, 116, 104]);
        let (layers, magnitude, magnitude_std, increasing) = (2, 10.0, 0.0, false);
        let mut result = RandAugment { layers, magnitude, magnitude_std, increasing, resample, fill };
        for part in parts {
            let (key, value) = part.split_at(part.find(|c: char| c.is_ascii_digit()).unwrap_or(part.len()));
            let number: f64 =
                value.parse().map_err(|_| wrong(format!("part `{part}` has no valid number")))?;
            let whole = || {
                if number.fract() == 0.0 { Ok(number) } else { Err(wrong(format!("`{part}` is not whole"))) }
            };
            match key {
                "m" if whole()? <= 10.0 => result.magnitude = number,
                "m" => return Err(wrong(format!("magnitude {number} is above 10"))),
                "n" => result.layers = whole()? as usize,
                "mstd" => result.magnitude_std = number,
                "inc" => result.increasing = whole()? != 0.0,
                "w" => return Err(wrong("weighted choice of edits (`w`) is not supported".into())),
                _ => return Err(wrong(format!("unknown part `{part}`; known are m, n, mstd and inc"))),
            }
        }
        Ok(result)
    }

    /// Draws the edits of one image.
    pub fn draw(&self, rng: &mut Rng) -> Vec<(Edit, Filter)> {
        let kinds: Vec<EditKind> = (0..self.layers).map(|_| EditKind::ALL[rng.below(15) as usize]).collect();
        let mut edits = Vec::with_capacity(self.layers);
        for kind in kinds {
            if rng.bernoulli(0.5) {
                let magnitude = (self.magnitude + self.magnitude_std * rng.normal()).clamp(0.0, 10.0);
                let edit = kind.edit(magnitude, self.increasing, rng);
                let filter = match self.resample {
                    Resample::Fixed(filter) => filter,
                    Resample::Random if rng.bernoulli(0.5) => Filter::Bilinear,
                    Resample::Random => Filter::Bicubic,
                };
                edits.push((edit, filter));
            }
        }
        edits
    }
}

impl ImageOp for RandAugment {
    fn apply<'a>(&self, image: Cow<'a, RgbImage>, rng: &mut Rng) -> Result<Cow<'a, RgbImage>> {
        let edits = self.draw(rng);
        Ok(edits.into_iter().fold(image, |image, (edit, filter)| edit.apply(image, filter, self.fill)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::image;
    use std::path::Path;

    fn parse_edit(line: &str) -> (Edit, Filter) {
        let mut words = line.split(' ');
        let name = words.next().unwrap();
        let number: f64 = words.next().map_or(0.0, |n| n.parse().unwrap());
        let filter = match words.next() {
            Some("nearest") => Filter::Nearest,
            Some("bilinear") => Filter::Bilinear,
            _ => Filter::Bicubic,
        };
        let edit = match name {
            "autocontrast" => Edit::AutoContrast,
            "equalize" => Edit::Equalize,
            "invert" => Edit::Invert,
            "posterize" => Edit::Posterize(number as u32),
            "solarize" => Edit::Solarize(number as u32),
            "solarize_add" => Edit::SolarizeAdd(number as u32),
            "color" => Edit::Color(number as f32),
            "contrast" => Edit::Contrast(number as f32),
            "brightness" => Edit::Brightness(number as f32),
            "sharpness" => Edit::Sharpness(number as f32),
            "rotate" => Edit::Rotate(number),
            "shear_x" => Edit::ShearX(number),
            "shear_y" => Edit::ShearY(number),
            "translate_x" => Edit::TranslateX(number),
            "translate_y" => Edit::TranslateY(number),
            _ => panic!("unknown edit {name}"),
        };
        (edit, filter)
    }

    /// Every edit against Pillow, exactly.
    #[test]
    fn edits_are_those_of_pillow() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/goldens");
        let source = image::read(&folder.join("source.png")).unwrap();
        let results = image::read(&folder.join("ops.png")).unwrap();
        let list = std::fs::read_to_string(folder.join("ops.txt")).unwrap();
        assert_eq!(results.height() as usize, list.lines().count() * source.height() as usize);
        for (want, line) in results.chunks_exact(source.len()).zip(list.lines()) {
            let (edit, filter) = parse_edit(line);
            let got = edit.apply(Cow::Borrowed(&source), filter, [124, 116, 104]);
            let wrong = got.iter().zip(want).filter(|(a, b)| a != b).count();
            let worst = got.iter().zip(want).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
            assert_eq!((wrong, worst), (0, 0), "{line}: values that differ, largest difference");
        }
    }

    #[test]
    fn parses_the_notation_of_timm() {
        let mae = RandAugment::parse("rand-m9-mstd0.5-inc1").unwrap();
        assert_eq!((mae.layers, mae.magnitude, mae.magnitude_std, mae.increasing), (2, 9.0, 0.5, true));
        let other = RandAugment::parse("rand-n3-m7").unwrap();
        assert_eq!(
            (other.layers, other.magnitude, other.magnitude_std, other.increasing),
            (3, 7.0, 0.0, false)
        );
        for (text, part) in [
            ("augmix-m3", "start with `rand`"),
            ("rand-q3", "unknown part `q3`"),
            ("rand-m", "`m` has no"),
            ("rand-m9x", "`m9x`"),
            ("rand-m11", "above 10"),
            ("rand-m9.5", "not whole"),
            ("rand-w0", "weighted"),
            ("rand--m9", "part ``"),
        ] {
            let message = RandAugment::parse(text).unwrap_err().to_string();
            assert!(message.contains(part) && message.contains(text), "{message}");
        }
    }

    #[test]
    fn arguments_at_magnitude_nine() {
        let mut rng = Rng::new(0);
        let mut at = |kind: EditKind, increasing| kind.edit(9.0, increasing, &mut rng);
        assert_eq!(at(EditKind::Posterize, true), Edit::Posterize(1));
        assert_eq!(at(EditKind::Posterize, false), Edit::Posterize(3));
        assert_eq!(at(EditKind::Solarize, true), Edit::Solarize(26));
        assert_eq!(at(EditKind::Solarize, false), Edit::Solarize(230));
        assert_eq!(at(EditKind::SolarizeAdd, true), Edit::SolarizeAdd(99));
        assert_eq!(at(EditKind::Color, false), Edit::Color(1.72));
        assert!(matches!(at(EditKind::Rotate, true), Edit::Rotate(d) if (d.abs() - 27.0).abs() < 1e-9));
        assert!(matches!(at(EditKind::ShearX, true), Edit::ShearX(f) if (f.abs() - 0.27).abs() < 1e-9));
        assert!(
            matches!(at(EditKind::TranslateY, true), Edit::TranslateY(f) if (f.abs() - 0.405).abs() < 1e-9)
        );
        for _ in 0..20 {
            let edit = at(EditKind::Contrast, true);
            assert!(edit == Edit::Contrast(1.81) || edit == Edit::Contrast(0.19), "{edit:?}");
        }
    }

    #[test]
    fn half_of_the_edits_are_carried_out() {
        let augment = RandAugment::parse("rand-m9-mstd0.5-inc1").unwrap();
        let count: usize = (0..4000).map(|seed| augment.draw(&mut Rng::new(seed)).len()).sum();
        assert!((3800..4200).contains(&count), "{count} of 8000");
    }
}
