use super::*;
use crate::data::{
    Batch, Digits, DigitsSplit, Loader, LoaderOptions, RgbImage, Transform, View, augment::CIFAR10_MEAN,
};
use proptest::prelude::{ProptestConfig, prop_assert, prop_assert_eq, proptest};
use smalti::Rng;

const MOCO_V3: TwoViews = TwoViews::MocoV3 { min_area: 0.08 };
const ALL: [TwoViews; 4] = [TwoViews::MocoV1, TwoViews::MocoV2, MOCO_V3, TwoViews::CifarNotebook];

fn imagenet(kind: TwoViews, size: u32) -> Views {
    two_views(kind, size, &Normalize::imagenet().unwrap()).unwrap()
}

fn ops(pipeline: &Pipeline) -> Vec<String> {
    pipeline.ops().iter().skip(1).map(|op| format!("{op:?}")).collect()
}

/// The edits behind the crop, as the papers' tables have them.
#[test]
fn orders_and_probabilities() {
    let jitter = |s: &str, h: &str| {
        format!("ColorJitter {{ brightness: 0.4, contrast: 0.4, saturation: {s}, hue: {h} }}")
    };
    let often = |jitter: String| format!("Randomly(0.8, {jitter})");
    let (gray, flip) = ("Randomly(0.2, Grayscale)".to_owned(), "HorizontalFlip(0.5)".to_owned());
    let blur = |p: &str| format!("Randomly({p}, GaussianBlur(0.1, 2.0))");
    let twice = |ops: Vec<String>| [ops.clone(), ops];
    let v2 = vec![often(jitter("0.4", "0.1")), gray.clone(), blur("0.5"), flip.clone()];
    let v3 = |rest: &[&str]| {
        let coloured = [often(jitter("0.2", "0.1")), gray.clone()];
        coloured.into_iter().chain(rest.iter().map(|op| op.to_string())).chain([flip.clone()]).collect()
    };
    let table = [
        (TwoViews::MocoV1, 0.2, twice(vec![gray.clone(), jitter("0.4", "0.4"), flip.clone()])),
        (TwoViews::MocoV2, 0.2, twice(v2)),
        (
            MOCO_V3,
            0.08,
            [v3(&["GaussianBlur(0.1, 2.0)"]), v3(&[&blur("0.1"), "Randomly(0.2, Solarize(128))"])],
        ),
        (TwoViews::CifarNotebook, 0.08, twice(vec![flip.clone(), often(jitter("0.4", "0.1")), gray.clone()])),
    ];
    for (kind, min_area, want) in table {
        let views = imagenet(kind, 48);
        assert_eq!(views.0.iter().map(ops).collect::<Vec<_>>(), want, "{kind:?}");
        let crop = RandomResizedCrop { filter: Filter::Bilinear, ..RandomResizedCrop::new(48, min_area) };
        for pipeline in &views.0 {
            assert_eq!(format!("{:?}", pipeline.ops()[0]), format!("{crop:?}"));
        }
    }
    for min_area in [0.0, 1.5, f64::NAN] {
        let kind = TwoViews::MocoV3 { min_area };
        assert!(two_views(kind, 48, &Normalize::imagenet().unwrap()).is_err());
    }
}

/// How many of `draws` views number `which` are so.
fn count(views: &Views, image: &RgbImage, which: usize, so: impl Fn(&RgbImage) -> bool) -> usize {
    let one = |seed| {
        let view = views.views(image, &mut Rng::new(seed)).unwrap().swap_remove(which);
        views.0[which].normalize().image(&view.data, view.shape).unwrap()
    };
    (0..2000).filter(|seed| so(&one(*seed))).count()
}

#[test]
fn shares_of_grey_mirrored_and_solarised_views() {
    // Dark red, brighter to the right, never near 128.
    let image = RgbImage::from_fn(16, 16, |x, _| ::image::Rgb([30 + 2 * x as u8, 10, 10]));
    let grey = |view: &RgbImage| view.pixels().all(|p| p.0[0].abs_diff(p.0[1]) < 2 && p.0[1] == p.0[2]);
    let side = |view: &RgbImage, from: u32| -> u32 {
        let columns = |y| (from..from + 3).map(move |x| u32::from(view.get_pixel(x, y).0[0]));
        (0..8).flat_map(columns).sum()
    };
    let mirrored = |view: &RgbImage| side(view, 0) > side(view, 5);
    for kind in ALL {
        for which in 0..2 {
            let views = imagenet(kind, 8);
            let n = count(&views, &image, which, grey);
            assert!((330..470).contains(&n), "{kind:?}, view {which}: {n} grey");
        }
    }
    for kind in [TwoViews::MocoV2, TwoViews::CifarNotebook] {
        let n = count(&imagenet(kind, 8), &image, 1, mirrored);
        assert!((910..1090).contains(&n), "{kind:?}: {n} mirrored");
    }
    let bright = RgbImage::from_pixel(16, 16, ::image::Rgb([250; 3]));
    let v3 = imagenet(MOCO_V3, 8);
    // Brightness falls to 0.6 of 250 at least: what is below 128 was solarised.
    let solarised = |view: &RgbImage| view.get_pixel(4, 4).0[1] < 128;
    assert_eq!(count(&v3, &bright, 0, solarised), 0);
    let n = count(&v3, &bright, 1, solarised);
    assert!((330..470).contains(&n), "{n} solarised");
}

fn all_views() -> Vec<Views> {
    let mut all: Vec<Views> = ALL.iter().map(|kind| imagenet(*kind, 12)).collect();
    all.push(Views(vec![flip_pretrain(12).unwrap()]));
    all.push(digit_views(12, 3, DigitViews::default()).unwrap());
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn every_size_of_image_gives_its_views(width in 1u32..40, height in 1u32..40, seed: u64) {
        let mut rng = Rng::new(seed);
        let image = RgbImage::from_fn(width, height, |_, _| ::image::Rgb([0; 3].map(|_| rng.below(256) as u8)));
        for views in all_views() {
            let made = views.views(&image, &mut Rng::new(seed)).unwrap();
            prop_assert!(made.iter().all(|view| view.shape == [3, 12, 12] && view.data.len() == 432));
            prop_assert!(made.iter().all(|view| view.data.iter().all(|v| v.is_finite())));
            prop_assert_eq!(made, views.views(&image, &mut Rng::new(seed)).unwrap());
        }
    }
}

#[test]
fn one_pixel_and_long_lines() {
    for (width, height) in [(1, 1), (1, 300), (300, 1), (2, 1)] {
        let image = RgbImage::from_pixel(width, height, ::image::Rgb([10, 200, 90]));
        for views in all_views() {
            for seed in 0..20 {
                views.views(&image, &mut Rng::new(seed)).unwrap();
            }
        }
    }
}

#[test]
fn batches_are_the_same_for_any_number_of_threads() {
    let batches = |threads, views: Views| -> Vec<Batch> {
        let options = LoaderOptions { batch_size: 32, threads, seed: 5, ..LoaderOptions::default() };
        let digits = Digits::open(DigitsSplit::Test).unwrap();
        let loader = Loader::new(digits, views, options).unwrap();
        loader.epoch(1).take(3).map(Result::unwrap).collect()
    };
    for (one, two) in all_views().into_iter().zip(all_views()) {
        let (one, two) = (batches(1, one), batches(2, two));
        assert!(one == two);
        assert!(one[0].views.len() == 1 || one[0].views[0] != one[0].views[1], "views must differ");
    }
}

#[test]
fn flip_overshoots_and_falls_back_to_the_square() {
    let checks = RgbImage::from_fn(64, 48, |x, y| ::image::Rgb([255 * (((x / 6) + (y / 6)) % 2) as u8; 3]));
    let pipeline = flip_pretrain(96).unwrap();
    let view = pipeline.view(&checks, &mut Rng::new(0)).unwrap();
    let level = |v: &f32| (v * 0.229 + 0.485) * 255.0;
    assert!(view.data[..96 * 96].iter().any(|v| level(v) > 256.0));
    // A strip of 400 x 20 has no rectangle of half its area: always the same square, or its mirror image.
    let strip = RgbImage::from_fn(400, 20, |x, _| ::image::Rgb([(x % 256) as u8, 0, 0]));
    let made: Vec<View> = (0..30).map(|s| pipeline.view(&strip, &mut Rng::new(s)).unwrap()).collect();
    let same = made.iter().filter(|view| **view == made[0]).count();
    let other = made.iter().find(|view| **view != made[0]).unwrap();
    assert_eq!(made.iter().filter(|view| *view == other).count() + same, 30);
}

#[test]
fn digits_have_strengths() {
    let image = Digits::open(DigitsSplit::Train).unwrap().image(3).unwrap();
    let geometry = DigitStrength { shift: 0.0, degrees: 0.0, scale: 0.0 };
    let none = DigitViews { geometry, min_area: 1.0, brightness: 0.0, contrast: 0.0, blur: 0.0, sigma: 0.0 };
    let plain = digits(16, 1, None).unwrap().view(&image, &mut Rng::new(0)).unwrap();
    let views = digit_views(16, 1, none).unwrap().views(&image, &mut Rng::new(0)).unwrap();
    assert_eq!(views, [plain.clone(), plain.clone()]);
    for strength in [
        DigitViews { min_area: 0.5, ..none },
        DigitViews { brightness: 0.5, ..none },
        DigitViews { contrast: 0.5, ..none },
        DigitViews { blur: 1.0, sigma: 0.1, ..none },
        DigitViews { geometry: DigitStrength { degrees: 20.0, ..geometry }, ..none },
    ] {
        let views = digit_views(16, 1, strength).unwrap().views(&image, &mut Rng::new(0)).unwrap();
        assert!(views[0] != plain && views[1] != plain && views[0] != views[1], "{strength:?}");
    }
    for bad in [DigitViews { min_area: 0.0, ..none }, DigitViews { contrast: -0.1, ..none }] {
        assert!(digit_views(16, 1, bad).is_err());
    }
}

#[test]
fn cifar_has_its_constants() {
    let normalize = Normalize::new(&CIFAR10_MEAN, &crate::data::augment::CIFAR10_STD).unwrap();
    let views = two_views(TwoViews::CifarNotebook, 32, &normalize).unwrap();
    let image = RgbImage::from_pixel(32, 32, ::image::Rgb([255; 3]));
    let top = (1.0 - CIFAR10_MEAN[0]) / 0.2023;
    let made = views.views(&image, &mut Rng::new(1)).unwrap();
    assert!(made.iter().all(|view| view.data[..1024].iter().all(|v| *v <= top + 1e-6)));
}
