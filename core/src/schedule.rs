//! DDPM noise schedule: `x_t = alpha_t·x0 + sigma_t·eps` (Ho et al. 2020, arXiv:2006.11239, Eq. 4), and what a network
//! says about it. f64 inside, f32 at the point of use. Invariant: no tensors, no randomness, no file access.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::config::{Keys, ModelConfig};
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

/// What a network says about `x_t = alpha_t·x0 + sigma_t·eps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Prediction {
    /// The noise `eps`.
    #[serde(rename = "epsilon")]
    Epsilon,
    /// The image `x0`.
    #[serde(rename = "sample")]
    Sample,
    /// `v = alpha_t·eps − sigma_t·x0`. Salimans and Ho 2022 (arXiv:2202.00512), appendix D.
    #[serde(rename = "v_prediction")]
    Velocity,
}

/// Variance of the noise that ancestral sampling adds; Ho et al. 2020, section 3.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Variance {
    /// That of the true posterior if `x0` is known.
    #[serde(rename = "fixed_small", alias = "fixed_small_log")]
    Small,
    /// That of the forward step.
    #[serde(rename = "fixed_large")]
    Large,
}

/// `scheduler_config.json` of diffusers: the forward process, what the network predicts, and how it is sampled.
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
    /// The betas themselves, instead of a formula.
    pub trained_betas: Option<Vec<f64>>,
    /// What the network predicts.
    pub prediction_type: Prediction,
    /// Noise of ancestral sampling.
    pub variance_type: Variance,
    /// Samplers cut the image a network predicts to this many times half the image range around its middle; none
    /// does not cut (`clip_sample`, `clip_sample_range`).
    pub clip: Option<f64>,
}

impl TryFrom<Map<String, Value>> for ScheduleConfig {
    type Error = Error;

    fn try_from(map: Map<String, Value>) -> Result<Self> {
        let mut keys = Keys(map);
        let trained_betas: Option<Vec<f64>> = keys.take("trained_betas", None)?;
        let steps = trained_betas.as_ref().map_or(1000, Vec::len);
        let clip_sample = keys.take("clip_sample", true)?;
        let clip_range = keys.take("clip_sample_range", 1.0)?;
        let config = Self {
            num_train_timesteps: keys.take("num_train_timesteps", steps)?,
            beta_schedule: keys.take("beta_schedule", BetaSchedule::Linear)?,
            beta_start: keys.take("beta_start", 1e-4)?,
            beta_end: keys.take("beta_end", 2e-2)?,
            prediction_type: keys.take("prediction_type", Prediction::Epsilon)?,
            variance_type: keys.take("variance_type", Variance::Small)?,
            clip: if clip_sample { Some(clip_range) } else { None },
            trained_betas,
        };
        keys.only("rescale_betas_zero_snr", json!(false))?;
        keys.only("thresholding", json!(false))?;
        for of_no_consequence_here in [
            "dynamic_thresholding_ratio",
            "sample_max_value",
            "timestep_spacing",
            "steps_offset",
            "set_alpha_to_one",
            "tensor_format", // 2022's choice between PyTorch and NumPy
        ] {
            keys.0.remove(of_no_consequence_here);
        }
        keys.finish()?;
        config.check()?;
        Ok(config)
    }
}

impl ScheduleConfig {
    /// Whether a network knows all steps of this schedule: `ContextUnet` takes the step as `t / n_steps` with `t` from 0 to
    /// `n_steps`, `CelebaUNet` from a table of `n_steps` rows.
    ///
    /// # Errors
    /// Names both numbers.
    pub fn check_network(&self, network: &ModelConfig) -> Result<()> {
        let steps = self.num_train_timesteps;
        let (fits, n_steps, expected) = match network {
            ModelConfig::ContextUnet(c) => (steps == c.n_steps + 1, c.n_steps, c.n_steps + 1),
            ModelConfig::CelebaUnet(c) => (steps <= c.n_steps, c.n_steps, c.n_steps),
            ModelConfig::UNet2D(_) => return Ok(()),
        };
        if fits {
            return Ok(());
        }
        let problem = format!(
            "got {steps} in scheduler_config.json, expected {expected} from `n_steps` {n_steps} in config.json"
        );
        Err(Error::config("num_train_timesteps", problem))
    }

    fn check(&self) -> Result<()> {
        let wrong = |key: &str, problem: String| Err(Error::config(key, problem));
        if !(2..=100_000).contains(&self.num_train_timesteps) {
            return wrong(
                "num_train_timesteps",
                format!("got {}, expected 2 to 100000", self.num_train_timesteps),
            );
        }
        if !(0.0 < self.beta_start && self.beta_start <= self.beta_end && self.beta_end < 1.0) {
            let (start, end) = (self.beta_start, self.beta_end);
            return wrong(
                "beta_start",
                format!("got {start} to {end}, expected 0 < beta_start <= beta_end < 1"),
            );
        }
        if self.clip.is_some_and(|range| !(range > 0.0 && range.is_finite())) {
            return wrong("clip_sample_range", "expected a positive number".to_owned());
        }
        if let Some(betas) = &self.trained_betas {
            if betas.len() != self.num_train_timesteps {
                let problem =
                    format!("got {} values, expected {} steps", betas.len(), self.num_train_timesteps);
                return wrong("trained_betas", problem);
            }
            if let Some(bad) = betas.iter().find(|beta| !(0.0 < **beta && **beta < 1.0)) {
                return wrong("trained_betas", format!("got {bad}, expected values between 0 and 1"));
            }
        }
        Ok(())
    }
}

impl From<ScheduleConfig> for Map<String, Value> {
    fn from(c: ScheduleConfig) -> Self {
        let always = [
            ("_class_name", json!("DDPMScheduler")),
            ("num_train_timesteps", json!(c.num_train_timesteps)),
            ("beta_schedule", json!(c.beta_schedule)),
            ("beta_start", json!(c.beta_start)),
            ("beta_end", json!(c.beta_end)),
            ("prediction_type", json!(c.prediction_type)),
            ("variance_type", json!(c.variance_type)),
            ("clip_sample", json!(c.clip.is_some())),
        ];
        let range = c.clip.filter(|range| *range != 1.0).map(|range| ("clip_sample_range", json!(range)));
        let trained = c.trained_betas.map(|betas| ("trained_betas", json!(betas)));
        always.into_iter().chain(range).chain(trained).map(|(k, v)| (k.to_owned(), v)).collect()
    }
}

impl Prediction {
    /// The image that a prediction implies, as factors of `x_t` and of the prediction.
    pub fn x0_factors(self, alpha_t: f64, sigma_t: f64) -> (f64, f64) {
        match self {
            Self::Epsilon => (1.0 / alpha_t, -sigma_t / alpha_t),
            Self::Sample => (0.0, 1.0),
            Self::Velocity => (alpha_t, -sigma_t),
        }
    }

    /// What the network is trained to say, as factors of `x0` and of `eps`.
    pub fn target_factors(self, alpha_t: f64, sigma_t: f64) -> (f64, f64) {
        match self {
            Self::Epsilon => (0.0, 1.0),
            Self::Sample => (1.0, 0.0),
            Self::Velocity => (-sigma_t, alpha_t),
        }
    }
}

/// The tables of a forward process `x_t = alpha_t·x0 + sigma_t·eps`.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// Noise added at each step.
    pub betas: Vec<f64>,
    /// Cumulative product of `1 − betas`; index 0 is one noise step.
    pub alphas_cumprod: Vec<f64>,
    /// What the network predicts.
    pub prediction: Prediction,
    /// Noise of ancestral sampling.
    pub variance: Variance,
    /// See [`ScheduleConfig::clip`].
    pub clip: Option<f64>,
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
        let formula = (0..n).map(|i| match config.beta_schedule {
            BetaSchedule::Linear => at(i, config.beta_start, config.beta_end),
            BetaSchedule::ScaledLinear => {
                let root = at(i, config.beta_start.sqrt(), config.beta_end.sqrt());
                root * root
            }
            BetaSchedule::SquaredcosCapV2 => (1.0 - cosine(i + 1) / cosine(i)).min(0.999),
        });
        let betas: Vec<f64> = config.trained_betas.clone().unwrap_or_else(|| formula.collect());
        let alphas_cumprod = betas
            .iter()
            .scan(1.0, |product, beta| {
                *product *= 1.0 - beta;
                Some(*product)
            })
            .collect();
        let (prediction, variance) = (config.prediction_type, config.variance_type);
        Self { betas, alphas_cumprod, prediction, variance, clip: config.clip }
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> serde_json::Result<ScheduleConfig> {
        serde_json::from_str(text)
    }

    #[test]
    fn the_ddpm_schedule_has_its_published_end() {
        let s = Schedule::new(&read("{}").unwrap());
        assert!((s.alpha_t(999) - 0.006353).abs() < 1e-6);
        assert!((s.sigma_t(999) - 0.999980).abs() < 1e-6);
        assert_eq!(s.nearest_step(2.5), 440);
    }

    #[test]
    fn a_prediction_of_the_truth_implies_the_image() {
        let (alpha, sigma) = (0.6, 0.8);
        let (x0, eps) = (0.3, -1.2);
        let x_t = alpha * x0 + sigma * eps;
        for prediction in [Prediction::Epsilon, Prediction::Sample, Prediction::Velocity] {
            let (of_x0, of_eps) = prediction.target_factors(alpha, sigma);
            let (of_x_t, of_target) = prediction.x0_factors(alpha, sigma);
            let got = of_x_t * x_t + of_target * (of_x0 * x0 + of_eps * eps);
            assert!((got - x0).abs() < 1e-12, "{prediction:?}: got {got}");
        }
    }

    #[test]
    fn a_network_knows_every_step_of_its_schedule() {
        let steps = |n: usize| read(&format!("{{\"num_train_timesteps\":{n}}}")).unwrap();
        let mnist =
            ModelConfig::from_json(r#"{"_class_name":"ContextUnet","n_feat":8,"n_steps":50}"#).unwrap();
        let celeba = ModelConfig::from_json(r#"{"_class_name":"CelebaUNet","n_steps":50}"#).unwrap();
        assert!(steps(51).check_network(&mnist).is_ok() && steps(50).check_network(&celeba).is_ok());
        assert!(steps(20).check_network(&celeba).is_ok());
        for (n, network, expected) in [(50, &mnist, "51"), (1000, &mnist, "51"), (51, &celeba, "50")] {
            let problem = steps(n).check_network(network).unwrap_err().to_string();
            assert!(
                [&n.to_string(), expected, "`n_steps` 50"].iter().all(|s| problem.contains(*s)),
                "{problem}"
            );
        }
    }

    #[test]
    fn trained_betas_are_taken_as_they_are() {
        let config = read(r#"{"trained_betas":[0.1,0.2,0.5]}"#).unwrap();
        let schedule = Schedule::new(&config);
        assert_eq!(schedule.betas, [0.1, 0.2, 0.5]);
        assert!((schedule.alphas_cumprod[2] - 0.9 * 0.8 * 0.5).abs() < 1e-15);
    }

    #[test]
    fn a_configuration_survives_writing_and_reading() {
        for text in [
            "{}",
            r#"{"clip_sample":false,"variance_type":"fixed_large","prediction_type":"v_prediction"}"#,
            r#"{"clip_sample_range":2.0,"trained_betas":[0.1,0.2],"prediction_type":"sample"}"#,
        ] {
            let config = read(text).unwrap();
            assert_eq!(read(&serde_json::to_string(&config).unwrap()).unwrap(), config, "{text}");
        }
    }

    #[test]
    fn files_of_2022_are_read() {
        let text = r#"{"_class_name":"DDPMScheduler","_diffusers_version":"0.2.4","beta_end":0.02,
            "beta_schedule":"linear","beta_start":0.0001,"clip_sample":true,"num_train_timesteps":1000,"tensor_format":"pt",
            "timestep_values":null,"trained_betas":null,"variance_type":"fixed_small"}"#;
        assert_eq!(read(text).unwrap(), read("{}").unwrap());
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_key() {
        for (key, value) in [
            ("prediction_type", r#""flow""#),
            ("beta_schedule", r#""sigmoid""#),
            ("variance_type", r#""learned_range""#),
            ("thresholding", "true"),
            ("rescale_betas_zero_snr", "true"),
            ("trained_betas", "[0.1,1.5]"),
            ("trained_betas", "[0.0,0.1]"),
            ("trained_betas", "[0.1,1.0]"),
            ("trained_betas", "[0.1]"),
            ("clip_sample_range", "-1"),
            ("num_train_timesteps", "1"),
            ("beta_start", "0.5"),
            ("use_karras_sigmas", "true"),
        ] {
            let err = read(&format!("{{\"{key}\":{value}}}")).unwrap_err().to_string();
            let named = if value == "[0.1]" { "num_train_timesteps" } else { key };
            assert!(err.contains(named), "{key}: {err}");
        }
    }
}
