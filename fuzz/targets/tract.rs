//! An ONNX file up to its plan: sizes are refused before tract takes memory, and its panics become errors.
#![no_main]

use dmd_runtime_native::{Generator, ModelFile, Options, Provider};
use libfuzzer_sys::fuzz_target;

fuzz_target!(
    init: std::panic::set_hook(Box::new(|_| ())), // those of tract are caught; any other still ends the process
    |bytes: &[u8]| {
        let Ok(file) = ModelFile::parse("it", bytes.to_vec()) else { return };
        if file.info.image_len() * file.info.batch.unwrap_or(1) > 1 << 16 {
            return; // allowed, and slow
        }
        let options = Options { provider: Provider::Tract, threads: Some(1), ..Options::default() };
        let _ = Generator::load(file, &options);
    }
);
