//! The JavaScript class `Generator`. Numbers are checked here, since JavaScript's are f64 and may be anything.

use js_sys::{Array, JSON, Uint8ClampedArray};
use serde::Serialize;
use wasm_bindgen::prelude::*;

use crate::{Error, Result};
use dmd_core::card::{Classes, ImageSpec, ModelCard};
use dmd_core::pixels::Image;

#[wasm_bindgen(typescript_custom_section)]
const TYPES: &str = r#"
/** What a model file says about itself. */
export interface ModelInfo {
    /** Size of the images and the values of black and white. */
    image: { channels: number, height: number, width: number, range: [number, number] };
    /** The classes that can be asked for; null if the model is unconditional. */
    classes: { count: number, names: string[], none?: number } | null;
    /** The whole card; null if the file has none. */
    card: { name: string, [key: string]: unknown } | null;
    /** Something the user should know; null if all is well. */
    warning: string | null;
}
"#;

#[derive(Serialize)]
struct ModelInfo<'a> {
    image: &'a ImageSpec,
    classes: &'a Option<Classes>,
    card: &'a Option<ModelCard>,
    warning: Option<&'static str>,
}

/// A one-step image generator.
#[wasm_bindgen]
pub struct Generator(crate::generator::Generator);

#[wasm_bindgen]
impl Generator {
    /// Reads the bytes of an ONNX file and prepares it to run. Throws an `Error` that says what is wrong with them.
    #[wasm_bindgen(constructor)]
    pub fn new(bytes: &[u8]) -> std::result::Result<Self, JsError> {
        console_error_panic_hook::set_once();
        Ok(Self(crate::generator::Generator::from_bytes(bytes)?))
    }

    /// What the file says about itself.
    #[wasm_bindgen(unchecked_return_type = "ModelInfo")]
    pub fn info(&self) -> std::result::Result<JsValue, JsError> {
        let contract = self.0.contract();
        let info = ModelInfo {
            image: &contract.image,
            classes: &contract.classes,
            card: &contract.card,
            warning: contract
                .card
                .is_none()
                .then_some("the file has no model card: its images are taken to be in the range -1 to 1"),
        };
        JSON::parse(&serde_json::to_string(&info)?).map_err(|_| JsError::new("the model card is not JSON"))
    }

    /// Generates the images `first_image` to `first_image + count - 1` of a seed, each as RGBA pixels, row by row.
    /// Image k of a seed is the same whatever else is generated. Without a class, image k has class k mod the
    /// number of classes.
    #[wasm_bindgen(unchecked_return_type = "Uint8ClampedArray[]")]
    pub fn generate(
        &self,
        seed: f64,
        first_image: f64,
        count: f64,
        class_index: Option<f64>,
    ) -> std::result::Result<Array, JsError> {
        let seed = whole("seed", seed, f64::from(u32::MAX))? as u32;
        let first = whole("first_image", first_image, MAX_SAFE_INTEGER)? as u64;
        let count = whole("count", count, f64::from(u32::MAX))? as u64;
        let class = class_index
            .map(|c| whole("class_index", c, f64::from(u32::MAX)))
            .transpose()?
            .map(|c| c as usize);
        let images = Array::new();
        for image in first..first + count {
            let sample = self.0.generate(seed, image, class)?;
            images.push(&Uint8ClampedArray::from(rgba(&self.0.pixels(&sample))?.as_slice()));
        }
        Ok(images)
    }
}

const MAX_SAFE_INTEGER: f64 = 9_007_199_254_740_991.0;

fn whole(name: &str, value: f64, max: f64) -> Result<f64> {
    if value.fract() == 0.0 && (0.0..=max).contains(&value) {
        return Ok(value);
    }
    Err(Error::request(format!("got `{name}` {value}, expected a whole number from 0 to {max}")))
}

/// Grey or RGB samples as the RGBA that a canvas takes.
fn rgba(image: &Image) -> Result<Vec<u8>> {
    match image.channels {
        1 => Ok(image.data.iter().flat_map(|&v| [v, v, v, 255]).collect()),
        3 => Ok(image.data.chunks_exact(3).flat_map(|p| [p[0], p[1], p[2], 255]).collect()),
        n => Err(Error::Run(format!("got {n} channels, expected 1 (grey) or 3 (RGB)"))),
    }
}
