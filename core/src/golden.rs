//! Golden files: what a model must compute, written beside it by the exporter and compared by the runtimes. A
//! safetensors file whose tensors have the names of the model's inputs and output; this is the description in its
//! metadata. Inputs are those of the noise contract, so a reader can check its own noise as well.

use serde::{Deserialize, Serialize};

use crate::card::Kind;
use crate::{Error, Result, noise};

/// Key of the description in the metadata.
pub const GOLDEN_KEY: &str = "dmd.golden";
/// Version of the description's layout.
pub const GOLDEN_VERSION: u32 = 1;
/// What replaces the extension of the model's name.
pub const EXTENSION: &str = "golden.safetensors";

/// What a golden file says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GoldenInfo {
    /// [`GOLDEN_VERSION`].
    pub golden_version: u32,
    /// Name on the model's card.
    pub name: String,
    /// Generator or teacher.
    pub kind: Kind,
    /// SHA-256 of the model file, followed by the file of its weights if they are outside; hexadecimal.
    pub sha256: String,
    /// Seed of the noise in the model's image input.
    pub seed: u32,
    /// Images `0..count` of the seed.
    pub count: usize,
    /// Noise contract: [`noise::CONTRACT`].
    pub noise: String,
    /// Program and version that wrote the file.
    pub created_by: String,
}

impl GoldenInfo {
    /// Reads and checks the JSON of the metadata.
    pub fn from_json(text: &str) -> Result<Self> {
        let info: Self = serde_json::from_str(text).map_err(|e| Error::Golden(e.to_string()))?;
        let wrong = |key: &str, got: String, expected: String| {
            Err(Error::Golden(format!("got `{key}` {got}, expected {expected}")))
        };
        if info.golden_version != GOLDEN_VERSION {
            return wrong("golden_version", info.golden_version.to_string(), GOLDEN_VERSION.to_string());
        }
        if info.noise != noise::CONTRACT {
            return wrong("noise", info.noise, noise::CONTRACT.to_owned());
        }
        if info.count == 0 {
            return wrong("count", "0".to_owned(), "at least 1".to_owned());
        }
        Ok(info)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_noise_and_count_are_checked() {
        let info = |version: u32, noise: &str, count: usize| {
            let text = format!(
                r#"{{"golden_version":{version},"name":"x","kind":"generator","sha256":"","seed":0,"count":{count},
                "noise":"{noise}","created_by":"x"}}"#
            );
            GoldenInfo::from_json(&text).map(|info| info.count).map_err(|e| e.to_string())
        };
        assert_eq!(info(1, noise::CONTRACT, 3), Ok(3));
        for (got, key) in [
            (info(2, noise::CONTRACT, 3), "golden_version"),
            (info(1, "dmd-noise-0", 3), "noise"),
            (info(1, noise::CONTRACT, 0), "count"),
        ] {
            assert!(got.clone().is_err_and(|e| e.contains(&format!("got `{key}`"))), "{key}: {got:?}");
        }
    }
}
