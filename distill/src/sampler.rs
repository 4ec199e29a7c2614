//! Images from a base by many steps, or from a generator by one.

use candle_core::{Device, Tensor};
use dmd_core::net::OneStep;
use dmd_core::noise;
use dmd_core::schedule::Schedule;

use crate::error::Result;
use crate::network::Network;

/// Images that are asked for: noise contract `dmd-noise-1` with a class per image.
#[derive(Clone, Debug)]
pub struct Request {
    /// Seed of the noise contract.
    pub seed: u32,
    /// Index of each image under the seed.
    pub images: Vec<u64>,
    /// Class of each image, if the model is conditional.
    pub classes: Option<Vec<u32>>,
}

impl Request {
    /// `count` images from `first` on; image `k` has class `k mod classes`.
    pub fn new(seed: u32, first: u64, count: usize, classes: Option<usize>) -> Self {
        let images: Vec<u64> = (first..first + count as u64).collect();
        let classes = classes.map(|n| images.iter().map(|k| (k % n as u64) as u32).collect());
        Self { seed, images, classes }
    }

    /// The noise.
    ///
    /// # Shapes
    /// `[images, c, h, w]`.
    pub fn noise(&self, [c, h, w]: [usize; 3], device: &Device) -> Result<Tensor> {
        let mut z = vec![0.0; self.images.len() * c * h * w];
        for (k, out) in self.images.iter().zip(z.chunks_exact_mut(c * h * w)) {
            noise::standard_normal(self.seed, *k, out);
        }
        Ok(Tensor::from_vec(z, (self.images.len(), c, h, w), device)?)
    }

    /// The classes as a tensor `[images]`.
    pub fn class_tensor(&self, device: &Device) -> Result<Option<Tensor>> {
        self.classes.as_ref().map(|c| Ok(Tensor::new(c.as_slice(), device)?)).transpose()
    }
}

/// Images by DDIM with eta = 0 in `steps` network evaluations; `x0_pred` is cut to the image range at every step.
///
/// # Shapes
/// `[images, c, h, w]` in the model's range.
pub fn ddim(teacher: &Network, schedule: &Schedule, request: &Request, steps: usize) -> Result<Tensor> {
    let device = teacher.device();
    let mut x = request.noise(teacher.config.image_shape(), device)?;
    let class = request.class_tensor(device)?;
    let clip = Some(teacher.config.range());
    for step in schedule.ddim(steps)? {
        let t = Tensor::new(&[step.t as f32], device)?;
        let eps_pred = teacher.eps_pred(&x, &t, class.as_ref())?.flatten_all()?.to_vec1::<f32>()?;
        let mut values = x.flatten_all()?.to_vec1::<f32>()?;
        step.apply(&mut values, &eps_pred, clip);
        x = Tensor::from_vec(values, x.shape(), device)?;
    }
    Ok(x)
}

/// Images by the one-step generator.
///
/// # Shapes
/// `[images, c, h, w]` in the model's range, not cut.
pub fn one_step(network: &Network, generator: &OneStep, request: &Request) -> Result<Tensor> {
    let z = request.noise(network.config.image_shape(), network.device())?;
    network.one_step(generator, &z, request.class_tensor(network.device())?.as_ref())
}
