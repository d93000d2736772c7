//! smalti's side of the comparison on a GPU: times the works that `benches/against/gpu_torch.py --shapes` lists, in the
//! same lines of JSON. `scripts/gpu.sh` runs both and makes one table.
//!
//! ```sh
//! python3 benches/against/gpu_torch.py --shapes > shapes.jsonl
//! cargo bench -p smalti-models --features cuda --bench gpu -- --shapes shapes.jsonl --out smalti.jsonl
//! ```

#[cfg(any(feature = "cuda", feature = "emulate"))]
mod measure;
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod run;
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod steps;
#[cfg(any(feature = "cuda", feature = "emulate"))]
mod works;

#[cfg(any(feature = "cuda", feature = "emulate"))]
fn main() {
    if let Err(error) = run::run() {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

#[cfg(not(any(feature = "cuda", feature = "emulate")))]
fn main() {
    eprintln!(
        "the GPU benchmarks need --features cuda (or emulate, which proves the code and measures nothing)"
    );
}
