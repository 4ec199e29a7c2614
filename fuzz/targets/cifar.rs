//! A batch of CIFAR-10: its Python version, a pickle; the binary version where the first byte is odd.
#![no_main]

use std::fs;

use dmd_distill::data::{Source, Split};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, batch)) = bytes.split_first() else { return };
    let folder = dmd_fuzz::folder();
    let [wanted, other] = match kind % 2 {
        0 => ["test_batch", "test_batch.bin"],
        _ => ["test_batch.bin", "test_batch"],
    };
    let _ = fs::remove_file(folder.join(other));
    fs::write(folder.join(wanted), batch).expect("a file");
    dmd_fuzz::within(bytes.len(), 64, || {
        let source = Source::find(folder.to_str().expect("a path"), Split::Test).expect("a batch");
        if let Ok(loaded) = source.load([3, 32, 32]) {
            assert_eq!(loaded.data.images.len(), 3072 * loaded.data.labels.len());
            assert!(loaded.data.labels.iter().all(|label| *label < 10));
        }
    });
});
