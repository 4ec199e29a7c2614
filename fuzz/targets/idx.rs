//! A folder of idx files, plain or compressed: images, then labels, split where the first byte says (in 255ths).
#![no_main]

use std::fs;

use dmd_distill::data::{Source, Split};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((share, rest)) = bytes.split_first() else { return };
    let (images, labels) = rest.split_at(rest.len() * usize::from(*share) / 255);
    let folder = dmd_fuzz::folder();
    fs::write(folder.join("train-images-idx3-ubyte"), images).expect("a file");
    fs::write(folder.join("train-labels-idx1-ubyte"), labels).expect("a file");
    dmd_fuzz::within(bytes.len(), 4 * 1032, || {
        let source = Source::find(folder.to_str().expect("a path"), Split::Train).expect("idx files");
        let count = source.count();
        if let Ok(loaded) = source.load([1, 4, 4]) {
            let count = count.expect("a count of what can be read");
            assert_eq!((loaded.data.len(), loaded.data.labels.len()), (count, count));
        }
    });
});
