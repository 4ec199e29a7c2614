//! A one-step generator read from the bytes of an ONNX file and run by tract, one image at a time.
//! The same code runs natively, where its tests are. Nothing here may know JavaScript, files or clocks.

use std::sync::Arc;

use dmd_core::card::{INPUT_CLASS, INPUT_Z, OUTPUT_X_GEN};
use dmd_core::noise;
use dmd_core::pixels::{self, Image};
use tract_onnx::pb::ModelProto;
use tract_onnx::prelude::*;

use crate::contract::Contract;
use crate::{Error, Result};

/// A generator, ready to run.
pub struct Generator {
    plan: Arc<TypedRunnableModel>,
    contract: Contract,
}

/// One generated image.
#[derive(Debug)]
pub struct Sample {
    /// `[channels, height, width]` in the model's range.
    pub values: Vec<f32>,
    /// The class it was asked for, if the model is conditional.
    pub class: Option<usize>,
}

impl Generator {
    /// Reads an ONNX file and prepares it for batches of one image (tract's fastest), or of as many as the file fixes, of
    /// which all but the first are thrown away.
    ///
    /// # Errors
    /// Bytes that are not ONNX, a file that is not a generator's (see [`Contract::read`]), an operator that tract
    /// does not have.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let onnx = tract_onnx::onnx().with_ignore_value_info(true);
        let not_onnx = |problem: String| Error::NotOnnx { bytes: bytes.len(), problem };
        let model = onnx.proto_model_for_read(&mut &*bytes).map_err(|e| not_onnx(format!("{e:#}")))?;
        let graph = model.graph.as_ref().ok_or_else(|| not_onnx("it holds no graph".to_owned()))?;
        let contract = Contract::read(&model, graph)?;
        let plan = plan(&onnx, &model, &contract).map_err(|e| Error::Graph(format!("{e:#}")))?;
        Ok(Self { plan, contract })
    }

    /// What the file says about itself.
    pub fn contract(&self) -> &Contract {
        &self.contract
    }

    /// Generates image `image` of seed `seed`; without a class, the model's classes take turns.
    ///
    /// # Errors
    /// A class that the model does not have, or one asked of an unconditional model.
    pub fn generate(&self, seed: u32, image: u64, class: Option<usize>) -> Result<Sample> {
        let class = self.class_of(image, class)?;
        let mut z = vec![0.0; self.contract.shape().iter().product()];
        noise::standard_normal(seed, image, &mut z);
        let values = self.run(&z, class).map_err(|e| Error::Run(format!("{e:#}")))?;
        if values.len() != z.len() {
            let (got, expected) = (values.len(), z.len());
            return Err(Error::Run(format!("`{OUTPUT_X_GEN}` has {got} values, expected {expected}")));
        }
        if values.iter().any(|v| !v.is_finite()) {
            return Err(Error::Run(format!("`{OUTPUT_X_GEN}` holds values that are not finite numbers")));
        }
        Ok(Sample { values, class })
    }

    /// The pixels of a sample, rounded as every runtime rounds them.
    pub fn pixels(&self, sample: &Sample) -> Image {
        pixels::to_image(&sample.values, self.contract.shape(), self.contract.image.range)
    }

    fn class_of(&self, image: u64, class: Option<usize>) -> Result<Option<usize>> {
        match (&self.contract.classes, class) {
            (None, None) => Ok(None),
            (None, Some(class)) => {
                Err(Error::request(format!("got class {class}, expected none: the model is unconditional")))
            }
            (Some(classes), None) => Ok(Some(classes.of_image(image))),
            (Some(classes), Some(class)) if class < classes.count => Ok(Some(class)),
            (Some(classes), Some(class)) => {
                Err(Error::request(format!("got class {class}, expected 0 to {}", classes.count - 1)))
            }
        }
    }

    fn run(&self, z: &[f32], class: Option<usize>) -> TractResult<Vec<f32>> {
        let ([c, h, w], n) = (self.contract.shape(), self.contract.batch);
        let mut inputs: TVec<TValue> = tvec!(Tensor::from_shape(&[n, c, h, w], &z.repeat(n))?.into());
        if let Some(class) = class {
            inputs.push(tensor1(&vec![class as i64; n]).into());
        }
        let outputs = self.plan.run(inputs)?;
        Ok(outputs[0].to_plain_array_view::<f32>()?.iter().take(z.len()).copied().collect())
    }
}

fn plan(
    onnx: &tract_onnx::Onnx,
    model: &ModelProto,
    contract: &Contract,
) -> TractResult<Arc<TypedRunnableModel>> {
    let ([c, h, w], n) = (contract.shape(), contract.batch);
    let mut graph = onnx.model_for_proto_model(model)?;
    let mut names = vec![INPUT_Z];
    names.extend(contract.classes.is_some().then_some(INPUT_CLASS));
    graph.select_inputs_by_name(&names)?;
    graph.select_outputs_by_name([OUTPUT_X_GEN])?;
    graph.set_input_fact(0, f32::fact([n, c, h, w]).into())?;
    if contract.classes.is_some() {
        graph.set_input_fact(1, i64::fact([n]).into())?;
    }
    graph.into_optimized()?.into_runnable()
}
