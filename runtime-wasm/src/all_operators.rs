//! tract, for graphs that the project's engine does not run. Only in builds with the feature `all-operators`.

use std::sync::Arc;

use dmd_core::card::INPUT_CLASS;
use dmd_engine::Input;
use tract_onnx::prelude::*;

use crate::{Error, Result};

/// A graph that tract has optimised for inputs of one shape.
pub struct Plan {
    plan: Arc<TypedRunnableModel>,
    /// Shapes of the inputs, and whether they are whole numbers.
    inputs: Vec<(Vec<usize>, bool)>,
}

impl Plan {
    /// Reads a file and optimises it.
    ///
    /// # Errors
    /// An operator that tract does not have either, shapes that do not fit.
    pub fn build(file: &[u8], inputs: &[Input], output: &str) -> Result<Self> {
        let build = || -> TractResult<Arc<TypedRunnableModel>> {
            let onnx = tract_onnx::onnx().with_ignore_value_info(true);
            let mut model = onnx.model_for_read(&mut &*file)?;
            model.select_inputs_by_name(inputs.iter().map(|input| input.name))?;
            model.select_outputs_by_name([output])?;
            for (i, input) in inputs.iter().enumerate() {
                let fact = if whole(input) { i64::fact(input.shape) } else { f32::fact(input.shape) };
                model.set_input_fact(i, fact.into())?;
            }
            let model = model.into_optimized()?;
            let (got, expected) = (model.output_fact(0)?, f32::fact(inputs[0].shape));
            if !got.compatible_with(&expected) {
                return Err(TractError::msg(format!("`{output}` is {got:?}, expected {expected:?}")));
            }
            model.into_runnable()
        };
        let plan = build().map_err(|e| Error::Graph(format!("{e:#}")))?;
        let inputs = inputs.iter().map(|input| (input.shape.to_vec(), whole(input))).collect();
        Ok(Self { plan, inputs })
    }

    /// The first `len` values of the output.
    ///
    /// # Errors
    /// A graph that fails while it runs.
    pub fn run(&self, inputs: &[&[f32]], len: usize) -> Result<Vec<f32>> {
        let run = || -> TractResult<Vec<f32>> {
            let tensors = inputs.iter().zip(&self.inputs).map(|(values, (shape, whole))| {
                let tensor = Tensor::from_shape(shape, values)?;
                Ok(if *whole { tensor.cast_to::<i64>()?.into_owned() } else { tensor }.into())
            });
            let outputs = self.plan.run(tensors.collect::<TractResult<TVec<TValue>>>()?)?;
            Ok(outputs[0].to_plain_array_view::<f32>()?.iter().take(len).copied().collect())
        };
        run().map_err(|e| Error::Run(format!("{e:#}")))
    }
}

fn whole(input: &Input) -> bool {
    input.name == INPUT_CLASS
}
