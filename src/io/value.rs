//! What a checkpoint's pickle holds.

use crate::Tensor;

/// A tree of dictionaries, lists and leaves.
#[derive(Clone, Debug)]
pub enum Value {
    /// Python's None.
    None,
    /// True or false.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number.
    Float(f64),
    /// A text.
    Str(String),
    /// A tensor.
    Tensor(Tensor),
    /// A list or a tuple.
    List(Vec<Value>),
    /// A dictionary in its order; keys that are numbers are written out.
    Dict(Vec<(String, Value)>),
    /// Anything else: its class, and its fields if it has some (argparse's `Namespace`).
    Object {
        /// Module and name.
        class: String,
        /// Its state.
        fields: Vec<(String, Value)>,
    },
}

impl Value {
    /// A dictionary of tensors.
    pub fn state_dict(tensors: impl IntoIterator<Item = (String, Tensor)>) -> Value {
        Value::Dict(tensors.into_iter().map(|(name, t)| (name, Value::Tensor(t))).collect())
    }

    /// The entry `key` of a dictionary, or the field of an object.
    pub fn get(&self, key: &str) -> Option<&Value> {
        match self {
            Value::Dict(entries) | Value::Object { fields: entries, .. } => {
                entries.iter().find(|(k, _)| k == key).map(|(_, v)| v)
            }
            _ => None,
        }
    }

    /// Is it a dictionary?
    pub fn is_dict(&self) -> bool {
        matches!(self, Value::Dict(_))
    }

    /// All tensors in dictionaries and lists, with the keys and positions on the way joined by dots.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let mut found = Vec::new();
        self.collect("", &mut found);
        found
    }

    fn collect(&self, name: &str, found: &mut Vec<(String, Tensor)>) {
        let join = |key: &str| if name.is_empty() { key.to_owned() } else { format!("{name}.{key}") };
        match self {
            Value::Tensor(t) => found.push((name.to_owned(), t.clone())),
            Value::Dict(entries) => entries.iter().for_each(|(key, v)| v.collect(&join(key), found)),
            Value::List(items) => {
                items.iter().enumerate().for_each(|(i, v)| v.collect(&join(&i.to_string()), found))
            }
            _ => {}
        }
    }
}
