//! Convolutions by cuDNN, through its per-operation interface: three calls are all that is wanted here, and each
//! algorithm says of itself whether it is deterministic.
//!
//! Of the algorithms only those count that form the sums as they are (implicit products): they are deterministic,
//! and accumulate in f32 as the crate demands. Winograd and FFT transform the operands first, which costs digits;
//! the other gradient algorithms add with atomics.

use super::{Gpu, Library, gpu};
use crate::{
    DType, Error, Result,
    gpu::{
        Buffer,
        driver::{Convolution, Image},
    },
    ops::conv::{Geometry, Kind},
};
use cudarc::cudnn::sys::{
    self as dnn, cudnnConvolutionBwdDataAlgo_t as Up, cudnnConvolutionBwdFilterAlgo_t as Weight,
    cudnnConvolutionFwdAlgo_t as Down, cudnnDataType_t as Type, cudnnMathType_t as Math,
    cudnnStatus_t as Status, cudnnTensorFormat_t as Format,
};
use std::{
    collections::HashMap,
    ffi::{CStr, c_void},
    ptr::null_mut,
    sync::PoisonError,
};

/// The most memory that an algorithm may ask for.
const WORKSPACE: usize = 1 << 30;
/// Plans that are kept; with more shapes than these the cache starts anew.
const MOST: usize = 4096;

/// All that a plan depends on.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    kind: u8,
    dtype: DType,
    allow_tf32: bool,
    sizes: [usize; 9],
    options: [usize; 7],
    strides: [[isize; 4]; 3],
}

impl Key {
    fn new(c: &Convolution) -> Key {
        let Geometry { options: o, batch, channels, x, y, kernel } = c.geometry;
        Key {
            kind: c.kind as u8,
            dtype: c.dtype,
            allow_tf32: c.allow_tf32 && c.dtype == DType::F32,
            sizes: [batch, channels[0], channels[1], x[0], x[1], y[0], y[1], kernel[0], kernel[1]],
            options: [
                o.stride[0],
                o.stride[1],
                o.padding[0],
                o.padding[1],
                o.dilation[0],
                o.dilation[1],
                o.groups,
            ],
            strides: [c.x.strides, c.y.strides, c.w.strides],
        }
    }
}

#[derive(Clone, Copy)]
enum Algorithm {
    Down(Down),
    Up(Up),
    Weight(Weight),
}

struct Plan {
    x: dnn::cudnnTensorDescriptor_t,
    y: dnn::cudnnTensorDescriptor_t,
    w: dnn::cudnnFilterDescriptor_t,
    convolution: dnn::cudnnConvolutionDescriptor_t,
    algorithm: Algorithm,
    workspace: usize,
}

// The library's descriptors belong to no thread; the plans are used under a lock.
unsafe impl Send for Plan {}

impl Drop for Plan {
    fn drop(&mut self) {
        unsafe {
            dnn::cudnnDestroyTensorDescriptor(self.x);
            dnn::cudnnDestroyTensorDescriptor(self.y);
            dnn::cudnnDestroyFilterDescriptor(self.w);
            dnn::cudnnDestroyConvolutionDescriptor(self.convolution);
        }
    }
}

/// A device's handle and plans. `None`: the library has no algorithm that will do.
#[derive(Default)]
pub(super) struct Plans {
    handle: usize,
    plans: HashMap<Key, Option<Plan>>,
}

fn check(op: &'static str, call: &str, status: Status) -> Result<()> {
    if status == Status::CUDNN_STATUS_SUCCESS {
        return Ok(());
    }
    let text = unsafe { CStr::from_ptr(dnn::cudnnGetErrorString(status)) }.to_string_lossy();
    Err(Error::op(op, format!("cuDNN: {call}: {text}")))
}

/// Runs the operation; `false` if the library has no algorithm for it, and nothing was done.
///
/// # Safety
/// The images lie in memory of device `index`, and what is written overlaps nothing else.
pub(crate) unsafe fn convolution(index: usize, c: &Convolution) -> Result<bool> {
    Library::Dnn.needed(c.op)?;
    let gpu = gpu(index)?;
    let mut plans = gpu.convolutions.lock().unwrap_or_else(PoisonError::into_inner);
    if plans.handle == 0 {
        let mut handle = null_mut();
        unsafe {
            check(c.op, "cudnnCreate", dnn::cudnnCreate(&mut handle))?;
            check(c.op, "cudnnSetStream", dnn::cudnnSetStream(handle, gpu.stream().cast()))?;
        }
        plans.handle = handle as usize;
    }
    if plans.plans.len() >= MOST {
        plans.plans.clear();
    }
    let handle = plans.handle as dnn::cudnnHandle_t;
    let key = Key::new(c);
    if !plans.plans.contains_key(&key) {
        plans.plans.insert(key.clone(), unsafe { plan(handle, c, key.allow_tf32) }?);
    }
    match plans.plans.get(&key) {
        Some(Some(plan)) => unsafe { run(gpu, handle, c, plan) }.map(|()| true),
        _ => Ok(false),
    }
}

/// Sizes and steps count as i32 in this interface.
fn small<const N: usize>(op: &'static str, values: [isize; N]) -> Result<[i32; N]> {
    if values.iter().any(|&v| i32::try_from(v).is_err()) {
        return Err(Error::op(op, format!("cuDNN counts to 2^31 - 1, got {values:?}")));
    }
    Ok(values.map(|v| v as i32))
}

unsafe fn describe(
    op: &'static str,
    descriptor: dnn::cudnnTensorDescriptor_t,
    element: Type,
    image: &Image,
) -> Result<()> {
    let [n, c, h, w] = small(op, image.shape.map(|n| n as isize))?;
    let [sn, sc, sh, sw] = small(op, image.strides)?;
    let status =
        unsafe { dnn::cudnnSetTensor4dDescriptorEx(descriptor, element, n, c, h, w, sn, sc, sh, sw) };
    check(op, "cudnnSetTensor4dDescriptorEx", status)
}

unsafe fn plan(handle: dnn::cudnnHandle_t, c: &Convolution, allow_tf32: bool) -> Result<Option<Plan>> {
    let op = c.op;
    let (element, compute, math) = match c.dtype {
        DType::F32 if allow_tf32 => {
            (Type::CUDNN_DATA_FLOAT, Type::CUDNN_DATA_FLOAT, Math::CUDNN_DEFAULT_MATH)
        }
        DType::F32 => (Type::CUDNN_DATA_FLOAT, Type::CUDNN_DATA_FLOAT, Math::CUDNN_FMA_MATH),
        DType::F64 => (Type::CUDNN_DATA_DOUBLE, Type::CUDNN_DATA_DOUBLE, Math::CUDNN_DEFAULT_MATH),
        DType::BF16 => (Type::CUDNN_DATA_BFLOAT16, Type::CUDNN_DATA_FLOAT, Math::CUDNN_TENSOR_OP_MATH),
        DType::F16 => (Type::CUDNN_DATA_HALF, Type::CUDNN_DATA_FLOAT, Math::CUDNN_TENSOR_OP_MATH),
        other => return Err(Error::op(op, format!("a convolution needs floats, got {other}"))),
    };
    let mut plan = Plan {
        x: null_mut(),
        y: null_mut(),
        w: null_mut(),
        convolution: null_mut(),
        algorithm: Algorithm::Down(Down::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM),
        workspace: 0,
    };
    unsafe {
        check(op, "descriptor", dnn::cudnnCreateTensorDescriptor(&mut plan.x))?;
        check(op, "descriptor", dnn::cudnnCreateTensorDescriptor(&mut plan.y))?;
        check(op, "descriptor", dnn::cudnnCreateFilterDescriptor(&mut plan.w))?;
        check(op, "descriptor", dnn::cudnnCreateConvolutionDescriptor(&mut plan.convolution))?;
        describe(op, plan.x, element, &c.x)?;
        describe(op, plan.y, element, &c.y)?;
        // the kernel lies as the images do
        let last = c.w.strides[1] == 1 && c.x.strides[1] == 1;
        let format = if last { Format::CUDNN_TENSOR_NHWC } else { Format::CUDNN_TENSOR_NCHW };
        let [k, per_group, kh, kw] = small(op, c.w.shape.map(|n| n as isize))?;
        let status = dnn::cudnnSetFilter4dDescriptor(plan.w, element, format, k, per_group, kh, kw);
        check(op, "cudnnSetFilter4dDescriptor", status)?;
        let o = &c.geometry.options;
        let [ph, pw, sh, sw, dh, dw, groups] = small(
            op,
            [o.padding[0], o.padding[1], o.stride[0], o.stride[1], o.dilation[0], o.dilation[1], o.groups]
                .map(|n| n as isize),
        )?;
        let mode = dnn::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
        let descriptor = plan.convolution;
        let status = dnn::cudnnSetConvolution2dDescriptor(descriptor, ph, pw, sh, sw, dh, dw, mode, compute);
        check(op, "cudnnSetConvolution2dDescriptor", status)?;
        check(op, "group count", dnn::cudnnSetConvolutionGroupCount(descriptor, groups))?;
        check(op, "math type", dnn::cudnnSetConvolutionMathType(descriptor, math))?;
        let Some((algorithm, chosen)) = search(handle, c, &plan)? else { return Ok(None) };
        // FMA stays FMA: true f32
        let math = if math == Math::CUDNN_FMA_MATH { math } else { chosen };
        check(op, "math type", dnn::cudnnSetConvolutionMathType(descriptor, math))?;
        plan.algorithm = algorithm;
        let Some(bytes) = workspace(handle, &plan) else { return Ok(None) };
        plan.workspace = bytes;
    }
    Ok(Some(plan))
}

/// The library's list of algorithms, best first, and of that the first that will do.
macro_rules! first {
    ($op:expr, $type:ident, $wrap:expr, $allowed:expr, |$found:ident, $count:ident| $call:expr) => {{
        let mut $found: [dnn::$type; 8] = std::mem::zeroed();
        let mut $count = 0;
        let status = $call;
        if status == Status::CUDNN_STATUS_NOT_SUPPORTED {
            return Ok(None);
        }
        check($op, "choice of an algorithm", status)?;
        let fits = |f: &&dnn::$type| {
            f.status == Status::CUDNN_STATUS_SUCCESS
                && f.determinism == dnn::cudnnDeterminism_t::CUDNN_DETERMINISTIC
                && f.memory <= WORKSPACE
                && $allowed.contains(&f.algo)
        };
        $found[..$count as usize].iter().find(fits).map(|f| ($wrap(f.algo), f.mathType))
    }};
}

unsafe fn search(handle: dnn::cudnnHandle_t, c: &Convolution, p: &Plan) -> Result<Option<(Algorithm, Math)>> {
    unsafe {
        let found = match c.kind {
            Kind::Down => first!(
                c.op,
                cudnnConvolutionFwdAlgoPerf_t,
                Algorithm::Down,
                [
                    Down::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM,
                    Down::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM,
                    Down::CUDNN_CONVOLUTION_FWD_ALGO_GEMM,
                ],
                |found, count| dnn::cudnnGetConvolutionForwardAlgorithm_v7(
                    handle,
                    p.x,
                    p.w,
                    p.convolution,
                    p.y,
                    8,
                    &mut count,
                    found.as_mut_ptr(),
                )
            ),
            Kind::Up => first!(
                c.op,
                cudnnConvolutionBwdDataAlgoPerf_t,
                Algorithm::Up,
                [Up::CUDNN_CONVOLUTION_BWD_DATA_ALGO_1],
                |found, count| dnn::cudnnGetConvolutionBackwardDataAlgorithm_v7(
                    handle,
                    p.w,
                    p.y,
                    p.convolution,
                    p.x,
                    8,
                    &mut count,
                    found.as_mut_ptr(),
                )
            ),
            Kind::Weight => first!(
                c.op,
                cudnnConvolutionBwdFilterAlgoPerf_t,
                Algorithm::Weight,
                [Weight::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1],
                |found, count| dnn::cudnnGetConvolutionBackwardFilterAlgorithm_v7(
                    handle,
                    p.x,
                    p.y,
                    p.convolution,
                    p.w,
                    8,
                    &mut count,
                    found.as_mut_ptr(),
                )
            ),
        };
        Ok(found)
    }
}

/// The list's figure is for its own math type, so the size is asked for once more.
unsafe fn workspace(handle: dnn::cudnnHandle_t, p: &Plan) -> Option<usize> {
    let (mut bytes, conv) = (0, p.convolution);
    let status = unsafe {
        match p.algorithm {
            Algorithm::Down(a) => {
                dnn::cudnnGetConvolutionForwardWorkspaceSize(handle, p.x, p.w, conv, p.y, a, &mut bytes)
            }
            Algorithm::Up(a) => {
                dnn::cudnnGetConvolutionBackwardDataWorkspaceSize(handle, p.w, p.y, conv, p.x, a, &mut bytes)
            }
            Algorithm::Weight(a) => dnn::cudnnGetConvolutionBackwardFilterWorkspaceSize(
                handle, p.x, p.y, conv, p.w, a, &mut bytes,
            ),
        }
    };
    (status == Status::CUDNN_STATUS_SUCCESS && bytes <= WORKSPACE).then_some(bytes)
}

unsafe fn run(gpu: &Gpu, handle: dnn::cudnnHandle_t, c: &Convolution, p: &Plan) -> Result<()> {
    // The stream makes it safe to give the workspace back while the convolution still runs.
    let memory = if p.workspace > 0 { Some(Buffer::new(gpu.index, p.workspace)?) } else { None };
    let scratch: *mut c_void = memory.as_ref().map_or(null_mut(), |m| m.ptr().cast());
    let (f32s, f64s) = ([0f32, 1.0], [0f64, 1.0]);
    let scale = |i: usize| -> *const c_void {
        if c.dtype == DType::F64 { (&raw const f64s[i]).cast() } else { (&raw const f32s[i]).cast() }
    };
    let (zero, one) = (scale(0), scale(1));
    let (x, y, w) = (c.x.ptr.cast::<c_void>(), c.y.ptr.cast::<c_void>(), c.w.ptr.cast::<c_void>());
    let (conv, bytes) = (p.convolution, p.workspace);
    unsafe {
        let status = match p.algorithm {
            Algorithm::Down(a) => dnn::cudnnConvolutionForward(
                handle, one, p.x, x, p.w, w, conv, a, scratch, bytes, zero, p.y, y,
            ),
            Algorithm::Up(a) => dnn::cudnnConvolutionBackwardData(
                handle, one, p.w, w, p.y, y, conv, a, scratch, bytes, zero, p.x, x,
            ),
            Algorithm::Weight(a) => dnn::cudnnConvolutionBackwardFilter(
                handle, one, p.x, x, p.y, y, conv, a, scratch, bytes, zero, p.w, w,
            ),
        };
        check(c.op, "convolution", status)
    }
}
