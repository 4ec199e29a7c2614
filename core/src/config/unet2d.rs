//! diffusers `UNet2DModel` (0.42); missing keys take the values diffusers gives them.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::Keys;
use crate::net::Activation;
use crate::{Error, Result};

/// One resolution of a U-Net.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Block {
    /// Residual blocks alone (`DownBlock2D`, `UpBlock2D`).
    Plain,
    /// Self-attention after each residual block (`AttnDownBlock2D`, `AttnUpBlock2D`).
    Attention,
    /// Residual blocks, one of which changes the size (`ResnetDownsampleBlock2D`, `ResnetUpsampleBlock2D`).
    Resnet,
}

/// How a resolution is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resample {
    /// A convolution.
    Conv,
    /// A residual block that averages, or repeats, pixels.
    Resnet,
}

/// How the embedding of step and class enters a residual block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TimeShift {
    /// Added after the first convolution.
    #[serde(rename = "default")]
    Add,
    /// Factor and summand after the second normalisation.
    #[serde(rename = "scale_shift")]
    ScaleShift,
}

/// diffusers `UNet2DModel` with positional time embedding and optional class embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct UNet2DConfig {
    /// Image side in pixels: input is `[n, in_channels, sample_size, sample_size]`.
    pub sample_size: usize,
    /// Channels of the noisy image.
    pub in_channels: usize,
    /// Channels of the predicted noise; equal to `in_channels`.
    pub out_channels: usize,
    /// Channels per resolution, finest first; each a multiple of `norm_num_groups`.
    pub block_out_channels: Vec<usize>,
    /// Kind of each resolution on the way down, finest first.
    pub down_blocks: Vec<Block>,
    /// Kind of each resolution on the way up, coarsest first.
    pub up_blocks: Vec<Block>,
    /// Residual blocks per resolution on the way down; one more on the way up.
    pub layers_per_block: usize,
    /// Attention in the middle block.
    pub add_attention: bool,
    /// Channels per attention head; none means one head.
    pub attention_head_dim: Option<usize>,
    /// 1: symmetric padding of the strided convolution; 0: one row and column of zeros at the bottom and right.
    pub downsample_padding: usize,
    /// How attention resolutions are changed on the way down.
    pub downsample_type: Resample,
    /// How attention resolutions are changed on the way up.
    pub upsample_type: Resample,
    /// How the embedding of step and class enters.
    pub resnet_time_scale_shift: TimeShift,
    /// Divisor of the sums in the middle block.
    pub mid_block_scale_factor: f64,
    /// Activation of every residual block.
    pub activation: Activation,
    /// Time embedding is `[cos, sin]` instead of `[sin, cos]`.
    pub flip_sin_to_cos: bool,
    /// Subtracted from the number of frequencies in the time embedding's exponent.
    pub freq_shift: f64,
    /// Groups of every GroupNorm.
    pub norm_num_groups: usize,
    /// Epsilon of every GroupNorm.
    pub norm_eps: f64,
    /// Rows of the class embedding table, if the model is class-conditional.
    pub num_class_embeds: Option<usize>,
}

/// diffusers' names of [`Block`]s, in their order.
const DOWN_BLOCKS: [&str; 3] = ["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"];
const UP_BLOCKS: [&str; 3] = ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"];
/// diffusers' names of activations; the first is the one that is written.
const ACTIVATIONS: [(&str, Activation); 5] = [
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("relu", Activation::Relu),
    ("mish", Activation::Mish),
];

impl UNet2DConfig {
    pub(super) fn from_map(map: Map<String, Value>) -> Result<Self> {
        let mut keys = Keys(map);
        let config = Self {
            sample_size: keys.side("sample_size")?,
            in_channels: keys.take("in_channels", 3)?,
            out_channels: keys.take("out_channels", 3)?,
            block_out_channels: keys.take("block_out_channels", vec![224, 448, 672, 896])?,
            down_blocks: keys.blocks(
                "down_block_types",
                ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
                DOWN_BLOCKS,
            )?,
            up_blocks: keys.blocks(
                "up_block_types",
                ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
                UP_BLOCKS,
            )?,
            layers_per_block: keys.take("layers_per_block", 2)?,
            add_attention: keys.take("add_attention", true)?,
            attention_head_dim: keys.take("attention_head_dim", Some(8))?,
            downsample_padding: keys.take("downsample_padding", 1)?,
            downsample_type: keys.take("downsample_type", Resample::Conv)?,
            upsample_type: keys.take("upsample_type", Resample::Conv)?,
            resnet_time_scale_shift: keys.take("resnet_time_scale_shift", TimeShift::Add)?,
            mid_block_scale_factor: keys.take("mid_block_scale_factor", 1.0)?,
            activation: keys.activation()?,
            flip_sin_to_cos: keys.take("flip_sin_to_cos", true)?,
            freq_shift: keys.take("freq_shift", 0.0)?,
            norm_num_groups: keys.take("norm_num_groups", 32)?,
            norm_eps: keys.take("norm_eps", 1e-5)?,
            num_class_embeds: keys.take("num_class_embeds", None)?,
        };
        keys.only("center_input_sample", json!(false))?;
        keys.only("time_embedding_type", json!("positional"))?;
        keys.only("time_embedding_dim", Value::Null)?;
        keys.only("mid_block_type", json!("UNetMidBlock2D"))?;
        keys.take::<f64>("dropout", 0.0)?; // only in training by diffusers; a base is used as it is at inference
        keys.only("attn_norm_num_groups", Value::Null)?;
        keys.only("class_embed_type", Value::Null)?;
        keys.take::<Option<usize>>("num_train_timesteps", None)?;
        keys.finish()?;
        config.validate()?;
        Ok(config)
    }

    pub(super) fn to_map(&self) -> Map<String, Value> {
        let names = |blocks: &[Block], names: [&str; 3]| -> Vec<String> {
            blocks.iter().map(|b| names[*b as usize].to_owned()).collect()
        };
        let value = json!({
            "_class_name": "UNet2DModel",
            "sample_size": self.sample_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.block_out_channels,
            "down_block_types": names(&self.down_blocks, DOWN_BLOCKS),
            "up_block_types": names(&self.up_blocks, UP_BLOCKS),
            "layers_per_block": self.layers_per_block,
            "add_attention": self.add_attention,
            "attention_head_dim": self.attention_head_dim,
            "downsample_padding": self.downsample_padding,
            "flip_sin_to_cos": self.flip_sin_to_cos,
            "freq_shift": self.freq_shift,
            "norm_num_groups": self.norm_num_groups,
            "norm_eps": self.norm_eps,
            "num_class_embeds": self.num_class_embeds,
            "downsample_type": self.downsample_type,
            "upsample_type": self.upsample_type,
            "resnet_time_scale_shift": self.resnet_time_scale_shift,
            "mid_block_scale_factor": self.mid_block_scale_factor,
            "act_fn": ACTIVATIONS.iter().find(|(_, a)| *a == self.activation).map(|(name, _)| name),
            "time_embedding_type": "positional",
        });
        match value {
            Value::Object(map) => map,
            _ => Map::new(),
        }
    }

    fn validate(&self) -> Result<()> {
        let levels = self.block_out_channels.len();
        for (key, got) in
            [("down_block_types", self.down_blocks.len()), ("up_block_types", self.up_blocks.len())]
        {
            if got != levels {
                return Err(Error::config(
                    key,
                    format!("got {got} blocks, expected {levels} as in `block_out_channels`"),
                ));
            }
        }
        let positive = [
            ("sample_size", self.sample_size),
            ("in_channels", self.in_channels),
            ("layers_per_block", self.layers_per_block),
            ("norm_num_groups", self.norm_num_groups),
            ("block_out_channels", levels),
        ];
        if let Some((key, _)) = positive.iter().find(|(_, v)| *v == 0) {
            return Err(Error::config(key, "got 0, expected at least 1"));
        }
        let limits = [
            ("sample_size", self.sample_size, 4096),
            ("in_channels", self.in_channels, 1024),
            ("layers_per_block", self.layers_per_block, 64),
            ("block_out_channels", levels, 12),
            ("block_out_channels", self.block_out_channels.iter().copied().max().unwrap_or(0), 65_536),
            ("num_class_embeds", self.num_class_embeds.unwrap_or(0), 1 << 20),
        ];
        if let Some((key, got, limit)) = limits.iter().find(|(_, got, limit)| got > limit) {
            return Err(Error::config(key, format!("got {got}, expected at most {limit}")));
        }
        if self.out_channels != self.in_channels {
            return Err(Error::config(
                "out_channels",
                format!(
                    "got {}, expected {} as `in_channels` (learned variance is not implemented)",
                    self.out_channels, self.in_channels
                ),
            ));
        }
        for &c in &self.block_out_channels {
            if c == 0 || c % self.norm_num_groups != 0 {
                return Err(Error::config(
                    "block_out_channels",
                    format!("got {c}, expected a multiple of `norm_num_groups` = {}", self.norm_num_groups),
                ));
            }
            if let Some(d) = self.attention_head_dim
                && (d == 0 || c % d != 0)
            {
                return Err(Error::config(
                    "attention_head_dim",
                    format!("{c} channels do not split into {d}"),
                ));
            }
        }
        if !self.block_out_channels[0].is_multiple_of(2) {
            return Err(Error::config(
                "block_out_channels",
                "the first must be even (sine and cosine halves)",
            ));
        }
        if self.downsample_padding > 1 {
            return Err(Error::config(
                "downsample_padding",
                format!("got {}, expected 0 or 1", self.downsample_padding),
            ));
        }
        if self.freq_shift >= (self.block_out_channels[0] / 2) as f64 {
            return Err(Error::config(
                "freq_shift",
                format!("got {}, which divides by zero", self.freq_shift),
            ));
        }
        let factor = 1usize << (levels - 1);
        if !self.sample_size.is_multiple_of(factor) {
            return Err(Error::config(
                "sample_size",
                format!("got {}, expected a multiple of {factor} ({levels} resolutions)", self.sample_size),
            ));
        }
        if !(self.mid_block_scale_factor.is_finite() && self.mid_block_scale_factor > 0.0) {
            let got = self.mid_block_scale_factor;
            return Err(Error::config(
                "mid_block_scale_factor",
                format!("got {got}, expected a positive number"),
            ));
        }
        if self.num_class_embeds == Some(0) {
            return Err(Error::config("num_class_embeds", "got 0, expected at least 1"));
        }
        Ok(())
    }

    /// Attention heads for a block of `channels` channels.
    pub fn heads(&self, channels: usize) -> usize {
        self.attention_head_dim.map_or(1, |d| channels / d)
    }
}

impl Keys {
    fn side(&mut self, key: &str) -> Result<usize> {
        let value = self.0.remove(key).unwrap_or(Value::Null);
        let pair = serde_json::from_value::<[usize; 2]>(value.clone());
        match (value.as_u64(), pair) {
            (Some(n), _) => {
                usize::try_from(n).map_err(|_| Error::config(key, format!("got {n}, which is too large")))
            }
            (None, Ok([h, w])) if h == w => Ok(h),
            _ => Err(Error::config(key, format!("got {value}, expected the image side in pixels"))),
        }
    }

    fn blocks(&mut self, key: &str, missing: [&str; 4], known: [&str; 3]) -> Result<Vec<Block>> {
        let names: Vec<String> = self.take(key, missing.iter().map(|s| (*s).to_owned()).collect())?;
        let kinds = [Block::Plain, Block::Attention, Block::Resnet];
        let kind = |name: &String| {
            let place = known.iter().position(|known| known == name);
            place
                .map(|place| kinds[place])
                .ok_or_else(|| Error::config(key, format!("got `{name}`, expected `{}`", known.join("`, `"))))
        };
        names.iter().map(kind).collect()
    }

    fn activation(&mut self) -> Result<Activation> {
        let name: String = self.take("act_fn", "silu".to_owned())?;
        let known = ACTIVATIONS.iter().find(|(known, _)| *known == name);
        known.map(|(_, activation)| *activation).ok_or_else(|| {
            let names: Vec<&str> = ACTIVATIONS.iter().map(|(name, _)| *name).collect();
            Error::config("act_fn", format!("got `{name}`, expected `{}`", names.join("`, `")))
        })
    }
}
