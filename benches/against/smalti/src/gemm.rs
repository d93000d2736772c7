//! The `gemm` crate alone, with its AVX-512 kernels: the ceiling for matrix products.

#[path = "../../worker.rs"]
mod worker;

use gemm::Parallelism;
use std::{cell::RefCell, rc::Rc};
use worker::{Outputs, Result, Variant, fill, mean_square, serve, sizes, variant};

fn matmul(m: usize, k: usize, n: usize) -> Vec<Variant> {
    let (a, b) = (fill(m * k, 1, 1.0, 0.0), fill(k * n, 2, 1.0, 0.0));
    let c = Rc::new(RefCell::new(vec![0f32; m * n]));
    let run = move || {
        let mut out = c.borrow_mut();
        // SAFETY: row-major matrices of m×k, k×n and m×n elements, as the strides say; `out` is ours alone.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out.as_mut_ptr(),
                1,
                n as isize,
                false,
                a.as_ptr(),
                1,
                k as isize,
                b.as_ptr(),
                1,
                n as isize,
                0.0,
                1.0,
                false,
                false,
                false,
                Parallelism::Rayon(0),
            );
        }
        let c = c.clone();
        Ok(Box::new(move || Ok(vec![mean_square(&c.borrow())])) as Outputs)
    };
    vec![variant("into kept memory", run)]
}

fn main() -> Result<()> {
    serve("gemm", "0.19.0 x86-v4", |name| {
        let Ok([m, k, n]) = sizes(name) else { return Ok(None) };
        Ok(name.starts_with("matmul/").then(|| matmul(m, k, n)))
    })
}
