use super::*;
use crate::data::{
    Digits, DigitsSplit, Folder, Loader, LoaderOptions, OnUnreadable, RgbImage, Sample, View, Views, presets,
};
use smalti::Rng;
use std::{collections::HashSet, path::Path, time::Duration};

/// Ten images of one pixel whose level is their index; some cannot be read, one panics.
struct Numbers {
    bad: HashSet<usize>,
    panics: Option<usize>,
}

impl Dataset for Numbers {
    type Label = String;
    fn len(&self) -> usize {
        10
    }
    fn get(&self, index: usize) -> Result<Sample<String>> {
        assert_ne!(Some(index), self.panics);
        if self.bad.contains(&index) {
            return Err(Error::format(format!("{index}.jpg"), "broken"));
        }
        let image = RgbImage::from_pixel(1, 1, image::Rgb([index as u8; 3]));
        Ok(Sample { image: Arc::new(image), label: format!("caption {index}") })
    }
    fn name(&self, index: usize) -> String {
        format!("{index}.jpg")
    }
}

struct LevelAndNoise;

impl Transform for LevelAndNoise {
    fn views(&self, image: &RgbImage, rng: &mut Rng) -> Result<Vec<View>> {
        Ok(vec![View { shape: [1, 1, 2], data: vec![f32::from(image.as_raw()[0]), rng.f32()] }])
    }
}

fn numbers(bad: &[usize], options: LoaderOptions) -> Loader<Numbers, LevelAndNoise> {
    let dataset = Numbers { bad: bad.iter().copied().collect(), panics: None };
    Loader::new(dataset, LevelAndNoise, options).unwrap()
}

fn collect<L: Clone + Send + 'static>(epoch: Epoch<L>) -> Vec<Batch<L>> {
    epoch.map(Result::unwrap).collect()
}

/// The parts of two ranks, one behind the other, are the batches of one.
#[test]
fn ranks_share_each_batch() {
    let options =
        |batch_size, share| LoaderOptions { batch_size, share, seed: 4, ..LoaderOptions::default() };
    let whole = collect(numbers(&[], options(4, (0, 1))).epoch_from(7, 1));
    let parts = [0, 1].map(|rank| collect(numbers(&[], options(2, (rank, 2))).epoch_from(7, 1)));
    assert_eq!((whole.len(), parts[0].len(), parts[1].len()), (1, 1, 1));
    let [first, second] = [&parts[0][0], &parts[1][0]];
    assert_eq!(whole[0].labels, [first.labels.clone(), second.labels.clone()].concat());
    assert_eq!(whole[0].views[0].data, [first.views[0].data.clone(), second.views[0].data.clone()].concat());
    let loader = |options| {
        let dataset = Numbers { bad: HashSet::new(), panics: None };
        Loader::new(dataset, LevelAndNoise, options).map(|_| ()).map_err(|e| e.to_string())
    };
    assert!(loader(options(6, (0, 2))).is_err_and(|e| e.contains("batch of 12")));
    assert!(loader(LoaderOptions { drop_last: false, ..options(2, (0, 2)) }).is_err());
    assert!(loader(options(2, (2, 2))).is_err());
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let batches = |threads| {
        let dataset = Digits::open(DigitsSplit::Test).unwrap();
        let pipeline = || presets::mae_finetune(16, "rand-m9-mstd0.5-inc1", 0.5).unwrap();
        let options = LoaderOptions { batch_size: 64, threads, seed: 3, ..LoaderOptions::default() };
        let loader = Loader::new(dataset, Views(vec![pipeline(), pipeline()]), options).unwrap();
        (collect(loader.epoch(2)), collect(loader.epoch_from(2, 5)), collect(loader.epoch(3)))
    };
    let (one, resumed, other) = batches(1);
    assert_eq!(one.len(), 450 / 64);
    assert_eq!(one[0].views.len(), 2);
    assert_eq!(one[0].views[0].shape, [64, 3, 16, 16]);
    assert!(one[0].views[0] != one[0].views[1], "views must differ");
    assert!(resumed == one[5..], "an epoch taken up late must go on as it was");
    assert!(other[0].indices != one[0].indices, "epochs must differ");
    assert!(batches(3) == (one, resumed, other));
}

#[test]
fn every_sample_once() {
    let options = LoaderOptions { batch_size: 4, drop_last: false, threads: 3, ..LoaderOptions::default() };
    let loader = numbers(&[], options);
    let batches = collect(loader.epoch(0));
    assert_eq!(batches.iter().map(|b| b.labels.len()).collect::<Vec<_>>(), [4, 4, 2]);
    let mut seen: Vec<usize> = batches.iter().flat_map(|b| b.indices.clone()).collect();
    assert_eq!(seen, loader.order(0));
    seen.sort();
    assert_eq!(seen, (0..10).collect::<Vec<_>>());
    for batch in &batches {
        for (i, index) in batch.indices.iter().enumerate() {
            assert_eq!(batch.labels[i], format!("caption {index}"));
            assert_eq!(batch.views[0].data[2 * i], *index as f32);
        }
    }
    assert_eq!(loader.epoch_from(0, 3).count(), 0);
    assert_eq!(loader.epoch_from(0, 99).count(), 0);
}

#[test]
fn unreadable_samples_are_replaced() {
    let run = |threads| {
        let options = LoaderOptions { batch_size: 5, threads, ..LoaderOptions::default() };
        let loader = numbers(&[2, 3, 7], options);
        let batches = collect(loader.epoch(0));
        (batches, loader.skipped(), loader.order(0))
    };
    let (batches, skipped, order) = run(1);
    assert_eq!(skipped.iter().map(|s| s.index).collect::<Vec<_>>(), [2, 3, 7]);
    assert_eq!((skipped[0].name.as_str(), skipped[0].reason.as_str()), ("2.jpg", "2.jpg: broken"));
    let used: Vec<usize> = batches.iter().flat_map(|b| b.indices.clone()).collect();
    let good = |i: &usize| ![2, 3, 7].contains(i);
    for (position, index) in used.iter().enumerate() {
        let wanted = (0..10).map(|ahead| order[(position + ahead) % 10]).find(good).unwrap();
        assert_eq!(*index, wanted);
    }
    let noise: Vec<f32> = batches.iter().flat_map(|b| b.views[0].data.chunks(2).map(|v| v[1])).collect();
    let distinct: HashSet<u32> = noise.iter().map(|v| v.to_bits()).collect();
    assert_eq!(distinct.len(), 10, "a stand-in repeats the augmentation of the original");
    assert!(run(4) == (batches, skipped, order));
}

#[test]
fn unreadable_samples_are_dropped() {
    let options = LoaderOptions { threads: 2, ..LoaderOptions::evaluation(2) };
    let loader = numbers(&[2, 3, 7], options);
    let batches = collect(loader.epoch(0));
    let indices: Vec<Vec<usize>> = batches.iter().map(|b| b.indices.clone()).collect();
    assert_eq!(indices, [vec![0, 1], vec![4, 5], vec![6], vec![8, 9]]);
    assert_eq!(batches.iter().map(|b| b.number).collect::<Vec<_>>(), [0, 2, 3, 4]);
    assert_eq!(loader.skipped().len(), 3);
}

#[test]
fn nothing_readable_is_an_error() {
    let all: Vec<usize> = (0..10).collect();
    let options = LoaderOptions { batch_size: 5, threads: 2, ..LoaderOptions::default() };
    let loader = numbers(&all, options);
    let mut epoch = loader.epoch(0);
    let error = epoch.next().unwrap().err().unwrap().to_string();
    assert!(error.contains("none of the 10") && error.contains("0.jpg: broken"), "{error}");
    assert!(epoch.next().is_none() && epoch.next().is_none());
}

#[test]
fn a_panic_reaches_the_caller() {
    let dataset = Numbers { bad: HashSet::new(), panics: Some(6) };
    let options = LoaderOptions { threads: 3, ..LoaderOptions::evaluation(5) };
    let loader = Loader::new(dataset, LevelAndNoise, options).unwrap();
    let results: Vec<_> = loader.epoch(0).collect();
    assert_eq!(results.len(), 2);
    let error = results[1].as_ref().err().unwrap().to_string();
    assert!(error.contains("panicked at or after 6.jpg"), "{error}");
}

#[test]
fn dropping_early_does_not_hang() {
    for taken in 0..4 {
        for threads in [1, 3] {
            let options = LoaderOptions { threads, prefetch: 1, ..LoaderOptions::evaluation(2) };
            let loader = numbers(&[], options);
            let mut epoch = loader.epoch(0);
            for _ in 0..taken {
                epoch.next().unwrap().unwrap();
            }
            if threads == 3 {
                thread::sleep(Duration::from_millis(5));
            }
            drop(epoch);
        }
    }
}

#[test]
fn differing_sizes_are_an_error() {
    let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/files/photos");
    let pipeline = crate::data::Pipeline::new(crate::data::augment::Normalize::imagenet().unwrap());
    let loader =
        Loader::new(Folder::open(&photos).unwrap(), pipeline, LoaderOptions::evaluation(12)).unwrap();
    let error = loader.epoch(0).next().unwrap().err().unwrap().to_string();
    assert!(error.contains("crop or resize to one size"), "{error}");
}

#[test]
fn photos_with_a_broken_file() {
    let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/files/photos");
    let root = tempfile::tempdir().unwrap();
    for name in ["coins.jpg", "moon.jpg", "brick.jpg"] {
        std::fs::copy(photos.join(name), root.path().join(name)).unwrap();
    }
    std::fs::write(root.path().join("broken.jpg"), b"not a picture").unwrap();
    let options = LoaderOptions { batch_size: 4, ..LoaderOptions::default() };
    let dataset = crate::data::Cached::new(Folder::open(root.path()).unwrap(), 1 << 20);
    let loader = Loader::new(dataset, presets::mae_pretrain(64).unwrap(), options).unwrap();
    for epoch in 0..2 {
        assert_eq!(collect(loader.epoch(epoch))[0].views[0].shape, [4, 3, 64, 64]);
    }
    let skipped = loader.skipped();
    assert_eq!(skipped.len(), 1);
    assert!(skipped[0].name.ends_with("broken.jpg") && skipped[0].reason.contains("not a JPEG"));
}

#[test]
fn impossible_settings() {
    let fails = |options| {
        let dataset = Numbers { bad: HashSet::new(), panics: None };
        Loader::new(dataset, LevelAndNoise, options).err().unwrap().to_string()
    };
    assert!(fails(LoaderOptions { batch_size: 0, ..LoaderOptions::default() }).contains("batch_size"));
    assert!(fails(LoaderOptions { batch_size: 11, ..LoaderOptions::default() }).contains("drop_last"));
    let options = LoaderOptions { on_unreadable: OnUnreadable::Drop, ..LoaderOptions::default() };
    assert_eq!(options.prefetch, 2);
}
