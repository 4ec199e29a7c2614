//! Weights and states of runs: any bytes as a safetensors file.
#![no_main]

use std::path::Path;

use dmd_distill::checkpoint::{read_metadata, read_tensors};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    dmd_fuzz::within(bytes.len(), 64, || {
        let path = Path::new("model.safetensors");
        if let Ok(tensors) = read_tensors(path, bytes) {
            read_metadata(path, bytes).expect("a file whose tensors can be read has a header");
            for tensor in tensors.values() {
                tensor.flatten_all().and_then(|t| t.to_vec1::<f32>()).expect("values");
            }
        }
    });
});
