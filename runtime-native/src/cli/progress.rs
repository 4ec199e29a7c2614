//! How far a long run is: a bar on a terminal, a line every ten seconds elsewhere, nothing for short runs.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Runs shorter than this show nothing.
const QUIET: Duration = Duration::from_secs(1);
/// Time between lines where there is no terminal.
const INTERVAL: Duration = Duration::from_secs(10);

/// Counts work and shows it on stderr.
pub struct Progress {
    bar: ProgressBar,
    start: Instant,
    terminal: bool,
    last_line: Mutex<Instant>,
}

impl Progress {
    /// Expects `total` network evaluations.
    pub fn new(total: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::hidden());
        if let Ok(style) =
            ProgressStyle::with_template("{bar:40} {percent}% {per_sec} evaluations, {eta} left")
        {
            bar.set_style(style);
        }
        let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
        let start = Instant::now();
        Self { bar, start, terminal, last_line: Mutex::new(start) }
    }

    /// `n` more are done.
    pub fn add(&self, n: usize) {
        self.bar.inc(n as u64);
        if self.start.elapsed() < QUIET {
            return;
        }
        if self.terminal {
            if self.bar.is_hidden() {
                self.bar.set_draw_target(ProgressDrawTarget::stderr());
            }
            return;
        }
        let Ok(mut last) = self.last_line.lock() else { return };
        if last.elapsed() >= INTERVAL {
            *last = Instant::now();
            let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
            let rate = done as f64 / self.start.elapsed().as_secs_f64();
            dmd_cli::say!("{done} of {total} evaluations, {rate:.1} per second");
        }
    }

    /// Removes the bar; returns the time since the start.
    pub fn finish(self) -> Duration {
        self.bar.finish_and_clear();
        self.start.elapsed()
    }
}
