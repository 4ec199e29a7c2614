//! What a smaller precision costs: images of the evaluator with the rounded weights against those with the
//! checkpoint's. Weights are as runtimes read them, also where BatchNorm was merged into them; a bias table, merged per
//! class, counts as exact.

use dmd_core::card::Kind;
use serde_json::{Value, json};

use crate::graph::Finished;
use crate::precision::{Precision, factors};
use crate::{Checkpoint, Result, golden};

/// Multiply-accumulate operations per image above which this would take longer than the rest of an export.
pub const MACS_LIMIT: u64 = 200_000_000;
/// Images that are compared.
const COUNT: usize = 4;

/// The errors of `x_gen` that a verified f32 graph will have when its weights are stored in `precision`, for the
/// card: relative root mean square and largest absolute value. Nothing for f32, teachers and large networks.
pub fn precision(
    checkpoint: &Checkpoint,
    kind: Kind,
    finished: &Finished,
    precision: Precision,
) -> Result<Option<Value>> {
    if matches!(precision, Precision::F32 | Precision::Qdq)
        || kind == Kind::Teacher
        || finished.macs > MACS_LIMIT
    {
        return Ok(None);
    }
    let mut rounded = checkpoint.clone();
    for (name, factors) in factors(&finished.graph, precision) {
        if let Some(weight) = rounded.weights.get_mut(&name)
            && weight.data.len() == factors.len()
        {
            weight.data.iter_mut().zip(factors).for_each(|(w, factor)| *w = (f64::from(*w) * factor) as f32);
        }
    }
    let exact = golden::reference(checkpoint, kind, COUNT)?.output.data;
    let got = golden::reference(&rounded, kind, COUNT)?.output.data;
    Ok(Some(errors(&got, &exact, COUNT)))
}

/// Errors of images as a card has them: relative root mean square and largest absolute value.
pub fn errors(got: &[f32], exact: &[f32], count: usize) -> Value {
    let differences = || got.iter().zip(exact).map(|(g, e)| f64::from(*g) - f64::from(*e));
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let rms = (squares(&mut differences()) / squares(&mut exact.iter().map(|v| f64::from(*v)))).sqrt();
    let largest = differences().fold(0.0, |largest: f64, d| largest.max(d.abs()));
    json!({
        "rms_relative": three_digits(rms), "max_abs": three_digits(largest),
        "count": count, "seed": golden::SEED,
    })
}

fn three_digits(value: f64) -> f64 {
    format!("{value:.2e}").parse().unwrap_or(value)
}
