//! Weights that lie in files beside the model, ONNX's external data: found, checked and read into the model's messages.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

use dmd_engine::message::{EXTERNAL, Graph, Tensor};

/// Reads every value that lies in a file under `folder`; returns those files, in the order of their names.
pub(crate) fn attach(graph: &mut Graph, folder: &Path) -> Result<Vec<PathBuf>, String> {
    let mut files: BTreeMap<PathBuf, (File, u64)> = BTreeMap::new();
    for tensor in graph.initializer.iter_mut().filter(|tensor| tensor.data_location == EXTERNAL) {
        let place = place(tensor)?;
        let path = folder.join(place.location);
        let unreadable = |e: std::io::Error| {
            let (shown, location) = (path.display(), place.location);
            format!(
                "its weights lie in `{shown}`, which cannot be read: {e}\n\nhint: `{location}` belongs beside the model"
            )
        };
        if !files.contains_key(&path) {
            files.insert(path.clone(), (File::open(&path).map_err(unreadable)?, 0));
        }
        let Some((file, read)) = files.get_mut(&path) else { continue };
        let size = file.metadata().map_err(unreadable)?.len();
        let length = place.length.unwrap_or(size.saturating_sub(place.offset));
        if place.offset.checked_add(length).is_none_or(|end| end > size) {
            return Err(format!(
                "weight `{}` lies in `{}` at {}, {length} bytes, but the file has {size}\n\nhint: the two files are of \
                 different exports, or one is cut off",
                tensor.name,
                path.display(),
                place.offset
            ));
        }
        *read += length;
        if *read > size {
            let (name, path) = (&tensor.name, path.display());
            return Err(format!(
                "weight `{name}` lies in `{path}` where another does, expected one after another"
            ));
        }
        let mut values = vec![0; length as usize];
        file.seek(SeekFrom::Start(place.offset)).map_err(unreadable)?;
        file.read_exact(&mut values).map_err(unreadable)?;
        tensor.raw_data = values.into();
        tensor.external_data.clear();
        tensor.data_location = 0;
    }
    Ok(files.into_keys().collect())
}

/// Where a value lies.
struct Place<'a> {
    location: &'a str,
    offset: u64,
    length: Option<u64>,
}

fn place(tensor: &Tensor) -> Result<Place<'_>, String> {
    let name = &tensor.name;
    let entry = |key: &str| {
        tensor.external_data.iter().find(|entry| entry.key == key).map(|entry| entry.value.as_str())
    };
    let number = |key: &str| {
        let parse = |text: &str| text.parse().map_err(|_| format!("weight `{name}` has the {key} `{text}`"));
        entry(key).map(parse).transpose()
    };
    let location = entry("location").unwrap_or_default();
    let inside = |part| matches!(part, Component::Normal(_));
    if location.is_empty() || !Path::new(location).components().all(inside) {
        return Err(format!("weight `{name}` lies in `{location}`, expected a file beside the model"));
    }
    Ok(Place { location, offset: number("offset")?.unwrap_or(0), length: number("length")? })
}
