//! Sums between the GPUs of ranks, by NCCL. One GPU per rank; MPI carries the identity of the group. The group belongs to the
//! thread that connected it, which is the one that trains.

use std::cell::RefCell;

use candle_core::cuda_backend::cudarc::nccl::result::NcclError;
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp};
use candle_core::{CpuStorage, CudaStorage, Device, InplaceOp1, Layout, Tensor, bail};

use super::Team;
use crate::error::{Error, Result};

thread_local! {
    static GROUP: RefCell<Option<Comm>> = const { RefCell::new(None) };
}

/// Joins the GPUs of all ranks.
pub fn connect(team: &Team, device: &Device) -> Result<()> {
    let id = if team.leads() { Some(Id::new().map_err(problem)?.internal().to_vec()) } else { None };
    let id: Vec<std::ffi::c_char> = team.from_leader(id)?;
    let Ok(id) = id.try_into() else {
        return Err(Error::Request(
            "the identity of the group of GPUs has another size on rank 0".to_owned(),
        ));
    };
    let stream = device.as_cuda_device()?.cuda_stream();
    let group = Comm::from_rank(stream, team.rank(), team.size(), Id::uninit(id)).map_err(problem)?;
    GROUP.set(Some(group));
    Ok(())
}

/// Leaves the group.
pub fn disconnect() {
    GROUP.set(None);
}

/// Replaces a contiguous tensor of f32 by its sum over ranks.
pub fn sum(bucket: &Tensor) -> Result<()> {
    Ok(bucket.inplace_op1(&Sum)?)
}

fn problem(error: NcclError) -> Error {
    Error::Request(format!(
        "NCCL failed: {error:?}\n\nhint: every rank needs a GPU of its own (`nvidia-smi`); NCCL_DEBUG=INFO says more"
    ))
}

struct Sum;

impl InplaceOp1 for Sum {
    fn name(&self) -> &'static str {
        "sum over ranks"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> candle_core::Result<()> {
        bail!("NCCL sums on GPUs only")
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        let slice = storage.as_cuda_slice_mut::<f32>()?;
        if layout.contiguous_offsets() != Some((0, slice.len())) {
            bail!("the gradients are not contiguous");
        }
        GROUP.with_borrow(|group| {
            let Some(group) = group else { bail!("this thread has joined no group of GPUs") };
            match group.all_reduce_in_place(slice, &ReduceOp::Sum) {
                Ok(_) => Ok(()),
                Err(error) => bail!("NCCL failed: {error:?}"),
            }
        })
    }
}
