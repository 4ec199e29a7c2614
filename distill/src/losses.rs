//! The three losses of DMD and what they are made of, as pure functions on tensors.
//! Yin et al. 2024 (arXiv:2311.18828). Networks are not known here; all predictions are `x0` or `eps` already.

use candle_core::{Device, Tensor};
use dmd_core::schedule::Schedule;

use crate::error::Result;

/// Smallest mean error that the distribution-matching gradient is divided by, so that a flat image cannot blow it up.
const SMALLEST_ERROR: f64 = 1e-5;

/// `alpha_t` and `sigma_t` of a batch of steps.
pub struct NoiseLevels {
    /// The steps, `[b]` f32, as networks take them.
    pub t: Tensor,
    /// `[b, 1, 1, 1]`.
    pub alpha_t: Tensor,
    /// `[b, 1, 1, 1]`.
    pub sigma_t: Tensor,
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
        })
    }

    /// `x_t = alpha_t·x0 + sigma_t·eps`. Ho et al. 2020 (arXiv:2006.11239), Eq. 4.
    ///
    /// # Shapes
    /// `x0`, `eps`: `[b, c, h, w]`; returns the same.
    pub fn noisy(&self, x0: &Tensor, eps: &Tensor) -> Result<Tensor> {
        Ok((x0.broadcast_mul(&self.alpha_t)? + eps.broadcast_mul(&self.sigma_t)?)?)
    }

    /// `x0_pred = (x_t − sigma_t·eps_pred)/alpha_t`.
    ///
    /// # Shapes
    /// `x_t`, `eps_pred`: `[b, c, h, w]`; returns the same.
    pub fn x0_from_eps(&self, x_t: &Tensor, eps_pred: &Tensor) -> Result<Tensor> {
        Ok((x_t - eps_pred.broadcast_mul(&self.sigma_t)?)?.broadcast_div(&self.alpha_t)?)
    }
}

/// Gradient of the distribution-matching loss with respect to the generated image:
/// `(x0_fake − x0_real) / mean|x_gen − x0_real|`, the mean per sample over C, H, W.
///
/// Yin et al. 2024 (arXiv:2311.18828), Eq. 7 weighted by Eq. 8. Multiplied out, the printed equations keep a factor
/// `alpha_t`; it is dropped here, as in the paper's Algorithm 2.
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

/// `mean((x_gen − y)²)` over pairs of a base's deterministic sampler. Eq. 9 with the squared distance.
///
/// # Shapes
/// `x_gen`, `y`: `[b, c, h, w]`; returns a scalar.
pub fn regression(x_gen: &Tensor, y: &Tensor) -> Result<Tensor> {
    Ok((x_gen - y)?.sqr()?.mean_all()?)
}

/// `mean((eps_pred − eps)²)`: the loss of bases and critic. Eq. 6, weighted as the base was trained.
///
/// # Shapes
/// `eps_pred`, `eps`: `[b, c, h, w]`; returns a scalar.
pub fn denoising(eps_pred: &Tensor, eps: &Tensor) -> Result<Tensor> {
    Ok((eps_pred - eps)?.sqr()?.mean_all()?)
}
