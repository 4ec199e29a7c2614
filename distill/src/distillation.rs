//! One update of a distillation: generator, then critic ("fake"), against the frozen teacher.
//! Yin et al. 2024 (arXiv:2311.18828), Algorithms 1 to 3; several critic updates per generator update and a discriminator
//! of real images on the critic's bottleneck as in Yin et al. 2024 (DMD2, arXiv:2405.14867), sections 4.2 and 4.3. No
//! files, no pictures.

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};
use dmd_core::card::GeneratorConfig;
use dmd_core::net::{OneStep, discriminator};
use dmd_core::schedule::Schedule;

use crate::checkpoint::Checkpoint;
pub use crate::draws::Material;
use crate::draws::{CriticDraws, Dice, GeneratorDraws, Input, Noise, RealBatch};
use crate::error::Result;
use crate::losses::{self, NoiseLevels};
use crate::network::{Engine, Guidance, Network, Tensors, initial_discriminator};
use crate::optimiser::{AdamW, AdamWConfig};
use crate::parallel::Team;
use crate::regression::{Distance, Regression};
use crate::teacher::part;
use crate::train::DistillOptions;

/// The three networks and the optimisers of two of them.
pub struct Distillation<'a> {
    options: &'a DistillOptions,
    schedule: Schedule,
    dice: Dice<'a>,
    pub(crate) one_step: OneStep,
    pub(crate) classes: Option<usize>,
    teacher: Network,
    guidance: Option<Guidance>,
    regression: Regression,
    /// What becomes the one-step generator.
    pub generator: Network,
    /// The critic.
    pub fake: Network,
    /// Views of the two trained networks that keep nothing for a backward pass.
    generator_view: Network,
    fake_view: Network,
    /// The critic as a judge of the generator, for the adversarial loss.
    judge: Network,
    generator_optimiser: AdamW,
    fake_optimiser: AdamW,
    pub(crate) device: Device,
    team: Team,
}

/// What one update of the generator leaves, and of the critic after it.
pub struct Update {
    /// Generated images, without gradient.
    pub x_gen: Tensor,
    /// Their classes.
    pub class: Option<Tensor>,
    /// Distribution matching loss; 0 without it.
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
    fn new(x_gen: Tensor, class: Option<Tensor>) -> Self {
        let (dm, reg, adversarial, norm) = (0.0, 0.0, 0.0, 0.0);
        let (fake, discrimination, fake_norm) = (0.0, 0.0, 0.0);
        Self { x_gen, class, dm, reg, adversarial, norm, fake, discrimination, fake_norm }
    }
}

/// Where a distillation starts.
#[derive(Clone, Copy)]
pub enum Start<'a> {
    /// Generator and critic are the base.
    Base,
    /// `generator.NAME` and `fake.NAME` of another run: a second stage, as DMD2 trains longest.
    Stage(&'a Tensors),
    /// What [`Distillation::state`] gave, with the optimisers' moments.
    State(&'a Tensors),
}

impl<'a> Distillation<'a> {
    /// Starts from the base, from another run, or from a saved state.
    pub fn new(
        options: &'a DistillOptions,
        base: &Checkpoint,
        start: Start,
        device: &Device,
    ) -> Result<Self> {
        let schedule = Schedule::new(&base.schedule);
        let config = GeneratorConfig { t_gen: options.t_gen, input_scale: options.input_scale };
        let (first, mut critic) = match start {
            Start::State(tensors) | Start::Stage(tensors) => {
                (part(tensors, "generator.")?, part(tensors, "fake.")?)
            }
            Start::Base => (base.tensors.clone(), base.tensors.clone()),
        };
        let has_head = critic.keys().any(|name| name.starts_with(discriminator::PREFIX));
        if options.gan_weight == 0.0 {
            critic.retain(|name, _| !name.starts_with(discriminator::PREFIX));
        } else if !has_head {
            critic.extend(initial_discriminator(&base.config, options.seed)?);
        }
        let generator = Network::trainable(&base.config, &first, device)?;
        let fake = Network::trainable(&base.config, &critic, device)?;
        let clip = if options.clip == 0.0 { f64::INFINITY } else { options.clip };
        let adam = |lr: f64| AdamWConfig { clip, ..AdamWConfig::new(lr, options.warmup) };
        let mut generator_optimiser = AdamW::new(adam(options.lr), generator.variables())?;
        let mut fake_optimiser = AdamW::new(adam(options.lr_fake), fake.variables())?;
        if let Start::State(tensors) = start {
            generator_optimiser.load("generator_optimiser", generator.variables(), tensors)?;
            fake_optimiser.load("fake_optimiser", fake.variables(), tensors)?;
        }
        let dice = Dice {
            options,
            classes: base.class_count(),
            image: base.config.image_shape(),
            range: base.config.range(),
            steps: schedule.num_train_timesteps(),
            device: device.clone(),
            share: 0..options.batch,
        };
        Ok(Self {
            options,
            one_step: OneStep::new(&config, &schedule)?,
            schedule,
            classes: dice.classes,
            dice,
            guidance: Guidance::new(options.guidance, base.provenance.classes.as_ref())?,
            regression: Regression::load(
                if options.pairs > 0 { &options.reg } else { &Distance::L2 },
                base.config.image_shape(),
                base.config.range(),
                device,
            )?,
            teacher: Network::frozen(&base.config, &base.tensors, device)?.in_bf16_on_gpu(),
            generator_view: generator.without_gradient(),
            fake_view: fake.without_gradient().in_bf16_on_gpu(),
            judge: fake.without_gradient(),
            generator,
            fake,
            generator_optimiser,
            fake_optimiser,
            device: device.clone(),
            team: Team::alone(),
        })
    }

    /// The same as one of several ranks, each with its share of every batch.
    pub fn shared(mut self, team: &Team) -> Self {
        self.dice.share = team.share(self.options.batch);
        self.team = team.clone();
        self
    }

    /// The same with all networks on another engine than the device's own.
    pub fn on(mut self, engine: Engine) -> Self {
        let networks = [&mut self.teacher, &mut self.generator, &mut self.fake, &mut self.judge];
        for network in networks.into_iter().chain([&mut self.generator_view, &mut self.fake_view]) {
            network.engine = engine;
        }
        self
    }

    /// One update of the generator and those of the critic that follow it.
    pub fn update(&mut self, step: u64, material: &Material) -> Result<Update> {
        let mut update = self.update_generator(&self.dice.generator(step, material)?)?;
        for k in 0..if self.options.matches(step) { self.options.fake_updates } else { 0 } {
            self.update_critic(&self.dice.critic(step, k, material)?, &mut update)?;
        }
        self.average_losses(&mut update);
        Ok(update)
    }

    /// Replaces the mean losses of this rank's images by those of the whole batch.
    fn average_losses(&self, update: &mut Update) {
        let weight = self.team.weight(self.options.batch);
        let Update { dm, reg, adversarial, fake, discrimination, .. } = update;
        let losses = [dm, reg, adversarial, fake, discrimination];
        let mut values = losses.each_ref().map(|loss| **loss * weight);
        self.team.sum(&mut values);
        losses.into_iter().zip(values).for_each(|(loss, value)| *loss = value);
    }

    /// Sets the learning rates of generator and critic.
    pub fn set_rates(&mut self, [generator, fake]: [f64; 2]) {
        self.generator_optimiser.config.lr = generator;
        self.fake_optimiser.config.lr = fake;
    }

    /// Starts the generator's optimiser anew, with its warm-up: the moments of regression alone are of gradients so small
    /// that the first ones of distribution matching would throw the weights far off.
    pub fn forget_moments(&mut self) -> Result<()> {
        let config = AdamWConfig { lr: self.options.lr, ..self.generator_optimiser.config };
        self.generator_optimiser = AdamW::new(config, self.generator.variables())?;
        Ok(())
    }

    /// Algorithm 1, lines 5 to 13.
    pub fn update_generator(&mut self, draws: &GeneratorDraws) -> Result<Update> {
        let (loss, mut update) = self.generator_loss(draws)?;
        let grads = self.gradients(&loss, &self.generator)?;
        update.norm = self.generator_optimiser.step(self.generator.variables(), &grads)?;
        Ok(update)
    }

    /// The gradients of a loss that is the mean over this rank's images, averaged over all ranks' images.
    fn gradients(&self, loss: &Tensor, network: &Network) -> Result<GradStore> {
        let mut grads = loss.backward()?;
        let weight = self.team.weight(self.options.batch);
        self.team.average(&mut grads, network.variables(), weight)?;
        Ok(grads)
    }

    /// What the generator minimises: distribution matching on fresh noise, regression on pairs, DMD2's adversarial loss.
    pub fn generator_loss(&self, draws: &GeneratorDraws) -> Result<(Tensor, Update)> {
        let (o, class) = (self.options, draws.input.class.as_ref());
        let generate = |input: &Input| self.generate(&self.generator, input);
        let x_ref = draws.pairs.as_ref().map(|pairs| generate(&pairs.input)).transpose()?;
        let x_gen = match (&x_ref, &draws.matching, &draws.adversarial) {
            (Some(x_ref), None, None) => x_ref.clone(),
            _ => generate(&draws.input)?,
        };
        let mut update = Update::new(x_gen.detach(), class.cloned());
        let mut terms = Vec::new();
        if let Some(noise) = &draws.matching {
            let gradient = self.matching_gradient(&update.x_gen, class, noise)?;
            let dm = losses::distribution_matching(&x_gen, &gradient)?;
            update.dm = scalar(&dm)?;
            terms.push((dm * o.dm_weight)?);
        }
        if let (Some(pairs), Some(x_ref)) = (&draws.pairs, &x_ref) {
            let regression = self.regression.loss(x_ref, &pairs.y)?;
            update.reg = scalar(&regression)?;
            terms.push((regression * o.lambda_reg)?);
        }
        if let Some(noise) = &draws.adversarial {
            let levels = self.levels(noise)?;
            let x_t = levels.noisy(&x_gen, &noise.eps)?;
            let adversarial = losses::adversarial(&self.judge.logit(&x_t, &levels.t, class)?)?;
            update.adversarial = scalar(&adversarial)?;
            terms.push((adversarial * o.gan_weight)?);
        }
        Ok((Tensor::stack(&terms, 0)?.sum_all()?, update))
    }

    /// Images as the losses see them.
    fn generate(&self, generator: &Network, input: &Input) -> Result<Tensor> {
        let x = generator.one_step(&self.one_step, &input.z, input.class.as_ref())?;
        if !self.options.clamp {
            return Ok(x);
        }
        let [low, high] = self.dice.range;
        let outside = (x.detach().clamp(low, high)? - x.detach())?;
        Ok((x + outside)?)
    }

    fn levels(&self, noise: &Noise) -> Result<NoiseLevels> {
        NoiseLevels::new(&self.schedule, &noise.t, &self.dice.device)
    }

    /// Eq. 7 and 8 at noisy versions of generated images: the mean over as many draws of noise per image as there are.
    pub fn matching_gradient(&self, x_gen: &Tensor, class: Option<&Tensor>, noise: &Noise) -> Result<Tensor> {
        let draws = noise.t.len() / x_gen.dims()[0];
        let repeated = |x: &Tensor| Tensor::cat(&vec![x; draws], 0);
        let (x_gen, class) = (&repeated(x_gen)?, class.map(repeated).transpose()?);
        let class = class.as_ref();
        let levels = self.levels(noise)?;
        let x_t = levels.noisy(x_gen, &noise.eps)?;
        let real = self.teacher.predict_guided(&x_t, &levels.t, class, self.guidance)?;
        let fake = self.fake_view.predict(&x_t, &levels.t, class)?;
        let (x0_real, x0_fake) = (levels.x0(&x_t, &real)?, levels.x0(&x_t, &fake)?);
        let gradient = losses::distribution_matching_gradient(x_gen, &x0_real, &x0_fake)?;
        let gradient = match self.options.dm_alpha_factor {
            true => gradient.broadcast_mul(&levels.alpha_t)?,
            false => gradient,
        };
        let [c, h, w] = self.dice.image;
        Ok(gradient.reshape((draws, (), c, h, w))?.mean(0)?)
    }

    /// Algorithm 1, lines 14 to 17; adds to the means of the update that it follows.
    pub fn update_critic(&mut self, draws: &CriticDraws, update: &mut Update) -> Result<()> {
        let loss = self.critic_loss(draws, update)?;
        let grads = self.gradients(&loss, &self.fake)?;
        let norm = self.fake_optimiser.step(self.fake.variables(), &grads)?;
        update.fake_norm += norm / self.options.fake_updates as f64;
        Ok(())
    }

    /// What the critic minimises: it learns to denoise generated images, and to tell them from real ones.
    pub fn critic_loss(&self, draws: &CriticDraws, update: &mut Update) -> Result<Tensor> {
        let updates = self.options.fake_updates as f64;
        let (x_gen, class) = match &draws.input {
            None => (update.x_gen.clone(), update.class.clone()),
            Some(input) => (self.generate(&self.generator_view, input)?, input.class.clone()),
        };
        let (levels, eps) = (self.levels(&draws.noise)?, &draws.noise.eps);
        let prediction = self.fake.predict(&levels.noisy(&x_gen, eps)?, &levels.t, class.as_ref())?;
        let mut loss = losses::denoising(&prediction, &levels.target(&x_gen, eps)?)?;
        update.fake += scalar(&loss)? / updates;
        if let Some(real) = &draws.real {
            let discrimination = self.discrimination(real, &x_gen, class.as_ref())?;
            update.discrimination += scalar(&discrimination)? / updates;
            loss = (loss + (discrimination * self.options.gan_weight_fake)?)?;
        }
        Ok(loss)
    }

    /// The discriminator's loss on generated and as many real images, noisy at steps of their own.
    fn discrimination(&self, real: &RealBatch, x_gen: &Tensor, class: Option<&Tensor>) -> Result<Tensor> {
        let n = x_gen.dims()[0];
        let class = match (class, &real.class) {
            (Some(generated), Some(real)) => Some(Tensor::cat(&[generated, real], 0)?),
            _ => None,
        };
        let both = Tensor::cat(&[x_gen, &real.images], 0)?;
        let levels = self.levels(&real.noise)?;
        let x_t = levels.noisy(&both, &real.noise.eps)?;
        let logits = self.fake.logit(&x_t, &levels.t, class.as_ref())?;
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
