//! Options, and the loop over the works.

use super::{measure::Timer, steps, works};
use serde_json::{Value, json};
use smalti::{Device, Error, Result};
use std::{
    fs,
    io::Write,
    path::PathBuf,
    time::{Duration, Instant},
};

struct Options {
    shapes: PathBuf,
    out: Option<PathBuf>,
    only: Option<String>,
    budget: Duration,
    tiny: bool,
}

fn options() -> Result<Options> {
    let mut found = Options {
        shapes: PathBuf::new(),
        out: None,
        only: None,
        budget: Duration::from_secs(300),
        tiny: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| Error::msg(format!("{word} needs a value")));
        match word.as_str() {
            "--shapes" => found.shapes = value()?.into(),
            "--out" => found.out = Some(value()?.into()),
            "--only" => found.only = Some(value()?),
            "--budget-s" => {
                let text = value()?;
                let seconds =
                    text.parse().map_err(|_| Error::msg(format!("--budget-s {text}: needs seconds")))?;
                found.budget = Duration::from_secs(seconds);
            }
            "--tiny" => found.tiny = true,
            "--bench" => {} // cargo adds it
            other => return Err(Error::msg(format!("unknown option {other}; see benches/gpu/main.rs"))),
        }
    }
    if found.shapes.as_os_str().is_empty() {
        return Err(Error::msg("--shapes FILE is needed: what benches/against/gpu_torch.py --shapes prints"));
    }
    Ok(found)
}

/// Name and shape of each work.
fn shapes(options: &Options) -> Result<Vec<(String, Value)>> {
    let path = options.shapes.display();
    let text = fs::read_to_string(&options.shapes).map_err(|e| Error::msg(format!("{path}: {e}")))?;
    let mut found = Vec::new();
    for (i, line) in text.lines().enumerate() {
        let bad = |what: &str| Error::msg(format!("{path}, line {}: {what}", i + 1));
        let line: Value = serde_json::from_str(line).map_err(|e| bad(&e.to_string()))?;
        let name = line["work"].as_str().ok_or_else(|| bad("no `work`"))?.to_owned();
        let wanted = options.only.as_ref().is_none_or(|only| only.split(',').any(|part| name.contains(part)));
        if wanted {
            found.push((name, line["shape"].clone()));
        }
    }
    Ok(found)
}

pub fn run() -> Result<()> {
    let options = options()?;
    let start = Instant::now();
    let device = Device::cuda(0)?;
    let mut file = match &options.out {
        Some(path) => {
            Some(fs::File::create(path).map_err(|e| Error::msg(format!("{}: {e}", path.display())))?)
        }
        None => None,
    };
    let mut emit = |line: Value| -> Result<()> {
        println!("{line}");
        file.as_mut().map_or(Ok(()), |f| writeln!(f, "{line}")).map_err(|e| Error::msg(e.to_string()))
    };
    emit(
        json!({"work": "meta", "impl": "smalti", "version": env!("CARGO_PKG_VERSION"), "tiny": options.tiny,
        "emulated": smalti::gpu::is_emulated()}),
    )?;
    let timer = Timer::new(device, options.tiny)?;
    for (name, shape) in shapes(&options)? {
        let head = json!({"work": name, "shape": shape, "impl": "smalti"});
        if start.elapsed() > options.budget {
            emit(merged(&head, json!({"skipped": "time budget"})))?;
            continue;
        }
        let lines = device.scope(|| match name.split_once('/') {
            Some(("step", kind)) => steps::run(&timer, kind, &shape),
            _ => works::run(&timer, &name, &shape),
        });
        match lines {
            Ok(lines) => {
                for line in lines {
                    emit(merged(&head, line))?;
                }
            }
            Err(error) => emit(merged(&head, json!({"error": error.to_string()})))?,
        }
        smalti::gpu::trim(device)?;
    }
    emit(json!({"work": "meta", "impl": "smalti", "end": true, "seconds": start.elapsed().as_secs_f64(),
        "host_operations": smalti::gpu::host_operations()}))
}

fn merged(head: &Value, more: Value) -> Value {
    let mut line = head.clone();
    if let (Value::Object(line), Value::Object(more)) = (&mut line, more) {
        line.extend(more);
    }
    line
}
