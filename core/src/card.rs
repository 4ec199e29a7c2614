//! The model card: what a runtime must know about an ONNX file, and where the model came from.
//! It travels as JSON in `metadata_props` under [`CARD_KEY`], its provenance also as `card.json` beside checkpoints.

use serde::{Deserialize, Serialize};

use crate::schedule::{Prediction, ScheduleConfig};
use crate::{Error, Result};

/// Key of the card in an ONNX file's `metadata_props`.
pub const CARD_KEY: &str = "dmd.card";
/// Version of the card's layout.
pub const CARD_VERSION: u32 = 1;
/// Generator input: standard normal noise `[n, c, h, w]`.
pub const INPUT_Z: &str = "z";
/// Optional input: class index per image, int64 `[n]`.
pub const INPUT_CLASS: &str = "class";
/// Generator output: image `[n, c, h, w]` in the card's range.
pub const OUTPUT_X_GEN: &str = "x_gen";
/// Optional generator output: the same as bytes, u8 `[n, h, w, c]`, rounded as [`crate::pixels`] does.
pub const OUTPUT_IMAGE: &str = "image";
/// Teacher input: noisy image `[n, c, h, w]`.
pub const INPUT_X_T: &str = "x_t";
/// Teacher input: step per image, f32 `[n]`.
pub const INPUT_T: &str = "t";
/// Output of a teacher that predicts noise `[n, c, h, w]`; see [`output_of`] for the others.
pub const OUTPUT_EPS_PRED: &str = "eps_pred";
/// Batch dimension of every input and output, where it is not a fixed number.
pub const BATCH: &str = "n";

/// Name of a teacher's output: it says what the network predicts.
pub fn output_of(prediction: Prediction) -> &'static str {
    match prediction {
        Prediction::Epsilon => OUTPUT_EPS_PRED,
        Prediction::Sample => "x0_pred",
        Prediction::Velocity => "v_pred",
    }
}

/// What the file computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `z` (and `class`) to `x_gen`, one step.
    Generator,
    /// `x_t`, `t` (and `class`) to `eps_pred`.
    Teacher,
}

/// Size and value range of the images.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// Channels.
    pub channels: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Values of black and white.
    pub range: [f32; 2],
}

/// The classes a conditional model knows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Classes {
    /// Number of real classes; valid values of `class` are `0..count`.
    pub count: usize,
    /// Their names, in order; empty if unknown.
    #[serde(default)]
    pub names: Vec<String>,
    /// Row of the class table that means "no class", if the model was trained with one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub none: Option<usize>,
}

/// A published model: the one that this model is a copy of, or was distilled from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Base {
    /// Preset, hub id with the commit (`ORG/NAME@COMMIT`), or folder name.
    pub id: String,
    /// SHA-256 of its weights file, hexadecimal.
    pub sha256: String,
}

/// Where a model came from: `card.json` beside a checkpoint, and part of the card in an ONNX file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Name to show.
    pub name: String,
    /// Classes, if conditional.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub classes: Option<Classes>,
    /// Base model, if this one was distilled from it or is it, downloaded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Base>,
    /// Method, steps, images, seed, ….
    #[serde(default)]
    pub training: serde_json::Map<String, serde_json::Value>,
    /// What was measured.
    #[serde(default)]
    pub metrics: serde_json::Map<String, serde_json::Value>,
}

/// The properties that make a denoiser a one-step generator: `generator.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GeneratorConfig {
    /// Fixed step at which the network is asked.
    pub t_gen: usize,
    /// Factor on `z` before the network.
    pub input_scale: f64,
}

/// Everything a runtime needs to know about an ONNX file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelCard {
    /// [`CARD_VERSION`].
    pub card_version: u32,
    /// Generator or teacher.
    pub kind: Kind,
    /// Architecture of the network.
    pub arch: String,
    /// Size and range of the images.
    pub image: ImageSpec,
    /// Name, classes, base, training, metrics.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Fixed step of a generator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub t_gen: Option<usize>,
    /// `alpha_t` at `t_gen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha_t: Option<f64>,
    /// `sigma_t` at `t_gen`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sigma_t: Option<f64>,
    /// Noise schedule of the base.
    pub schedule: ScheduleConfig,
    /// Noise contract: [`crate::noise::CONTRACT`].
    pub noise: String,
    /// Type of the stored weights.
    pub dtype: String,
    /// Numbers stored as weights in the file.
    pub parameters: usize,
    /// Multiply-accumulate operations per image.
    pub macs: u64,
    /// Program and version that wrote the file.
    pub created_by: String,
}

impl Classes {
    /// Class of image `k` where none is asked: `k mod count`.
    pub fn of_image(&self, k: u64) -> usize {
        (k % self.count.max(1) as u64) as usize
    }

    /// Finds a class by number or by name (upper or lower case).
    pub fn find(&self, text: &str) -> Result<usize> {
        let by_name = self.names.iter().position(|n| n.eq_ignore_ascii_case(text));
        match by_name.or_else(|| text.parse().ok().filter(|c| *c < self.count)) {
            Some(class) => Ok(class),
            None => Err(Error::Request(format!(
                "got class `{text}`, expected 0 to {}{}",
                self.count.saturating_sub(1),
                if self.names.is_empty() {
                    String::new()
                } else {
                    format!(" or a name: {}", self.names.join(", "))
                }
            ))),
        }
    }
}

impl Provenance {
    /// A name and nothing else.
    pub fn named(name: impl Into<String>) -> Self {
        let (training, metrics) = (serde_json::Map::new(), serde_json::Map::new());
        Self { name: name.into(), classes: None, base: None, training, metrics }
    }

    /// Compares the classes with the rows of the network's class table.
    pub fn check_classes(&self, rows: Option<usize>) -> Result<()> {
        let wrong = |problem: String| Err(Error::Card(problem));
        match (&self.classes, rows) {
            (None, _) => Ok(()),
            (Some(c), None) => {
                wrong(format!("got {} classes, but config.json describes a network without classes", c.count))
            }
            (Some(c), Some(rows)) if c.count == 0 || c.count > rows || c.none.is_some_and(|n| n >= rows) => {
                wrong(format!(
                    "got {} classes and `none` {:?}, expected rows of the {rows} in the class table of config.json",
                    c.count, c.none
                ))
            }
            (Some(c), Some(_)) if !c.names.is_empty() && c.names.len() != c.count => {
                wrong(format!("got {} class names for {} classes", c.names.len(), c.count))
            }
            (Some(_), Some(_)) => Ok(()),
        }
    }
}

impl ModelCard {
    /// Reads and checks the JSON of `metadata_props`.
    pub fn from_json(text: &str) -> Result<Self> {
        let version = serde_json::from_str::<serde_json::Value>(text)
            .map_err(|e| Error::Card(format!("not JSON: {e}")))?
            .get("card_version")
            .and_then(serde_json::Value::as_u64);
        if version != Some(u64::from(CARD_VERSION)) {
            let got = version.map_or("none".to_owned(), |v| v.to_string());
            return Err(Error::Card(format!("got `card_version` {got}, expected {CARD_VERSION}")));
        }
        let card: Self = serde_json::from_str(text).map_err(|e| Error::Card(e.to_string()))?;
        let ImageSpec { channels, height, width, range } = &card.image;
        if [*channels, *height, *width].iter().any(|n| *n == 0 || *n > 1 << 16) {
            return Err(Error::Card(format!("got image {channels}x{height}x{width}")));
        }
        if !(range[0] < range[1] && range.iter().all(|v| v.is_finite())) {
            return Err(Error::Card(format!("got image range {range:?}, expected lower then upper")));
        }
        if card.noise != crate::noise::CONTRACT {
            return Err(Error::Card(format!(
                "got noise contract `{}`, expected `{}`",
                card.noise,
                crate::noise::CONTRACT
            )));
        }
        if let Some(c) = &card.provenance.classes
            && (c.count == 0 || (!c.names.is_empty() && c.names.len() != c.count))
        {
            return Err(Error::Card(format!("got {} class names for {} classes", c.names.len(), c.count)));
        }
        Ok(card)
    }

    /// `[channels, height, width]`.
    pub fn image_shape(&self) -> [usize; 3] {
        [self.image.channels, self.image.height, self.image.width]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_says_what_is_predicted() {
        let names = [Prediction::Epsilon, Prediction::Sample, Prediction::Velocity].map(output_of);
        assert_eq!(names, ["eps_pred", "x0_pred", "v_pred"]);
    }

    #[test]
    fn images_take_turns_through_the_classes() {
        let classes = Classes { count: 3, names: Vec::new(), none: Some(3) };
        assert_eq!([0, 1, 2, 3, 7, u64::MAX].map(|k| classes.of_image(k)), [0, 1, 2, 0, 1, 0]);
    }

    #[test]
    fn a_class_is_found_by_name_and_by_number() {
        let names = vec!["Bag".to_owned(), "7".to_owned()];
        let classes = Classes { count: 2, names, none: None };
        let found = ["bag", "7", "0", "1", "2", "-1", "shoe"].map(|text| classes.find(text).ok());
        assert_eq!(found, [Some(0), Some(1), Some(0), Some(1), None, None, None]);
    }

    #[test]
    fn a_card_has_a_name_for_every_class_or_none() {
        let card = |classes: &str| {
            ModelCard::from_json(&format!(
                r#"{{"card_version":1,"kind":"generator","arch":"x","name":"x","schedule":{{}},"noise":"dmd-noise-1",
                "image":{{"channels":1,"height":4,"width":4,"range":[0,1]}},"dtype":"f32","parameters":0,"macs":0,
                "created_by":"x","classes":{{{classes}}}}}"#
            ))
            .map_err(|e| e.to_string())
        };
        assert!(card(r#""count":2,"names":["a","b"]"#).is_ok() && card(r#""count":2"#).is_ok());
        for classes in [r#""count":0"#, r#""count":2,"names":["a"]"#, r#""count":1,"names":["a","b"]"#] {
            assert!(card(classes).is_err_and(|e| e.contains("class names for")), "{classes}");
        }
    }

    fn unnamed() -> Provenance {
        serde_json::from_str(r#"{"name":"x"}"#).unwrap()
    }

    #[test]
    fn classes_are_compared_with_the_class_table() {
        let fits = |count: usize, names: &[&str], none: Option<usize>, rows: Option<usize>| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            let classes = Some(Classes { count, names, none });
            Provenance { classes, ..unnamed() }.check_classes(rows).is_ok()
        };
        assert!(fits(2, &["a", "b"], Some(2), Some(3)) && fits(3, &[], None, Some(3)));
        assert!(unnamed().check_classes(None).is_ok());
        assert!(!fits(2, &[], None, None), "a network without classes");
        assert!(
            !fits(0, &[], None, Some(3)) && !fits(4, &[], None, Some(3)) && !fits(2, &[], Some(3), Some(3))
        );
        assert!(!fits(2, &["a"], None, Some(3)) && !fits(2, &["a", "b", "c"], None, Some(3)));
    }

    #[test]
    fn images_have_a_size_within_bounds() {
        let card = |size: usize, range: &str| {
            let text = format!(
                r#"{{"card_version":1,"kind":"generator","arch":"x","name":"x","schedule":{{}},"noise":"dmd-noise-1",
                "image":{{"channels":1,"height":{size},"width":1,"range":{range}}},"dtype":"f32","parameters":0,"macs":0,
                "created_by":"x"}}"#
            );
            ModelCard::from_json(&text).map(|card| card.image_shape()).map_err(|e| e.to_string())
        };
        for size in [1, 1 << 16] {
            assert_eq!(card(size, "[-1.0,1.0]"), Ok([1, size, 1]));
        }
        for size in [0, (1 << 16) + 1] {
            assert!(card(size, "[-1.0,1.0]").unwrap_err().contains(&format!("got image 1x{size}x1")));
        }
        for range in ["[1.0,1.0]", "[1.0,-1.0]"] {
            assert!(card(1, range).unwrap_err().contains("expected lower then upper"), "{range}");
        }
    }
}
