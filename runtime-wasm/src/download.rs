//! Downloading a model with `fetch`, which browsers, workers and Node.js have.

use js_sys::{Object, Promise, Reflect, Uint8Array};
use wasm_bindgen::prelude::*;
use wasm_bindgen_futures::JsFuture;

use crate::js::thrown;
use crate::{Error, Result};

/// Bytes for which memory is taken before any of them has arrived.
const UNSEEN: f64 = 67_108_864.0;

#[wasm_bindgen]
extern "C" {
    #[wasm_bindgen(catch)]
    fn fetch(url: &str) -> std::result::Result<Promise, JsValue>;

    /// What `fetch` gives.
    pub type Response;
    #[wasm_bindgen(method, getter)]
    fn url(this: &Response) -> String;
    #[wasm_bindgen(method, getter)]
    fn ok(this: &Response) -> bool;
    #[wasm_bindgen(method, getter)]
    fn status(this: &Response) -> u16;
    #[wasm_bindgen(method, getter)]
    fn headers(this: &Response) -> Headers;
    #[wasm_bindgen(method, getter)]
    fn body(this: &Response) -> Option<Body>;

    type Headers;
    #[wasm_bindgen(method)]
    fn get(this: &Headers, name: &str) -> Option<String>;

    type Body;
    #[wasm_bindgen(method, js_name = getReader)]
    fn reader(this: &Body) -> Reader;

    type Reader;
    #[wasm_bindgen(method)]
    fn read(this: &Reader) -> Promise;
}

/// The response for an address, or the response itself.
///
/// # Errors
/// Something that is neither, an address that cannot be reached.
pub async fn response_of(source: JsValue) -> Result<Response> {
    if Reflect::has(&source, &JsValue::from("body")).unwrap_or(false) {
        return Ok(source.unchecked_into());
    }
    let url = match (source.as_string(), source.dyn_ref::<Object>()) {
        (Some(url), _) => url,
        (None, Some(url)) => String::from(url.to_string()),
        _ => return Err(Error::request("got no model, expected an address, a response or bytes")),
    };
    let unreachable =
        |problem: JsValue| Error::Download(format!("cannot fetch the model `{url}`: {}", thrown(problem)));
    let response = JsFuture::from(fetch(&url).map_err(unreachable)?).await.map_err(unreachable)?;
    Ok(response.unchecked_into())
}

/// The bytes of a response. `progress` hears how many have arrived, and of how many, where the server says so.
///
/// # Errors
/// A status other than success, a connection that breaks off.
pub async fn download(
    response: &Response,
    progress: &mut impl FnMut(f64, Option<f64>) -> Result<()>,
) -> Result<Vec<u8>> {
    let url = response.url();
    if !response.ok() {
        return Err(Error::Download(format!(
            "cannot fetch the model `{url}`: got status {}, expected 200\n\n\
             hint: `dmd-export` writes a model; put it where the address points",
            response.status()
        )));
    }
    let headers = response.headers();
    let total = match headers.get("Content-Encoding") {
        Some(_) => None,
        None => headers.get("Content-Length").and_then(|length| length.parse::<f64>().ok()),
    };
    let mut bytes = Vec::with_capacity(total.map_or(0, |total| total.min(UNSEEN) as usize));
    let Some(body) = response.body() else { return Ok(bytes) };
    let reader = body.reader();
    loop {
        let broken = |problem: JsValue| {
            Error::Download(format!(
                "the download of `{url}` broke off after {} bytes: {}",
                bytes.len(),
                thrown(problem)
            ))
        };
        let part = JsFuture::from(reader.read()).await.map_err(broken)?;
        let value = Reflect::get(&part, &JsValue::from("value")).map_err(thrown)?;
        if value.is_undefined() {
            return Ok(bytes);
        }
        let value: Uint8Array = value.unchecked_into();
        let at = bytes.len();
        bytes.resize(at + value.length() as usize, 0);
        value.copy_to(&mut bytes[at..]);
        progress(bytes.len() as f64, total)?;
    }
}
