//! The class `Generator` as JavaScript sees it, in Node.js: run by scripts/test-web with wasm-bindgen's test runner.
//! The engine and the file format have their tests natively; what pages see is tested in `tests/web`.

use dmd_assets::ONE_STEP_FASHION as MODEL;
use js_sys::{Array, Function, JSON, Object, Reflect, Uint8Array, Uint8ClampedArray};
use wasm_bindgen::prelude::*;
use wasm_bindgen_test::wasm_bindgen_test;

use crate::generator::{Request, Towards};
use crate::js::Generator;

fn property(object: &JsValue, name: &str) -> JsValue {
    Reflect::get(object, &JsValue::from(name)).expect("no object")
}

fn number(object: &JsValue, name: &str) -> f64 {
    property(object, name).as_f64().expect("no number")
}

fn options<T: JsCast>(json: &str) -> Option<T> {
    Some(JSON::parse(json).expect("no JSON").unchecked_into())
}

fn generator() -> Generator {
    Generator::new(MODEL.to_vec()).unwrap_or_else(|_| panic!("the bundled model was refused"))
}

fn pictures(made: Result<Array, JsError>) -> Vec<JsValue> {
    made.unwrap_or_else(|error| panic!("{}", message(error))).to_vec()
}

fn message(error: JsError) -> String {
    property(&JsValue::from(error), "message").as_string().expect("no message")
}

fn bytes(picture: &JsValue) -> Vec<u8> {
    property(picture, "data").unchecked_into::<Uint8ClampedArray>().to_vec()
}

#[wasm_bindgen_test]
fn pictures_are_the_samples_of_the_request_as_rgba() {
    let generator = generator();
    let made = pictures(generator.generate(options(r#"{"seed": 7, "first": 3, "count": 2, "class": 5}"#)));
    assert_eq!(made.len(), 2);
    let inner = crate::generator::Generator::from_bytes(MODEL.to_vec()).expect("no generator");
    for (image, picture) in (3..).zip(&made) {
        let request = Request { seed: 7, image, class: Some(5), ..Request::default() };
        let grey = inner.pixels(&inner.sample(&request).expect("no sample")).data;
        let rgba: Vec<u8> = grey.iter().flat_map(|&v| [v, v, v, 255]).collect();
        assert_eq!(bytes(picture), rgba);
        assert_eq!((number(picture, "width"), number(picture, "height")), (28.0, 28.0));
    }
}

#[wasm_bindgen_test]
fn options_may_be_left_out_undefined_or_null() {
    let generator = generator();
    let first = bytes(&pictures(generator.generate(None))[0]);
    for json in
        ["{}", "null", r#"{"seed": null, "class": null, "towards": null}"#, r#"{"seed": 0, "count": 1}"#]
    {
        assert_eq!(bytes(&pictures(generator.generate(options(json)))[0]), first, "{json}");
    }
    assert!(pictures(generator.generate(options(r#"{"count": 0}"#))).is_empty());
    let arc = r#"{"seed": 3, "towards": {"seed": 9, "share": 0.25}}"#;
    let inner = crate::generator::Generator::from_bytes(MODEL.to_vec()).expect("no generator");
    let towards = Some(Towards { seed: 9, image: 0, share: 0.25 });
    let noise = inner.noise(&Request { seed: 3, towards, ..Request::default() }).expect("no noise");
    let levels = inner.noise_pixels(&noise).data;
    let shown = bytes(&pictures(generator.noise(options(arc)))[0]);
    assert_eq!(shown.iter().step_by(4).copied().collect::<Vec<_>>(), levels);
}

#[wasm_bindgen_test]
fn refusals_name_what_was_got_and_expected() {
    let generator = generator();
    for (json, expected) in [
        (r#"{"seed": 0.5}"#, "got `seed` 0.5, expected a whole number from 0 to 4294967295"),
        (r#"{"seed": -1}"#, "got `seed` -1, expected a whole number from 0 to 4294967295"),
        (r#"{"seed": "x"}"#, "got `seed` no number, expected a whole number from 0 to 4294967295"),
        (
            r#"{"first": 9007199254740992}"#,
            "got `first` 9007199254740992, expected a whole number from 0 to 9007199254740991",
        ),
        (r#"{"class": 10}"#, "got class 10, expected 0 to 9"),
        (r#"{"towards": {"share": 0.5}}"#, "got no `seed` in `towards`"),
        (r#"{"towards": {"seed": 2}}"#, "got no `share`, expected 0 to 1"),
        ("5", "got no object of options, where `first` would be"),
    ] {
        let refused = generator.generate(options(json)).err().map(message);
        assert_eq!(refused.as_deref(), Some(expected), "{json}");
    }
    let refused =
        Generator::new(MODEL[..1000].to_vec()).err().map(message).expect("a part of a file was taken");
    assert!(refused.starts_with("got 1000 bytes that are not a complete ONNX file: "), "{refused}");
}

#[wasm_bindgen_test]
fn info_says_what_the_file_is_and_how_it_runs() {
    let info = JsValue::from(generator().info().unwrap_or_else(|error| panic!("{}", message(error))));
    assert_eq!(property(&info, "kind"), "generator");
    assert_eq!(property(&info, "instructions"), "simd128");
    assert_eq!((number(&info, "threads"), number(&info, "steps")), (1.0, 1.0));
    assert_eq!(number(&property(&info, "classes"), "count"), 10.0);
    assert!(property(&info, "warning").is_null());
    assert!(number(&property(&info, "card"), "parameters") > 0.0);
}

#[wasm_bindgen_test]
async fn a_response_is_read_with_progress() {
    let response = Function::new_with_args("bytes", "return new Response(bytes)")
        .call1(&JsValue::NULL, &Uint8Array::from(MODEL))
        .expect("no response");
    let heard = Array::new();
    let listen = Function::new_with_args("heard", "return (received) => heard.push(received)")
        .call1(&JsValue::NULL, &heard)
        .expect("no function");
    let options = Object::new();
    Reflect::set(&options, &JsValue::from("onProgress"), &listen).expect("no object");
    let loaded = Generator::load(response.unchecked_into(), Some(options.unchecked_into())).await;
    let generator = loaded.unwrap_or_else(|error| panic!("{}", message(error)));
    let last = heard.to_vec().last().and_then(JsValue::as_f64);
    assert_eq!(last, Some(MODEL.len() as f64));
    assert_eq!(pictures(generator.generate(None)).len(), 1);

    let missing = Function::new_no_args("return new Response('', {status: 404})").call0(&JsValue::NULL);
    let refused = Generator::load(missing.expect("no response").unchecked_into(), None).await;
    let refused = refused.err().map(message).expect("a missing file was loaded");
    assert!(refused.contains("got status 404, expected 200\n\nhint: "), "{refused}");
}
