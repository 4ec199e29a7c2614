//! A PyTorch file with any bytes as its pickle, and two storages that it may refer to.
#![no_main]

use std::io::{Cursor, Write};
use std::path::Path;

use dmd_distill::weights::read_file;
use libfuzzer_sys::fuzz_target;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

fn file(pickle: &[u8]) -> zip::result::ZipResult<Vec<u8>> {
    let mut archive = ZipWriter::new(Cursor::new(Vec::new()));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, content) in [("m/data.pkl", pickle), ("m/data/0", &[0x3f; 64]), ("m/data/1", &[0; 4096])] {
        archive.start_file(name, stored)?;
        archive.write_all(content)?;
    }
    Ok(archive.finish()?.into_inner())
}

fuzz_target!(|pickle: &[u8]| {
    let bytes = file(pickle).expect("a zip file");
    dmd_fuzz::within(bytes.len(), 64, || {
        if let Ok(found) = read_file(Path::new("model.pth"), bytes) {
            assert!(!found.tensors.is_empty());
        }
    });
});
