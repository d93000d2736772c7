//! The log of a run: one JSON object a line.

use serde::{Deserialize, Serialize};
use smalti::{Error, Result};
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
};

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Steps of the optimizer done.
    pub step: u64,
    /// Passes over the data done, with fraction.
    pub epoch: f64,
    /// Mean loss since the line before.
    pub loss: f64,
    /// Learning rate of this step.
    pub lr: f64,
    /// Means since the line before of what else the task watches, by name.
    #[serde(flatten)]
    pub monitored: BTreeMap<String, f64>,
    /// Images a second since the line before.
    pub images_per_second: f64,
    /// Seconds of training, those before an interruption included.
    pub seconds: f64,
}

/// An open log, with all its lines in memory for the loss curve.
pub struct Metrics {
    path: PathBuf,
    file: File,
    records: Vec<Record>,
}

impl Metrics {
    /// An empty log at `path`.
    ///
    /// # Errors
    /// If there is such a file already, or it cannot be written.
    pub fn create(path: &Path) -> Result<Metrics> {
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|e| Error::io(path, e))?;
        Ok(Metrics { path: path.into(), file, records: Vec::new() })
    }

    /// Takes up a log as it was after `step`: what a crash left behind the last checkpoint goes away.
    ///
    /// # Errors
    /// If it cannot be read or written, or a line is no record.
    pub fn resume(path: &Path, step: u64) -> Result<Metrics> {
        let mut records = if path.exists() { read(path)? } else { Vec::new() };
        records.retain(|record| record.step <= step);
        let text: String = records.iter().map(line).collect::<Result<_>>()?;
        let temporary = path.with_extension("jsonl.tmp");
        fs::write(&temporary, text).map_err(|e| Error::io(&temporary, e))?;
        fs::rename(&temporary, path).map_err(|e| Error::io(path, e))?;
        let file = OpenOptions::new().append(true).open(path).map_err(|e| Error::io(path, e))?;
        Ok(Metrics { path: path.into(), file, records })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn push(&mut self, record: Record) -> Result<()> {
        self.file.write_all(line(&record)?.as_bytes()).map_err(|e| Error::io(&self.path, e))?;
        self.records.push(record);
        Ok(())
    }

    /// All lines.
    pub fn records(&self) -> &[Record] {
        &self.records
    }
}

/// The lines of a log. A last line that a crash cut off is passed over.
///
/// # Errors
/// If the file cannot be read or a line is no record.
pub fn read(path: &Path) -> Result<Vec<Record>> {
    let text = fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|e| Error::format(path, format!("line {}: {e}", i + 1)))
    };
    complete.lines().enumerate().map(parse).collect()
}

fn line(record: &Record) -> Result<String> {
    let mut line = serde_json::to_string(record).map_err(|e| Error::msg(format!("metrics: {e}")))?;
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_drops_what_came_after() -> Result<()> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let record = |step| Record {
            step,
            epoch: 0.1,
            loss: 1.0 / 3.0,
            lr: 1e-3,
            monitored: [("acc1".to_owned(), 0.1)].into(),
            images_per_second: 9.0,
            seconds: 2.0,
        };
        let mut metrics = Metrics::create(&path)?;
        (1..=5).try_for_each(|step| metrics.push(record(step)))?;
        assert!(Metrics::create(&path).is_err(), "an existing log is not overwritten");
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str("{\"step\": 6, \"ep");
        fs::write(&path, text).unwrap();
        let mut metrics = Metrics::resume(&path, 3)?;
        metrics.push(record(4))?;
        assert_eq!(read(&path)?, (1..=4).map(record).collect::<Vec<_>>());
        fs::write(&path, "nonsense\n").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("line 1"));
        Ok(())
    }
}
