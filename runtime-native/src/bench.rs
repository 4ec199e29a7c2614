//! How fast a model runs here: providers in turn, in every round, so that what else the machine does meets them all.
//! Measures network evaluations; noise and files are not in them.

use std::time::{Duration, Instant};

use dmd_core::noise::standard_normal;
use serde::Serialize;

use crate::generator::classes;
use crate::{Batch, Error, Generator, ModelFile, Options, Provider, Result};

/// Evaluations of each case before those that count.
const WARM_UP: usize = 2;
/// Rounds, however long they take.
const LEAST_ROUNDS: usize = 5;
/// Rounds, however short they are.
const MOST_ROUNDS: usize = 1000;

/// What to measure: every combination.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Providers, in turn in every round.
    pub providers: Vec<Provider>,
    /// Threads of the engine.
    pub threads: Vec<usize>,
    /// Images per evaluation.
    pub batches: Vec<usize>,
    /// Time for each number of threads and images; there are 5 rounds at least.
    pub time: Duration,
}

/// What one combination took.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The provider.
    pub provider: Provider,
    /// Its engine and version.
    pub engine: String,
    /// Threads of the engine.
    pub threads: usize,
    /// Images per evaluation.
    pub batch: usize,
    /// Milliseconds of one evaluation.
    pub ms: Times,
    /// Images per second at the median.
    pub images_per_second: f64,
}

/// Statistics of times in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Times {
    /// Number of times.
    pub runs: usize,
    /// Shortest.
    pub min: f64,
    /// Half are shorter.
    pub median: f64,
    /// 95 of 100 are shorter (nearest rank).
    pub p95: f64,
    /// Distance between the quartiles over the median.
    pub spread: f64,
}

impl Times {
    /// Of times in milliseconds, at least one.
    pub fn of(mut ms: Vec<f64>) -> Self {
        ms.sort_by(f64::total_cmp);
        let rank = |p: f64| ms[((p * ms.len() as f64).ceil() as usize).clamp(1, ms.len()) - 1];
        let median = (ms[(ms.len() - 1) / 2] + ms[ms.len() / 2]) / 2.0;
        let spread = (rank(0.75) - rank(0.25)) / median;
        Self { runs: ms.len(), min: ms[0], median, p95: rank(0.95), spread }
    }
}

/// Inputs of one evaluation.
pub struct Inputs {
    x: Vec<f32>,
    t: Vec<f32>,
    class: Vec<i64>,
}

impl Inputs {
    /// Images `0..n` of seed 0 in turn of every class, a teacher's at half of its steps.
    pub fn new(model: &Generator, n: usize) -> Self {
        let info = model.info();
        let mut x = vec![0.0; n * info.image_len()];
        for (k, x) in (0..).zip(x.chunks_mut(info.image_len())) {
            standard_normal(0, k, x);
        }
        let steps = info.card.as_ref().map_or(1, |card| card.schedule.num_train_timesteps);
        let class = (0..n as u64).map(|k| classes(info).map_or(0, |c| c.of_image(k)) as i64).collect();
        Self { x, t: vec![(steps / 2) as f32; n], class }
    }

    /// Milliseconds of one evaluation.
    ///
    /// # Errors
    /// If the engine fails.
    pub fn time(&self, model: &Generator) -> Result<f64> {
        let batch = Batch { n: self.t.len(), x: &self.x, t: &self.t, class: &self.class };
        let start = Instant::now();
        model.evaluate(&batch)?;
        Ok(start.elapsed().as_secs_f64() * 1e3)
    }
}

/// Measures; `open` reads the model, once for every provider and number of threads.
///
/// # Errors
/// An empty plan, a provider that is not available, a model that does not run.
pub fn bench(open: &dyn Fn() -> Result<ModelFile>, options: &Options, plan: &Plan) -> Result<Vec<Row>> {
    if plan.providers.is_empty() || plan.threads.contains(&0) || plan.batches.contains(&0) {
        return Err(Error::Request("expected providers, and at least 1 thread and 1 image".to_owned()));
    }
    let mut rows = Vec::new();
    for &threads in &plan.threads {
        let load = |provider: &Provider| {
            Generator::load(
                open()?,
                &Options { provider: *provider, threads: Some(threads), ..options.clone() },
            )
        };
        let models = plan.providers.iter().map(load).collect::<Result<Vec<_>>>()?;
        for &batch in &plan.batches {
            let times = rounds(&models, batch, plan.time)?;
            for (model, ms) in models.iter().zip(times) {
                let (choice, ms) = (model.choice(), Times::of(ms));
                rows.push(Row {
                    provider: choice.provider,
                    engine: choice.engine.clone(),
                    threads,
                    batch,
                    ms,
                    images_per_second: batch as f64 * 1e3 / ms.median,
                });
            }
        }
    }
    Ok(rows)
}

/// Milliseconds of every evaluation, for each model.
fn rounds(models: &[Generator], batch: usize, time: Duration) -> Result<Vec<Vec<f64>>> {
    let inputs: Vec<Inputs> = models.iter().map(|model| Inputs::new(model, batch)).collect();
    let mut order: Vec<usize> = (0..models.len()).collect();
    for _ in 0..WARM_UP {
        for &i in &order {
            inputs[i].time(&models[i])?;
        }
    }
    let mut times = vec![Vec::new(); models.len()];
    let start = Instant::now();
    for round in 0..MOST_ROUNDS {
        if round >= LEAST_ROUNDS && start.elapsed() >= time {
            break;
        }
        for &i in &order {
            times[i].push(inputs[i].time(&models[i])?);
        }
        order.reverse();
    }
    Ok(times)
}

/// The most memory this process has had, in MiB; Linux says so, other systems are not asked.
pub fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(kib.trim().trim_end_matches("kB").trim().parse::<f64>().ok()? / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_of_known_times() {
        let times = Times::of((1..=100).rev().map(f64::from).collect());
        assert_eq!(times, Times { runs: 100, min: 1.0, median: 50.5, p95: 95.0, spread: 50.0 / 50.5 });
        let one = Times::of(vec![7.0]);
        assert_eq!((one.min, one.median, one.p95, one.spread), (7.0, 7.0, 7.0, 0.0));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_is_that_of_this_process() {
        let held = vec![1u8; 64 << 20];
        assert!(held.iter().all(|byte| *byte == 1));
        let peak = peak_memory().unwrap();
        assert!((64.0..1e6).contains(&peak), "{peak}");
    }
}
