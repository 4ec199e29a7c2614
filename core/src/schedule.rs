//! DDPM noise schedule and the coefficients of the samplers.
//! Ho et al. 2020 (arXiv:2006.11239), Eq. 4; Song et al. 2021 (DDIM, arXiv:2010.02502), Eq. 12.
//! f64 inside, f32 at the point of use. Invariant: no tensors, no randomness, no file access.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::Keys;
use crate::{Error, Result};

/// How `betas` grow from step to step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BetaSchedule {
    /// Evenly spaced.
    Linear,
    /// Evenly spaced square roots.
    ScaledLinear,
    /// Nichol and Dhariwal 2021 (arXiv:2102.09672), Eq. 17; ignores `beta_start` and `beta_end`.
    SquaredcosCapV2,
}

/// `scheduler_config.json` of diffusers, as far as it describes the forward process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct ScheduleConfig {
    /// Number of noise levels the teacher was trained with.
    pub num_train_timesteps: usize,
    /// Shape of the schedule.
    pub beta_schedule: BetaSchedule,
    /// `betas[0]`.
    pub beta_start: f64,
    /// `betas[num_train_timesteps - 1]`.
    pub beta_end: f64,
}

impl TryFrom<Map<String, Value>> for ScheduleConfig {
    type Error = Error;

    fn try_from(map: Map<String, Value>) -> Result<Self> {
        let mut keys = Keys(map);
        let config = Self {
            num_train_timesteps: keys.take("num_train_timesteps", 1000)?,
            beta_schedule: keys.take("beta_schedule", BetaSchedule::Linear)?,
            beta_start: keys.take("beta_start", 1e-4)?,
            beta_end: keys.take("beta_end", 2e-2)?,
        };
        keys.only("prediction_type", json!("epsilon"))?;
        keys.only("trained_betas", Value::Null)?;
        keys.only("rescale_betas_zero_snr", json!(false))?;
        for sampling_only in [
            "variance_type",
            "clip_sample",
            "clip_sample_range",
            "thresholding",
            "dynamic_thresholding_ratio",
            "sample_max_value",
            "timestep_spacing",
            "steps_offset",
            "set_alpha_to_one",
        ] {
            keys.0.remove(sampling_only);
        }
        keys.finish()?;
        if !(2..=100_000).contains(&config.num_train_timesteps) {
            return Err(Error::config(
                "num_train_timesteps",
                format!("got {}, expected 2 to 100000", config.num_train_timesteps),
            ));
        }
        if !(0.0 < config.beta_start && config.beta_start <= config.beta_end && config.beta_end < 1.0) {
            return Err(Error::config(
                "beta_start",
                format!(
                    "got {} to {}, expected 0 < beta_start <= beta_end < 1",
                    config.beta_start, config.beta_end
                ),
            ));
        }
        Ok(config)
    }
}

impl From<ScheduleConfig> for Map<String, Value> {
    fn from(c: ScheduleConfig) -> Self {
        [
            ("_class_name", json!("DDPMScheduler")),
            ("num_train_timesteps", json!(c.num_train_timesteps)),
            ("beta_schedule", json!(c.beta_schedule)),
            ("beta_start", json!(c.beta_start)),
            ("beta_end", json!(c.beta_end)),
            ("prediction_type", json!("epsilon")),
        ]
        .into_iter()
        .map(|(k, v)| (k.to_owned(), v))
        .collect()
    }
}

/// The tables of a forward process `x_t = alpha_t·x0 + sigma_t·eps`.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// Noise added at each step.
    pub betas: Vec<f64>,
    /// Cumulative product of `1 − betas`; index 0 is one noise step.
    pub alphas_cumprod: Vec<f64>,
}

/// One step of a deterministic sampler: `x_s = x0_coef·x0_pred + eps_coef·eps_pred`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DdimStep {
    /// Step the network is asked at.
    pub t: usize,
    /// `alpha_t` at `t`.
    pub alpha_t: f64,
    /// `sigma_t` at `t`.
    pub sigma_t: f64,
    /// `alpha_t` of the step that follows; 1 at the end.
    pub x0_coef: f64,
    /// `sigma_t` of the step that follows; 0 at the end.
    pub eps_coef: f64,
}

impl Schedule {
    /// Builds the tables.
    pub fn new(config: &ScheduleConfig) -> Self {
        let n = config.num_train_timesteps;
        let at = |i: usize, from: f64, to: f64| from + (to - from) * i as f64 / (n - 1) as f64;
        let cosine = |i: usize| {
            let c = libm::cos((i as f64 / n as f64 + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2);
            c * c
        };
        let betas: Vec<f64> = (0..n)
            .map(|i| match config.beta_schedule {
                BetaSchedule::Linear => at(i, config.beta_start, config.beta_end),
                BetaSchedule::ScaledLinear => {
                    let root = at(i, config.beta_start.sqrt(), config.beta_end.sqrt());
                    root * root
                }
                BetaSchedule::SquaredcosCapV2 => (1.0 - cosine(i + 1) / cosine(i)).min(0.999),
            })
            .collect();
        let alphas_cumprod = betas
            .iter()
            .scan(1.0, |product, beta| {
                *product *= 1.0 - beta;
                Some(*product)
            })
            .collect();
        Self { betas, alphas_cumprod }
    }

    /// Number of noise levels.
    pub fn num_train_timesteps(&self) -> usize {
        self.betas.len()
    }

    /// `sqrt(alphas_cumprod[t])`: how much of the image is left.
    pub fn alpha_t(&self, t: usize) -> f64 {
        self.alphas_cumprod[t].sqrt()
    }

    /// `sqrt(1 − alphas_cumprod[t])`: how much noise there is.
    pub fn sigma_t(&self, t: usize) -> f64 {
        (1.0 - self.alphas_cumprod[t]).sqrt()
    }

    /// The step whose `sigma_t / alpha_t` is nearest to `sigma_edm`.
    pub fn nearest_step(&self, sigma_edm: f64) -> usize {
        let distance = |t: usize| (self.sigma_t(t) / self.alpha_t(t) / sigma_edm).ln().abs();
        (0..self.num_train_timesteps()).min_by(|&a, &b| distance(a).total_cmp(&distance(b))).unwrap_or(0)
    }

    /// DDIM with eta = 0 in `steps` network evaluations, from pure noise at the last step to the image.
    ///
    /// Steps are spaced as diffusers' `trailing`: `round(T − i·T/steps) − 1`, so that every count starts at T − 1.
    pub fn ddim(&self, steps: usize) -> Result<Vec<DdimStep>> {
        let total = self.num_train_timesteps();
        if steps == 0 || steps > total {
            return Err(Error::Request(format!("got {steps} steps, expected 1 to {total}")));
        }
        let t_at = |i: usize| (total as f64 - i as f64 * total as f64 / steps as f64).round() as usize - 1;
        Ok((0..steps)
            .map(|i| {
                let t = t_at(i);
                let (x0_coef, eps_coef) = if i + 1 == steps {
                    (1.0, 0.0)
                } else {
                    (self.alpha_t(t_at(i + 1)), self.sigma_t(t_at(i + 1)))
                };
                DdimStep { t, alpha_t: self.alpha_t(t), sigma_t: self.sigma_t(t), x0_coef, eps_coef }
            })
            .collect())
    }
}

impl DdimStep {
    /// Replaces `x_t` by the next, less noisy image.
    ///
    /// `clip` is the value range that `x0_pred` is cut to, as DDPM samplers do (`clip_sample`); `eps_pred` is then
    /// recomputed from the cut image, so that the step stays on the trajectory. Song et al. 2021, Eq. 12.
    ///
    /// # Shapes
    /// `x_t` and `eps_pred` have the same number of elements, in any layout.
    pub fn apply(&self, x_t: &mut [f32], eps_pred: &[f32], clip: Option<[f32; 2]>) {
        let (alpha, sigma) = (self.alpha_t as f32, self.sigma_t as f32);
        let (a, b) = (self.x0_coef as f32, self.eps_coef as f32);
        for (x, &eps) in x_t.iter_mut().zip(eps_pred) {
            let mut x0 = (*x - sigma * eps) / alpha;
            let mut direction = eps;
            if let Some([lo, hi]) = clip {
                x0 = x0.clamp(lo, hi);
                direction = (*x - alpha * x0) / sigma;
            }
            *x = a * x0 + b * direction;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear() -> Schedule {
        Schedule::new(&ScheduleConfig {
            num_train_timesteps: 1000,
            beta_schedule: BetaSchedule::Linear,
            beta_start: 1e-4,
            beta_end: 2e-2,
        })
    }

    #[test]
    fn the_ddpm_schedule_has_its_published_end() {
        let s = linear();
        assert!((s.alpha_t(999) - 0.006353).abs() < 1e-6);
        assert!((s.sigma_t(999) - 0.999980).abs() < 1e-6);
        assert_eq!(s.nearest_step(2.5), 440);
    }

    #[test]
    fn ddim_starts_at_the_last_step_and_ends_at_the_image() {
        for steps in [1, 2, 7, 50, 1000] {
            let path = linear().ddim(steps).unwrap();
            assert_eq!((path.len(), path[0].t), (steps, 999));
            assert_eq!((path[steps - 1].x0_coef, path[steps - 1].eps_coef), (1.0, 0.0));
            assert!(path.windows(2).all(|w| w[0].t > w[1].t));
        }
        assert!(linear().ddim(0).is_err());
        assert!(linear().ddim(1001).is_err());
    }

    #[test]
    fn a_true_noise_prediction_leads_back_to_the_image() {
        let (x0, eps) = (0.3f32, -1.2f32);
        for steps in [1, 5] {
            let path = linear().ddim(steps).unwrap();
            let mut x = [(path[0].alpha_t as f32) * x0 + (path[0].sigma_t as f32) * eps];
            for step in &path {
                step.apply(&mut x, &[eps], None);
            }
            assert!((x[0] - x0).abs() < 1e-4, "{steps} steps: {x:?}");
        }
    }

    #[test]
    fn an_unknown_scheduler_key_is_refused_by_name() {
        let err =
            serde_json::from_str::<ScheduleConfig>(r#"{"prediction_type":"v_prediction"}"#).unwrap_err();
        assert!(err.to_string().contains("prediction_type"), "{err}");
        let err = serde_json::from_str::<ScheduleConfig>(r#"{"use_karras_sigmas":true}"#).unwrap_err();
        assert!(err.to_string().contains("use_karras_sigmas"), "{err}");
    }
}
