//! tract as an engine: compiled in, no library to find. Where the file allows it, its plan takes one image at a time,
//! which is both faster than its batches and independent of them; plans run in parallel on the threads asked for.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use tract_onnx::prelude::*;
use tract_onnx::tract_core::optim::Optimizer;

use crate::batch::Batch;
use crate::file::{ModelFile, Role};
use crate::generator::Options;
use crate::{Error, Result, memory};

/// Names of the passes that [`declutter`] leaves out.
const NOT_NEEDED: [&str; 4] = ["ChangeAxes", "PropagateUniformTdim", "PropagateRoi", "FoldUniformMask"];

/// A plan for one image, or for as many as the file fixes.
pub(crate) struct Tract {
    plan: Arc<TypedRunnableModel>,
    name: String,
    roles: Vec<Option<Role>>,
    output: usize,
    image: [usize; 3],
    batch: usize,
    pool: rayon::ThreadPool,
}

impl Tract {
    /// Optimises a model for its number of images per call.
    pub fn open(file: &ModelFile, options: &Options) -> Result<Self> {
        let info = &file.info;
        if info.in_integers() {
            let problem = "its activations are 8-bit integers, which tract rounds otherwise than ONNX says\n\n\
                           hint: run it with onnxruntime (`--provider cpu`), or export the model with `--dtype int8`";
            return Err(Error::File { name: info.name.clone(), problem: problem.to_owned() });
        }
        let mut nodes = file.proto.graph.iter().flat_map(|graph| &graph.node);
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
        let ([c, h, w], batch) = (info.image_shape(), info.batch.unwrap_or(1));
        let roles: Vec<Option<Role>> = info.inputs.iter().map(|p| p.role).collect();
        let build = || -> TractResult<Arc<TypedRunnableModel>> {
            let onnx = tract_onnx::onnx().with_ignore_value_info(true);
            let mut model = onnx.model_for_proto_model(&file.proto)?;
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
        let plan = guarded(build).map_err(|e| engine_error(&info.name, &e))?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads())
            .build()
            .map_err(|e| Error::Request(format!("cannot start {} threads: {e}", options.threads())))?;
        let image = info.image_shape();
        Ok(Self { plan, name: info.name.clone(), roles, output: info.output, image, batch, pool })
    }

    /// The threads that images are spread over.
    pub fn pool(&self) -> &rayon::ThreadPool {
        &self.pool
    }

    /// Runs any number of images, in parallel.
    pub fn run(&self, batch: &Batch) -> Result<Vec<f32>> {
        let run = |part: &Batch| guarded(|| self.evaluate(part)).map_err(|e| engine_error(&self.name, &e));
        self.pool.install(|| batch.in_parallel_parts(self.batch, run))
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

/// tract panics on some graphs that no exporter writes; that becomes an error like any other.
fn guarded<T>(work: impl FnOnce() -> TractResult<T>) -> TractResult<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str);
        let words = words.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
        Err(TractError::msg(format!("it panicked: {words}")))
    })
}

fn engine_error(name: &str, error: &TractError) -> Error {
    Error::Engine { engine: "tract", name: name.to_owned(), message: format!("{error:#}") }
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
