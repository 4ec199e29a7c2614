//! Weights in a file of their own, as ONNX's external data: the model names the file beside it, and where each value
//! lies in it. Nothing is written here.

use tract_onnx::pb::tensor_proto::DataLocation;
use tract_onnx::pb::{GraphProto, StringStringEntryProto};

use crate::{Error, Result};

/// What a protobuf message, and so an ONNX file, can hold.
const LIMIT: usize = i32::MAX as usize;
/// Values start at multiples of a page, so that runtimes can map them into memory.
const PAGE: usize = 4096;

/// Where the weights of a file go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum External {
    /// Into the file.
    #[default]
    Never,
    /// Into the file, or, where it would be larger than ONNX allows, into the file of this name beside it.
    AboveLimit(String),
    /// Into the file of this name beside it.
    Always(String),
}

impl External {
    /// Name of the file for the weights of a model that has `bytes` with them.
    ///
    /// # Errors
    /// If they must go into the model and it is too large.
    pub fn location(&self, bytes: usize) -> Result<Option<&str>> {
        match self {
            Self::Always(name) => Ok(Some(name)),
            _ if bytes <= LIMIT => Ok(None),
            Self::AboveLimit(name) => Ok(Some(name)),
            Self::Never => Err(Error::Request(format!(
                "the file would have {bytes} bytes, and ONNX allows at most {LIMIT} in one file"
            ))),
        }
    }
}

/// Moves every stored value of a page or more into the returned bytes, which are to become the file `location`.
pub fn split(graph: &mut GraphProto, location: &str) -> Vec<u8> {
    let mut data = Vec::new();
    for tensor in graph.initializer.iter_mut().filter(|tensor| tensor.raw_data.len() >= PAGE) {
        let values = std::mem::take(&mut tensor.raw_data);
        data.resize(data.len().next_multiple_of(PAGE), 0);
        let entry = |key: &str, value: String| StringStringEntryProto { key: key.into(), value };
        tensor.external_data = vec![
            entry("location", location.into()),
            entry("offset", data.len().to_string()),
            entry("length", values.len().to_string()),
        ];
        tensor.data_location = Some(DataLocation::External as i32);
        data.extend(values);
    }
    data
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_leave_the_file_where_asked_or_needed() {
        let (always, above) = (External::Always("w".into()), External::AboveLimit("w".into()));
        assert_eq!(always.location(1).unwrap(), Some("w"));
        assert_eq!((above.location(LIMIT).unwrap(), above.location(LIMIT + 1).unwrap()), (None, Some("w")));
        assert_eq!(External::Never.location(LIMIT).unwrap(), None);
        assert!(External::Never.location(LIMIT + 1).unwrap_err().to_string().contains("2147483648 bytes"));
    }
}
