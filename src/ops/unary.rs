//! Operations on each element, as a table: one line of code forward, one backward, and the backward once more
//! in tensor operations for second derivatives. Each saves its input or its output, whichever is named.

use crate::{
    Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    cpu::elementwise,
    dtype::{Float, Real},
    for_float, on_device,
};
use smallvec::smallvec;

/// A smooth function of one number.
trait Function: Copy + Send + Sync + 'static {
    const NAME: &'static str;
    /// Does the derivative use the output instead of the input?
    const FROM_OUTPUT: bool;
    fn f<R: Real>(self, x: R) -> R;
    /// Gradient of the input from that of the output and the saved number.
    fn df<R: Real>(self, g: R, saved: R) -> R;
    /// The same in tensor operations.
    fn df_tensor(self, g: &Tensor, saved: &Tensor) -> Result<Tensor>;
}

fn apply<F: Function>(x: &Tensor, f: F) -> Result<Tensor> {
    let y = on_device!(
        x,
        F::NAME,
        for_float!(x.dtype(), F::NAME, T => {
            Ok(elementwise::map(F::NAME, x, move |v: T| T::store(f.f(v.acc()))))
        })
    )?;
    let saved = if F::FROM_OUTPUT { y.clone() } else { x.clone() };
    y.record([x], Unary { f, saved })
}

struct Unary<F> {
    f: F,
    saved: Tensor,
}

impl<F: Function> Backward for Unary<F> {
    const NAME: &'static str = F::NAME;
    const TWICE: bool = true;

    fn backward(&self, grad: &Tensor, ctx: &Ctx) -> Result<Grads> {
        let f = self.f;
        let dx = if crate::autograd::is_grad_enabled() {
            let saved = if F::FROM_OUTPUT { ctx.output(&self.saved) } else { self.saved.clone() };
            f.df_tensor(grad, &saved)?
        } else {
            on_device!(
                grad,
                F::NAME,
                for_float!(grad.dtype(), F::NAME, T => {
                    elementwise::map2(F::NAME, grad, &self.saved, move |g: T, s: T| T::store(f.df(g.acc(), s.acc())))
                })
            )?
        };
        Ok(smallvec![Some(dx)])
    }
}

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident($saved:ident) $struct:ident {
        f: |$x:ident| $f:expr,
        df: |$g:ident, $s:ident| $df:expr,
        tensor: |$tg:ident, $ts:ident| $tensor:expr $(,)?
    })+) => {
        impl Tensor {$(
            $(#[$doc])*
            ///
            /// # Errors
            /// If the dtype is not a float.
            #[track_caller]
            pub fn $name(&self) -> Result<Tensor> {
                apply(self, $struct)
            }
        )+}
        $(
            #[derive(Clone, Copy)]
            struct $struct;
            impl Function for $struct {
                const NAME: &'static str = stringify!($name);
                const FROM_OUTPUT: bool = unary!(@ $saved);
                #[inline(always)]
                fn f<R: Real>(self, $x: R) -> R { $f }
                #[inline(always)]
                fn df<R: Real>(self, $g: R, $s: R) -> R { $df }
                fn df_tensor(self, $tg: &Tensor, $ts: &Tensor) -> Result<Tensor> { $tensor }
            }
        )+
    };
    (@ input) => { false };
    (@ output) => { true };
}

unary! {
    /// -x
    neg(input) Neg { f: |x| -x, df: |g, _x| -g, tensor: |g, _x| g.neg() }

    /// e^x
    exp(output) Exp { f: |x| x.exp(), df: |g, y| g * y, tensor: |g, y| g.mul(y) }

    /// Natural logarithm.
    log(input) Log { f: |x| x.ln(), df: |g, x| g / x, tensor: |g, x| g.div(x) }

    /// Square root.
    sqrt(output) Sqrt {
        f: |x| x.sqrt(),
        df: |g, y| g / (y + y),
        tensor: |g, y| g.div(&y.mul_scalar(2.0)?)
    }

    /// 1 / sqrt(x)
    rsqrt(output) Rsqrt {
        f: |x| R::ONE / x.sqrt(),
        df: |g, y| g * R::of(-0.5) * y * y * y,
        tensor: |g, y| g.mul(&y.mul(y)?.mul(y)?)?.mul_scalar(-0.5)
    }

    /// Hyperbolic tangent.
    tanh(output) Tanh {
        f: |x| x.tanh(),
        df: |g, y| g * (R::ONE - y * y),
        tensor: |g, y| g.sub(&g.mul(&y.mul(y)?)?)
    }

    /// 1 / (1 + e^-x)
    sigmoid(output) Sigmoid {
        f: |x| R::ONE / (R::ONE + (-x).exp()),
        df: |g, y| g * y * (R::ONE - y),
        tensor: |g, y| g.mul(&y.sub(&y.mul(y)?)?)
    }

    /// x where positive, else 0; its derivative at 0 is 0.
    relu(output) Relu {
        f: |x| if x > R::ZERO || x.is_nan() { x } else { R::ZERO },
        df: |g, y| if y > R::ZERO { g } else { R::ZERO },
        tensor: |g, y| g.mul(&y.gt(&y.zeros_like()?)?.to_dtype(g.dtype())?)
    }
}
