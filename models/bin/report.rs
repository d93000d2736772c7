//! The table behind a run on the digits.

use smalti::{Result, comm};
use smalti_models::{
    data::DigitsSplit,
    evaluate::{Features, LinearProbe, ProbeConfig, Vote, knn_accuracy},
    train::{
        Encoder, Method, Recipe,
        features::{Split, features, raw_digits},
    },
};

const NEIGHBOURS: usize = 20;

/// Linear probe and 20-NN of raw pixels, of the untrained encoder and of the trained one; what else the method finds.
pub fn digits<M: Method>(recipe: &Recipe, trained: &M) -> Result<()> {
    println!("\naccuracy on the 450 test digits    linear probe    {NEIGHBOURS}-NN");
    line("raw pixels", &raw_digits(DigitsSplit::Train)?, &raw_digits(DigitsSplit::Test)?)?;
    let untrained = M::new(recipe, &comm::single())?;
    for (name, task) in [("untrained encoder", &untrained), ("trained encoder", trained)] {
        let encoder = Encoder::load(recipe, task.encoder(), Encoder::pool(recipe))?;
        let [train, test] = [Split::Train, Split::Test].map(|split| features(&encoder, recipe, split));
        line(name, &train?, &test?)?;
    }
    for finding in trained.findings(recipe)? {
        println!("  {finding}");
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
