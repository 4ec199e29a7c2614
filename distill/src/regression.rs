//! The regression loss: how far a generated image is from its pair. Yin et al. 2024 (arXiv:2311.18828), Eq. 9.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::checkpoint::Source;
use crate::classifier::Classifier;
use crate::error::{Error, Result};
use crate::losses;
use crate::perceptual::{Lpips, Perceptual};

/// The distance of the regression loss, as `--reg` names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Distance {
    /// Mean squared difference.
    L2,
    /// Pseudo-Huber: nearly the norm of the difference.
    Huber,
    /// Between features of a classifier's three scales: the one inside this program, or one in a folder.
    Classifier(Option<PathBuf>),
    /// LPIPS with the weights in a folder.
    Lpips(PathBuf),
}

impl FromStr for Distance {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text.split_once(':') {
            None if text == "l2" => Ok(Self::L2),
            None if text == "huber" => Ok(Self::Huber),
            None if text == "classifier" => Ok(Self::Classifier(None)),
            Some(("classifier", folder)) if !folder.is_empty() => Ok(Self::Classifier(Some(folder.into()))),
            Some(("lpips", folder)) if !folder.is_empty() => Ok(Self::Lpips(folder.into())),
            _ => Err(format!(
                "got `{text}`, expected `l2`, `huber`, `classifier`, `classifier:DIR` or `lpips:DIR`"
            )),
        }
    }
}

impl TryFrom<String> for Distance {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Distance {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::L2 => write!(f, "l2"),
            Self::Huber => write!(f, "huber"),
            Self::Classifier(None) => write!(f, "classifier"),
            Self::Classifier(Some(folder)) => write!(f, "classifier:{}", folder.display()),
            Self::Lpips(folder) => write!(f, "lpips:{}", folder.display()),
        }
    }
}

impl From<Distance> for String {
    fn from(distance: Distance) -> Self {
        distance.to_string()
    }
}

impl Distance {
    /// The same wherever the program runs next.
    pub fn absolute(self) -> Result<Self> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(Error::file("find", path));
        Ok(match self {
            Self::Classifier(Some(folder)) => Self::Classifier(Some(absolute(&folder)?)),
            Self::Lpips(folder) => Self::Lpips(absolute(&folder)?),
            other => other,
        })
    }
}

/// A distance with its network.
pub enum Regression {
    /// Mean squared difference.
    L2,
    /// Pseudo-Huber.
    Huber,
    /// By what a network sees, for images with these values of black and white.
    Perceptual(Perceptual, [f32; 2]),
}

impl Regression {
    /// Reads the network, for images `[c, h, w]` with these values of black and white.
    pub fn load(distance: &Distance, shape: [usize; 3], range: [f32; 2], device: &Device) -> Result<Self> {
        let network = match distance {
            Distance::L2 => return Ok(Self::L2),
            Distance::Huber => return Ok(Self::Huber),
            Distance::Lpips(folder) => {
                if !matches!(shape[0], 1 | 3) {
                    return Err(Error::Request(format!(
                        "images have {} channels, LPIPS takes 1 or 3\n\nhint: `--reg l2`",
                        shape[0]
                    )));
                }
                Perceptual::Lpips(Box::new(Lpips::load(folder, device)?))
            }
            Distance::Classifier(folder) => {
                let classifier = match folder {
                    Some(folder) => Classifier::load(&Source::Folder(folder.clone()), device)?,
                    None => Classifier::bundled(device)?,
                };
                let expected = classifier.config.image_shape();
                if shape != expected {
                    return Err(Error::Request(format!(
                        "images have shape {shape:?}, the classifier of `--reg {distance}` takes {expected:?}\n\nhint: \
                         `dmd-distill classifier --data DIR --shape CxHxW` trains another for `--reg classifier:DIR`; `--reg l2` needs none"
                    )));
                }
                Perceptual::Classifier(Box::new(classifier))
            }
        };
        Ok(Self::Perceptual(network, range))
    }

    /// Multiply-adds of one image in the network, and values that are kept for its way back.
    pub fn cost(&self) -> Result<(u64, usize)> {
        match self {
            Self::L2 | Self::Huber => Ok((0, 0)),
            Self::Perceptual(network, _) => network.cost(),
        }
    }

    /// The mean distance of generated images from those of their pairs.
    ///
    /// # Shapes
    /// `x_gen`, `y`: `[b, c, h, w]`; returns a scalar.
    pub fn loss(&self, x_gen: &Tensor, y: &Tensor) -> Result<Tensor> {
        match self {
            Self::L2 => losses::l2(x_gen, y),
            Self::Huber => losses::pseudo_huber(x_gen, y),
            Self::Perceptual(network, range) => network.distance(x_gen, y, *range),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for name in ["l2", "huber", "classifier", "classifier:a/b", "lpips:c:d"] {
            let distance: Distance = serde_json::from_value(name.into()).unwrap();
            assert_eq!(
                (distance.to_string().as_str(), serde_json::to_value(&distance).unwrap()),
                (name, name.into())
            );
        }
        for name in ["", "L2", "lpips", "lpips:", "classifier:", "l2:x"] {
            assert!(name.parse::<Distance>().unwrap_err().contains("lpips:DIR"), "{name}");
        }
    }

    #[test]
    fn a_network_is_loaded_for_the_images_it_takes() {
        let load = |name: &str, shape| {
            Regression::load(&name.parse().unwrap(), shape, [-1.0, 1.0], &Device::Cpu)
                .map_err(|e| e.to_string())
        };
        for name in ["l2", "huber"] {
            assert_eq!(load(name, [4, 8, 8]).unwrap().cost().unwrap(), (0, 0));
        }
        let (macs, kept) = load("classifier", [1, 28, 28]).unwrap().cost().unwrap();
        assert!(macs > 1_000_000 && kept > 28 * 28, "{macs} {kept}");
        let refused = |name, shape| load(name, shape).err().unwrap();
        assert!(
            refused("classifier", [1, 32, 32]).starts_with("images have shape [1, 32, 32], the classifier")
        );
        assert!(
            refused("lpips:missing", [4, 8, 8]).starts_with("images have 4 channels, LPIPS takes 1 or 3")
        );
        for channels in [1, 3] {
            assert!(!refused("lpips:missing", [channels, 8, 8]).contains("channels"), "{channels}");
        }
    }
}
