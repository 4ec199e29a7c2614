//! `dmd-run info` and `dmd-run providers`: tables on stdout, or JSON.

use std::io::Write;
use std::path::{Path, PathBuf};

use dmd_core::card::Kind;
use dmd_runtime_native::file::Port;
use dmd_runtime_native::{ModelInfo, Options, providers as all};

/// Prints what a model file says about itself.
pub fn info(model: Option<&Path>, json: bool) -> anyhow::Result<()> {
    let info = super::open_model(model)?.info;
    let mut out = std::io::stdout().lock();
    if json {
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&info)?)?);
    }
    for (key, value) in rows(&info) {
        writeln!(out, "{key:<12} {value}")?;
    }
    Ok(())
}

/// Prints which providers can be had and why the rest cannot.
pub fn providers(ort_lib: Option<PathBuf>, json: bool) -> anyhow::Result<()> {
    let list = all::list(&Options { ort_lib, ..Options::default() });
    let mut out = std::io::stdout().lock();
    if json {
        return Ok(writeln!(out, "{}", serde_json::to_string_pretty(&list)?)?);
    }
    writeln!(out, "{:<9} {:<9} {:<8} {:<7} engine", "provider", "compiled", "library", "usable")?;
    for status in list {
        let yes_no = |yes: bool| if yes { "yes" } else { "no" };
        let library = match (&status.engine, status.in_library) {
            (_, Some(there)) => yes_no(there),
            (Some(_), None) => "none", // engines compiled in need none
            (None, None) => "missing",
        };
        writeln!(
            out,
            "{:<9} {:<9} {library:<8} {:<7} {}",
            status.provider.name(),
            yes_no(status.compiled),
            yes_no(status.usable),
            status.engine.unwrap_or_default()
        )?;
        for (label, text) in [("reason", status.reason), ("remedy", status.remedy)] {
            if let Some(text) = text {
                writeln!(out, "{:<9} {label}: {text}", "")?;
            }
        }
    }
    Ok(())
}

fn rows(info: &ModelInfo) -> Vec<(&'static str, String)> {
    let ports = |ports: &[Port]| ports.iter().map(Port::to_string).collect::<Vec<_>>().join(", ");
    let [lo, hi] = info.image.range;
    let kind = match info.kind {
        Kind::Generator => "one-step generator",
        Kind::Teacher => "teacher, for several steps",
    };
    let operators = info.operators.iter().map(|(op, n)| format!("{op} {n}")).collect::<Vec<_>>().join(", ");
    let stored = info.stored.iter().map(|(kind, s)| format!("{} {kind} ({} bytes)", s.values, s.bytes));
    let stored = stored.collect::<Vec<_>>().join(", ");
    let mut rows = vec![
        ("file", format!("{}, {} bytes", info.name, info.bytes)),
        ("stored", stored),
        ("kind", kind.to_owned()),
        (
            "image",
            format!("{}x{}x{} in [{lo}, {hi}]", info.image.channels, info.image.height, info.image.width),
        ),
        ("inputs", ports(&info.inputs)),
        ("outputs", ports(&info.outputs)),
        ("batch", info.batch.map_or("any".to_owned(), |n| format!("{n}, fixed"))),
        ("opset", info.opset.to_string()),
        ("operators", operators),
        ("parameters", info.parameters.to_string()),
    ];
    if !info.data_files.is_empty() {
        let names = info.data_files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
        rows.insert(1, ("weights in", names.join(", ")));
    }
    let Some(card) = &info.card else {
        rows.push(("card", "none: the range is assumed, classes are unknown".to_owned()));
        return rows;
    };
    rows.insert(1, ("name", card.provenance.name.clone()));
    rows.push(("MACs", format!("{} per image", card.macs)));
    rows.push(("arch", format!("{}, {} weights", card.arch, card.dtype)));
    if let (Some(t_gen), Some(alpha_t), Some(sigma_t)) = (card.t_gen, card.alpha_t, card.sigma_t) {
        rows.push(("t_gen", format!("{t_gen} (alpha_t {alpha_t:.4}, sigma_t {sigma_t:.4})")));
    }
    if let Some(classes) = &card.provenance.classes {
        rows.push(("classes", format!("{} {}", classes.count, classes.names.join(", "))));
    }
    if let Some(base) = &card.provenance.base {
        rows.push(("base", format!("{} (sha256 {})", base.id, base.sha256)));
    }
    for (key, map) in [("training", &card.provenance.training), ("metrics", &card.provenance.metrics)] {
        if !map.is_empty() {
            rows.push((key, map.iter().map(|(k, v)| format!("{k} {v}")).collect::<Vec<_>>().join(", ")));
        }
    }
    rows.push(("noise", card.noise.clone()));
    rows.push(("created by", card.created_by.clone()));
    rows
}
