//! Classification by the names of the classes (CLIP §3.1, FLIP §4).

use super::Features;
use smalti::{Result, Tensor, ensure, no_grad};

/// The seven prompts of FLIP's evaluation, `{}` for the name: CLIP's choice for ImageNet.
pub const SHORT_TEMPLATES: [&str; 7] = [
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
];

/// Prompts that are encoded at a time.
const PROMPTS: usize = 256;

/// Every template with every name: class by class, in it template by template.
///
/// # Errors
/// If a template has no place for the name.
pub fn prompts<S: AsRef<str>>(names: &[S], templates: &[&str]) -> Result<Vec<String>> {
    let bad = templates.iter().find(|t| !t.contains("{}"));
    ensure!(bad.is_none(), "zero-shot", "the template {:?} has no {{}} for the name", bad.unwrap_or(&""));
    let fill = |name: &S| templates.iter().map(|t| t.replace("{}", name.as_ref())).collect::<Vec<_>>();
    Ok(names.iter().flat_map(fill).collect())
}

/// A classifier made of texts: a vector of length 1 for each class.
#[derive(Clone, Debug)]
pub struct ZeroShot {
    /// `[C, E]`
    classes: Tensor,
}

impl ZeroShot {
    /// For these names and templates; `encode` gives the features `[n, E]` of n prompts.
    ///
    /// # Errors
    /// If there is no name or template, a template has no place for the name, or `encode` fails.
    pub fn new<S: AsRef<str>>(
        names: &[S],
        templates: &[&str],
        encode: impl Fn(&[String]) -> Result<Tensor>,
    ) -> Result<ZeroShot> {
        let counts = (names.len(), templates.len());
        ensure!(counts.0 > 0 && counts.1 > 0, "zero-shot", "{} names and {} templates", counts.0, counts.1);
        let mut classes = Vec::new();
        for names in names.chunks((PROMPTS / templates.len()).max(1)) {
            let features = no_grad(|| encode(&prompts(names, templates)?))?;
            classes.push(no_grad(|| ensemble(&features, templates.len()))?);
        }
        Ok(ZeroShot { classes: Tensor::cat(&classes.iter().collect::<Vec<_>>(), 0)? })
    }

    /// The classes' vectors, `[C, E]`.
    pub fn classes(&self) -> &Tensor {
        &self.classes
    }

    /// The most similar class of each image, from features `[N, E]`: `[N]` i64. The temperature has no say.
    ///
    /// # Errors
    /// If the widths differ.
    pub fn predict(&self, images: &Tensor) -> Result<Tensor> {
        no_grad(|| images.to_dtype(self.classes.dtype())?.matmul(&self.classes.t()?)?.argmax(1))
    }

    /// Part of the images that are classified rightly. Labels below 0 mark rows that do not count.
    ///
    /// # Errors
    /// If the widths differ, or no row counts.
    pub fn accuracy(&self, images: &Features) -> Result<f64> {
        let (predicted, labels) = (self.predict(&images.x)?.to_vec::<i64>()?, images.labels.to_vec::<i64>()?);
        let counted = labels.iter().filter(|&&label| label >= 0).count();
        ensure!(counted > 0, "zero-shot", "none of the {} images has a label", labels.len());
        let right = predicted.iter().zip(&labels).filter(|(p, label)| p == label).count();
        Ok(right as f64 / counted as f64)
    }
}

/// Features `[C * T, E]` of T prompts a class to one vector a class, `[C, E]` f32: each to length 1, their mean, to
/// length 1.
///
/// # Errors
/// If the rows do not divide by `templates`.
pub fn ensemble(features: &Tensor, templates: usize) -> Result<Tensor> {
    let [rows, width] = features.dims("zero-shot")?;
    ensure!(
        templates > 0 && rows.is_multiple_of(templates),
        "zero-shot",
        "{rows} prompts are not {templates} for each class"
    );
    let features = features.to_dtype(smalti::DType::F32)?;
    unit(&unit(&features)?.reshape([rows / templates, templates, width])?.mean(1)?)
}

fn unit(x: &Tensor) -> Result<Tensor> {
    x.div(&x.norm_keepdim(2.0, -1)?.add_scalar(1e-8)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_go_class_by_class() {
        let got = prompts(&["cat", "dog"], &["a {}.", "the {} or {}"]).unwrap();
        assert_eq!(got, ["a cat.", "the cat or cat", "a dog.", "the dog or dog"]);
        assert!(prompts(&["cat"], &["a {}", "no place"]).unwrap_err().to_string().contains("no place"));
    }

    #[test]
    fn every_prompt_has_the_same_say() -> Result<()> {
        // the first class's prompts point along x (long) and y (short): the mean of directions, not of vectors
        let features = Tensor::from_slice(&[100f32, 0., 0., 0.1, 0., -1., 0., -3.], [4, 2])?;
        let classes = ensemble(&features, 2)?.to_vec::<f32>()?;
        let half = 0.5f32.sqrt();
        for (got, want) in classes.iter().zip([half, half, 0., -1.]) {
            assert!((got - want).abs() < 1e-6, "{classes:?}");
        }
        assert!(ensemble(&features, 3).is_err());
        Ok(())
    }

    #[test]
    fn accuracy_leaves_out_rows_without_label() -> Result<()> {
        let names: Vec<String> = (0..300).map(|i| format!("{i}")).collect();
        // prompts say which axis is theirs, so that batches of prompts must come back in order
        let encode = |texts: &[String]| {
            let axis = |text: &String| text.trim_matches(|c: char| !c.is_ascii_digit()).parse::<usize>();
            let mut rows = vec![0f32; texts.len() * 300];
            for (row, text) in texts.iter().enumerate() {
                rows[row * 300 + axis(text).map_err(|e| smalti::Error::msg(e.to_string()))?] = 2.0;
            }
            Tensor::from_slice(&rows, [texts.len(), 300])
        };
        let model = ZeroShot::new(&names, &SHORT_TEMPLATES, encode)?;
        assert_eq!(model.classes().shape(), [300, 300]);
        let mut images = vec![0f32; 4 * 300];
        for (row, class) in [7, 299, 40, 0].into_iter().enumerate() {
            images[row * 300 + class] = 0.5;
        }
        let images = Tensor::from_slice(&images, [4, 300])?;
        assert_eq!(model.predict(&images)?.to_vec::<i64>()?, [7, 299, 40, 0]);
        assert_eq!(model.accuracy(&Features::new(images.clone(), &[7, 299, -1, 1])?)?, 2.0 / 3.0);
        assert!(model.accuracy(&Features::new(images, &[-1; 4])?).is_err());
        Ok(())
    }
}
