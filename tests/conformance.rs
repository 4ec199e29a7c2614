//! Files of every kind for readers that are not ours: written here, read by `scripts/check-onnx`. Must not check what they
//! compute: tests/export.rs and tests/bases.rs do.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use dmd_core::card::{Classes, GeneratorConfig, Provenance};
use dmd_core::schedule::Prediction;
use dmd_export::{Array, Checkpoint, Form, Kind, Precision, export_in};
use dmd_tests::{Golden, fixture, seeded};

/// The small networks: both fixtures, the two others with weights from a seed, and one that predicts the image and one that
/// predicts the velocity.
fn networks() -> Result<Vec<Checkpoint>> {
    let mut networks = vec![Checkpoint::load(&fixture("tiny-ddpm"))?];
    for prediction in [Prediction::Epsilon, Prediction::Sample, Prediction::Velocity] {
        let mut network = Checkpoint::load(&fixture("tiny-class"))?;
        network.schedule.prediction_type = prediction;
        if prediction != Prediction::Epsilon {
            network.provenance.name = format!("tiny-{prediction:?}").to_lowercase();
        }
        networks.push(network);
    }
    let golden = Golden::load("bases")?;
    for (case, schedule) in [
        ("small-mnist", r#"{"num_train_timesteps": 400}"#),
        ("small-celeba", r#"{"num_train_timesteps": 50}"#),
    ] {
        let (config, seed) = seeded::case(&golden.cases()?[case])?;
        let classes = config.class_rows().map(|count| Classes { count, names: vec![], none: None });
        networks.push(Checkpoint {
            weights: (seeded::weights(&config, seed)?.into_iter())
                .map(|(name, t)| Ok((name, Array::new(&t.shape, t.data)?)))
                .collect::<Result<_>>()?,
            config,
            schedule: serde_json::from_str(schedule)?,
            generator: None,
            provenance: Provenance { classes, ..Provenance::named(case) },
        });
    }
    Ok(networks)
}

#[test]
fn files_of_every_kind_are_written_for_other_readers() -> Result<()> {
    // Of its own for every caller: scripts/check-onnx may run beside the other tests.
    let folder = std::env::var_os("DMD_CONFORMANCE")
        .map_or_else(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance"), PathBuf::from);
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    fs::create_dir_all(&folder)?;
    let mut written = 0;
    for mut network in networks()? {
        for kind in [Kind::Teacher, Kind::Generator] {
            let t_gen = network.schedule.num_train_timesteps * 2 / 5;
            network.generator =
                (kind == Kind::Generator).then_some(GeneratorConfig { t_gen, input_scale: 0.9 });
            for precision in [Precision::F32, Precision::F16, Precision::Int8] {
                let name = format!("{}-{kind:?}-{precision}.onnx", network.provenance.name).to_lowercase();
                let exported = export_in(&network, kind, &Form { precision, ..Form::default() })?;
                ensure!(exported.card.dtype == precision.to_string(), "{name}: {}", exported.card.dtype);
                fs::write(folder.join(name), exported.bytes)?;
                written += 1;
            }
        }
    }
    ensure!(written == fs::read_dir(&folder)?.count() && written == 36, "{written} files");
    Ok(())
}
