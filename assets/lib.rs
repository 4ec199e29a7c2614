//! The small models inside the programs, as bytes; `README.md` beside this file says how they were made. A crate of its own, so that the others can be
//! packaged: a package holds the files of its own folder only.

/// Files of a folder, by name.
pub type Files = &'static [(&'static str, &'static [u8])];

macro_rules! files {
    ($folder:literal: $($name:literal),+) => {
        &[$(($name, include_bytes!(concat!($folder, "/", $name)))),+]
    };
}

/// A class-conditional one-step generator of Fashion-MNIST's images, as `dmd-export` writes it.
pub const ONE_STEP_FASHION: &[u8] = include_bytes!("one-step-fashion.onnx");
/// Its teacher, a diffusers checkpoint.
pub const DDPM_FASHION: Files =
    files!("ddpm-fashion": "config.json", "scheduler_config.json", "card.json", "model.safetensors");
/// The classifier that judges both, and whose features measure distances.
pub const CLASSIFIER_FASHION: Files =
    files!("classifier-fashion": "config.json", "card.json", "model.safetensors");
