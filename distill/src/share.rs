//! Shares of work that needs no communication: `--shard I/N`, and what arrays of jobs tell their processes.

use std::str::FromStr;

use crate::error::{Error, Result};

/// A share of numbered pieces of work, for several processes: those whose number leaves the rest `index` divided by `of`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// From 0.
    pub index: usize,
    /// Number of shares.
    pub of: usize,
}

impl Share {
    /// All of it.
    pub const ALL: Self = Self { index: 0, of: 1 };

    /// The share that an array of jobs means by the environment variables it sets, and the one with the number of the process;
    /// none where there is no such array.
    ///
    /// # Errors
    /// If the variables do not say which share of how many it is.
    pub fn of_job(variable: impl Fn(&str) -> Option<String>) -> Result<Option<(Self, &'static str)>> {
        const SLURM: &str = "SLURM_ARRAY_TASK_ID";
        const KUBERNETES: &str = "JOB_COMPLETION_INDEX";
        let number = |name: &str| variable(name).and_then(|value| value.parse::<usize>().ok());
        let unclear = |name: &str, what: &str| {
            Err(Error::Request(format!(
                "{name} is set, but {what}\n\nhint: say which share of how many this process has: `--shard I/N` with I from 0 to N - 1 \
                 (0/1 is all)"
            )))
        };
        if variable(SLURM).is_some() {
            let numbers =
                ["ID", "MIN", "MAX", "STEP", "COUNT"].map(|part| number(&format!("SLURM_ARRAY_TASK_{part}")));
            let [Some(id), Some(min), Some(max), Some(step), Some(of)] = numbers else {
                return unclear(SLURM, "not SLURM_ARRAY_TASK_MIN, _MAX, _STEP and _COUNT");
            };
            let regular = step > 0 && min <= id && id <= max && (max - min) / step + 1 == of;
            return match regular && (id - min).is_multiple_of(step) {
                true => Ok(Some((Self { index: (id - min) / step, of }, SLURM))),
                false => unclear(SLURM, "the array's numbers are a list with gaps"),
            };
        }
        match variable(KUBERNETES) {
            Some(_) => unclear(KUBERNETES, "Kubernetes does not say of how many"),
            None => Ok(None),
        }
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let numbers = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
        match numbers {
            Some((index, of)) if index < of => Ok(Self { index, of }),
            _ => Err("expected I/N with I from 0 to N - 1".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slurm(numbers: [&str; 5]) -> Result<Option<(Share, &'static str)>> {
        let names = ["ID", "MIN", "MAX", "STEP", "COUNT"];
        Share::of_job(|name| {
            let part = name.strip_prefix("SLURM_ARRAY_TASK_")?;
            let value = numbers[names.iter().position(|n| *n == part)?];
            (!value.is_empty()).then(|| value.to_owned())
        })
    }

    #[test]
    fn an_array_of_jobs_says_its_shares() {
        let share = |index, of| Some((Share { index, of }, "SLURM_ARRAY_TASK_ID"));
        assert_eq!(slurm(["2", "0", "3", "1", "4"]).unwrap(), share(2, 4));
        assert_eq!(slurm(["4", "1", "4", "1", "4"]).unwrap(), share(3, 4));
        assert_eq!(slurm(["6", "0", "6", "2", "4"]).unwrap(), share(3, 4));
        assert_eq!(slurm(["2", "2", "2", "1", "1"]).unwrap(), share(0, 1));
        assert_eq!(slurm(["", "", "", "", ""]).unwrap(), None);
        for unclear in [["3", "0", "5", "1", "3"], ["1", "0", "6", "2", "4"], ["2", "", "", "", ""]] {
            let error = slurm(unclear).unwrap_err().to_string();
            assert!(error.contains("hint: ") && error.contains("--shard I/N"), "{error}");
        }
        let kubernetes = Share::of_job(|name| (name == "JOB_COMPLETION_INDEX").then(|| "1".to_owned()));
        assert!(kubernetes.unwrap_err().to_string().contains("of how many"));
    }
}
