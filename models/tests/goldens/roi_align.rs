//! ROIAlign: values and gradients of each variant. The parts named `pooler`, the choice among the levels of a pyramid,
//! belong to the detectors.

use super::{
    file::{Golden, Report},
    tolerance,
};
use smalti::{BackwardOptions, Error, Result, RoiAlignOptions};

#[derive(serde::Deserialize)]
struct Config {
    scale: f64,
    variants: Vec<Variant>,
}

#[derive(serde::Deserialize)]
struct Variant {
    name: String,
    out: [usize; 2],
    sampling_ratio: i64,
    aligned: bool,
}

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    let config: Config = golden.config(&["scale", "variants"])?;
    let (features, boxes) = (golden.get("input.features")?, golden.get("input.rois")?);
    for v in &config.variants {
        let options = RoiAlignOptions {
            output_size: v.out,
            spatial_scale: config.scale,
            sampling_ratio: v.sampling_ratio,
            aligned: v.aligned,
        };
        for (order, features) in [("nchw", features.clone()), ("nhwc", features.to_channels_last()?)] {
            let leaf = features.requires_grad();
            let pooled = leaf.roi_align(boxes, &options)?;
            let reference = golden.get(&format!("output.{}.pooled", v.name))?;
            report.compare(&format!("{}.pooled {order}", v.name), &pooled, reference, tolerance::POOLED)?;
            let grad = Some(golden.get(&format!("input.{}.grad_out", v.name))?.clone());
            let grads = pooled.backward_with(&BackwardOptions { grad, ..Default::default() })?;
            let got = grads.get(&leaf).ok_or_else(|| Error::msg("no gradient"))?;
            let reference = golden.get(&format!("grad.{}.features", v.name))?;
            report.compare(
                &format!("grad.{}.features {order}", v.name),
                got,
                reference,
                tolerance::GRADIENT,
            )?;
        }
    }
    Ok(())
}
