//! Watches a distillation: what samples of fixed seeds look like over time, when they are best, when they collapse.
//! Losses say little (the matching loss stays near a constant, the critic's oscillates), so pictures are judged: by a
//! metric where there is one, and by brightness, contrast and diversity against the teacher's. No networks, no files.

use serde::{Deserialize, Serialize};

/// Smallest share of the teacher's diversity and contrast that is no alarm.
const LEAST: f64 = 0.5;
/// Largest difference from the teacher's brightness that is no alarm, as a share of the image range.
const SHIFT: f64 = 0.2;
/// Factor over the best metric that is an alarm.
const WORSE: f64 = 3.0;
/// Metrics below this are not told apart, so that noise around a good value is no alarm.
const NOISE: f64 = 0.01;
/// Alarms in a row that lead back to the best state.
const PATIENCE: u32 = 2;

/// What images look like as a whole, in units of the image range.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Look {
    /// Mean.
    pub brightness: f64,
    /// Standard deviation of all values.
    pub contrast: f64,
    /// Root mean squared difference between two images of one class.
    pub diversity: f64,
}

/// What has been seen so far; part of a run's saved state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Monitor {
    /// The teacher's look.
    pub reference: Option<Look>,
    /// Lowest metric, and the step it was seen at.
    pub best: Option<(f64, u64)>,
    /// Alarms since the last healthy look.
    pub alarms: u32,
    /// Returns to the best state.
    pub rollbacks: u32,
    /// Step of the last state that is kept to return to.
    #[serde(default)]
    pub kept: Option<u64>,
    /// Whether the samples have looked healthy before; the first ones, before distillation, do not.
    pub healthy: bool,
}

/// What to do after a look.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Verdict {
    /// Go on.
    Fine,
    /// Go on, and keep this state: it is the best, or without a metric the last that looked healthy.
    Best,
    /// Go on, and tell the user what is wrong.
    Alarm(String),
    /// Go back to the state that was kept.
    Rollback(String),
}

impl Look {
    /// Of images `[n, …]` as they are shown, clamped to `range`; image `k` and image `k + stride` have the same class.
    pub fn new(values: &[f32], n: usize, stride: usize, [lo, hi]: [f32; 2]) -> Self {
        let values: Vec<f32> = values.iter().map(|v| v.clamp(lo, hi)).collect();
        let span = f64::from(hi - lo);
        let size = values.len() / n.max(1);
        let count = values.len().max(1) as f64;
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / count;
        let variance = values.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / count;
        let (mut sum, mut compared) = (0.0, 0);
        for (a, b) in values.iter().zip(values.get(stride * size..).unwrap_or_default()) {
            sum += f64::from(a - b).powi(2);
            compared += 1;
        }
        let diversity = if compared == 0 { 0.0 } else { (sum / f64::from(compared)).sqrt() };
        Self {
            brightness: (mean - f64::from(lo)) / span,
            contrast: variance.sqrt() / span,
            diversity: diversity / span,
        }
    }

    /// What is wrong with it beside the teacher's.
    fn problem(&self, reference: &Self) -> Option<String> {
        let percent = |a: f64, b: f64| 100.0 * a / b.max(1e-9);
        if !self.brightness.is_finite() || !self.contrast.is_finite() {
            Some("samples hold values that are not finite".to_owned())
        } else if self.diversity < LEAST * reference.diversity {
            let share = percent(self.diversity, reference.diversity);
            Some(format!("samples resemble each other: diversity is {share:.0} % of the teacher's"))
        } else if self.contrast < LEAST * reference.contrast {
            let share = percent(self.contrast, reference.contrast);
            Some(format!("samples are flat: contrast is {share:.0} % of the teacher's"))
        } else if (self.brightness - reference.brightness).abs() > SHIFT {
            let (got, expected) = (100.0 * self.brightness, 100.0 * reference.brightness);
            Some(format!("brightness is {got:.0} %, the teacher's {expected:.0} %"))
        } else {
            None
        }
    }
}

impl Monitor {
    /// Judges the samples after `step`; `metric` is lower for better ones.
    pub fn judge(&mut self, step: u64, look: &Look, metric: Option<f64>) -> Verdict {
        let worse = |best: f64, now: f64| now > WORSE * best.max(NOISE);
        let looks = self.reference.and_then(|reference| look.problem(&reference));
        let measured = match (self.best, metric) {
            (Some((best, at)), Some(now)) if worse(best, now) || !now.is_finite() => {
                Some(format!("the metric is {now:.4} after {best:.4} at step {at}"))
            }
            _ => None,
        };
        match looks.or(measured) {
            None => {
                self.alarms = 0;
                self.healthy = true;
                match (metric, self.best) {
                    (None, _) => Verdict::Best,
                    (Some(now), Some((best, _))) if now >= best => Verdict::Fine,
                    (Some(now), _) => {
                        self.best = Some((now, step));
                        Verdict::Best
                    }
                }
            }
            Some(_) if !self.healthy => Verdict::Fine,
            Some(problem) => {
                self.alarms += 1;
                if self.alarms < PATIENCE {
                    return Verdict::Alarm(problem);
                }
                self.alarms = 0;
                self.rollbacks += 1;
                Verdict::Rollback(problem)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn monitor() -> Monitor {
        let reference = Look { brightness: 0.3, contrast: 0.3, diversity: 0.2 };
        Monitor { reference: Some(reference), ..Monitor::default() }
    }

    #[test]
    fn a_look_is_in_units_of_the_range() {
        let look = Look::new(&[-1.0, 1.0, -1.0, 1.0, -1.0, -1.0], 3, 1, [-1.0, 1.0]);
        assert!((look.brightness - 1.0 / 3.0).abs() < 1e-12);
        assert!((look.contrast - (2.0f64 / 9.0).sqrt()).abs() < 1e-12);
        assert!(
            (look.diversity - 0.5).abs() < 1e-12,
            "one of four compared values differs by the whole range"
        );
    }

    #[test]
    fn the_best_is_kept_and_a_collapse_leads_back() {
        let (mut m, good) = (monitor(), Look { brightness: 0.32, contrast: 0.29, diversity: 0.19 });
        let flat = Look { diversity: 0.02, ..good };
        assert_eq!(m.judge(0, &flat, Some(2.0)), Verdict::Fine, "nothing was healthy yet");
        assert_eq!(m.judge(100, &good, Some(0.5)), Verdict::Best);
        assert_eq!(m.judge(200, &good, Some(0.6)), Verdict::Fine);
        assert_eq!(m.judge(300, &good, Some(0.4)), Verdict::Best);
        assert!(
            matches!(m.judge(400, &flat, Some(0.4)), Verdict::Alarm(p) if p.contains("10 % of the teacher's"))
        );
        assert!(matches!(m.judge(500, &flat, Some(0.4)), Verdict::Rollback(_)));
        assert_eq!((m.best, m.rollbacks, m.alarms), (Some((0.4, 300)), 1, 0));
    }

    #[test]
    fn one_bad_look_is_forgotten() {
        let (mut m, good) = (monitor(), Look { brightness: 0.32, contrast: 0.29, diversity: 0.19 });
        assert_eq!(m.judge(1, &good, None), Verdict::Best, "without a metric, every healthy look");
        for (step, bad) in [
            Look { brightness: 0.6, ..good },
            Look { contrast: 0.1, ..good },
            Look { brightness: f64::NAN, ..good },
        ]
        .into_iter()
        .enumerate()
        {
            assert!(matches!(m.judge(step as u64, &bad, None), Verdict::Alarm(_)), "{bad:?}");
            assert_eq!(m.judge(step as u64, &good, None), Verdict::Best);
        }
        assert_eq!(m.rollbacks, 0);
    }

    #[test]
    fn a_metric_that_grows_is_an_alarm_beyond_its_noise() {
        let (mut m, good) = (monitor(), Look { brightness: 0.3, contrast: 0.3, diversity: 0.2 });
        assert_eq!(m.judge(1, &good, Some(-0.001)), Verdict::Best);
        assert_eq!(m.judge(2, &good, Some(0.02)), Verdict::Fine);
        assert!(matches!(m.judge(3, &good, Some(0.05)), Verdict::Alarm(_)));
        assert!(matches!(m.judge(4, &good, Some(f64::NAN)), Verdict::Rollback(_)));
    }
}
