//! The losses of DMD and what they are made of, as pure functions on tensors.
//! Yin et al. 2024 (arXiv:2311.18828). Networks are not known here; what one predicts, [`NoiseLevels`] knows.

use candle_core::{Device, Tensor};
use dmd_core::schedule::{Prediction, Schedule};

use crate::error::Result;

/// Transition of the pseudo-Huber distance from square to norm, per square root of an image's values.
const HUBER: f64 = 0.00054;
/// Smallest mean error that the distribution-matching gradient is divided by, so that a flat image cannot blow it up.
const SMALLEST_ERROR: f64 = 1e-5;

/// `alpha_t` and `sigma_t` of a batch of steps, and what a network's prediction at them means.
pub struct NoiseLevels {
    /// The steps, `[b]` f32, as networks take them.
    pub t: Tensor,
    /// `[b, 1, 1, 1]`.
    pub alpha_t: Tensor,
    /// `[b, 1, 1, 1]`.
    pub sigma_t: Tensor,
    prediction: Prediction,
}

impl NoiseLevels {
    /// Looks the steps up.
    pub fn new(schedule: &Schedule, t: &[u32], device: &Device) -> Result<Self> {
        let column = |f: &dyn Fn(usize) -> f64| -> Result<Tensor> {
            let values: Vec<f32> = t.iter().map(|&t| f(t as usize) as f32).collect();
            Ok(Tensor::from_vec(values, (t.len(), 1, 1, 1), device)?)
        };
        Ok(Self {
            t: Tensor::from_vec(t.iter().map(|&t| t as f32).collect::<Vec<_>>(), t.len(), device)?,
            alpha_t: column(&|t| schedule.alpha_t(t))?,
            sigma_t: column(&|t| schedule.sigma_t(t))?,
            prediction: schedule.prediction,
        })
    }

    /// `x_t = alpha_t·x0 + sigma_t·eps`. Ho et al. 2020 (arXiv:2006.11239), Eq. 4.
    ///
    /// # Shapes
    /// `x0`, `eps`: `[b, c, h, w]`; returns the same.
    pub fn noisy(&self, x0: &Tensor, eps: &Tensor) -> Result<Tensor> {
        Ok((x0.broadcast_mul(&self.alpha_t)? + eps.broadcast_mul(&self.sigma_t)?)?)
    }

    /// The image that a network's prediction implies; from predicted noise `(x_t − sigma_t·eps_pred)/alpha_t`.
    ///
    /// # Shapes
    /// `x_t`, `prediction`: `[b, c, h, w]`; returns the same.
    pub fn x0(&self, x_t: &Tensor, prediction: &Tensor) -> Result<Tensor> {
        Ok(match self.prediction {
            Prediction::Epsilon => {
                (x_t - prediction.broadcast_mul(&self.sigma_t)?)?.broadcast_div(&self.alpha_t)?
            }
            Prediction::Sample => prediction.clone(),
            Prediction::Velocity => {
                (x_t.broadcast_mul(&self.alpha_t)? - prediction.broadcast_mul(&self.sigma_t)?)?
            }
        })
    }

    /// What the network is trained to predict: `eps`, `x0`, or `v = alpha_t·eps − sigma_t·x0`.
    ///
    /// # Shapes
    /// `x0`, `eps`: `[b, c, h, w]`; returns the same.
    pub fn target(&self, x0: &Tensor, eps: &Tensor) -> Result<Tensor> {
        Ok(match self.prediction {
            Prediction::Epsilon => eps.clone(),
            Prediction::Sample => x0.clone(),
            Prediction::Velocity => (eps.broadcast_mul(&self.alpha_t)? - x0.broadcast_mul(&self.sigma_t)?)?,
        })
    }
}

/// Gradient of the distribution-matching loss with respect to the generated image:
/// `(x0_fake − x0_real) / mean|x_gen − x0_real|`, the mean per sample over C, H, W.
///
/// Yin et al. 2024 (arXiv:2311.18828), Eq. 7 weighted by Eq. 8. Multiplied out, the printed equations keep a factor
/// `alpha_t`; it is dropped here, as in the paper's Algorithm 2 (`--dm-alpha-factor` brings it back).
///
/// # Shapes
/// `x_gen`, `x0_real`, `x0_fake`: `[b, c, h, w]`; returns the same, detached.
pub fn distribution_matching_gradient(x_gen: &Tensor, x0_real: &Tensor, x0_fake: &Tensor) -> Result<Tensor> {
    let (x_gen, x0_real) = (x_gen.detach(), x0_real.detach());
    let error = (x_gen - &x0_real)?.abs()?.flatten_from(1)?.mean_keepdim(1)?;
    let error = error.maximum(SMALLEST_ERROR)?.unsqueeze(2)?.unsqueeze(3)?;
    Ok((x0_fake.detach() - x0_real)?.broadcast_div(&error)?)
}

/// `½·mean((x_gen − sg(x_gen − gradient))²)`: its derivative is `gradient` over the number of elements.
///
/// Yin et al. 2024 (arXiv:2311.18828), Algorithm 2.
///
/// # Shapes
/// `x_gen`, `gradient`: `[b, c, h, w]`; returns a scalar.
pub fn distribution_matching(x_gen: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let target = (x_gen.detach() - gradient)?.detach();
    Ok(((x_gen - target)?.sqr()?.mean_all()? * 0.5)?)
}

/// `mean((x_gen − y)²)`: Eq. 9 with the mean squared difference.
///
/// # Shapes
/// `x_gen`, `y`: `[b, c, h, w]`; returns a scalar.
pub fn l2(x_gen: &Tensor, y: &Tensor) -> Result<Tensor> {
    Ok((x_gen - y)?.sqr()?.mean_all()?)
}

/// `mean_b(sqrt(‖x_gen − y‖² + c²) − c)/sqrt(d)` with `c = 0.00054·sqrt(d)` for images of `d` values: nearly the norm of the
/// difference, so that single bad pairs count less. Song and Dhariwal 2023 (arXiv:2310.14189), section 3.3.
///
/// # Shapes
/// `x_gen`, `y`: `[b, c, h, w]`; returns a scalar.
pub fn pseudo_huber(x_gen: &Tensor, y: &Tensor) -> Result<Tensor> {
    let mean = (x_gen - y)?.sqr()?.flatten_from(1)?.mean(1)?;
    Ok(((mean + HUBER * HUBER)?.sqrt()? - HUBER)?.mean_all()?)
}

/// `mean(softplus(−D(fake)))`: what the generator minimises. Yin et al. 2024 (DMD2, arXiv:2405.14867), Eq. 4, in the form
/// that does not saturate (Goodfellow et al. 2014, arXiv:1406.2661, section 3).
///
/// # Shapes
/// `fake`: logits of any shape; returns a scalar.
pub fn adversarial(fake: &Tensor) -> Result<Tensor> {
    Ok(softplus(&fake.neg()?)?.mean_all()?)
}

/// `mean(softplus(D(fake))) + mean(softplus(−D(real)))`: what the discriminator minimises. DMD2, Eq. 4.
///
/// # Shapes
/// Logits of any shape; returns a scalar.
pub fn discrimination(real: &Tensor, fake: &Tensor) -> Result<Tensor> {
    Ok((softplus(fake)?.mean_all()? + softplus(&real.neg()?)?.mean_all()?)?)
}

/// `ln(1 + exp(x))` without overflow; its gradient is the sigmoid everywhere.
fn softplus(x: &Tensor) -> Result<Tensor> {
    let top = x.detach().maximum(0.0)?;
    Ok((((x - &top)?.exp()? + top.neg()?.exp()?)?.log()? + top)?)
}

/// `mean((prediction − target)²)`: the loss of bases and critic, for predicted noise `mean((eps_pred − eps)²)`. Eq. 6,
/// weighted as the base was trained.
///
/// # Shapes
/// `prediction`, `target` ([`NoiseLevels::target`]): `[b, c, h, w]`; returns a scalar.
pub fn denoising(prediction: &Tensor, target: &Tensor) -> Result<Tensor> {
    Ok((prediction - target)?.sqr()?.mean_all()?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn images(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, (2, 1, 1, values.len() / 2), &Device::Cpu).unwrap()
    }

    #[test]
    fn a_perfect_prediction_gives_the_image_back() {
        let (x0, eps) = (images(&[0.5, -1.0, 0.25, 0.75]), images(&[1.5, 0.3, -0.7, -1.1]));
        for kind in ["epsilon", "sample", "v_prediction"] {
            let config = json!({"num_train_timesteps": 1000, "prediction_type": kind});
            let schedule = Schedule::new(&serde_json::from_value(config).unwrap());
            let levels = NoiseLevels::new(&schedule, &[30, 700], &Device::Cpu).unwrap();
            let x_t = levels.noisy(&x0, &eps).unwrap();
            let found = levels.x0(&x_t, &levels.target(&x0, &eps).unwrap()).unwrap();
            let far = (found - &x0).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
            assert!(far < 1e-5, "{kind}: {far}");
        }
    }

    #[test]
    fn pseudo_huber_is_a_parabola_near_zero_and_a_line_far_from_it() {
        let zero = images(&[0.0; 8]);
        for (step, expected) in [(0.0, 0.0), (HUBER, (2f64.sqrt() - 1.0) * HUBER), (100.0, 100.0 - HUBER)] {
            let there = images(&[step as f32; 8]);
            let loss = f64::from(pseudo_huber(&there, &zero).unwrap().to_scalar::<f32>().unwrap());
            assert!((loss - expected).abs() < 1e-5 * (1.0 + expected), "{step}: {loss}, expected {expected}");
        }
    }
}
