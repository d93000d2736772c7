//! Ctrl-C.

use smalti::{Error, Result};
use std::{
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
};

/// What a shell reports of a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

/// Set by the first Ctrl-C, which lets the step end and the state be saved; the second ends the program.
pub fn flag() -> Result<&'static AtomicBool> {
    static STOP: AtomicBool = AtomicBool::new(false);
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        eprintln!("\nsaving after this step; once more to stop at once");
    })
    .map_err(|e| Error::msg(format!("Ctrl-C: {e}")))?;
    Ok(&STOP)
}

/// The exit code of a run that was stopped.
pub fn code() -> ExitCode {
    ExitCode::from(INTERRUPTED)
}
