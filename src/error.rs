//! One error type. A message names the operation, what it got, what it needed, and the caller's line.

use std::{fmt, panic::Location, path::PathBuf};

/// `std::result::Result` with smalti's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An operation got arguments that it cannot work with.
    #[error("{op}: {message} ({at})")]
    Op {
        /// Name of the operation.
        op: &'static str,
        /// What is wrong with which argument, and what is needed.
        message: String,
        /// The line that called the operation.
        at: Caller,
    },
    /// The gradient of an input was asked for, and the operation has no rule for it.
    #[error("{op}: no gradient is defined for its input `{input}`; detach it if none is wanted")]
    NoGradient {
        /// Name of the operation.
        op: &'static str,
        /// Name of the input.
        input: &'static str,
    },
    /// A second derivative was asked of an operation whose backward is a fused kernel.
    #[error("{op}: its backward is a fused kernel and has no gradient of its own (create_graph)")]
    NoSecondOrder {
        /// Name of the operation.
        op: &'static str,
    },
    /// `backward` ran a second time over a graph that the first run has freed.
    #[error("{op}: backward ran through this graph before and freed what it saved; use `retain_graph`")]
    GraphFreed {
        /// Name of the operation.
        op: &'static str,
    },
    /// The device is not to be had.
    #[error("device {device}: {message}")]
    Device {
        /// Which device.
        device: String,
        /// Why not.
        message: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A file's content is not what its format demands.
    #[error("{path}: {message}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        message: String,
    },
    /// Anything else, in one sentence.
    #[error("{0}")]
    Message(String),
}

/// A source line of the caller.
#[derive(Clone, Copy, Debug)]
pub struct Caller(&'static Location<'static>);

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{}:{}", self.0.file(), self.0.line())
    }
}

impl Error {
    /// An error of operation `op` at the line of the nearest `#[track_caller]` caller.
    #[track_caller]
    pub fn op(op: &'static str, message: impl Into<String>) -> Self {
        Error::Op { op, message: message.into(), at: Caller(Location::caller()) }
    }

    /// A one-sentence error.
    pub fn msg(message: impl Into<String>) -> Self {
        Error::Message(message.into())
    }

    /// A failed read or write of `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }

    /// A malformed file.
    pub fn format(path: impl Into<PathBuf>, message: impl Into<String>) -> Self {
        Error::Format { path: path.into(), message: message.into() }
    }
}

/// Returns an [`Error::Op`]: `bail!("softmax", "dim {dim} is out of range")`.
#[macro_export]
macro_rules! bail {
    ($op:expr, $($message:tt)+) => { return Err($crate::Error::op($op, format!($($message)+))) };
}

/// Returns an [`Error::Op`] unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $op:expr, $($message:tt)+) => {
        if !$condition { return Err($crate::Error::op($op, format!($($message)+))); }
    };
}
