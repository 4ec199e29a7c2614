//! A folder with one picture, PNG or (where the first byte is odd) JPEG.
#![no_main]

use std::fs;

use dmd_distill::data::{Source, Split};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, picture)) = bytes.split_first() else { return };
    let folder = dmd_fuzz::folder();
    let [wanted, other] = if kind % 2 == 0 { ["0.png", "0.jpg"] } else { ["0.jpg", "0.png"] };
    let _ = fs::remove_file(folder.join(other));
    fs::write(folder.join(wanted), picture).expect("a file");
    let source = Source::find(folder.to_str().expect("a path"), Split::Train).expect("a picture");
    if let Ok(loaded) = source.load([3, 8, 8]) {
        assert_eq!(loaded.data.images.len(), 3 * 8 * 8);
    }
});
