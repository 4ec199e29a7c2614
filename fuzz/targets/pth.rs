//! Any bytes as a PyTorch file.
#![no_main]

use std::path::Path;

use dmd_distill::weights::read_file;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    dmd_fuzz::within(bytes.len(), 64, || drop(read_file(Path::new("model.pth"), bytes.to_vec())));
});
