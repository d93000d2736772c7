//! What a person sees while a run goes on: a bar on a terminal, else a line every ten seconds.

use super::metrics::Record;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

const INTERVAL: Duration = Duration::from_secs(10);

/// The progress of a run, on standard error.
pub struct Progress {
    kind: Kind,
    total: u64,
    first: u64,
    start: Instant,
}

enum Kind {
    Bar(ProgressBar),
    Lines(Instant),
    Silent,
}

impl Progress {
    /// A run of `total` steps of which `done` are done.
    pub fn new(total: u64, done: u64) -> Progress {
        let now = Instant::now();
        let kind = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{wide_bar:.cyan/blue} {pos}/{len}  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_position(done);
            Kind::Bar(bar)
        } else {
            Kind::Lines(now)
        };
        Progress { kind, total, first: done, start: now }
    }

    /// One that shows nothing.
    pub fn silent() -> Progress {
        Progress { kind: Kind::Silent, total: 0, first: 0, start: Instant::now() }
    }

    /// Shows how the run stands.
    pub fn update(&mut self, record: &Record) {
        let done = record.step;
        let message = || {
            let Record { epoch, loss, lr, images_per_second, .. } = record;
            let (watched, eta) = (watched(record), clock(self.remaining(done)));
            format!(
                "epoch {epoch:.1}  loss {loss:.4}{watched}  lr {lr:.2e}  {images_per_second:.0} images/s  ETA {eta}"
            )
        };
        match &self.kind {
            Kind::Bar(bar) => {
                bar.set_message(message());
                bar.set_position(done);
            }
            Kind::Lines(last) if last.elapsed() >= INTERVAL || done == self.total => {
                eprintln!("step {done}/{}  {}", self.total, message());
                self.kind = Kind::Lines(Instant::now());
            }
            Kind::Lines(_) | Kind::Silent => {}
        }
    }

    /// A line for the person, above the bar.
    pub fn say(&self, line: &str) {
        match &self.kind {
            Kind::Bar(bar) => bar.println(line),
            Kind::Lines(_) => eprintln!("{line}"),
            Kind::Silent => {}
        }
    }

    /// Leaves the bar as it stands.
    pub fn finish(&self) {
        if let Kind::Bar(bar) = &self.kind {
            bar.abandon();
        }
    }

    fn remaining(&self, done: u64) -> Duration {
        let here = done.saturating_sub(self.first).max(1);
        self.start.elapsed().mul_f64(self.total.saturating_sub(done) as f64 / here as f64)
    }
}

/// `  acc1 93.1  std 0.0442`
fn watched(record: &Record) -> String {
    let show = |(name, value): (&String, &f64)| match value.abs() {
        1.0.. => format!("  {name} {value:.1}"),
        _ => format!("  {name} {value:.4}"),
    };
    record.monitored.iter().map(show).collect()
}

/// 1:02:03 or 2:03
pub fn clock(time: Duration) -> String {
    let s = time.as_secs();
    let (h, m, s) = (s / 3600, s / 60 % 60, s % 60);
    if h > 0 { format!("{h}:{m:02}:{s:02}") } else { format!("{m}:{s:02}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks() {
        let shown = [0, 59, 60, 3599, 3600, 360_001].map(|s| clock(Duration::from_secs(s)));
        assert_eq!(shown, ["0:00", "0:59", "1:00", "59:59", "1:00:00", "100:00:01"]);
    }
}
