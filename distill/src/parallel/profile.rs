//! `--profile`: where the time of an update goes, and what the ranks send each other.

use std::time::{Duration, Instant};

use serde_json::json;

use super::Team;
use crate::checkpoint::write_json;
use crate::error::Result;
use crate::run::Run;

/// What one rank has sent and waited for.
#[derive(Clone, Copy, Default)]
pub(super) struct Meter {
    updates: u64,
    update: Duration,
    /// Of the time of updates.
    communication: Duration,
    /// Since the beginning, updates or not.
    all: Duration,
    gradient_bytes: u64,
    messages: u64,
}

impl Meter {
    pub(super) fn sent(&mut self, bytes: u64, time: Duration) {
        self.gradient_bytes += bytes;
        self.messages += 1;
        self.waited(time);
    }

    pub(super) fn waited(&mut self, time: Duration) {
        self.all += time;
    }
}

impl Team {
    /// Does an update and takes its time.
    pub fn timed<T>(&self, update: impl FnOnce() -> Result<T>) -> Result<T> {
        let (before, started) = (self.meter(|meter| meter.all), Instant::now());
        let done = update()?;
        self.meter(|meter| {
            meter.updates += 1;
            meter.update += started.elapsed();
            meter.communication += meter.all - before;
        });
        Ok(done)
    }

    /// Prints what the updates cost, and keeps it as `profile.json` in the run's folder. Communication is transfer and waiting
    /// for the slowest rank; the rank that waits least shows the transfer.
    pub fn report(&self, run: &Run) -> Result<()> {
        let meter = self.meter(|meter| *meter);
        if meter.updates == 0 {
            return Ok(());
        }
        let each = |time: Duration| time.as_secs_f64() / meter.updates as f64;
        let mut seconds = [each(meter.update), each(meter.communication), -each(meter.communication)];
        self.largest(&mut seconds);
        if !self.leads() {
            return Ok(());
        }
        let [update, most, least] = [seconds[0], seconds[1], -seconds[2]];
        let percent = |part: f64| 100.0 * part / update;
        let bytes = meter.gradient_bytes as f64 / meter.updates as f64;
        let messages = meter.messages as f64 / meter.updates as f64;
        dmd_cli::say!(
            "profile: {} updates of {update:.4} s; ranks: {}, threads of each: {}\n\
             communication {:.2} % of an update on the rank that waits least, {:.2} % on the one that waits most ({least:.5} and \
             {most:.5} s)\n\
             all-reduced per update: {bytes:.0} bytes of gradients in {messages:.1} messages",
            meter.updates,
            self.size(),
            rayon::current_num_threads(),
            percent(least),
            percent(most),
        );
        let profile = json!({
            "ranks": self.size(), "threads": rayon::current_num_threads(), "updates": meter.updates, "seconds_per_update": update,
            "communication_seconds": {"least": least, "most": most},
            "gradient_bytes": meter.gradient_bytes, "messages": meter.messages,
        });
        write_json(&run.path("profile.json"), &profile)
    }
}
