//! A turn of the hue circle with the results of torchvision's `adjust_hue` on Pillow images, to the level.

use smalti::cpu::simd::simd;

use crate::data::image::RgbImage;

/// Turns the hue by `factor` of the circle, -0.5 to 0.5. The image goes through 8-bit HSV and back, which moves
/// levels a little even if the turn is 0.
pub fn hue(image: &mut RgbImage, factor: f64) {
    // Cut towards zero and added modulo 256, though Pillow's circle has 255 steps: so does torchvision.
    let shift = (factor * 255.0) as i32 as u8;
    let (pixels, tables) = (&mut **image, Tables::new());
    simd(
        #[inline(always)]
        move || turn(pixels, shift, &tables),
    );
}

#[inline(always)]
fn turn(pixels: &mut [u8], shift: u8, tables: &Tables) {
    for pixel in pixels.chunks_exact_mut(3) {
        let [h, s, v] = to_hsv([pixel[0], pixel[1], pixel[2]]);
        pixel.copy_from_slice(&tables.to_rgb([h.wrapping_add(shift), s, v]));
    }
}

// Both conversions round to single precision exactly where Pillow's variables do (its `Convert.c`); everything
// between two assignments runs in doubles there. With single precision throughout, some pixels would differ.

#[inline(always)]
fn to_hsv([r, g, b]: [u8; 3]) -> [u8; 3] {
    let (max, min) = (r.max(g).max(b), r.min(g).min(b));
    if max == min {
        return [0, 0, max];
    }
    let spread = f32::from(max - min);
    let [rc, gc, bc] = [r, g, b].map(|level| f32::from(max - level) / spread);
    let sixths = if r == max {
        bc - gc
    } else if g == max {
        (2.0 + f64::from(rc) - f64::from(bc)) as f32
    } else {
        (4.0 + f64::from(gc) - f64::from(rc)) as f32
    };
    let turns = f64::from(sixths) / 6.0 + 1.0;
    let h = (if turns >= 1.0 { turns - 1.0 } else { turns }) as f32;
    let s = spread / f32::from(max);
    [(f64::from(h) * 255.0) as u8, (f64::from(s) * 255.0) as u8, max]
}

/// What depends on one of the 256 hues or saturations alone.
struct Tables {
    /// Which sixth of the circle, and how far into it.
    sector: [(u8, f32); 256],
    saturation: [f32; 256],
}

impl Tables {
    fn new() -> Self {
        let sector = |h: usize| {
            let sixths = h as f64 * 6.0 / 255.0;
            (sixths.floor() as u8 % 6, (sixths - sixths.floor()) as f32)
        };
        Tables {
            sector: std::array::from_fn(sector),
            saturation: std::array::from_fn(|s| (s as f64 / 255.0) as f32),
        }
    }

    #[inline(always)]
    fn to_rgb(&self, [h, s, v]: [u8; 3]) -> [u8; 3] {
        let (sector, into) = self.sector[usize::from(h)];
        let saturation = self.saturation[usize::from(s)];
        let level = |less: f64| (f64::from(v) * (1.0 - less)).round() as u8;
        let p = level(f64::from(saturation));
        let q = level(f64::from(saturation * into));
        let t = level(f64::from(saturation) * (1.0 - f64::from(into)));
        match sector {
            0 => [v, t, p],
            1 => [q, v, p],
            2 => [p, v, t],
            3 => [p, q, v],
            4 => [t, p, v],
            _ => [v, p, q],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grey_has_no_hue() {
        let image = RgbImage::from_fn(16, 16, |x, y| ::image::Rgb([(y * 16 + x) as u8; 3]));
        for factor in [-0.5, 0.0, 0.3] {
            let mut turned = image.clone();
            hue(&mut turned, factor);
            assert_eq!(turned, image);
        }
    }

    /// FNV-1a of the results of torchvision for every fourth level of each channel (`goldens/make.py`).
    #[test]
    fn all_around_the_circle_as_torchvision() {
        let level = |i: u32| (i * 4 + i % 4) as u8;
        let colours = RgbImage::from_fn(512, 512, |x, y| {
            let at = y * 512 + x;
            ::image::Rgb([level(at >> 12), level(at >> 6 & 63), level(at & 63)])
        });
        for (factor, want) in
            [(-0.31, 0xdb0e_d04f_7f10_9b6b), (0.0, 0x08a1_63eb_5fc6_1dbc), (0.1, 0x6603_daf6_f83e_53ee)]
        {
            let mut image = colours.clone();
            hue(&mut image, factor);
            let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
            assert_eq!(image.iter().fold(0xcbf2_9ce4_8422_2325, fold), want, "{factor}");
        }
    }

    #[test]
    fn red_turns_to_green_to_blue() {
        let mut image = RgbImage::from_pixel(1, 1, ::image::Rgb([255, 0, 0]));
        hue(&mut image, 1.0 / 3.0);
        assert_eq!(image.get_pixel(0, 0).0, [0, 255, 0]);
        hue(&mut image, 1.0 / 3.0);
        assert_eq!(image.get_pixel(0, 0).0, [0, 0, 255]);
    }
}
