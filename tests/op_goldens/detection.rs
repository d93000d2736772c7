//! Operations of `ops_detection_*`.

use crate::case::{Case, Op};
use smalti::{BoxFormat, Error, Reduction, Result, RoiAlignOptions};

pub const OPS: &[(&str, Op)] = &[
    ("box_iou", |c| Ok(vec![c.input(0)?.box_iou(c.input(1)?)?])),
    ("generalized_box_iou", |c| Ok(vec![c.input(0)?.generalized_box_iou(c.input(1)?)?])),
    ("distance_box_iou", |c| Ok(vec![c.input(0)?.distance_box_iou(c.input(1)?, c.f64("eps")?)?])),
    ("complete_box_iou", |c| Ok(vec![c.input(0)?.complete_box_iou(c.input(1)?, c.f64("eps")?)?])),
    ("generalized_box_iou_loss", |c| {
        Ok(vec![c.input(0)?.generalized_box_iou_loss(c.input(1)?, reduction(c)?, c.f64("eps")?)?])
    }),
    ("distance_box_iou_loss", |c| {
        Ok(vec![c.input(0)?.distance_box_iou_loss(c.input(1)?, reduction(c)?, c.f64("eps")?)?])
    }),
    ("complete_box_iou_loss", |c| {
        Ok(vec![c.input(0)?.complete_box_iou_loss(c.input(1)?, reduction(c)?, c.f64("eps")?)?])
    }),
    ("box_area", |c| Ok(vec![c.input(0)?.box_area()?])),
    ("box_convert", |c| Ok(vec![c.input(0)?.box_convert(format(c, "in_fmt")?, format(c, "out_fmt")?)?])),
    ("clip_boxes_to_image", |c| Ok(vec![c.input(0)?.clip_boxes_to_image(c.pair("size")?)?])),
    ("remove_small_boxes", |c| Ok(vec![c.input(0)?.remove_small_boxes(c.f64("min_size")?)?])),
    ("nms", |c| Ok(vec![c.input(0)?.nms(c.input(1)?, c.f64("iou_threshold")?)?])),
    ("batched_nms", |c| {
        Ok(vec![c.input(0)?.batched_nms(c.input(1)?, c.input(2)?, c.f64("iou_threshold")?)?])
    }),
    ("roi_align", |c| {
        let options = RoiAlignOptions {
            output_size: c.pair("output_size")?,
            spatial_scale: c.f64("spatial_scale")?,
            sampling_ratio: c.i64("sampling_ratio")?,
            aligned: c.bool("aligned")?,
        };
        Ok(vec![c.input(0)?.roi_align(c.input(1)?, &options)?])
    }),
];

fn format(c: &Case, name: &str) -> Result<BoxFormat> {
    match c.str(name)? {
        "xyxy" => Ok(BoxFormat::Xyxy),
        "xywh" => Ok(BoxFormat::Xywh),
        "cxcywh" => Ok(BoxFormat::Cxcywh),
        other => Err(Error::msg(format!("unknown format `{other}`"))),
    }
}

fn reduction(c: &Case) -> Result<Reduction> {
    match c.str("reduction")? {
        "none" => Ok(Reduction::None),
        "sum" => Ok(Reduction::Sum),
        "mean" => Ok(Reduction::Mean),
        other => Err(Error::msg(format!("unknown reduction `{other}`"))),
    }
}
