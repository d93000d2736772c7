//! Overrides, and messages that say where a mistake is.

use smalti::{Error, Result};
use std::path::Path;
use toml::{Table, Value};

/// Puts `section.key=value` into the table. The value is read as TOML, and as a string if it is none.
pub(super) fn set(table: &mut Table, setting: &str) -> Result<()> {
    let wrong =
        || Error::msg(format!("--set {setting}: needs section.key=value, such as optim.base_lr=1e-3"));
    let (key, value) = setting.split_once('=').ok_or_else(wrong)?;
    let (key, value) = (key.trim(), value.trim());
    let value = match format!("value = {value}").parse::<Table>().map(|mut t| t.remove("value")) {
        Ok(Some(value)) => value,
        _ => Value::String(value.to_owned()),
    };
    let mut at = table;
    let mut parts = key.split('.').peekable();
    while let Some(part) = parts.next() {
        if part.is_empty() {
            return Err(wrong());
        }
        if parts.peek().is_none() {
            at.insert(part.to_owned(), value);
            return Ok(());
        }
        let next = at.entry(part).or_insert_with(|| Value::Table(Table::new()));
        at = next
            .as_table_mut()
            .ok_or_else(|| Error::msg(format!("--set {setting}: `{part}` is a value, not a section")))?;
    }
    Err(wrong())
}

/// `file: line 3: optim.base_lrr: unknown key; did you mean `base_lr`?`
pub(super) fn file_error(path: &Path, text: &str, key: Option<String>, error: &toml::de::Error) -> Error {
    let line = error.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    let line = line.map_or(String::new(), |line| format!("line {line}: "));
    let key = key.filter(|key| key != ".").map_or(String::new(), |key| format!("{key}: "));
    Error::format(path, format!("{line}{key}{}", explain(error.message())))
}

/// serde's message, with the nearest name where one is unknown, on one line.
pub(super) fn explain(message: &str) -> String {
    let mut quoted = message.split('`').skip(1).step_by(2);
    let what = if message.starts_with("unknown field") {
        "key"
    } else if message.starts_with("unknown variant") {
        "value"
    } else {
        return message.lines().collect::<Vec<_>>().join(" ");
    };
    let unknown = quoted.next().unwrap_or_default();
    let known: Vec<&str> = quoted.collect();
    match nearest(unknown, known.iter().copied()) {
        Some(near) => format!("unknown {what} `{unknown}`; did you mean `{near}`?"),
        None => format!("unknown {what} `{unknown}`; there are {}", known.join(", ")),
    }
}

/// The most similar of `names`, if it is similar at all.
pub fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let (score, best) =
        names.map(|n| (strsim::jaro_winkler(name, n), n)).max_by(|a, b| a.0.total_cmp(&b.0))?;
    (score > 0.75).then_some(best)
}
