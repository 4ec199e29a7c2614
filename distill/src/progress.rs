//! Progress of long work: a bar with rate and remaining time on a terminal, a line per interval elsewhere; Ctrl-C.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, OnceLock};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Time between lines where there is no terminal.
const INTERVAL: Duration = Duration::from_secs(20);

static STOP: AtomicBool = AtomicBool::new(false);
static USER_SIGNAL: LazyLock<Arc<AtomicBool>> = LazyLock::new(Arc::default);
static QUIET: AtomicBool = AtomicBool::new(false);

/// From now on nothing is shown: of several ranks one talks to the user.
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// From now on Ctrl-C, SIGTERM and SIGUSR1 only ask long work to save and stop; a second Ctrl-C ends the program. SIGUSR1 is what
/// `mpirun` passes on to its ranks, and batch systems send ahead of the end of a job.
pub fn handle_interrupts() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let installed = ctrlc::set_handler(|| {
            if STOP.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
            if !QUIET.load(Ordering::Relaxed) {
                dmd_cli::say!("\nstopping after this step; press Ctrl-C again to stop at once");
            }
        });
        if let Err(e) = installed {
            dmd_cli::say!("warning: cannot handle Ctrl-C: {e}");
        }
        #[cfg(unix)]
        if let Err(e) = signal_hook::flag::register(signal_hook::consts::SIGUSR1, USER_SIGNAL.clone()) {
            dmd_cli::say!("warning: cannot handle SIGUSR1: {e}");
        }
    });
}

/// Whether the user asked to stop.
pub fn stop_requested() -> bool {
    STOP.load(Ordering::Relaxed) || USER_SIGNAL.load(Ordering::Relaxed)
}

/// Progress of one piece of work.
pub struct Progress {
    bar: ProgressBar,
    what: &'static str,
    first: u64,
    started: Instant,
    printed: Option<Instant>,
    /// Whether lines are printed instead of a bar.
    lines: bool,
}

impl Progress {
    /// Work of `total` steps of which `done` are behind.
    pub fn new(what: &'static str, done: u64, total: u64) -> Self {
        let (quiet, terminal) = (QUIET.load(Ordering::Relaxed), std::io::stderr().is_terminal());
        let bar_is_seen = terminal && !quiet;
        let target = if bar_is_seen { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target).with_position(done);
        let template = "{prefix:>12} {bar:32} {pos}/{len} {per_sec} eta {eta} {msg}";
        bar.set_style(
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
        );
        bar.set_prefix(what);
        bar.reset_eta();
        Self { bar, what, first: done, started: Instant::now(), printed: None, lines: !terminal && !quiet }
    }

    /// `done` steps are behind; `message` shows the figures to watch.
    pub fn update(&mut self, done: u64, message: &str) {
        self.bar.set_position(done);
        self.bar.set_message(message.to_owned());
        let total = self.bar.length().unwrap_or(done);
        let due = self.printed.unwrap_or(self.started).elapsed() >= INTERVAL;
        if self.lines && (due || done == total) {
            self.printed = Some(Instant::now());
            let elapsed = self.started.elapsed().as_secs_f64();
            let rate = (done - self.first) as f64 / elapsed.max(1e-9);
            let eta = (total - done) as f64 / rate.max(1e-9);
            dmd_cli::say!("{}: {done}/{total}, {rate:.2}/s, eta {eta:.0} s, {message}", self.what);
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.abandon();
    }
}
