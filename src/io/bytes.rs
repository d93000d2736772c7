//! Tensors from little-endian bytes and back.

use crate::{
    DType, Tensor,
    cpu::{
        parallel::{SharedMut, for_ranges},
        pool::CpuVec,
    },
    dtype::Element,
    for_dtype,
    shape::IntoShape,
};

/// How numbers stand in a file: as one of our types, or as an integer that is widened to one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    Same(DType),
    I8,
    I16,
    U16,
    U32,
}

impl Kind {
    pub fn size(self) -> usize {
        match self {
            Kind::Same(dtype) => dtype.size(),
            Kind::I8 => 1,
            Kind::I16 | Kind::U16 => 2,
            Kind::U32 => 4,
        }
    }
}

/// A tensor of a copy of `bytes`, of which there are as many as `shape` needs.
pub(super) fn tensor(kind: Kind, bytes: &[u8], shape: impl IntoShape) -> Tensor {
    match kind {
        // any byte that is not 0 counts as true; a Rust bool may hold nothing but 0 and 1
        Kind::Same(DType::Bool) => widen(bytes, |[b]: [u8; 1]| b != 0, shape),
        Kind::Same(dtype) => for_dtype!(dtype, T => copy::<T>(bytes, shape)),
        Kind::I8 => widen(bytes, |b| i32::from(i8::from_le_bytes(b)), shape),
        Kind::I16 => widen(bytes, |b| i32::from(i16::from_le_bytes(b)), shape),
        Kind::U16 => widen(bytes, |b| i32::from(u16::from_le_bytes(b)), shape),
        Kind::U32 => widen(bytes, |b| i64::from(u32::from_le_bytes(b)), shape),
    }
}

fn copy<T: Element>(bytes: &[u8], shape: impl IntoShape) -> Tensor {
    let mut out = CpuVec::<T>::new(bytes.len() / size_of::<T>());
    let n = out.len() * size_of::<T>();
    let target = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u8>(), n) };
    let target = SharedMut::new(target);
    for_ranges(n, 1 << 20, |range| unsafe { target.slice(range.clone()).copy_from_slice(&bytes[range]) });
    Tensor::from_cpu(out, shape, "load")
}

fn widen<T: Element, const N: usize>(
    bytes: &[u8],
    f: impl Fn([u8; N]) -> T,
    shape: impl IntoShape,
) -> Tensor {
    let (numbers, _) = bytes.as_chunks::<N>();
    let mut out = CpuVec::<T>::new(numbers.len());
    out.iter_mut().zip(numbers).for_each(|(x, &b)| *x = f(b));
    Tensor::from_cpu(out, shape, "load")
}

/// The bytes of a contiguous tensor.
pub(super) fn of(tensor: &Tensor) -> &[u8] {
    for_dtype!(tensor.dtype(), T => {
        let elements = tensor.cpu_slice::<T>();
        unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements)) }
    })
}

#[cfg(target_endian = "big")]
compile_error!("files are little-endian and are copied as they are");
