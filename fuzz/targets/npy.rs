//! Images in NumPy's format.
#![no_main]

use std::fs;

use dmd_distill::eval::npy;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let path = dmd_fuzz::folder().join("images.npy");
    fs::write(&path, bytes).expect("a file");
    dmd_fuzz::within(bytes.len(), 16, || {
        if let Ok(images) = npy::read(&path) {
            assert_eq!(images.values.len(), images.shape.iter().product::<usize>());
        }
    });
});
