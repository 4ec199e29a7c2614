//! What a distillation leaves: the generator as a checkpoint, with its history. No files.

use std::path::Path;

use dmd_core::card::{Base, GeneratorConfig, Provenance};
use serde_json::json;

use crate::checkpoint::Checkpoint;
use crate::monitor::Monitor;
use crate::network::Tensors;
use crate::train::DistillOptions;

/// The generator as a checkpoint, with its history.
pub(crate) fn finished(
    o: &DistillOptions,
    base: &Checkpoint,
    weights: Tensors,
    step: u64,
    monitor: &Monitor,
) -> Checkpoint {
    let images = step * o.batch as u64;
    let training = json!({
        "method": o.method, "steps": step, "steps_trained": o.all_steps(), "images": images, "batch": o.batch, "lr": o.lr,
        "lr_fake": o.lr_fake, "lambda_reg": o.lambda_reg, "pairs": o.pairs, "pair_steps": o.pair_steps,
        "reg_steps": o.reg_steps, "lr_reg": o.lr_reg, "fake_updates": o.fake_updates, "ema": o.ema, "guidance": o.guidance, "second_stage": o.init.is_some(),
        "dm_weight": o.dm_weight, "gan_weight": o.gan_weight, "gan_weight_fake": o.gan_weight_fake, "reg": o.reg, "reg_until": o.reg_until,
        "dm_draws": o.dm_draws, "clamp": o.clamp, "seed": o.seed,
    });
    let kid = monitor.best.filter(|(_, at)| *at == step).map(|(kid, _)| ("kid".to_owned(), json!(kid)));
    let metrics = kid.into_iter().collect();
    Checkpoint {
        config: base.config.clone(),
        schedule: base.schedule.clone(),
        generator: Some(GeneratorConfig { t_gen: o.t_gen, input_scale: o.input_scale }),
        provenance: Provenance {
            name: format!("one-step-{}", base.provenance.name.trim_start_matches("ddpm-")),
            classes: base.provenance.classes.clone(),
            base: Some(
                base.provenance
                    .base
                    .clone()
                    .unwrap_or_else(|| Base { id: base_id(&o.base), sha256: o.base_sha256.clone() }),
            ),
            training: training.as_object().cloned().unwrap_or_default(),
            metrics,
        },
        tensors: weights,
        sha256: String::new(),
    }
}

/// A preset's name, or the last part of a folder's path; a model of the hub says itself what it is.
fn base_id(base: &str) -> String {
    Path::new(base).file_name().map_or(base.to_owned(), |n| n.to_string_lossy().into_owned())
}
