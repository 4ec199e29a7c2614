//! diffusers `UNet2DModel` (0.42): the U-Net of Ho et al. 2020 with the checkpoint's own parameter names.
//! Must not contain anything that is not in that network; options we lack are refused in `config.rs`.

use super::{Conv2d, Embedding, GroupNorm, Linear, Ops, TimestepEmbedding};
use crate::Error;
use crate::config::{Block, UNet2DConfig};

/// Predicted noise of a `UNet2DModel`; see [`super::denoise`].
pub fn unet2d<O: Ops>(
    ops: &mut O,
    config: &UNet2DConfig,
    x_t: &O::Value,
    t: &O::Value,
    class: Option<&O::Value>,
) -> Result<O::Value, O::Error> {
    let channels = &config.block_out_channels;
    let temb = time_and_class(ops, config, t, class)?;
    let mut unet = UNet { ops, config, temb };

    let conv_in = conv3x3(config.in_channels, channels[0]);
    let mut x = unet.ops.conv2d(x_t, "conv_in", conv_in)?;
    let mut x_channels = channels[0];
    let mut skips = vec![(x.clone(), x_channels)];

    for (i, (&out, block)) in channels.iter().zip(&config.down_blocks).enumerate() {
        let path = format!("down_blocks.{i}");
        for j in 0..config.layers_per_block {
            x = unet.resnet(&x, &format!("{path}.resnets.{j}"), x_channels, out)?;
            x_channels = out;
            if *block == Block::Attention {
                x = unet.attention(&x, &format!("{path}.attentions.{j}"), out)?;
            }
            skips.push((x.clone(), out));
        }
        if i + 1 < channels.len() {
            let p = config.downsample_padding;
            let spec = Conv2d { stride: 2, padding: [p, p, 1, 1], ..conv3x3(out, out) };
            x = unet.ops.conv2d(&x, &format!("{path}.downsamplers.0.conv"), spec)?;
            skips.push((x.clone(), out));
        }
    }

    x = unet.resnet(&x, "mid_block.resnets.0", x_channels, x_channels)?;
    if config.add_attention {
        x = unet.attention(&x, "mid_block.attentions.0", x_channels)?;
    }
    x = unet.resnet(&x, "mid_block.resnets.1", x_channels, x_channels)?;

    for (i, (&out, block)) in channels.iter().rev().zip(&config.up_blocks).enumerate() {
        let path = format!("up_blocks.{i}");
        for j in 0..=config.layers_per_block {
            let (skip, skip_channels) =
                skips.pop().ok_or_else(|| Error::config("up_block_types", "more blocks than skips"))?;
            x = unet.ops.concat(&x, &skip)?;
            x = unet.resnet(&x, &format!("{path}.resnets.{j}"), x_channels + skip_channels, out)?;
            x_channels = out;
            if *block == Block::Attention {
                x = unet.attention(&x, &format!("{path}.attentions.{j}"), out)?;
            }
        }
        if i + 1 < channels.len() {
            x = unet.ops.upsample_nearest2x(&x)?;
            x = unet.ops.conv2d(&x, &format!("{path}.upsamplers.0.conv"), conv3x3(out, out))?;
        }
    }

    let norm = unet.norm(x_channels, true);
    x = unet.ops.group_norm(&x, "conv_norm_out", norm)?;
    unet.ops.conv2d(&x, "conv_out", conv3x3(x_channels, config.out_channels))
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
    let x = ops.silu(&x)?;
    let mut x =
        ops.linear(&x, "time_embedding.linear_2", Linear { in_features: wide, out_features: wide })?;
    match (config.num_class_embeds, class) {
        (Some(rows), Some(class)) => {
            let class = ops.embedding(class, "class_embedding", Embedding { rows, features: wide })?;
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
    ops.silu(&x)
}

fn embedding_features(config: &UNet2DConfig) -> usize {
    4 * config.block_out_channels[0]
}

fn conv3x3(in_channels: usize, out_channels: usize) -> Conv2d {
    Conv2d { in_channels, out_channels, kernel: 3, stride: 1, padding: [1; 4] }
}

struct UNet<'a, O: Ops> {
    ops: &'a mut O,
    config: &'a UNet2DConfig,
    temb: O::Value,
}

impl<O: Ops> UNet<'_, O> {
    fn norm(&self, channels: usize, silu: bool) -> GroupNorm {
        GroupNorm { channels, groups: self.config.norm_num_groups, eps: self.config.norm_eps, silu }
    }

    /// `shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))) + time_emb_proj(temb))))`.
    fn resnet(
        &mut self,
        x: &O::Value,
        path: &str,
        input: usize,
        output: usize,
    ) -> Result<O::Value, O::Error> {
        let projection = Linear { in_features: embedding_features(self.config), out_features: output };
        let bias = self.ops.linear(&self.temb, &format!("{path}.time_emb_proj"), projection)?;
        let (norm1, norm2) = (self.norm(input, true), self.norm(output, true));
        let h = self.ops.group_norm(x, &format!("{path}.norm1"), norm1)?;
        let h = self.ops.conv2d(&h, &format!("{path}.conv1"), conv3x3(input, output))?;
        let h = self.ops.add_bias(&h, &bias)?;
        let h = self.ops.group_norm(&h, &format!("{path}.norm2"), norm2)?;
        let h = self.ops.conv2d(&h, &format!("{path}.conv2"), conv3x3(output, output))?;
        if input == output {
            return self.ops.add(x, &h);
        }
        let spec = Conv2d { kernel: 1, padding: [0; 4], ..conv3x3(input, output) };
        let shortcut = self.ops.conv2d(x, &format!("{path}.conv_shortcut"), spec)?;
        self.ops.add(&shortcut, &h)
    }

    /// `x + to_out(attention(to_q(y), to_k(y), to_v(y)))` with `y = group_norm(x)`, among the pixels.
    fn attention(&mut self, x: &O::Value, path: &str, channels: usize) -> Result<O::Value, O::Error> {
        let norm = self.norm(channels, false);
        let spec = Linear { in_features: channels, out_features: channels };
        let y = self.ops.group_norm(x, &format!("{path}.group_norm"), norm)?;
        let q = self.ops.pointwise(&y, &format!("{path}.to_q"), spec)?;
        let k = self.ops.pointwise(&y, &format!("{path}.to_k"), spec)?;
        let v = self.ops.pointwise(&y, &format!("{path}.to_v"), spec)?;
        let y = self.ops.attention(&q, &k, &v, self.config.heads(channels))?;
        let y = self.ops.pointwise(&y, &format!("{path}.to_out.0"), spec)?;
        self.ops.add(x, &y)
    }
}
