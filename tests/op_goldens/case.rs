//! One case as an operation sees it: input tensors in their layout, and typed access to its arguments.

use serde_json::{Map, Value};
use smalti::{DType, Error, Result, Tensor};
use std::collections::HashMap;

/// Runs one operation on a case's inputs and returns its outputs in the order of `ops.md`.
pub type Op = fn(&Case) -> Result<Vec<Tensor>>;

/// The stored tensors of a file by name; floats in the precision under test.
pub type Stored = HashMap<String, Tensor>;

/// What an operation gets.
pub struct Case {
    inputs: Vec<Option<Tensor>>,
    args: Map<String, Value>,
    /// f32 or f64: the precision under test, for operations that have no float input.
    #[allow(dead_code)]
    pub dtype: DType,
}

// Not every group needs every kind of argument.
#[allow(dead_code)]
impl Case {
    /// The case that `spec` describes, and the leaf of each input whose gradient it lists.
    pub fn new(spec: &Value, stored: &Stored, dtype: DType) -> Result<(Case, HashMap<String, Tensor>)> {
        let mut leaves = HashMap::new();
        let mut inputs = Vec::new();
        for name in list(spec, "inputs")? {
            let Some(name) = name.as_str() else {
                inputs.push(None);
                continue;
            };
            let mut x = tensor(stored, name)?.clone();
            if spec["grads"].get(name).is_some() {
                x = x.requires_grad();
                leaves.insert(name.to_owned(), x.clone());
            }
            inputs.push(Some(arrange(&x, &spec["layout"][name])?));
        }
        let args = spec["args"].as_object().cloned().unwrap_or_default();
        Ok((Case { inputs, args, dtype }, leaves))
    }

    /// Input `i` in the order of `ops.md`.
    pub fn input(&self, i: usize) -> Result<&Tensor> {
        self.optional(i).ok_or_else(|| Error::msg(format!("the case has no input {i}")))
    }

    /// Input `i`, `None` if it was not given.
    pub fn optional(&self, i: usize) -> Option<&Tensor> {
        self.inputs.get(i).and_then(Option::as_ref)
    }

    /// All inputs that were given, for operations on a list of tensors.
    pub fn inputs(&self) -> Vec<&Tensor> {
        self.inputs.iter().flatten().collect()
    }

    /// An argument as it stands in the file.
    pub fn arg(&self, name: &str) -> Result<&Value> {
        self.args.get(name).ok_or_else(|| Error::msg(format!("the case has no argument `{name}`")))
    }

    /// Is the argument null?
    pub fn is_null(&self, name: &str) -> Result<bool> {
        Ok(self.arg(name)?.is_null())
    }

    /// Is the argument a list?
    pub fn is_list(&self, name: &str) -> Result<bool> {
        Ok(self.arg(name)?.is_array())
    }

    fn get<T>(&self, name: &str, read: impl Fn(&Value) -> Option<T>) -> Result<T> {
        let value = self.arg(name)?;
        read(value).ok_or_else(|| Error::msg(format!("argument `{name}` is {value}")))
    }

    fn get_opt<T>(&self, name: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>> {
        if self.is_null(name)? { Ok(None) } else { self.get(name, read).map(Some) }
    }

    /// A number, which may be written `2`, `2.0`, `"inf"` or `"-inf"`.
    pub fn f64(&self, name: &str) -> Result<f64> {
        self.get(name, real)
    }

    /// As [`f64`](Self::f64), `None` for null.
    pub fn opt_f64(&self, name: &str) -> Result<Option<f64>> {
        self.get_opt(name, real)
    }

    /// An integer.
    pub fn i64(&self, name: &str) -> Result<i64> {
        self.get(name, integer)
    }

    /// An integer, `None` for null.
    pub fn opt_i64(&self, name: &str) -> Result<Option<i64>> {
        self.get_opt(name, integer)
    }

    /// A count.
    pub fn usize(&self, name: &str) -> Result<usize> {
        self.get(name, size)
    }

    /// A count, `None` for null.
    pub fn opt_usize(&self, name: &str) -> Result<Option<usize>> {
        self.get_opt(name, size)
    }

    /// True or false.
    pub fn bool(&self, name: &str) -> Result<bool> {
        self.get(name, Value::as_bool)
    }

    /// A word.
    pub fn str(&self, name: &str) -> Result<&str> {
        let value = self.arg(name)?;
        value.as_str().ok_or_else(|| Error::msg(format!("argument `{name}` is {value}")))
    }

    /// A list of integers; one number counts as a list of one.
    pub fn i64s(&self, name: &str) -> Result<Vec<i64>> {
        self.get(name, |v| many(v, integer))
    }

    /// As [`i64s`](Self::i64s), `None` for null.
    pub fn opt_i64s(&self, name: &str) -> Result<Option<Vec<i64>>> {
        self.get_opt(name, |v| many(v, integer))
    }

    /// A list of counts; one number counts as a list of one.
    pub fn usizes(&self, name: &str) -> Result<Vec<usize>> {
        self.get(name, |v| many(v, size))
    }

    /// As [`usizes`](Self::usizes), `None` for null.
    pub fn opt_usizes(&self, name: &str) -> Result<Option<Vec<usize>>> {
        self.get_opt(name, |v| many(v, size))
    }

    /// A list of numbers; one number counts as a list of one.
    pub fn f64s(&self, name: &str) -> Result<Vec<f64>> {
        self.get(name, |v| many(v, real))
    }

    /// As [`f64s`](Self::f64s), `None` for null.
    pub fn opt_f64s(&self, name: &str) -> Result<Option<Vec<f64>>> {
        self.get_opt(name, |v| many(v, real))
    }

    /// Two counts; one number stands for both.
    pub fn pair(&self, name: &str) -> Result<[usize; 2]> {
        match self.usizes(name)?[..] {
            [a] => Ok([a, a]),
            [a, b] => Ok([a, b]),
            _ => Err(Error::msg(format!("argument `{name}` is no pair"))),
        }
    }
}

fn real(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some("inf") => Some(f64::INFINITY),
        Some("-inf") => Some(f64::NEG_INFINITY),
        Some(_) => None,
        None => value.as_f64(),
    }
}

fn integer(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_f64().filter(|x| x.fract() == 0.0).map(|x| x as i64))
}

fn size(value: &Value) -> Option<usize> {
    integer(value).and_then(|n| n.try_into().ok())
}

fn many<T>(value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    match value.as_array() {
        Some(values) => values.iter().map(read).collect(),
        None => read(value).map(|x| vec![x]),
    }
}

/// Key `key` of a case, which must be a list.
pub fn list<'a>(spec: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    spec[key].as_array().ok_or_else(|| Error::msg(format!("`{key}` is not a list")))
}

/// Key `key` of a case, which must be a string.
pub fn text<'a>(spec: &'a Value, key: &str) -> Result<&'a str> {
    spec[key].as_str().ok_or_else(|| Error::msg(format!("`{key}` is not a string")))
}

/// A stored tensor.
pub fn tensor<'a>(stored: &'a Stored, name: &str) -> Result<&'a Tensor> {
    stored.get(name).ok_or_else(|| Error::msg(format!("the file has no tensor `{name}`")))
}

/// A view of the stored tensor `x` as `layout` demands.
fn arrange(x: &Tensor, layout: &Value) -> Result<Tensor> {
    let bad = || Error::msg(format!("unknown layout {layout}"));
    let sizes = |value: &Value| many(value, size).ok_or_else(bad);
    if layout == "contiguous" {
        return Ok(x.clone());
    }
    match layout.as_object().and_then(|o| o.iter().next()) {
        Some((kind, value)) if kind == "permute" => x.permute(sizes(value)?),
        Some((kind, value)) if kind == "expand" => x.expand(sizes(value)?),
        Some((kind, value)) if kind == "narrow" => match sizes(value)?[..] {
            [dim, start, length] => x.narrow(dim, start, length),
            _ => Err(bad()),
        },
        _ => Err(bad()),
    }
}
