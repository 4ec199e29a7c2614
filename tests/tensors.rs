//! Golden data as candle tensors, for the tests of distillation against PyTorch.

use anyhow::{Context, Result, ensure};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};
use dmd_distill::checkpoint::{Checkpoint, Source};
use dmd_distill::network::{Engine, Network};
use dmd_tests::{Golden, compare_gradient, fixture};

/// Where tests compute.
pub const CPU: Device = Device::Cpu;
/// What CPUs use, and what GPUs use.
pub const ENGINES: [Engine; 2] = [Engine::Kernels, Engine::Compositions];

/// All values, last axis fastest.
pub fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}

/// A golden tensor of floats.
pub fn floats(golden: &Golden, name: &str) -> Result<Tensor> {
    Ok(Tensor::from_vec(golden.f32(name)?, golden.shape(name)?, &CPU)?)
}

/// A golden tensor of classes or steps.
pub fn indices(golden: &Golden, name: &str) -> Result<Vec<u32>> {
    golden.i64(name)?.into_iter().map(|v| u32::try_from(v).context("negative")).collect()
}

/// A fixture's base.
pub fn checkpoint(name: &str) -> Result<Checkpoint> {
    Ok(Checkpoint::load(&Source::Folder(fixture(name)))?)
}

/// Compares the gradient of every variable with `PREFIX.NAME`.
pub fn compare_gradients(
    what: &str,
    grads: &GradStore,
    network: &Network,
    golden: &Golden,
    prefix: &str,
) -> Result<()> {
    let count = golden.names_under(prefix).filter(|name| network.parameters().contains_key(*name)).count();
    ensure!(count == network.variables().len(), "{what}: {count} gradients");
    for (name, var) in network.variables() {
        let got = flat(grads.get(var).with_context(|| format!("no gradient for `{name}`"))?)?;
        compare_gradient(what, name, &got, &golden.f32(&format!("{prefix}{name}"))?, 1e-4)?;
    }
    Ok(())
}
