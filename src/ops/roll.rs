//! Elements along a dimension shifted round, or in reverse.

use crate::{
    Dim, DimList, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    ensure, for_size, on_device,
    shape::{Dims, Strides},
};
use smallvec::smallvec;

impl Tensor {
    /// Shifts elements by `shifts[i]` places along `dims[i]`; what leaves at one end enters at the other. One
    /// pass for all dimensions.
    ///
    /// # Errors
    /// If there are not as many shifts as dimensions, or a dimension does not exist.
    #[track_caller]
    pub fn roll<D: Dim>(&self, shifts: &[i64], dims: &[D]) -> Result<Tensor> {
        ensure!(shifts.len() == dims.len(), "roll", "{} shifts for {} dimensions", shifts.len(), dims.len());
        let mut places = Dims::from_elem(0, self.rank());
        for (&shift, d) in shifts.iter().zip(dims) {
            let d = d.of("roll", self)?;
            if let Some(place) = places.get_mut(d) {
                let n = self.shape()[d].max(1) as i64;
                *place = (*place as i64 + shift.rem_euclid(n)).rem_euclid(n) as usize;
            }
        }
        self.roll_to(places)
    }

    /// Element 0 of each dimension goes to `places`.
    #[track_caller]
    fn roll_to(&self, places: Dims) -> Result<Tensor> {
        if places.iter().all(|&p| p == 0) {
            return Ok(self.clone());
        }
        let y = self.moved(|x| {
            on_device!(
                x,
                "roll",
                for_size!(x.dtype(), T => cpu::roll::<T>(x, &places)),
                gpu::roll(x, &places)
            )
        })?;
        y.record([self], Roll { places })
    }

    /// The order along `dims` reversed: a view with negative strides.
    ///
    /// # Errors
    /// If a dimension does not exist or is named twice.
    #[track_caller]
    pub fn flip(&self, dims: impl DimList) -> Result<Tensor> {
        let dims = dims.of("flip", self)?;
        let mut strides = Strides::from_slice(self.strides());
        let mut offset = self.offset() as isize;
        for &d in &dims {
            offset += strides[d] * self.shape()[d].saturating_sub(1) as isize;
            strides[d] = -strides[d];
        }
        if self.numel() == 0 {
            offset = self.offset() as isize;
        }
        let y = self.view_as(Dims::from_slice(self.shape()), strides, offset as usize, "flip");
        y.record([self], Flip { dims })
    }
}

struct Roll {
    places: Dims,
}
impl Backward for Roll {
    const NAME: &'static str = "roll";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        let back = self.places.iter().zip(grad.shape()).map(|(&p, &n)| if p == 0 { 0 } else { n - p });
        Ok(smallvec![Some(grad.roll_to(back.collect())?)])
    }
}

struct Flip {
    dims: Dims,
}
impl Backward for Flip {
    const NAME: &'static str = "flip";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.flip(&self.dims)?)])
    }
}

mod cpu {
    use super::*;
    use crate::{
        cpu::{elementwise, parallel::SharedMut, pool::CpuVec},
        dtype::Element,
        shape::contiguous_strides,
    };

    /// Each rolled dimension is cut in two; every combination of pieces is one block copy.
    pub fn roll<T: Element>(x: &Tensor, places: &[usize]) -> Result<Tensor> {
        let x = x.detach();
        let strides = contiguous_strides(x.shape());
        let order: Dims = (0..x.rank()).collect();
        let mut out = CpuVec::<T>::new(x.numel());
        let target = SharedMut::new(&mut out);
        let rolled: Dims = (0..x.rank()).filter(|&d| places[d] > 0).collect();
        for block in 0..1usize << rolled.len() {
            let (mut part, mut offset) = (x.clone(), 0);
            for (bit, &d) in rolled.iter().enumerate() {
                let (n, place) = (x.shape()[d], places[d]);
                if block >> bit & 1 == 0 {
                    part = part.narrow(d, 0, n - place)?;
                    offset += place as isize * strides[d];
                } else {
                    part = part.narrow(d, n - place, place)?;
                }
            }
            if part.numel() > 0 {
                unsafe { elementwise::copy_into(&part, target.from(offset), &strides, &order) };
            }
        }
        Ok(Tensor::from_cpu(out, x.shape(), "roll"))
    }
}

#[cfg(gpu)]
mod gpu {
    use super::*;
    use crate::gpu::{self, sys};

    pub fn roll(x: &Tensor, places: &[usize]) -> Result<Tensor> {
        let y = gpu::empty(x, x.shape(), x.dtype(), "roll")?;
        let mut to = [0; 8];
        to.iter_mut().zip(places).for_each(|(to, &place)| *to = place as i64);
        gpu::launch("roll", [x, &y], |[x, y], stream| unsafe {
            sys::smalti_roll(&x, to.as_ptr(), &y, stream)
        })?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Rng, gradcheck};

    #[test]
    fn flipped_views_work_everywhere() -> Result<()> {
        let x = Tensor::arange(6, DType::F32)?.reshape([2, 3])?;
        let y = x.flip([0, 1])?;
        assert_eq!(y.to_vec::<f32>()?, [5., 4., 3., 2., 1., 0.]);
        assert_eq!(y.reshape([6])?.narrow(0, 1, 2)?.to_vec::<f32>()?, [4., 3.]);
        assert_eq!(y.add(&x)?.to_vec::<f32>()?, [5.; 6]);
        assert_eq!(y.neg()?.flip(0)?.flip(1)?.to_vec::<f32>()?, x.neg()?.to_vec::<f32>()?);
        assert_eq!(y.sum(0)?.to_vec::<f32>()?, [7., 5., 3.]);
        assert_eq!(Tensor::cat(&[&y, &y], 0)?.narrow(0, 2, 2)?.to_vec::<f32>()?, y.to_vec::<f32>()?);
        assert_eq!(x.narrow(0, 0, 0)?.flip(0)?.shape(), [0, 3]);
        assert_eq!(Tensor::scalar(1.0).flip(())?.item()?, 1.0);
        Ok(())
    }

    #[test]
    fn rolls_by_any_distance() -> Result<()> {
        let x = Tensor::arange(5, DType::I64)?;
        assert_eq!(x.roll(&[7], &[0])?.to_vec::<i64>()?, [3, 4, 0, 1, 2]);
        assert_eq!(x.roll(&[-1, 3], &[0, 0])?.to_vec::<i64>()?, [3, 4, 0, 1, 2]);
        assert_eq!(x.narrow(0, 0, 0)?.roll(&[1], &[0])?.shape(), [0]);
        assert_eq!(Tensor::scalar(1.0).roll(&[1], &[0])?.item()?, 1.0);
        assert!(x.roll(&[1], &[1]).is_err() && x.roll(&[1, 2], &[0]).is_err());
        Ok(())
    }

    #[test]
    fn gradients() -> Result<()> {
        let x = Tensor::randn([2, 3, 4], &mut Rng::new(1))?.to_dtype(DType::F64)?;
        gradcheck(|t| t[0].permute([2, 0, 1])?.roll(&[1, -1], &[0, 2]), std::slice::from_ref(&x))?;
        gradcheck(|t| t[0].flip([0, 2])?.mul(&t[0]), &[x])
    }
}
