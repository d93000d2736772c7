//! What every Rust worker shares: the line protocol of README.md and the numbers all workers compute on.
//! Included with `#[path]`: each peer is a package of its own, so that none meets another's feature flags.
#![allow(dead_code)] // a worker takes the part that it needs

use serde_json::{Value, json};
use std::io::{BufRead, Write};
use std::time::Instant;

pub type Error = Box<dyn std::error::Error>;
pub type Result<T> = std::result::Result<T, Error>;

/// What one run returned: called once, outside the timing, for the mean square of each tensor; else dropped.
pub type Outputs = Box<dyn FnOnce() -> Result<Vec<f64>>>;

/// One way to do a case's work. `run` does it once, everything included that a user would wait for.
pub struct Variant {
    name: &'static str,
    run: Box<dyn FnMut() -> Result<Outputs>>,
}

pub fn variant(name: &'static str, run: impl FnMut() -> Result<Outputs> + 'static) -> Variant {
    Variant { name, run: Box::new(run) }
}

/// The same numbers in every worker: a hash of (index, seed), uniform in mean ± scale.
pub fn fill(len: usize, seed: u32, scale: f64, mean: f64) -> Vec<f32> {
    let number = |i: usize| {
        let mut x = (i as u32).wrapping_add(seed.wrapping_mul(0x9E37_79B9));
        x = (x ^ (x >> 16)).wrapping_mul(0x7FEB_352D);
        x = (x ^ (x >> 15)).wrapping_mul(0x846C_A68B);
        x ^= x >> 16;
        ((f64::from(x >> 8) / f64::from(1 << 23) - 1.0) * scale + mean) as f32
    };
    (0..len).map(number).collect()
}

pub fn mean_square(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>() / values.len() as f64
}

/// The numbers of a case name after its slash: `matmul/1024x768x3072` gives `[1024, 768, 3072]`.
pub fn sizes<const N: usize>(case: &str) -> Result<[usize; N]> {
    let (_, sizes) = case.split_once('/').ok_or_else(|| format!("{case}: no sizes"))?;
    let sizes = sizes.split('x').map(str::parse).collect::<std::result::Result<Vec<usize>, _>>()?;
    sizes.try_into().map_err(|_| format!("{case}: {N} sizes expected").into())
}

/// The shapes of the models, once for all workers. Linear weights are given as [out, in].
pub mod shapes {
    /// (shape, scale, mean) of a parameter, for `fill`.
    pub type Parameter = (Vec<usize>, f64, f64);

    pub const BATCH: usize = 8;
    pub const SIDE: usize = 224;
    pub const PATCH: usize = 16;
    pub const PATCHES: usize = 196;
    pub const KEEP: usize = 49;
    pub const PIXELS: usize = 3 * PATCH * PATCH;
    /// (width, depth, heads)
    pub const ENCODER: (usize, usize, usize) = (768, 12, 12);
    pub const DECODER: (usize, usize, usize) = (512, 8, 16);

    pub fn linear(out: usize, inp: usize) -> [Parameter; 2] {
        [(vec![out, inp], (6.0 / (out + inp) as f64).sqrt(), 0.0), (vec![out], 0.02, 0.0)]
    }

    pub fn norm(width: usize) -> [Parameter; 2] {
        [(vec![width], 0.1, 1.0), (vec![width], 0.1, 0.0)]
    }

    /// norm1, qkv, proj, norm2, fc1, fc2, each weight and bias.
    pub fn block(c: usize) -> Vec<Parameter> {
        [norm(c), linear(3 * c, c), linear(c, c), norm(c), linear(4 * c, c), linear(c, 4 * c)].concat()
    }

    /// All trained parameters of MAE ViT-B/16 in the order of the official checkpoint.
    pub fn mae() -> Vec<Parameter> {
        let ((w, depth, _), (dw, d_depth, _)) = (ENCODER, DECODER);
        let mut all = vec![(vec![1, 1, w], 0.03, 0.0), (vec![1, 1, dw], 0.03, 0.0)];
        all.extend(linear(w, PIXELS));
        (0..depth).for_each(|_| all.extend(block(w)));
        all.extend(norm(w));
        all.extend(linear(dw, w));
        (0..d_depth).for_each(|_| all.extend(block(dw)));
        all.extend(norm(dw));
        all.extend(linear(PIXELS, dw));
        all
    }
}

fn timed(run: &mut Variant) -> Result<f64> {
    let start = Instant::now();
    drop((run.run)()?);
    Ok(start.elapsed().as_secs_f64())
}

/// Warms a variant up. Gives the seconds that one run takes, and its check: what the first two runs returned.
fn warm(run: &mut Variant) -> Result<Value> {
    let mut check = (run.run)()?()?;
    let start = Instant::now();
    let second = (run.run)()?;
    let mut seconds = start.elapsed().as_secs_f64();
    check.extend(second()?);
    if seconds < 0.5 {
        for _ in 0..3 {
            seconds = seconds.min(timed(run)?);
        }
    }
    Ok(json!({ "name": run.name, "seconds": seconds, "check": check }))
}

fn answer(
    line: &str,
    cases: impl Fn(&str) -> Result<Option<Vec<Variant>>>,
    current: &mut Vec<Variant>,
) -> Result<Value> {
    let request: Value = serde_json::from_str(line)?;
    if let Some(name) = request["case"].as_str() {
        current.clear();
        let Some(mut variants) = cases(name)? else { return Ok(json!({ "unsupported": "not written" })) };
        variants.retain(|v| request["variant"].as_str().is_none_or(|wanted| v.name == wanted));
        variants.retain(|v| request["like"].as_str().is_none_or(|part| v.name.contains(part)));
        let warmed: Vec<Value> = variants.iter_mut().map(warm).collect::<Result<_>>()?;
        *current = variants;
        return Ok(json!({ "variants": warmed }));
    }
    let (Some(run), Some(n)) = (request["run"].as_u64(), request["n"].as_u64()) else {
        return Err("a request has `case`, or `run` and `n`".into());
    };
    let variant = current.get_mut(run as usize).ok_or("no such variant")?;
    let times: Vec<f64> = (0..n).map(|_| timed(variant)).collect::<Result<_>>()?;
    Ok(json!({ "times": times }))
}

/// Answers requests until the driver closes the pipe. `cases` builds a case's variants; `None`: not written.
/// An error whose text starts with `unsupported:` says that the peer cannot do it, and why.
pub fn serve(peer: &str, version: &str, cases: impl Fn(&str) -> Result<Option<Vec<Variant>>>) -> Result<()> {
    let mut out = std::io::stdout();
    let threads = std::env::var("RAYON_NUM_THREADS").ok().and_then(|n| n.parse::<u64>().ok());
    writeln!(out, "{}", json!({ "peer": peer, "version": version, "threads": threads }))?;
    let mut current = Vec::new();
    for line in std::io::stdin().lock().lines() {
        let reply = answer(&line?, &cases, &mut current).unwrap_or_else(|e| {
            let text = e.to_string();
            let text = text.lines().next().unwrap_or_default();
            match text.strip_prefix("unsupported:") {
                Some(why) => json!({ "unsupported": why.trim() }),
                None => json!({ "error": text }),
            }
        });
        writeln!(out, "{reply}")?;
        out.flush()?;
    }
    Ok(())
}
