//! The JavaScript class `Generator`. Numbers are checked here, since JavaScript's are f64 and may be anything.

use js_sys::{Array, ArrayBuffer, Function, JSON, Object, Reflect, Uint8Array, Uint8ClampedArray};
use serde::Serialize;
use wasm_bindgen::prelude::*;

use dmd_core::card::{Classes, ImageSpec, Kind, ModelCard};
use dmd_core::pixels::Image;
use dmd_core::sampler::TEACHER_STEPS;

use crate::download::{download, response_of};
use crate::generator::{Request, Towards};
use crate::{Error, Result};

#[wasm_bindgen(typescript_custom_section)]
const TYPES: &str = r#"
/** What a model file says about itself, and how it runs here. */
export interface ModelInfo {
    /** `generator` takes one step, `teacher` takes `steps`. */
    kind: "generator" | "teacher";
    /** Size of the images and the values of black and white. */
    image: { channels: number, height: number, width: number, range: [number, number] };
    /** The classes that can be asked for; null if the model is unconditional. */
    classes: { count: number, names: string[], none?: number } | null;
    /** The whole card; null if the file has none. */
    card: { name: string, parameters: number, [key: string]: unknown } | null;
    /** Something the user should know; null if all is well. */
    warning: string | null;
    /** Threads that a generator uses. */
    threads: number;
    /** What runs the graph: `dmd-engine`, or `tract` where a build with all operators needed it. */
    engine: string;
    /** The vector instructions of this build: `simd128` or `relaxed-simd`. */
    instructions: string;
    /** Steps of a teacher where none are asked for; 1 for a generator. */
    steps: number;
}

/** Which images to generate. Image k of a seed is the same whatever else is generated. */
export interface GenerateOptions {
    /** A whole number from 0 to 4294967295; 0 where it is left out. */
    seed?: number;
    /** How many images; 1 where it is left out. */
    count?: number;
    /** The number of the first image; 0 where it is left out. */
    first?: number;
    /** A class for all images; without one, image k has class k mod the number of classes. */
    class?: number;
    /** Takes noise on the arc towards another seed's; `share` 0 is this seed's own, 1 the other's. */
    towards?: { seed: number, share: number };
    /** Steps of a teacher. */
    steps?: number;
}

/** A picture as a canvas takes it. Where there is no `ImageData`, as in Node.js, an object of the same shape. */
export interface Picture { data: Uint8ClampedArray, width: number, height: number }

export interface LoadOptions {
    /** Hears how many bytes have arrived, and of how many, or null where the server does not say. */
    onProgress?: (received: number, total: number | null) => void;
}
"#;

#[wasm_bindgen]
extern "C" {
    /// Where a model comes from.
    #[wasm_bindgen(typescript_type = "string | URL | Response | ArrayBuffer | Uint8Array")]
    pub type ModelSource;
    /// `LoadOptions` of the declarations.
    #[wasm_bindgen(typescript_type = "LoadOptions")]
    pub type LoadOptions;
    /// `GenerateOptions` of the declarations.
    #[wasm_bindgen(typescript_type = "GenerateOptions")]
    pub type GenerateOptions;
    /// `ModelInfo` of the declarations.
    #[wasm_bindgen(typescript_type = "ModelInfo")]
    pub type Info;

    #[wasm_bindgen(js_name = ImageData)]
    type ImageData;
    #[wasm_bindgen(constructor, js_class = "ImageData")]
    fn new(data: Uint8ClampedArray, width: u32, height: u32) -> ImageData;
}

type JsResult<T> = std::result::Result<T, JsError>;

#[derive(Serialize)]
struct ModelInfo<'a> {
    kind: Kind,
    image: &'a ImageSpec,
    classes: &'a Option<Classes>,
    card: &'a Option<ModelCard>,
    warning: Option<&'static str>,
    threads: usize,
    engine: &'static str,
    instructions: &'static str,
    steps: usize,
}

/// A model that generates images.
#[wasm_bindgen]
pub struct Generator(crate::generator::Generator);

#[wasm_bindgen]
impl Generator {
    /// Reads the bytes of an ONNX file and prepares it to run. Throws an `Error` that says what is wrong with them.
    #[wasm_bindgen(constructor)]
    pub fn new(bytes: Vec<u8>) -> JsResult<Self> {
        console_error_panic_hook::set_once();
        Ok(Self(crate::generator::Generator::from_bytes(bytes)?))
    }

    /// Downloads a model, or takes its bytes or the response that brings them, and prepares it to run.
    pub async fn load(source: ModelSource, options: Option<LoadOptions>) -> JsResult<Self> {
        let source = JsValue::from(source);
        let progress = options.map(JsValue::from).map(|o| field(&o, "onProgress")).transpose()?.flatten();
        let bytes = if let Some(bytes) = source.dyn_ref::<Uint8Array>() {
            bytes.to_vec()
        } else if let Some(buffer) = source.dyn_ref::<ArrayBuffer>() {
            Uint8Array::new(buffer).to_vec()
        } else {
            let response = response_of(source).await?;
            let progress = progress.as_ref().and_then(|f| f.dyn_ref::<Function>());
            download(&response, &mut |received, total| {
                if let Some(progress) = progress {
                    let total = total.map_or(JsValue::NULL, JsValue::from);
                    progress.call2(&JsValue::NULL, &JsValue::from(received), &total).map_err(thrown)?;
                }
                Ok(())
            })
            .await?
        };
        Self::new(bytes)
    }

    /// What the file says about itself.
    pub fn info(&self) -> JsResult<Info> {
        let contract = self.0.contract();
        let total = contract.card.as_ref().map_or(1, |card| card.schedule.num_train_timesteps);
        let info = ModelInfo {
            kind: contract.kind,
            image: &contract.image,
            classes: &contract.classes,
            card: &contract.card,
            warning: contract
                .card
                .is_none()
                .then_some("the file has no model card: its images are taken to be in the range -1 to 1"),
            threads: 1,
            engine: self.0.engine(),
            instructions: dmd_engine::instructions(),
            steps: if contract.kind == Kind::Teacher { TEACHER_STEPS.min(total) } else { 1 },
        };
        let info = JSON::parse(&serde_json::to_string(&info)?);
        info.map(JsCast::unchecked_into).map_err(|_| JsError::new("the model card is not JSON"))
    }

    /// Generates images.
    #[wasm_bindgen(unchecked_return_type = "ImageData[]")]
    pub fn generate(&self, options: Option<GenerateOptions>) -> JsResult<Array> {
        self.each(options, |request| Ok(self.0.pixels(&self.0.sample(request)?)))
    }

    /// The noise that images are generated from, as pictures: mid-grey is 0, black and white are three standard deviations away.
    #[wasm_bindgen(unchecked_return_type = "ImageData[]")]
    pub fn noise(&self, options: Option<GenerateOptions>) -> JsResult<Array> {
        self.each(options, |request| Ok(self.0.noise_pixels(&self.0.noise(request)?)))
    }

    fn each(
        &self,
        options: Option<GenerateOptions>,
        make: impl Fn(&Request) -> Result<Image>,
    ) -> JsResult<Array> {
        let options = options.map_or(JsValue::UNDEFINED, JsValue::from);
        let (seeds, large) = (f64::from(u32::MAX), MAX_SAFE_INTEGER);
        let number = |name: &str, max: f64| -> Result<Option<f64>> {
            field(&options, name)?.map(|value| whole(name, &value, max)).transpose()
        };
        let first = number("first", large)?.unwrap_or(0.0) as u64;
        let count = number("count", seeds)?.unwrap_or(1.0) as u64;
        let other = match field(&options, "towards")? {
            None => None,
            Some(other) => {
                let share = field(&other, "share")?.and_then(|v| v.as_f64());
                let share = share.ok_or_else(|| Error::request("got no `share`, expected 0 to 1"))?;
                let seed =
                    field(&other, "seed")?.ok_or_else(|| Error::request("got no `seed` in `towards`"))?;
                Some((whole("seed", &seed, seeds)? as u32, share as f32))
            }
        };
        let mut request = Request {
            seed: number("seed", seeds)?.unwrap_or(0.0) as u32,
            class: number("class", seeds)?.map(|class| class as usize),
            steps: number("steps", seeds)?.map(|steps| steps as usize),
            ..Request::default()
        };
        let images = Array::new();
        for image in first..first + count {
            request.image = image;
            request.towards = other.map(|(seed, share)| Towards { seed, image, share });
            images.push(&picture(&make(&request)?)?);
        }
        Ok(images)
    }
}

const MAX_SAFE_INTEGER: f64 = 9_007_199_254_740_991.0;

/// A property of an object that may be undefined; null is none.
fn field(object: &JsValue, name: &str) -> Result<Option<JsValue>> {
    if object.is_undefined() || object.is_null() {
        return Ok(None);
    }
    let value = Reflect::get(object, &JsValue::from(name))
        .map_err(|_| Error::request(format!("got no object of options, where `{name}` would be")))?;
    Ok((!value.is_undefined() && !value.is_null()).then_some(value))
}

fn whole(name: &str, value: &JsValue, max: f64) -> Result<f64> {
    match value.as_f64() {
        Some(number) if number.fract() == 0.0 && (0.0..=max).contains(&number) => Ok(number),
        got => {
            let got = got.map_or("no number".to_owned(), |number| number.to_string());
            Err(Error::request(format!("got `{name}` {got}, expected a whole number from 0 to {max}")))
        }
    }
}

/// The message of a thrown value.
pub(crate) fn thrown(value: JsValue) -> Error {
    let message = Reflect::get(&value, &JsValue::from("message")).ok().and_then(|m| m.as_string());
    Error::Download(message.or(value.as_string()).unwrap_or_else(|| "an unknown problem".to_owned()))
}

/// Grey or RGB samples as the RGBA that a canvas takes.
fn picture(image: &Image) -> Result<JsValue> {
    let rgba: Vec<u8> = match image.channels {
        1 => image.data.iter().flat_map(|&v| [v, v, v, 255]).collect(),
        3 => image.data.chunks_exact(3).flat_map(|p| [p[0], p[1], p[2], 255]).collect(),
        n => return Err(Error::Run(format!("got {n} channels, expected 1 (grey) or 3 (RGB)"))),
    };
    let data = Uint8ClampedArray::from(rgba.as_slice());
    let (width, height) = (image.width as u32, image.height as u32);
    if Reflect::has(&js_sys::global(), &JsValue::from("ImageData")).unwrap_or(false) {
        return Ok(ImageData::new(data, width, height).into());
    }
    let plain = Object::new();
    for (name, value) in [("data", data.into()), ("width", width.into()), ("height", height.into())] {
        Reflect::set(&plain, &JsValue::from(name), &value).map_err(thrown)?;
    }
    Ok(plain.into())
}
