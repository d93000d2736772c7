//! Conversion between dtypes. The gradient is converted back.

use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    cpu::elementwise,
    dtype::Element,
    on_device,
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
            Ok(match self.dtype() {
                DType::F32 | DType::BF16 | DType::F16 => convert::<f32>(self, dtype),
                DType::F64 => convert::<f64>(self, dtype),
                DType::I64 | DType::I32 => convert::<i64>(self, dtype),
                DType::U8 | DType::Bool => convert::<u8>(self, dtype),
            }),
            crate::gpu::elementwise::cast("to_dtype", self, dtype)
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

    /// Runs `f`, which only moves elements, on elements of a type that stands for all of their size: see
    /// [`for_size!`](crate::for_size).
    pub(crate) fn moved(&self, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        let stand_in = match self.dtype().size() {
            1 => DType::U8,
            2 => DType::BF16,
            4 => DType::F32,
            _ => DType::I64,
        };
        Ok(f(&self.seen_as(stand_in))?.seen_as(self.dtype()))
    }
}

/// `A` holds every value of the dtype of `x`.
fn convert<A: Element>(x: &Tensor, to: DType) -> Tensor {
    if !A::DTYPE.is_float() && !to.is_float() {
        return elementwise::map_to("to_dtype", x, to, |v: A| v.to_i64());
    }
    // f64 holds every value of the other types but large i64, so it is the common ground of floats
    fn by_f64<A: Element, B: Element>(x: &Tensor, to: DType) -> Tensor {
        elementwise::map_to("to_dtype", x, to, |v: A| B::from_f64(v.to_f64()))
    }
    match to {
        DType::F32 | DType::BF16 | DType::F16 => by_f64::<A, f32>(x, to),
        DType::F64 => by_f64::<A, f64>(x, to),
        DType::I64 => by_f64::<A, i64>(x, to),
        DType::I32 => by_f64::<A, i32>(x, to),
        DType::U8 => by_f64::<A, u8>(x, to),
        DType::Bool => by_f64::<A, bool>(x, to),
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
