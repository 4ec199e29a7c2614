//! The class-conditional MNIST network of github.com/TeaPearce/Conditional_Diffusion_MNIST (`ContextUnet`), with the
//! checkpoint's own parameter names and peculiarities: the one-hot class is negated, a dropped class is all zeros, the
//! residual sum is divided by 1.414, the step enters as a fraction.
//! Must not contain anything that is not in that network.

use super::{Activation, BatchNorm, Conv2d, ConvTranspose2d, GroupNorm, Linear, Ops, Pool};
use crate::Error;
use crate::config::ContextUnetConfig;

/// Prediction of a `ContextUnet`; see [`super::denoise`]. The class `n_classes` stands for no class.
pub fn context_unet<O: Ops>(
    ops: &mut O,
    config: &ContextUnetConfig,
    x_t: &O::Value,
    t: &O::Value,
    class: Option<&O::Value>,
) -> Result<O::Value, O::Error> {
    let class = class.ok_or_else(|| {
        Error::Request(format!("the model is conditional on {} classes and got none", config.n_classes + 1))
    })?;
    let (c, bottom) = (config.n_feat, config.sample_size / 4);
    let time = ops.feature(t, 1.0 / config.n_steps as f64)?;
    let class = ops.one_hot(class, config.n_classes)?;
    let class = ops.scale(&class, -1.0)?;
    let mut net = Net { ops };

    let [x0, d1, d2] = net.down(config, x_t)?;
    let hidden = net.ops.pool(&d2, Pool::Average, bottom)?;
    let hidden = net.ops.activate(&hidden, Activation::Gelu)?;

    let whole = ConvTranspose2d {
        in_channels: 2 * c,
        out_channels: 2 * c,
        kernel: bottom,
        stride: bottom,
        padding: 0,
    };
    let u0 = net.ops.conv_transpose2d(&hidden, "up0.0", whole)?;
    let u0 = net.relu_norm(&u0, "up0.1", 2 * c)?;
    let u1 = net.modulate(&u0, &class, &time, 1, [config.n_classes, 2 * c])?;
    let u1 = net.ops.concat(&u1, &d2)?;
    let u1 = net.up(&u1, "up1.model", 4 * c, c)?;
    let u2 = net.modulate(&u1, &class, &time, 2, [config.n_classes, c])?;
    let u2 = net.ops.concat(&u2, &d1)?;
    let u2 = net.up(&u2, "up2.model", 2 * c, c)?;

    let out = net.ops.concat(&u2, &x0)?;
    let out = net.ops.conv2d(&out, "out.0", conv3x3(2 * c, c))?;
    let out = net.relu_norm(&out, "out.1", c)?;
    net.ops.conv2d(&out, "out.3", conv3x3(c, config.in_channels))
}

/// What the way down makes of an image, `[n, 2·n_feat, h/4, w/4]`; step and class enter this network later. See
/// [`super::bottleneck`].
pub fn bottleneck<O: Ops>(
    ops: &mut O,
    config: &ContextUnetConfig,
    x_t: &O::Value,
) -> Result<O::Value, O::Error> {
    let [_, _, d2] = Net { ops }.down(config, x_t)?;
    Ok(d2)
}

fn conv3x3(in_channels: usize, out_channels: usize) -> Conv2d {
    Conv2d { in_channels, out_channels, kernel: 3, stride: 1, padding: [1; 4] }
}

struct Net<'a, O: Ops> {
    ops: &'a mut O,
}

impl<O: Ops> Net<'_, O> {
    /// The results at full, half and quarter size.
    fn down(&mut self, config: &ContextUnetConfig, x_t: &O::Value) -> Result<[O::Value; 3], O::Error> {
        let c = config.n_feat;
        let x0 = self.convolutions(x_t, "init_conv", config.in_channels, c, true)?;
        let d1 = self.convolutions(&x0, "down1.model.0", c, c, false)?;
        let d1 = self.ops.pool(&d1, Pool::Max, 2)?;
        let d2 = self.convolutions(&d1, "down2.model.0", c, 2 * c, false)?;
        let d2 = self.ops.pool(&d2, Pool::Max, 2)?;
        Ok([x0, d1, d2])
    }

    /// Two convolutions with BatchNorm and GELU; with `residual`, the mean-like sum of both results.
    fn convolutions(
        &mut self,
        x: &O::Value,
        path: &str,
        input: usize,
        output: usize,
        residual: bool,
    ) -> Result<O::Value, O::Error> {
        let first = self.convolution(x, &format!("{path}.conv1"), input, output)?;
        let second = self.convolution(&first, &format!("{path}.conv2"), output, output)?;
        if !residual {
            return Ok(second);
        }
        let sum = self.ops.add(&first, &second)?;
        self.ops.scale(&sum, 1.0 / 1.414)
    }

    fn convolution(
        &mut self,
        x: &O::Value,
        path: &str,
        input: usize,
        output: usize,
    ) -> Result<O::Value, O::Error> {
        let y = self.ops.conv2d(x, &format!("{path}.0"), conv3x3(input, output))?;
        let y = self.ops.batch_norm(&y, &format!("{path}.1"), BatchNorm { channels: output, eps: 1e-5 })?;
        self.ops.activate(&y, Activation::Gelu)
    }

    fn relu_norm(&mut self, x: &O::Value, name: &str, channels: usize) -> Result<O::Value, O::Error> {
        let y = self.ops.group_norm(x, name, GroupNorm { channels, groups: 8, eps: 1e-5, silu: false })?;
        self.ops.activate(&y, Activation::Relu)
    }

    /// `contextembed(class)·x + timeembed(time)`.
    fn modulate(
        &mut self,
        x: &O::Value,
        class: &O::Value,
        time: &O::Value,
        level: usize,
        [classes, channels]: [usize; 2],
    ) -> Result<O::Value, O::Error> {
        let factor = self.embed(class, &format!("contextembed{level}.model"), classes, channels)?;
        let shift = self.embed(time, &format!("timeembed{level}.model"), 1, channels)?;
        let y = self.ops.scale_channels(x, &factor)?;
        self.ops.add_bias(&y, &shift)
    }

    fn embed(&mut self, x: &O::Value, path: &str, input: usize, output: usize) -> Result<O::Value, O::Error> {
        let first = Linear { in_features: input, out_features: output };
        let second = Linear { in_features: output, out_features: output };
        let y = self.ops.linear(x, &format!("{path}.0"), first)?;
        let y = self.ops.activate(&y, Activation::Gelu)?;
        self.ops.linear(&y, &format!("{path}.2"), second)
    }

    /// Doubles the size, then four convolutions.
    fn up(&mut self, x: &O::Value, path: &str, input: usize, output: usize) -> Result<O::Value, O::Error> {
        let spec =
            ConvTranspose2d { in_channels: input, out_channels: output, kernel: 2, stride: 2, padding: 0 };
        let y = self.ops.conv_transpose2d(x, &format!("{path}.0"), spec)?;
        let y = self.convolutions(&y, &format!("{path}.1"), output, output, false)?;
        self.convolutions(&y, &format!("{path}.2"), output, output, false)
    }
}
