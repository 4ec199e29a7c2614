//! `--device`: where tensors live, and candle's threads.

use candle_core::Device;

use crate::error::{Error, Result};
use crate::parallel::Team;

/// The device of `auto`, `cpu`, `cuda` or `cuda:N`; `auto` takes CUDA where the build and the machine have it.
pub fn parse(text: &str) -> Result<Device> {
    parse_for(text, &Team::alone())
}

/// The same for one of several ranks: unless a number is given, each takes another GPU of its host.
pub fn parse_for(text: &str, team: &Team) -> Result<Device> {
    match text {
        "cpu" => Ok(Device::Cpu),
        "auto" if !cfg!(feature = "cuda") => Ok(Device::Cpu),
        "auto" => Ok(Device::new_cuda(team.local_rank()).unwrap_or(Device::Cpu)),
        _ => match text.strip_prefix("cuda").map(|rest| rest.strip_prefix(':').unwrap_or(rest)) {
            Some(rest) => cuda(text, rest, team.local_rank()),
            None => Err(Error::Request(format!(
                "got `--device {text}`, expected `auto`, `cpu`, `cuda` or `cuda:N`"
            ))),
        },
    }
}

fn cuda(text: &str, number: &str, own: usize) -> Result<Device> {
    if !cfg!(feature = "cuda") {
        return Err(Error::Request(format!(
            "`--device {text}`: this build has no CUDA\n\nhint: build it with `cargo build --release -p dmd-distill \
             --features cuda` on a machine with the CUDA toolkit, or use `--device cpu`"
        )));
    }
    let index = match number {
        "" => own,
        number => number.parse().map_err(|_| {
            Error::Request(format!("got `--device {text}`, expected `cuda` or `cuda:N` with a number N"))
        })?,
    };
    Device::new_cuda(index).map_err(|e| {
        Error::Request(format!(
            "`--device {text}` cannot be used: {e}\n\nhint: `nvidia-smi` lists the GPUs and the driver"
        ))
    })
}

/// `cpu`, or `cuda:N`.
pub fn name(device: &Device) -> String {
    match device {
        Device::Cpu => format!("cpu, {} threads", rayon::current_num_threads()),
        other => format!("{:?}", other.location()),
    }
}

/// Keeps candle's own thread pool, whose threads spin, from taking the cores that rayon's work runs on. For the first
/// line of `main`, before any thread starts.
#[expect(unsafe_code, reason = "candle is told by a variable only, and no other thread can read it yet")]
pub fn quiet_candle_threads() {
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
}
