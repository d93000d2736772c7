//! Conversion between dtypes. The gradient is converted back.

use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    cpu::elementwise,
    dtype::Element,
    for_dtype, on_device,
};
use smallvec::smallvec;

impl Tensor {
    /// The same values as another dtype: floats round to nearest, float to integer truncates and saturates,
    /// anything to bool is `!= 0`. No copy where the dtype is already right.
    ///
    /// # Errors
    /// None on the CPU.
    #[track_caller]
    pub fn to_dtype(&self, dtype: DType) -> Result<Tensor> {
        if dtype == self.dtype() {
            return Ok(self.clone());
        }
        let y = on_device!(
            self,
            "to_dtype",
            for_dtype!(self.dtype(), A => for_dtype!(dtype, B => Ok(convert::<A, B>(self))))
        )?;
        if dtype.is_float() { y.record([self], Cast { from: self.dtype() }) } else { Ok(y) }
    }

    /// Runs `f` on f32 copies of half-precision inputs and rounds the result back; other dtypes go straight in.
    /// For operations whose CPU code is f32 and f64 only.
    ///
    /// # Errors
    /// Those of `f`.
    pub(crate) fn in_f32<const N: usize>(
        inputs: [&Tensor; N],
        f: impl FnOnce([&Tensor; N]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let dtype = inputs[0].dtype();
        if !dtype.is_half() {
            return f(inputs);
        }
        let mut wide = Vec::with_capacity(N);
        for t in inputs {
            wide.push(if t.dtype().is_half() { t.to_dtype(DType::F32)? } else { t.clone() });
        }
        f(std::array::from_fn(|i| &wide[i]))?.to_dtype(dtype)
    }
}

fn convert<A: Element, B: Element>(x: &Tensor) -> Tensor {
    let float = A::DTYPE.is_float() || B::DTYPE.is_float();
    match (A::DTYPE, B::DTYPE) {
        // f64 holds every value of the other types but large i64, so it is the common ground of floats.
        _ if float => elementwise::map("to_dtype", x, |v: A| B::from_f64(v.to_f64())),
        _ => elementwise::map("to_dtype", x, |v: A| B::from_i64(v.to_i64())),
    }
}

struct Cast {
    from: DType,
}

impl Backward for Cast {
    const NAME: &'static str = "to_dtype";
    const TWICE: bool = true;

    fn backward(&self, grad: &Tensor, _: &Ctx) -> Result<Grads> {
        Ok(smallvec![Some(grad.to_dtype(self.from)?)])
    }
}
