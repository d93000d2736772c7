//! FLIP as a [`Task`].

use super::{
    Recipe,
    method::{self, INIT_STREAM, Method},
    recipe::Job,
    source,
    trainer::{At, Batches, Loss, Task},
    zero_shot,
};
use crate::{
    data::{Batch, Captions, Tokenizer, choose_captions},
    flip::Flip,
};
use image::RgbImage;
use smalti::{Result, Rng, Tensor, comm::Comm, ensure, nn::Params, optim::Group};

/// The model with its tokenizer, and the recipe that says what its views are.
pub struct FlipTask {
    model: Flip,
    tokenizer: Tokenizer,
    comm: Comm,
    recipe: Recipe,
}

impl Method for FlipTask {
    const NAME: &'static str = "FLIP";
    const JOB: Job = Job::Flip;

    fn new(recipe: &Recipe, comm: &Comm) -> Result<FlipTask> {
        let tokenizer = recipe.tokenizer()?;
        let model = Flip::new(&recipe.flip()?, &mut Rng::new(recipe.seed).stream(INIT_STREAM))?;
        let (known, rows) = (tokenizer.vocab_size(), model.config().text.vocab_size);
        ensure!(
            known <= rows,
            "flip",
            "the tokenizer has {known} ids, the model rows for {rows} (flip.text.vocab_size)"
        );
        if let Some(init) = recipe.flip.as_ref().and_then(|flip| flip.init.as_ref()) {
            model.load(init)?;
        }
        Ok(FlipTask { model, tokenizer, comm: comm.clone(), recipe: recipe.clone() })
    }

    fn batches(recipe: &mut Recipe, comm: &Comm) -> Result<Box<dyn Batches<Batch = Batch<Captions>>>> {
        source::captioned(recipe, comm)
    }

    /// No decay for what the variant leaves out, and decay for all else, the scale among it.
    fn groups(&self, recipe: &Recipe) -> Vec<Group> {
        let trained = self.params().trained();
        let named = |decays: bool| {
            let chosen = trained.iter().filter(|param| self.model.decays(param) == decays);
            Group::named(chosen.map(|param| param.name()))
        };
        vec![named(true).weight_decay(recipe.optim.weight_decay), named(false).weight_decay(0.0)]
    }

    /// The image tower, under `visual.`.
    fn encoder(&self) -> Vec<(String, Tensor)> {
        let mut tensors = self.params().tensors();
        tensors.retain(|(name, _)| name.starts_with("visual."));
        tensors
    }

    fn findings(&self, recipe: &Recipe) -> Result<Vec<String>> {
        let found = zero_shot::accuracy(&self.model, &self.tokenizer, recipe, None)?;
        Ok(vec![format!("zero-shot                        {found}")])
    }
}

impl Task for FlipTask {
    type Batch = Batch<Captions>;

    fn params(&self) -> &Params {
        self.model.params()
    }

    /// Watched: the scale of the similarities, its logarithm, which is the parameter, and in how many of 100 cases an
    /// image is most similar to its own caption among this rank's.
    fn loss(&self, batch: &Self::Batch, at: &At) -> Result<Loss> {
        let images = source::tensor(&batch.views[0])?;
        let tokens = self.tokenizer.encode_all(&choose_captions(batch, self.recipe.seed, at.epoch as u64))?;
        let tokens = tokens.to_device(images.device())?;
        let masking = self.model.random_masking(&tokens, &mut at.rng.clone())?;
        let output = self.model.forward(&images, &tokens, &masking, &self.comm)?;
        let scale = output.scale.detach();
        let monitored = vec![
            ("acc1", method::matches(&output.image_features, &output.text_features)?),
            ("logit_scale", scale.log()?),
            ("logit_scale_exp", scale),
        ];
        Ok(Loss { value: output.loss, monitored })
    }

    fn after_step(&self) -> Result<()> {
        self.model.clamp_scale()
    }

    fn inputs<'b>(&self, batch: &'b Self::Batch) -> Vec<(String, &'b [f32])> {
        method::views(batch)
    }

    fn preview(&self) -> Result<Option<RgbImage>> {
        source::contact_sheet(&self.recipe).map(Some)
    }
}
