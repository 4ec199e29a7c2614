//! One update of a distillation: generator, then critic ("fake"), against the frozen teacher.
//! Yin et al. 2024 (arXiv:2311.18828), Algorithms 1 to 3; several critic updates per generator update and a discriminator
//! of real images on the critic's bottleneck as in Yin et al. 2024 (DMD2, arXiv:2405.14867), sections 4.2 and 4.3. No
//! files, no pictures.

use candle_core::{Device, Tensor};
use dmd_core::card::GeneratorConfig;
use dmd_core::net::OneStep;
use dmd_core::schedule::Schedule;

use crate::checkpoint::Checkpoint;
use crate::data::Dataset;
use crate::error::Result;
use crate::losses::{self, NoiseLevels};
use crate::network::{Guidance, Network, Tensors, initial_discriminator};
use crate::optimiser::{AdamW, AdamWConfig};
use crate::pairs::Pairs;
use crate::random::{Purpose, Random};
use crate::teacher::part;
use crate::train::DistillOptions;

/// The three networks and the optimisers of two of them.
pub struct Distillation<'a> {
    options: &'a DistillOptions,
    schedule: Schedule,
    pub(crate) one_step: OneStep,
    pub(crate) classes: Option<usize>,
    image: [usize; 3],
    range: [f32; 2],
    teacher: Network,
    guidance: Option<Guidance>,
    pub(crate) generator: Network,
    fake: Network,
    /// Views of the two trained networks that keep nothing for a backward pass.
    generator_view: Network,
    fake_view: Network,
    /// The critic as a judge of the generator, for the adversarial loss.
    judge: Network,
    generator_optimiser: AdamW,
    fake_optimiser: AdamW,
    pub(crate) device: Device,
}

/// What updates learn from beside the teacher.
#[derive(Default)]
pub struct Material {
    /// Noise-image pairs, for the regression loss.
    pub pairs: Option<Pairs>,
    /// Real images, for the adversarial loss.
    pub real: Option<Dataset>,
}

/// What one update of the generator leaves, and of the critic after it.
pub struct Update {
    /// Generated images, without gradient.
    pub x_gen: Tensor,
    /// Their classes.
    pub class: Option<Tensor>,
    /// Distribution matching loss.
    pub dm: f64,
    /// Regression loss, before its weight; 0 without pairs.
    pub reg: f64,
    /// The generator's adversarial loss, before its weight; 0 without real images.
    pub adversarial: f64,
    /// Norm of the generator's gradient before clipping.
    pub norm: f64,
    /// The critic's mean denoising loss.
    pub fake: f64,
    /// Its mean loss as a discriminator, before the weight; 0 without real images.
    pub discrimination: f64,
    /// Mean norm of its gradient before clipping.
    pub fake_norm: f64,
}

impl Update {
    fn new(x_gen: Tensor, class: Option<Tensor>, dm: f64) -> Self {
        let (reg, adversarial, norm) = (0.0, 0.0, 0.0);
        let (fake, discrimination, fake_norm) = (0.0, 0.0, 0.0);
        Self { x_gen, class, dm, reg, adversarial, norm, fake, discrimination, fake_norm }
    }
}

impl<'a> Distillation<'a> {
    /// Starts from the base, or from a saved state.
    pub fn new(
        options: &'a DistillOptions,
        base: &Checkpoint,
        saved: Option<&Tensors>,
        device: &Device,
    ) -> Result<Self> {
        let schedule = Schedule::new(&base.schedule);
        let config = GeneratorConfig { t_gen: options.t_gen, input_scale: options.input_scale };
        let (first, critic) = match saved {
            Some(tensors) => (part(tensors, "generator.")?, part(tensors, "fake.")?),
            None => {
                let mut critic = base.tensors.clone();
                if options.gan_weight > 0.0 {
                    critic.extend(initial_discriminator(&base.config, options.seed)?);
                }
                (base.tensors.clone(), critic)
            }
        };
        let generator = Network::trainable(&base.config, &first, device)?;
        let fake = Network::trainable(&base.config, &critic, device)?;
        let adam = |lr: f64| AdamWConfig { clip: options.clip, ..AdamWConfig::new(lr, options.warmup) };
        let mut generator_optimiser = AdamW::new(adam(options.lr), generator.variables())?;
        let mut fake_optimiser = AdamW::new(adam(options.lr_fake), fake.variables())?;
        if let Some(tensors) = saved {
            generator_optimiser.load("generator_optimiser", generator.variables(), tensors)?;
            fake_optimiser.load("fake_optimiser", fake.variables(), tensors)?;
        }
        Ok(Self {
            options,
            one_step: OneStep::new(&config, &schedule)?,
            schedule,
            classes: base.class_count(),
            guidance: Guidance::new(options.guidance, base.provenance.classes.as_ref())?,
            image: base.config.image_shape(),
            range: base.config.range(),
            teacher: Network::frozen(&base.config, &base.tensors, device)?.in_bf16_on_gpu(),
            generator_view: generator.without_gradient(),
            fake_view: fake.without_gradient().in_bf16_on_gpu(),
            judge: fake.without_gradient(),
            generator,
            fake,
            generator_optimiser,
            fake_optimiser,
            device: device.clone(),
        })
    }

    /// One update of the generator and those of the critic that follow it.
    pub fn update(&mut self, step: u64, material: &Material) -> Result<Update> {
        let mut update = self.update_generator(step, material)?;
        self.update_fake(step, material, &mut update)?;
        Ok(update)
    }

    /// Sets both learning rates to this share of the options'.
    pub fn set_rate(&mut self, factor: f64) {
        self.generator_optimiser.config.lr = self.options.lr * factor;
        self.fake_optimiser.config.lr = self.options.lr_fake * factor;
    }

    /// Noise and classes for a batch of generated images.
    fn draw(&self, random: &mut Random) -> Result<(Tensor, Option<Tensor>)> {
        let class = self.classes.map(|n| {
            let classes: Vec<u32> = (0..self.options.batch).map(|_| random.below(n) as u32).collect();
            Tensor::new(classes, &self.device)
        });
        let [c, h, w] = self.image;
        Ok((random.normal_tensor(&[self.options.batch, c, h, w], &self.device)?, class.transpose()?))
    }

    /// Steps drawn uniformly from `from..to`, and noise.
    fn noise(
        &self,
        random: &mut Random,
        from: usize,
        to: usize,
        x: &Tensor,
    ) -> Result<(NoiseLevels, Tensor)> {
        let t: Vec<u32> = (0..x.dims()[0]).map(|_| (from + random.below(to - from)) as u32).collect();
        let levels = NoiseLevels::new(&self.schedule, &t, &self.device)?;
        Ok((levels, random.normal_tensor(x.dims(), &self.device)?))
    }

    /// Algorithm 1, lines 5 to 13: distribution matching on fresh noise, regression on pairs; DMD2's adversarial loss.
    fn update_generator(&mut self, step: u64, material: &Material) -> Result<Update> {
        let o = self.options;
        let mut random = Random::new(o.seed, Purpose::Generator, step);
        let (z, class) = self.draw(&mut random)?;
        let x_gen = self.generator.one_step(&self.one_step, &z, class.as_ref())?;
        let detached = x_gen.detach();
        let [from, to] = self.matching_steps();
        let (levels, eps) = self.noise(&mut random, from, to, &detached)?;
        let gradient = self.matching_gradient(&detached, class.as_ref(), &levels, &eps)?;
        let dm = losses::distribution_matching(&x_gen, &gradient)?;
        let mut update = Update::new(detached, class, scalar(&dm)?);
        let mut loss = (dm * o.dm_weight)?;
        if let Some(pairs) = &material.pairs {
            let indices: Vec<usize> = (0..o.batch).map(|_| random.below(pairs.count())).collect();
            let (z, y, class) = pairs.batch(&indices, &self.device)?;
            let x_ref = self.generator.one_step(&self.one_step, &z, class.as_ref())?;
            let regression = losses::regression(&x_ref, &y, o.reg)?;
            update.reg = scalar(&regression)?;
            loss = (loss + (regression * o.lambda_reg)?)?;
        }
        if o.gan_weight > 0.0 {
            let mut random = Random::new(o.seed, Purpose::Adversarial, step);
            let (levels, eps) = self.noise(&mut random, 0, self.schedule.num_train_timesteps(), &x_gen)?;
            let x_t = levels.noisy(&x_gen, &eps)?;
            let logit = self.judge.logit(&x_t, &levels.t, update.class.as_ref())?;
            let adversarial = losses::adversarial(&logit)?;
            update.adversarial = scalar(&adversarial)?;
            loss = (loss + (adversarial * o.gan_weight)?)?;
        }
        let grads = loss.backward()?;
        update.norm = self.generator_optimiser.step(self.generator.variables(), &grads)?;
        Ok(update)
    }

    /// First and last but one of the steps at which distributions are matched.
    fn matching_steps(&self) -> [usize; 2] {
        let total = self.schedule.num_train_timesteps() as f64;
        let [from, to] =
            [self.options.t_min, self.options.t_max].map(|share| (share * total).round() as usize);
        [from, to.max(from + 1)]
    }

    /// Eq. 7 and 8 at noisy versions of generated images.
    fn matching_gradient(
        &self,
        x_gen: &Tensor,
        class: Option<&Tensor>,
        levels: &NoiseLevels,
        eps: &Tensor,
    ) -> Result<Tensor> {
        let x_t = levels.noisy(x_gen, eps)?;
        let real = self.teacher.predict_guided(&x_t, &levels.t, class, self.guidance)?;
        let fake = self.fake_view.predict(&x_t, &levels.t, class)?;
        let (x0_real, x0_fake) = (levels.x0(&x_t, &real)?, levels.x0(&x_t, &fake)?);
        let gradient = losses::distribution_matching_gradient(x_gen, &x0_real, &x0_fake)?;
        match self.options.dm_alpha_factor {
            true => Ok(gradient.broadcast_mul(&levels.alpha_t)?),
            false => Ok(gradient),
        }
    }

    /// Algorithm 1, lines 14 to 17: the critic learns to denoise generated images, and to tell them from real ones. The
    /// first update sees the batch of the generator update, the others fresh ones.
    fn update_fake(&mut self, step: u64, material: &Material, update: &mut Update) -> Result<()> {
        let updates = self.options.fake_updates;
        for k in 0..updates {
            let number = step * updates + k;
            let mut random = Random::new(self.options.seed, Purpose::Critic, number);
            let (x_gen, class) = if k == 0 {
                (update.x_gen.clone(), update.class.clone())
            } else {
                let (z, class) = self.draw(&mut random)?;
                (self.generator_view.one_step(&self.one_step, &z, class.as_ref())?, class)
            };
            let total = self.schedule.num_train_timesteps();
            let (levels, eps) = self.noise(&mut random, 0, total, &x_gen)?;
            let x_t = levels.noisy(&x_gen, &eps)?;
            let prediction = self.fake.predict(&x_t, &levels.t, class.as_ref())?;
            let denoising = losses::denoising(&prediction, &levels.target(&x_gen, &eps)?)?;
            update.fake += scalar(&denoising)? / updates as f64;
            let mut loss = denoising;
            if let Some(real) = &material.real {
                let discrimination = self.discrimination(number, real, &x_gen, class.as_ref())?;
                update.discrimination += scalar(&discrimination)? / updates as f64;
                loss = (loss + (discrimination * self.options.gan_weight_fake)?)?;
            }
            let norm = self.fake_optimiser.step(self.fake.variables(), &loss.backward()?)?;
            update.fake_norm += norm / updates as f64;
        }
        Ok(())
    }

    /// The discriminator's loss on generated and as many real images, noisy at steps of their own.
    fn discrimination(
        &self,
        number: u64,
        real: &Dataset,
        x_gen: &Tensor,
        class: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut random = Random::new(self.options.seed, Purpose::Real, number);
        let n = x_gen.dims()[0];
        let indices: Vec<usize> = (0..n).map(|_| random.below(real.len())).collect();
        let images = real.batch(&indices, self.range, &self.device)?;
        let class = match class {
            None => None,
            Some(class) => {
                let labels: Vec<u32> = indices.iter().map(|i| u32::from(real.labels[*i])).collect();
                Some(Tensor::cat(&[class, &Tensor::new(labels, &self.device)?], 0)?)
            }
        };
        let both = Tensor::cat(&[x_gen, &images], 0)?;
        let (levels, eps) = self.noise(&mut random, 0, self.schedule.num_train_timesteps(), &both)?;
        let logits = self.fake.logit(&levels.noisy(&both, &eps)?, &levels.t, class.as_ref())?;
        losses::discrimination(&logits.narrow(0, n, n)?, &logits.narrow(0, 0, n)?)
    }

    /// Everything that a resumed run needs.
    pub fn state(&self, average: &Tensors) -> Result<Tensors> {
        let mut tensors = Tensors::new();
        for (prefix, part) in
            [("generator", self.generator.parameters()), ("fake", self.fake.parameters()), ("ema", average)]
        {
            tensors.extend(part.iter().map(|(name, tensor)| (format!("{prefix}.{name}"), tensor.clone())));
        }
        self.generator_optimiser.save("generator_optimiser", self.generator.variables(), &mut tensors)?;
        self.fake_optimiser.save("fake_optimiser", self.fake.variables(), &mut tensors)?;
        Ok(tensors)
    }
}

fn scalar(loss: &Tensor) -> Result<f64> {
    Ok(f64::from(loss.to_scalar::<f32>()?))
}
