//! The table behind a run on the digits.

use smalti::{Result, Tensor};
use smalti_models::{
    backbones::vit::Pool,
    data::DigitsSplit,
    evaluate::{Features, LinearProbe, ProbeConfig, Vote, knn_accuracy},
    train::{
        MaeTask, Recipe,
        features::{Split, classifier, features, raw_digits},
    },
};

const NEIGHBOURS: usize = 20;

/// Linear probe and 20-NN of raw pixels, of the untrained encoder and of the trained one.
pub fn digits(recipe: &Recipe, trained: Vec<(String, Tensor)>) -> Result<()> {
    println!("\naccuracy on the 450 test digits    linear probe    {NEIGHBOURS}-NN");
    line("raw pixels", &raw_digits(DigitsSplit::Train)?, &raw_digits(DigitsSplit::Test)?)?;
    let untrained = MaeTask::untrained(recipe)?.params().tensors();
    for (name, tensors) in [("untrained encoder", untrained), ("trained encoder", trained)] {
        let model = classifier(recipe, tensors, 10, Pool::Mean)?;
        let [train, test] = [Split::Train, Split::Test].map(|split| features(&model, recipe, split));
        line(name, &train?, &test?)?;
    }
    println!();
    Ok(())
}

fn line(name: &str, train: &Features, test: &Features) -> Result<()> {
    let probe = LinearProbe::fit(train, ProbeConfig::default())?.accuracy(test)?;
    let knn = knn_accuracy(train, test, NEIGHBOURS, Vote::Majority)?;
    println!("  {name:<32} {:>8.1} %  {:>6.1} %", probe * 100.0, knn * 100.0);
    Ok(())
}
