//! Non-maximum suppression: of boxes that overlap, the one with the highest score.

use crate::{DType, Result, Tensor, ensure, for_real, on_device};

impl Tensor {
    /// Of boxes `[N, 4]` (x1, y1, x2, y2), those that no better one overlaps by an intersection over union above the
    /// threshold: taken in the order of falling scores `[N]` (equal ones: in their own), a box is kept unless one that
    /// was kept before it does. Their indices (i64), in that order. As in torchvision, the union of two boxes without
    /// area is no overlap (0 / 0). On a GPU this waits for the device, to know how many there are.
    ///
    /// # Errors
    /// If shapes or dtypes do not fit, the threshold is negative, or a graph is being recorded.
    #[track_caller]
    pub fn nms(&self, scores: &Tensor, iou_threshold: f64) -> Result<Tensor> {
        apply("nms", self, scores, None, iou_threshold)
    }

    /// [`nms`](Self::nms) within each group (a class, a level of a pyramid): `groups` `[N]` are integers, and boxes
    /// of different ones do not touch each other. (torchvision shifts the groups apart instead, which rounds the
    /// coordinates; this compares the boxes as they are.)
    ///
    /// # Errors
    /// As `nms`.
    #[track_caller]
    pub fn batched_nms(&self, scores: &Tensor, groups: &Tensor, iou_threshold: f64) -> Result<Tensor> {
        apply("batched_nms", self, scores, Some(groups), iou_threshold)
    }
}

#[track_caller]
fn apply(
    op: &'static str,
    boxes: &Tensor,
    scores: &Tensor,
    groups: Option<&Tensor>,
    threshold: f64,
) -> Result<Tensor> {
    let n = boxes.shape().first().copied().unwrap_or(0);
    ensure!(
        boxes.shape() == [n, 4] && scores.shape() == [n] && boxes.dtype().is_float(),
        op,
        "needs float boxes [N, 4] and scores [N], got {} {:?} and {:?}",
        boxes.dtype(),
        boxes.shape(),
        scores.shape()
    );
    if let Some(groups) = groups {
        ensure!(
            groups.shape() == [n] && matches!(groups.dtype(), DType::I64 | DType::I32),
            op,
            "needs groups [{n}] of integers, one for each box, got {} {:?}",
            groups.dtype(),
            groups.shape()
        );
    }
    ensure!(threshold >= 0.0, op, "the threshold is {threshold}, needs 0 or more");
    let boxes = boxes.detach().to_dtype(boxes.dtype().computed_in())?.contiguous()?;
    let groups = groups.map(|g| g.to_dtype(DType::I64)?.contiguous()).transpose()?;
    let order = scores.detach().argsort(0, true)?;
    on_device!(
        boxes,
        op,
        for_real!(boxes.dtype(), op, T => Ok(cpu::suppress::<T>(op, &boxes, &order, groups.as_ref(), threshold))),
        gpu::suppress(op, &boxes, &order, groups.as_ref(), threshold),
        when gpu::takes(n)
    )
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{pool::CpuVec, simd::simd_of},
        dtype::Real,
    };
    use rayon::prelude::*;
    use std::collections::BTreeMap;

    /// Boxes by falling score, each coordinate on its own so that comparisons vectorise.
    struct Boxes<T> {
        x1: Vec<T>,
        y1: Vec<T>,
        x2: Vec<T>,
        y2: Vec<T>,
        area: Vec<T>,
    }

    /// The number of type `T` that tells what is above the threshold: the largest that is not.
    fn limit<T: Real>(threshold: f64) -> T {
        let near = threshold as f32;
        match T::DTYPE {
            DType::F32 if f64::from(near) > threshold => T::of(f64::from(near.next_down())),
            _ => T::of(threshold),
        }
    }

    #[inline(always)]
    fn least<T: Real>(a: T, b: T) -> T {
        if a < b { a } else { b }
    }

    #[inline(always)]
    fn most<T: Real>(a: T, b: T) -> T {
        if a > b { a } else { b }
    }

    /// Sets `alive` to 0 where box `i` overlaps one after it.
    #[inline(always)]
    fn strike<T: Real>(b: &Boxes<T>, i: usize, limit: T, alive: &mut [T]) {
        let n = alive.len();
        let (x1, y1, x2, y2, area) = (&b.x1[..n], &b.y1[..n], &b.x2[..n], &b.y2[..n], &b.area[..n]);
        let (left, top, right, bottom, own) = (x1[i], y1[i], x2[i], y2[i], area[i]);
        for j in i + 1..n {
            let (w, h) = (least(right, x2[j]) - most(left, x1[j]), least(bottom, y2[j]) - most(top, y1[j]));
            let both = most(w, T::ZERO) * most(h, T::ZERO);
            let over = both / (own + area[j] - both) > limit;
            alive[j] = if over { T::ZERO } else { alive[j] };
        }
    }

    /// Of the boxes at `places` of the order, those that are kept.
    fn keep<T: Real>(boxes: &[T], order: &[i64], places: &[usize], limit: T) -> Vec<usize> {
        let at = |k: usize| places.iter().map(|&p| boxes[4 * order[p] as usize + k]).collect::<Vec<T>>();
        let mut b = Boxes { x1: at(0), y1: at(1), x2: at(2), y2: at(3), area: Vec::new() };
        b.area = (0..places.len()).map(|i| (b.x2[i] - b.x1[i]) * (b.y2[i] - b.y1[i])).collect();
        let mut alive = vec![T::ONE; places.len()];
        for i in 0..places.len() {
            if alive[i] == T::ONE {
                let (b, alive) = (&b, &mut alive[..]);
                simd_of::<T, _>(
                    #[inline(always)]
                    || strike(b, i, limit, alive),
                );
            }
        }
        places.iter().zip(&alive).filter(|&(_, &a)| a == T::ONE).map(|(&p, _)| p).collect()
    }

    pub fn suppress<T: Real>(
        op: &'static str,
        boxes: &Tensor,
        order: &Tensor,
        groups: Option<&Tensor>,
        threshold: f64,
    ) -> Tensor {
        let (boxes, order) = (boxes.cpu_slice::<T>(), order.cpu_slice::<i64>());
        let groups = groups.map(|g| g.cpu_slice::<i64>());
        let mut members = BTreeMap::<i64, Vec<usize>>::new();
        for (place, &i) in order.iter().enumerate() {
            members.entry(groups.map_or(0, |g| g[i as usize])).or_default().push(place);
        }
        let members: Vec<Vec<usize>> = members.into_values().collect();
        let mut kept: Vec<usize> = members
            .par_iter()
            .flat_map_iter(|places| keep(boxes, order, places, limit::<T>(threshold)))
            .collect();
        kept.sort_unstable();
        let indices: Vec<i64> = kept.into_iter().map(|place| order[place]).collect();
        Tensor::from_cpu(CpuVec::from_slice(&indices), [indices.len()], op)
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::gpu::{self, Known, sys};

    /// One block of the kernel keeps track of all boxes.
    pub fn takes(n: usize) -> bool {
        unsafe { sys::smalti_nms_workspace(n as i64) >= 0 }
    }

    pub fn suppress(
        op: &'static str,
        boxes: &Tensor,
        order: &Tensor,
        groups: Option<&Tensor>,
        threshold: f64,
    ) -> Result<Tensor> {
        ensure!(
            !gpu::is_recording(),
            op,
            "is not possible while a graph is recorded: how many of the {} boxes are kept is not known yet",
            order.numel()
        );
        let n = order.numel();
        let (kept, found) =
            (gpu::empty(boxes, &[n], DType::I64, op)?, gpu::empty(boxes, &[1], DType::I64, op)?);
        let work = gpu::workspace(op, boxes, unsafe { sys::smalti_nms_workspace(n as i64) })?;
        let tensors = [Some(boxes), Some(order), groups, Some(&kept), Some(&found), Some(&work)];
        gpu::launch_some(op, tensors, |[boxes, order, groups, kept, found, work], stream| unsafe {
            sys::smalti_nms(boxes, order, groups, threshold, kept, found, (*work).ptr, stream)
        })?;
        // a buffer of their own, of which facts can be noted
        let kept = gpu::elementwise::contiguous(op, &kept.narrow(0, 0, found.item()? as usize)?)?;
        gpu::know(&kept, Known { below: Some(n as i64), ..Known::default() });
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    /// Plain loops over f32, in the words of torchvision's CPU kernel.
    fn naive(boxes: &[f32], scores: &[f32], groups: Option<&[i64]>, threshold: f64) -> Vec<i64> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let mut kept: Vec<usize> = Vec::new();
        for i in order {
            let over = |&k: &usize| {
                let (p, q) = (&boxes[4 * k..4 * k + 4], &boxes[4 * i..4 * i + 4]);
                let side = |d: usize| (p[d + 2].min(q[d + 2]) - p[d].max(q[d])).max(0.0);
                let both = side(0) * side(1);
                let area = |b: &[f32]| (b[2] - b[0]) * (b[3] - b[1]);
                f64::from(both / (area(p) + area(q) - both)) > threshold
                    && groups.is_none_or(|g| g[k] == g[i])
            };
            if !kept.iter().any(over) {
                kept.push(i);
            }
        }
        kept.into_iter().map(|i| i as i64).collect()
    }

    #[test]
    fn random_boxes() -> Result<()> {
        let mut rng = Rng::new(1);
        for n in [1, 7, 64, 65, 300] {
            let boxes: Vec<f32> = (0..n)
                .flat_map(|_| {
                    let [x, y, w, h] = [0; 4].map(|_| rng.range(0.0, 20.0).floor() as f32);
                    [x, y, x + w, y + h]
                })
                .collect();
            let scores: Vec<f32> = (0..n).map(|_| rng.range(0.0, 9.0).floor() as f32).collect();
            let groups: Vec<i64> = (0..n as i64).map(|i| i % 3 - 1).collect();
            let (b, s) = (Tensor::from_slice(&boxes, [n, 4])?, Tensor::from_slice(&scores, [n])?);
            let g = Tensor::from_slice(&groups, [n])?;
            for threshold in [0.0, 1.0 / 3.0, 0.5, 0.9] {
                let kept = b.nms(&s, threshold)?.to_vec::<i64>()?;
                assert_eq!(kept, naive(&boxes, &scores, None, threshold), "{n} boxes at {threshold}");
                let wide = b.to_dtype(DType::F64)?.nms(&s, threshold)?.to_vec::<i64>()?;
                // thirds are not f32 numbers
                assert!(threshold == 1.0 / 3.0 || wide == kept);
                let kept = b.batched_nms(&s, &g, threshold)?.to_vec::<i64>()?;
                assert_eq!(kept, naive(&boxes, &scores, Some(&groups), threshold));
            }
        }
        Ok(())
    }

    #[test]
    fn a_second_time_changes_nothing() -> Result<()> {
        let mut rng = Rng::new(4);
        let corner = Tensor::rand([500, 2], &mut rng)?;
        let boxes = Tensor::cat(
            &[corner.clone(), corner.add(&Tensor::rand([500, 2], &mut rng)?.mul_scalar(0.3)?)?],
            1,
        )?;
        let scores = Tensor::rand([500], &mut rng)?;
        let kept = boxes.nms(&scores, 0.4)?;
        let (boxes, scores) = (boxes.index_select(0, &kept)?, scores.index_select(0, &kept)?);
        let again = boxes.nms(&scores, 0.4)?.to_vec::<i64>()?;
        assert_eq!(again, (0..kept.numel() as i64).collect::<Vec<_>>());
        Ok(())
    }

    #[test]
    fn edges_and_errors() -> Result<()> {
        let boxes =
            Tensor::from_slice(&[0f32, 0., 4., 4., 0., 0., 4., 4., 2., 2., 2., 2., 2., 2., 2., 2.], [4, 4])?;
        let scores = Tensor::from_slice(&[0.1f32, f32::NAN, 0.5, 0.5], [4])?;
        assert_eq!(boxes.nms(&scores, 0.5)?.to_vec::<i64>()?, [1, 2, 3]);
        for dtype in [DType::BF16, DType::F16] {
            assert_eq!(boxes.to_dtype(dtype)?.nms(&scores, 0.5)?.to_vec::<i64>()?, [1, 2, 3]);
        }
        let groups = Tensor::from_slice(&[i64::MIN, i64::MAX, 3, 3], [4])?;
        assert_eq!(boxes.batched_nms(&scores, &groups, 0.5)?.to_vec::<i64>()?, [1, 2, 3, 0]);
        let none = Tensor::zeros([0, 4], DType::F32)?;
        assert_eq!(none.nms(&Tensor::zeros([0], DType::F32)?, 0.5)?.shape(), [0]);
        let text = boxes.nms(&scores.narrow(0, 0, 3)?, 0.5).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(
            text.starts_with("nms: needs float boxes [N, 4] and scores [N]") && text.contains("[3]"),
            "{text}"
        );
        assert!(boxes.nms(&scores, -0.1).is_err() && boxes.nms(&scores, f64::NAN).is_err());
        assert!(
            boxes.narrow(1, 0, 3)?.nms(&scores, 0.5).is_err()
                && boxes.batched_nms(&scores, &scores, 0.5).is_err()
        );
        Ok(())
    }

    #[cfg(feature = "emulate")]
    #[test]
    fn refused_in_a_recording() -> Result<()> {
        let (_alone, gpu) = (crate::gpu::alone(), crate::Device::cuda(1)?);
        gpu.scope(|| {
            let (boxes, scores) = (Tensor::ones([3, 4], DType::F32)?, Tensor::ones([3], DType::F32)?);
            let result = crate::gpu::Graph::capture(gpu, || boxes.nms(&scores, 0.5));
            let text = result.err().map(|e| e.to_string()).unwrap_or_default();
            assert!(text.starts_with("nms: is not possible while a graph is recorded"), "{text}");
            Ok(())
        })
    }
}
