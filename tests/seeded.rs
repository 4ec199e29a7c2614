//! Weights from a seed, the same bits as in `scripts/golden_bases.py`, so that no file has to hold them.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use dmd_core::config::ModelConfig;
use dmd_core::net::{celeba_unet, shapes};

use crate::Tensor;

/// Numbers `k/2^23 − 1` with 24-bit `k` from splitmix64.
pub fn uniform(seed: u64, stream: u64, count: usize) -> Vec<f64> {
    const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
    let start = (seed << 48) + (stream << 32);
    let number = |i: usize| {
        let mut z = start.wrapping_add(i as u64).wrapping_mul(STEP).wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        (z >> 40) as f64 / 8_388_608.0 - 1.0
    };
    (0..count).map(number).collect()
}

/// Weights and statistics by name; the stream of a tensor is its place in the order of the names.
///
/// # Errors
/// If the configuration describes no network.
pub fn weights(config: &ModelConfig, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    let summary = shapes::summarise(config)?;
    let tensor = |(stream, (name, shape)): (usize, (&String, &Vec<usize>))| {
        let u = uniform(seed, stream as u64, shape.iter().product());
        let factor = match shape.len() {
            1 => 0.1,
            _ => (3.0 / shape[1..].iter().product::<usize>() as f64).sqrt(),
        };
        let data = match config {
            ModelConfig::CelebaUnet(config) if name == "time_embed.weight" => celeba_unet::time_table(config),
            _ if name.ends_with("running_var") => u.iter().map(|u| (1.0 + 0.5 * u) as f32).collect(),
            _ if shape.len() == 1 && name.ends_with(".weight") => {
                u.iter().map(|u| (1.0 + factor * u) as f32).collect()
            }
            _ => u.iter().map(|u| (factor * u) as f32).collect(),
        };
        (name.clone(), Tensor { shape: shape.clone(), data })
    };
    Ok(summary.parameters.iter().enumerate().map(tensor).collect())
}

/// The configuration and seed of one case of a golden file.
///
/// # Errors
/// If the case does not describe a network.
pub fn case(about: &serde_json::Value) -> Result<(ModelConfig, u64)> {
    let config = ModelConfig::from_json(&about["config"].to_string())?;
    Ok((config, about["seed"].as_u64().context("seed")?))
}
