//! Images from a base by many steps, or from a generator by one.

use candle_core::{Device, Tensor};
use dmd_core::net::OneStep;
use dmd_core::noise;
use dmd_core::sampler::{Sampler, Trajectory};
use dmd_core::schedule::Schedule;

use crate::error::{Error, Result};
use crate::network::{Guidance, Network};

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

    /// Refuses images `[images, c, h, w]` that are no numbers, as weights of no sense make them.
    pub fn check_finite(&self, x: &Tensor) -> Result<()> {
        let values = x.flatten_all()?.to_vec1::<f32>()?;
        let Some(at) = values.iter().position(|v| !v.is_finite()) else { return Ok(()) };
        let (k, seed, value) = (self.images[at * self.images.len() / values.len()], self.seed, values[at]);
        Err(Error::Request(format!("image {k} of seed {seed} came out as {value}, expected numbers")))
    }
}

/// How a base is sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// What a step is.
    pub sampler: Sampler,
    /// Steps.
    pub steps: usize,
    /// Guidance of every prediction.
    pub guidance: Option<Guidance>,
}

impl Sampling {
    /// DDIM without guidance.
    pub fn ddim(steps: usize) -> Self {
        Self { sampler: Sampler::Ddim, steps, guidance: None }
    }
}

/// Images from a base by many steps.
///
/// # Shapes
/// `[images, c, h, w]` in the model's range.
pub fn sample(
    teacher: &Network,
    schedule: &Schedule,
    request: &Request,
    sampling: &Sampling,
) -> Result<Tensor> {
    let (device, [c, h, w]) = (teacher.device(), teacher.config.image_shape());
    let shape = (request.images.len(), c, h, w);
    let mut x = request.noise([c, h, w], device)?.flatten_all()?.to_vec1::<f32>()?;
    let class = request.class_tensor(device)?;
    let path = Trajectory::new(schedule, sampling.sampler, sampling.steps, teacher.config.range())?;
    let predict = |t: usize, x: &[f32]| -> Result<Vec<f32>> {
        let (x_t, t) = (Tensor::from_slice(x, shape, device)?, Tensor::new(&[t as f32], device)?);
        let prediction = teacher.predict_guided(&x_t, &t, class.as_ref(), sampling.guidance)?;
        Ok(prediction.flatten_all()?.to_vec1()?)
    };
    let fresh = |step: usize, out: &mut [f32]| {
        for (k, out) in request.images.iter().zip(out.chunks_exact_mut(c * h * w)) {
            noise::step_noise(request.seed, *k, step, out);
        }
    };
    path.run(&mut x, predict, fresh)?;
    Ok(Tensor::from_vec(x, shape, device)?)
}

/// Images by the one-step generator.
///
/// # Shapes
/// `[images, c, h, w]` in the model's range, not cut.
pub fn one_step(network: &Network, generator: &OneStep, request: &Request) -> Result<Tensor> {
    let z = request.noise(network.config.image_shape(), network.device())?;
    network.one_step(generator, &z, request.class_tensor(network.device())?.as_ref())
}
