//! Element types: as values ([`DType`]) and as Rust types ([`Element`], [`Float`], [`Real`]).

use crate::cpu::simd;
use half::{bf16, f16};
use std::fmt;

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum DType {
    F32,
    BF16,
    F16,
    F64,
    I64,
    I32,
    U8,
    Bool,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::U8 | DType::Bool => 1,
        }
    }

    /// f32, bf16, f16 or f64.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F32 | DType::BF16 | DType::F16 | DType::F64)
    }

    /// bf16 or f16: stored in 16 bits, computed in f32.
    pub fn is_half(self) -> bool {
        matches!(self, DType::BF16 | DType::F16)
    }

    /// The dtype that floats of this one are computed in: f32 for the half types, else itself.
    pub fn computed_in(self) -> DType {
        if self.is_half() { DType::F32 } else { self }
    }

    /// The type in which two operands meet: floats before integers before booleans, the wider first, and f32
    /// for bf16 with f16.
    pub fn promote(self, other: DType) -> DType {
        use DType::*;
        let rank = |d| match d {
            Bool => 0,
            U8 => 1,
            I32 => 2,
            I64 => 3,
            F16 | BF16 => 4,
            F32 => 5,
            F64 => 6,
        };
        match (self, other) {
            (F16, BF16) | (BF16, F16) => F32,
            (a, b) if rank(a) >= rank(b) => a,
            (_, b) => b,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::F64 => "f64",
            DType::I64 => "i64",
            DType::I32 => "i32",
            DType::U8 => "u8",
            DType::Bool => "bool",
        })
    }
}

/// A Rust type that tensors store.
pub trait Element: Copy + Default + Send + Sync + PartialOrd + fmt::Debug + 'static {
    /// The same as a value.
    const DTYPE: DType;
    /// Exact where f64 can hold it.
    fn to_f64(self) -> f64;
    /// Rounds to nearest; integers truncate and saturate, booleans become `value != 0`.
    fn from_f64(value: f64) -> Self;
    /// Truncates floats; booleans are 0 and 1.
    fn to_i64(self) -> i64;
    /// Wraps as Rust's `as`; booleans become `value != 0`.
    fn from_i64(value: i64) -> Self;
}

macro_rules! element {
    ($($t:ty, $dtype:ident;)+) => {$(
        impl Element for $t {
            const DTYPE: DType = DType::$dtype;
            #[inline(always)]
            fn to_f64(self) -> f64 { self as f64 }
            #[inline(always)]
            fn from_f64(value: f64) -> Self { value as $t }
            #[inline(always)]
            fn to_i64(self) -> i64 { self as i64 }
            #[inline(always)]
            fn from_i64(value: i64) -> Self { value as $t }
        }
    )+};
}
element!(f32, F32; f64, F64; i64, I64; i32, I32; u8, U8;);

macro_rules! half_element {
    ($($t:ty, $dtype:ident;)+) => {$(
        impl Element for $t {
            const DTYPE: DType = DType::$dtype;
            #[inline(always)]
            fn to_f64(self) -> f64 { self.acc() as f64 }
            #[inline(always)]
            fn from_f64(value: f64) -> Self { Self::store(value as f32) }
            #[inline(always)]
            fn to_i64(self) -> i64 { self.acc() as i64 }
            #[inline(always)]
            fn from_i64(value: i64) -> Self { Self::store(value as f32) }
        }
    )+};
}
half_element!(bf16, BF16; f16, F16;);

impl Element for bool {
    const DTYPE: DType = DType::Bool;
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self as u8 as f64
    }
    #[inline(always)]
    fn from_f64(value: f64) -> Self {
        value != 0.0
    }
    #[inline(always)]
    fn to_i64(self) -> i64 {
        self as i64
    }
    #[inline(always)]
    fn from_i64(value: i64) -> Self {
        value != 0
    }
}

/// A floating-point element and the type that it is computed in: itself, or f32 for the half types.
pub trait Float: Element {
    /// f32 or f64.
    type Acc: Real;
    /// Widens for computing.
    fn acc(self) -> Self::Acc;
    /// Rounds a result for storing.
    fn store(value: Self::Acc) -> Self;
}

/// f32 and f64: the types that are computed in. The functions are fast and vectorise for f32, exact for f64.
pub trait Real:
    Float<Acc = Self>
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
    + std::iter::Sum
    + fmt::Display
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// -infinity
    const NEG_INF: Self;
    /// Positive infinity
    const INF: Self;
    /// NaN
    const NAN: Self;
    /// A constant.
    fn of(value: f64) -> Self;
    /// e^x
    fn exp(self) -> Self;
    /// e^x for x up to 88, quickly; 0 where that is below the normal numbers.
    fn exp_low(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// ln(1 + x)
    fn ln_1p(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
    /// Error function.
    fn erf(self) -> Self;
    /// Inverse tangent.
    fn atan(self) -> Self;
    /// Probability that a standard normal variable exceeds |x|, and its density at x.
    fn normal(self) -> (Self, Self);
    /// self^exponent
    fn powf(self, exponent: Self) -> Self;
    /// self * a + b, rounded once where the processor can.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// |x|
    fn abs(self) -> Self;
    /// The larger; NaN if either is.
    fn maximum(self, other: Self) -> Self;
    /// The smaller; NaN if either is.
    fn minimum(self, other: Self) -> Self;
    /// Is it NaN?
    fn is_nan(self) -> bool;
    /// Largest integer not above.
    fn floor(self) -> Self;
}

macro_rules! real {
    ($t:ident, $exp:path, $exp_low:path, $ln:path, $ln_1p:path, $tanh:path, $erf:path, $normal:path) => {
        impl Float for $t {
            type Acc = $t;
            #[inline(always)]
            fn acc(self) -> $t {
                self
            }
            #[inline(always)]
            fn store(value: $t) -> $t {
                value
            }
        }
        impl Real for $t {
            const ZERO: $t = 0.0;
            const ONE: $t = 1.0;
            const NEG_INF: $t = $t::NEG_INFINITY;
            const INF: $t = $t::INFINITY;
            const NAN: $t = $t::NAN;
            #[inline(always)]
            fn of(value: f64) -> $t {
                value as $t
            }
            #[inline(always)]
            fn exp(self) -> $t {
                $exp(self)
            }
            #[inline(always)]
            fn exp_low(self) -> $t {
                $exp_low(self)
            }
            #[inline(always)]
            fn ln(self) -> $t {
                $ln(self)
            }
            #[inline(always)]
            fn ln_1p(self) -> $t {
                $ln_1p(self)
            }
            #[inline(always)]
            fn sqrt(self) -> $t {
                $t::sqrt(self)
            }
            #[inline(always)]
            fn tanh(self) -> $t {
                $tanh(self)
            }
            #[inline(always)]
            fn erf(self) -> $t {
                $erf(self)
            }
            #[inline(always)]
            fn atan(self) -> $t {
                $t::atan(self)
            }
            #[inline(always)]
            fn normal(self) -> ($t, $t) {
                $normal(self)
            }
            #[inline(always)]
            fn powf(self, exponent: $t) -> $t {
                $t::powf(self, exponent)
            }
            #[inline(always)]
            fn mul_add(self, a: $t, b: $t) -> $t {
                $t::mul_add(self, a, b)
            }
            #[inline(always)]
            fn abs(self) -> $t {
                $t::abs(self)
            }
            #[inline(always)]
            fn maximum(self, other: $t) -> $t {
                if self > other || self.is_nan() { self } else { other }
            }
            #[inline(always)]
            fn minimum(self, other: $t) -> $t {
                if self < other || self.is_nan() { self } else { other }
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                $t::is_nan(self)
            }
            #[inline(always)]
            fn floor(self) -> $t {
                $t::floor(self)
            }
        }
    };
}
real!(
    f32,
    simd::exp_f32,
    simd::exp_low_f32,
    simd::ln_f32,
    simd::ln_1p_f32,
    simd::tanh_f32,
    simd::erf_f32,
    simd::normal_f32
);
real!(f64, f64::exp, f64::exp, f64::ln, f64::ln_1p, f64::tanh, libm::erf, simd::normal_f64);

impl Float for bf16 {
    type Acc = f32;
    #[inline(always)]
    fn acc(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn store(value: f32) -> Self {
        let bits = value.to_bits();
        // to nearest, ties to even
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let bits = if value.is_nan() { bits >> 16 | 0x40 } else { rounded };
        bf16::from_bits(bits as u16)
    }
}

/// Without the branches and processor queries of `half`, so that loops vectorise. After F. Giesen.
impl Float for f16 {
    type Acc = f32;
    #[inline(always)]
    fn acc(self) -> f32 {
        const INF: u32 = 0x7c00 << 13;
        let half = self.to_bits() as u32;
        let bits = (half & 0x7fff) << 13;
        let exponent = bits & INF;
        let rebiased = bits + ((127 - 15) << 23);
        let infinite = rebiased + ((128 - 16) << 23);
        let subnormal = (f32::from_bits(rebiased + (1 << 23)) - f32::from_bits(113 << 23)).to_bits();
        let bits = if exponent == 0 { subnormal } else { rebiased };
        let bits = if exponent == INF { infinite } else { bits };
        f32::from_bits(bits | (half & 0x8000) << 16)
    }
    #[inline(always)]
    fn store(value: f32) -> Self {
        const SUBNORMAL: u32 = ((127 - 15) + (23 - 10) + 1) << 23;
        let sign = value.to_bits() & 0x8000_0000;
        let bits = value.to_bits() ^ sign;
        let infinite = if bits > 0x7f80_0000 { 0x7e00 } else { 0x7c00 };
        // the addition rounds at the last bit of a subnormal result
        let subnormal = (f32::from_bits(bits) + f32::from_bits(SUBNORMAL)).to_bits().wrapping_sub(SUBNORMAL);
        let odd = bits >> 13 & 1;
        let normal = bits.wrapping_sub((127 - 15) << 23).wrapping_add(0xfff + odd) >> 13;
        let half = if bits < 113 << 23 { subnormal } else { normal };
        let half = if bits >= (127 + 16) << 23 { infinite } else { half };
        f16::from_bits((half | sign >> 16) as u16)
    }
}

/// Runs `$body` with `$T` the Rust type of `$dtype`, any of the eight.
#[macro_export]
macro_rules! for_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::BF16 => {
                type $T = $crate::dtype::Bf16;
                $body
            }
            $crate::DType::F16 => {
                type $T = $crate::dtype::F16;
                $body
            }
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            $crate::DType::I64 => {
                type $T = i64;
                $body
            }
            $crate::DType::I32 => {
                type $T = i32;
                $body
            }
            $crate::DType::U8 => {
                type $T = u8;
                $body
            }
            $crate::DType::Bool => {
                type $T = bool;
                $body
            }
        }
    };
}

/// [`for_dtype!`] over the float types; the others are an error of `$op`.
#[macro_export]
macro_rules! for_float {
    ($dtype:expr, $op:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::BF16 => {
                type $T = $crate::dtype::Bf16;
                $body
            }
            $crate::DType::F16 => {
                type $T = $crate::dtype::F16;
                $body
            }
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            other => $crate::bail!($op, "needs a float tensor (f32, bf16, f16, f64), got {other}"),
        }
    };
}

/// [`for_float!`] with `$T` the type in which `$dtype` is computed: f32 for the half types.
#[macro_export]
macro_rules! for_computed {
    ($dtype:expr, $op:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 | $crate::DType::BF16 | $crate::DType::F16 => {
                type $T = f32;
                $body
            }
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            other => $crate::bail!($op, "needs a float tensor (f32, bf16, f16, f64), got {other}"),
        }
    };
}

/// [`for_dtype!`] over one type of each size, for code that only moves elements: see `Tensor::moved`.
#[macro_export]
macro_rules! for_size {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype.size() {
            1 => {
                type $T = u8;
                $body
            }
            2 => {
                type $T = $crate::dtype::Bf16;
                $body
            }
            4 => {
                type $T = f32;
                $body
            }
            _ => {
                type $T = i64;
                $body
            }
        }
    };
}

/// [`for_dtype!`] over f32 and f64; the others are an error of `$op`. For code that half types reach by way of
/// `Tensor::in_f32`.
#[macro_export]
macro_rules! for_real {
    ($dtype:expr, $op:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::DType::F64 => {
                type $T = f64;
                $body
            }
            other => $crate::bail!($op, "needs an f32 or f64 tensor, got {other}"),
        }
    };
}

/// `half::bf16`, under a name that macros can use.
pub type Bf16 = bf16;
/// `half::f16`, under a name that macros can use.
pub type F16 = f16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_conversions_agree_with_the_half_crate() {
        for bits in 0..=u16::MAX {
            let (b, h) = (bf16::from_bits(bits), f16::from_bits(bits));
            assert!(b.acc().to_bits() == b.to_f32().to_bits() || b.is_nan() && b.acc().is_nan());
            assert!(h.acc().to_bits() == h.to_f32().to_bits() || h.is_nan() && h.acc().is_nan());
        }
        // every exponent, with all roundings of the mantissa
        for high in 0..=0xffff_u32 {
            for low in [0, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let x = f32::from_bits(high << 16 | low);
                let (b, h) = (bf16::store(x), f16::store(x));
                assert!(b == bf16::from_f32(x) || x.is_nan() && b.is_nan(), "bf16 {x:e}");
                assert!(
                    h == f16::from_f32(x) || x.is_nan() && h.is_nan(),
                    "f16 {x:e}: {h} {}",
                    f16::from_f32(x)
                );
            }
        }
    }
}
