//! The tensor: a strided view of storage, with its dtype, its device, and its place in the graph.

use crate::{
    DType, Device, Error, Result,
    autograd::Edge,
    cpu::pool::{Buffer, CpuVec},
    dtype::Element,
    shape::{Dims, IntoShape, Strides, contiguous_strides, count, is_contiguous},
    storage::Storage,
};
use std::sync::Arc;

/// An n-dimensional array. Cloning shares it; values never change once a tensor exists (a [`Param`] replaces
/// its tensor), so views, clones and saved tensors stay what they were.
///
/// [`Param`]: crate::nn::Param
#[derive(Clone)]
pub struct Tensor(Arc<Inner>);

struct Inner {
    storage: Arc<Storage>,
    shape: Dims,
    strides: Strides,
    offset: usize,
    dtype: DType,
    edge: Option<Edge>,
    op: &'static str,
}

impl Tensor {
    // ---- construction ----------------------------------------------------------------------------------

    /// A contiguous CPU tensor that takes over `values`. `op` names its maker in `Debug`.
    pub(crate) fn from_cpu<T: Element>(values: CpuVec<T>, shape: impl IntoShape, op: &'static str) -> Tensor {
        let shape = shape.into_shape();
        let strides = contiguous_strides(&shape);
        Self::from_cpu_strided(values, shape, strides, op)
    }

    /// A CPU tensor over `values` with the given dense strides.
    pub(crate) fn from_cpu_strided<T: Element>(
        values: CpuVec<T>,
        shape: Dims,
        strides: Strides,
        op: &'static str,
    ) -> Tensor {
        Self::from_buffer(values.into_buffer(), T::DTYPE, shape, strides, op)
    }

    /// The same for elements of a type that is only known as a value.
    pub(crate) fn from_buffer(
        values: Buffer,
        dtype: DType,
        shape: Dims,
        strides: Strides,
        op: &'static str,
    ) -> Tensor {
        debug_assert_eq!(values.bytes(), count(&shape) * dtype.size());
        let storage = Arc::new(Storage::Cpu(values));
        Tensor(Arc::new(Inner { storage, shape, strides, offset: 0, dtype, edge: None, op }))
    }

    /// A tensor over storage that holds it densely with these strides.
    #[cfg(gpu)]
    pub(crate) fn from_storage(
        storage: Storage,
        shape: Dims,
        strides: Strides,
        dtype: DType,
        op: &'static str,
    ) -> Tensor {
        Tensor(Arc::new(Inner {
            storage: Arc::new(storage),
            shape,
            strides,
            offset: 0,
            dtype,
            edge: None,
            op,
        }))
    }

    /// Another view of the same storage, untracked. The caller vouches that it stays within the storage.
    pub(crate) fn view_as(&self, shape: Dims, strides: Strides, offset: usize, op: &'static str) -> Tensor {
        let storage = self.0.storage.clone();
        Tensor(Arc::new(Inner { storage, shape, strides, offset, dtype: self.0.dtype, edge: None, op }))
    }

    /// The same memory as elements of another dtype of the same size, untracked.
    pub(crate) fn seen_as(&self, dtype: DType) -> Tensor {
        debug_assert_eq!(self.dtype().size(), dtype.size());
        Tensor(Arc::new(Inner {
            storage: self.0.storage.clone(),
            shape: self.0.shape.clone(),
            strides: self.0.strides.clone(),
            offset: self.0.offset,
            dtype,
            edge: None,
            op: self.0.op,
        }))
    }

    /// The same values with another place in the graph.
    pub(crate) fn with_edge(&self, edge: Option<Edge>) -> Tensor {
        Tensor(Arc::new(Inner {
            storage: self.0.storage.clone(),
            shape: self.0.shape.clone(),
            strides: self.0.strides.clone(),
            offset: self.0.offset,
            dtype: self.0.dtype,
            edge,
            op: self.0.op,
        }))
    }

    pub(crate) fn edge(&self) -> Option<&Edge> {
        self.0.edge.as_ref()
    }

    // ---- what it is ------------------------------------------------------------------------------------

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    /// Sizes as an array: `let [b, s, d] = x.dims("attention")?`.
    ///
    /// # Errors
    /// If the tensor has another rank; `op` is named in the message.
    #[track_caller]
    pub fn dims<const N: usize>(&self, op: &'static str) -> Result<[usize; N]> {
        self.shape()
            .try_into()
            .map_err(|_| Error::op(op, format!("needs a tensor of rank {N}, got shape {:?}", self.shape())))
    }

    /// Size of one dimension.
    ///
    /// # Errors
    /// If there is no such dimension.
    #[track_caller]
    pub fn dim(&self, dim: impl crate::Dim) -> Result<usize> {
        let d = dim.of("dim", self)?;
        Ok(self.shape().get(d).copied().unwrap_or(1))
    }

    /// Steps in elements, one a dimension.
    pub fn strides(&self) -> &[isize] {
        &self.0.strides
    }

    /// Number of dimensions.
    pub fn rank(&self) -> usize {
        self.0.shape.len()
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        count(&self.0.shape)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Where it lives.
    pub fn device(&self) -> Device {
        self.0.storage.device()
    }

    /// Name of the operation that made it.
    pub fn op(&self) -> &'static str {
        self.0.op
    }

    /// Position of element (0, .., 0) in the storage.
    pub(crate) fn offset(&self) -> usize {
        self.0.offset
    }

    /// Are the elements in row-major order without gaps?
    pub fn is_contiguous(&self) -> bool {
        is_contiguous(&self.0.shape, &self.0.strides)
    }

    /// Is a gradient tracked for it?
    pub fn tracked(&self) -> bool {
        self.0.edge.is_some()
    }

    /// Does nobody else see this tensor's storage? Then its buffer may be reused.
    pub(crate) fn is_unique(&mut self) -> bool {
        Arc::get_mut(&mut self.0).is_some_and(|inner| Arc::get_mut(&mut inner.storage).is_some())
    }

    /// What stands behind it.
    #[cfg(any(gpu, test))]
    pub(crate) fn storage(&self) -> &Storage {
        &self.0.storage
    }

    // ---- GPU memory ------------------------------------------------------------------------------------

    /// Address of element (0, .., 0) on the tensor's GPU; null for a tensor on the CPU.
    #[cfg(gpu)]
    pub(crate) fn gpu_ptr(&self) -> *mut u8 {
        match self.storage() {
            Storage::Cpu(_) => std::ptr::null_mut(),
            Storage::Cuda(buffer) => unsafe { buffer.ptr().add(self.0.offset * self.0.dtype.size()) },
        }
    }

    /// Will a kernel write over this tensor? True if it is contiguous, on a GPU, and nobody else sees its
    /// storage; a copy on the host is dropped then.
    #[cfg(gpu)]
    pub(crate) fn gpu_writable(&mut self) -> bool {
        let contiguous = self.is_contiguous();
        let Some(inner) = Arc::get_mut(&mut self.0) else { return false };
        match Arc::get_mut(&mut inner.storage) {
            Some(Storage::Cuda(buffer)) if contiguous => {
                buffer.forget_mirror();
                true
            }
            _ => false,
        }
    }

    // ---- CPU memory ------------------------------------------------------------------------------------

    /// Address of element (0, .., 0), of a copy if the tensor is on a GPU. The tensor must be of dtype `T`.
    #[track_caller]
    pub(crate) fn cpu_ptr<T: Element>(&self) -> *const T {
        assert_eq!(self.dtype(), T::DTYPE, "internal: {} read as {}", self.dtype(), T::DTYPE);
        self.cpu_bytes().cast()
    }

    /// The first element in host memory, of any dtype; of a copy if the tensor is on a GPU.
    pub(crate) fn cpu_bytes(&self) -> *const u8 {
        unsafe { self.0.storage.host().ptr().add(self.0.offset * self.dtype().size()) }
    }

    /// The elements of a contiguous tensor of dtype `T`, of a copy if it is on a GPU.
    #[track_caller]
    pub(crate) fn cpu_slice<T: Element>(&self) -> &[T] {
        assert!(self.is_contiguous(), "internal: a slice of a strided tensor {:?}", self.strides());
        unsafe { std::slice::from_raw_parts(self.cpu_ptr::<T>(), self.numel()) }
    }

    /// The elements for writing, if this tensor is on the CPU, contiguous and the only one that sees its storage.
    pub(crate) fn cpu_slice_mut<T: Element>(&mut self) -> Option<&mut [T]> {
        if self.device() != Device::Cpu || !self.is_contiguous() || !self.is_unique() {
            return None;
        }
        let (ptr, len) = (self.cpu_ptr::<T>().cast_mut(), self.numel());
        Some(unsafe { std::slice::from_raw_parts_mut(ptr, len) })
    }
}
