//! The command lines of single stages: pairs and samples.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use dmd_core::sampler::Sampler;

use crate::error::Result;
use crate::share::Share;

/// A sampler by its name.
pub(super) fn sampler() -> impl TypedValueParser<Value = Sampler> {
    PossibleValuesParser::new(Sampler::NAMES).try_map(|name| name.parse::<Sampler>())
}

/// A pre-computation of pairs.
#[derive(Clone, Debug, Args)]
pub struct PairsArgs {
    /// Base: anything that `dmd-distill --base` takes
    #[arg(long, value_name = "NAME|DIR|FILE|ORG/REPO")]
    pub base: String,
    /// Number of pairs
    #[arg(long, value_name = "N")]
    pub count: usize,
    /// Steps per pair
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub steps: usize,
    /// Sampler
    #[arg(long, value_name = "NAME", default_value = "ddim", value_parser = sampler())]
    pub sampler: Sampler,
    /// Classifier-free guidance; 1 is none
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub guidance: f64,
    /// Seed of the run that will use the pairs; their noise comes from this seed with the top bit flipped
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u32,
    /// Compute only the share I (from 0) of N, for N processes that fill one folder together [default: in an array of jobs of
    /// Slurm the share of the process, else all]
    #[arg(long, value_name = "I/N")]
    pub shard: Option<Share>,
    /// Compute nothing, list what is missing of the pairs or there twice; exit code 1 if there is any such
    #[arg(long, conflicts_with = "shard")]
    pub check: bool,
    /// Folder of the pairs [default: pairs/ and a name made of base, sampler and seed]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Where to compute
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto")]
    pub device: String,
}

impl PairsArgs {
    /// The share to compute; says so where it is not an option that does.
    pub fn share(&self) -> Result<Share> {
        if let Some(share) = self.shard {
            return Ok(share);
        }
        let Some((share, variable)) = Share::of_job(|name| std::env::var(name).ok())? else {
            return Ok(Share::ALL);
        };
        dmd_cli::say!("share {}/{}, by {variable}", share.index, share.of);
        Ok(share)
    }
}

/// A grid of samples.
#[derive(Clone, Debug, Args)]
pub struct SampleArgs {
    /// Checkpoint folder, run folder, or anything that `dmd-distill --base` takes
    #[arg(value_name = "DIR|NAME|FILE|ORG/REPO")]
    pub model: String,
    /// Steps: 1 for a generator, more for a base [default: 1 or 50]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Sampler of a base: ddim, ddpm (ancestral) or heun (two network evaluations per step)
    #[arg(long, value_name = "NAME", default_value = "ddim", value_parser = sampler())]
    pub sampler: Sampler,
    /// Classifier-free guidance of a base; 1 is none
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub guidance: f64,
    /// Images
    #[arg(long, value_name = "N", default_value_t = 40)]
    pub count: usize,
    /// Seed of the noise
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u32,
    /// PNG file to write
    #[arg(short, long, value_name = "FILE", default_value = "grid.png")]
    pub output: PathBuf,
    /// Replace an existing file
    #[arg(long)]
    pub force: bool,
    /// Where to compute
    #[arg(long, value_name = "auto|cpu|cuda[:N]", default_value = "auto")]
    pub device: String,
}
