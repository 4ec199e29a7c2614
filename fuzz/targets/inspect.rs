//! What `dmd-run info` and every provider do first: read an ONNX file and check it, without an engine.
#![no_main]

use dmd_runtime_native::ModelFile;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    dmd_fuzz::within(bytes.len(), 64, || {
        if let Ok(file) = ModelFile::parse("it", bytes.to_vec()) {
            assert!(file.info.image_len() > 0 && file.info.output < file.info.outputs.len());
        }
    });
});
