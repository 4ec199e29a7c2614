//! The candle operation that a whole network becomes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, bail};

use super::images::Images;
use super::ops::CpuOps;
use super::tape::{Tape, Value};
use crate::ops::Error;

type Result<T, E = Error> = std::result::Result<T, E>;

/// Where each parameter lies among the flattened values.
pub(super) type Places = BTreeMap<String, Range<usize>>;

/// Runs `network` on images `[n, c, h, w]` (vectors: `[n, c, 1, 1]`) with parameters by name; returns `[n, c', h', w']`.
///
/// Differentiable in every input and parameter that candle tracks.
pub fn apply(
    inputs: &[Tensor],
    parameters: &BTreeMap<String, Tensor>,
    network: impl FnOnce(&mut CpuOps, &[Value]) -> Result<Value> + Send + 'static,
) -> Result<Tensor> {
    let mut flat = Vec::with_capacity(inputs.len() + parameters.len());
    let (mut shapes, mut places, mut end) = (Vec::new(), Places::new(), 0);
    let mut push = |tensor: &Tensor| -> Result<Range<usize>> {
        flat.push(tensor.flatten_all()?);
        end += tensor.elem_count();
        Ok(end - tensor.elem_count()..end)
    };
    for input in inputs {
        let (n, c, h, w) = input.dims4()?;
        shapes.push(Input { shape: [n, c, h, w], place: push(input)?, track: input.track_op() });
    }
    for (name, tensor) in parameters {
        places.insert(name.clone(), push(tensor)?);
    }
    if flat.is_empty() {
        flat.push(Tensor::zeros(1, DType::F32, &Device::Cpu)?); // a candle operation has an argument
    }
    let train = parameters.values().any(Tensor::track_op);
    let pass = Pass {
        inputs: shapes,
        places,
        train,
        network: Mutex::new(Some(Box::new(network))),
        record: Mutex::new(None),
    };
    Ok(Tensor::cat(&flat, 0)?.apply_op1(pass)?)
}

/// One of a network's arguments.
pub(super) struct Input {
    pub(super) shape: [usize; 4],
    pub(super) place: Range<usize>,
    pub(super) track: bool,
}

type NetworkFn = Box<dyn FnOnce(&mut CpuOps, &[Value]) -> Result<Value> + Send>;

/// One forward pass as a candle operation on the flattened inputs and parameters.
struct Pass {
    inputs: Vec<Input>,
    places: Places,
    train: bool,
    network: Mutex<Option<NetworkFn>>,
    record: Mutex<Option<(Tape, Option<usize>)>>,
}

fn take<T>(place: &Mutex<Option<T>>) -> Option<T> {
    place.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Runs a whole pass on one of rayon's threads, which takes part in every parallel loop instead of being woken after it.
fn in_pool<T: Send>(pass: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| pass())
}

impl Pass {
    fn forward(&self, flat: &[f32], network: NetworkFn) -> candle_core::Result<(CpuStorage, Shape)> {
        let (places, train) = (&self.places, self.train);
        let mut ops = CpuOps { flat, places, train, tape: Tape::default(), statistics: None };
        let inputs: Vec<Value> = self.inputs.iter().map(|input| ops.input(input)).collect();
        let y = network(&mut ops, &inputs).map_err(candle_core::Error::wrap)?;
        let mut out = vec![0.0; y.images.n * y.images.c * y.images.h * y.images.w];
        y.images.to_nchw(&mut out);
        let shape = Shape::from((y.images.n, y.images.c, y.images.h, y.images.w));
        if self.train || self.inputs.iter().any(|input| input.track) {
            *self.record.lock().unwrap_or_else(PoisonError::into_inner) = Some((ops.tape, y.slot));
        }
        Ok((CpuStorage::F32(out), shape))
    }
}

impl CustomOp1 for Pass {
    fn name(&self) -> &'static str {
        "network"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("the values are not contiguous") };
        let flat = &storage.as_slice::<f32>()?[start..end];
        let Some(network) = take(&self.network) else { bail!("a pass runs once") };
        in_pool(|| self.forward(flat, network))
    }

    fn bwd(&self, flat: &Tensor, y: &Tensor, gradient: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let Some((tape, slot)) = take(&self.record) else { bail!("a pass is differentiated once") };
        let (n, c, h, w) = y.dims4()?;
        let gradient = Images::from_nchw(&gradient.flatten_all()?.to_vec1::<f32>()?, [n, c, h, w]);
        let (storage, layout) = flat.storage_and_layout();
        let (candle_core::Storage::Cpu(storage), Some((start, end))) =
            (&*storage, layout.contiguous_offsets())
        else {
            bail!("the values are not in the CPU's memory")
        };
        let values = &storage.as_slice::<f32>()?[start..end];
        let d_flat = in_pool(|| tape.backward(values, slot, gradient));
        Tensor::from_vec(d_flat, flat.shape(), flat.device()).map(Some)
    }
}
