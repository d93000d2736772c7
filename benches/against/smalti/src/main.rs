//! smalti's side of the comparison.

#[path = "../../worker.rs"]
mod worker;

use worker::{Result, Variant, serve};

/// The variants of a case. Cases arrive here as the crate gets their ops; README.md lists what each one is.
fn cases(_name: &str) -> Result<Option<Vec<Variant>>> {
    Ok(None)
}

fn main() -> Result<()> {
    serve("smalti", env!("CARGO_PKG_VERSION"), cases)
}
