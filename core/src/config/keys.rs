//! Reads a JSON object key by key, so that none is overlooked.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// The keys of a JSON object that are still to be looked at.
pub(crate) struct Keys(pub(crate) Map<String, Value>);

impl Keys {
    pub(crate) fn take<T: DeserializeOwned>(&mut self, key: &str, missing: T) -> Result<T> {
        match self.0.remove(key) {
            None => Ok(missing),
            Some(v) => {
                serde_json::from_value(v.clone()).map_err(|e| Error::config(key, format!("got {v}: {e}")))
            }
        }
    }

    /// Accepts the key only with the one value that is implemented (which is also diffusers' own default).
    pub(crate) fn only(&mut self, key: &str, expected: Value) -> Result<()> {
        match self.0.remove(key) {
            None => Ok(()),
            Some(v) if v == expected => Ok(()),
            Some(v) => Err(Error::config(key, format!("got {v}, only {expected} is implemented"))),
        }
    }

    pub(crate) fn finish(self) -> Result<()> {
        match self.0.iter().find(|(k, v)| !k.starts_with('_') && !v.is_null()) {
            None => Ok(()),
            Some((k, v)) => Err(Error::config(k, format!("got {v}, this key is not implemented"))),
        }
    }
}
