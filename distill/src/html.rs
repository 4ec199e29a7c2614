//! `report.html` of a run: options, curves, pictures and result on one page that needs no other file and no network.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Map, Value};

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::files;
use crate::report;
use crate::run::Run;

/// Sample grids on the page, spread evenly over the run.
const GRIDS: usize = 8;

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:62rem;padding:0 1rem;\
color:#222;background:#fff}img{max-width:100%;image-rendering:pixelated}table{border-collapse:collapse}\
td,th{border-bottom:1px solid #ccc;padding:.2rem 1rem .2rem 0;text-align:left;vertical-align:top}\
figure{margin:0 0 1.5rem}figcaption{color:#666}.grids{display:grid;grid-template-columns:repeat(auto-fill,minmax(18rem,1fr));gap:1rem}\
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}td,th{border-color:#444}figcaption{color:#999}}";

/// Writes the page for a finished run and its generator.
pub fn write(run: &Run, generator: &Checkpoint) -> Result<()> {
    let options: Map<String, Value> = run.options()?;
    let provenance = &generator.provenance;
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{name}</title><style>{STYLE}</style>\n<h1>{name}</h1>\n",
        name = escape(&provenance.name)
    );
    section(&mut page, "Result", &table(provenance.training.iter().chain(&provenance.metrics)));
    figure(
        &mut page,
        run,
        "comparison.png",
        "noise, before and after distillation, and the teacher, for the same seeds",
    )?;
    let mut curves = String::new();
    for name in report::plot(run)? {
        figure(&mut curves, run, name, "")?;
    }
    section(&mut page, "Curves", &curves);
    let mut grids = String::new();
    for name in sample_grids(run)? {
        figure(&mut grids, run, &format!("samples/{name}"), name.trim_end_matches(".png"))?;
    }
    section(&mut page, "Samples over time", &format!("<div class=\"grids\">{grids}</div>"));
    section(&mut page, "Options", &table(options.iter()));
    files::write(&run.path("report.html"), page.as_bytes())
}

fn section(page: &mut String, title: &str, content: &str) {
    page.push_str(&format!("<h2>{title}</h2>\n{content}\n"));
}

fn table<'a>(rows: impl Iterator<Item = (&'a String, &'a Value)>) -> String {
    let row = |(key, value): (&String, &Value)| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        format!("<tr><th>{}</th><td>{}</td></tr>", escape(key), escape(&text))
    };
    format!("<table>{}</table>", rows.map(row).collect::<String>())
}

fn figure(page: &mut String, run: &Run, name: &str, caption: &str) -> Result<()> {
    let image = BASE64_STANDARD.encode(files::read(&run.path(name))?);
    page.push_str(&format!(
        "<figure><img alt=\"{name}\" src=\"data:image/png;base64,{image}\"><figcaption>{}</figcaption></figure>\n",
        escape(caption)
    ));
    Ok(())
}

/// Names of some of the sample grids, the first and the last among them.
fn sample_grids(run: &Run) -> Result<Vec<String>> {
    let mut names = run.list("samples")?;
    names.retain(|name| name.ends_with(".png"));
    names.sort_unstable();
    let last = names.len().saturating_sub(1);
    let mut chosen: Vec<usize> = (0..GRIDS).map(|i| i * last / (GRIDS - 1)).collect();
    chosen.dedup();
    Ok(chosen.into_iter().filter_map(|i| names.get(i).cloned()).collect())
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
