//! Which processes belong together: what launchers of MPI tell the processes they start, and the beginning and end of MPI.
//! Without a launcher MPI is not begun at all.

use super::Team;
#[cfg(feature = "mpi")]
use super::transport;
use crate::error::{Error, Result};

/// How many processes were started together, as Open MPI, MPICH (and its like) and Slurm's `srun` say it.
const SIZES: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"];

/// What a command does with several processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// They share its work.
    Together,
    /// Each was told its own share of the work, and needs no other.
    Apart,
    /// It is for one process.
    Alone,
}

/// The program's part in a team, until its end.
pub struct Session {
    /// The ranks.
    pub team: Team,
    #[cfg(feature = "mpi")]
    connection: Option<transport::Connection>,
}

/// Joins the processes that were started together with this one, if there are any and the command can use them.
pub fn start(command: Use) -> Result<Session> {
    let started = announced(|name| std::env::var(name).ok());
    match (started, command) {
        (None, _) | (_, Use::Apart) => Ok(Session::alone()),
        (Some((name, ranks)), Use::Alone) => Err(Error::Request(format!(
            "got {ranks} processes by {name}, expected one: this command works alone\n\nhint: start it without a launcher; \
             training, `pairs` and `eval --shard I/N` can be shared"
        ))),
        (Some((name, ranks)), Use::Together) => join(name, ranks),
    }
}

/// More than one process, and the variable that says so.
fn announced(variable: impl Fn(&str) -> Option<String>) -> Option<(&'static str, usize)> {
    let size = |name: &'static str| Some((name, variable(name)?.parse::<usize>().ok()?));
    SIZES.into_iter().find_map(size).filter(|(_, ranks)| *ranks > 1)
}

#[cfg(feature = "mpi")]
fn join(name: &str, ranks: usize) -> Result<Session> {
    let (connection, [rank, size, local_rank]) = transport::connect()?;
    if size != ranks {
        return Err(Error::Request(format!(
            "got {size} from MPI as the number of ranks, expected {ranks} by {name}\n\nhint: start with the `mpirun` of the MPI that this program is linked \
             to, or with `srun --mpi=pmix`"
        )));
    }
    if rank > 0 {
        crate::progress::be_quiet();
    }
    Ok(Session { team: Team::new(rank, size, local_rank), connection: Some(connection) })
}

#[cfg(not(feature = "mpi"))]
fn join(name: &str, ranks: usize) -> Result<Session> {
    Err(Error::Request(format!(
        "got {ranks} processes by {name}, expected one: this build has no MPI\n\nhint: build it with `cargo build --release -p dmd-distill \
         --features mpi` (docs/scale.md), or start one process"
    )))
}

impl Session {
    fn alone() -> Self {
        Self {
            team: Team::alone(),
            #[cfg(feature = "mpi")]
            connection: None,
        }
    }

    /// Says what went wrong and returns the exit code. Of several ranks, the first to fail ends all; an interruption, which
    /// all have agreed on, is an orderly end.
    pub fn fail(&self, error: &Error) -> u8 {
        let interrupted = matches!(error, Error::Interrupted(_));
        if self.team.leads() {
            dmd_cli::say!("error: {error}");
        } else if !interrupted {
            // What stops every rank alike, the leader says; it ends the others first.
            std::thread::sleep(std::time::Duration::from_secs(2));
            dmd_cli::say!("error: rank {}: {error}", self.team.rank());
        }
        #[cfg(feature = "mpi")]
        if self.team.size() > 1 && !interrupted {
            transport::abort(2);
        }
        if interrupted { 130 } else { 2 }
    }
}

#[cfg(feature = "mpi")]
impl Drop for Session {
    fn drop(&mut self) {
        // The end of MPI waits for the other ranks, which may wait for this one.
        if std::thread::panicking() && self.connection.is_some() {
            transport::abort(101);
        }
        #[cfg(feature = "nccl")]
        super::nccl::disconnect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launchers_say_how_many_they_started() {
        let with = |set: &'static [(&str, &str)]| {
            announced(|name| set.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
        };
        assert_eq!(with(&[]), None);
        assert_eq!(with(&[("OMPI_COMM_WORLD_SIZE", "1")]), None);
        assert_eq!(with(&[("PMI_SIZE", "3")]), Some(("PMI_SIZE", 3)));
        // Slurm starts one daemon per host, and those the ranks.
        let both = with(&[("SLURM_STEP_NUM_TASKS", "2"), ("OMPI_COMM_WORLD_SIZE", "8")]);
        assert_eq!(both, Some(("OMPI_COMM_WORLD_SIZE", 8)));
        assert_eq!(with(&[("OMPI_COMM_WORLD_SIZE", "1"), ("SLURM_STEP_NUM_TASKS", "2")]), None);
    }
}
