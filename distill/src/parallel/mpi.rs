//! The transport by MPI (crate `mpi`), over all ranks. One thread at a time may call.

use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, CommunicatorCollectives, Root};

use crate::error::{Error, Result};

/// MPI between its beginning and its end, which waits for all ranks.
pub struct Connection(#[expect(dead_code, reason = "dropping it ends MPI")] Universe);

/// Begins MPI; returns rank, number of ranks, and rank among those of this host.
pub fn connect() -> Result<(Connection, [usize; 3])> {
    // BatchNorm sums over ranks from a thread of rayon while the main thread waits.
    let (universe, threads) = mpi::initialize_with_threading(Threading::Serialized)
        .ok_or_else(|| Error::Request("MPI was begun already".to_owned()))?;
    if threads < Threading::Serialized {
        return Err(Error::Request(format!(
            "MPI provides threads of level {threads:?}, expected `Serialized`\n\nhint: use a build of MPI with support for threads"
        )));
    }
    let world = universe.world();
    let local = world.split_shared(world.rank()).rank();
    Ok((Connection(universe), [world.rank(), world.size(), local].map(|number| number as usize)))
}

/// Ends all ranks.
pub fn abort(code: i32) -> ! {
    world().abort(code)
}

/// Sums `from` over ranks into `to`.
pub fn sum(from: &[f32], to: &mut [f32]) {
    world().all_reduce_into(from, to, SystemOperation::sum());
}

/// Sums over ranks.
pub fn sum_numbers(values: &mut [f64]) {
    let own = values.to_vec();
    world().all_reduce_into(own.as_slice(), values, SystemOperation::sum());
}

/// The largest over ranks.
pub fn largest(values: &mut [f64]) {
    let own = values.to_vec();
    world().all_reduce_into(own.as_slice(), values, SystemOperation::max());
}

/// What rank 0 has.
pub fn broadcast(bytes: &mut Vec<u8>) {
    let world = world();
    let root = world.process_at_rank(0);
    let mut length = bytes.len() as u64;
    root.broadcast_into(&mut length);
    bytes.resize(length as usize, 0);
    root.broadcast_into(bytes.as_mut_slice());
}

fn world() -> SimpleCommunicator {
    SimpleCommunicator::world()
}
