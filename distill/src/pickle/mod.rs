//! Tensors of a PyTorch file (`torch.save`, zip format). The pickle in it is read, never executed; the file may be
//! hostile. Arguments of a tensor: `torch/_utils.py`.

#[cfg(test)]
mod tests;
mod values;

use std::collections::HashMap;
use std::io::{Cursor, Read};

use candle_core::{Device, Tensor};
use zip::ZipArchive;

use self::values::{Described, Values};
use crate::network::Tensors;

/// Keys under which a training program's checkpoint may hold the weights.
const STATE_KEYS: [&str; 6] = ["state_dict", "model_state_dict", "model", "ema", "unet", "ddpm"];
/// Bytes of the pickle, which holds names and sizes only.
const PICKLE_LIMIT: u64 = 1 << 26;
/// Weights hardly compress, and PyTorch does not try: what unpacks to more than so many times its file, and this many bytes
/// besides, is no checkpoint.
const RATIO: u64 = 16;
const SPARE: u64 = 1 << 20;
/// What begins the record at the end of a zip file, and what stands so many bytes before it if a zip64 record counts instead.
const END: [u8; 4] = *b"PK\x05\x06";
const LOCATOR: [u8; 4] = *b"PK\x06\x07";
const LOCATOR_BYTES: usize = 20;
/// Bytes from the end of a file, at least, in which its end record is looked for: the record and a comment of 2^16.
const TAIL: usize = (1 << 16) + 64;
/// Bytes that an entry takes in the directory of a zip file, at least.
const ENTRY_BYTES: usize = 46;

/// Why a file is of no use.
#[derive(Debug)]
pub enum Problem {
    /// It is damaged, or of another kind.
    Broken(String),
    /// It mentions something that is no tensor.
    Foreign(String),
}

type Result<T> = std::result::Result<T, Problem>;

/// A zip file, and how many bytes may still be unpacked from it.
struct Archive<'a> {
    zip: ZipArchive<Cursor<&'a [u8]>>,
    left: u64,
}

fn broken<T>(problem: impl ToString) -> Result<T> {
    Err(Problem::Broken(problem.to_string()))
}

/// All tensors of a file as f32, by name; those of the state dict inside if a training program saved more than that. A zip
/// file that holds one PyTorch file is opened first.
pub fn read(bytes: &[u8]) -> Result<Tensors> {
    let mut archive = open(bytes)?;
    let names: Vec<String> = archive.zip.file_names().filter_map(|n| Some(n.ok()?.into_owned())).collect();
    let Some(pickle) = names.iter().find(|name| name.rsplit('/').next() == Some("data.pkl")) else {
        let inner: Vec<&String> = names.iter().filter(|name| is_inner(name)).collect();
        return match inner.as_slice() {
            [] => broken("there is no data.pkl in it"),
            [name] => read_archive(&archive.entry(name, u64::MAX)?),
            [first, second, ..] => broken(format!("it holds several models: `{first}`, `{second}`, …")),
        };
    };
    let folder = pickle.strip_suffix("data.pkl").unwrap_or_default().to_owned();
    tensors(&mut archive, &folder)
}

/// A PyTorch file, but no zip file around one.
fn read_archive(bytes: &[u8]) -> Result<Tensors> {
    let mut archive = open(bytes)?;
    let pickle = archive.zip.file_names().filter_map(std::result::Result::ok).find_map(|name| {
        name.strip_suffix("data.pkl").filter(|f| f.is_empty() || f.ends_with('/')).map(str::to_owned)
    });
    match pickle {
        Some(folder) => tensors(&mut archive, &folder),
        None => broken("there is no data.pkl in the file inside it"),
    }
}

/// Opens a zip file that can hold as many entries as it announces: `ZipArchive` reserves memory for the announced ones (of a
/// zip64 record only if there is room for them).
fn open(bytes: &[u8]) -> Result<Archive<'_>> {
    for at in bytes.len().saturating_sub(TAIL)..bytes.len() {
        let Some((&END, record)) = bytes[at..].split_first_chunk() else { continue };
        let Some(&[a, b, c, d]) = record.get(4..8) else { continue };
        let (entries, on_this_disk) = (u16::from_le_bytes([c, d]), u16::from_le_bytes([a, b]));
        let counted = at.checked_sub(LOCATOR_BYTES).is_some_and(|at| bytes[at..].starts_with(&LOCATOR));
        let believed = entries == on_this_disk && !(entries == u16::MAX && counted);
        if believed && usize::from(entries) > bytes.len() / ENTRY_BYTES {
            return broken(format!("it announces {entries} files, more than it has room for"));
        }
    }
    let zip = ZipArchive::new(Cursor::new(bytes)).or_else(broken)?;
    Ok(Archive { zip, left: RATIO * bytes.len() as u64 + SPARE })
}

/// Whether an entry of a zip file may be a PyTorch file.
fn is_inner(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name);
    let known = [".pth", ".pt", ".bin", ".ckpt"].iter().any(|suffix| file.ends_with(suffix));
    known && !file.starts_with('.') && !name.starts_with("__MACOSX")
}

impl Archive<'_> {
    /// Unpacks a file of at most `limit` bytes.
    fn entry(&mut self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let limit = limit.min(self.left);
        let file = self.zip.by_name(name).or_else(|e| broken(format!("`{name}`: {e}")))?;
        let mut bytes = Vec::new();
        let read =
            file.take(limit + 1).read_to_end(&mut bytes).or_else(|e| broken(format!("`{name}`: {e}")))?;
        match self.left.checked_sub(read as u64).filter(|_| read as u64 <= limit) {
            Some(left) => self.left = left,
            None => return broken(format!("`{name}` unpacks to more than {limit} bytes")),
        }
        Ok(bytes)
    }
}

/// The tensors of `FOLDER/data.pkl`, whose values are in `FOLDER/data/`.
fn tensors(archive: &mut Archive, folder: &str) -> Result<Tensors> {
    let values = Values::parse(&archive.entry(&format!("{folder}data.pkl"), PICKLE_LIMIT)?)?;
    if let Some(foreign) = values.foreign() {
        return Err(Problem::Foreign(foreign));
    }
    let inside = |key: &&str| values.member(values.root, key);
    let dicts = std::iter::once(values.root).chain(STATE_KEYS.iter().filter_map(inside));
    for dict in dicts {
        let described = values.described(dict)?;
        if described.is_empty() {
            continue;
        }
        let (mut storages, mut found) = (HashMap::new(), Tensors::new());
        let (mut stored, mut gathered) = (0, 0);
        for (name, tensor) in described {
            let path = format!("{folder}data/{}", tensor.key);
            if !storages.contains_key(&path) {
                let bytes = archive.entry(&path, u64::MAX)?;
                let values = floats(&bytes, tensor.class)?;
                stored += values.len();
                storages.insert(path.clone(), values);
            }
            let values = tensor.gather(name, &storages[&path])?;
            gathered += values.elem_count();
            if gathered > 4 * stored {
                return broken("its tensors overlap");
            }
            found.insert(name.to_owned(), values);
        }
        return Ok(found);
    }
    broken("there are no tensors in it")
}

/// The numbers of a storage as f32.
fn floats(bytes: &[u8], class: &str) -> Result<Vec<f32>> {
    fn each<const N: usize>(bytes: &[u8], number: fn([u8; N]) -> f32) -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|bytes| number(*bytes)).collect()
    }
    Ok(match class {
        "FloatStorage" => each(bytes, f32::from_le_bytes),
        "DoubleStorage" => each(bytes, |b| f64::from_le_bytes(b) as f32),
        "HalfStorage" => each(bytes, |b| half::f16::from_le_bytes(b).to_f32()),
        "BFloat16Storage" => each(bytes, |b| half::bf16::from_le_bytes(b).to_f32()),
        "LongStorage" => each(bytes, |b| i64::from_le_bytes(b) as f32),
        "IntStorage" => each(bytes, |b| i32::from_le_bytes(b) as f32),
        "ShortStorage" => each(bytes, |b| f32::from(i16::from_le_bytes(b))),
        "CharStorage" => each(bytes, |b| f32::from(i8::from_le_bytes(b))),
        "ByteStorage" | "BoolStorage" => each(bytes, |[b]| f32::from(b)),
        other => return broken(format!("unsupported storage type {other}")),
    })
}

impl Described<'_> {
    /// The numbers in the order of the axes.
    fn gather(&self, name: &str, storage: &[f32]) -> Result<Tensor> {
        let outside = || Problem::Broken(format!("tensor `{name}` reaches beyond its storage"));
        let count = self.size.iter().try_fold(1usize, |n, size| n.checked_mul(*size));
        let count = count.filter(|n| *n <= storage.len()).ok_or_else(outside)?;
        let last = (self.size.iter().zip(&self.stride)).try_fold(self.offset, |last, (size, stride)| {
            last.checked_add(size.saturating_sub(1).checked_mul(*stride)?)
        });
        if count > 0 && last.is_none_or(|last| last >= storage.len()) {
            return Err(outside());
        }
        let mut data = Vec::with_capacity(count);
        let mut index = vec![0; self.size.len()];
        for _ in 0..count {
            data.push(
                storage[self.offset + index.iter().zip(&self.stride).map(|(i, s)| i * s).sum::<usize>()],
            );
            for (i, size) in index.iter_mut().zip(&self.size).rev() {
                *i += 1;
                if *i < *size {
                    break;
                }
                *i = 0;
            }
        }
        Tensor::from_vec(data, self.size.as_slice(), &Device::Cpu).or_else(broken)
    }
}
