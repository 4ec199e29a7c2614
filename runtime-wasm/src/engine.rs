//! What runs a graph: the project's engine, or tract, for operators that the engine does not have, in a build with all of ONNX's
//! (feature `all-operators`).

use std::cell::RefCell;

use bytes::Bytes;
use dmd_engine::message::Model;
use dmd_engine::{Input, Network, Workspace};

#[cfg(feature = "all-operators")]
use crate::all_operators::Plan;
use crate::{Error, Result};

/// A graph, ready to run.
pub enum Engine {
    /// The project's engine.
    Own(Network, RefCell<Workspace>),
    /// tract.
    #[cfg(feature = "all-operators")]
    Tract(Plan),
}

impl Engine {
    /// Prepares the graph for inputs of these shapes, for an output of the shape of the first of them.
    ///
    /// # Errors
    /// An operator, or a form of one, that no engine of this build has.
    pub fn build(model: Model, file: Bytes, inputs: &[Input], output: &str) -> Result<Self> {
        let own = Self::own(model, inputs, output);
        #[cfg(feature = "all-operators")]
        return own.or_else(|_| Ok(Self::Tract(Plan::build(&file, inputs, output)?)));
        #[cfg(not(feature = "all-operators"))]
        {
            drop(file);
            own
        }
    }

    fn own(model: Model, inputs: &[Input], output: &str) -> Result<Self> {
        let network = Network::build(model, inputs, &[output]).map_err(|e| Error::Graph(e.to_string()))?;
        let (got, expected) = (network.output_shapes().next(), inputs[0].shape);
        if got != Some(expected) {
            return Err(Error::Graph(format!("`{output}` has shape {got:?}, expected {expected:?}")));
        }
        let workspace = RefCell::new(network.workspace());
        Ok(Self::Own(network, workspace))
    }

    /// Its name, for `info`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Own(..) => "dmd-engine",
            #[cfg(feature = "all-operators")]
            Self::Tract(_) => "tract",
        }
    }

    /// The first `len` values of the output.
    ///
    /// # Errors
    /// A graph that fails while it runs.
    pub fn run(&self, inputs: &[&[f32]], len: usize) -> Result<Vec<f32>> {
        match self {
            Self::Own(network, workspace) => {
                let mut workspace = workspace.borrow_mut();
                let outputs = network.run(&mut workspace, inputs).map_err(|e| Error::Run(e.to_string()))?;
                Ok(outputs[0][..len].to_vec())
            }
            #[cfg(feature = "all-operators")]
            Self::Tract(plan) => plan.run(inputs, len),
        }
    }
}
