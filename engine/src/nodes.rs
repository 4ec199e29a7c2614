//! Reading a node's attributes.

use crate::message::Node;
use crate::{Error, Result};

/// Largest size, margin or step; sums of them with the sizes of values cannot overflow.
pub(crate) const MAX_SIZE: usize = 1 << 16;

impl Node {
    /// An error about this node.
    pub(crate) fn wrong(&self, problem: impl Into<String>) -> Error {
        Error::Node { node: self.name.clone(), operator: self.op_type.clone(), problem: problem.into() }
    }

    /// A whole number.
    pub(crate) fn int(&self, name: &str, default: i64) -> i64 {
        self.attribute.iter().find(|a| a.name == name).map_or(default, |a| a.i)
    }

    /// A number.
    pub(crate) fn float(&self, name: &str, default: f32) -> f32 {
        self.attribute.iter().find(|a| a.name == name).map_or(default, |a| a.f)
    }

    /// A text.
    pub(crate) fn text(&self, name: &str, default: &'static str) -> String {
        let found = self.attribute.iter().find(|a| a.name == name);
        found.map_or(default.to_owned(), |a| String::from_utf8_lossy(&a.s).into_owned())
    }

    /// Whole numbers, none of them negative or larger than any image; `None` where the attribute is absent.
    pub(crate) fn sizes(&self, name: &str) -> Result<Option<Vec<usize>>> {
        let Some(found) = self.attribute.iter().find(|a| a.name == name) else { return Ok(None) };
        let size = |v: &i64| usize::try_from(*v).ok().filter(|v| *v <= MAX_SIZE);
        match found.ints.iter().map(size).collect() {
            Some(sizes) => Ok(Some(sizes)),
            None => Err(self.wrong(format!("got `{name}` {:?}, expected 0 to {MAX_SIZE}", found.ints))),
        }
    }

    /// Two sizes, for height and width.
    pub(crate) fn pair(&self, name: &str, default: [usize; 2]) -> Result<[usize; 2]> {
        match self.sizes(name)?.as_deref() {
            None => Ok(default),
            Some(&[a, b]) if a > 0 && b > 0 => Ok([a, b]),
            Some(other) => Err(self.wrong(format!("got `{name}` {other:?}, expected two sizes"))),
        }
    }

    /// Refuses an attribute that differs from the only value that is known.
    pub(crate) fn only(&self, name: &str, expected: i64) -> Result<()> {
        match self.int(name, expected) {
            got if got == expected => Ok(()),
            got => Err(self.wrong(format!("got `{name}` {got}, expected {expected}"))),
        }
    }

    /// Refuses a text attribute that differs from the only value that is known.
    pub(crate) fn only_text(&self, name: &str, default: &'static str, expected: &str) -> Result<()> {
        match self.text(name, default) {
            got if got == expected => Ok(()),
            got => Err(self.wrong(format!("got `{name}` `{got}`, expected `{expected}`"))),
        }
    }

    /// An axis of a value with `rank` axes; negative ones count from the end.
    pub(crate) fn axis(&self, axis: i64, rank: usize) -> Result<usize> {
        let from_start = if axis < 0 { axis + rank as i64 } else { axis };
        usize::try_from(from_start)
            .ok()
            .filter(|&a| a < rank)
            .ok_or_else(|| self.wrong(format!("got axis {axis}, expected one of {rank} axes")))
    }
}
