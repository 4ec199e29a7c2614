//! Engines compiled into the program: no library to find. Each takes a fixed number of images per call, one where the
//! file allows it, which is faster than batches and independent of them; the threads of a pool call it at once.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rayon::prelude::*;

use crate::batch::Batch;
use crate::file::ModelFile;
use crate::generator::Options;
use crate::{Error, Result};

/// What such an engine does.
pub(crate) trait Network: Send + Sync {
    /// Evaluates the network for as many images as one call takes, on the calling thread or on all of its pool.
    fn run(&self, batch: &Batch, threads: Threads) -> Result<Vec<f32>>;

    /// Whether one call can use all threads.
    fn shares(&self) -> bool;
}

/// Which threads a call may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threads {
    /// The calling one.
    One,
    /// All of the pool.
    All,
}

/// An engine, how many images it takes, and the threads they are spread over.
pub(crate) struct Embedded {
    network: Box<dyn Network>,
    batch: usize,
    pool: rayon::ThreadPool,
}

impl Embedded {
    /// Loads a file by `open` on the threads that are asked for. `engine` is what messages call the engine.
    pub fn open<N: Network + 'static>(
        engine: &'static str,
        file: &ModelFile,
        options: &Options,
        open: impl FnOnce(&ModelFile, usize) -> Result<N> + Send,
    ) -> Result<Self> {
        if file.info.in_integers() {
            let problem = format!(
                "its activations are 8-bit integers, which {engine} does not compute as ONNX says\n\n\
                 hint: run it with onnxruntime (`--provider cpu`), or export the model with `--dtype int8`"
            );
            return Err(Error::File { name: file.info.name.clone(), problem });
        }
        let batch = file.info.batch.unwrap_or(1);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads())
            .build()
            .map_err(|e| Error::Request(format!("cannot start {} threads: {e}", options.threads())))?;
        let network = pool.install(|| open(file, batch))?;
        Ok(Self { network: Box::new(network), batch, pool })
    }

    /// Runs any number of images.
    pub fn run(&self, batch: &Batch) -> Result<Vec<f32>> {
        let starts = (0..batch.n).step_by(self.batch).collect();
        let parts = self.spread(starts, |start, threads| {
            batch.part(start, self.batch, &mut |part| self.network.run(part, threads))
        });
        Ok(parts?.concat())
    }

    /// Calls `part` with the number of the first image, the values of each call's images, and what runs a batch.
    pub fn for_each(
        &self,
        values: &mut [f32],
        image_len: usize,
        part: impl Fn(usize, &mut [f32], &mut dyn FnMut(&Batch) -> Result<Vec<f32>>) -> Result<()> + Sync,
    ) -> Result<()> {
        let parts = values.chunks_mut(self.batch * image_len).enumerate().collect();
        self.spread(parts, |(i, x), threads| {
            let mut run = |batch: &Batch| batch.in_parts(self.batch, |b| self.network.run(b, threads));
            part(i * self.batch, x, &mut run)
        })
        .map(drop)
    }

    /// Does as many tasks as there are threads side by side, each on one; what is left over, if that would leave most threads
    /// idle, in turn on all.
    fn spread<T: Send, R: Send>(
        &self,
        mut tasks: Vec<T>,
        work: impl Fn(T, Threads) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        let threads = self.pool.current_num_threads();
        let left = tasks.len() % threads;
        let last = if self.network.shares() && 2 * left <= threads { left } else { 0 };
        let last = tasks.split_off(tasks.len() - last);
        self.pool.install(|| {
            let done = tasks.into_par_iter().with_max_len(1).map(|task| work(task, Threads::One));
            let mut done = done.collect::<Result<Vec<R>>>()?;
            for task in last {
                done.push(work(task, Threads::All)?);
            }
            Ok(done)
        })
    }
}

/// Engines panic on some graphs that no exporter writes; that becomes an error like any other.
pub(crate) fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let words = panic.downcast_ref::<String>().map(String::as_str);
        let words = words.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
        Err(format!("it panicked: {words}"))
    })
}
