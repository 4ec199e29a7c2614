//! Samplers of a base: DDIM (Song et al. 2021, arXiv:2010.02502), ancestral DDPM (Ho et al. 2020, arXiv:2006.11239) and
//! Heun's method on the probability flow (Karras et al. 2022, arXiv:2206.00364). Every runtime drives its network
//! through [`Trajectory::run`]. Coefficients in f64, images in f32. Invariant: no tensors, no file access.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::schedule::{Prediction, Schedule, Variance};
use crate::{Error, Result};

/// Steps of a base where nobody says how many: with DDIM they lose little against all.
pub const TEACHER_STEPS: usize = 50;

/// A way from noise to an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sampler {
    /// Deterministic, one evaluation per step; eta = 0.
    Ddim,
    /// Ancestral: adds fresh noise at every step.
    Ddpm,
    /// Deterministic, second order; two evaluations per step but the last.
    Heun,
}

impl Sampler {
    /// All, as the command lines name them.
    pub const NAMES: [&str; 3] = ["ddim", "ddpm", "heun"];
}

impl FromStr for Sampler {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "ddim" => Ok(Self::Ddim),
            "ddpm" => Ok(Self::Ddpm),
            "heun" => Ok(Self::Heun),
            _ => Err(Error::Request(format!(
                "got sampler `{name}`, expected one of `{}`",
                Self::NAMES.join("`, `")
            ))),
        }
    }
}

impl fmt::Display for Sampler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(Self::NAMES[*self as usize])
    }
}

/// One noise level on the way.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Level {
    t: usize,
    alpha: f64,
    sigma: f64,
}

/// The image itself: no noise left.
const IMAGE: Level = Level { t: 0, alpha: 1.0, sigma: 0.0 };

/// A sampler with its steps.
#[derive(Clone, Debug)]
pub struct Trajectory {
    sampler: Sampler,
    levels: Vec<Level>,
    prediction: Prediction,
    variance: Variance,
    clip: Option<[f32; 2]>,
}

impl Trajectory {
    /// `steps` steps from pure noise at T − 1 to the image. They are spaced as diffusers' `trailing`:
    /// `round(T − i·T/steps) − 1`. `range` is the image range, to which a predicted `x0` is cut if the schedule says so.
    ///
    /// # Errors
    /// Fewer than 1 step or more than the schedule has.
    pub fn new(schedule: &Schedule, sampler: Sampler, steps: usize, range: [f32; 2]) -> Result<Self> {
        let total = schedule.num_train_timesteps();
        if steps == 0 || steps > total {
            return Err(Error::Request(format!("got {steps} steps, expected 1 to {total}")));
        }
        let level = |i: usize| {
            let t = (total as f64 - i as f64 * total as f64 / steps as f64).round() as usize - 1;
            Level { t, alpha: schedule.alpha_t(t), sigma: schedule.sigma_t(t) }
        };
        let clip = schedule.clip.map(|factor| {
            let [lo, hi] = range.map(f64::from);
            let (middle, half) = ((lo + hi) / 2.0, (hi - lo) / 2.0 * factor);
            [(middle - half) as f32, (middle + half) as f32]
        });
        let levels = (0..steps).map(level).collect();
        Ok(Self { sampler, levels, prediction: schedule.prediction, variance: schedule.variance, clip })
    }

    /// Steps at which the network is asked, from noise to image.
    pub fn timesteps(&self) -> impl Iterator<Item = usize> {
        self.levels.iter().map(|level| level.t)
    }

    /// Evaluations of the network per image.
    pub fn evaluations(&self) -> usize {
        match self.sampler {
            Sampler::Ddim | Sampler::Ddpm => self.levels.len(),
            Sampler::Heun => 2 * self.levels.len() - 1,
        }
    }

    /// Turns noise into images in place.
    ///
    /// `predict` is the network's output at a step `t`; `noise` fills its argument with the fresh standard normal
    /// noise of step number `i` (only ancestral sampling asks; see [`crate::noise::step_noise`]).
    ///
    /// # Shapes
    /// `x` and the results of `predict` have the same number of values, in any layout.
    pub fn run<E>(
        &self,
        x: &mut [f32],
        mut predict: impl FnMut(usize, &[f32]) -> std::result::Result<Vec<f32>, E>,
        mut noise: impl FnMut(usize, &mut [f32]),
    ) -> std::result::Result<(), E> {
        for (i, level) in self.levels.iter().enumerate() {
            let next = self.levels.get(i + 1).copied();
            let prediction = predict(level.t, x)?;
            match (self.sampler, next) {
                (Sampler::Ddpm, Some(next)) => {
                    let mut fresh = vec![0.0; x.len()];
                    noise(i, &mut fresh);
                    self.ancestral(*level, next, x, &prediction, &fresh);
                }
                (Sampler::Heun, Some(next)) => {
                    let (before, slope) = (x.to_vec(), self.noise_direction(*level, x, &prediction));
                    self.ddim(*level, next, x, &prediction);
                    let prediction = predict(next.t, x)?;
                    let second = self.noise_direction(next, x, &prediction);
                    let ratio = (next.alpha / level.alpha) as f32;
                    let step = next.alpha * (next.sigma / next.alpha - level.sigma / level.alpha) / 2.0;
                    for (((x, before), a), b) in x.iter_mut().zip(before).zip(slope).zip(second) {
                        *x = ratio * before + step as f32 * (a + b);
                    }
                }
                _ => self.ddim(*level, next.unwrap_or(IMAGE), x, &prediction),
            }
        }
        Ok(())
    }

    /// The image that a prediction implies, cut.
    fn x0(&self, level: Level, x_t: f32, prediction: f32) -> f32 {
        let (alpha, sigma) = (level.alpha as f32, level.sigma as f32);
        let x0 = match self.prediction {
            Prediction::Epsilon => (x_t - sigma * prediction) / alpha,
            Prediction::Sample => prediction,
            Prediction::Velocity => alpha * x_t - sigma * prediction,
        };
        match self.clip {
            Some([lo, hi]) => x0.clamp(lo, hi),
            None => x0,
        }
    }

    /// The noise that goes with the image [`Self::x0`], so that both lie on the trajectory.
    fn eps(&self, level: Level, x_t: f32, prediction: f32, x0: f32) -> f32 {
        match (self.prediction, self.clip) {
            (Prediction::Epsilon, None) => prediction,
            _ => (x_t - level.alpha as f32 * x0) / level.sigma as f32,
        }
    }

    fn noise_direction(&self, level: Level, x: &[f32], prediction: &[f32]) -> Vec<f32> {
        let pairs = x.iter().zip(prediction);
        pairs.map(|(x, p)| self.eps(level, *x, *p, self.x0(level, *x, *p))).collect()
    }

    /// `x_s = alpha_s·x0 + sigma_s·eps`. Song et al. 2021, Eq. 12 with eta = 0.
    fn ddim(&self, level: Level, next: Level, x: &mut [f32], prediction: &[f32]) {
        let (a, b) = (next.alpha as f32, next.sigma as f32);
        for (x, p) in x.iter_mut().zip(prediction) {
            let x0 = self.x0(level, *x, *p);
            *x = a * x0 + b * self.eps(level, *x, *p, x0);
        }
    }

    /// A draw from `q(x_s | x_t, x0)`. Ho et al. 2020, Eq. 6 and 7, between levels that need not be neighbours.
    fn ancestral(&self, level: Level, next: Level, x: &mut [f32], prediction: &[f32], noise: &[f32]) {
        let (kept, kept_next) = (level.alpha * level.alpha, next.alpha * next.alpha);
        let beta = 1.0 - kept / kept_next;
        let of_x0 = (next.alpha * beta / (1.0 - kept)) as f32;
        let of_x = (level.alpha / next.alpha * (1.0 - kept_next) / (1.0 - kept)) as f32;
        let deviation = match self.variance {
            Variance::Small => (beta * (1.0 - kept_next) / (1.0 - kept)).sqrt(),
            Variance::Large => beta.sqrt(),
        } as f32;
        for ((x, p), noise) in x.iter_mut().zip(prediction).zip(noise) {
            *x = of_x0 * self.x0(level, *x, *p) + of_x * *x + deviation * noise;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::schedule::ScheduleConfig;

    fn schedule(text: &str) -> Schedule {
        Schedule::new(&serde_json::from_str::<ScheduleConfig>(text).unwrap())
    }

    #[test]
    fn every_count_starts_at_the_last_step() {
        for steps in [1, 2, 7, 50, 1000] {
            let path = Trajectory::new(&schedule("{}"), Sampler::Ddim, steps, [-1.0, 1.0]).unwrap();
            let t: Vec<usize> = path.timesteps().collect();
            assert_eq!((t.len(), t[0]), (steps, 999));
            assert!(t.windows(2).all(|w| w[0] > w[1]));
        }
        for steps in [0, 1001] {
            assert!(Trajectory::new(&schedule("{}"), Sampler::Ddim, steps, [-1.0, 1.0]).is_err());
        }
    }

    /// A network that knows the image is led back to it by every sampler, whatever it says about it.
    #[test]
    fn a_true_prediction_leads_to_the_image() {
        let x0 = 0.3f32;
        for sampler in [Sampler::Ddim, Sampler::Ddpm, Sampler::Heun] {
            for prediction in ["epsilon", "sample", "v_prediction"] {
                for clip in [true, false] {
                    let text = format!(r#"{{"prediction_type":"{prediction}","clip_sample":{clip}}}"#);
                    let s = schedule(&text);
                    let path = Trajectory::new(&s, sampler, 20, [-1.0, 1.0]).unwrap();
                    let (mut x, mut asked) = ([-1.2f32], 0);
                    let mut predict = |t: usize, x: &[f32]| {
                        asked += 1;
                        let (alpha, sigma) = (s.alpha_t(t), s.sigma_t(t));
                        let eps = (f64::from(x[0]) - alpha * f64::from(x0)) / sigma;
                        let (of_x0, of_eps) = s.prediction.target_factors(alpha, sigma);
                        Ok::<_, Infallible>(vec![(of_x0 * f64::from(x0) + of_eps * eps) as f32])
                    };
                    path.run(&mut x, &mut predict, |_, noise| noise.fill(0.7)).unwrap();
                    assert_eq!(asked, path.evaluations());
                    assert!((x[0] - x0).abs() < 1e-3, "{sampler}, {prediction}, {clip}: {x:?}");
                }
            }
        }
    }

    #[test]
    fn image_and_noise_lie_on_the_trajectory() {
        for prediction in ["epsilon", "sample", "v_prediction"] {
            for clip in [true, false] {
                let text = format!(r#"{{"prediction_type":"{prediction}","clip_sample":{clip}}}"#);
                let s = schedule(&text);
                let path = Trajectory::new(&s, Sampler::Ddim, 20, [-1.0, 1.0]).unwrap();
                let level = Level { t: 300, alpha: s.alpha_t(300), sigma: s.sigma_t(300) };
                let x0 = path.x0(level, 0.9, 0.4);
                let x_t = level.alpha as f32 * x0 + level.sigma as f32 * path.eps(level, 0.9, 0.4, x0);
                assert!((x_t - 0.9).abs() < 1e-6, "{prediction}, {clip}: {x_t}");
            }
        }
    }

    /// For data N(0, s²) the network is linear and the flow is known: `x_T·s/sqrt(alpha_T²·s² + sigma_T²)`.
    #[test]
    fn heun_is_closer_to_the_flow_than_ddim() {
        let (s, deviation) = (schedule(r#"{"clip_sample":false}"#), 0.5f64);
        let variance = |t: usize| s.alpha_t(t).powi(2) * deviation.powi(2) + s.sigma_t(t).powi(2);
        let exact = 1.5 * deviation / variance(999).sqrt();
        let error = |sampler: Sampler, steps: usize| {
            let path = Trajectory::new(&s, sampler, steps, [-1.0, 1.0]).unwrap();
            let mut x = [1.5f32];
            let predict = |t: usize, x: &[f32]| {
                Ok::<_, Infallible>(vec![(f64::from(x[0]) * s.sigma_t(t) / variance(t)) as f32])
            };
            path.run(&mut x, predict, |_, _| {}).unwrap();
            (f64::from(x[0]) - exact).abs()
        };
        let (euler, heun) = (error(Sampler::Ddim, 20), error(Sampler::Heun, 20));
        assert!(heun < euler / 3.0, "DDIM {euler}, Heun {heun}");
        assert!(error(Sampler::Ddim, 200) < euler / 5.0);
    }

    /// The mean and variance of Ho et al. 2020, Eq. 6 and 7, between neighbours, where they are stated in `betas`.
    #[test]
    fn an_ancestral_step_draws_from_the_posterior() {
        for (variance, small) in [("fixed_small", true), ("fixed_large", false)] {
            let text = format!(
                r#"{{"trained_betas":[0.1,0.2,0.3],"prediction_type":"sample","clip_sample":false,"variance_type":"{variance}"}}"#
            );
            let s = schedule(&text);
            let path = Trajectory::new(&s, Sampler::Ddpm, 3, [-1.0, 1.0]).unwrap();
            let (x0, start, mut seen) = (0.4f32, -1.2f32, Vec::new());
            let mut x = [start];
            let predict = |_: usize, x: &[f32]| {
                seen.push(x[0]);
                Ok::<_, Infallible>(vec![x0])
            };
            path.run(&mut x, predict, |_, noise| noise.fill(1.0)).unwrap();
            let mut x_t = f64::from(start);
            for (t, got) in [2, 1].into_iter().zip(&seen[1..]) {
                let (beta, kept, before) = (s.betas[t], s.alphas_cumprod[t], s.alphas_cumprod[t - 1]);
                let mean = before.sqrt() * beta / (1.0 - kept) * f64::from(x0)
                    + (1.0 - beta).sqrt() * (1.0 - before) / (1.0 - kept) * x_t;
                let variance = if small { (1.0 - before) / (1.0 - kept) * beta } else { beta };
                x_t = mean + variance.sqrt();
                assert!((f64::from(*got) - x_t).abs() < 1e-6, "{text}, step {t}: {got}, expected {x_t}");
            }
            assert_eq!(x, [x0]);
        }
    }

    /// `clip_sample_range` times half of the range, around its middle, wherever that is.
    #[test]
    fn images_are_cut_around_the_middle_of_their_range() {
        let s = schedule(r#"{"prediction_type":"sample","clip_sample_range":2.0}"#);
        for (range, cut) in [([0.0, 1.0], [-0.5, 1.5]), ([-1.0, 1.0], [-2.0, 2.0]), ([1.0, 5.0], [-1.0, 7.0])]
        {
            let path = Trajectory::new(&s, Sampler::Ddim, 1, range).unwrap();
            let mut x = [0.0, 0.0, 0.0];
            path.run(&mut x, |_, _| Ok::<_, Infallible>(vec![-9.0, 0.75, 9.0]), |_, _| {}).unwrap();
            assert_eq!(x, [cut[0], 0.75, cut[1]], "{range:?}");
        }
    }

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in Sampler::NAMES {
            assert_eq!(name.parse::<Sampler>().unwrap().to_string(), name);
        }
        assert!("euler".parse::<Sampler>().unwrap_err().to_string().contains("`ddim`, `ddpm`, `heun`"));
    }
}
