//! Zero-shot classification of a recipe's test images.

use super::{
    Recipe,
    features::{self, Split},
    recipe::Source,
};
use crate::{
    data::{DIGIT_NAMES, DIGIT_TEMPLATES, Tokenizer},
    evaluate::{Features, SHORT_TEMPLATES, ZeroShot},
    flip::Flip,
};
use smalti::{Result, no_grad};
use std::fmt;

/// How many images were classified rightly.
pub struct Accuracy {
    /// Part of them.
    pub share: f64,
    /// Images.
    pub images: usize,
    /// Classes and prompts for each.
    pub classes: [usize; 2],
}

impl fmt::Display for Accuracy {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let [classes, templates] = self.classes;
        write!(f, "{:>8.1} %  ({} images, {classes} classes, ", self.share * 100.0, self.images)?;
        write!(f, "{templates} prompts each)")
    }
}

/// Accuracy on the digits' test rows, with the captions that they are trained on as prompts; or on the images of a
/// folder whose classes are named like its folders (`_` for a space), with FLIP's seven prompts. `templates` take
/// the place of the prompts, `{}` in them that of the name.
///
/// # Errors
/// If there are no images or classes, or a template has no place for the name.
pub fn accuracy(
    model: &Flip,
    tokenizer: &Tokenizer,
    recipe: &Recipe,
    templates: Option<&[String]>,
) -> Result<Accuracy> {
    let (names, usual): (Vec<String>, &[&str]) = match recipe.data.source {
        Source::Digits => (DIGIT_NAMES.map(str::to_owned).into(), &DIGIT_TEMPLATES),
        Source::Folder => {
            let folder = features::labelled(recipe, Split::Test)?;
            (folder.classes().iter().map(|class| class.replace('_', " ")).collect(), &SHORT_TEMPLATES)
        }
    };
    let given: Option<Vec<&str>> = templates.map(|given| given.iter().map(String::as_str).collect());
    let templates = given.as_deref().unwrap_or(usual);
    let classes =
        ZeroShot::new(&names, templates, |prompts| model.encode_text(&tokenizer.encode_all(prompts)?, None))?;
    let images = Features::extract(features::batches(recipe, Split::Test)?, |images| {
        no_grad(|| model.encode_image(images, None))
    })?;
    let (share, classes) = (classes.accuracy(&images)?, [names.len(), templates.len()]);
    Ok(Accuracy { share, images: images.len(), classes })
}
