//! diffusers `UNet2DModel` (0.42): the U-Net of Ho et al. 2020 with the checkpoint's own parameter names.
//! Must not contain anything that is not in that network; options we lack are refused in `config.rs`.

use super::{Activation, Conv2d, Embedding, GroupNorm, Linear, Ops, Pool, TimestepEmbedding};
use crate::Error;
use crate::config::{Block, Resample, TimeShift, UNet2DConfig};

/// Prediction of a `UNet2DModel`; see [`super::denoise`].
pub fn unet2d<O: Ops>(
    ops: &mut O,
    config: &UNet2DConfig,
    x_t: &O::Value,
    t: &O::Value,
    class: Option<&O::Value>,
) -> Result<O::Value, O::Error> {
    let temb = time_and_class(ops, config, t, class)?;
    let mut unet = UNet { ops, config, temb };
    let down = unet.down(x_t)?;
    let x = unet.middle(&down.x)?;
    unet.up(x, down.skips)
}

/// What the middle block makes of an image, `[n, c, h, w]` of the coarsest resolution; see [`super::bottleneck`].
pub fn bottleneck<O: Ops>(
    ops: &mut O,
    config: &UNet2DConfig,
    x_t: &O::Value,
    t: &O::Value,
    class: Option<&O::Value>,
) -> Result<O::Value, O::Error> {
    let temb = time_and_class(ops, config, t, class)?;
    let mut unet = UNet { ops, config, temb };
    let down = unet.down(x_t)?;
    unet.middle(&down.x)
}

/// SiLU of the joint embedding of step and class, `[n, 4·channels]`: every residual block uses it in this form.
fn time_and_class<O: Ops>(
    ops: &mut O,
    config: &UNet2DConfig,
    t: &O::Value,
    class: Option<&O::Value>,
) -> Result<O::Value, O::Error> {
    let features = config.block_out_channels[0];
    let spec = TimestepEmbedding {
        features,
        flip_sin_to_cos: config.flip_sin_to_cos,
        freq_shift: config.freq_shift,
    };
    let wide = embedding_features(config);
    let x = ops.timestep_embedding(t, spec)?;
    let x =
        ops.linear(&x, "time_embedding.linear_1", Linear { in_features: features, out_features: wide })?;
    let x = ops.activate(&x, Activation::Silu)?; // diffusers looks at `act_fn` in residual blocks only
    let mut x =
        ops.linear(&x, "time_embedding.linear_2", Linear { in_features: wide, out_features: wide })?;
    match (config.num_class_embeds, class) {
        (Some(rows), Some(class)) => {
            let class =
                ops.embedding(class, "class_embedding", Embedding { rows, features: wide, frozen: false })?;
            x = ops.add(&x, &class)?;
        }
        (None, None) => {}
        (Some(rows), None) => {
            return Err(
                Error::Request(format!("the model is conditional on {rows} classes and got none")).into()
            );
        }
        (None, Some(_)) => return Err(Error::Request("the model takes no class and got one".into()).into()),
    }
    ops.activate(&x, config.activation)
}

/// Channels of [`bottleneck`].
pub fn bottleneck_channels(config: &UNet2DConfig) -> usize {
    config.block_out_channels.last().copied().unwrap_or_default()
}

fn embedding_features(config: &UNet2DConfig) -> usize {
    4 * config.block_out_channels[0]
}

fn conv3x3(in_channels: usize, out_channels: usize) -> Conv2d {
    Conv2d { in_channels, out_channels, kernel: 3, stride: 1, padding: [1; 4] }
}

/// A value that the way up joins again, and its channels.
type Skip<O> = (<O as Ops>::Value, usize);

/// The result of the way down, and what the way up joins again.
struct Down<O: Ops> {
    x: O::Value,
    skips: Vec<Skip<O>>,
}

/// What a residual block does to the size of the image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Size {
    Same,
    Halved,
    Doubled,
}

/// Only attention blocks look at the configured kind.
fn resample(block: Block, configured: Resample) -> Resample {
    match block {
        Block::Plain => Resample::Conv,
        Block::Attention => configured,
        Block::Resnet => Resample::Resnet,
    }
}

struct UNet<'a, O: Ops> {
    ops: &'a mut O,
    config: &'a UNet2DConfig,
    temb: O::Value,
}

impl<O: Ops> UNet<'_, O> {
    fn down(&mut self, x_t: &O::Value) -> Result<Down<O>, O::Error> {
        let config = self.config;
        let channels = &config.block_out_channels;
        let mut x = self.ops.conv2d(x_t, "conv_in", conv3x3(config.in_channels, channels[0]))?;
        let mut x_channels = channels[0];
        let mut skips = vec![(x.clone(), x_channels)];
        for (i, (&out, block)) in channels.iter().zip(&config.down_blocks).enumerate() {
            let path = format!("down_blocks.{i}");
            for j in 0..config.layers_per_block {
                x = self.resnet(&x, &format!("{path}.resnets.{j}"), [x_channels, out], Size::Same)?;
                x_channels = out;
                if *block == Block::Attention {
                    x = self.attention(&x, &format!("{path}.attentions.{j}"), out)?;
                }
                skips.push((x.clone(), out));
            }
            if i + 1 < channels.len() {
                let path = format!("{path}.downsamplers.0");
                x = match resample(*block, config.downsample_type) {
                    Resample::Resnet => self.resnet(&x, &path, [out, out], Size::Halved)?,
                    Resample::Conv => {
                        let p = config.downsample_padding;
                        let spec = Conv2d { stride: 2, padding: [p, p, 1, 1], ..conv3x3(out, out) };
                        self.ops.conv2d(&x, &format!("{path}.conv"), spec)?
                    }
                };
                skips.push((x.clone(), out));
            }
        }
        Ok(Down { x, skips })
    }

    fn middle(&mut self, x: &O::Value) -> Result<O::Value, O::Error> {
        let (config, c) = (self.config, bottleneck_channels(self.config));
        let divisor = config.mid_block_scale_factor;
        let mut x = self.resnet_divided(x, "mid_block.resnets.0", [c, c], Size::Same, divisor)?;
        if config.add_attention {
            // diffusers leaves the norm out here, and only here, where the time is a factor.
            let normed = config.resnet_time_scale_shift == TimeShift::Add;
            x = self.attention_divided(&x, "mid_block.attentions.0", c, normed, divisor)?;
        }
        self.resnet_divided(&x, "mid_block.resnets.1", [c, c], Size::Same, divisor)
    }

    /// The way up, and the last layers.
    fn up(&mut self, mut x: O::Value, mut skips: Vec<Skip<O>>) -> Result<O::Value, O::Error> {
        let config = self.config;
        let channels = &config.block_out_channels;
        let mut x_channels = bottleneck_channels(config);
        for (i, (&out, block)) in channels.iter().rev().zip(&config.up_blocks).enumerate() {
            let path = format!("up_blocks.{i}");
            for j in 0..=config.layers_per_block {
                let (skip, skip_channels) =
                    skips.pop().ok_or_else(|| Error::config("up_block_types", "more blocks than skips"))?;
                x = self.ops.concat(&x, &skip)?;
                let both = x_channels + skip_channels;
                x = self.resnet(&x, &format!("{path}.resnets.{j}"), [both, out], Size::Same)?;
                x_channels = out;
                if *block == Block::Attention {
                    x = self.attention(&x, &format!("{path}.attentions.{j}"), out)?;
                }
            }
            if i + 1 < channels.len() {
                let path = format!("{path}.upsamplers.0");
                x = match resample(*block, config.upsample_type) {
                    Resample::Resnet => self.resnet(&x, &path, [out, out], Size::Doubled)?,
                    Resample::Conv => {
                        x = self.ops.upsample_nearest2x(&x)?;
                        self.ops.conv2d(&x, &format!("{path}.conv"), conv3x3(out, out))?
                    }
                };
            }
        }
        let norm = self.norm(x_channels, true);
        x = self.ops.group_norm(&x, "conv_norm_out", norm)?;
        self.ops.conv2d(&x, "conv_out", conv3x3(x_channels, config.out_channels))
    }

    fn norm(&self, channels: usize, silu: bool) -> GroupNorm {
        GroupNorm { channels, groups: self.config.norm_num_groups, eps: self.config.norm_eps, silu }
    }

    /// Normalisation and activation.
    fn active_norm(&mut self, x: &O::Value, name: &str, channels: usize) -> Result<O::Value, O::Error> {
        let activation = self.config.activation;
        let norm = self.norm(channels, activation == Activation::Silu);
        let y = self.ops.group_norm(x, name, norm)?;
        if norm.silu { Ok(y) } else { self.ops.activate(&y, activation) }
    }

    fn resized(&mut self, x: &O::Value, size: Size) -> Result<O::Value, O::Error> {
        match size {
            Size::Same => Ok(x.clone()),
            Size::Halved => self.ops.pool(x, Pool::Average, 2),
            Size::Doubled => self.ops.upsample_nearest2x(x),
        }
    }

    fn resnet(
        &mut self,
        x: &O::Value,
        path: &str,
        channels: [usize; 2],
        size: Size,
    ) -> Result<O::Value, O::Error> {
        self.resnet_divided(x, path, channels, size, 1.0)
    }

    /// `(shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))) + time_emb_proj(temb)))))/divisor`; where the size
    /// changes, `x` and `act(norm1(x))` are resized. With `scale_shift`, the time enters after `norm2`.
    fn resnet_divided(
        &mut self,
        x: &O::Value,
        path: &str,
        [input, output]: [usize; 2],
        size: Size,
        divisor: f64,
    ) -> Result<O::Value, O::Error> {
        let modulated = self.config.resnet_time_scale_shift == TimeShift::ScaleShift;
        let out_features = output * (1 + usize::from(modulated));
        let projection = Linear { in_features: embedding_features(self.config), out_features };
        let time = self.ops.linear(&self.temb, &format!("{path}.time_emb_proj"), projection)?;
        let norm2 = format!("{path}.norm2");
        let h = self.active_norm(x, &format!("{path}.norm1"), input)?;
        let (x, h) = (self.resized(x, size)?, self.resized(&h, size)?);
        let h = self.ops.conv2d(&h, &format!("{path}.conv1"), conv3x3(input, output))?;
        let h = if modulated {
            let h = self.ops.group_norm(&h, &norm2, self.norm(output, false))?;
            let scale = self.ops.narrow(&time, 0, output)?;
            let shift = self.ops.narrow(&time, output, output)?;
            let scaled = self.ops.scale_channels(&h, &scale)?;
            let h = self.ops.add(&h, &scaled)?;
            let h = self.ops.add_bias(&h, &shift)?;
            self.ops.activate(&h, self.config.activation)?
        } else {
            let h = self.ops.add_bias(&h, &time)?;
            self.active_norm(&h, &norm2, output)?
        };
        let h = self.ops.conv2d(&h, &format!("{path}.conv2"), conv3x3(output, output))?;
        let shortcut = if input == output {
            x
        } else {
            let spec = Conv2d { kernel: 1, padding: [0; 4], ..conv3x3(input, output) };
            self.ops.conv2d(&x, &format!("{path}.conv_shortcut"), spec)?
        };
        let y = self.ops.add(&shortcut, &h)?;
        if divisor == 1.0 { Ok(y) } else { self.ops.scale(&y, 1.0 / divisor) }
    }

    fn attention(&mut self, x: &O::Value, path: &str, channels: usize) -> Result<O::Value, O::Error> {
        self.attention_divided(x, path, channels, true, 1.0)
    }

    /// `(x + to_out(attention(to_q(y), to_k(y), to_v(y))))/divisor` among the pixels, with `y = group_norm(x)`, or
    /// `x` itself.
    fn attention_divided(
        &mut self,
        x: &O::Value,
        path: &str,
        channels: usize,
        normed: bool,
        divisor: f64,
    ) -> Result<O::Value, O::Error> {
        let spec = Linear { in_features: channels, out_features: channels };
        let y = match normed {
            true => self.ops.group_norm(x, &format!("{path}.group_norm"), self.norm(channels, false))?,
            false => x.clone(),
        };
        let q = self.ops.pointwise(&y, &format!("{path}.to_q"), spec)?;
        let k = self.ops.pointwise(&y, &format!("{path}.to_k"), spec)?;
        let v = self.ops.pointwise(&y, &format!("{path}.to_v"), spec)?;
        let y = self.ops.attention(&q, &k, &v, self.config.heads(channels))?;
        let y = self.ops.pointwise(&y, &format!("{path}.to_out.0"), spec)?;
        let y = self.ops.add(x, &y)?;
        if divisor == 1.0 { Ok(y) } else { self.ops.scale(&y, 1.0 / divisor) }
    }
}
