use super::*;
use crate::{Reduction, Rng, gradcheck, gradcheck_with};

const FORMATS: [BoxFormat; 3] = [BoxFormat::Xyxy, BoxFormat::Xywh, BoxFormat::Cxcywh];
const EPS: f64 = 1e-7;

fn random(n: usize, seed: u64) -> Result<Tensor> {
    let mut rng = Rng::new(seed);
    let low = Tensor::rand([n, 2], &mut rng)?.mul_scalar(5.0)?;
    let sides = Tensor::rand([n, 2], &mut rng)?.affine(4.0, 0.5)?;
    Tensor::cat(&[low.clone(), low.add(&sides)?], 1)?.to_dtype(DType::F64)
}

#[test]
fn formats_there_and_back() -> Result<()> {
    let boxes = random(6, 1)?;
    let values = boxes.to_vec::<f64>()?;
    for to in FORMATS {
        for via in FORMATS {
            let there = boxes.box_convert(BoxFormat::Xyxy, to)?.box_convert(to, via)?;
            let back = there.box_convert(via, BoxFormat::Xyxy)?.to_vec::<f64>()?;
            assert!(back.iter().zip(&values).all(|(a, b)| (a - b).abs() < 1e-12), "{to:?} {via:?}");
            gradcheck(|t| t[0].box_convert(to, via), &[boxes.reshape([2, 3, 4])?])?;
        }
    }
    Ok(())
}

#[test]
fn gradients() -> Result<()> {
    let (a, b) = (random(4, 2)?, random(3, 3)?);
    let pair = [a.clone(), b.clone()];
    gradcheck(|t| t[0].box_iou(&t[1]), &pair)?;
    gradcheck(|t| t[0].generalized_box_iou(&t[1]), &pair)?;
    gradcheck(|t| t[0].distance_box_iou(&t[1], EPS), &pair)?;
    gradcheck(|t| t[0].box_area(), &pair[..1])?;
    gradcheck(|t| t[0].clip_boxes_to_image([4, 5]), &pair[..1])?;
    let same = [a, random(4, 5)?];
    for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean] {
        gradcheck(|t| t[0].generalized_box_iou_loss(&t[1], reduction, EPS), &same)?;
        gradcheck(|t| t[0].distance_box_iou_loss(&t[1], reduction, EPS), &same)?;
    }
    gradcheck_with(|t| t[0].atan(), &[same[0].add_scalar(-3.0)?], 1e-6, 1e-6)
}

#[test]
fn properties() -> Result<()> {
    let (a, b) = (random(5, 7)?, random(8, 8)?);
    let iou = a.box_iou(&b)?;
    assert_eq!(iou.to_vec::<f64>()?, b.box_iou(&a)?.t()?.to_vec::<f64>()?, "it does not matter who is first");
    let bounds = iou.to_vec::<f64>()?;
    let generalized = a.generalized_box_iou(&b)?.to_vec::<f64>()?;
    let complete = a.complete_box_iou(&b, EPS)?.to_vec::<f64>()?;
    let distance = a.distance_box_iou(&b, EPS)?.to_vec::<f64>()?;
    for i in 0..bounds.len() {
        assert!((0.0..=1.0).contains(&bounds[i]) && generalized[i] <= bounds[i] && generalized[i] > -1.0);
        assert!(complete[i] <= distance[i] && distance[i] <= bounds[i]);
    }
    let own = a.box_iou(&a)?.to_vec::<f64>()?;
    assert!((0..5).all(|i| (own[6 * i] - 1.0).abs() < 1e-12));
    // moved and scaled together they overlap as before
    let moved = |t: &Tensor| t.affine(3.0, -7.0);
    let again = moved(&a)?.box_iou(&moved(&b)?)?.to_vec::<f64>()?;
    assert!(again.iter().zip(&bounds).all(|(x, y)| (x - y).abs() < 1e-12));
    // and losses are one less what every box makes with the one in its place
    let first = b.narrow(0, 0, 5)?;
    let loss = a.complete_box_iou_loss(&first, Reduction::None, EPS)?.to_vec::<f64>()?;
    let matrix = a.complete_box_iou(&first, EPS)?.to_vec::<f64>()?;
    assert!((0..5).all(|i| (loss[i] - 1.0 + matrix[6 * i]).abs() < 1e-6));
    Ok(())
}

#[test]
fn edges_and_errors() -> Result<()> {
    let point = Tensor::from_slice(&[1f32, 1., 1., 1.], [1, 4])?;
    assert!(point.box_iou(&point)?.item()?.is_nan(), "as in torchvision");
    let boxes = Tensor::from_slice(&[0f32, 0., 2., 3., 0., 0., 1.9, 9., 4., 4., 6., 6.], [3, 4])?;
    assert_eq!(boxes.remove_small_boxes(2.0)?.to_vec::<i64>()?, [0, 2]);
    assert_eq!(boxes.remove_small_boxes(10.0)?.shape(), [0]);
    assert_eq!(boxes.clip_boxes_to_image([5, 1])?.to_vec::<f32>()?[8..], [1., 4., 1., 5.]);
    let none = boxes.narrow(0, 0, 0)?;
    assert_eq!(none.box_iou(&boxes)?.shape(), [0, 3]);
    assert_eq!(none.generalized_box_iou_loss(&none, Reduction::Mean, EPS)?.item()?, 0.0);
    assert!(boxes.box_iou(&boxes.t()?).is_err() && boxes.narrow(1, 0, 3)?.box_area().is_err());
    let text = boxes.complete_box_iou_loss(&point, Reduction::Sum, EPS).err().map(|e| e.to_string());
    assert!(
        text.is_some_and(|t| t.starts_with("complete_box_iou_loss: ") && t.contains("[3, 4] and [1, 4]"))
    );
    Ok(())
}
