//! Operations on each element, as a table: one line of code forward, one backward, and the backward once more
//! in tensor operations for second derivatives. Each saves its input or its output, whichever is named.

#[cfg(gpu)]
use crate::gpu::{elementwise as gpu, sys};
use crate::{
    DType, Result, Tensor,
    autograd::{Backward, Ctx, Grads},
    cpu::elementwise,
    dtype::Real,
    for_computed, on_device,
};
use smallvec::smallvec;
use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, SQRT_2};

/// A function of one number.
trait Function: Copy + Send + Sync + 'static {
    const NAME: &'static str;
    /// Does the derivative use the output instead of the input?
    const FROM_OUTPUT: bool;
    fn f<R: Real>(self, x: R) -> R;
    /// Gradient of the input from that of the output and the saved number.
    fn df<R: Real>(self, g: R, saved: R) -> R;
    /// The same in tensor operations.
    fn df_tensor(self, g: &Tensor, saved: &Tensor) -> Result<Tensor>;
    /// The kernel's name of the function, and its constants.
    #[cfg(gpu)]
    fn code(self) -> gpu::Code;
}

#[track_caller]
fn apply<F: Function>(x: &Tensor, f: F) -> Result<Tensor> {
    let y = on_device!(
        x,
        F::NAME,
        for_computed!(x.dtype(), F::NAME, T => {
            Ok(elementwise::map(
                F::NAME,
                x,
                #[inline(always)]
                move |v: T| f.f(v),
            ))
        }),
        gpu::map(F::NAME, float(F::NAME, f.code(), x)?, x)
    )?;
    let saved = if F::FROM_OUTPUT { y.clone() } else { x.clone() };
    y.record([x], Unary { f, saved })
}

/// The kernels know `clamp` of integers too, which is not what a [`Function`] is asked for.
#[cfg(gpu)]
#[track_caller]
fn float(op: &'static str, code: gpu::Code, x: &Tensor) -> Result<gpu::Code> {
    crate::ensure!(x.dtype().is_float(), op, "needs a float tensor (f32, bf16, f16, f64), got {}", x.dtype());
    Ok(code)
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
                for_computed!(grad.dtype(), F::NAME, T => {
                    elementwise::map2(
                        F::NAME,
                        grad,
                        &self.saved,
                        #[inline(always)]
                        move |g: T, s: T| f.df(g, s),
                    )
                }),
                gpu::map_backward(F::NAME, f.code(), grad, &self.saved)
            )?
        };
        Ok(smallvec![Some(dx)])
    }
}

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident($saved:ident) $struct:ident as $code:ident {
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
                #[cfg(gpu)]
                fn code(self) -> gpu::Code { (sys::$code, [0.0; 2]) }
            }
        )+
    };
    (@ input) => { false };
    (@ output) => { true };
}

unary! {
    /// e^x
    exp(output) Exp as SMALTI_EXP { f: |x| x.exp(), df: |g, y| g * y, tensor: |g, y| g.mul(y) }

    /// Natural logarithm.
    log(input) Log as SMALTI_LOG { f: |x| x.ln(), df: |g, x| g / x, tensor: |g, x| g.div(x) }

    /// Square root.
    sqrt(output) Sqrt as SMALTI_SQRT {
        f: |x| x.sqrt(),
        df: |g, y| g / (y + y),
        tensor: |g, y| g.div(&y.mul_scalar(2.0)?)
    }

    /// 1 / sqrt(x)
    rsqrt(output) Rsqrt as SMALTI_RSQRT {
        f: |x| R::ONE / x.sqrt(),
        df: |g, y| g * R::of(-0.5) * y * y * y,
        tensor: |g, y| g.mul(&y.mul(y)?.mul(y)?)?.mul_scalar(-0.5)
    }

    /// Hyperbolic tangent.
    tanh(output) Tanh as SMALTI_TANH {
        f: |x| x.tanh(),
        df: |g, y| g * (R::ONE - y * y),
        tensor: |g, y| g.sub(&g.mul(&y.mul(y)?)?)
    }

    /// 1 / (1 + e^-x)
    sigmoid(output) Sigmoid as SMALTI_SIGMOID {
        f: |x| R::ONE / (R::ONE + (-x).exp()),
        df: |g, y| g * y * (R::ONE - y),
        tensor: |g, y| g.mul(&y.sub(&y.mul(y)?)?)
    }

    /// x where positive, else 0; its derivative at 0 is 0.
    relu(output) Relu as SMALTI_RELU {
        f: |x| if x > R::ZERO || x.is_nan() { x } else { R::ZERO },
        df: |g, y| if y > R::ZERO { g } else { R::ZERO },
        tensor: |g, y| g.mul(&y.gt(&y.zeros_like()?)?.to_dtype(g.dtype())?)
    }

    /// |x|; its derivative at 0 is 0.
    abs(input) Abs as SMALTI_ABS {
        f: |x| x.abs(),
        df: |g, x| if x > R::ZERO { g } else if x < R::ZERO { -g } else { x * R::ZERO },
        tensor: |g, x| {
            let zero = x.zeros_like()?;
            let (above, below) = (x.gt(&zero)?.to_dtype(g.dtype())?, x.lt(&zero)?.to_dtype(g.dtype())?);
            g.mul(&above.sub(&below)?)
        }
    }

    /// x * x
    square(input) Square as SMALTI_SQUARE {
        f: |x| x * x,
        df: |g, x| g * (x + x),
        tensor: |g, x| g.mul(x)?.mul_scalar(2.0)
    }

    /// 1 / x
    recip(output) Recip as SMALTI_RECIP {
        f: |x| R::ONE / x,
        df: |g, y| -(g * y * y),
        tensor: |g, y| g.mul(&y.mul(y)?)?.neg()
    }

    /// Error function: 2 / sqrt(pi) times the integral of e^(-t^2) from 0 to x.
    erf(input) Erf as SMALTI_ERF {
        f: |x| x.erf(),
        df: |g, x| g * R::of(FRAC_2_SQRT_PI) * (-(x * x)).exp(),
        tensor: |g, x| g.mul(&x.square()?.neg()?.exp()?)?.mul_scalar(FRAC_2_SQRT_PI)
    }

    /// Inverse tangent, between -pi/2 and pi/2.
    atan(input) Atan as SMALTI_ATAN {
        f: |x| x.atan(),
        df: |g, x| g / (R::ONE + x * x),
        tensor: |g, x| g.div(&x.square()?.add_scalar(1.0)?)
    }

    /// x sigmoid(x), also called swish.
    silu(input) Silu as SMALTI_SILU {
        f: |x| x / (R::ONE + (-x).exp()),
        df: |g, x| {
            let s = R::ONE / (R::ONE + (-x).exp());
            g * s * (R::ONE + x * (R::ONE - s))
        },
        tensor: |g, x| {
            let s = x.sigmoid()?;
            g.mul(&s.add(&x.mul(&s.sub(&s.square()?)?)?)?)
        }
    }

    /// x Phi(x), with Phi the distribution function of the normal distribution: the GELU of Hendrycks & Gimpel
    /// (2016), exact, by the error function.
    gelu(input) Gelu as SMALTI_GELU {
        // Written with the tail of |x|, so that nothing cancels for negative x. It is 0 beyond 38.
        f: |x| {
            let (tail, _) = x.normal();
            let (positive, size) = (if x > R::ZERO { x } else { R::ZERO }, x.abs());
            let size = if size > R::of(38.0) { R::of(38.0) } else { size };
            positive - size * tail
        },
        df: |g, x| {
            let (tail, density) = x.normal();
            let phi = if x > R::ZERO { R::ONE - tail } else { tail };
            let x = if x > R::of(38.0) { R::of(38.0) } else { x };
            let x = if x < R::of(-38.0) { R::of(-38.0) } else { x };
            g * (phi + x * density)
        },
        tensor: |g, x| {
            let phi = x.mul_scalar(FRAC_1_SQRT_2)?.erf()?.affine(0.5, 0.5)?;
            let density = x.square()?.mul_scalar(-0.5)?.exp()?.mul_scalar(0.5 * FRAC_1_SQRT_2 * FRAC_2_SQRT_PI)?;
            g.mul(&phi.add(&x.mul(&density)?)?)
        }
    }

    /// The GELU by its approximation x sigmoid(2u) = x (1 + tanh u) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3).
    gelu_tanh(input) GeluTanh as SMALTI_GELU_TANH {
        f: |x| {
            let u = x * (x * x).mul_add(R::of(TANH_CUBIC), R::of(TANH_LINEAR));
            x / (R::ONE + (-(u + u)).exp())
        },
        df: |g, x| {
            let u = x * (x * x).mul_add(R::of(TANH_CUBIC), R::of(TANH_LINEAR));
            let du = (x * x).mul_add(R::of(3.0 * TANH_CUBIC), R::of(TANH_LINEAR));
            let e = (-(u.abs() + u.abs())).exp();
            let s = R::ONE / (R::ONE + e);
            // s (1 - s) is even in u, and e is at most 1, so nothing overflows
            let slope = if e > R::ZERO { x * (du + du) * e * s * s } else { R::ZERO };
            g * (if u < R::ZERO { e * s } else { s } + slope)
        },
        tensor: |g, x| {
            let x2 = x.square()?;
            let s = x.mul(&x2.affine(2.0 * TANH_CUBIC, 2.0 * TANH_LINEAR)?)?.sigmoid()?;
            let du = x.mul(&x2.affine(6.0 * TANH_CUBIC, 2.0 * TANH_LINEAR)?)?;
            g.mul(&s.add(&s.sub(&s.square()?)?.mul(&du)?)?)
        }
    }

    /// The GELU by its coarser approximation x sigmoid(1.702 x): "quick GELU", that of OpenAI's CLIP.
    gelu_quick(input) GeluQuick as SMALTI_GELU_QUICK {
        f: |x| x / (R::ONE + (-(x * R::of(QUICK))).exp()),
        df: |g, x| {
            let s = R::ONE / (R::ONE + (-(x * R::of(QUICK))).exp());
            g * s * (R::ONE + x * R::of(QUICK) * (R::ONE - s))
        },
        tensor: |g, x| {
            let s = x.mul_scalar(QUICK)?.sigmoid()?;
            g.mul(&s.add(&x.mul_scalar(QUICK)?.mul(&s.sub(&s.square()?)?)?)?)
        }
    }
}

const TANH_LINEAR: f64 = 0.5 * FRAC_2_SQRT_PI * SQRT_2;
const TANH_CUBIC: f64 = 0.044715 * TANH_LINEAR;
const QUICK: f64 = 1.702;

impl Tensor {
    /// log(1 + e^(beta x)) / beta; x itself where beta x > threshold.
    ///
    /// # Errors
    /// If the dtype is not a float.
    #[track_caller]
    pub fn softplus(&self, beta: f64, threshold: f64) -> Result<Tensor> {
        apply(self, Softplus { beta, threshold })
    }

    /// x held between `min` and `max`, either of which may be absent; `max` where `min` is larger. The gradient
    /// passes strictly between the bounds. Integers too.
    ///
    /// # Errors
    /// If the dtype is bool.
    #[track_caller]
    pub fn clamp(&self, min: impl Into<Option<f64>>, max: impl Into<Option<f64>>) -> Result<Tensor> {
        let (min, max) = (min.into().unwrap_or(f64::NEG_INFINITY), max.into().unwrap_or(f64::INFINITY));
        if self.dtype().is_float() {
            return apply(self, Clamp { min, max });
        }
        crate::ensure!(self.dtype() != DType::Bool, "clamp", "needs numbers, got bool");
        // the conversions saturate, so that an absent bound is the end of the range
        let (low, high) = (min.ceil() as i64, max.floor() as i64);
        on_device!(
            self,
            "clamp",
            Ok(elementwise::map("clamp", self, move |v: i64| v.max(low).min(high))),
            gpu::map("clamp", (sys::SMALTI_CLAMP, [min, max]), self)
        )
    }

    /// x^exponent with a constant exponent.
    ///
    /// # Errors
    /// If the dtype is not a float.
    #[track_caller]
    pub fn pow_scalar(&self, exponent: f64) -> Result<Tensor> {
        match exponent {
            1.0 => self.mul_scalar(1.0),
            2.0 => self.square(),
            3.0 => apply(self, Cube),
            -1.0 => self.recip(),
            _ => apply(self, PowScalar { exponent }),
        }
    }
}

#[derive(Clone, Copy)]
struct Softplus {
    beta: f64,
    threshold: f64,
}
impl Function for Softplus {
    const NAME: &'static str = "softplus";
    const FROM_OUTPUT: bool = false;
    #[inline(always)]
    fn f<R: Real>(self, x: R) -> R {
        let z = x * R::of(self.beta);
        let positive = if z < R::ZERO { R::ZERO } else { z };
        let y = (positive + (-z.abs()).exp().ln_1p()) / R::of(self.beta);
        if z > R::of(self.threshold) { x } else { y }
    }
    #[inline(always)]
    fn df<R: Real>(self, g: R, x: R) -> R {
        let z = x * R::of(self.beta);
        let dx = g / (R::ONE + (-z).exp());
        if z > R::of(self.threshold) { g } else { dx }
    }
    fn df_tensor(self, g: &Tensor, x: &Tensor) -> Result<Tensor> {
        let z = x.mul_scalar(self.beta)?;
        let linear = z.gt(&Tensor::full((), self.threshold, z.dtype())?)?;
        linear.where_cond(g, &g.mul(&z.sigmoid()?)?)
    }
    #[cfg(gpu)]
    fn code(self) -> gpu::Code {
        (sys::SMALTI_SOFTPLUS, [self.beta, self.threshold])
    }
}

#[derive(Clone, Copy)]
struct Clamp {
    min: f64,
    max: f64,
}
impl Clamp {
    fn slope(self, x: &Tensor) -> Result<Tensor> {
        on_device!(
            x,
            "clamp",
            for_computed!(x.dtype(), "clamp", T => {
                Ok(elementwise::map("clamp", x, move |v: T| self.df(T::ONE, v)))
            }),
            gpu::map_backward("clamp", self.code(), &x.full_like(1.0)?, x)
        )
    }
}
impl Function for Clamp {
    const NAME: &'static str = "clamp";
    const FROM_OUTPUT: bool = false;
    #[inline(always)]
    fn f<R: Real>(self, x: R) -> R {
        let y = if x < R::of(self.min) { R::of(self.min) } else { x };
        if y > R::of(self.max) { R::of(self.max) } else { y }
    }
    #[inline(always)]
    fn df<R: Real>(self, g: R, x: R) -> R {
        // an absent bound holds nothing back, not even infinity
        let above = x > R::of(self.min) || self.min == f64::NEG_INFINITY;
        let below = x < R::of(self.max) || self.max == f64::INFINITY;
        if above & below { g } else { R::ZERO }
    }
    fn df_tensor(self, g: &Tensor, x: &Tensor) -> Result<Tensor> {
        // the derivative is a constant: 1 or 0
        let slope = crate::no_grad(|| self.slope(x))?;
        g.mul(&slope)
    }
    #[cfg(gpu)]
    fn code(self) -> gpu::Code {
        (sys::SMALTI_CLAMP, [self.min, self.max])
    }
}

#[derive(Clone, Copy)]
struct Cube;
impl Function for Cube {
    const NAME: &'static str = "pow";
    const FROM_OUTPUT: bool = false;
    #[inline(always)]
    fn f<R: Real>(self, x: R) -> R {
        x * x * x
    }
    #[inline(always)]
    fn df<R: Real>(self, g: R, x: R) -> R {
        g * R::of(3.0) * x * x
    }
    fn df_tensor(self, g: &Tensor, x: &Tensor) -> Result<Tensor> {
        g.mul(&x.square()?)?.mul_scalar(3.0)
    }
    #[cfg(gpu)]
    fn code(self) -> gpu::Code {
        (sys::SMALTI_CUBE, [0.0; 2])
    }
}

#[derive(Clone, Copy)]
struct PowScalar {
    exponent: f64,
}
impl Function for PowScalar {
    const NAME: &'static str = "pow";
    const FROM_OUTPUT: bool = false;
    #[inline(always)]
    fn f<R: Real>(self, x: R) -> R {
        x.powf(R::of(self.exponent))
    }
    #[inline(always)]
    fn df<R: Real>(self, g: R, x: R) -> R {
        // x^0 is constant, also at 0, where x^-1 is infinite
        if self.exponent == 0.0 {
            return R::ZERO;
        }
        g * R::of(self.exponent) * x.powf(R::of(self.exponent - 1.0))
    }
    fn df_tensor(self, g: &Tensor, x: &Tensor) -> Result<Tensor> {
        if self.exponent == 0.0 {
            return g.zeros_like();
        }
        g.mul(&x.pow_scalar(self.exponent - 1.0)?)?.mul_scalar(self.exponent)
    }
    #[cfg(gpu)]
    fn code(self) -> gpu::Code {
        (sys::SMALTI_POW, [self.exponent, 0.0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BackwardOptions, Rng, gradcheck};

    type Op = fn(&Tensor) -> Result<Tensor>;
    const OPS: [(&str, Op); 16] = [
        ("exp", |x| x.exp()),
        ("tanh", |x| x.tanh()),
        ("sigmoid", |x| x.sigmoid()),
        ("relu", |x| x.relu()),
        ("abs", |x| x.abs()),
        ("square", |x| x.square()),
        ("erf", |x| x.erf()),
        ("atan", |x| x.atan()),
        ("silu", |x| x.silu()),
        ("gelu", |x| x.gelu()),
        ("gelu_tanh", |x| x.gelu_tanh()),
        ("gelu_quick", |x| x.gelu_quick()),
        ("softplus", |x| x.softplus(1.5, 2.0)),
        ("clamp", |x| x.clamp(-0.5, 0.8)),
        ("pow 3", |x| x.pow_scalar(3.0)),
        ("affine", |x| x.affine(-2.5, 1.0)),
    ];
    /// Those of positive numbers.
    const POSITIVE: [(&str, Op); 5] = [
        ("log", |x| x.log()),
        ("sqrt", |x| x.sqrt()),
        ("rsqrt", |x| x.rsqrt()),
        ("pow 2.5", |x| x.pow_scalar(2.5)),
        ("recip", |x| x.recip()),
    ];

    fn input() -> Result<Tensor> {
        Tensor::randn([3, 5], &mut Rng::new(7))?.to_dtype(DType::F64)?.mul_scalar(1.5)
    }

    #[test]
    fn gradients_once_and_twice() -> Result<()> {
        let positive = input()?.abs()?.add_scalar(0.3)?;
        let cases = OPS.map(|(name, f)| (name, f, input()));
        for (name, f, x) in cases.into_iter().chain(POSITIVE.map(|(name, f)| (name, f, Ok(positive.clone()))))
        {
            let x = x?;
            let first = gradcheck(|t| f(&t[0]), &[x.clone()]);
            assert!(first.is_ok(), "{name}: {first:?}");
            assert!(gradcheck(|t| f(&t[0]), &[x.t()?]).is_ok(), "{name} permuted");
            // derivative of the squared derivative
            let twice = |t: &[Tensor]| -> Result<Tensor> {
                let leaf = if t[0].tracked() { t[0].clone() } else { t[0].requires_grad() };
                let options = BackwardOptions { create_graph: true, ..Default::default() };
                let grads = f(&leaf)?.sum(())?.backward_with(&options)?;
                let zero = leaf.zeros_like()?;
                let grad = grads.get(&leaf).unwrap_or(&zero).square()?;
                // keeps the result tracked where the second derivative is zero
                grad.add(&leaf.mul_scalar(0.0)?)
            };
            let second = twice_check(&twice, &x);
            assert!(second.is_ok(), "{name} twice: {second:?}");
        }
        Ok(())
    }

    /// As `gradcheck`, for functions that need gradients themselves.
    fn twice_check(f: &dyn Fn(&[Tensor]) -> Result<Tensor>, x: &Tensor) -> Result<()> {
        let leaf = x.requires_grad();
        let analytic = f(&[leaf.clone()])?.sum(())?.backward()?;
        let analytic = analytic.get(&leaf).map(|g| g.to_vec::<f64>()).transpose()?.unwrap_or_default();
        let values = x.to_vec::<f64>()?;
        for i in 0..values.len() {
            let at = |delta: f64| -> Result<f64> {
                let mut moved = values.clone();
                moved[i] += delta;
                f(&[Tensor::from_slice(&moved, x.shape())?])?.detach().sum(())?.item()
            };
            let numeric = (at(1e-6)? - at(-1e-6)?) / 2e-6;
            crate::ensure!(
                (numeric - analytic[i]).abs() < 1e-6 * numeric.abs().max(10.0),
                "twice",
                "element {i}: {} {numeric}",
                analytic[i]
            );
        }
        Ok(())
    }

    #[test]
    fn f32_and_half_agree_with_f64() -> Result<()> {
        let x = Tensor::randn([4, 300], &mut Rng::new(3))?.mul_scalar(3.0)?;
        let positive = x.abs()?.add_scalar(0.3)?;
        for (name, f, x) in
            OPS.map(|(n, f)| (n, f, &x)).into_iter().chain(POSITIVE.map(|(n, f)| (n, f, &positive)))
        {
            for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::BF16, 1e-2), (DType::F16, 2e-3)] {
                let x = x.to_dtype(dtype)?;
                let exact = f(&x.to_dtype(DType::F64)?)?.to_vec::<f64>()?;
                let got = f(&x)?.to_dtype(DType::F64)?.to_vec::<f64>()?;
                for (a, b) in got.iter().zip(&exact) {
                    assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "{name} {dtype}: {a} {b}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn ends_of_the_range() -> Result<()> {
        let x = Tensor::from_slice(&[f32::NEG_INFINITY, -1e30, -100., 0., 100., 1e30, f32::NAN], [7])?;
        let x = x.requires_grad();
        for (f, low) in [(Tensor::gelu as Op, 0.0), (|x| x.softplus(1.0, 20.0), 0.0)] {
            let y = f(&x)?;
            let v = y.to_vec::<f32>()?;
            assert!(
                v[..3].iter().all(|y| (y - low).abs() < 1e-30) && v[4..6] == [100., 1e30] && v[6].is_nan()
            );
            let grads =
                y.backward_with(&BackwardOptions { grad: Some(y.ones_like()?), ..Default::default() })?;
            let g = grads.get(&x).map(|g| g.to_vec::<f32>()).transpose()?.unwrap_or_default();
            assert!(g[..3].iter().all(|g| g.abs() < 1e-30) && g[3..6] == [0.5, 1., 1.] && g[6].is_nan());
        }
        let y = Tensor::gelu_tanh(&x)?;
        let grads = y.backward_with(&BackwardOptions { grad: Some(y.ones_like()?), ..Default::default() })?;
        let g = grads.get(&x).map(|g| g.to_vec::<f32>()).transpose()?.unwrap_or_default();
        assert!(g[1..6] == [0., 0., 0.5, 1., 1.], "{g:?}");
        let n = Tensor::from_slice(&[-5i64, 0, 9], [3])?;
        assert_eq!(n.clamp(-1.5, 4.0)?.to_vec::<i64>()?, [-1, 0, 4]);
        assert_eq!(n.clamp(None, 4.0)?.to_vec::<i64>()?, [-5, 0, 4]);
        Ok(())
    }
}
