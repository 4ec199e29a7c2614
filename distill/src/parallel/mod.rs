//! Data-parallel training: the processes ("ranks") that a launcher of MPI started share every batch. Each computes the
//! gradients of its images, which are averaged; weights, moments and averages are then the same everywhere, and only the
//! order of sums depends on the number of ranks. Launcher and transport are those of clusters: MPI, and NCCL between GPUs.
//! With one rank nothing here changes a number.

mod launcher;
#[cfg(feature = "nccl")]
mod nccl;
mod profile;
#[cfg(feature = "mpi")]
#[path = "mpi.rs"]
mod transport;
#[cfg(not(feature = "mpi"))]
#[path = "single.rs"]
mod transport;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use self::launcher::{Session, Use, start};
use self::profile::Meter;
use crate::error::{Error, Result};

/// Gradients that are sent together, in values: large enough for full bandwidth, small enough to be copied in cache.
const BUCKET: usize = 1 << 20;

/// The ranks of a training, seen from one of them. Every method that communicates must be called by all ranks in the same
/// order.
#[derive(Clone)]
pub struct Team {
    rank: usize,
    size: usize,
    local_rank: usize,
    meter: Arc<Mutex<Meter>>,
    /// Whether gradients are summed between GPUs.
    #[cfg(feature = "nccl")]
    gpus: bool,
}

impl Team {
    /// One process, which needs nobody.
    pub fn alone() -> Self {
        Self::new(0, 1, 0)
    }

    fn new(rank: usize, size: usize, local_rank: usize) -> Self {
        Self {
            rank,
            size,
            local_rank,
            meter: Arc::default(),
            #[cfg(feature = "nccl")]
            gpus: false,
        }
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.size
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// This rank among those of its host, from 0: which GPU is its own.
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// Whether this rank writes files, judges samples and talks to the user.
    pub fn leads(&self) -> bool {
        self.rank == 0
    }

    /// The images of a batch of `count` that are this rank's: contiguous, as equal as can be, the first ranks have the rest.
    pub fn share(&self, count: usize) -> Range<usize> {
        let (each, rest) = (count / self.size, count % self.size);
        let start = self.rank * each + self.rank.min(rest);
        start..start + each + usize::from(self.rank < rest)
    }

    /// The share of a batch's mean that this rank's images are.
    pub fn weight(&self, count: usize) -> f64 {
        self.share(count).len() as f64 / count as f64
    }

    /// Refuses a batch of fewer images than ranks.
    pub fn check_batch(&self, batch: usize) -> Result<()> {
        if batch >= self.size {
            return Ok(());
        }
        Err(Error::Request(format!(
            "got `--batch {batch}`, expected at least {0}: each of the {0} ranks needs an image\n\nhint: start fewer ranks, or \
             take a larger batch",
            self.size
        )))
    }

    /// NCCL between the GPUs of all ranks, where this build has it; gradients go through the CPUs' memory otherwise.
    ///
    /// # Errors
    /// If some ranks have a GPU and others none.
    pub fn connect(self, device: &Device) -> Result<Self> {
        let [some, others] = [device.is_cuda(), !device.is_cuda()].map(|has| self.any(has));
        if some && others {
            return Err(Error::Request(
                "some ranks have a GPU and others have none\n\nhint: start as many ranks on each host as it has GPUs, or give \
                 `--device cpu`"
                    .into(),
            ));
        }
        #[cfg(feature = "nccl")]
        if self.size > 1 && some {
            nccl::connect(&self, device)?;
            return Ok(Self { gpus: true, ..self });
        }
        Ok(self)
    }

    /// Replaces gradients of this rank's images by those of the whole batch: the sum over ranks of each one's, times `weight`.
    ///
    /// # Errors
    /// If a variable has no gradient.
    pub fn average(&self, gradients: &mut GradStore, variables: &[(String, Var)], weight: f64) -> Result<()> {
        if self.size == 1 {
            return Ok(());
        }
        let mut rest = variables;
        while !rest.is_empty() {
            let mut values = 0;
            let fits = |(_, var): &&(String, Var)| {
                values += var.elem_count();
                values <= BUCKET
            };
            let (bucket, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
            rest = later;
            let mut parts = Vec::with_capacity(bucket.len());
            for (name, var) in bucket {
                let gradient = gradients
                    .get(var)
                    .ok_or_else(|| Error::Diverged(format!("parameter `{name}` got no gradient")))?;
                parts.push(gradient.flatten_all()?);
            }
            let averaged = self.reduce(&parts, weight)?;
            let mut start = 0;
            for (_, var) in bucket {
                let count = var.elem_count();
                gradients.insert(var, averaged.narrow(0, start, count)?.reshape(var.shape())?);
                start += count;
            }
        }
        Ok(())
    }

    /// The sum over ranks of a bucket, times `weight`.
    fn reduce(&self, parts: &[Tensor], weight: f64) -> Result<Tensor> {
        #[cfg(feature = "nccl")]
        if self.gpus {
            let bucket = Tensor::cat(parts, 0)?.affine(weight, 0.0)?;
            self.metered(bucket.elem_count(), || {
                nccl::sum(&bucket)?;
                Ok(bucket.device().synchronize()?)
            })?;
            return Ok(bucket);
        }
        let mut bucket = Vec::with_capacity(parts.iter().map(Tensor::elem_count).sum());
        for part in parts {
            bucket.extend(part.to_vec1::<f32>()?.iter().map(|value| value * weight as f32));
        }
        let mut sum = vec![0.0; bucket.len()];
        self.metered(bucket.len(), || {
            transport::sum(&bucket, &mut sum);
            Ok(())
        })?;
        Ok(Tensor::from_vec(sum, bucket.len(), parts[0].device())?)
    }

    /// The sum over ranks of every value.
    pub fn sum(&self, values: &mut [f64]) {
        self.waiting(|| transport::sum_numbers(values));
    }

    /// The largest over ranks of every value.
    fn largest(&self, values: &mut [f64]) {
        self.waiting(|| transport::largest(values));
    }

    /// Whether it holds for any rank.
    pub fn any(&self, holds: bool) -> bool {
        let mut value = [f64::from(u8::from(holds))];
        self.largest(&mut value);
        value[0] > 0.0
    }

    /// What the leader has found, for all; the others come with nothing.
    pub fn from_leader<T: Serialize + DeserializeOwned>(&self, found: Option<T>) -> Result<T> {
        let problem =
            |e: serde_json::Error| Error::Request(format!("ranks do not understand each other: {e}"));
        let mut text = Vec::new();
        if let Some(found) = found {
            if self.size == 1 {
                return Ok(found);
            }
            text = serde_json::to_vec(&found).map_err(problem)?;
        }
        self.waiting(|| transport::broadcast(&mut text));
        serde_json::from_slice(&text).map_err(problem)
    }

    /// Refuses to go on with ranks whose weights are not the same to the bit.
    pub fn check_equal<'a>(&self, weights: impl Iterator<Item = &'a Tensor>) -> Result<()> {
        if self.size == 1 {
            return Ok(());
        }
        let mut hash = 0xcbf2_9ce4_8422_2325u64;
        for tensor in weights {
            for value in tensor.flatten_all()?.to_vec1::<f32>()? {
                hash = (hash ^ u64::from(value.to_bits())).wrapping_mul(0x0100_0000_01b3); // FNV-1a by words
            }
        }
        let [high, low] = [hash >> 32, hash & 0xffff_ffff].map(|half| half as f64);
        let mut extremes = [high, low, -high, -low];
        self.largest(&mut extremes);
        if extremes[0] == -extremes[2] && extremes[1] == -extremes[3] {
            return Ok(());
        }
        Err(Error::Diverged(
            "the ranks' weights differ, expected the same to the bit\n\nhint: all hosts must run the same program on the same kind of \
             processor; continue with `--resume`"
                .to_owned(),
        ))
    }

    fn meter<T>(&self, change: impl FnOnce(&mut Meter) -> T) -> T {
        change(&mut self.meter.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn metered<T>(&self, values: usize, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let started = Instant::now();
        let done = work()?;
        self.meter(|meter| meter.sent(4 * values as u64, started.elapsed()));
        Ok(done)
    }

    fn waiting(&self, work: impl FnOnce()) {
        if self.size == 1 {
            return;
        }
        let started = Instant::now();
        work();
        self.meter(|meter| meter.waited(started.elapsed()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_the_whole_batch_in_order() {
        for (count, size) in [(4, 1), (4, 2), (4, 3), (5, 3), (3, 3), (64, 7)] {
            let teams: Vec<Team> = (0..size).map(|rank| Team::new(rank, size, 0)).collect();
            let all: Vec<usize> = teams.iter().flat_map(|team| team.share(count)).collect();
            assert_eq!(all, (0..count).collect::<Vec<_>>(), "{count} by {size}");
            let sizes: Vec<usize> = teams.iter().map(|team| team.share(count).len()).collect();
            assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{sizes:?}");
            let weight: f64 = teams.iter().map(|team| team.weight(count)).sum();
            assert!((weight - 1.0).abs() < 1e-12, "{weight}");
        }
        assert!(Team::new(0, 3, 0).check_batch(2).unwrap_err().to_string().contains("at least 3"));
    }
}
