//! Images with captions.

use super::{Batch, Dataset, Digits, Sample, image};
use smalti::{Error, Result, Rng};
use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The stream of the seed that chooses captions.
const CAPTION_STREAM: u64 = 0x6361_7074;

/// Names of the digits.
pub const DIGIT_NAMES: [&str; 10] =
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];

/// Captions of the digits, `{}` for the name.
pub const DIGIT_TEMPLATES: [&str; 8] = [
    "a photo of the digit {}.",
    "a scan of the number {}.",
    "the digit {}, written by hand.",
    "a handwritten {}.",
    "a small image of a {}.",
    "this is the number {}.",
    "a picture of the number {}.",
    "{}, a digit.",
];

/// The captions of an image.
#[derive(Clone, Debug, PartialEq)]
pub struct Captions {
    /// At least one.
    pub texts: Arc<[String]>,
    /// The image's class, where it is known, for evaluation.
    pub class: Option<i64>,
}

impl Captions {
    /// One of them, all with the same probability.
    pub fn choose(&self, rng: &mut Rng) -> &str {
        let index = rng.below(self.texts.len() as u64) as usize;
        self.texts.get(index).map_or("", String::as_str)
    }
}

/// A caption for each image of a batch. It depends on seed, epoch and the image's index alone, as the images'
/// augmentation does, so that a run that is taken up again sees the same ones.
pub fn choose_captions(batch: &Batch<Captions>, seed: u64, epoch: u64) -> Vec<&str> {
    let stream = Rng::new(seed).stream(CAPTION_STREAM).stream(epoch);
    let pairs = batch.labels.iter().zip(&batch.indices);
    pairs.map(|(captions, &index)| captions.choose(&mut stream.stream(index as u64))).collect()
}

/// A folder of images with a file `captions.tsv`: a path (relative to the folder), a tab, a caption in every line.
/// Several lines may have the same path; they are the captions of one image. Empty lines do not count. Images come in
/// the order in which their paths come first.
#[derive(Clone, Debug)]
pub struct Pairs {
    samples: Vec<(PathBuf, Captions)>,
}

impl Pairs {
    /// Reads `root/captions.tsv`. The images are not looked at.
    ///
    /// Errors: no such file; not UTF-8; a line without a tab, a path or a caption, with its number; no line.
    pub fn open(root: &Path) -> Result<Self> {
        let path = root.join("captions.tsv");
        let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
        let mut places = HashMap::new();
        let mut images: Vec<(PathBuf, Vec<String>)> = Vec::new();
        let text = text.trim_start_matches('\u{feff}');
        for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let parts = line.split_once('\t').map(|(file, caption)| (file.trim(), caption.trim()));
            let Some((file, caption)) =
                parts.filter(|(file, caption)| !file.is_empty() && !caption.is_empty())
            else {
                let what = format!("line {}: not a path, a tab and a caption", number + 1);
                return Err(Error::format(&path, what));
            };
            let place = *places.entry(file).or_insert(images.len());
            match images.get_mut(place) {
                Some((_, captions)) => captions.push(caption.to_owned()),
                None => images.push((root.join(file), vec![caption.to_owned()])),
            }
        }
        if images.is_empty() {
            return Err(Error::format(&path, "no line with a path, a tab and a caption"));
        }
        let captions = |texts: Vec<String>| Captions { texts: texts.into(), class: None };
        Ok(Pairs { samples: images.into_iter().map(|(file, texts)| (file, captions(texts))).collect() })
    }

    /// Captions of image `index`.
    pub fn captions(&self, index: usize) -> &Captions {
        &self.samples[index].1
    }
}

impl Dataset for Pairs {
    type Label = Captions;

    fn len(&self) -> usize {
        self.samples.len()
    }

    fn get(&self, index: usize) -> Result<Sample<Captions>> {
        let (path, captions) = &self.samples[index];
        Ok(Sample { image: Arc::new(image::read(path)?), label: captions.clone() })
    }

    fn name(&self, index: usize) -> String {
        self.samples[index].0.display().to_string()
    }
}

/// The digits, each with [`DIGIT_TEMPLATES`] filled in with its name as captions and its number as class.
#[derive(Clone, Debug)]
pub struct DigitPairs {
    digits: Digits,
    captions: Vec<Captions>,
}

impl DigitPairs {
    /// Captions for these digits.
    pub fn new(digits: Digits) -> Self {
        let texts = |name: &str| DIGIT_TEMPLATES.iter().map(|t| t.replace("{}", name)).collect();
        let named = DIGIT_NAMES.iter().zip(0..);
        let captions =
            named.map(|(name, class)| Captions { texts: texts(name), class: Some(class) }).collect();
        DigitPairs { digits, captions }
    }
}

impl Dataset for DigitPairs {
    type Label = Captions;

    fn len(&self) -> usize {
        self.digits.len()
    }

    fn get(&self, index: usize) -> Result<Sample<Captions>> {
        let Sample { image, label } = self.digits.get(index)?;
        Ok(Sample { image, label: self.captions[label as usize].clone() })
    }

    fn name(&self, index: usize) -> String {
        self.digits.name(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{
        DIGITS_MEAN, DIGITS_STD, DigitsSplit, Filter, Loader, LoaderOptions, Pipeline, augment,
    };

    fn folder(text: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("captions.tsv"), text).unwrap();
        root
    }

    #[test]
    fn captions_gather_under_their_image() {
        let root = folder("\u{feff}b/1.png\ta cat\r\n\na.png\t a dog \nb/1.png\tone\tcat\n");
        fs::create_dir(root.path().join("b")).unwrap();
        image::RgbImage::new(3, 2).save(root.path().join("b/1.png")).unwrap();
        let pairs = Pairs::open(root.path()).unwrap();
        assert_eq!(pairs.len(), 2);
        assert_eq!(*pairs.captions(0).texts, ["a cat".to_owned(), "one\tcat".to_owned()]);
        assert_eq!(*pairs.captions(1).texts, ["a dog".to_owned()]);
        assert_eq!(pairs.get(0).unwrap().image.dimensions(), (3, 2));
        assert!(pairs.get(1).unwrap_err().to_string().contains("a.png"));
        assert!(pairs.name(1).ends_with("a.png"));
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let message = |text: &str| Pairs::open(folder(text).path()).unwrap_err().to_string();
        for bad in ["x.png a cat", "x.png\t ", "\ta cat"] {
            let message = message(&format!("y.png\tfine\n\n{bad}\n"));
            assert!(message.contains("captions.tsv: line 3"), "{message}");
        }
        assert!(message("\n").contains("no line"));
        let empty = tempfile::tempdir().unwrap();
        assert!(Pairs::open(empty.path()).unwrap_err().to_string().contains("captions.tsv"));
    }

    #[test]
    fn digits_have_captions_and_classes() {
        let pairs = DigitPairs::new(Digits::open(DigitsSplit::Test).unwrap());
        let labels = Digits::open(DigitsSplit::Test).unwrap();
        for index in [0, 7, 449] {
            let label = pairs.get(index).unwrap().label;
            let class = labels.labels()[index];
            assert_eq!(label.class, Some(class));
            assert_eq!(label.texts.len(), DIGIT_TEMPLATES.len());
            assert!(label.texts.iter().all(|t| t.contains(DIGIT_NAMES[class as usize]) && !t.contains('{')));
        }
    }

    #[test]
    fn choices_depend_on_seed_epoch_and_index_alone() {
        let loader = |batch_size| {
            let pairs = DigitPairs::new(Digits::open(DigitsSplit::Test).unwrap().scaled(8, Filter::Nearest));
            let grey = |v| [v; 3];
            let normalize = augment::Normalize::new(&grey(DIGITS_MEAN), &grey(DIGITS_STD)).unwrap();
            let options = LoaderOptions { batch_size, shuffle: false, ..LoaderOptions::default() };
            Loader::new(pairs, Pipeline::new(normalize), options).unwrap()
        };
        let choices = |batch_size, seed, epoch: u64| -> Vec<String> {
            let batches: Vec<_> = loader(batch_size).epoch(epoch).map(Result::unwrap).collect();
            let chosen = batches.iter().flat_map(|b| choose_captions(b, seed, epoch));
            chosen.take(90).map(str::to_owned).collect()
        };
        let first = choices(45, 1, 0);
        assert_eq!(first, choices(15, 1, 0));
        assert_ne!(first, choices(45, 2, 0));
        assert_ne!(first, choices(45, 1, 1));
        let ending = first.iter().filter(|t| t.starts_with("a photo of the digit")).count();
        assert!((3..25).contains(&ending), "{ending} of 90 have the first of 8 templates");
    }
}
