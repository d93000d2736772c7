//! `Debug` and `Display`: dtype, shape, device, op name, and the first values.

use crate::{Tensor, for_dtype};
use std::fmt;

/// Values shown at most.
const SHOWN: usize = 8;

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Tensor({} {:?} on {}, {}", self.dtype(), self.shape(), self.device(), self.op())?;
        if self.tracked() {
            f.write_str(", tracked")?;
        }
        f.write_str(": [")?;
        let n = self.numel();
        let flat = self.detach().reshape([n]).and_then(|t| t.narrow(0, 0, n.min(SHOWN)));
        match flat {
            Ok(first) => for_dtype!(self.dtype(), T => {
                for (i, value) in first.to_vec::<T>().unwrap_or_default().iter().enumerate() {
                    let comma = if i > 0 { ", " } else { "" };
                    write!(f, "{comma}{value:?}")?;
                }
            }),
            Err(error) => write!(f, "{error}")?,
        }
        f.write_str(if n > SHOWN { ", ..])" } else { "])" })
    }
}

impl fmt::Display for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
