//! Distillation against PyTorch: networks, operations, losses and a training trajectory, value by value.

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor, Var};
use dmd_core::card::GeneratorConfig;
use dmd_core::compare::Tolerance;
use dmd_core::config::ModelConfig;
use dmd_core::net::{OneStep, denoise};
use dmd_core::schedule::Schedule;
use dmd_distill::checkpoint::{Checkpoint, Source};
use dmd_distill::cpu::{self, CpuOps};
use dmd_distill::losses::{self, Distance, NoiseLevels};
use dmd_distill::network::{Network, Tensors, initial_weights};
use dmd_distill::ops::CandleOps;
use dmd_distill::optimiser::{AdamW, AdamWConfig};
use dmd_distill::random::{Purpose, Random};
use dmd_distill::statistics::BatchStatistics;
use dmd_tests::operations::Operation;
use dmd_tests::{Golden, compare, compare_scaled, fixture};

const CPU: Device = Device::Cpu;
/// The issue's bound on predicted noise.
const EPS_PRED: Tolerance = Tolerance { abs: 1e-4, rel: 0.0 };
/// diffusers rounds the angles of the time embedding to f32, as we do, but after another exponential: at t = 999 the
/// two differ by up to 6e-5 (tests/golden/README.md).
const ANGLES_IN_F32: f32 = 1e-4;
/// The key bias of an attention has no effect; its gradient is rounding noise (tests/golden/README.md).
const WITHOUT_EFFECT: &str = "to_k.bias";

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

fn floats(golden: &Golden, name: &str) -> Result<Tensor> {
    Ok(Tensor::from_vec(golden.f32(name)?, golden.shape(name)?, &CPU)?)
}

fn indices(golden: &Golden, name: &str) -> Result<Vec<u32>> {
    golden.i64(name)?.into_iter().map(|v| u32::try_from(v).context("negative")).collect()
}

fn checkpoint(name: &str) -> Result<Checkpoint> {
    Ok(Checkpoint::load(&Source::Folder(fixture(name)))?)
}

fn weights(golden: &Golden, prefix: &str) -> Result<Tensors> {
    golden
        .names_under(prefix)
        .map(|name| Ok((name.to_owned(), floats(golden, &format!("{prefix}{name}"))?)))
        .collect()
}

#[test]
fn unet2d_matches_diffusers_with_every_gradient() -> Result<()> {
    for (folder, file) in [("tiny-ddpm", "unet_tiny_ddpm"), ("tiny-class", "unet_tiny_class")] {
        let (base, golden) = (checkpoint(folder)?, Golden::load(file)?);
        let network = Network::trainable(&base.config, &base.tensors, &CPU)?;
        let x_t = Var::from_tensor(&floats(&golden, "x_t")?)?;
        let t = floats(&golden, "timesteps")?;
        let class = match golden.has("class") {
            true => Some(Tensor::new(indices(&golden, "class")?, &CPU)?),
            false => None,
        };
        let eps_pred = network.predict(&x_t, &t, class.as_ref())?;
        compare(file, &flat(&eps_pred)?, &golden.f32("eps_pred")?, EPS_PRED)?;
        let grads = (eps_pred * floats(&golden, "cotangent")?)?.mean_all()?.backward()?;
        let mut compared = 0;
        for (name, var) in network.variables() {
            let got = flat(grads.get(var).with_context(|| format!("no gradient for `{name}`"))?)?;
            let expected = golden.f32(&format!("grad.{name}"))?;
            compare_scaled(&format!("{file}, {name}"), &got, &expected, 1e-4, 1e-7)?;
            compared += 1;
        }
        ensure!(compared == golden.names_under("grad.").count() - 1, "{compared} gradients compared");
        let got = flat(grads.get(&x_t).context("no gradient for x_t")?)?;
        compare_scaled("x_t", &got, &golden.f32("grad.x_t")?, 1e-4, 1e-7)?;
    }
    Ok(())
}

#[test]
fn one_step_matches_diffusers() -> Result<()> {
    let (base, golden) = (checkpoint("tiny-class")?, Golden::load("one_step")?);
    let network = Network::frozen(&base.config, &base.tensors, &CPU)?;
    let class = Tensor::new(indices(&golden, "class")?, &CPU)?;
    let x_gen = network.one_step(&generator(&base)?, &floats(&golden, "z")?, Some(&class))?;
    compare("x_gen", &flat(&x_gen)?, &golden.f32("x_gen")?, Tolerance { abs: 1e-4, rel: 1e-4 })
}

fn generator(base: &Checkpoint) -> Result<OneStep> {
    let schedule = Schedule::new(&base.schedule);
    let config = GeneratorConfig { t_gen: 440, input_scale: 1.0 };
    Ok(OneStep::new(&config, &schedule)?)
}

/// Every case of `scripts/golden_ops.py` with the gradients of all its inputs, on the CPU engine and on the
/// compositions of candle operations that GPUs use.
#[test]
fn operations_match_pytorch() -> Result<()> {
    let golden = Golden::load("ops")?;
    let operations = Operation::all(&golden)?;
    for operation in &operations {
        for engine in ["cpu", "candle"] {
            run_case(&golden, operation, engine)
                .with_context(|| format!("{} on {engine}", operation.case))?;
        }
    }
    ensure!(operations.len() > 90, "only {} cases", operations.len());
    Ok(())
}

/// Every case of `scripts/golden_batch_norm.py` on both engines: BatchNorm by the statistics of its batch, with the running statistics
/// that follow.
#[test]
fn batch_norm_of_a_batch_matches_pytorch() -> Result<()> {
    let golden = Golden::load("batch_norm")?;
    let operations = Operation::all(&golden)?;
    for operation in &operations {
        for engine in ["cpu", "candle"] {
            let statistics = BatchStatistics::default();
            run_with(&golden, operation, engine, Some(&statistics))
                .with_context(|| format!("{} on {engine}", operation.case))?;
            let case = &operation.case;
            let names = ["running_mean", "running_var"];
            let read =
                |name: &str| Ok((format!("layer.{name}"), floats(&golden, &format!("{case}.{name}"))?));
            let mut running: Tensors = names.iter().map(|name| read(name)).collect::<Result<_>>()?;
            statistics.apply(&mut running)?;
            for name in names {
                let expected = golden.f32(&format!("{case}.after.{name}"))?;
                let got = flat(&running[&format!("layer.{name}")])?;
                compare_scaled(&format!("{case}, {name} on {engine}"), &got, &expected, 1e-5, 1e-6)?;
            }
        }
    }
    ensure!(operations.len() > 8, "only {} cases", operations.len());
    Ok(())
}

/// The whole MNIST network as it is trained: both engines give the same prediction, gradients and running statistics. The
/// bias before a BatchNorm has no effect, its gradient is rounding noise.
#[test]
fn both_engines_train_the_mnist_network_alike() -> Result<()> {
    let config = ModelConfig::from_json(r#"{"_class_name":"ContextUnet","n_feat":8,"sample_size":12}"#)?;
    let weights = initial_weights(&config, 3)?;
    let mut random = Random::new(4, Purpose::Base, 0);
    let (x, cotangent) =
        (random.normal_tensor(&[5, 1, 12, 12], &CPU)?, random.normal_tensor(&[5, 1, 12, 12], &CPU)?);
    let t = Tensor::new(&[1f32, 40.0, 200.0, 399.0, 400.0], &CPU)?;
    let class = Tensor::new(&[0u32, 3, 9, 10, 10], &CPU)?;
    let mut network = Network::trainable(&config, &weights, &CPU)?.training_statistics();
    let prediction = network.predict(&x, &t, Some(&class))?;
    let grads = (&prediction * &cotangent)?.mean_all()?.backward()?;
    network.update_statistics()?;

    let other = Network::trainable(&config, &weights, &CPU)?;
    let statistics = BatchStatistics::default();
    let mut ops = CandleOps::new(other.parameters(), &CPU);
    ops.use_batch_statistics(statistics.clone());
    let expected = denoise(&mut ops, &config, &x, &t, Some(&class))?;
    compare("prediction", &flat(&prediction)?, &flat(&expected)?, Tolerance { abs: 1e-4, rel: 1e-4 })?;
    let expected_grads = (&expected * &cotangent)?.mean_all()?.backward()?;
    for ((name, var), (_, same)) in network.variables().iter().zip(other.variables()) {
        let [got, expected] =
            [grads.get(var), expected_grads.get(same)].map(|grad| grad.context("no gradient"));
        compare_scaled(name, &flat(got?)?, &flat(expected?)?, 1e-3, 1e-6)?;
    }
    let mut running = other.parameters().clone();
    statistics.apply(&mut running)?;
    let names: Vec<&String> = running.keys().filter(|name| name.contains(".running_")).collect();
    ensure!(names.len() == 28, "{names:?}");
    for name in names {
        ensure!(flat(&running[name])? != flat(&weights[name])?, "`{name}` did not move");
        compare_scaled(name, &flat(&network.parameters()[name])?, &flat(&running[name])?, 1e-4, 1e-6)?;
    }
    Ok(())
}

fn run_case(golden: &Golden, operation: &Operation, engine: &str) -> Result<()> {
    run_with(golden, operation, engine, None)
}

fn run_with(
    golden: &Golden,
    operation: &Operation,
    engine: &str,
    statistics: Option<&BatchStatistics>,
) -> Result<()> {
    let case = &operation.case;
    let read = |name: &&'static str| -> Result<(&'static str, Var)> {
        Ok((*name, Var::from_tensor(&floats(golden, &format!("{case}.{name}"))?)?))
    };
    let named: Vec<(&str, Var)> = operation.parameters.iter().map(read).collect::<Result<_>>()?;
    let inputs: Vec<(&str, Var)> = operation.inputs.iter().map(read).collect::<Result<_>>()?;
    let parameters: Tensors =
        named.iter().map(|(name, var)| (format!("layer.{name}"), var.as_tensor().clone())).collect();
    let tensors: Vec<Tensor> = inputs.iter().map(|(_, var)| var.as_tensor().clone()).collect();
    let shape = golden.shape(&format!("{case}.y"))?;
    let y = if engine == "cpu" {
        let images: Vec<Tensor> = tensors.iter().map(as_images).collect::<Result<_>>()?;
        let (operation, statistics) = (operation.clone(), statistics.cloned());
        let run = move |ops: &mut CpuOps, inputs: &[cpu::Value]| {
            if let Some(statistics) = statistics {
                ops.use_batch_statistics(statistics);
            }
            let numbers = ops.numbers(&operation.numbers);
            operation.run(ops, inputs, &numbers)
        };
        cpu::apply(&images, &parameters, run)?.reshape(shape)?
    } else {
        let numbers = Tensor::new(operation.numbers.as_slice(), &CPU)?;
        let mut ops = CandleOps::new(&parameters, &CPU);
        if let Some(statistics) = statistics {
            ops.use_batch_statistics(statistics.clone());
        }
        operation.run(&mut ops, &tensors, &numbers)?
    };
    let bound = if operation.name() == "timestep_embedding" { ANGLES_IN_F32 } else { 1e-5 };
    compare_scaled(case, &flat(&y)?, &golden.f32(&format!("{case}.y"))?, bound, 1e-6)?;
    if !golden.has(&format!("{case}.cotangent")) {
        return Ok(());
    }
    let grads = (y * floats(golden, &format!("{case}.cotangent"))?)?.sum_all()?.backward()?;
    for (input, var) in inputs.iter().chain(&named).filter(|(name, _)| !name.starts_with("running")) {
        let got = flat(grads.get(var).with_context(|| format!("no gradient of {input}"))?)?;
        let expected = golden.f32(&format!("{case}.grad.{input}"))?;
        compare_scaled(&format!("gradient of {input}"), &got, &expected, 1e-5, 2e-6)?;
    }
    Ok(())
}

/// Vectors become images of one pixel.
fn as_images(t: &Tensor) -> Result<Tensor> {
    Ok(match *t.dims() {
        [n, c] => t.reshape((n, c, 1, 1))?,
        _ => t.clone(),
    })
}

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

    fn loss(&self, name: &str, got: &Tensor) -> Result<()> {
        let expected = self.expected(name)?;
        compare(&self.key(name), &[got.to_scalar()?], &[expected], Tolerance { abs: 0.0, rel: 1e-4 })
    }
}

struct Networks {
    teacher: Network,
    generator: Network,
    fake: Network,
    schedule: Schedule,
    one_step: OneStep,
}

impl Networks {
    fn load(golden: &Golden) -> Result<Self> {
        let base = checkpoint("tiny-class")?;
        Ok(Self {
            teacher: Network::frozen(&base.config, &base.tensors, &CPU)?,
            generator: Network::trainable(&base.config, &weights(golden, "generator.")?, &CPU)?,
            fake: Network::trainable(&base.config, &weights(golden, "fake.")?, &CPU)?,
            schedule: Schedule::new(&base.schedule),
            one_step: generator(&base)?,
        })
    }

    /// `x_gen`, and the two generator losses.
    fn generator_losses(&self, step: &Step) -> Result<(Tensor, Tensor, Tensor)> {
        let class = Tensor::new(step.indices("class")?, &CPU)?;
        let x_gen = self.generator.one_step(&self.one_step, &step.floats("z")?, Some(&class))?;
        let levels = NoiseLevels::new(&self.schedule, &step.indices("t")?, &CPU)?;
        let x_t = levels.noisy(&x_gen.detach(), &step.floats("eps")?)?;
        let x0 = |network: &Network| -> Result<Tensor> {
            Ok(levels.x0(&x_t, &network.predict(&x_t, &levels.t, Some(&class))?)?)
        };
        let (x0_real, x0_fake) = (x0(&self.teacher)?, x0(&self.fake.without_gradient())?);
        let gradient = losses::distribution_matching_gradient(&x_gen, &x0_real, &x0_fake)?;
        if step.row.is_none() {
            compare_scaled(
                "dm_gradient",
                &flat(&gradient)?,
                &step.golden.f32("once.dm_gradient")?,
                1e-4,
                0.0,
            )?;
        }
        let dm = losses::distribution_matching(&x_gen, &gradient)?;
        let class = Tensor::new(step.indices("class_ref")?, &CPU)?;
        let x_ref = self.generator.one_step(&self.one_step, &step.floats("z_ref")?, Some(&class))?;
        Ok((x_gen.detach(), dm, losses::regression(&x_ref, &step.floats("y_ref")?, Distance::L2)?))
    }

    fn critic_loss(&self, step: &Step, x_gen: &Tensor) -> Result<Tensor> {
        let class = Tensor::new(step.indices("class")?, &CPU)?;
        let levels = NoiseLevels::new(&self.schedule, &step.indices("t_fake")?, &CPU)?;
        let eps = step.floats("eps_fake")?;
        let eps_pred = self.fake.predict(&levels.noisy(x_gen, &eps)?, &levels.t, Some(&class))?;
        Ok(losses::denoising(&eps_pred, &levels.target(x_gen, &eps)?)?)
    }
}

#[test]
fn the_three_losses_match_pytorch_with_every_gradient() -> Result<()> {
    let golden = Golden::load("losses")?;
    let networks = Networks::load(&golden)?;
    let step = Step { golden: &golden, row: None };
    let (x_gen, dm, reg) = networks.generator_losses(&step)?;
    let critic = networks.critic_loss(&step, &x_gen)?;
    step.loss("loss.dm", &dm)?;
    step.loss("loss.reg", &reg)?;
    step.loss("loss.critic", &critic)?;
    for (role, network, loss) in
        [("generator", &networks.generator, (dm + (reg * 0.5)?)?), ("fake", &networks.fake, critic)]
    {
        let grads = loss.backward()?;
        for (name, var) in network.variables() {
            let got = flat(grads.get(var).with_context(|| format!("no gradient for `{name}`"))?)?;
            let expected = golden.f32(&format!("grad.{role}.{name}"))?;
            compare_scaled(&format!("{role}, {name}"), &got, &expected, 1e-4, 1e-6)?;
        }
    }
    Ok(())
}

#[test]
fn ten_training_steps_match_pytorch() -> Result<()> {
    let golden = Golden::load("losses")?;
    let networks = Networks::load(&golden)?;
    let config = AdamWConfig::new(1e-3, 1);
    let mut generator = AdamW::new(config, networks.generator.variables())?;
    let mut fake = AdamW::new(config, networks.fake.variables())?;
    for row in 0..10 {
        let step = Step { golden: &golden, row: Some(row) };
        let (x_gen, dm, reg) = networks.generator_losses(&step)?;
        step.loss("loss.dm", &dm)?;
        step.loss("loss.reg", &reg)?;
        let grads = (dm + (reg * 0.5)?)?.backward()?;
        let norm = generator.step(networks.generator.variables(), &grads)?;
        let critic = networks.critic_loss(&step, &x_gen)?;
        step.loss("loss.critic", &critic)?;
        let fake_norm = fake.step(networks.fake.variables(), &critic.backward()?)?;
        for (role, norm) in [("generator", norm), ("fake", fake_norm)] {
            let expected = step.expected(&format!("grad_norm.{role}"))?;
            compare(role, &[norm as f32], &[expected], Tolerance { abs: 0.0, rel: 1e-4 })?;
        }
    }
    for (role, network) in [("generator", &networks.generator), ("fake", &networks.fake)] {
        for (name, var) in network.variables().iter().filter(|(n, _)| !n.ends_with(WITHOUT_EFFECT)) {
            let expected = golden.f32(&format!("final.{role}.{name}"))?;
            compare(name, &flat(var)?, &expected, Tolerance { abs: 1e-4, rel: 1e-4 })?;
        }
    }
    Ok(())
}
