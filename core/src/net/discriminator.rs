//! The head that tells real images from generated ones, on the critic's bottleneck.
//! Yin et al. 2024 (DMD2, arXiv:2405.14867), section 4.3. Its parameters lie beside the critic's under `discriminator.`.

use super::{Conv2d, GroupNorm, Ops, bottleneck, bottleneck_shape};
use crate::config::ModelConfig;

/// What the names of the head's parameters start with.
pub const PREFIX: &str = "discriminator.";

/// Largest side that one convolution looks at as a whole.
const SIDE: usize = 4;

/// How real the critic takes a noisy image to be, as a logit: `x_t` `[n, c, h, w]`, `t` and `class` as for
/// [`super::denoise`] to `[n, 1, 1, 1]`.
///
/// Strided 4x4 convolutions until the bottleneck is at most 4 pixels wide, one over all that is left, one to the logit;
/// GroupNorm and SiLU between them.
pub fn logit<O: Ops>(
    ops: &mut O,
    config: &ModelConfig,
    x_t: &O::Value,
    t: &O::Value,
    class: Option<&O::Value>,
) -> Result<O::Value, O::Error> {
    let [c, mut side, _] = bottleneck_shape(config);
    let mut x = bottleneck(ops, config, x_t, t, class)?;
    let groups = (1..=32.min(c / 4).max(1)).rev().find(|groups| c % groups == 0).unwrap_or(1);
    let norm = GroupNorm { channels: c, groups, eps: 1e-5, silu: true };
    let conv = |kernel, stride, padding| Conv2d {
        in_channels: c,
        out_channels: c,
        kernel,
        stride,
        padding: [padding; 4],
    };
    let mut layer = 0;
    while side > SIDE {
        x = ops.conv2d(&x, &format!("{PREFIX}conv{layer}"), conv(4, 2, 1))?;
        x = ops.group_norm(&x, &format!("{PREFIX}norm{layer}"), norm)?;
        (side, layer) = (side / 2, layer + 1);
    }
    x = ops.conv2d(&x, &format!("{PREFIX}conv{layer}"), conv(side, 1, 0))?;
    x = ops.group_norm(&x, &format!("{PREFIX}norm{layer}"), norm)?;
    ops.conv2d(&x, &format!("{PREFIX}logit"), Conv2d { out_channels: 1, ..conv(1, 1, 0) })
}
