//! Products by cuBLASLt.
//!
//! The library is column-major: a row-major product y = a b is the column-major yᵀ = bᵀ aᵀ, so b is its first
//! operand, a its second, n its rows and m its columns. A bias over its rows is then one over our columns.
//!
//! Its GELU epilogues compute the tanh approximation. The crate's GELU is the exact one, so they are not used:
//! `linear_gelu` keeps the product (which its backward needs in any case) and a kernel adds the bias and takes the
//! GELU in one pass.

use super::{Gpu, Library, gpu};
use crate::{
    DType, Error, Result,
    gpu::{
        Buffer,
        driver::{Epilogue, Matrix, Product},
    },
};
use cudarc::cublaslt::sys::{
    self as lt, cublasComputeType_t as Compute, cublasLtEpilogue_t as LtEpilogue,
    cublasLtMatmulDescAttributes_t as Desc, cublasLtMatmulPreferenceAttributes_t as Preference,
    cublasLtMatrixLayoutAttribute_t as Layout, cublasStatus_t as Status, cudaDataType_t as Type,
};
use std::{
    collections::{HashMap, hash_map::Entry},
    ffi::{CStr, c_void},
    ptr::null_mut,
    sync::PoisonError,
};

/// The most memory that an algorithm may ask for; what NVIDIA recommends on Hopper.
const WORKSPACE: u64 = 32 << 20;
/// Plans that are kept; with more shapes than these the cache starts anew.
const MOST: usize = 4096;

/// All that a plan depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dtype: DType,
    allow_tf32: bool,
    size: [usize; 3],
    batch: usize,
    /// Of b, a and y: (transposed, leading dimension, step from matrix to matrix).
    layouts: [(bool, usize, isize); 3],
    epilogue: u32,
    /// Powers of two that divide the addresses of b, a, y and the bias.
    alignment: [u32; 4],
}

struct Plan {
    desc: lt::cublasLtMatmulDesc_t,
    layouts: [lt::cublasLtMatrixLayout_t; 3],
    algorithm: lt::cublasLtMatmulAlgo_t,
    workspace: usize,
}

// The library's descriptors belong to no thread; the plans are used under a lock.
unsafe impl Send for Plan {}

impl Drop for Plan {
    fn drop(&mut self) {
        unsafe {
            for layout in self.layouts.into_iter().filter(|l| !l.is_null()) {
                lt::cublasLtMatrixLayoutDestroy(layout);
            }
            if !self.desc.is_null() {
                lt::cublasLtMatmulDescDestroy(self.desc);
            }
        }
    }
}

/// A device's handle and plans. `None`: the library has no algorithm.
#[derive(Default)]
pub(super) struct Plans {
    handle: usize,
    plans: HashMap<Key, Option<Plan>>,
}

fn check(op: &'static str, call: &str, status: Status) -> Result<()> {
    if status == Status::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    let text = unsafe { CStr::from_ptr(lt::cublasLtGetStatusString(status)) }.to_string_lossy();
    Err(Error::op(op, format!("cuBLASLt: {call}: {text} ({status:?})")))
}

/// Runs the product; `false` if the library has no algorithm for it, and nothing was done.
///
/// # Safety
/// The matrices lie in memory of device `index`, and y overlaps nothing else.
pub(crate) unsafe fn product(index: usize, p: &Product) -> Result<bool> {
    Library::BlasLt.needed(p.op)?;
    let gpu = gpu(index)?;
    let mut plans = gpu.products.lock().unwrap_or_else(PoisonError::into_inner);
    if plans.handle == 0 {
        let mut handle = null_mut();
        check(p.op, "cublasLtCreate", unsafe { lt::cublasLtCreate(&mut handle) })?;
        plans.handle = handle as usize;
    }
    if plans.plans.len() >= MOST {
        plans.plans.clear();
    }
    let handle = plans.handle as lt::cublasLtHandle_t;
    let key = Key::new(p);
    let plan = match plans.plans.entry(key) {
        Entry::Occupied(found) => found.into_mut(),
        Entry::Vacant(place) => place.insert(unsafe { plan(handle, p, &key) }?),
    };
    match plan {
        Some(plan) => unsafe { run(gpu, handle, p, plan) }.map(|()| true),
        None => Ok(false),
    }
}

impl Key {
    fn new(p: &Product) -> Key {
        let [m, n, k] = p.size;
        let layout = |matrix: &Matrix, rows: usize, columns: usize| {
            let (by_columns, lead) = lead(matrix, rows, columns);
            (by_columns, lead, if p.batch > 1 { matrix.batch } else { 0 })
        };
        let (epilogue, vector) = match p.epilogue {
            Epilogue::None => (LtEpilogue::CUBLASLT_EPILOGUE_DEFAULT, 0),
            Epilogue::Bias(bias) => (LtEpilogue::CUBLASLT_EPILOGUE_BIAS, bias as usize),
            // over the library's second operand, which is a
            Epilogue::RowSums(sums) => (LtEpilogue::CUBLASLT_EPILOGUE_BGRADB, sums as usize),
        };
        let aligned = |address: usize| 1 << address.trailing_zeros().min(8);
        Key {
            dtype: p.dtype,
            allow_tf32: p.allow_tf32 && p.dtype == DType::F32,
            size: p.size,
            batch: p.batch,
            layouts: [layout(&p.b, k, n), layout(&p.a, m, k), layout(&p.y, m, n)],
            epilogue: epilogue as u32,
            alignment: [p.b.ptr as usize, p.a.ptr as usize, p.y.ptr as usize, vector].map(aligned),
        }
    }
}

/// Is the matrix stored column by column, and how far is it from one to the next (or from row to row)? The
/// operands were chosen so that one of the two holds.
fn lead(matrix: &Matrix, rows: usize, columns: usize) -> (bool, usize) {
    if matrix.column == 1 || columns == 1 && matrix.row >= 1 {
        (false, if rows == 1 { columns } else { matrix.row.unsigned_abs() })
    } else {
        (true, if columns == 1 { rows } else { matrix.column.unsigned_abs() })
    }
}

fn types(dtype: DType, allow_tf32: bool) -> Option<(Type, Compute, Type)> {
    let f32 = (Compute::CUBLAS_COMPUTE_32F, Type::CUDA_R_32F);
    Some(match dtype {
        DType::F32 if allow_tf32 => (Type::CUDA_R_32F, Compute::CUBLAS_COMPUTE_32F_FAST_TF32, f32.1),
        DType::F32 => (Type::CUDA_R_32F, f32.0, f32.1),
        DType::BF16 => (Type::CUDA_R_16BF, f32.0, f32.1),
        DType::F16 => (Type::CUDA_R_16F, f32.0, f32.1),
        DType::F64 => (Type::CUDA_R_64F, Compute::CUBLAS_COMPUTE_64F, Type::CUDA_R_64F),
        _ => return None,
    })
}

unsafe fn set_desc<T>(op: &'static str, desc: lt::cublasLtMatmulDesc_t, what: Desc, value: T) -> Result<()> {
    let value: *const T = &value;
    let status = unsafe { lt::cublasLtMatmulDescSetAttribute(desc, what, value.cast(), size_of::<T>()) };
    check(op, "cublasLtMatmulDescSetAttribute", status)
}

unsafe fn vector(p: &Product, desc: lt::cublasLtMatmulDesc_t) -> Result<()> {
    match p.epilogue {
        Epilogue::None => Ok(()),
        Epilogue::Bias(at) => unsafe { set_desc(p.op, desc, Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, at) },
        Epilogue::RowSums(at) => unsafe { set_desc(p.op, desc, Desc::CUBLASLT_MATMUL_DESC_BIAS_POINTER, at) },
    }
}

/// Describes the product and asks for the library's best algorithm. The answer depends on nothing but the key and
/// the GPU, and the algorithms left are deterministic, so results are the same from run to run.
unsafe fn plan(handle: lt::cublasLtHandle_t, p: &Product, key: &Key) -> Result<Option<Plan>> {
    let op = p.op;
    let Some((element, compute, scale)) = types(p.dtype, key.allow_tf32) else {
        return Err(Error::op(op, format!("a product needs floats, got {}", p.dtype)));
    };
    let [m, n, k] = p.size.map(|n| n as u64);
    let mut plan = Plan {
        desc: null_mut(),
        layouts: [null_mut(); 3],
        algorithm: lt::cublasLtMatmulAlgo_t { data: [0; 8] },
        workspace: 0,
    };
    unsafe {
        check(op, "cublasLtMatmulDescCreate", lt::cublasLtMatmulDescCreate(&mut plan.desc, compute, scale))?;
        let transposed = |(by_columns, ..): (bool, usize, isize)| i32::from(by_columns);
        set_desc(op, plan.desc, Desc::CUBLASLT_MATMUL_DESC_TRANSA, transposed(key.layouts[0]))?;
        set_desc(op, plan.desc, Desc::CUBLASLT_MATMUL_DESC_TRANSB, transposed(key.layouts[1]))?;
        set_desc(op, plan.desc, Desc::CUBLASLT_MATMUL_DESC_EPILOGUE, key.epilogue)?;
        vector(p, plan.desc)?;
        // (rows, columns) of the operands as the library sees them, transposed or not
        let seen = [[n, k], [k, m], [n, m]];
        for i in 0..3 {
            let (by_columns, lead, batch) = key.layouts[i];
            let [rows, columns] = if by_columns { [seen[i][1], seen[i][0]] } else { seen[i] };
            let layout = &mut plan.layouts[i];
            let status = lt::cublasLtMatrixLayoutCreate(layout, element, rows, columns, lead as i64);
            check(op, "cublasLtMatrixLayoutCreate", status)?;
            let set = |what, value: *const c_void, size| {
                let status = lt::cublasLtMatrixLayoutSetAttribute(*layout, what, value, size);
                check(op, "cublasLtMatrixLayoutSetAttribute", status)
            };
            let (count, step) = (p.batch as i32, batch as i64);
            set(Layout::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (&raw const count).cast(), 4)?;
            set(Layout::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (&raw const step).cast(), 8)?;
        }
        let found = search(handle, op, &plan, key)?;
        let Some(found) = found else { return Ok(None) };
        (plan.algorithm, plan.workspace) = (found.algo, found.workspaceSize);
    }
    Ok(Some(plan))
}

unsafe fn search(
    handle: lt::cublasLtHandle_t,
    op: &'static str,
    plan: &Plan,
    key: &Key,
) -> Result<Option<lt::cublasLtMatmulHeuristicResult_t>> {
    unsafe {
        let mut preference = null_mut();
        check(op, "cublasLtMatmulPreferenceCreate", lt::cublasLtMatmulPreferenceCreate(&mut preference))?;
        let set = |what, value: *const c_void, size| {
            let status = lt::cublasLtMatmulPreferenceSetAttribute(preference, what, value, size);
            check(op, "cublasLtMatmulPreferenceSetAttribute", status)
        };
        // Parts of a split sum meet in f32, in a fixed order: not in the output, where they would be rounded.
        let scheme = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
        let bytes = WORKSPACE;
        let mut wanted =
            set(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const bytes).cast(), 8).and_then(
                |()| {
                    set(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const scheme).cast(), 4)
                },
            );
        let places = [
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, 0),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, 1),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, 2),
            (Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, 2),
        ];
        for (what, i) in places {
            wanted = wanted.and_then(|()| set(what, (&raw const key.alignment[i]).cast(), 4));
        }
        let mut found: lt::cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
        let mut count = 0;
        let [first, second, y] = plan.layouts;
        let status = match wanted {
            Ok(()) => lt::cublasLtMatmulAlgoGetHeuristic(
                handle, plan.desc, first, second, y, y, preference, 1, &mut found, &mut count,
            ),
            Err(_) => Status::CUBLAS_STATUS_SUCCESS,
        };
        lt::cublasLtMatmulPreferenceDestroy(preference);
        wanted?;
        match status {
            Status::CUBLAS_STATUS_NOT_SUPPORTED | Status::CUBLAS_STATUS_INVALID_VALUE => Ok(None),
            _ => {
                check(op, "cublasLtMatmulAlgoGetHeuristic", status)?;
                Ok((count > 0 && found.state == Status::CUBLAS_STATUS_SUCCESS).then_some(found))
            }
        }
    }
}

unsafe fn run(gpu: &Gpu, handle: lt::cublasLtHandle_t, p: &Product, plan: &Plan) -> Result<()> {
    // The stream makes it safe to give the workspace back while the product still runs.
    let workspace = if plan.workspace > 0 { Some(Buffer::new(gpu.index, plan.workspace)?) } else { None };
    let scratch = workspace.as_ref().map_or(null_mut(), |w| w.ptr().cast());
    let (one, zero) = ((1f32, 1f64), (0f32, 0f64));
    let pick = |value: &(f32, f64)| -> *const c_void {
        if p.dtype == DType::F64 { (&raw const value.1).cast() } else { (&raw const value.0).cast() }
    };
    let [first, second, y] = plan.layouts;
    unsafe {
        vector(p, plan.desc)?;
        let status = lt::cublasLtMatmul(
            handle,
            plan.desc,
            pick(&one),
            p.b.ptr.cast(),
            first,
            p.a.ptr.cast(),
            second,
            pick(&zero),
            p.y.ptr.cast(),
            y,
            p.y.ptr.cast(),
            y,
            &plan.algorithm,
            scratch,
            plan.workspace,
            gpu.stream().cast(),
        );
        check(p.op, "cublasLtMatmul", status)
    }
}
