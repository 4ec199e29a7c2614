//! A graph run on a few images, and what a smaller precision costs in them: images of the graph as it is stored against those
//! of the f32 graph. tract runs both, the only place beside calibration where a graph is run.

use std::sync::Arc;

use dmd_core::card::{ImageSpec, ModelCard, OUTPUT_X_GEN};
use dmd_core::noise;
use serde_json::{Value, json};
use tract_onnx::pb::{GraphProto, ModelProto, OperatorSetIdProto, ValueInfoProto};
use tract_onnx::prelude::*;

use crate::model::OPSET;
use crate::{Error, Result, golden};

/// Multiply-accumulate operations per image above which this would take longer than the rest of an export.
pub const MACS_LIMIT: u64 = 200_000_000;
/// Images by which stored weights are judged.
pub const COUNT: usize = 4;

/// A generator's graph, ready for one image at a time.
pub struct Running<'a> {
    plan: Arc<TypedRunnableModel>,
    graph: &'a GraphProto,
    card: &'a ModelCard,
}

impl<'a> Running<'a> {
    /// With the values `names` as outputs.
    ///
    /// # Errors
    /// If the graph cannot be run.
    pub fn new(graph: &'a GraphProto, card: &'a ModelCard, names: &[String]) -> Result<Self> {
        Ok(Self { plan: plan(graph, card, names).map_err(cannot_run)?, graph, card })
    }

    /// The values for an image of [`golden::SEED`], of class `image` modulo their number.
    ///
    /// # Errors
    /// If the graph cannot be run.
    pub fn outputs(&self, image: u64) -> Result<Vec<Vec<f32>>> {
        self.run(image).map_err(cannot_run)
    }

    fn run(&self, image: u64) -> TractResult<Vec<Vec<f32>>> {
        let ImageSpec { channels, height, width, .. } = self.card.image;
        let mut z = vec![0.0; channels * height * width];
        noise::standard_normal(golden::SEED, image, &mut z);
        let mut inputs: TVec<TValue> = tvec![Tensor::from_shape(&[1, channels, height, width], &z)?.into()];
        if self.graph.input.len() > 1 {
            let classes = self.card.provenance.classes.as_ref();
            let class = classes.map_or(0, |classes| classes.of_image(image));
            inputs.push(Tensor::from_shape(&[1], &[class as i64])?.into());
        }
        let values = self.plan.run(inputs)?;
        values.iter().map(|v| Ok(v.to_plain_array_view::<f32>()?.iter().copied().collect())).collect()
    }
}

fn cannot_run(error: TractError) -> Error {
    Error::Request(format!("cannot run the graph to measure what its precision costs: {error:#}"))
}

fn plan(graph: &GraphProto, card: &ModelCard, names: &[String]) -> TractResult<Arc<TypedRunnableModel>> {
    let output = names.iter().map(|name| ValueInfoProto { name: name.clone(), ..Default::default() });
    let model = ModelProto {
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: OPSET }],
        graph: Some(GraphProto { output: output.collect(), ..graph.clone() }),
        ..Default::default()
    };
    let mut model = tract_onnx::onnx().with_ignore_value_info(true).model_for_proto_model(&model)?;
    let ImageSpec { channels, height, width, .. } = card.image;
    model.set_input_fact(0, f32::fact([1, channels, height, width]).into())?;
    if graph.input.len() > 1 {
        model.set_input_fact(1, i64::fact([1]).into())?;
    }
    model.into_optimized()?.into_runnable()
}

/// The errors of `x_gen` of the first `count` images, for the card: relative root mean square and largest absolute value.
///
/// # Errors
/// If a graph cannot be run.
pub fn difference(got: &GraphProto, exact: &GraphProto, card: &ModelCard, count: usize) -> Result<Value> {
    let images = |graph: &GraphProto| -> Result<Vec<f32>> {
        let running = Running::new(graph, card, &[OUTPUT_X_GEN.to_owned()])?;
        (0..count as u64)
            .map(|image| Ok(running.outputs(image)?.concat()))
            .collect::<Result<Vec<_>>>()
            .map(|v| v.concat())
    };
    let (got, exact) = (images(got)?, images(exact)?);
    let differences = || got.iter().zip(&exact).map(|(g, e)| f64::from(*g) - f64::from(*e));
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let rms = (squares(&mut differences()) / squares(&mut exact.iter().map(|v| f64::from(*v)))).sqrt();
    let largest = differences().fold(0.0, |largest: f64, d| largest.max(d.abs()));
    Ok(json!({
        "rms_relative": three_digits(rms), "max_abs": three_digits(largest),
        "count": count, "seed": golden::SEED,
    }))
}

fn three_digits(value: f64) -> f64 {
    format!("{value:.2e}").parse().unwrap_or(value)
}
