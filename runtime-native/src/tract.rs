//! tract as an engine: ONNX's other operators too, for files that `dmd-export` did not write.

use std::sync::Arc;

use prost::Message;
use tract_linalg::multithread::{Executor, multithread_tract_scope};
use tract_onnx::pb::ModelProto;
use tract_onnx::prelude::*;
use tract_onnx::tract_core::optim::Optimizer;

use crate::batch::Batch;
use crate::embedded::{self, Threads, guarded};
use crate::file::{ModelFile, Role};
use crate::{Error, Result, memory};

/// What messages call it.
pub(crate) const NAME: &str = "tract";

/// Names of the passes that [`declutter`] leaves out.
const NOT_NEEDED: [&str; 4] = ["ChangeAxes", "PropagateUniformTdim", "PropagateRoi", "FoldUniformMask"];

/// A plan for as many images as one call takes.
pub(crate) struct Tract {
    plan: Arc<TypedRunnableModel>,
    name: String,
    roles: Vec<Option<Role>>,
    output: usize,
    image: [usize; 3],
}

impl Tract {
    /// Optimises a model for `batch` images.
    pub fn open(file: &ModelFile, batch: usize) -> Result<Self> {
        let info = &file.info;
        let mut nodes = file.model.graph.iter().flat_map(|graph| &graph.node);
        if let Some(node) =
            nodes.find(|node| node.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty()))
        {
            let problem = format!(
                "its operator {} holds a graph, whose memory cannot be told before tract runs it\n\nhint: run it with \
                 onnxruntime (`--provider cpu`)",
                node.op_type
            );
            return Err(Error::File { name: info.name.clone(), problem });
        }
        let [c, h, w] = info.image_shape();
        let roles: Vec<Option<Role>> = info.inputs.iter().map(|p| p.role).collect();
        let build = || -> TractResult<Arc<TypedRunnableModel>> {
            let onnx = tract_onnx::onnx().with_ignore_value_info(true);
            let mut model = onnx.model_for_proto_model(&messages(file)?)?;
            for (i, role) in roles.iter().enumerate() {
                let fact = match role {
                    Some(Role::Image) => f32::fact([batch, c, h, w]),
                    Some(Role::Class) => i64::fact([batch]),
                    _ => f32::fact([batch]),
                };
                model.set_input_fact(i, fact.into())?;
            }
            memory::check(&mut model)?;
            let mut model = model.into_typed()?;
            declutter().optimize(&mut model)?;
            model.optimize()?;
            model.into_runnable()
        };
        let plan = guarded(|| build().map_err(in_full)).map_err(|e| failed(&info.name, e))?;
        Ok(Self { plan, name: info.name.clone(), roles, output: info.output, image: info.image_shape() })
    }

    fn evaluate(&self, batch: &Batch) -> TractResult<Vec<f32>> {
        let [c, h, w] = self.image;
        let inputs = self
            .roles
            .iter()
            .map(|role| {
                Ok(match role {
                    Some(Role::Image) => Tensor::from_shape(&[batch.n, c, h, w], batch.x)?,
                    Some(Role::Class) => Tensor::from_shape(&[batch.n], batch.class)?,
                    _ => Tensor::from_shape(&[batch.n], batch.t)?,
                }
                .into())
            })
            .collect::<TractResult<TVec<TValue>>>()?;
        let outputs = self.plan.run(inputs)?;
        Ok(outputs[self.output].to_plain_array_view::<f32>()?.iter().copied().collect())
    }
}

impl embedded::Network for Tract {
    fn shares(&self) -> bool {
        true
    }

    fn run(&self, batch: &Batch, threads: Threads) -> Result<Vec<f32>> {
        let executor = match threads {
            Threads::One => Executor::SingleThread,
            Threads::All => Executor::RayonGlobal, // the pool that this thread is of
        };
        let evaluate = || multithread_tract_scope(executor, || self.evaluate(batch));
        guarded(|| evaluate().map_err(in_full)).map_err(|e| failed(&self.name, e))
    }
}

/// The file in tract's own messages, with the values that lie in other files.
fn messages(file: &ModelFile) -> TractResult<ModelProto> {
    let mut proto = ModelProto::decode(&*file.bytes)?;
    if file.outside.is_some() {
        let weights = file.model.graph.iter().flat_map(|graph| &graph.initializer);
        for (own, read) in proto.graph.iter_mut().flat_map(|graph| &mut graph.initializer).zip(weights) {
            own.raw_data = read.raw_data.to_vec();
            own.external_data.clear();
            own.data_location = None;
        }
    }
    Ok(proto)
}

/// tract's simplifications without those that find nothing to do in a denoiser, but take half of the time: moving
/// axes (its image layout stays as it is), masks and regions of interest of transformers. Plans are as fast, and
/// compute the same to the bit.
fn declutter() -> Optimizer {
    let mut optimizer = Optimizer::declutter();
    optimizer.passes.retain(|pass| {
        let name = format!("{pass:?}");
        !NOT_NEEDED.iter().any(|unneeded| name.starts_with(unneeded))
    });
    optimizer
}

fn in_full(error: TractError) -> String {
    format!("{error:#}")
}

fn failed(name: &str, message: String) -> Error {
    Error::Engine { engine: NAME, name: name.to_owned(), message }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tract_still_has_the_passes_that_are_left_out() {
        let all = Optimizer::declutter().passes.len();
        assert_eq!(declutter().passes.len(), all - NOT_NEEDED.len());
    }
}
