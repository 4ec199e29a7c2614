//! `dmd-engine` as an engine: the operators that `dmd-export` writes, the same code as in browsers.

use std::sync::{Mutex, PoisonError};

use dmd_engine::{Input, Network, Workspace};

use crate::batch::Batch;
use crate::embedded::{self, Threads, guarded};
use crate::file::{ModelFile, Role};
use crate::{Error, Result};

/// What messages call it.
pub(crate) const NAME: &str = "dmd-engine";

/// Multiply-adds of a call below which threads do not share it. The bundled network (63 million, 4.5 ms) was no faster on two threads;
/// one of 3 million parameters (several times as many) was. Nothing between them was tried.
const WORTH_SHARING: u64 = 100_000_000;

/// A network for as many images as one call takes.
pub(crate) struct Own {
    network: Network,
    /// Memory of the threads that are not running now.
    workspaces: Mutex<Vec<Workspace>>,
    name: String,
    roles: Vec<Option<Role>>,
    shares: bool,
}

impl Own {
    /// Builds the network for `batch` images.
    pub fn open(file: &ModelFile, batch: usize) -> Result<Self> {
        let info = &file.info;
        let [c, h, w] = info.image_shape();
        let (image, each) = ([batch, c, h, w], [batch]);
        let inputs = info.inputs.iter().map(|port| Input {
            name: &port.name,
            shape: if port.role == Some(Role::Image) { &image } else { &each },
        });
        let inputs: Vec<Input> = inputs.collect();
        let output = info.outputs[info.output].name.as_str();
        let build = || Network::build(file.model.clone(), &inputs, &[output]).map_err(|e| e.to_string());
        let network = guarded(build).map_err(|e| failed(&info.name, e))?;
        if network.output_shapes().next() != Some(&image[..]) {
            let got: Vec<_> = network.output_shapes().collect();
            let problem = format!("`{output}` has shape {got:?}, expected {image:?}");
            return Err(Error::File { name: info.name.clone(), problem });
        }
        let roles = info.inputs.iter().map(|port| port.role).collect();
        let macs = info.card.as_ref().map_or(WORTH_SHARING, |card| card.macs);
        let shares = macs.saturating_mul(batch as u64) >= WORTH_SHARING;
        Ok(Self { network, workspaces: Mutex::default(), name: info.name.clone(), roles, shares })
    }
}

impl embedded::Network for Own {
    fn shares(&self) -> bool {
        self.shares
    }

    fn run(&self, batch: &Batch, threads: Threads) -> Result<Vec<f32>> {
        let class: Vec<f32> = batch.class.iter().map(|class| *class as f32).collect();
        let inputs: Vec<&[f32]> = self
            .roles
            .iter()
            .map(|role| match role {
                Some(Role::Image) => batch.x,
                Some(Role::Class) => &class,
                _ => batch.t,
            })
            .collect();
        let waiting = || self.workspaces.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = waiting().pop();
        let mut workspace = idle.unwrap_or_else(|| self.network.workspace());
        let run = || {
            let outputs = match threads {
                Threads::One => self.network.run_alone(&mut workspace, &inputs),
                Threads::All => self.network.run(&mut workspace, &inputs),
            };
            Ok(outputs.map_err(|e| e.to_string())?[0].to_vec())
        };
        let output = guarded(run).map_err(|e| failed(&self.name, e))?;
        waiting().push(workspace);
        Ok(output)
    }
}

fn failed(name: &str, message: String) -> Error {
    Error::Engine { engine: NAME, name: name.to_owned(), message }
}
