//! Shapes, strides, broadcasting, and how users name dimensions.

use crate::{Error, Result, Tensor};
use smallvec::SmallVec;

/// Sizes, outermost first.
pub type Dims = SmallVec<[usize; 6]>;
/// Steps in elements; 0 along a broadcast dimension, negative along a flipped one.
pub type Strides = SmallVec<[isize; 6]>;

/// Anything that names a shape: `[2, 3]`, `&[2, 3][..]`, `vec![2, 3]`, `5`, `()`.
pub trait IntoShape {
    /// The sizes.
    fn into_shape(self) -> Dims;
}
impl<const N: usize> IntoShape for [usize; N] {
    fn into_shape(self) -> Dims {
        Dims::from_slice(&self)
    }
}
impl<const N: usize> IntoShape for &[usize; N] {
    fn into_shape(self) -> Dims {
        Dims::from_slice(self)
    }
}
impl IntoShape for &[usize] {
    fn into_shape(self) -> Dims {
        Dims::from_slice(self)
    }
}
impl IntoShape for Vec<usize> {
    fn into_shape(self) -> Dims {
        Dims::from_vec(self)
    }
}
impl IntoShape for &Vec<usize> {
    fn into_shape(self) -> Dims {
        Dims::from_slice(self)
    }
}
impl IntoShape for Dims {
    fn into_shape(self) -> Dims {
        self
    }
}
impl IntoShape for &Dims {
    fn into_shape(self) -> Dims {
        self.clone()
    }
}
impl IntoShape for usize {
    fn into_shape(self) -> Dims {
        Dims::from_slice(&[self])
    }
}
impl IntoShape for () {
    fn into_shape(self) -> Dims {
        Dims::new()
    }
}

/// Number of elements of a shape.
pub fn count(shape: &[usize]) -> usize {
    shape.iter().product()
}

/// Number of elements, refused where the bytes would not fit the address space.
pub(crate) fn checked_count(op: &'static str, shape: &[usize], size: usize) -> Result<usize> {
    let bytes = shape.iter().try_fold(size, |n, &d| n.checked_mul(d)).filter(|&n| n <= isize::MAX as usize);
    match bytes {
        Some(bytes) => Ok(bytes / size),
        None if shape.contains(&0) => Ok(0),
        None => Err(Error::op(op, format!("a tensor of shape {shape:?} is larger than the address space"))),
    }
}

/// Row-major strides of a shape.
pub fn contiguous_strides(shape: &[usize]) -> Strides {
    let mut strides: Strides = SmallVec::from_elem(1, shape.len());
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i].max(1) as isize;
    }
    strides
}

/// Are the elements in row-major order without gaps? Strides of size-1 dimensions do not matter.
pub fn is_contiguous(shape: &[usize], strides: &[isize]) -> bool {
    let mut expected = 1;
    for (&n, &s) in shape.iter().zip(strides).rev() {
        if n != 1 && s != expected && !shape.contains(&0) {
            return false;
        }
        expected *= n.max(1) as isize;
    }
    true
}

/// The shape that two shapes broadcast to: aligned at the right, sizes equal or 1.
#[track_caller]
pub fn broadcast(op: &'static str, a: &[usize], b: &[usize]) -> Result<Dims> {
    let rank = a.len().max(b.len());
    let size = |s: &[usize], i: usize| if i + s.len() < rank { 1 } else { s[i + s.len() - rank] };
    let mut shape = Dims::with_capacity(rank);
    for i in 0..rank {
        shape.push(match (size(a, i), size(b, i)) {
            (x, y) if x == y => x,
            (1, y) => y,
            (x, 1) => x,
            _ => return Err(Error::op(op, format!("shapes {a:?} and {b:?} do not broadcast"))),
        });
    }
    Ok(shape)
}

/// Strides of a tensor seen in the broadcast `shape`: 0 where it repeats.
pub(crate) fn broadcast_strides(from: &[usize], strides: &[isize], shape: &[usize]) -> Strides {
    let lead = shape.len() - from.len();
    (0..shape.len())
        .map(|i| if i < lead || (from[i - lead] == 1 && shape[i] != 1) { 0 } else { strides[i - lead] })
        .collect()
}

/// A dimension as users name it: negative numbers count from the end.
pub trait Dim: Copy {
    /// The index, checked against the tensor's rank.
    ///
    /// # Errors
    /// If there is no such dimension.
    fn of(self, op: &'static str, tensor: &Tensor) -> Result<usize>;
    /// As [`of`](Self::of), for a plain rank.
    ///
    /// # Errors
    /// If there is no such dimension.
    fn index(self, op: &'static str, rank: usize) -> Result<usize>;
}
macro_rules! dim {
    ($($t:ty),+) => {$(
        impl Dim for $t {
            #[track_caller]
            fn of(self, op: &'static str, tensor: &Tensor) -> Result<usize> {
                self.index(op, tensor.rank())
            }
            #[track_caller]
            fn index(self, op: &'static str, rank: usize) -> Result<usize> {
                let d = self as i64;
                let i = if d < 0 { d + rank.max(1) as i64 } else { d };
                // PyTorch lets -1 and 0 name the one position of a scalar.
                if (0..rank.max(1) as i64).contains(&i) {
                    Ok(i as usize)
                } else {
                    Err(Error::op(op, format!("dimension {d} is out of range for a tensor of rank {rank}")))
                }
            }
        }
    )+};
}
dim!(usize, i32, i64, isize);

/// Several dimensions: `1`, `-1`, `[0, 2]`, `&[0, 2][..]`, or `()` for all.
pub trait DimList {
    /// Sorted indices, checked and without repetition.
    ///
    /// # Errors
    /// If a dimension does not exist or is named twice.
    fn of(self, op: &'static str, tensor: &Tensor) -> Result<Dims>;
}
#[track_caller]
fn dim_list<D: Dim>(op: &'static str, dims: &[D], tensor: &Tensor) -> Result<Dims> {
    let mut list = Dims::new();
    for d in dims {
        let d = d.of(op, tensor)?;
        if list.contains(&d) {
            return Err(Error::op(op, format!("dimension {d} is named twice")));
        }
        list.push(d);
    }
    list.sort();
    if tensor.rank() == 0 {
        list.clear();
    }
    Ok(list)
}
macro_rules! dim_lists {
    ($($t:ty),+) => {$(
        impl DimList for $t {
            #[track_caller]
            fn of(self, op: &'static str, tensor: &Tensor) -> Result<Dims> { dim_list(op, &[self], tensor) }
        }
        impl<const N: usize> DimList for [$t; N] {
            #[track_caller]
            fn of(self, op: &'static str, tensor: &Tensor) -> Result<Dims> { dim_list(op, &self, tensor) }
        }
        impl DimList for &[$t] {
            #[track_caller]
            fn of(self, op: &'static str, tensor: &Tensor) -> Result<Dims> { dim_list(op, self, tensor) }
        }
    )+};
}
dim_lists!(usize, i32, i64, isize);
impl DimList for () {
    fn of(self, _: &'static str, tensor: &Tensor) -> Result<Dims> {
        Ok((0..tensor.rank()).collect())
    }
}
impl DimList for &Dims {
    #[track_caller]
    fn of(self, op: &'static str, tensor: &Tensor) -> Result<Dims> {
        dim_list(op, self, tensor)
    }
}
