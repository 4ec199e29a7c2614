//! Inception-v3 as the FID uses it: the layers and padding of the TensorFlow network of 2015-12-05, in the names of
//! pytorch-fid's checkpoint. Szegedy et al. 2016 (arXiv:1512.00567); Heusel et al. 2017 (arXiv:1706.08500).
//! For inference alone: candle's operations, batch normalisation folded into the convolutions.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};

use crate::error::{Error, Result};
use crate::files;
use crate::network::Tensors;
use crate::resize::resize;
use crate::weights;

/// Features of the last average pool.
pub const FEATURES: usize = 2048;
/// First digits of the SHA-256 of pytorch-fid's file, which carries them in its own name.
const PUBLISHED: &str = "6726825d";
/// Image side that the network takes.
const SIDE: usize = 299;
/// Added to the variance by every normalisation.
const EPS: f64 = 1e-3;

/// The network.
pub struct Inception {
    layers: BTreeMap<String, Layer>,
    device: Device,
    sha256: String,
}

/// A convolution with its normalisation.
struct Layer {
    weight: Tensor,
    bias: Tensor,
}

/// What becomes of the third branch of a mixed block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pool {
    /// Mean over the pixels that exist.
    Average,
    /// Largest.
    Max,
}

impl Inception {
    /// Reads pytorch-fid's checkpoint, or the same tensors as safetensors.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let found = weights::read_file(path, files::read(path)?)?;
        Self::new(&found.tensors, found.sha256, device).map_err(|e| match e {
            Error::Request(problem) => Error::content(
                path,
                format!(
                    "{problem}\n\nhint: `inception:` takes pytorch-fid's `pt_inception-2015-12-05-{PUBLISHED}.pth`, or the \
                     same tensors as safetensors"
                ),
            ),
            other => other,
        })
    }

    /// From tensors by the checkpoint's names; the layer of classes is not needed.
    pub fn new(tensors: &Tensors, sha256: String, device: &Device) -> Result<Self> {
        let mut layers = BTreeMap::new();
        for (name, [out, input, height, width]) in shapes() {
            let get = |suffix: &str, shape: &[usize]| {
                let key = format!("{name}.{suffix}");
                match tensors.get(&key) {
                    Some(tensor) if tensor.dims() == shape => Ok(tensor.to_device(device)?),
                    Some(tensor) => Err(Error::Request(format!(
                        "tensor `{key}` has shape {:?}, expected {shape:?}",
                        tensor.dims()
                    ))),
                    None => Err(Error::Request(format!("there is no tensor `{key}`"))),
                }
            };
            let weight = get("conv.weight", &[out, input, height, width])?;
            let scale = get("bn.weight", &[out])?;
            let deviation = (get("bn.running_var", &[out])? + EPS)?.sqrt()?;
            let scale = (scale / deviation)?;
            let bias = (get("bn.bias", &[out])? - (get("bn.running_mean", &[out])? * &scale)?)?;
            let weight = weight.broadcast_mul(&scale.reshape((out, 1, 1, 1))?)?;
            layers.insert(name, Layer { weight, bias: bias.reshape((1, out, 1, 1))? });
        }
        Ok(Self { layers, device: device.clone(), sha256 })
    }

    /// Whether these are the weights that the name FID stands for.
    pub fn is_published(&self) -> bool {
        self.sha256.starts_with(PUBLISHED)
    }

    /// Network, number of features, and the first digits of the file's SHA-256.
    pub fn name(&self) -> String {
        format!("inception-{FEATURES} ({})", self.sha256.get(..8).unwrap_or("unsaved"))
    }

    /// The features of images of any size.
    ///
    /// # Shapes
    /// `x`: `[n, 1 or 3, h, w]` in [0, 1]; returns `[n, 2048]`.
    pub fn features(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.to_device(&self.device)?;
        let x = match x.dim(1)? {
            1 => Tensor::cat(&[&x, &x, &x], 1)?,
            3 => x,
            n => return Err(Error::Request(format!("images have {n} channels, expected 1 or 3"))),
        };
        let x = ((resize(&x, SIDE)? * 2.0)? - 1.0)?;
        let x = self.conv(&x, "Conv2d_1a_3x3", 2, [0, 0])?;
        let x = self.conv(&x, "Conv2d_2a_3x3", 1, [0, 0])?;
        let x = halve(&self.conv(&x, "Conv2d_2b_3x3", 1, [1, 1])?)?;
        let x = self.conv(&x, "Conv2d_3b_1x1", 1, [0, 0])?;
        let mut x = halve(&self.conv(&x, "Conv2d_4a_3x3", 1, [0, 0])?)?;
        for name in ["Mixed_5b", "Mixed_5c", "Mixed_5d"] {
            x = self.block_a(&x, name)?;
        }
        x = self.block_b(&x, "Mixed_6a")?;
        for name in ["Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"] {
            x = self.block_c(&x, name)?;
        }
        x = self.block_d(&x, "Mixed_7a")?;
        x = self.block_e(&x, "Mixed_7b", Pool::Average)?;
        x = self.block_e(&x, "Mixed_7c", Pool::Max)?;
        Ok(x.mean(3)?.mean(2)?)
    }

    /// Convolution, normalisation, ReLU; `padding` in height and width.
    fn conv(&self, x: &Tensor, name: &str, stride: usize, padding: [usize; 2]) -> Result<Tensor> {
        let layer = self
            .layers
            .get(name)
            .ok_or_else(|| Error::Request(format!("the network has no layer `{name}`")))?;
        let [vertical, horizontal] = padding;
        let x = x.pad_with_zeros(2, vertical, vertical)?.pad_with_zeros(3, horizontal, horizontal)?;
        Ok(x.conv2d(&layer.weight, 0, stride, 1, 1)?.broadcast_add(&layer.bias)?.relu()?)
    }

    /// Convolutions with stride 1 in a row, each as large as its weight says, images keeping their size.
    fn chain(&self, x: &Tensor, block: &str, names: &[&str]) -> Result<Tensor> {
        let mut x = x.clone();
        for name in names {
            let name = format!("{block}.{name}");
            let padding = match self.layers.get(&name).map(|layer| layer.weight.dims()) {
                Some([_, _, height, width]) => [height / 2, width / 2],
                _ => [0, 0],
            };
            x = self.conv(&x, &name, 1, padding)?;
        }
        Ok(x)
    }

    fn block_a(&self, x: &Tensor, block: &str) -> Result<Tensor> {
        let branches = [
            self.chain(x, block, &["branch1x1"])?,
            self.chain(x, block, &["branch5x5_1", "branch5x5_2"])?,
            self.chain(x, block, &["branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"])?,
            self.chain(&smooth(x, Pool::Average)?, block, &["branch_pool"])?,
        ];
        Ok(Tensor::cat(&branches, 1)?)
    }

    fn block_b(&self, x: &Tensor, block: &str) -> Result<Tensor> {
        let deep = self.chain(x, block, &["branch3x3dbl_1", "branch3x3dbl_2"])?;
        let branches = [
            self.conv(x, &format!("{block}.branch3x3"), 2, [0, 0])?,
            self.conv(&deep, &format!("{block}.branch3x3dbl_3"), 2, [0, 0])?,
            halve(x)?,
        ];
        Ok(Tensor::cat(&branches, 1)?)
    }

    fn block_c(&self, x: &Tensor, block: &str) -> Result<Tensor> {
        let deep = ["branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"];
        let branches = [
            self.chain(x, block, &["branch1x1"])?,
            self.chain(x, block, &["branch7x7_1", "branch7x7_2", "branch7x7_3"])?,
            self.chain(x, block, &deep)?,
            self.chain(&smooth(x, Pool::Average)?, block, &["branch_pool"])?,
        ];
        Ok(Tensor::cat(&branches, 1)?)
    }

    fn block_d(&self, x: &Tensor, block: &str) -> Result<Tensor> {
        let three = self.chain(x, block, &["branch3x3_1"])?;
        let seven = self.chain(x, block, &["branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3"])?;
        let branches = [
            self.conv(&three, &format!("{block}.branch3x3_2"), 2, [0, 0])?,
            self.conv(&seven, &format!("{block}.branch7x7x3_4"), 2, [0, 0])?,
            halve(x)?,
        ];
        Ok(Tensor::cat(&branches, 1)?)
    }

    /// The last block takes the largest instead of the mean, as TensorFlow's network of that day did.
    fn block_e(&self, x: &Tensor, block: &str, pool: Pool) -> Result<Tensor> {
        let three = self.chain(x, block, &["branch3x3_1"])?;
        let deep = self.chain(x, block, &["branch3x3dbl_1", "branch3x3dbl_2"])?;
        let branches = [
            self.chain(x, block, &["branch1x1"])?,
            self.chain(&three, block, &["branch3x3_2a"])?,
            self.chain(&three, block, &["branch3x3_2b"])?,
            self.chain(&deep, block, &["branch3x3dbl_3a"])?,
            self.chain(&deep, block, &["branch3x3dbl_3b"])?,
            self.chain(&smooth(x, pool)?, block, &["branch_pool"])?,
        ];
        Ok(Tensor::cat(&branches, 1)?)
    }
}

/// Name and weight shape of every convolution.
pub fn shapes() -> BTreeMap<String, [usize; 4]> {
    let mut all = BTreeMap::new();
    let mut add = |block: &str, layers: &[(&str, [usize; 4])]| {
        for (name, shape) in layers {
            let name = if block.is_empty() { (*name).to_owned() } else { format!("{block}.{name}") };
            all.insert(name, *shape);
        }
    };
    add(
        "",
        &[
            ("Conv2d_1a_3x3", [32, 3, 3, 3]),
            ("Conv2d_2a_3x3", [32, 32, 3, 3]),
            ("Conv2d_2b_3x3", [64, 32, 3, 3]),
            ("Conv2d_3b_1x1", [80, 64, 1, 1]),
            ("Conv2d_4a_3x3", [192, 80, 3, 3]),
        ],
    );
    for (block, c, pool) in [("Mixed_5b", 192, 32), ("Mixed_5c", 256, 64), ("Mixed_5d", 288, 64)] {
        add(
            block,
            &[
                ("branch1x1", [64, c, 1, 1]),
                ("branch5x5_1", [48, c, 1, 1]),
                ("branch5x5_2", [64, 48, 5, 5]),
                ("branch3x3dbl_1", [64, c, 1, 1]),
                ("branch3x3dbl_2", [96, 64, 3, 3]),
                ("branch3x3dbl_3", [96, 96, 3, 3]),
                ("branch_pool", [pool, c, 1, 1]),
            ],
        );
    }
    add(
        "Mixed_6a",
        &[
            ("branch3x3", [384, 288, 3, 3]),
            ("branch3x3dbl_1", [64, 288, 1, 1]),
            ("branch3x3dbl_2", [96, 64, 3, 3]),
            ("branch3x3dbl_3", [96, 96, 3, 3]),
        ],
    );
    for (block, c) in [("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)] {
        add(
            block,
            &[
                ("branch1x1", [192, 768, 1, 1]),
                ("branch7x7_1", [c, 768, 1, 1]),
                ("branch7x7_2", [c, c, 1, 7]),
                ("branch7x7_3", [192, c, 7, 1]),
                ("branch7x7dbl_1", [c, 768, 1, 1]),
                ("branch7x7dbl_2", [c, c, 7, 1]),
                ("branch7x7dbl_3", [c, c, 1, 7]),
                ("branch7x7dbl_4", [c, c, 7, 1]),
                ("branch7x7dbl_5", [192, c, 1, 7]),
                ("branch_pool", [192, 768, 1, 1]),
            ],
        );
    }
    add(
        "Mixed_7a",
        &[
            ("branch3x3_1", [192, 768, 1, 1]),
            ("branch3x3_2", [320, 192, 3, 3]),
            ("branch7x7x3_1", [192, 768, 1, 1]),
            ("branch7x7x3_2", [192, 192, 1, 7]),
            ("branch7x7x3_3", [192, 192, 7, 1]),
            ("branch7x7x3_4", [192, 192, 3, 3]),
        ],
    );
    for (block, c) in [("Mixed_7b", 1280), ("Mixed_7c", 2048)] {
        add(
            block,
            &[
                ("branch1x1", [320, c, 1, 1]),
                ("branch3x3_1", [384, c, 1, 1]),
                ("branch3x3_2a", [384, 384, 1, 3]),
                ("branch3x3_2b", [384, 384, 3, 1]),
                ("branch3x3dbl_1", [448, c, 1, 1]),
                ("branch3x3dbl_2", [384, 448, 3, 3]),
                ("branch3x3dbl_3a", [384, 384, 1, 3]),
                ("branch3x3dbl_3b", [384, 384, 3, 1]),
                ("branch_pool", [192, c, 1, 1]),
            ],
        );
    }
    all
}

/// The largest of each 3 by 3 square, every second one.
fn halve(x: &Tensor) -> Result<Tensor> {
    Ok(x.max_pool2d_with_stride(3, 2)?)
}

/// 3 by 3 squares around every pixel. What lies outside is not counted; after a ReLU, 0 is never the largest.
fn smooth(x: &Tensor, pool: Pool) -> Result<Tensor> {
    let padded = x.pad_with_zeros(2, 1, 1)?.pad_with_zeros(3, 1, 1)?;
    if pool == Pool::Max {
        return Ok(padded.max_pool2d_with_stride(3, 1)?);
    }
    let (_, _, h, w) = x.dims4()?;
    let inside = Tensor::ones((1, 1, h, w), x.dtype(), x.device())?;
    let inside = inside.pad_with_zeros(2, 1, 1)?.pad_with_zeros(3, 1, 1)?;
    let share = inside.avg_pool2d_with_stride(3, 1)?;
    Ok(padded.avg_pool2d_with_stride(3, 1)?.broadcast_div(&share)?)
}
