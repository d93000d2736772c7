//! Non-maximum suppression and the overlaps that it compares: indices exactly. The parts named `det`, the choice of
//! final detections, belong to the detectors.

use super::{
    file::{Golden, Report},
    tolerance,
};
use smalti::Result;

#[derive(serde::Deserialize)]
struct Config {
    thresholds: Vec<f64>,
}

pub fn check(golden: &Golden, report: &mut Report) -> Result<()> {
    let config: Config = golden.config(&["thresholds"])?;
    let input = |name: &str| golden.get(&format!("input.{name}"));
    let (boxes, scores) = (input("boxes")?, input("scores")?);
    for t in config.thresholds {
        let kept = [
            ("nms", boxes.nms(scores, t)?),
            ("batched_nms", boxes.batched_nms(scores, input("classes")?, t)?),
            ("edge_nms", input("edge_boxes")?.nms(input("edge_scores")?, t)?),
        ];
        for (name, kept) in kept {
            let name = format!("{name}_{t}");
            report.compare(&name, &kept, golden.get(&format!("output.{name}"))?, 0.0)?;
        }
    }
    let (first, second) = (boxes.narrow(0, 0, 12)?, boxes.narrow(0, 12, 12)?);
    report.compare(
        "iou_matrix",
        &first.box_iou(&second)?,
        golden.get("output.iou_matrix")?,
        tolerance::POOLED,
    )
}
