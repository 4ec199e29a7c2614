//! Distances between images by what a network sees in them: LPIPS, on the features of VGG16 or AlexNet (Zhang et al. 2018,
//! arXiv:1801.03924), and the same on those of this project's classifiers. Differentiable in the first image.

use std::path::Path;

use candle_core::{Device, Tensor};
use dmd_core::net::{Activation, Conv2d, Ops};

use crate::classifier::{Classifier, RANGE};
use crate::cpu;
use crate::error::{Error, Result};
use crate::files;
use crate::network::Tensors;
use crate::ops::CandleOps;
use crate::resize::resize;
use crate::weights;

/// Smaller images are enlarged to this side before LPIPS looks at them, as in Yin et al. 2024 (arXiv:2311.18828), section 4.
const SIDE: usize = 224;
/// What LPIPS subtracts from and divides images in [-1, 1] by, per channel.
const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];
/// See [`SHIFT`].
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];
/// Added to the square of a norm that features are divided by; its root is what LPIPS adds to the norm.
const SMALLEST_NORM: f64 = 1e-20;
/// Endings of files with weights.
const ENDINGS: [&str; 3] = ["pth", "pt", "safetensors"];

/// A network of convolutions with ReLU, in stages after whose last one images are compared: side of the squares of which the
/// largest is kept before a stage (every second one; 0: all), and per convolution its place in torchvision's `features`,
/// channels in and out, kernel, stride, padding.
type Plan = &'static [(usize, &'static [[usize; 6]])];

const VGG16: Plan = &[
    (0, &[[0, 3, 64, 3, 1, 1], [2, 64, 64, 3, 1, 1]]),
    (2, &[[5, 64, 128, 3, 1, 1], [7, 128, 128, 3, 1, 1]]),
    (2, &[[10, 128, 256, 3, 1, 1], [12, 256, 256, 3, 1, 1], [14, 256, 256, 3, 1, 1]]),
    (2, &[[17, 256, 512, 3, 1, 1], [19, 512, 512, 3, 1, 1], [21, 512, 512, 3, 1, 1]]),
    (2, &[[24, 512, 512, 3, 1, 1], [26, 512, 512, 3, 1, 1], [28, 512, 512, 3, 1, 1]]),
];
const ALEXNET: Plan = &[
    (0, &[[0, 3, 64, 11, 4, 2]]),
    (3, &[[3, 64, 192, 5, 1, 2]]),
    (3, &[[6, 192, 384, 3, 1, 1]]),
    (0, &[[8, 384, 256, 3, 1, 1]]),
    (0, &[[10, 256, 256, 3, 1, 1]]),
];

/// The learned perceptual image patch similarity, with weights that the user brings.
pub struct Lpips {
    stages: Vec<Stage>,
    device: Device,
}

struct Stage {
    window: usize,
    layers: Vec<(String, Conv2d)>,
    parameters: Tensors,
    /// Weight of each channel's difference, `[1, c, 1, 1]`.
    importance: Tensor,
}

impl Lpips {
    /// Reads the files of a folder: torchvision's VGG16 or AlexNet, and the linear weights of the package `lpips` for it.
    pub fn load(folder: &Path, device: &Device) -> Result<Self> {
        let mut tensors = Tensors::new();
        let entries = std::fs::read_dir(folder).map_err(Error::file("read", folder))?;
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            if !path.extension().is_some_and(|e| ENDINGS.iter().any(|ending| e == *ending)) {
                continue;
            }
            for (name, tensor) in weights::read_file(&path, files::read(&path)?)?.tensors {
                if (name.starts_with("features.") || name.starts_with("lin"))
                    && tensors.insert(name.clone(), tensor).is_some()
                {
                    return Err(Error::content(
                        folder,
                        format!("two files have a tensor `{name}`{}", hint()),
                    ));
                }
            }
        }
        Self::new(&tensors, device).map_err(|e| match e {
            Error::Request(problem) => Error::content(folder, format!("{problem}{}", hint())),
            other => other,
        })
    }

    /// From tensors by torchvision's names (`features.0.weight`) and those of `lpips` (`lin0.model.1.weight`).
    pub fn new(tensors: &Tensors, device: &Device) -> Result<Self> {
        let get = |name: &str, shape: &[usize]| match tensors.get(name) {
            Some(tensor) if tensor.dims() == shape => Ok(tensor.to_device(device)?.detach()),
            Some(tensor) => Err(Error::Request(format!(
                "tensor `{name}` has shape {:?}, expected {shape:?}",
                tensor.dims()
            ))),
            None => Err(Error::Request(format!("there is no tensor `{name}`"))),
        };
        let first = tensors.get("features.0.weight").map(Tensor::dims);
        let plan = if first == Some(&[64, 3, 11, 11]) { ALEXNET } else { VGG16 };
        let mut stages = Vec::new();
        for (i, (window, convolutions)) in plan.iter().enumerate() {
            let (mut layers, mut parameters, mut channels) = (Vec::new(), Tensors::new(), 0);
            for &[place, in_channels, out_channels, kernel, stride, padding] in *convolutions {
                let name = format!("features.{place}");
                let (weight, bias) = (format!("{name}.weight"), format!("{name}.bias"));
                parameters
                    .insert(weight.clone(), get(&weight, &[out_channels, in_channels, kernel, kernel])?);
                parameters.insert(bias.clone(), get(&bias, &[out_channels])?);
                layers.push((
                    name,
                    Conv2d { in_channels, out_channels, kernel, stride, padding: [padding; 4] },
                ));
                channels = out_channels;
            }
            let importance = get(&format!("lin{i}.model.1.weight"), &[1, channels, 1, 1])?;
            stages.push(Stage { window: *window, layers, parameters, importance });
        }
        Ok(Self { stages, device: device.clone() })
    }

    /// The distance of each pair of images, as they are.
    ///
    /// # Shapes
    /// `x`, `y`: `[n, 1 or 3, h, w]` in [-1, 1]; returns `[n]`.
    pub fn distances(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let (mut x, mut y) = (self.prepared(x)?, self.prepared(y)?);
        let mut sum = Tensor::zeros(x.dim(0)?, x.dtype(), &self.device)?;
        for stage in &self.stages {
            (x, y) = (stage.see(&x)?, stage.see(&y)?);
            sum = (sum + difference(&x, &y, Some(&stage.importance))?)?;
        }
        Ok(sum)
    }

    /// Multiply-adds of one image of [`SIDE`] pixels, and values that are kept for its way back.
    fn cost(&self) -> (u64, usize) {
        let (mut side, mut multiply_adds, mut kept) = (SIDE, 0, 0);
        for stage in &self.stages {
            side = if stage.window == 0 { side } else { (side - stage.window) / 2 + 1 };
            for (_, conv) in &stage.layers {
                side = (side + 2 * conv.padding[0] - conv.kernel) / conv.stride + 1;
                let values = conv.out_channels * side * side;
                multiply_adds += (values * conv.in_channels * conv.kernel * conv.kernel) as u64;
                kept += 2 * values;
            }
        }
        (multiply_adds, kept)
    }

    /// Grey becomes three equal channels; each is shifted and scaled.
    fn prepared(&self, x: &Tensor) -> Result<Tensor> {
        let x = match x.dim(1)? {
            1 => Tensor::cat(&[x, x, x], 1)?,
            3 => x.clone(),
            n => return Err(Error::Request(format!("images have {n} channels, LPIPS takes 1 or 3"))),
        };
        let per_channel = |values: [f32; 3]| Tensor::new(&values, &self.device)?.reshape((1, 3, 1, 1));
        Ok(x.broadcast_sub(&per_channel(SHIFT)?)?.broadcast_div(&per_channel(SCALE)?)?)
    }
}

fn hint() -> &'static str {
    "\n\nhint: the folder holds one file of torchvision, `vgg16-397923af.pth` or `alexnet-owt-7be5be79.pth` from \
     download.pytorch.org/models, and the linear weights for it from the Python package `lpips`, `vgg.pth` or `alex.pth` of its \
     folder weights/v0.1"
}

impl Stage {
    fn see(&self, x: &Tensor) -> Result<Tensor> {
        let x = largest(x, self.window)?;
        if x.device().is_cpu() {
            let layers = self.layers.clone();
            return Ok(cpu::apply(&[x], &self.parameters, move |ops, x| convolutions(ops, &layers, &x[0]))?);
        }
        Ok(convolutions(&mut CandleOps::new(&self.parameters, x.device()), &self.layers, &x)?)
    }
}

fn convolutions<O: Ops>(
    ops: &mut O,
    layers: &[(String, Conv2d)],
    x: &O::Value,
) -> std::result::Result<O::Value, O::Error> {
    let mut x = x.clone();
    for (name, conv) in layers {
        x = ops.conv2d(&x, name, *conv)?;
        x = ops.activate(&x, Activation::Relu)?;
    }
    Ok(x)
}

/// The largest of each square of this side, every second one; 0 changes nothing. candle's own has no gradient for squares
/// that overlap.
fn largest(x: &Tensor, window: usize) -> Result<Tensor> {
    if window == 0 {
        return Ok(x.clone());
    }
    let rows = largest_in_rows(x, window)?.transpose(2, 3)?;
    Ok(largest_in_rows(&rows, window)?.transpose(2, 3)?.contiguous()?)
}

fn largest_in_rows(x: &Tensor, window: usize) -> Result<Tensor> {
    let (n, c, h, w) = x.dims4()?;
    if w < window {
        return Err(Error::Request(format!("images are too small: {w} values for squares of {window}")));
    }
    let pairs = x.pad_with_zeros(3, 0, w % 2)?.contiguous()?.reshape((n, c, h, w.div_ceil(2), 2))?;
    let (even, odd) = (pairs.narrow(4, 0, 1)?.squeeze(4)?, pairs.narrow(4, 1, 1)?.squeeze(4)?);
    let count = (w - window) / 2 + 1;
    let mut found = even.narrow(3, 0, count)?.maximum(&odd.narrow(3, 0, count)?)?;
    if window == 3 {
        found = found.maximum(&even.narrow(3, 1, count)?)?;
    }
    Ok(found)
}

/// `Σ_c w_c·(x̂_c − ŷ_c)²`, the mean over the pixels, of features divided by their norm over the channels: Eq. 1.
fn difference(x: &Tensor, y: &Tensor, importance: Option<&Tensor>) -> Result<Tensor> {
    let unit = |x: &Tensor| -> Result<Tensor> {
        Ok(x.broadcast_div(&(x.sqr()?.sum_keepdim(1)? + SMALLEST_NORM)?.sqrt()?)?)
    };
    let square = (unit(x)? - unit(y)?)?.sqr()?;
    let square = match importance {
        Some(importance) => square.broadcast_mul(importance)?,
        None => square,
    };
    Ok(square.sum(1)?.flatten_from(1)?.mean(1)?)
}

/// A network that compares images.
pub enum Perceptual {
    /// All three scales of a classifier, every channel counting the same.
    Classifier(Box<Classifier>),
    /// LPIPS.
    Lpips(Box<Lpips>),
}

impl Perceptual {
    /// Multiply-adds of one image, and values that are kept for its way back.
    pub fn cost(&self) -> Result<(u64, usize)> {
        Ok(match self {
            Self::Classifier(classifier) => {
                let summary = classifier.config.summary()?;
                (summary.total_macs(), summary.activations as usize)
            }
            Self::Lpips(lpips) => lpips.cost(),
        })
    }

    /// The mean distance of images of a model with the values `range` for black and white.
    ///
    /// # Shapes
    /// `x`, `y`: `[n, c, h, w]`; returns a scalar.
    pub fn distance(&self, x: &Tensor, y: &Tensor, range: [f32; 2]) -> Result<Tensor> {
        let factor = f64::from((RANGE[1] - RANGE[0]) / (range[1] - range[0]));
        let offset = f64::from(RANGE[0]) - factor * f64::from(range[0]);
        let [x, y] = [x.affine(factor, offset)?, y.detach().affine(factor, offset)?];
        let distances = match self {
            Self::Classifier(classifier) => {
                let (x, y) = (classifier.scales(&x)?, classifier.scales(&y)?);
                let mut sum = difference(&x[0], &y[0], None)?;
                for (x, y) in x.iter().zip(&y).skip(1) {
                    sum = (sum + difference(x, y, None)?)?;
                }
                sum
            }
            Self::Lpips(lpips) => {
                let enlarged = |x: &Tensor| if x.dim(3)? < SIDE { resize(x, SIDE) } else { Ok(x.clone()) };
                lpips.distances(&enlarged(&x)?, &enlarged(&y)?)?
            }
        };
        Ok(distances.mean_all()?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;

    /// 15.3 thousand million multiply-adds are what is said of VGG16's convolutions everywhere.
    #[test]
    fn the_cost_of_vgg16_is_the_known_one() -> Result<()> {
        let mut tensors = Tensors::new();
        for (i, (_, convolutions)) in VGG16.iter().enumerate() {
            for [place, from, to, kernel, ..] in *convolutions {
                let zeros = |shape: &[usize]| Tensor::zeros(shape, candle_core::DType::F32, &Device::Cpu);
                tensors.insert(format!("features.{place}.weight"), zeros(&[*to, *from, *kernel, *kernel])?);
                tensors.insert(format!("features.{place}.bias"), zeros(&[*to])?);
                tensors.insert(format!("lin{i}.model.1.weight"), zeros(&[1, *to, 1, 1])?);
            }
        }
        let (multiply_adds, kept) = Lpips::new(&tensors, &Device::Cpu)?.cost();
        assert_eq!((multiply_adds / 10_000_000, kept / 2), (1534, 13_547_520));
        Ok(())
    }

    #[test]
    fn the_largest_of_overlapping_squares_gets_the_gradient() -> Result<()> {
        let x = Var::from_tensor(&Tensor::arange(0f32, 25.0, &Device::Cpu)?.reshape((1, 1, 5, 5))?)?;
        let y = largest(&x, 3)?;
        assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [12.0, 14.0, 22.0, 24.0]);
        let grads =
            (y * Tensor::new(&[[[[1f32, 2.0], [3.0, 4.0]]]], &Device::Cpu)?)?.sum_all()?.backward()?;
        let grads = grads.get(&x).map(|g| g.flatten_all()?.to_vec1::<f32>()).transpose()?.unwrap_or_default();
        let expected: Vec<f32> = (0..25)
            .map(|i| match i {
                12 => 1.0,
                14 => 2.0,
                22 => 3.0,
                24 => 4.0,
                _ => 0.0,
            })
            .collect();
        assert_eq!(grads, expected);
        assert_eq!(largest(&x, 2)?.flatten_all()?.to_vec1::<f32>()?, [6.0, 8.0, 16.0, 18.0]);
        Ok(())
    }
}
