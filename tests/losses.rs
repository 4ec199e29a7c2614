//! The losses of distillation and their trajectory against PyTorch, value by value.

use anyhow::{Context, Result, ensure};
use candle_core::{Tensor, Var};
use dmd_core::card::GeneratorConfig;
use dmd_core::compare::Tolerance;
use dmd_core::net::OneStep;
use dmd_core::schedule::Schedule;
use dmd_distill::checkpoint::Checkpoint;
use dmd_distill::distillation::{Distillation, Start};
use dmd_distill::draws::{CriticDraws, GeneratorDraws, Input, Noise, PairBatch, RealBatch};
use dmd_distill::network::{Engine, Network, Tensors};
use dmd_distill::options::Recipe;
use dmd_distill::train::DistillOptions;
use dmd_tests::{Golden, compare, compare_gradient, compare_scaled};

mod tensors;
use tensors::{CPU, ENGINES, checkpoint, compare_gradients, flat, floats, indices};

/// The key bias of an attention has no effect; its gradient is rounding noise (tests/golden/README.md).
const WITHOUT_EFFECT: &str = "to_k.bias";

/// The tensors of one training step: `once.NAME`, or row `i` of `steps.NAME`.
struct Step<'a> {
    golden: &'a Golden,
    row: Option<usize>,
}

impl Step<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", if self.row.is_some() { "steps" } else { "once" })
    }

    fn floats(&self, name: &str) -> Result<Tensor> {
        let all = floats(self.golden, &self.key(name))?;
        Ok(match self.row {
            Some(row) => all.get(row)?,
            None => all,
        })
    }

    fn indices(&self, name: &str) -> Result<Vec<u32>> {
        let all = indices(self.golden, &self.key(name))?;
        Ok(match self.row {
            Some(row) => all.chunks_exact(3).nth(row).context("no such row")?.to_vec(),
            None => all,
        })
    }

    fn expected(&self, name: &str) -> Result<f32> {
        let all = self.golden.f32(&self.key(name))?;
        all.get(self.row.unwrap_or(0)).copied().context("no such row")
    }

    /// A loss or a norm, to 1e-4 relative.
    fn figure(&self, engine: Engine, name: &str, got: f64) -> Result<()> {
        let what = format!("{} by {engine:?}", self.key(name));
        compare(&what, &[got as f32], &[self.expected(name)?], Tolerance { abs: 0.0, rel: 1e-4 })
    }

    /// The gradient of every variable of generator and critic.
    fn gradients(&self, engine: Engine, work: &Distillation, loss: &Tensor, critic: &Tensor) -> Result<()> {
        for (role, network, loss) in [("generator", &work.generator, loss), ("fake", &work.fake, critic)] {
            let what = format!("{role} by {engine:?}");
            compare_gradients(&what, &loss.backward()?, network, self.golden, &format!("grad.{role}."))?;
        }
        Ok(())
    }

    fn input(&self, z: &str, class: &str) -> Result<Input> {
        let class = Tensor::new(self.indices(class)?, &CPU)?;
        Ok(Input { z: self.floats(z)?, class: Some(class) })
    }

    fn noise(&self, t: &str, eps: &str) -> Result<Noise> {
        Ok(Noise { t: self.indices(t)?, eps: self.floats(eps)? })
    }

    fn generator(&self) -> Result<GeneratorDraws> {
        let pairs = PairBatch { input: self.input("z_ref", "class_ref")?, y: self.floats("y_ref")? };
        Ok(GeneratorDraws {
            input: self.input("z", "class")?,
            matching: Some(self.noise("t", "eps")?),
            pairs: Some(pairs),
            adversarial: None,
        })
    }

    fn critic(&self) -> Result<CriticDraws> {
        Ok(CriticDraws { input: None, noise: self.noise("t_fake", "eps_fake")?, real: None })
    }
}

/// The options of `scripts/golden_losses.py`.
fn options(base: &Checkpoint) -> Result<DistillOptions> {
    let recipe = Recipe {
        batch: Some(3),
        lambda_reg: Some(0.5),
        lr: Some(1e-3),
        warmup: Some(1),
        fake_updates: Some(1),
        t_gen: Some("440".to_owned()),
        ..Recipe::default()
    };
    Ok(recipe.resolve("tiny-class", base)?)
}

/// A distillation of tiny-class at the goldens' weights, before its first update.
fn distillation<'a>(
    options: &'a DistillOptions,
    base: &Checkpoint,
    goldens: &[&Golden],
    engine: Engine,
) -> Result<Distillation<'a>> {
    let mut state = Distillation::new(options, base, Start::Base, &CPU)?.state(&Tensors::new())?;
    for golden in goldens {
        for name in ["generator.", "fake."]
            .iter()
            .flat_map(|role| golden.names().filter(move |name| name.starts_with(role)))
        {
            ensure!(state.insert(name.to_owned(), floats(golden, name)?).is_some(), "`{name}`");
        }
    }
    Ok(Distillation::new(options, base, Start::State(&state), &CPU)?.on(engine))
}

fn is_sum(loss: &Tensor, expected: f64) -> Result<()> {
    let got = f64::from(loss.to_scalar::<f32>()?);
    ensure!(
        (got - expected).abs() < 1e-5 * expected.abs(),
        "the loss is {got}, its parts sum up to {expected}"
    );
    Ok(())
}

#[test]
fn the_three_losses_match_pytorch_with_every_gradient() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-class")?, Golden::load("losses")?);
    let options = options(&base)?;
    for engine in ENGINES {
        let work = distillation(&options, &base, &[&golden], engine)?;
        let step = Step { golden: &golden, row: None };
        let draws = step.generator()?;
        let (loss, mut update) = work.generator_loss(&draws)?;
        let x_gen = golden.f32("once.x_gen")?;
        compare_scaled("x_gen", &flat(&update.x_gen)?, &x_gen, 1e-4, 0.0)?;
        let class = draws.input.class.as_ref();
        let noise = draws.matching.as_ref().context("noise")?;
        let gradient = flat(&work.matching_gradient(&update.x_gen, class, noise)?)?;
        compare_scaled("dm_gradient", &gradient, &golden.f32("once.dm_gradient")?, 1e-4, 0.0)?;
        let critic = work.critic_loss(&step.critic()?, &mut update)?;
        is_sum(&loss, update.dm + 0.5 * update.reg)?;
        step.figure(engine, "loss.dm", update.dm)?;
        step.figure(engine, "loss.reg", update.reg)?;
        step.figure(engine, "loss.critic", update.fake)?;
        step.gradients(engine, &work, &loss, &critic)?;
    }
    Ok(())
}

/// The mean over several draws of noise per image is that of the draws: here twice the golden's, and the other way round.
#[test]
fn several_draws_per_image_are_averaged() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-class")?, Golden::load("losses")?);
    let options = options(&base)?;
    for engine in ENGINES {
        let work = distillation(&options, &base, &[&golden], engine)?;
        let draws = Step { golden: &golden, row: None }.generator()?;
        let class = draws.input.class.as_ref();
        let x_gen = floats(&golden, "once.x_gen")?;
        let single = |noise: &Noise| work.matching_gradient(&x_gen, class, noise);
        let first = draws.matching.as_ref().context("noise")?;
        let n = first.t.len();
        let reversed: Vec<u32> = (0..n as u32).rev().collect();
        let other = Noise {
            t: first.t.iter().rev().copied().collect(),
            eps: first.eps.index_select(&Tensor::new(reversed, &CPU)?, 0)?,
        };
        let both = Noise {
            t: first.t.iter().chain(&other.t).copied().collect(),
            eps: Tensor::cat(&[&first.eps, &other.eps], 0)?,
        };
        let expected = ((single(first)? + single(&other)?)? * 0.5)?;
        let got = single(&both)?;
        compare_scaled("two draws", &flat(&got)?, &flat(&expected)?, 1e-5, 0.0)?;
        let far = (got - single(first)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
        ensure!(far > 1e-2, "cannot be told from the first draw: {far}");
    }
    Ok(())
}

/// Losses of clamped images, with the gradient of the images as they are.
#[test]
fn clamped_images_pass_their_gradient_on() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-class")?, Golden::load("losses")?);
    let plain = options(&base)?;
    let options = DistillOptions { clamp: true, ..plain.clone() };
    let step = Step { golden: &golden, row: None };
    for engine in ENGINES {
        let work = distillation(&options, &base, &[&golden], engine)?;
        let mut draws = GeneratorDraws { matching: None, ..step.generator()? };
        let as_is = distillation(&plain, &base, &[&golden], engine)?.generator_loss(&draws)?.1.x_gen;
        let clamped = as_is.clamp(-1f32, 1f32)?;
        let outside = (&as_is - &clamped)?.abs()?.max_all()?.to_scalar::<f32>()?;
        ensure!(outside > 0.1, "nothing to clamp: {outside}");
        let (_, update) = work.generator_loss(&draws)?;
        compare_scaled("x_gen", &flat(&update.x_gen)?, &flat(&clamped)?, 1e-6, 0.0)?;
        // The gradient of mean((x - y)^2) in x is 2(x - y)/n, so a target that lies as far from the image as it is, as another
        // does from the clamped one, gives the same gradient of every weight.
        let pairs = draws.pairs.as_mut().context("no pairs")?;
        pairs.y = (&clamped + 0.1)?;
        let got = work.generator_loss(&draws)?.0.backward()?;
        let pairs = draws.pairs.as_mut().context("no pairs")?;
        pairs.y = (&as_is + 0.1)?;
        let expected = distillation(&plain, &base, &[&golden], engine)?;
        let grads = expected.generator_loss(&draws)?.0.backward()?;
        let variables = work.generator.variables().iter().zip(expected.generator.variables());
        for ((name, var), (_, other)) in variables.filter(|((n, _), _)| !n.ends_with(WITHOUT_EFFECT)) {
            let got = flat(got.get(var).with_context(|| format!("no gradient for `{name}`"))?)?;
            let grad = flat(grads.get(other).with_context(|| format!("no gradient for `{name}`"))?)?;
            compare_gradient("clamped", name, &got, &grad, 1e-4)?;
        }
    }
    Ok(())
}

/// Critic updates after the first see what the generator, as it has become, makes of fresh noise.
#[test]
fn later_critic_updates_follow_the_generator() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-class")?, Golden::load("losses")?);
    let options = options(&base)?;
    for engine in ENGINES {
        let mut work = distillation(&options, &base, &[&golden], engine)?;
        let step = Step { golden: &golden, row: None };
        let draws = step.generator()?;
        let constants =
            OneStep::new(&GeneratorConfig { t_gen: 440, input_scale: 1.0 }, &Schedule::new(&base.schedule))?;
        let class = draws.input.class.clone();
        let before = work.generator.one_step(&constants, &draws.input.z, class.as_ref())?;
        let mut update = work.update_generator(&draws)?;
        let after = work.generator.one_step(&constants, &draws.input.z, class.as_ref())?;
        let moved = (&after - &before)?.abs()?.max_all()?.to_scalar::<f32>()?;
        ensure!(moved > 1e-3, "the generator did not move: {moved}");
        let fresh = CriticDraws { input: Some(step.input("z", "class")?), ..step.critic()? };
        update.fake = 0.0;
        let got = work.critic_loss(&fresh, &mut update)?.to_scalar::<f32>()?;
        update.x_gen = after.detach();
        let expected = work.critic_loss(&step.critic()?, &mut update)?.to_scalar::<f32>()?;
        update.x_gen = before.detach();
        let stale = work.critic_loss(&step.critic()?, &mut update)?.to_scalar::<f32>()?;
        ensure!((got - expected).abs() <= 1e-6 * expected, "{engine:?}: {got}, expected {expected}");
        ensure!((stale - expected).abs() > 1e-5 * expected, "{engine:?}: cannot be told from {stale}");
    }
    Ok(())
}

/// DMD2's losses: `scripts/golden_adversarial.py`.
#[test]
fn the_adversarial_losses_match_pytorch_with_every_gradient() -> Result<()> {
    let base = checkpoint("tiny-class")?;
    let (golden, weights) = (Golden::load("adversarial")?, Golden::load("losses")?);
    let options = DistillOptions {
        gan_weight: 0.5,
        gan_weight_fake: 0.25,
        lambda_reg: 0.0,
        pairs: 0,
        ..options(&base)?
    };
    for engine in ENGINES {
        let work = distillation(&options, &base, &[&weights, &golden], engine)?;
        let step = Step { golden: &golden, row: None };
        let draws = GeneratorDraws {
            pairs: None,
            adversarial: Some(step.noise("t_adversarial", "eps_adversarial")?),
            ..step.generator()?
        };
        let real = RealBatch {
            images: step.floats("y_real")?,
            class: Some(Tensor::new(step.indices("class_real")?, &CPU)?),
            noise: step.noise("t_real", "eps_real")?,
        };
        let (loss, mut update) = work.generator_loss(&draws)?;
        let draws = CriticDraws { real: Some(real), ..step.critic()? };
        // Of two critic updates the statistics are the mean.
        let twice = DistillOptions { fake_updates: 2, ..options.clone() };
        let mut twice = distillation(&twice, &base, &[&weights, &golden], engine)?;
        let mut both = work.generator_loss(&step.generator()?)?.1;
        twice.critic_loss(&draws, &mut both)?;
        twice.critic_loss(&draws, &mut both)?;
        let mut once = distillation(&options, &base, &[&weights, &golden], engine)?;
        let mut single = once.generator_loss(&step.generator()?)?.1;
        once.update_critic(&draws, &mut single)?;
        twice.set_rates([0.0, 0.0]);
        let mut mean = twice.generator_loss(&step.generator()?)?.1;
        twice.update_critic(&draws, &mut mean)?;
        twice.update_critic(&draws, &mut mean)?;
        ensure!(
            (mean.fake_norm / single.fake_norm - 1.0).abs() < 1e-5,
            "{} {}",
            mean.fake_norm,
            single.fake_norm
        );
        step.figure(engine, "loss.critic", both.fake)?;
        step.figure(engine, "loss.discrimination", both.discrimination)?;
        let critic = work.critic_loss(&draws, &mut update)?;
        is_sum(&loss, update.dm + 0.5 * update.adversarial)?;
        is_sum(&critic, update.fake + 0.25 * update.discrimination)?;
        step.figure(engine, "loss.dm", update.dm)?;
        step.figure(engine, "loss.adversarial", update.adversarial)?;
        step.figure(engine, "loss.critic", update.fake)?;
        step.figure(engine, "loss.discrimination", update.discrimination)?;
        step.gradients(engine, &work, &loss, &critic)?;
    }
    Ok(())
}

/// On a bottleneck of 8 pixels the head halves once before it looks at the whole.
#[test]
fn the_discriminator_matches_pytorch_on_a_larger_bottleneck() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-ddpm")?, Golden::load("adversarial")?);
    let mut tensors = base.tensors.clone();
    for name in golden.names_under("ddpm.").filter(|name| name.starts_with("discriminator.")) {
        tensors.insert(name.to_owned(), floats(&golden, &format!("ddpm.{name}"))?);
    }
    let mut network = Network::trainable(&base.config, &tensors, &CPU)?;
    let x_t = Var::from_tensor(&floats(&golden, "ddpm.x_t")?)?;
    let t: Vec<f32> = golden.i64("ddpm.t")?.into_iter().map(|t| t as f32).collect();
    for engine in ENGINES {
        network.engine = engine;
        let logit = network.logit(&x_t, &Tensor::new(t.clone(), &CPU)?, None)?;
        let what = format!("logit by {engine:?}");
        compare_scaled(&what, &flat(&logit)?, &golden.f32("ddpm.logit")?, 1e-4, 0.0)?;
        let grads = logit.mean_all()?.backward()?;
        let got = flat(grads.get(&x_t).context("no gradient for x_t")?)?;
        compare_gradient(&what, "x_t", &got, &golden.f32("ddpm.gradient")?, 1e-4)?;
    }
    Ok(())
}

/// A learning rate holds for the updates that follow, of either network.
#[test]
fn learning_rates_hold_from_the_next_update() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-class")?, Golden::load("losses")?);
    let options = options(&base)?;
    let weights = |network: &Network| -> Result<Vec<f32>> {
        let all = network.variables().iter().map(|(_, var)| flat(var)).collect::<Result<Vec<_>>>()?;
        Ok(all.concat())
    };
    let mut work = distillation(&options, &base, &[&golden], Engine::Compositions)?;
    let step = Step { golden: &golden, row: Some(0) };
    for (rates, moves) in [([0.0, 1e-3], [false, true]), ([1e-3, 0.0], [true, false])] {
        let before = [weights(&work.generator)?, weights(&work.fake)?];
        work.set_rates(rates);
        let mut update = work.update_generator(&step.generator()?)?;
        work.update_critic(&step.critic()?, &mut update)?;
        let after = [weights(&work.generator)?, weights(&work.fake)?];
        let moved = [before[0] != after[0], before[1] != after[1]];
        ensure!(moved == moves, "rates {rates:?}: generator and critic moved: {moved:?}");
    }
    Ok(())
}

/// Between regression alone and matching only the generator's moments begin anew, with the warm-up.
#[test]
fn moments_are_forgotten_and_nothing_else() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-class")?, Golden::load("losses")?);
    let options = options(&base)?;
    let mut work = distillation(&options, &base, &[&golden], Engine::Compositions)?;
    let step = Step { golden: &golden, row: Some(0) };
    let mut update = work.update_generator(&step.generator()?)?;
    work.update_critic(&step.critic()?, &mut update)?;
    let before = work.state(&Tensors::new())?;
    work.forget_moments()?;
    for (name, tensor) in work.state(&Tensors::new())? {
        let (now, then) = (flat(&tensor)?, flat(&before[&name])?);
        match name.starts_with("generator_optimiser.") {
            true => ensure!(now.iter().all(|v| *v == 0.0), "`{name}` is kept"),
            false => ensure!(now == then, "`{name}` was changed"),
        }
    }
    ensure!(flat(&before["generator_optimiser.updates"])? == [1.0], "no update was counted");
    Ok(())
}

/// The updates that `dmd-distill` makes, on the golden's draws.
#[test]
fn ten_training_steps_match_pytorch() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-class")?, Golden::load("losses")?);
    let options = options(&base)?;
    for engine in ENGINES {
        let mut work = distillation(&options, &base, &[&golden], engine)?;
        for row in 0..10 {
            let step = Step { golden: &golden, row: Some(row) };
            let mut update = work.update_generator(&step.generator()?)?;
            work.update_critic(&step.critic()?, &mut update)?;
            step.figure(engine, "loss.dm", update.dm)?;
            step.figure(engine, "loss.reg", update.reg)?;
            step.figure(engine, "loss.critic", update.fake)?;
            step.figure(engine, "grad_norm.generator", update.norm)?;
            step.figure(engine, "grad_norm.fake", update.fake_norm)?;
        }
        for (role, network) in [("generator", &work.generator), ("fake", &work.fake)] {
            for (name, var) in network.variables().iter().filter(|(n, _)| !n.ends_with(WITHOUT_EFFECT)) {
                let expected = golden.f32(&format!("final.{role}.{name}"))?;
                compare_scaled(&format!("{name} by {engine:?}"), &flat(var)?, &expected, 1e-4, 0.0)?;
            }
        }
    }
    Ok(())
}
