//! What is there of a folder of pairs that several processes have filled, perhaps in several folders that were joined.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::pairs::{ShardFile, shard_sizes};

/// The shards of a folder beside those that are wanted.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Inventory {
    wanted: usize,
    pairs: usize,
    missing: Vec<usize>,
    /// Number, pairs that it has, pairs that it should have.
    short: Vec<[usize; 3]>,
    /// Numbers of shards with the same content.
    twice: Vec<[usize; 2]>,
    /// Files that look like shards and have another name.
    strange: Vec<String>,
}

impl Inventory {
    /// Of the first `count` pairs in `folder`.
    ///
    /// # Errors
    /// If a shard does not hold pairs of this base.
    pub fn of(folder: &Path, base: &Checkpoint, count: usize) -> Result<Self> {
        let mut found = Self { pairs: count, ..Self::default() };
        let mut first = BTreeMap::new();
        for (i, wanted) in shard_sizes(count).enumerate() {
            let file = ShardFile::new(folder, i, base);
            found.wanted += 1;
            let Some(shard) = file.read()? else {
                found.missing.push(i);
                continue;
            };
            if shard.count() < wanted {
                found.short.push([i, shard.count(), wanted]);
            }
            if let Some(other) = first.insert(shard.sha256()?, i) {
                found.twice.push([other, i]);
            }
        }
        for entry in std::fs::read_dir(folder).map_err(Error::file("list", folder))? {
            let name = entry.map_err(Error::file("list", folder))?.file_name().to_string_lossy().into_owned();
            let number = name.strip_prefix("shard-").and_then(|rest| rest.strip_suffix(".safetensors"));
            let further = number.is_some_and(|n| n.len() >= 5 && n.bytes().all(|b| b.is_ascii_digit()));
            if name.contains("shard") && !further {
                found.strange.push(name);
            }
        }
        found.strange.sort();
        Ok(found)
    }

    /// Whether every pair is there once.
    pub fn is_complete(&self) -> bool {
        [self.missing.len(), self.short.len(), self.twice.len(), self.strange.len()] == [0; 4]
    }
}

impl fmt::Display for Inventory {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { wanted, pairs, .. } = self;
        for i in &self.missing {
            writeln!(f, "shard {i} is missing")?;
        }
        for [i, got, expected] in &self.short {
            writeln!(f, "shard {i}: got {got} pairs, expected {expected}")?;
        }
        for [a, b] in &self.twice {
            writeln!(f, "shards {a} and {b} hold the same images: delete the one that was copied")?;
        }
        for name in &self.strange {
            writeln!(f, "`{name}` is no name of a shard")?;
        }
        match self.is_complete() {
            true => write!(f, "{wanted} shards, {pairs} pairs: complete"),
            false => write!(
                f,
                "{wanted} shards, {pairs} pairs: not complete; `pairs` without `--check` computes what is missing"
            ),
        }
    }
}
