//! Finding the caption of an image and the image of a caption, as on Flickr30k and COCO.

use smalti::{DType, Result, Tensor, ensure, no_grad};

/// Rows of similarities that are held at a time.
const ROWS: usize = 1024;

/// Parts of the queries that find what belongs to them.
#[derive(Clone, Debug, PartialEq)]
pub struct Recall {
    /// Among how many best.
    pub at: Vec<usize>,
    /// Images with one of their captions among them.
    pub image_to_text: Vec<f64>,
    /// Captions with their image among them.
    pub text_to_image: Vec<f64>,
}

/// Recall of images `[N, E]` and captions `[M, E]`, features of length 1, all against all. `image_of` tells each
/// caption's image; an image may have several captions, and one of them is enough.
///
/// What is exactly as similar as the right answer counts as before it: features that are all the same find nothing.
///
/// # Errors
/// If shapes do not fit, a caption's image is none, an image has no caption, or a number in `at` is 0.
pub fn recall(images: &Tensor, captions: &Tensor, image_of: &[usize], at: &[usize]) -> Result<Recall> {
    const OP: &str = "retrieval";
    let ([n, e], [m, f]) = (images.dims::<2>(OP)?, captions.dims::<2>(OP)?);
    ensure!(
        e == f && m == image_of.len(),
        OP,
        "images [{n}, {e}], captions [{m}, {f}] of {} images",
        image_of.len()
    );
    ensure!(!at.contains(&0), OP, "nothing is among the 0 best");
    let mut captions_of = vec![Vec::new(); n];
    for (caption, &image) in image_of.iter().enumerate() {
        ensure!(image < n, OP, "caption {caption} belongs to image {image} of {n}");
        captions_of[image].push(caption);
    }
    let bare = captions_of.iter().position(Vec::is_empty);
    ensure!(n > 0 && bare.is_none(), OP, "image {} of {n} has no caption", bare.unwrap_or(0));
    let owners: Vec<Vec<usize>> = image_of.iter().map(|&image| vec![image]).collect();
    let part = |places: &[usize]| -> Vec<f64> {
        let within = |k| places.iter().filter(|&&place| place < k).count() as f64 / places.len() as f64;
        at.iter().map(|&k| within(k)).collect()
    };
    let image_to_text = part(&places(images, captions, &captions_of)?);
    let text_to_image = part(&places(captions, images, &owners)?);
    Ok(Recall { at: at.to_vec(), image_to_text, text_to_image })
}

/// For each query how many wrong answers come before its best right one.
fn places(queries: &Tensor, answers: &Tensor, right: &[Vec<usize>]) -> Result<Vec<usize>> {
    let answers = answers.to_dtype(DType::F32)?.t()?;
    let mut places = Vec::with_capacity(right.len());
    for start in (0..right.len()).step_by(ROWS) {
        let rows = queries.narrow(0, start, ROWS.min(right.len() - start))?.to_dtype(DType::F32)?;
        let similar = no_grad(|| rows.matmul(&answers))?.contiguous()?.to_vec::<f32>()?;
        let width = answers.shape()[1];
        for (row, right) in similar.chunks_exact(width).zip(&right[start..]) {
            let best = right.iter().fold(f32::NEG_INFINITY, |best, &i| best.max(row[i]));
            // what cannot be compared is before it too
            let before = row.iter().filter(|&&s| !(s < best)).count();
            let own = right.iter().filter(|&&i| !(row[i] < best)).count();
            places.push(before - own);
        }
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two images, three captions each, by angle in degrees.
    fn features(angles: &[f32]) -> Result<Tensor> {
        let values: Vec<f32> =
            angles.iter().flat_map(|a| [a.to_radians().cos(), a.to_radians().sin()]).collect();
        Tensor::from_slice(&values, [angles.len(), 2])
    }

    #[test]
    fn one_caption_of_several_is_enough() -> Result<()> {
        // image 0 at 0 degrees: its captions at 80, 70 and 2; image 1 at 90: its captions at 60, 30 and 1
        let (images, captions) = (features(&[0., 90.])?, features(&[80., 70., 2., 60., 30., 1.])?);
        let got = recall(&images, &captions, &[0, 0, 0, 1, 1, 1], &[1, 2, 3, 5])?;
        // image 0: 1 is nearest and wrong, 2 is right; image 1: 80 and 70 come before 60
        assert_eq!(got.image_to_text, [0.0, 0.5, 1.0, 1.0]);
        // 80 and 70 find image 1, which is wrong, 2 is right; 60 is right, 30 and 1 find image 0
        assert_eq!(got.text_to_image, [2.0 / 6.0, 1.0, 1.0, 1.0]);
        assert_eq!(got.at, [1, 2, 3, 5]);
        Ok(())
    }

    #[test]
    fn captions_in_any_order_and_number() -> Result<()> {
        let (images, captions) = (features(&[0., 40., 90.])?, features(&[88., 1., 41., 10.])?);
        let got = recall(&images, &captions, &[2, 0, 1, 0], &[1])?;
        assert_eq!((got.image_to_text, got.text_to_image), (vec![1.0], vec![1.0]));
        Ok(())
    }

    #[test]
    fn equal_features_find_nothing() -> Result<()> {
        let same = features(&[30.; 4])?;
        let got = recall(&same, &same, &[0, 1, 2, 3], &[1, 3, 4])?;
        assert_eq!((got.image_to_text, got.text_to_image), (vec![0., 0., 1.], vec![0., 0., 1.]));
        let unknown = Tensor::full([4, 2], f64::NAN, DType::F32)?;
        assert_eq!(recall(&unknown, &same, &[0, 1, 2, 3], &[1])?.image_to_text, [0.0]);
        Ok(())
    }

    #[test]
    fn mistakes_have_clear_messages() -> Result<()> {
        let two = features(&[0., 90.])?;
        let message =
            |image_of: &[usize], at: &[usize]| recall(&two, &two, image_of, at).unwrap_err().to_string();
        assert!(message(&[0], &[1]).contains("of 1 images"));
        assert!(message(&[0, 2], &[1]).contains("caption 1 belongs to image 2 of 2"));
        assert!(message(&[0, 0], &[1]).contains("image 1 of 2 has no caption"));
        assert!(message(&[0, 1], &[0]).contains("0 best"));
        Ok(())
    }
}
