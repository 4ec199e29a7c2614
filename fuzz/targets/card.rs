//! The model card of an ONNX file and the description of a golden file.
#![no_main]

use dmd_core::card::ModelCard;
use dmd_core::golden::GoldenInfo;
use dmd_core::schedule::Schedule;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    dmd_fuzz::within(text.len(), 128, || {
        let _ = GoldenInfo::from_json(text);
        let Ok(card) = ModelCard::from_json(text) else { return };
        Schedule::new(&card.schedule);
        assert!(card.image_shape().iter().all(|n| *n > 0));
        if let Some(classes) = &card.provenance.classes {
            assert!(classes.of_image(u64::MAX) < classes.count);
            let _ = classes.find("sneaker");
        }
        let again = ModelCard::from_json(&serde_json::to_string(&card).expect("JSON"));
        assert!(again.is_ok(), "{again:?}");
    });
});
