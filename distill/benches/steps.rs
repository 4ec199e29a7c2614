//! The Rust side of `scripts/bench-vs-pytorch`: times training steps and forward passes on request.
//!
//! Without arguments, as `cargo bench` calls it, it says so and ends. Arguments: a folder with `config.json` and weights, a safetensors file with `x_t`, `t`, `eps` and perhaps `class`.
//! For every line `train` or `forward` on standard input it prints seconds and loss, or seconds and mean.

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, Tensor};
use dmd_distill::checkpoint::{Checkpoint, Source};
use dmd_distill::device::quiet_candle_threads;
use dmd_distill::losses;
use dmd_distill::network::Network;
use dmd_distill::optimiser::{AdamW, AdamWConfig};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    quiet_candle_threads();
    // cargo passes flags of its own.
    let names = std::env::args_os().skip(1).filter(|name| !name.to_string_lossy().starts_with('-'));
    let arguments: Vec<PathBuf> = names.map(PathBuf::from).collect();
    let [folder, batch] = arguments.as_slice() else {
        println!(
            "steps: times a model folder on a batch file for scripts/bench-vs-pytorch; got none, nothing to do"
        );
        return Ok(());
    };
    let device = Device::Cpu;
    let base = Checkpoint::load(&Source::Folder(folder.clone()))?;
    let batch: HashMap<String, Tensor> = candle_core::safetensors::load(batch, &device)?;
    let get = |name: &str| batch.get(name).with_context(|| format!("no `{name}` in the batch"));
    let (x_t, t, eps) = (get("x_t")?, get("t")?.to_dtype(DType::F32)?, get("eps")?);
    let class = batch.get("class").map(|class| class.to_dtype(DType::U32)).transpose()?;
    let network = Network::trainable(&base.config, &base.tensors, &device)?;
    let frozen = network.without_gradient();
    let config = AdamWConfig { clip: f64::INFINITY, ..AdamWConfig::new(1e-4, 1) };
    let mut optimiser = AdamW::new(config, network.variables())?;
    for line in std::io::stdin().lock().lines() {
        let start = Instant::now();
        let value = match line?.as_str() {
            "train" => {
                let loss = losses::denoising(&network.predict(x_t, &t, class.as_ref())?, eps)?;
                optimiser.step(network.variables(), &loss.backward()?)?;
                loss
            }
            "forward" => frozen.predict(x_t, &t, class.as_ref())?.mean_all()?,
            other => bail!("got `{other}`, expected `train` or `forward`"),
        };
        let seconds = start.elapsed().as_secs_f64();
        println!("{seconds} {}", value.to_scalar::<f32>()?);
        std::io::stdout().flush()?;
    }
    Ok(())
}
