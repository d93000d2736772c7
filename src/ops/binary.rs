//! Arithmetic on two broadcast tensors, as a table.

#[cfg(gpu)]
use crate::gpu::{elementwise as gpu, sys};
use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    cpu::elementwise,
    for_computed, on_device,
};
use smallvec::smallvec;

/// Both operands as the dtype in which they meet. A single number comes to where the other one is.
pub(super) fn promoted(a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
    let dtype = a.dtype().promote(b.dtype());
    let (a, b) = (a.to_dtype(dtype)?, b.to_dtype(dtype)?);
    if a.device() == b.device() || crate::device::is_on_host() {
        return Ok((a, b));
    }
    match (a.numel(), b.numel()) {
        (_, 1) => Ok((a.clone(), b.to_device(a.device())?)),
        (1, _) => Ok((a.to_device(b.device())?, b)),
        _ => Ok((a, b)),
    }
}

/// Floats compute in their accumulator type, integers in i64.
macro_rules! arithmetic {
    ($op:expr, $code:ident, $a:expr, $b:expr, |$x:ident, $y:ident| $float:expr, $int:expr) => {{
        let (a, b) = promoted($a, $b)?;
        on_device!(a, $op, match a.dtype() {
            DType::Bool => crate::bail!($op, "needs numbers, got two bool tensors"),
            dtype if dtype.is_float() => for_computed!(dtype, $op, T => {
                elementwise::map2($op, &a, &b, |$x: T, $y: T| $float)
            }),
            _ => elementwise::map2($op, &a, &b, |$x: i64, $y: i64| $int),
        }, {
            crate::ensure!(a.dtype() != DType::Bool, $op, "needs numbers, got two bool tensors");
            gpu::map2($op, sys::$code, &a, &b, a.dtype())
        })?
    }};
}

impl Tensor {
    /// self + other, broadcast.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    #[track_caller]
    pub fn add(&self, other: &Tensor) -> Result<Tensor> {
        let y = arithmetic!("add", SMALTI_ADD, self, other, |a, b| a + b, a.wrapping_add(b));
        y.record([self, other], Add)
    }

    /// self - other, broadcast.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    #[track_caller]
    pub fn sub(&self, other: &Tensor) -> Result<Tensor> {
        let y = arithmetic!("sub", SMALTI_SUB, self, other, |a, b| a - b, a.wrapping_sub(b));
        y.record([self, other], Sub)
    }

    /// self * other, broadcast.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    #[track_caller]
    pub fn mul(&self, other: &Tensor) -> Result<Tensor> {
        let y = arithmetic!("mul", SMALTI_MUL, self, other, |a, b| a * b, a.wrapping_mul(b));
        y.record([self, other], Mul { a: saved(self, other), b: saved(other, self) })
    }

    /// self / other, broadcast. Integers are divided as f32.
    ///
    /// # Errors
    /// If the shapes do not broadcast.
    #[track_caller]
    pub fn div(&self, other: &Tensor) -> Result<Tensor> {
        if !self.dtype().is_float() && !other.dtype().is_float() {
            return self.to_dtype(DType::F32)?.div(other);
        }
        let y = arithmetic!("div", SMALTI_DIV, self, other, |a, b| a / b, a / b);
        y.record([self, other], Div { a: saved(self, other), b: other.clone() })
    }

    /// self + other where this tensor's buffer is taken over if nobody else sees it.
    pub(crate) fn accumulate(self, other: &Tensor) -> Result<Tensor> {
        let plain = !self.tracked() && !other.tracked() && self.shape() == other.shape();
        if !plain || self.dtype() != other.dtype() {
            return self.add(other);
        }
        let (sum, done) = on_device!(self, "add", self.add_in_place(other), {
            let mut sum = self;
            gpu::add_in_place("add", &mut sum, other).map(|done| (sum, done))
        })?;
        if done { Ok(sum) } else { sum.add(other) }
    }

    /// self += other on the CPU, in the order of its memory, in which any dense tensor is contiguous. False, with
    /// nothing done, if others see it or it is not dense.
    fn add_in_place(self, other: &Tensor) -> Result<(Tensor, bool)> {
        let order = elementwise::memory_order(self.shape(), self.strides());
        let mut back = order.clone();
        order.iter().enumerate().for_each(|(i, &d)| back[d] = i);
        let (mut sum, other) = (self.permute(&order[..])?, other.permute(&order[..])?);
        drop(self); // the sum is the only one that sees the storage, if this was
        let done = match sum.dtype() {
            DType::F32 => elementwise::update(&mut sum, &other, |a: f32, b: f32| a + b),
            DType::F64 => elementwise::update(&mut sum, &other, |a: f64, b: f64| a + b),
            _ => false,
        };
        Ok((sum.permute(&back[..])?, done))
    }
}

/// `x`, kept only if the gradient of `with` will ask for it.
fn saved(x: &Tensor, with: &Tensor) -> Option<Tensor> {
    with.tracked().then(|| x.clone())
}

/// A saved tensor, or the error that the engine asked for a gradient that `record` was not told of.
pub(super) fn kept<'a>(op: &'static str, t: &'a Option<Tensor>) -> Result<&'a Tensor> {
    t.as_ref().ok_or_else(|| crate::Error::msg(format!("{op}: internal: a saved tensor is missing")))
}

struct Add;
impl Backward for Add {
    const NAME: &'static str = "add";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        Ok(smallvec![ctx.grad(0, || Ok(grad.clone()))?, ctx.grad(1, || Ok(grad.clone()))?])
    }
}

struct Sub;
impl Backward for Sub {
    const NAME: &'static str = "sub";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        Ok(smallvec![ctx.grad(0, || Ok(grad.clone()))?, ctx.grad(1, || grad.neg())?])
    }
}

struct Mul {
    a: Option<Tensor>,
    b: Option<Tensor>,
}
impl Backward for Mul {
    const NAME: &'static str = "mul";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        Ok(smallvec![
            ctx.grad(0, || grad.mul(kept(Self::NAME, &self.b)?))?,
            ctx.grad(1, || grad.mul(kept(Self::NAME, &self.a)?))?
        ])
    }
}

struct Div {
    a: Option<Tensor>,
    b: Tensor,
}
impl Backward for Div {
    const NAME: &'static str = "div";
    const TWICE: bool = true;
    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let a = ctx.grad(0, || grad.div(&self.b))?;
        let b = ctx.grad(1, || {
            let a = kept(Self::NAME, &self.a)?;
            if crate::autograd::is_grad_enabled() {
                return grad.mul(&a.div(&self.b)?.div(&self.b)?)?.neg();
            }
            let (a, _) = promoted(a, grad)?;
            let (b, _) = promoted(&self.b, grad)?;
            on_device!(
                grad,
                Self::NAME,
                for_computed!(grad.dtype(), Self::NAME, T => {
                    elementwise::map3(Self::NAME, grad, &a, &b, |g: T, a: T, b: T| -(g * (a / b / b)))
                }),
                grad.mul(&a.div(&b)?.div(&b)?)?.neg()
            )
        })?;
        Ok(smallvec![a, b])
    }
}

macro_rules! comparison {
    ($($(#[$doc:meta])* $name:ident($op:tt) as $code:ident)+) => {
        impl Tensor {$(
            $(#[$doc])*
            ///
            /// # Errors
            /// If the shapes do not broadcast.
            #[track_caller]
            pub fn $name(&self, other: &Tensor) -> Result<Tensor> {
                let (a, b) = promoted(self, other)?;
                let op = stringify!($name);
                on_device!(a, op, match a.dtype() {
                    dtype if dtype.is_float() => for_computed!(dtype, op, T => {
                        elementwise::map2(op, &a, &b, |x: T, y: T| x $op y)
                    }),
                    _ => elementwise::map2(op, &a, &b, |x: i64, y: i64| x $op y),
                }, gpu::map2(op, sys::$code, &a, &b, DType::Bool))
            }
        )+}
    };
}

comparison! {
    /// self == other, as bool.
    eq(==) as SMALTI_EQ
    /// self != other, as bool.
    ne(!=) as SMALTI_NE
    /// self < other, as bool.
    lt(<) as SMALTI_LT
    /// self <= other, as bool.
    le(<=) as SMALTI_LE
    /// self > other, as bool.
    gt(>) as SMALTI_GT
    /// self >= other, as bool.
    ge(>=) as SMALTI_GE
}
