//! Everything random about an update of a distillation, drawn before anything is computed: what
//! [`crate::distillation`] computes is then a function of it, which tests feed with the draws of another program.
//! Every number is one of (seed, purpose, step) and of the image in the batch, see [`crate::random`]: ranks that share a batch
//! draw what one process would.

use std::ops::Range;

use candle_core::{Device, Tensor};

use crate::data::Dataset;
use crate::error::Result;
use crate::pairs::Pairs;
use crate::random::{Purpose, Random};
use crate::train::DistillOptions;

/// What updates learn from beside the teacher.
#[derive(Default)]
pub struct Material {
    /// Noise-image pairs, for the regression loss.
    pub pairs: Option<Pairs>,
    /// Real images, for the adversarial loss.
    pub real: Option<Dataset>,
}

/// What a batch of images is generated from.
pub struct Input {
    /// `[b, c, h, w]`, standard normal.
    pub z: Tensor,
    /// `[b]` u32, if the base is conditional.
    pub class: Option<Tensor>,
}

/// What makes a batch of images noisy.
pub struct Noise {
    /// One step per image.
    pub t: Vec<u32>,
    /// Like the images.
    pub eps: Tensor,
}

/// Noise-image pairs.
pub struct PairBatch {
    /// What the generator sees.
    pub input: Input,
    /// The teacher's images, like `input.z`.
    pub y: Tensor,
}

/// Real images.
pub struct RealBatch {
    /// `[b, c, h, w]`.
    pub images: Tensor,
    /// `[b]` u32, if the base is conditional.
    pub class: Option<Tensor>,
    /// For the generated images, then for these.
    pub noise: Noise,
}

/// The random part of a generator update.
pub struct GeneratorDraws {
    /// For distribution matching and the adversarial loss.
    pub input: Input,
    /// Where distributions are matched: for all images, then for all again, as often as the options say.
    pub matching: Option<Noise>,
    /// For the regression loss.
    pub pairs: Option<PairBatch>,
    /// For the adversarial loss.
    pub adversarial: Option<Noise>,
}

/// The random part of a critic update.
pub struct CriticDraws {
    /// For new images; none for those of the generator update.
    pub input: Option<Input>,
    /// Where the critic learns to denoise.
    pub noise: Noise,
    /// For the discriminator's loss.
    pub real: Option<RealBatch>,
}

/// Draws for one distillation.
pub struct Dice<'a> {
    /// Batch size, seed, weights of the losses.
    pub options: &'a DistillOptions,
    /// Classes to draw from.
    pub classes: Option<usize>,
    /// `[channels, height, width]`.
    pub image: [usize; 3],
    /// Value range of real images.
    pub range: [f32; 2],
    /// Steps of the forward process.
    pub steps: usize,
    /// Where tensors are made.
    pub device: Device,
    /// The images of each batch that are drawn here: all, unless several ranks share it.
    pub share: Range<usize>,
}

impl Dice<'_> {
    /// For generator update number `step`.
    pub fn generator(&self, step: u64, material: &Material) -> Result<GeneratorDraws> {
        let o = self.options;
        let mut random = Random::new(o.seed, Purpose::Generator, step);
        let input = self.input(&mut random)?;
        let [from, to] = self.matching_steps();
        let matching = match o.matches(step) && o.dm_weight > 0.0 {
            false => None,
            true => Some(self.noise(&mut random, from, to, o.dm_draws)?),
        };
        let pairs = match &material.pairs {
            Some(pairs) if o.regresses(step) => {
                let indices: Vec<usize> = (0..o.batch).map(|_| random.below(pairs.count())).collect();
                let (z, y, class) = pairs.batch(&indices[self.share.clone()], &self.device)?;
                Some(PairBatch { input: Input { z, class }, y })
            }
            _ => None,
        };
        let adversarial = match o.matches(step) && o.gan_weight > 0.0 {
            false => None,
            true => {
                let mut random = Random::new(o.seed, Purpose::Adversarial, step);
                Some(self.noise(&mut random, 0, self.steps, 1)?)
            }
        };
        Ok(GeneratorDraws { input, matching, pairs, adversarial })
    }

    /// For critic update `k` after generator update number `step`: the first sees the batch of the generator update, the
    /// others fresh ones.
    pub fn critic(&self, step: u64, k: u64, material: &Material) -> Result<CriticDraws> {
        let o = self.options;
        let number = step * o.fake_updates + k;
        let mut random = Random::new(o.seed, Purpose::Critic, number);
        let input = if k == 0 { None } else { Some(self.input(&mut random)?) };
        let noise = self.noise(&mut random, 0, self.steps, 1)?;
        let real = material.real.as_ref().map(|real| self.real(number, real)).transpose()?;
        Ok(CriticDraws { input, noise, real })
    }

    fn real(&self, number: u64, real: &Dataset) -> Result<RealBatch> {
        let mut random = Random::new(self.options.seed, Purpose::Real, number);
        let indices: Vec<usize> = (0..self.options.batch).map(|_| random.below(real.len())).collect();
        let indices = &indices[self.share.clone()];
        let labels = || indices.iter().map(|i| u32::from(real.labels[*i])).collect::<Vec<u32>>();
        Ok(RealBatch {
            images: real.batch(indices, self.range, &self.device)?,
            class: self.classes.map(|_| Tensor::new(labels(), &self.device)).transpose()?,
            noise: self.noise(&mut random, 0, self.steps, 2)?,
        })
    }

    /// Noise and classes for a batch of generated images.
    fn input(&self, random: &mut Random) -> Result<Input> {
        let class = self.classes.map(|n| {
            let classes: Vec<u32> = (0..self.options.batch).map(|_| random.below(n) as u32).collect();
            Tensor::new(&classes[self.share.clone()], &self.device)
        });
        Ok(Input { z: self.normal(random, 1)?, class: class.transpose()? })
    }

    /// Steps drawn uniformly from `from..to`, and noise, for `batches` batches one after the other.
    fn noise(&self, random: &mut Random, from: usize, to: usize, batches: usize) -> Result<Noise> {
        let count = batches * self.options.batch;
        let all: Vec<u32> = (0..count).map(|_| (from + random.below(to - from)) as u32).collect();
        let t = self.rows(batches).into_iter().flat_map(|rows| all[rows].to_vec()).collect();
        Ok(Noise { t, eps: self.normal(random, batches)? })
    }

    fn normal(&self, random: &mut Random, batches: usize) -> Result<Tensor> {
        let [c, h, w] = self.image;
        let values = random.normal_rows(batches * self.options.batch, c * h * w, &self.rows(batches));
        Ok(Tensor::from_vec(values, (batches * self.share.len(), c, h, w), &self.device)?)
    }

    /// The images of `batches` batches that are drawn here.
    fn rows(&self, batches: usize) -> Vec<Range<usize>> {
        let all = (0..batches).map(|k| k * self.options.batch);
        all.map(|first| first + self.share.start..first + self.share.end).collect()
    }

    /// First of the steps at which distributions are matched, and the one after the last.
    fn matching_steps(&self) -> [usize; 2] {
        let total = self.steps as f64;
        let [from, to] =
            [self.options.t_min, self.options.t_max].map(|share| (share * total).round() as usize);
        let from = from.min(self.steps - 1);
        [from, to.clamp(from + 1, self.steps)]
    }
}
