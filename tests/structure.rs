//! What keeps the workspace in shape: edges between crates as ARCHITECTURE.md allows them, dependencies as deny.toml allows
//! them, files of a readable length.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use dmd_tests::{read_text, repository};
use serde_json::Value;

/// Lines of a file of code.
const LONGEST: usize = 500;
/// Tensor libraries, programs' and files' business, which core must not know.
const NOT_IN_CORE: [&str; 6] = ["candle-core", "tract-onnx", "ort", "ndarray", "clap", "anyhow"];

fn cargo_metadata() -> Result<Value> {
    let mut cargo = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()));
    cargo.args(["metadata", "--format-version", "1", "--locked", "--all-features"]);
    let done = cargo.current_dir(repository()).output()?;
    ensure!(done.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&done.stderr));
    Ok(serde_json::from_slice(&done.stdout)?)
}

fn list<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    value[key].as_array().with_context(|| format!("no list `{key}`"))
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("no text `{key}` in {value}"))
}

/// The packages of this workspace by their folder.
fn members(metadata: &Value) -> Result<BTreeMap<String, &Value>> {
    let own = list(metadata, "workspace_members")?;
    let mut members = BTreeMap::new();
    for package in list(metadata, "packages")?.iter().filter(|package| own.contains(&package["id"])) {
        let manifest = PathBuf::from(text(package, "manifest_path")?);
        let folder = manifest.parent().context("no folder")?.strip_prefix(repository())?.to_owned();
        members.insert(folder.to_string_lossy().replace('\\', "/"), package);
    }
    Ok(members)
}

/// Edges that ARCHITECTURE.md allows, written `to ← {from, from}`, as (from, to).
fn allowed() -> Result<BTreeSet<(String, String)>> {
    let page = read_text(&repository().join("ARCHITECTURE.md"))?;
    let mut edges = BTreeSet::new();
    for code in page.split('`').skip(1).step_by(2) {
        let Some((to, from)) = code.split_once(" ← {") else { continue };
        for from in from.trim_end_matches('}').split(',') {
            edges.insert((from.trim().to_owned(), to.to_owned()));
        }
    }
    ensure!(edges.len() >= 8, "ARCHITECTURE.md allows {edges:?} only");
    Ok(edges)
}

#[test]
fn crates_depend_on_each_other_as_the_architecture_says() -> Result<()> {
    let metadata = cargo_metadata()?;
    let members = members(&metadata)?;
    let folder_of: BTreeMap<&str, &str> = members
        .iter()
        .map(|(folder, package)| Ok((text(package, "name")?, folder.as_str())))
        .collect::<Result<_>>()?;
    let mut found = BTreeSet::new();
    for (folder, package) in &members {
        for dependency in list(package, "dependencies")? {
            if let Some(to) = folder_of.get(text(dependency, "name")?)
                && folder != "tests"
                && folder != to
            {
                found.insert((folder.clone(), (*to).to_owned()));
            }
        }
    }
    let allowed = allowed()?;
    ensure!(found == allowed, "edges are {found:?}, ARCHITECTURE.md allows {allowed:?}");
    let page = read_text(&repository().join("ARCHITECTURE.md"))?;
    for folder in members.keys().filter(|folder| !folder.contains('/')) {
        ensure!(
            page.contains(&format!("| `{folder}/` |")),
            "ARCHITECTURE.md does not say what `{folder}/` is"
        );
    }
    for name in list(members["core"], "dependencies")?.iter().filter_map(|d| d["name"].as_str()) {
        ensure!(!NOT_IN_CORE.contains(&name), "core depends on {name}");
    }
    let export: Vec<_> =
        list(members["export"], "dependencies")?.iter().filter_map(|d| d["name"].as_str()).collect();
    ensure!(!export.iter().any(|name| name.starts_with("candle")), "export knows candle: {export:?}");
    Ok(())
}

#[test]
fn packages_describe_themselves() -> Result<()> {
    let metadata = cargo_metadata()?;
    for (folder, package) in members(&metadata)?.iter().filter(|(folder, _)| *folder != "tests") {
        for key in ["description", "license", "readme", "rust_version"] {
            ensure!(package[key].as_str().is_some_and(|v| !v.is_empty()), "`{folder}` has no `{key}`");
        }
        ensure!(!list(package, "keywords")?.is_empty(), "`{folder}` has no `keywords`");
        let readme = PathBuf::from(text(package, "manifest_path")?).with_file_name(text(package, "readme")?);
        ensure!(readme.is_file(), "{} does not exist", readme.display());
        let version = text(package, "version")?;
        let changes = read_text(&repository().join("CHANGELOG.md"))?;
        ensure!(changes.contains(&format!("## {version}")), "CHANGELOG.md has no version {version}");
    }
    Ok(())
}

/// Whether a licence expression (SPDX, or the old form with slashes) can be met with these licences.
fn can_be_met(expression: &str, licences: &BTreeSet<String>) -> bool {
    let expression = expression.trim();
    let (mut depth, mut ands, mut ors) = (0, Vec::new(), Vec::new());
    for (at, character) in expression.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ if depth > 0 => {}
            '/' => ors.push((at, 1)),
            _ if expression[at..].starts_with(" OR ") => ors.push((at, 4)),
            _ if expression[at..].starts_with(" AND ") => ands.push((at, 5)),
            _ => {}
        }
    }
    // OR binds less than AND.
    if let Some((at, length)) = ors.first() {
        return can_be_met(&expression[..*at], licences) || can_be_met(&expression[at + length..], licences);
    }
    if let Some((at, length)) = ands.first() {
        return can_be_met(&expression[..*at], licences) && can_be_met(&expression[at + length..], licences);
    }
    match expression.strip_prefix('(').and_then(|inner| inner.strip_suffix(')')) {
        Some(inner) => can_be_met(inner, licences),
        None => licences.contains(expression),
    }
}

#[test]
fn licence_expressions_are_understood() {
    let mit: BTreeSet<String> = ["MIT".to_owned(), "A WITH B".to_owned()].into();
    for met in
        ["MIT", "MIT OR X", "X/MIT", "(X OR MIT) AND MIT", "X AND Y OR MIT", "A WITH B OR X", "X / MIT"]
    {
        assert!(can_be_met(met, &mit), "{met}");
    }
    for not in ["X", "MIT AND X", "(MIT OR Y) AND X", "X OR Y", "A", "MIT-0", ""] {
        assert!(!can_be_met(not, &mit), "{not}");
    }
}

#[test]
fn dependencies_have_the_licences_and_sources_of_deny_toml() -> Result<()> {
    let deny: Value = toml::from_str(&read_text(&repository().join("deny.toml"))?)?;
    let strings = |value: &Value, key: &str| -> Result<BTreeSet<String>> {
        list(value, key)?.iter().map(|v| Ok(v.as_str().context("not a text")?.to_owned())).collect()
    };
    let allow = strings(&deny["licenses"], "allow")?;
    let mut exceptions: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for exception in list(&deny["licenses"], "exceptions")? {
        exceptions.insert(text(exception, "crate")?, strings(exception, "allow")?);
    }
    let registries = strings(&deny["sources"], "allow-registry")?;
    let metadata = cargo_metadata()?;
    let mut needed = BTreeSet::new();
    for package in list(&metadata, "packages")? {
        let Some(source) = package["source"].as_str() else { continue };
        let name = text(package, "name")?;
        let known = source.strip_prefix("registry+").is_some_and(|registry| registries.contains(registry));
        ensure!(known, "{name} is from {source}, expected {registries:?}");
        let licence = package["license"].as_str().unwrap_or_default();
        if can_be_met(licence, &allow) {
            continue;
        }
        let more = exceptions.get(name).into_iter().flatten().cloned();
        let with_exception: BTreeSet<String> = allow.iter().cloned().chain(more).collect();
        ensure!(can_be_met(licence, &with_exception), "{name} has the licence `{licence}`, see deny.toml");
        needed.insert(name);
    }
    let written: BTreeSet<&str> = exceptions.keys().copied().collect();
    ensure!(needed == written, "deny.toml excepts {written:?}, needed are {needed:?}");
    Ok(())
}

/// Files of code below a folder that git knows of.
fn code() -> Result<Vec<PathBuf>> {
    let done = Command::new("git").args(["ls-files", "-z"]).current_dir(repository()).output()?;
    ensure!(done.status.success(), "git ls-files: {}", String::from_utf8_lossy(&done.stderr));
    let names = String::from_utf8(done.stdout)?;
    let is_code = |path: &Path| match path.extension().and_then(|e| e.to_str()) {
        Some("rs" | "py" | "js" | "ts" | "css" | "html" | "h" | "c") => true,
        None => path.starts_with("scripts"),
        _ => false,
    };
    Ok(names.split('\0').filter(|n| !n.is_empty()).map(PathBuf::from).filter(|p| is_code(p)).collect())
}

#[test]
fn no_file_of_code_is_too_long_to_read() -> Result<()> {
    let files = code()?;
    ensure!(files.len() > 100, "{} files", files.len());
    for path in files.iter().map(|path| repository().join(path)).filter(|path| path.is_file()) {
        let lines = read_text(&path)?.lines().count();
        ensure!(lines <= LONGEST, "{} has {lines} lines, expected at most {LONGEST}", path.display());
    }
    Ok(())
}
