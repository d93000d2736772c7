use super::*;
use crate::data::image;
use std::{collections::HashMap, path::Path};

fn edit(image: &mut RgbImage, name: &str, argument: f64) {
    match name {
        "hue" => Tint::Hue(argument).apply(image),
        "brightness" => Tint::Brightness(argument as f32).apply(image),
        "contrast" => Tint::Contrast(argument as f32).apply(image),
        "saturation" => Tint::Saturation(argument as f32).apply(image),
        "blur" => blur::gaussian_blur(image, argument as f32).unwrap(),
        "gray" => colour::grayscale(image),
        "solarize" => colour::solarize(image, argument as u32),
        _ => panic!("unknown edit {name}"),
    }
}

/// Every edit against Pillow and torchvision, exactly, also of images of one pixel, row or column.
#[test]
fn edits_are_those_of_torchvision() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/goldens");
    let source = image::read(&folder.join("source.png")).unwrap();
    let results = image::read(&folder.join("views.png")).unwrap();
    let list = std::fs::read_to_string(folder.join("views.txt")).unwrap();
    assert_eq!(results.height() as usize, list.lines().count() * source.height() as usize);
    for (i, line) in list.lines().enumerate() {
        let words: Vec<&str> = line.split(' ').collect();
        let (width, height) = (words[2].parse().unwrap(), words[3].parse().unwrap());
        let region = |top| image::Region { left: 0, top, width, height };
        let want = image::crop(&results, region(i as u32 * source.height())).unwrap();
        let mut got = image::crop(&source, region(0)).unwrap();
        edit(&mut got, words[0], words[1].parse().unwrap());
        let wrong = got.iter().zip(want.iter()).filter(|(a, b)| a != b).count();
        let worst = got.iter().zip(want.iter()).map(|(a, b)| a.abs_diff(*b)).max().unwrap();
        assert_eq!((wrong, worst), (0, 0), "{line}: values that differ, largest difference");
    }
}

#[test]
fn jitter_draws_factors_and_orders_evenly() {
    let jitter = ColorJitter { brightness: 0.4, contrast: 1.5, saturation: 0.2, hue: 0.1 };
    let (mut orders, mut sums) = (HashMap::new(), [0.0; 4]);
    for seed in 0..4800 {
        let tints = jitter.draw(&mut Rng::new(seed));
        let mut order = Vec::new();
        for tint in tints {
            let (which, value, range) = match tint {
                Tint::Brightness(f) => (0, f64::from(f), 0.6..1.4001),
                Tint::Contrast(f) => (1, f64::from(f), 0.0..2.5001),
                Tint::Saturation(f) => (2, f64::from(f), 0.7999..1.2001),
                Tint::Hue(f) => (3, f, -0.1..0.1),
            };
            assert!(range.contains(&value), "{tint:?}");
            sums[which] += value / 4800.0;
            order.push(which);
        }
        *orders.entry(order).or_insert(0) += 1;
    }
    // 24 orders, each 200 times, with a standard deviation of 14.
    assert_eq!(orders.len(), 24);
    assert!(orders.iter().all(|(order, n)| order.len() == 4 && (140..260).contains(n)), "{orders:?}");
    let off: Vec<f64> =
        sums.iter().zip([1.0, 1.25, 1.0, 0.0]).map(|(sum, mean)| (sum - mean).abs()).collect();
    assert!(off[0] < 0.015 && off[1] < 0.045 && off[2] < 0.008 && off[3] < 0.004, "{sums:?}");
}

#[test]
fn no_strength_no_edit() {
    let image = RgbImage::from_fn(4, 4, |x, y| ::image::Rgb([x as u8 * 60, y as u8 * 60, 77]));
    let none = ColorJitter { brightness: 0.0, contrast: 0.0, saturation: 0.0, hue: 0.0 };
    let same = none.apply(Cow::Borrowed(&image), &mut Rng::new(0)).unwrap();
    assert!(matches!(same, Cow::Borrowed(_)));
    let one = ColorJitter { saturation: 0.5, ..none };
    assert!(matches!(one.draw(&mut Rng::new(3))[..], [Tint::Saturation(_)]));
    for bad in [ColorJitter { hue: 0.6, ..none }, ColorJitter { contrast: -0.1, ..none }] {
        assert!(bad.apply(Cow::Borrowed(&image), &mut Rng::new(0)).is_err());
    }
    assert!(GaussianBlur(-2.0, -1.0).apply(Cow::Borrowed(&image), &mut Rng::new(0)).is_err());
}

#[test]
fn chances() {
    let image = RgbImage::from_pixel(1, 1, ::image::Rgb([200, 0, 0]));
    let happened = |p: f64| {
        let edited = |seed: &u64| {
            *Randomly(p, Solarize(128)).apply(Cow::Borrowed(&image), &mut Rng::new(*seed)).unwrap() != image
        };
        (0..2000).filter(edited).count()
    };
    assert_eq!((happened(0.0), happened(1.0)), (0, 2000));
    assert!((1530..1670).contains(&happened(0.8)) && (160..240).contains(&happened(0.1)));
}

#[test]
fn the_stream_decides() {
    let image = RgbImage::from_fn(9, 7, |x, y| ::image::Rgb([x as u8 * 25, y as u8 * 30, 130]));
    let jitter = ColorJitter { brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.4 };
    let edited = |seed| {
        let mut rng = Rng::new(seed);
        let jittered = jitter.apply(Cow::Borrowed(&image), &mut rng).unwrap();
        let blurred = GaussianBlur(0.1, 2.0).apply(jittered, &mut rng).unwrap();
        (blurred.into_owned(), rng.state())
    };
    assert_eq!(edited(1), edited(1));
    assert_ne!(edited(1).0, edited(2).0);
}
