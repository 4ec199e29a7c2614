//! Architecture of a denoiser as `config.json` describes it.
//! Keys that only keep books (`_class_name`, …) are ignored, every other key is either implemented or refused by name.

mod keys;
mod unet2d;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result};
pub(crate) use keys::Keys;
pub use unet2d::{Block, Resample, TimeShift, UNet2DConfig};

/// A network this toolkit can run, selected by `_class_name`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub enum ModelConfig {
    /// diffusers `UNet2DModel`.
    UNet2D(UNet2DConfig),
    /// The class-conditional MNIST network of Conditional_Diffusion_MNIST.
    ContextUnet(ContextUnetConfig),
    /// The small CelebA network of the reference experiments.
    CelebaUnet(CelebaUnetConfig),
}

/// `ContextUnet`: classes `0..n_classes`, and `n_classes` for none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContextUnetConfig {
    /// Image side in pixels, a multiple of 4.
    #[serde(default = "mnist::sample_size")]
    pub sample_size: usize,
    /// Channels of the noisy image.
    #[serde(default = "mnist::in_channels")]
    pub in_channels: usize,
    /// Channels of the finest resolution, a multiple of 8.
    pub n_feat: usize,
    /// Classes.
    #[serde(default = "mnist::n_classes")]
    pub n_classes: usize,
    /// The step enters as `t / n_steps`.
    #[serde(default = "mnist::n_steps")]
    pub n_steps: usize,
}

mod mnist {
    pub fn sample_size() -> usize {
        28
    }
    pub fn in_channels() -> usize {
        1
    }
    pub fn n_classes() -> usize {
        10
    }
    pub fn n_steps() -> usize {
        400
    }
}

/// `CelebaUNet`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CelebaUnetConfig {
    /// Image side in pixels, a multiple of 4.
    pub sample_size: usize,
    /// Channels of the noisy image.
    pub in_channels: usize,
    /// Channels of the finest resolution, a multiple of 8.
    pub channels: usize,
    /// Rows of the table of steps.
    pub n_steps: usize,
}

impl Default for CelebaUnetConfig {
    fn default() -> Self {
        Self { sample_size: 32, in_channels: 3, channels: 16, n_steps: 1000 }
    }
}

impl ModelConfig {
    /// Reads `config.json`.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str::<Map<String, Value>>(text)
            .map_err(|e| Error::config("config.json", format!("not a JSON object: {e}")))?
            .try_into()
    }

    /// `[channels, height, width]` of the image.
    pub fn image_shape(&self) -> [usize; 3] {
        match self {
            Self::UNet2D(c) => [c.in_channels, c.sample_size, c.sample_size],
            Self::ContextUnet(c) => [c.in_channels, c.sample_size, c.sample_size],
            Self::CelebaUnet(c) => [c.in_channels, c.sample_size, c.sample_size],
        }
    }

    /// Rows of the class table, if the model takes a class.
    pub fn class_rows(&self) -> Option<usize> {
        match self {
            Self::UNet2D(c) => c.num_class_embeds,
            Self::ContextUnet(c) => Some(c.n_classes + 1),
            Self::CelebaUnet(_) => None,
        }
    }

    /// Value range of the images the network was made for.
    pub fn range(&self) -> [f32; 2] {
        match self {
            Self::UNet2D(_) | Self::CelebaUnet(_) => [-1.0, 1.0],
            Self::ContextUnet(_) => [0.0, 1.0],
        }
    }

    /// Short name of the architecture, for the model card.
    pub fn arch(&self) -> &'static str {
        match self {
            Self::UNet2D(_) => "unet2d",
            Self::ContextUnet(_) => "context_unet",
            Self::CelebaUnet(_) => "celeba_unet",
        }
    }
}

/// Values of `_class_name`.
const CLASS_NAMES: [&str; 3] = ["UNet2DModel", "ContextUnet", "CelebaUNet"];

impl TryFrom<Map<String, Value>> for ModelConfig {
    type Error = Error;

    fn try_from(map: Map<String, Value>) -> Result<Self> {
        let expected = format!("expected `{}`", CLASS_NAMES.join("`, `"));
        match map.get("_class_name").and_then(Value::as_str) {
            Some("UNet2DModel") => Ok(Self::UNet2D(UNet2DConfig::from_map(map)?)),
            Some("ContextUnet") => {
                let config: ContextUnetConfig = plain(map)?;
                sizes("n_feat", config.sample_size, config.in_channels, config.n_feat, config.n_steps)?;
                if !(1..=1 << 20).contains(&config.n_classes) {
                    let got = config.n_classes;
                    return Err(Error::config("n_classes", format!("got {got}, expected 1 to {}", 1 << 20)));
                }
                Ok(Self::ContextUnet(config))
            }
            Some("CelebaUNet") => {
                let config: CelebaUnetConfig = plain(map)?;
                sizes("channels", config.sample_size, config.in_channels, config.channels, config.n_steps)?;
                Ok(Self::CelebaUnet(config))
            }
            Some(other) => Err(Error::config("_class_name", format!("got `{other}`, {expected}"))),
            None => Err(Error::config("_class_name", format!("missing, {expected}"))),
        }
    }
}

/// Reads the keys that are no book-keeping.
fn plain<T: DeserializeOwned>(mut map: Map<String, Value>) -> Result<T> {
    map.retain(|key, _| !key.starts_with('_'));
    serde_json::from_value(Value::Object(map)).map_err(|e| Error::config("config.json", e.to_string()))
}

/// Checks what the two reference networks have in common.
fn sizes(key: &str, side: usize, in_channels: usize, channels: usize, steps: usize) -> Result<()> {
    for (key, got, multiple, limit) in [
        ("sample_size", side, 4, 4096),
        ("in_channels", in_channels, 1, 1024),
        (key, channels, 8, 8192),
        ("n_steps", steps, 1, 1 << 20),
    ] {
        if got == 0 || got % multiple != 0 || got > limit {
            let expected = format!("expected a multiple of {multiple} up to {limit}");
            return Err(Error::config(key, format!("got {got}, {expected}")));
        }
    }
    Ok(())
}

impl From<ModelConfig> for Map<String, Value> {
    fn from(config: ModelConfig) -> Self {
        let (name, value) = match config {
            ModelConfig::UNet2D(c) => return c.to_map(),
            ModelConfig::ContextUnet(c) => (CLASS_NAMES[1], serde_json::to_value(c)),
            ModelConfig::CelebaUnet(c) => (CLASS_NAMES[2], serde_json::to_value(c)),
        };
        let mut map = match value {
            Ok(Value::Object(map)) => map,
            _ => Map::new(),
        };
        map.insert("_class_name".into(), name.into());
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<ModelConfig> {
        ModelConfig::from_json(text)
    }

    #[test]
    fn ranges_and_classes_are_those_of_the_reference_experiments() {
        for (keys, range, rows) in [
            (r#""_class_name":"UNet2DModel","sample_size":32"#, [-1.0, 1.0], None),
            (r#""_class_name":"ContextUnet","n_feat":8,"n_steps":50,"n_classes":10"#, [0.0, 1.0], Some(11)),
            (r#""_class_name":"CelebaUNet""#, [-1.0, 1.0], None),
        ] {
            let config = read(&format!("{{{keys}}}")).unwrap();
            assert_eq!((config.range(), config.class_rows()), (range, rows), "{keys}");
        }
    }

    #[test]
    fn sizes_of_the_reference_networks_have_bounds() {
        for (key, good, bad) in [
            ("sample_size", 4096, [0, 30, 4100]),
            ("in_channels", 1024, [0, 1025, 1 << 40]),
            ("channels", 8192, [0, 12, 8200]),
            ("n_steps", 1 << 20, [0, (1 << 20) + 1, 1 << 40]),
        ] {
            let config = |n: u64| read(&format!(r#"{{"_class_name":"CelebaUNet","{key}":{n}}}"#));
            assert!(config(good).is_ok(), "{key} {good}");
            for n in bad {
                let message = config(n).unwrap_err().to_string();
                assert!(message.contains(&format!("got {n}")) && message.contains(key), "{message}");
            }
        }
    }

    #[test]
    fn keys_with_one_value_take_no_other() {
        for (value, good) in [("false", true), ("true", false), ("0", false)] {
            let done = read(&format!(
                r#"{{"_class_name":"UNet2DModel","sample_size":32,"center_input_sample":{value}}}"#
            ));
            assert_eq!(done.is_ok(), good, "{value}: {done:?}");
        }
    }
}
