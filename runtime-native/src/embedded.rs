//! Engines compiled into the program: no library to find. Each takes a fixed number of images per call, one where the
//! file allows it, which is faster than batches and independent of them; many threads call it at once.

use std::panic::{AssertUnwindSafe, catch_unwind};

use rayon::prelude::*;

use crate::batch::Batch;
use crate::file::ModelFile;
use crate::generator::Options;
use crate::{Error, Result};

/// What such an engine does.
pub(crate) trait Network: Send + Sync {
    /// Evaluates the network for as many images as one call takes.
    fn run(&self, batch: &Batch) -> Result<Vec<f32>>;
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

    /// Runs any number of images, in parallel.
    pub fn run(&self, batch: &Batch) -> Result<Vec<f32>> {
        self.pool.install(|| batch.in_parallel_parts(self.batch, |part| self.network.run(part)))
    }

    /// Calls `part` with the number of the first image and the values of each call's images, in parallel.
    pub fn for_each(
        &self,
        values: &mut [f32],
        image_len: usize,
        part: impl Fn(usize, &mut [f32]) -> Result<()> + Sync,
    ) -> Result<()> {
        self.pool.install(|| {
            let parts = values.par_chunks_mut(self.batch * image_len).with_max_len(1).enumerate();
            parts.try_for_each(|(i, x)| part(i * self.batch, x))
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
